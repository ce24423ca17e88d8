"""Fine-tuning: state evolution of the LoRA update w in R^{D x r} on the frozen map (arXiv:2606.05899).

    phi = Tr [ (q' v + 2 m'^T m - l' q)/2 - (m' q0 m'^T + q') (l' + 2 lam')^-1 / 2 ] + alpha' c(v, m, q)
    c   = E min_chi [ ||sigma(Z_W + chi chi^T) - sigma(Y0 + chi* chi*^T)||_F^2 + Tr d v^-1 d^T / 2 ],   d = chi - omega

    q' = -2 alpha' dc/dv       m' = -alpha' dc/dm     l' = 2 alpha' dc/dq
    v  = (l' + 2 lam')^-1      m  = v m' q0           q  = v (m' q0 m'^T + q') v

m = w^T w*/D is r x r*, q = w^T w/D and v are r x r. The loss knows w w^T alone, so w may be turned by any O in O(r),
and the teacher w* in R^{D x r*}, whose entries are N(0, q0), by any in O(r*). Up to that a solution is as symmetric as
it can be: with k = min(r, r*),

    m = mu [1_k 0]     q = diag(q_1 1_k, q_2 1_(r - k))     v = diag(v_1 1_k, v_2 1_(r - k))

k directions follow the teacher's alike, and where r > r* the others are spare and alike too. The equations map such
matrices to such matrices, and `Order` holds their numbers: (v, m, q) as for rank one, or pairs where some are spare.

The inner minimiser jumps where the loss has two wells; `lorastate.wells` deals with that.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from . import wells
from .channel import Fields, FrozenMap, field_dimension
from .fixed_point import COLD, Map
from .order import Order, decode, directions, from_norm, matched, per_row, slopes, student_field
from .prox import VectorProblem, gram
from .quadrature import Nodes, Slots, in_blocks, mean, over_replicas, sweep
from .setting import Finetuning

#: Size of the LoRA teacher: entries of w* are N(0, q0).
TEACHER_SIZE = 1.0


#: Inner minimisers, with nodes split where they jump or without.
Inner = wells.Inner | wells.Smooth


class Conjugates(NamedTuple):
    """q', m', l' of fine-tuning, numbers or pairs as in `Order`."""

    qhat: Any
    mhat: Any
    lhat: Any


class Draws(NamedTuple):
    """Samples that the fine-tuning expectation runs over, node-last; `weight` sums to one.

    `teacher` is chi* (r* T, N), `noise` the independent standard field g (r T, N) of omega = (m/q0) chi* + noise g;
    `side` is +1 on a node and -1 on its mirror image g -> -g.
    """

    fields: Fields
    teacher: Any
    noise: Any
    weight: Any
    side: Any


def node_dimension(fine: Finetuning) -> int:
    """Gaussian dimensions: chi*, g, and what the channel needs."""
    return mirrored(fine)[1] + fine.inputs.dimension(fine.tokens, fine.activation.forgets_shift)


def mirrored(fine: Finetuning) -> tuple[int, int]:
    """Where the coordinates of g, which mirror images negate, begin and end: those of chi* come first."""
    assert fine.tokens is not None
    return fine.teacher_rank * fine.tokens, (fine.teacher_rank + fine.rank) * fine.tokens


