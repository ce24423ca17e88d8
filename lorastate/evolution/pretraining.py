"""Pre-training: state evolution of the global minimiser of L(W) (arXiv:2606.05899, arXiv:2509.24914).

With lam~ = sqrt(kappa) lam and the spectral function J(delta, eps) of `lorastate.model.spectra.wishart`, extremise

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

from ..math.fixed_point import COLD, Map
from ..math.quadrature import Nodes, Slots, in_blocks, mean, over_replicas, sweep
from ..math.symmetric import dimension, to_coordinates
from ..model import wells
from ..model.activation import Identity, Softmax
from ..model.channel.fields import field_dimension, standard_fields
from ..model.proximal import MapProblem
from ..model.wells import Wells
from ..setting.stages import Pretraining
from .order import Order, decode, from_norm


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


def no_inner(pre: Pretraining, nodes: Nodes) -> Wells:
    """Placeholder for all parts, to be filled by `locate_inner`."""
    parts, n = nodes.weight.shape
    none = jnp.zeros((parts, n), bool)
    return Wells(jnp.zeros((parts, 2, dimension(pre.tokens), n)), none, none)


def locate_inner(
    pre: Pretraining, order: Order, nodes: Nodes, previous: Wells, cold: Any = True, thorough: Any = True
) -> Wells:
    """Inner minimisers of one part; unless `cold` the descents start at the previous ones. A cold search that is not
    `thorough` finds one well at every node."""
    y, omega = (to_coordinates(z) for z in fields(pre, order, nodes.normal))
    # Where softmax is nearly a choice of one token a well has each row's choice from Omega or from Y. The way to a
    # single one is shortest from between the two.
    between = (omega + y) / 2
    many = jnp.stack([jnp.where(thorough, omega, between), y, between, omega + y, 2 * y])
    starts = jnp.concatenate([jnp.where(cold, many[:2], previous.u), many[2:]])
    every = cold & thorough
    asked = jnp.ones(starts.shape[::2], bool)
    asked = jnp.concatenate([asked[:1], (every | (~cold & previous.two))[None], asked[2:]])
    return wells.descend(inner_problem(pre, order, nodes), starts, asked, jnp.where(every, len(starts), 2))


#: Of so many parts of the nodes the first search of second wells takes one, where V is so small, in units of 1/beta^2,
#: that there are hardly any: below about one the inner problem is convex.
_FEWER, _STIFF = 4, 16.0


def _thorough(pre: Pretraining, order: Order, parts: int, two: Any):
    """In which parts of the nodes a cold search looks for second wells: everywhere, or at some nodes first where they
    are not to be expected and where none are known (`two`)."""
    stiff = order.response * pre.activation.beta**2 < _STIFF if isinstance(pre.activation, Softmax) else False
    return (jnp.arange(parts) % _FEWER == 0) | jnp.logical_not(stiff) | two


def refresh_inner(pre: Pretraining, order: Order, nodes: Nodes, found: Wells, steps: Any = 3) -> Wells:
    """Inner minimisers of one part at order parameters very near those that they were found for."""
    return wells.polish(inner_problem(pre, order, nodes), found, steps)


class Averages(NamedTuple):
    """What the equations need of the nodes (one part, or a mean). With h = (Omega - Z)/(2 V), the derivative of the
    inner minimum in Omega: C; E h . Y; E h . G / noise; E |h|^2; share of nodes with two wells."""

    potential: Any
    teacher: Any
    divergence: Any
    square: Any
    two_wells: Any


def averages(pre: Pretraining, order: Order, nodes: Nodes | None, found: Wells | None) -> Averages:
    """The averages over one part of the nodes, whose inner minimisers are `found`.

    Identity, without nodes: C = n Delta_0 / (T^2 + 4 V), n = T(T+1), Delta_0 = Q0 + delta/2 - 2 M + Q.
    """
    if nodes is None or found is None:
        t, size = pre.tokens, pre.label_size
        n, scale = t * (t + 1), t * t + 4 * order.response
        # size - 2 M + Q without its cancellation: near a perfect fit of noiseless labels it is tiny.
        gap = (size - order.overlap) ** 2 / size + order.noise**2
        # h = 2 (Omega - Y)/(T^2 + 4 V); E (Omega - Y) . Y = n (M - size) and E |Omega - Y|^2 = n Delta_0.
        teacher = 2 * n * (order.overlap - size) / scale
        return Averages(n * gap / scale, teacher, 2 * n / scale, 4 * n * gap / scale**2, 0.0)
    one, two = standard_fields(nodes.normal, pre.tokens, pre.activation.forgets_shift)
    problem = inner_problem(pre, order, nodes)
    low = wells.lowest(problem, found)
    omega = to_coordinates(problem.omega)

    def lower(h):
        return low.pick(jax.vmap(lambda u: h((omega - u) / (2 * order.response)))(low.u))

    h, square = lower(lambda h: h), lower(lambda h: jnp.sum(h * h, 0))

    def mean(a):
        return jnp.sum(nodes.weight * a)

    teacher = mean(jnp.sum(h * jnp.sqrt(pre.label_size) * to_coordinates(one), 0))
    known = _without_noise(pre, order, one, problem.target)
    divergence = mean(jnp.sum((h - known) * to_coordinates(two), 0)) / order.noise
    return Averages(mean(low.depth), teacher, divergence, mean(square), mean(1.0 * found.two))


#: V, in units of E Y^2, from which on a student is there for sure.
_THERE = 0.1


def _without_noise(pre: Pretraining, order: Order, one, target):
    """What h would be without the independent part G of Omega at a small response, (n, N): the gradient of the loss at
    (M/E Y^2) Y. E h . G knows nothing of it, but an average over nodes divided by a noise that is next to nothing (a
    student that hardly is there) would consist of nothing else. At larger responses h is another one, whose errors make
    up for those of the other averages: there this is zero."""

    def gradient():
        y = order.overlap / jnp.sqrt(pre.label_size) * one
        return (1 - small**2) ** 2 * to_coordinates(pre.activation.loss_terms(y, target)[1])

    small = order.response / (_THERE * pre.label_size)
    zero = jnp.zeros((dimension(pre.tokens), one.shape[-1]), one.dtype)
    return jax.lax.cond(small < 1, gradient, lambda: zero)


def averages_of(pre: Pretraining, order: Order, nodes: Nodes, found: Wells) -> Averages:
    """`averages` from one part of the nodes, block by block."""
    return in_blocks(lambda n, w: averages(pre, order, n, w), nodes, found)


def conjugates(pre: Pretraining, order: Order, a: Averages) -> Conjugates:
    """First half-step, q^ = -4 alpha dC/dV, m^ = -2 alpha dC/dM, s^ = 4 alpha dC/dQ, from the averages."""
    mhat = -2 * pre.alpha * (a.teacher - order.overlap * a.divergence) / pre.label_size
    return Conjugates(4 * pre.alpha * a.square, mhat, 2 * pre.alpha * a.divergence)


def free_energy(pre: Pretraining, order: Order, a: Averages):
    """Phi, per D^2: the training loss, penalty included."""
    c, V, M, Q = conjugates(pre, order, a), order.response, order.overlap, order.norm(pre.label_size)
    return (c.qhat * V + 2 * c.mhat * M - c.shat * Q) / 4 + pre.alpha * a.potential - prior_potential(pre, c)


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


def step(x, pre: Pretraining, const: tuple[Nodes, Wells] | None):
    """One sweep of state evolution in the solver's coordinates; `const` holds the inner minimisers at x."""
    order = decode(x)
    if const is None:
        return image_of(pre, conjugates(pre, order, averages(pre, order, None, None)))
    a = mean(over_replicas(lambda n, w: averages_of(pre, order, n, w), *const))
    return image_of(pre, conjugates(pre, order, a))


