"""Pre-training: state evolution of the global minimiser of L(W) (arXiv:2606.05899, arXiv:2509.24914).

With lam~ = sqrt(kappa) lam and the spectral function J(delta, eps) of `lorastate.spectrum`, extremise

    Phi = (q^ V + 2 m^ M - s^ Q)/4 + alpha C(V, M, Q) - (m^^2 / (4 s^)) J(sqrt(q^)/m^, 2 lam~/m^)
    C   = E min_Z [ ||sigma(Z) - sigma(Y)||_F^2 + ||Z - Omega||_F^2 / (4 V) ]

    q^ = -4 alpha dC/dV    m^ = -2 alpha dC/dM    s^ = 4 alpha dC/dQ
    V  =  4 dPsi/dq^       M  =  2 dPsi/dm^       Q  = -4 dPsi/ds^        Psi = m^^2/(4 s^) J
"""

from __future__ import annotations

from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp

from .activation import Identity
from .channel import field_dimension, standard_fields
from .fixed_point import COLD, Map
from .order import Order, decode, from_norm, slopes
from .prox import MapProblem, attach_minimum, locate, polish
from .quadrature import Nodes, Slots, in_blocks, mean, over_replicas, sweep
from .setting import Pretraining
from .symmetric import dimension, to_coordinates


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
    return _problem_at(pre, order, *fields(pre, order, nodes.normal))


def _problem_at(pre: Pretraining, order: Order, y, omega) -> MapProblem:
    return MapProblem(pre.activation, omega, pre.activation(y), order.response)


class Inner(NamedTuple):
    """Minimisers Z of one replica reached from Omega and from Y, as coordinates (2, n_T, N); no derivative.

    `f` (2, N) are the minima, `ok` (N,) whether a descent converged.
    """

    u: Any
    f: Any
    ok: Any

    @property
    def lower(self):
        return jnp.where(self.f[0] < self.f[1], self.u[0], self.u[1])

    @property
    def two_wells(self):
        a, b = self.u
        return jnp.max(jnp.abs(a - b), 0) > 1e-4 * (1 + jnp.max(jnp.abs(a), 0))


def no_inner(pre: Pretraining, nodes: Nodes) -> Inner:
    """Placeholder for all replicas, to be filled by `locate_inner`."""
    r, _, n = nodes.normal.shape
    size = dimension(pre.tokens)
    return Inner(jnp.zeros((r, 2, size, n)), jnp.zeros((r, 2, n)), jnp.zeros((r, n), bool))


def locate_inner(pre: Pretraining, order: Order, nodes: Nodes, previous: Inner, cold: Any = COLD) -> Inner:
    """Inner minimisers of one replica; with `cold` = WARM the descents start at the previous ones."""
    y, omega = fields(pre, order, nodes.normal)
    problem = _problem_at(pre, order, y, omega)
    cold = jnp.asarray(cold) > 0
    starts = jnp.where(cold, jnp.stack([to_coordinates(omega), to_coordinates(y)]), previous.u)

    # A loop, not two calls: the descent is compiled once.
    def descend(k, found):
        return tuple(a.at[k].set(v) for a, v in zip(found, locate(problem, starts[k]), strict=True))

    # Where every node has one minimiser the other start is at the same place.
    count = jnp.where(cold | jnp.any(previous.two_wells), 2, 1)
    nothing = jnp.zeros_like(starts), jnp.zeros_like(previous.f), jnp.zeros((2, starts.shape[-1]), bool)
    found = jax.lax.fori_loop(0, count, descend, nothing)
    u, f, ok = (a.at[1].set(jnp.where(count == 2, a[1], a[0])) for a in found)
    return Inner(u, f, ok[0] | ok[1])


def refresh_inner(pre: Pretraining, order: Order, nodes: Nodes, inner: Inner, steps: Any = 3) -> Inner:
    """Inner minimisers of one replica at order parameters very near those that `inner` was found for."""
    u = polish(inner_problem(pre, order, nodes), inner.lower, steps)
    first = inner.f[0] < inner.f[1]
    return inner._replace(u=jnp.where(jnp.stack([first, ~first])[:, None], u, inner.u))


def minimiser(pre: Pretraining, order: Order, nodes: Nodes, inner: Inner):
    """Coordinates of the lower minimiser Z (n_T, N), with its derivative."""
    return attach_minimum(inner_problem(pre, order, nodes), inner.lower)


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


