"""Fine-tuning: state evolution of the rank-one LoRA update w on the frozen map (arXiv:2606.05899).

    phi = (q' v + 2 m' m - l' q)/2 + alpha' c(v, m, q) - (m'^2 q0 + q') / (2 (l' + 2 lam'))
    c   = E min_chi [ ||sigma(Z_W + chi chi^T) - sigma(Y0 + chi* chi*^T)||_F^2 + ||chi - omega||^2 / (2 v) ]

    q' = -2 alpha' dc/dv     m' = -alpha' dc/dm     l' = 2 alpha' dc/dq
    v  = 1/(l' + 2 lam')     m  = m' q0 v           q  = (m'^2 q0 + q') v^2

The inner loss is even in chi, so where it has two wells the minimiser jumps as omega crosses a surface through
the origin. Plain nodes see the jump only by chance: expectations converge slowly and their derivatives miss
the term of the surface. The nodes are therefore split along it (`split_nodes`).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.scipy.special import ndtr, ndtri

from .channel import Fields, FrozenMap
from .order import Order, decode, from_norm, slopes
from .prox import VectorProblem, ldl_solve, minimise
from .quadrature import Nodes, mean, over_replicas
from .setting import Finetuning

#: Size of the LoRA teacher: entries of w* are N(0, q0).
TEACHER_SIZE = 1.0


class Conjugates(NamedTuple):
    """q', m', l' of fine-tuning."""

    qhat: Any
    mhat: Any
    lhat: Any


class Draws(NamedTuple):
    """Samples that the fine-tuning expectation runs over, node-last; `weight` sums to one.

    `teacher` is chi* (T, N), `noise` the independent standard field g of omega = (m/q0) chi* + noise g; `side` is +1
    on a node and -1 on its mirror image g -> -g.
    """

    fields: Fields
    teacher: Any
    noise: Any
    weight: Any
    side: Any


def node_dimension(fine: Finetuning) -> int:
    """Gaussian dimensions: chi*, g, and what the channel needs."""
    assert fine.tokens is not None
    return 2 * fine.tokens + fine.inputs.dimension(fine.tokens, fine.activation.forgets_shift)


def draws(fine: Finetuning, frozen: FrozenMap, nodes: Nodes) -> Draws:
    """Plain draws from the nodes: chi* first, then g, then the channel's coordinates."""
    t = fine.tokens
    x = nodes.normal
    channel = fine.inputs.fields(frozen, fine.delta, t, fine.activation.forgets_shift, x[2 * t :])
    teacher = jnp.sqrt(TEACHER_SIZE) * x[:t]
    return Draws(channel, teacher, x[t : 2 * t], nodes.weight, nodes.side)


def label(fine: Finetuning, d: Draws):
    """sigma(Y') with Y' = Y0 + chi* chi*^T."""
    return fine.activation(d.fields.y0 + d.teacher[:, None] * d.teacher[None])


def student(order: Order, d: Draws):
    """omega = (m/q0) chi* + noise g: jointly Gaussian with chi*, covariance [[q0, m], [m, q]]."""
    return order.overlap / TEACHER_SIZE * d.teacher + order.noise * d.noise


def inner_problem(fine: Finetuning, order: Order, d: Draws) -> VectorProblem:
    return VectorProblem(fine.activation, d.fields.zw, student(order, d), label(fine, d), order.response)


def central_well(problem: VectorProblem, teacher):
    """One of the two equal minimisers +-chi_0 at omega = 0 (T, N): the wells that the two sides belong to.

    It is zero where the loss has a single well there.
    """
    still = problem._replace(omega=jnp.zeros_like(problem.omega))
    origin = jnp.zeros_like(problem.omega)
    downhill = _softest(still.terms(origin)[2], teacher)
    u, f, _ = jax.lax.map(lambda s: minimise(still, s), jnp.stack([downhill, teacher]))
    return jnp.where(f[0] < f[1], u[0], u[1])


def _softest(h, guess):
    """Rough eigenvector of the smallest eigenvalue of H (T, T, N), by power steps; only a start of a descent."""
    n = h.shape[0]
    bound = jnp.sqrt(jnp.sum(h * h, (0, 1)))
    a = jnp.eye(n)[:, :, None] * bound - h
    for _ in range(4):
        a = jnp.sum(a[:, :, None] * a[None], 1)
        a = a / jnp.sqrt(jnp.sum(a * a, (0, 1)))
    v = jnp.sum(a * guess[None], 1)
    return v / jnp.sqrt(jnp.sum(v * v, 0) + 1e-30)


