"""Pre-training: state evolution of the global minimiser of L(W) (arXiv:2606.05899, arXiv:2509.24914).

With lam~ = sqrt(kappa) lam and the spectral function J(delta, eps) of `lorastate.spectrum`, extremise

    Phi = (q^ V + 2 m^ M - s^ Q)/4 + alpha C(V, M, Q) - (m^^2 / (4 s^)) J(sqrt(q^)/m^, 2 lam~/m^)
    C   = E min_Z [ ||sigma(Z) - sigma(Y)||_F^2 + ||Z - Omega||_F^2 / (4 V) ]

    q^ = -4 alpha dC/dV    m^ = -2 alpha dC/dM    s^ = 4 alpha dC/dQ
    V  =  4 dPsi/dq^       M  =  2 dPsi/dm^       Q  = -4 dPsi/ds^        Psi = m^^2/(4 s^) J
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from . import spectrum
from .activation import Identity
from .channel import field_dimension, standard_fields
from .order import Order, decode, from_norm, slopes
from .prox import MapProblem, minimise
from .quadrature import Nodes, mean, over_replicas
from .setting import Pretraining
from .symmetric import to_coordinates


class Conjugates(NamedTuple):
    """q^, m^, s^ of pre-training."""

    qhat: Any
    mhat: Any
    shat: Any


def node_dimension(pre: Pretraining) -> int:
    """Gaussian dimensions that pre-training integrates over: two fields on Sym_T less what sigma forgets."""
    if isinstance(pre.activation, Identity):
        return 0
    return field_dimension(pre.tokens, pre.activation.forgets_shift)


def fields(pre: Pretraining, order: Order, nodes):
    """(Y, Omega) at the nodes, (T, T, N) each: covariance [[Q0 + delta/2, M], [M, Q]] x (1 + delta_ab)."""
    one, two = standard_fields(nodes, pre.tokens, pre.activation.forgets_shift)
    y = jnp.sqrt(pre.label_size) * one
    return y, order.overlap / pre.label_size * y + order.noise * two


def inner_problem(pre: Pretraining, order: Order, nodes: Nodes) -> MapProblem:
    y, omega = fields(pre, order, nodes.normal)
    return MapProblem(pre.activation, omega, pre.activation(y), order.response)


def inner_minimum(pre: Pretraining, order: Order, nodes: Nodes):
    """Coordinates of the inner minimiser Z (n_T, N): the lower of the minima reached from Omega and from Y.

    Returns `(u, two_wells, converged)`; the flags are per node.
    """
    y, omega = fields(pre, order, nodes.normal)
    problem = inner_problem(pre, order, nodes)
    starts = jnp.stack([to_coordinates(omega), to_coordinates(y)])
    # lax.map, not two calls: the descent is compiled once.
    (a, b), (fa, fb), ok = jax.lax.map(lambda s: minimise(problem, s), starts)
    two = jnp.max(jnp.abs(a - b), 0) > 1e-4 * (1 + jnp.max(jnp.abs(a), 0))
    return jnp.where(fa < fb, a, b), two, ok[0] | ok[1]


def channel_potential(pre: Pretraining, order: Order, nodes: Any, u=None):
    """C(V, M, Q). Identity: n Delta_0 / (T^2 + 4 V), n = T(T+1), Delta_0 = Q0 + delta/2 - 2 M + Q.

    Otherwise the weighted sum over nodes at the inner minimiser `u`, which may be held fixed: the envelope
    theorem makes its first derivatives exact then.
    """
    if isinstance(pre.activation, Identity):
        t = pre.tokens
        gap = pre.label_size - 2 * order.overlap + order.norm(pre.label_size)
        return t * (t + 1) * gap / (t * t + 4 * order.response)
    return jnp.sum(nodes.weight * inner_problem(pre, order, nodes).terms(u)[0])


def conjugates_at(pre: Pretraining, order: Order, nodes: Nodes | None, u):
    """(C, conjugates) at the inner minimiser `u`."""

    def potential(o):
        return channel_potential(pre, o, nodes, u)

    d = slopes(potential, order, pre.label_size)
    c = Conjugates(-4 * pre.alpha * d.response, -2 * pre.alpha * d.overlap, 4 * pre.alpha * d.norm)
    return potential(order), c


def conjugates(pre: Pretraining, order: Order, nodes: Nodes | None) -> Conjugates:
    """First half-step, (V, M, Q) -> (q^, m^, s^), from one replica of nodes."""
    u = None if nodes is None else inner_minimum(pre, order, nodes)[0]
    return conjugates_at(pre, order, nodes, u)[1]


def thresholds(pre: Pretraining, c: Conjugates):
    """(delta, eps, eta): S_hat = eta ReLU(S* + delta Z - eps) in law."""
    lam = jnp.sqrt(pre.kappa) * pre.lam
    return jnp.sqrt(c.qhat) / c.mhat, 2 * lam / c.mhat, c.mhat / c.shat


def prior_potential(pre: Pretraining, c: Conjugates):
    """Psi = (m^^2 / (4 s^)) J(sqrt(q^)/m^, 2 lam~/m^)."""
    delta, eps, _ = thresholds(pre, c)
    return c.mhat**2 / (4 * c.shat) * spectrum.J(delta, eps, pre.kappa0)


def order_parameters(pre: Pretraining, c: Conjugates) -> Order:
    """Second half-step: (q^, m^, s^) -> (V, M, Q)."""
    d = jax.grad(lambda c: prior_potential(pre, c))(c)
    return from_norm(4 * d.qhat, 2 * d.mhat, -4 * d.shat, pre.label_size)


def step(x, pre: Pretraining, nodes: Nodes | None):
    """One sweep of state evolution in the solver's coordinates."""
    order = decode(x)
    if nodes is None:
        return order_parameters(pre, conjugates(pre, order, None)).encode()
    return order_parameters(pre, mean(over_replicas(lambda n: conjugates(pre, order, n), nodes))).encode()


def start(pre: Pretraining):
    """(V, M, Q) = (1, Q0/2, Q0/2), from which the damped iteration reaches the global minimiser's branch."""
    half = pre.Q0 / 2
    return from_norm(jnp.ones_like(half), half, half, pre.label_size).encode()