def conjugates(pre: Pretraining, order: Order, nodes: Nodes | None, inner: Inner | None) -> Conjugates:
    """First half-step, (V, M, Q) -> (q^, m^, s^), from one replica of nodes and its inner minimisers."""
    if nodes is None:
        return conjugates_at(pre, order, None, None)[1]
    return in_blocks(lambda n, i: conjugates_at(pre, order, n, minimiser(pre, order, n, i))[1], nodes, inner)


def thresholds(pre: Pretraining, c: Conjugates):
    """(delta, eps, eta): S_hat = eta ReLU(S* + delta Z - eps) in law."""
    lam = jnp.sqrt(pre.kappa) * pre.lam
    return jnp.sqrt(c.qhat) / c.mhat, 2 * lam / c.mhat, c.mhat / c.shat


def prior_potential(pre: Pretraining, c: Conjugates):
    """Psi = (m^^2 / (4 s^)) J(sqrt(q^)/m^, 2 lam~/m^)."""
    delta, eps, _ = thresholds(pre, c)
    return c.mhat**2 / (4 * c.shat) * pre.law.J(delta, eps)


def order_parameters(pre: Pretraining, c: Conjugates) -> Order:
    """Second half-step: (q^, m^, s^) -> (V, M, Q)."""
    d = jax.grad(lambda c: prior_potential(pre, c))(c)
    return from_norm(4 * d.qhat, 2 * d.mhat, -4 * d.shat, pre.label_size)


def image_of(pre: Pretraining, c: Conjugates):
    """`order_parameters` in the solver's coordinates: (log V, M, noise) and, with a task, M_down.

    M_down = Tr(S_hat S*)/D = (2/m^) dPsi/da needs the conjugates. It rides along with the order parameters, which do
    not depend on it, so that everything downstream finds it in the fixed point, derivatives and error bars included.
    """
    x = order_parameters(pre, c).encode()
    if pre.task is None:
        return x

    def potential(a):
        return prior_potential(eqx.tree_at(lambda p: p.task.a, pre, a), c)

    return jnp.append(x, 2 / c.mhat * jax.grad(potential)(pre.task.a))


def downstream_overlap(pre: Pretraining, x):
    """M_down = Tr(S_hat S*)/D at the solver's coordinates `x`; M without a task."""
    return decode(x).overlap if pre.task is None else x[3]


def step(x, pre: Pretraining, const: tuple[Nodes, Inner] | None):
    """One sweep of state evolution in the solver's coordinates; `const` holds the inner minimisers at x."""
    order = decode(x)
    if const is None:
        return image_of(pre, conjugates(pre, order, None, None))
    return image_of(pre, mean(over_replicas(lambda n, i: conjugates(pre, order, n, i), *const)))


def state_evolution(pre: Pretraining, nodes: Nodes) -> Map:
    """The same sweep for the solver: finds the inner minimisers and remembers them from step to step."""

    def image(x, memory, cold, count):
        order = decode(x)

        def one(n, previous):
            inner = locate_inner(pre, order, n, previous, cold)
            return (conjugates(pre, order, n, inner), 1.0 * jnp.any(inner.two_wells)), inner

        (c, two), memory = sweep(one, nodes, memory, count)
        return image_of(pre, c), memory, two == 0

    def jacobian(x, memory, count):
        def plain(x):
            c, _ = sweep(lambda n, i: (conjugates(pre, decode(x), n, i), i), nodes, memory, count, write=False)
            return image_of(pre, c)

        return jax.jacfwd(plain)(x)

    return Map(image, jacobian, Slots.commit)


def start(pre: Pretraining, weak_ridge: bool = False):
    """(V, M, Q) = (1, Q0/2, Q0/2), from which the damped iteration reaches the global minimiser's branch.

    With a weak ridge and fewer samples than the interpolation threshold V grows as 1/lam and that start can be too far:
    then (0.1/lam, 0.9 Q0, 0.9 Q0).
    """
    share, V = (0.9, 0.1 / pre.lam) if weak_ridge else (0.5, jnp.ones_like(pre.lam))
    x = from_norm(V, share * pre.Q0, share * pre.Q0, pre.label_size).encode()
    return x if pre.task is None else jnp.append(x, share * pre.common)