def node_order(fine: Finetuning) -> tuple[int, ...]:
    """Which coordinate of the sequence each coordinate of the nodes takes: chi* and g alternate, token by token, and so
    do the fields of the channel. The integrand depends most on how these go together."""
    begin, end = mirrored(fine)
    assert fine.tokens is not None
    rest = node_dimension(fine) - end
    field = field_dimension(fine.tokens, fine.activation.forgets_shift, 1)
    groups = [begin, end - begin] + (rest // field * [field] if rest % field == 0 else [rest])
    lora = [(0, k, group) for group in (0, 1) for k in range(groups[group])]
    channel = [(1, k, group) for group, size in enumerate(groups[2:]) for k in range(size)]
    keys = lora + channel
    place = {key: n for n, key in enumerate(sorted(keys))}
    return tuple(place[key] for key in keys)


def prepare(fine: Finetuning, frozen: FrozenMap, nodes: Nodes) -> Nodes:
    """The nodes (all replicas) with what the channel has to search for at them; no derivative."""
    return nodes._replace(found=over_replicas(lambda n: _found(fine, frozen, n), nodes._replace(found=None)))


def refresh_nodes(fine: Finetuning, frozen: FrozenMap, nodes: Nodes) -> Nodes:
    """The nodes of one replica, prepared for a map very near this one, brought up to date."""
    return nodes._replace(found=_found(fine, frozen, nodes, nodes.found))


def _found(fine: Finetuning, frozen: FrozenMap, nodes: Nodes, previous: Any = None):
    # The channel's coordinates are the same on a node and on its mirror image: one half is searched.
    x = nodes.normal[mirrored(fine)[1] :, : nodes.normal.shape[1] // 2]
    fine, frozen = jax.lax.stop_gradient((fine, frozen))
    return fine.inputs.search(frozen, fine.tokens, fine.activation.forgets_shift, x, previous)


def draws(fine: Finetuning, frozen: FrozenMap, nodes: Nodes) -> Draws:
    """Plain draws from the nodes: chi* first, then g, then the channel's coordinates; once for each of its parts."""
    begin, end = mirrored(fine)
    x, shares = nodes.normal, fine.inputs.shares
    found = None if nodes.found is None else jnp.concatenate([nodes.found, nodes.found], -1)
    y0, zw = fine.inputs.fields(frozen, fine.delta, fine.tokens, fine.activation.forgets_shift, x[end:], found)
    teacher = jnp.sqrt(TEACHER_SIZE) * x[:begin]
    parts = [(teacher, x[begin:end], share * nodes.weight, nodes.side) for share in shares]
    return Draws(Fields(y0, fine.scale(frozen) * zw), *(jnp.concatenate(p, -1) for p in zip(*parts, strict=True)))


def label(fine: Finetuning, d: Draws):
    """sigma(Y') with Y' = Y0 + chi* chi*^T."""
    return fine.activation(d.fields.y0 + gram(d.teacher, len(d.fields.y0)))


def student_law(order: Order, d: Draws) -> wells.Student:
    """omega = (m/q0) chi* + noise g: jointly Gaussian with chi*, covariance [[q0, m], [m, q]]."""
    base, scale = student_field(order, d.teacher, len(d.noise), TEACHER_SIZE)
    return wells.Student(base, scale, d.noise, d.side, matched(d.teacher, len(d.noise)))


def student(order: Order, d: Draws):
    """omega at the draws."""
    return student_law(order, d).at(d.noise)


def inner_problem(fine: Finetuning, order: Order, d: Draws) -> VectorProblem:
    v = per_row(order.response, len(d.teacher), len(d.noise))
    return VectorProblem(fine.activation, d.fields.zw, student(order, d), label(fine, d), v)


def locate_inner(fine, frozen, order: Order, nodes: Nodes, previous: Inner, cold: Any = COLD) -> Inner:
    """Inner minimisers of one replica; with `cold` = WARM the descents start at the previous ones."""
    d = draws(fine, frozen, nodes)
    return wells.locate(_at_rest(fine, order, d), student_law(order, d), previous, cold)


def refresh_inner(fine, frozen, order: Order, nodes: Nodes, inner: Inner, steps: Any = 3) -> Inner:
    """Inner minimisers of one replica at order parameters very near those that `inner` was found for."""
    d = draws(fine, frozen, nodes)
    return wells.refresh(_at_rest(fine, order, d), student_law(order, d), inner, steps)


def _at_rest(fine: Finetuning, order: Order, d: Draws) -> VectorProblem:
    problem = inner_problem(fine, order, d)
    return problem._replace(omega=jnp.zeros_like(problem.omega))


def channel_potential(fine: Finetuning, order: Order, d: Draws, chi):
    """c(v, m, q) at the inner minimiser `chi`, which may be held fixed (envelope theorem)."""
    return jnp.sum(d.weight * inner_problem(fine, order, d).terms(chi)[0])


def conjugates_at(fine: Finetuning, order: Order, d: Draws, chi):
    """(c, conjugates) at the inner minimiser `chi`."""

    def potential(o):
        return channel_potential(fine, o, d, chi)

    s = slopes(potential, order, TEACHER_SIZE)
    each = fine.alpha / directions(fine.rank, fine.teacher_rank)
    return potential(order), Conjugates(-2 * each * s.response, -each * s.overlap, 2 * each * s.norm)


def with_minimisers(fine: Finetuning, order: Order, plain: Draws, inner: Inner, use):
    """`use(draws, chi, two wells)` on split nodes if any node can have two wells, else on the plain ones."""
    law, rest = student_law(order, plain), _at_rest(fine, order, plain)

    def split(inner: wells.Inner):
        factor, g, chi = wells.samples(rest, law, inner)
        thrice = jax.tree_util.tree_map(lambda a: wells.flat([a] * 3), plain)
        d = thrice._replace(noise=g, weight=factor * thrice.weight)
        return use(d, chi, wells.flat(inner.two_wells))

    def single():
        chi = wells.plain(rest, law, inner)
        return use(plain, chi, inner.two_wells[0])

    return wells.either(rest, inner, split, single)


def potential_and_conjugates(fine, frozen, order: Order, nodes: Nodes, inner: Inner):
    """(c, conjugates) from one replica of nodes and its inner minimisers."""

    def use(d, chi, *_):
        return conjugates_at(fine, order, d, chi)

    return in_blocks(lambda n, i: with_minimisers(fine, order, draws(fine, frozen, n), i, use), nodes, inner)


def conjugates(fine, frozen, order: Order, nodes: Nodes, inner: Inner) -> Conjugates:
    """First half-step, (v, m, q) -> (q', m', l'), from one replica of nodes and its inner minimisers."""
    return potential_and_conjugates(fine, frozen, order, nodes, inner)[1]


def free_energy(fine: Finetuning, order: Order, c: Conjugates, potential):
    """phi, per D: (q' v + 2 m' m - l' q)/2 - (m'^2 q0 + q') / (2 (l' + 2 lam')) of every direction, and alpha' c."""
    q0 = TEACHER_SIZE
    work = (c.qhat * order.response + 2 * c.mhat * order.overlap - c.lhat * order.norm(q0)) / 2
    prior = (c.mhat**2 * q0 + c.qhat) / (c.lhat + 2 * fine.lam) / 2
    return jnp.sum(directions(fine.rank, fine.teacher_rank) * (work - prior)) + fine.alpha * potential


def conjugates_of(fine: Finetuning, order: Order) -> Conjugates:
    """The second half-step inverted: the conjugates whose image is `order`."""
    v, m = order.response, order.overlap
    mhat = m / (TEACHER_SIZE * v)
    return Conjugates(order.norm(TEACHER_SIZE) / v**2 - mhat**2 * TEACHER_SIZE, mhat, 1 / v - 2 * fine.lam)


def order_parameters(fine: Finetuning, c: Conjugates) -> Order:
    """Second half-step: (q', m', l') -> (v, m, q). A negative v leaves the domain and comes out as NaN."""
    v = 1 / (c.lhat + 2 * fine.lam)
    v = jnp.where(v > 0, v, jnp.nan)
    return from_norm(v, c.mhat * TEACHER_SIZE * v, (c.mhat**2 * TEACHER_SIZE + c.qhat) * v**2, TEACHER_SIZE)


def step(x, args: tuple[Finetuning, FrozenMap], const: tuple[Nodes, Inner]):
    """One sweep of state evolution in the solver's coordinates; `const` holds the inner minimisers at x."""
    fine, frozen = args
    c = mean(over_replicas(lambda n, i: conjugates(fine, frozen, decode(x), n, i), *const))
    return order_parameters(fine, c).encode()


class Memory(NamedTuple):
    """What the solver carries from step to step, per replica: inner minimisers and the potential c there."""

    inner: Inner
    potential: Any


def no_memory(fine: Finetuning, nodes: Nodes, split: bool = True) -> Memory:
    """Placeholder for all replicas, to be filled by the first evaluation; without `split` for smooth nodes only."""
    r, _, n = nodes.normal.shape
    assert fine.tokens is not None
    unknowns, samples = fine.rank * fine.tokens, n * len(fine.inputs.shares)
    return Memory(wells.nothing(r, unknowns, samples, split and wells.splits(fine.rank)), jnp.zeros(r))


def state_evolution(fine: Finetuning, frozen: FrozenMap, nodes: Nodes) -> Map:
    """The same sweep for the solver: finds the inner minimisers and remembers them from step to step."""

    def image(x, memory, cold, count):
        order = decode(x)

        def one(n, previous):
            inner = locate_inner(fine, frozen, order, n, previous.inner, cold)
            c, conjugates = potential_and_conjugates(fine, frozen, order, n, inner)
            return (conjugates, 1.0 * (inner.split | inner.needed)), Memory(inner, c)

        (c, jumps), memory = sweep(one, nodes, memory, count)
        return order_parameters(fine, c).encode(), memory, jumps == 0

    def jacobian(x, memory, count):
        def plain(x):
            def at(n, m):
                return conjugates(fine, frozen, decode(x), n, m.inner), m

            c, _ = sweep(at, nodes, memory, count, write=False)
            return order_parameters(fine, c).encode()

        return jax.jacfwd(plain)(x)

    return Map(image, jacobian, Slots.commit)


def start(fine: Finetuning, informative: bool = True):
    """(v, m, q) = (0.3, 0.9, 0.9), or a start with almost no overlap."""
    return _start(fine, 0.9 if informative else 0.05, 0.9 if informative else 0.5)


def start_at_rest(fine: Finetuning):
    """A start with no overlap, which the iteration keeps."""
    return _start(fine, 0.0, 0.5)


def _start(fine: Finetuning, m: float, q: float):
    like = jnp.ones_like(jnp.asarray(directions(fine.rank, fine.teacher_rank), float))
    return from_norm(0.3 * like, m * _along(like), q * like, TEACHER_SIZE).encode()


def pushed(x):
    """The same response and norm with half of the largest overlap."""
    order = decode(x)
    q = order.norm(TEACHER_SIZE)
    return from_norm(order.response, 0.5 * jnp.sqrt(_along(q) * TEACHER_SIZE), q, TEACHER_SIZE).encode()


def _along(value):
    """A number as it is; a pair without its second entry, that of the spare directions."""
    return value if jnp.ndim(value) == 0 else value * jnp.array([1.0, 0.0])