def split_nodes(fine: Finetuning, order: Order, d: Draws):
    """Splits every node in two, one on each side of the surface on which the inner minimiser jumps.

    The surface passes through omega = 0 with normal chi_0 (`central_well`); for the identity it is exactly the
    plane omega . chi_0 = 0. With e = chi_0 / |chi_0| the component t = e . g is standard normal given all else, and
    x = Phi(t) uniform. At the switching point t* of this line, p = Phi(t*):

        E f = E [ p f(Phi^-1(p x)) + (1 - p) f(Phi^-1(p + (1 - p) x)) ]

    whose integrand is smooth where f jumps only at t* (pre-integration in the sense of Griewank, Kuo, Leovey and
    Sloan, 2018, with one sampled point a side). Where there is no second well p tends smoothly to 1, which is
    the plain node. Returns draws of 2 N nodes and the start chi_0 of their descents.
    """
    problem = inner_problem(fine, order, d)
    # Mirrored nodes look the other way, so that g -> -g stays an exact symmetry of the split set.
    chi0 = central_well(problem, d.teacher) * d.side
    square = jnp.sum(chi0 * chi0, 0)
    depth = jnp.clip((square - 0.01) / 0.09, 0.0, 1.0)  # smooth switch: no split for |chi_0| below 0.1
    split = depth * depth * (3 - 2 * depth)
    safe = jnp.where(square > 1e-4, square, 1.0)
    e = jnp.where(square > 1e-4, chi0, 0.0) / jnp.sqrt(safe)
    t = jnp.sum(e * d.noise, 0)
    across = d.noise - e * t
    at = -order.overlap / TEACHER_SIZE * jnp.sum(e * d.teacher, 0) / order.noise
    at = jnp.clip(at, -7.5, 7.5)
    p = 1 - split * ndtr(-at)
    x = jnp.clip(ndtr(t), 1e-15, 1 - 1e-15)
    left, right = ndtri(p * x), -ndtri(jnp.clip((1 - p) * (1 - x), 1e-16, 1.0))
    noise = jnp.concatenate([across + e * left, across + e * right], 1)
    twice = jax.tree_util.tree_map(lambda a: jnp.concatenate([a, a], -1), (d.fields, d.teacher, d.side, chi0))
    weight = jnp.concatenate([d.weight * p, d.weight * (1 - p)])
    return Draws(twice[0], twice[1], noise, weight, twice[2]), twice[3]


def inner_minimum(fine: Finetuning, order: Order, d: Draws, chi0):
    """The inner minimiser chi (T, N): the lowest minimum reached from the two central wells and from omega.

    Returns `(chi, converged, two_wells)`; the flags are per node.
    """
    problem = inner_problem(fine, order, d)
    near = jnp.sign(jnp.sum(problem.omega * chi0, 0)) * chi0
    u, f, ok = jax.lax.map(lambda s: minimise(problem, s), jnp.stack([near, -near, problem.omega]))
    two = jnp.max(jnp.abs(u[0] - u[1]), 0) > 1e-4
    lower = jnp.where(f[0] < f[1], u[0], u[1])
    return jnp.where(jnp.minimum(f[0], f[1]) < f[2], lower, u[2]), jnp.any(ok, 0), two


def channel_potential(fine: Finetuning, order: Order, d: Draws, chi):
    """c(v, m, q) at the inner minimiser `chi`, which may be held fixed (envelope theorem)."""
    return jnp.sum(d.weight * inner_problem(fine, order, d).terms(chi)[0])


def conjugates_at(fine: Finetuning, order: Order, d: Draws, chi):
    """(c, conjugates) at the inner minimiser `chi`."""

    def potential(o):
        return channel_potential(fine, o, d, chi)

    s = slopes(potential, order, TEACHER_SIZE)
    c = Conjugates(-2 * fine.alpha * s.response, -fine.alpha * s.overlap, 2 * fine.alpha * s.norm)
    return potential(order), c


def conjugates(fine: Finetuning, frozen: FrozenMap, order: Order, nodes: Nodes) -> Conjugates:
    """First half-step, (v, m, q) -> (q', m', l'), from one replica of nodes."""

    def use(d, chi, *_):
        return conjugates_at(fine, order, d, chi)[1]

    return with_draws(fine, order, draws(fine, frozen, nodes), use)


def with_draws(fine: Finetuning, order: Order, plain: Draws, use):
    """`use(draws, chi, converged, two wells)`, on split nodes if any node can have two wells, else plain."""

    def split(d):
        d, chi0 = split_nodes(fine, order, d)
        return use(d, *inner_minimum(fine, order, d, chi0))

    def single(d):
        chi, _, ok = minimise(inner_problem(fine, order, d), student(order, d))
        return use(d, chi, ok, jnp.zeros_like(ok))

    return jax.lax.cond(jnp.any(_saddle_at_origin(fine, order, plain)), split, single, plain)


def _saddle_at_origin(fine: Finetuning, order: Order, d: Draws):
    """Per node: does the inner loss curve down at chi = 0, so that at omega = 0 there are two wells?"""
    problem = inner_problem(fine, order, d)
    origin = jnp.zeros_like(problem.omega)
    return ldl_solve(problem.terms(origin)[2], origin)[1] <= 0


def order_parameters(fine: Finetuning, c: Conjugates) -> Order:
    """Second half-step: (q', m', l') -> (v, m, q). A negative v leaves the domain and comes out as NaN."""
    v = 1 / (c.lhat + 2 * fine.lam)
    v = jnp.where(v > 0, v, jnp.nan)
    return from_norm(v, c.mhat * TEACHER_SIZE * v, (c.mhat**2 * TEACHER_SIZE + c.qhat) * v**2, TEACHER_SIZE)


def step(x, args: tuple[Finetuning, FrozenMap], nodes: Nodes):
    """One sweep of state evolution in the solver's coordinates."""
    fine, frozen = args
    order = decode(x)
    c = over_replicas(lambda n: conjugates(fine, frozen, order, n), nodes)
    return order_parameters(fine, mean(c)).encode()


def start(informative: bool = True):
    """(v, m, q) = (0.3, 0.9, 0.9), or a start with almost no overlap."""
    m = 0.9 if informative else 0.05
    return from_norm(jnp.array(0.3), jnp.array(m), jnp.array(0.9 if informative else 0.5), TEACHER_SIZE).encode()