def state_evolution(pre: Pretraining, nodes: Nodes) -> Map:
    """The same sweep for the solver: finds the inner minimisers and remembers them from step to step."""

    def image(x, memory, how, count):
        order, cold = decode(x), how == COLD

        def one(part, previous):
            n, thorough = part
            found = locate_inner(pre, order, n, previous, cold, thorough)
            return averages_of(pre, order, n, found), found

        thorough = _thorough(pre, order, len(nodes.weight), jnp.any(memory.read().two))
        a, memory = sweep(one, (nodes, thorough), memory, count)
        return image_of(pre, conjugates(pre, order, a)), memory

    def jacobian(x, memory, count):
        def plain(x):
            order = decode(x)
            a, _ = sweep(lambda n, w: (averages_of(pre, order, n, w), w), nodes, memory, count, write=False)
            return image_of(pre, conjugates(pre, order, a))

        return jax.jacfwd(plain)(x)

    return Map(image, jacobian, Slots.commit)


#: V lam (or V, where that is None), M / Q0 and Q / Q0 of the starts.
_STARTS = {
    "usual": (None, 0.5, 0.5), "weak ridge": (0.1, 0.9, 0.9), "few samples": (0.05, 0.015, 0.05),
    "hardly any": (0.02, 0.005, 0.015),
}  # fmt: skip


def start(pre: Pretraining, kind: str = "usual"):
    """(V, M, Q) = (1, Q0/2, Q0/2), from which the damped iteration reaches the global minimiser's branch.

    With a "weak ridge" and fewer samples than the interpolation threshold V grows as 1/lam and that start can be too
    far; so can that one with so "few samples" that they tell little of S*, or "hardly any".
    """
    V, m, q = _STARTS[kind]
    V = jnp.ones_like(pre.lam) if V is None else V / pre.lam
    x = from_norm(V, m * pre.Q0, q * pre.Q0, pre.label_size).encode()
    return x if pre.task is None else jnp.append(x, m * pre.common)
