"""Fine-tuning: state evolution of the LoRA update w in R^{D x r} on the frozen map, in k steps of symmetry breaking.

The minima of L' have norm q = w_a^T w_a/D, overlap m = w_a^T w*/D with the teacher and overlaps p_0 < ... < p_k = q
with each other; 0 = y_0 < y_1 < ... < y_k. k = 0 is replica symmetry, one minimum up to w -> -w (arXiv:2606.05899).
With s_i = p'_i - p'_{i-1}, A_k = l' + 2 lam', A_{i-1} = A_i - y_i s_i, y_{k+1} = 0 and, for every direction,

    phi = [ q' v + sum_i (y_i - y_{i+1}) p'_i p_i + 2 m' m - l' q ]/2 + alpha' c
          + sum_{i>=1} log(A_{i-1}/A_i)/(2 y_i) - (m'^2 q0 + p'_0)/(2 A_0)

    c = E f_0(omega),   f_{i-1}(x) = -(1/y_i) log E_z exp(-y_i f_i(x + sqrt(p_i - p_{i-1}) z))
    f_k(x) = min_chi [ ||sigma(Z_W + chi chi^T) - sigma(Y0 + chi* chi*^T)||_F^2 + Tr d v^-1 d^T / 2 ],   d = chi - x

Stationarity. With g = df_k/dx = (x - chi)/v, <.>_i the average over z_i weighted by exp(-y_i f_i), g_i = <g>_{i+1..k},

    q' = p'_k     p'_i = alpha' E |g_i|^2     m' = -alpha' dc/dm     l' = alpha' E <div g>
    v = 1/A_k     m = m' q0/A_0     p_0 = (m'^2 q0 + p'_0)/A_0^2     p_i = p_{i-1} + s_i/(A_i A_{i-1})     dphi/dy_i = 0

Gaussian integration by parts gives these forms from the derivatives of c in v, m, p_i and q. Both have first
derivatives of f alone, which is continuous; in these the terms of either sign and size 1/(p_i - p_{i-1}), which
cancel in the others, do not appear, so that p_i -> p_{i-1} is harmless.

m = w^T w*/D is r x r*, q = w^T w/D and v are r x r. The loss knows w w^T alone, so w may be turned by any O in O(r),
and the teacher w* in R^{D x r*}, whose entries are N(0, q0), by any in O(r*). Up to that a solution is as symmetric as
it can be: with k = min(r, r*),

    m = mu [1_k 0]     q = diag(q_1 1_k, q_2 1_(r - k))     v = diag(v_1 1_k, v_2 1_(r - k))

k directions follow the teacher's alike, and where r > r* the others are spare and alike too, each kind with its own
p_i. `Order` holds these numbers: as for rank one, or pairs where some are spare.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ..math.quadrature import Nodes, in_blocks, mean, over_replicas
from ..model import wells
from ..model.channel.fields import Fields, field_dimension
from ..model.channel.frozen_map import FrozenMap
from ..model.proximal import VectorProblem, gram
from ..model.wells import Wells
from ..setting.stages import Finetuning
from .breaking import divergence_of, kinds_of, level
from .order import (
    NOISE_FLOOR,
    RESPONSE_FLOOR,
    SPREAD_FLOOR,
    Order,
    decode,
    directions,
    lifted,
    matched,
    per_row,
    student_field,
)

#: Size of the LoRA teacher: entries of w* are N(0, q0).
TEACHER_SIZE = 1.0


class Conjugates(NamedTuple):
    """p'_0, ..., p'_k = q' (a tuple), m', l' of fine-tuning, numbers or pairs as in `Order`."""

    phat: tuple
    mhat: Any
    lhat: Any

    @property
    def qhat(self):
        """q'."""
        return self.phat[-1]


class Draws(NamedTuple):
    """Samples that the fine-tuning expectation runs over, node-last; `weight` sums to one.

    `teacher` is chi* (r* T, N), `noise` the independent standard field g (r T, N) of omega = (m/q0) chi* + noise g;
    `inner`, of every level of symmetry breaking: z (r T, s, N), s samples at every node.
    """

    fields: Fields
    teacher: Any
    noise: Any
    weight: Any
    inner: tuple


def spare(fine: Finetuning) -> bool:
    """Whether there are directions that the teacher has not: order parameters are then pairs."""
    return fine.rank > fine.teacher_rank


def order_at(fine: Finetuning, x) -> Order:
    """The order parameters at the solver's coordinates."""
    return decode(x, spare(fine))


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
    parts = [(teacher, x[begin:end], share * nodes.weight) for share in shares]
    inner = tuple(jnp.concatenate([z] * len(shares), -1) for z in nodes.inner)
    teacher, noise, weight = (jnp.concatenate(p, -1) for p in zip(*parts, strict=True))
    return Draws(Fields(y0, fine.scale(frozen) * zw), teacher, noise, weight, inner)


def label(fine: Finetuning, d: Draws):
    """sigma(Y') with Y' = Y0 + chi* chi*^T."""
    return fine.activation(d.fields.y0 + gram(d.teacher, len(d.fields.y0)))


def student(order: Order, d: Draws):
    """omega = (m/q0) chi* + noise g at the draws: covariance [[q0, m], [m, p_0]] with chi*."""
    base, scale = student_field(order, d.teacher, len(d.noise), TEACHER_SIZE)
    return base + scale * d.noise


def samples(order: Order, d: Draws):
    """x = omega + sum_i spread_i z_i, (r T, s_k ... s_1 N): nodes last, before them the samples of the first level."""
    rows = len(d.noise)
    x = student(order, d)
    for spread, z in zip(order.spread, d.inner, strict=False):
        step = per_row(spread, len(d.teacher), rows)
        # (rows, s_i, [s_{i-1}, ...,] N): the new axis comes before those that are there.
        z = z.reshape(rows, z.shape[1], *(1,) * (x.ndim - 2), z.shape[2])
        x = x[:, None] + step.reshape(-1, *(1,) * (z.ndim - 1)) * z if jnp.ndim(step) else x[:, None] + step * z
    return x.reshape(rows, -1)


def inner_problem(fine: Finetuning, order: Order, d: Draws) -> VectorProblem:
    """The inner problem at the nodes, x = omega."""
    v = per_row(order.response, len(d.teacher), len(d.noise))
    return VectorProblem(fine.activation, d.fields.zw, student(order, d), label(fine, d), v)


def sampled_problem(fine: Finetuning, order: Order, d: Draws) -> VectorProblem:
    """The inner problem at all samples of all nodes."""
    problem = inner_problem(fine, order, d)
    return wells.tiled(problem, samples(order, d)) if order.levels else problem


# ---- the two half-steps ----------------------------------------------------------------------------------------


class Averages(NamedTuple):
    """What the equations need of the nodes (one part, or a mean): c; E g_0 . chi*; E <div g>; E |g_i|^2, i = 0..k;
    E <f_i> - f_{i-1}, i = 1..k; the share of samples with two wells. Sums over the rows of a direction's kind."""

    potential: Any
    teacher: Any
    divergence: Any
    squares: tuple
    gains: tuple
    two_wells: Any


def averages(fine: Finetuning, order: Order, d: Draws, found: Wells) -> Averages:
    """The averages over one part of the nodes, whose inner minimisers are `found`."""
    rows, k, n = len(d.noise), order.levels, d.weight.shape[-1]
    kinds = kinds_of(rows, len(d.teacher), spare(fine))
    problem = sampled_problem(fine, order, d)
    low = wells.lowest(problem, found)
    shape = (*(z.shape[1] for z in reversed(d.inner[:k])), n)

    def lower(h):
        return low.pick(jax.vmap(lambda u: h((problem.omega - u) / problem.v))(low.u)).reshape(-1, *shape)

    f, g = low.depth.reshape(shape), lower(lambda force: force)
    # Of every level that is done, from the innermost on: |g_i|^2 and g_i . z_i by kind, and <f_i> - f_{i-1}.
    squares, pulls, gains = [lower(lambda force: kinds @ force**2)], [], []
    two = wells.share(found).reshape(1, *shape)
    for z, y in zip(reversed(d.inner[:k]), reversed(order.breaking), strict=True):
        z = z.reshape(rows, z.shape[1], *(1,) * (f.ndim - 2), n)
        known = [g, two, f[None], jnp.tensordot(kinds, g * z, 1), *squares, *pulls, *gains]
        free, (g, two, mean_f, pull, *rest), square = level(y, kinds, f, known)
        done = len(squares)
        squares, pulls = [*rest[:done], square], [*rest[done : 2 * done - 1], pull]
        gains, f = [*rest[2 * done - 1 :], mean_f - free], free

    def mean(a):
        return jnp.sum(d.weight * a, -1)

    squares = [mean(a) for a in reversed(squares)]
    pulls = [mean(kinds @ (g * d.noise)), *(mean(a) for a in reversed(pulls))]
    divergence = divergence_of(order, squares, pulls)
    kind = (lambda a: a) if spare(fine) else (lambda a: a[0])
    return Averages(
        mean(f), kind(mean(kinds @ (g * matched(d.teacher, rows)))), kind(divergence), tuple(map(kind, squares)),
        tuple(mean(a)[0] for a in reversed(gains)), mean(two)[0],
    )  # fmt: skip


def conjugates(fine: Finetuning, order: Order, a: Averages) -> Conjugates:
    """First half-step: (p'_i, m', l') of every direction from the averages."""
    each = fine.alpha / directions(fine.rank, fine.teacher_rank)
    first = a.divergence
    for y, low, high in zip(order.breaking, a.squares, a.squares[1:], strict=False):
        first = first - y * (high - low)  # E div g_0
    mhat = -each / TEACHER_SIZE * (a.teacher - order.overlap * first)
    return Conjugates(tuple(each * s for s in a.squares), mhat, each * a.divergence)


def _precisions(fine: Finetuning, c: Conjugates, breaking) -> list:
    """[A_0, ..., A_k]."""
    out = [c.lhat + 2 * fine.lam]
    for i in reversed(range(len(breaking))):
        out.insert(0, out[0] - breaking[i] * (c.phat[i + 1] - c.phat[i]))
    return out


def _prior(fine: Finetuning, order: Order, c: Conjugates, breaking):
    """phi without alpha' c, the breaking parameters given apart."""
    q0, p, y = TEACHER_SIZE, order.norms(TEACHER_SIZE), (0.0, *breaking, 0.0)
    A = _precisions(fine, c, breaking)
    work = c.qhat * order.response + 2 * c.mhat * order.overlap - c.lhat * p[-1]
    for i, overlap in enumerate(p):
        work = work + (y[i] - y[i + 1]) * c.phat[i] * overlap
    total = work / 2 - (c.mhat**2 * q0 + c.phat[0]) / (2 * A[0])
    for i in range(1, len(A)):
        total = total + jnp.log(A[i - 1] / A[i]) / (2 * y[i])
    return jnp.sum(directions(fine.rank, fine.teacher_rank) * total)


def free_energy(fine: Finetuning, order: Order, a: Averages):
    """phi, per D: the training loss, penalty included."""
    return _prior(fine, order, conjugates(fine, order, a), order.breaking) + fine.alpha * a.potential


def energy_slopes(fine: Finetuning, order: Order, a: Averages) -> tuple:
    """d phi / d y_i at fixed order parameters and conjugates; y_i^2 times that is the complexity of minima."""
    c = conjugates(fine, order, a)
    prior = jax.grad(lambda y: _prior(fine, order, c, y))(order.breaking)
    return tuple(p + fine.alpha * k / y for p, k, y in zip(prior, a.gains, order.breaking, strict=True))


#: Least and largest y times the standard deviation of f over the samples; spread below which all minima are one.
_SHALLOWEST, _DEEPEST, _NO_SPREAD = 0.01, 4.0, 1e-3


def order_parameters(fine: Finetuning, order: Order, a: Averages) -> Order:
    """Second half-step, from the averages at `order`. What leaves the domain (A_i below zero) comes out as NaN;
    p'_0, which its samples may put below zero where it is small, as zero.

    y_i grows or falls with d phi / d y_i, in units of the gain that it is a part of, and falls where a few samples
    carry all weight, or rises where all carry the same.
    """
    c, q0 = conjugates(fine, order, a), TEACHER_SIZE
    A = _precisions(fine, c, order.breaking)
    good = jnp.all(jnp.stack([jnp.all(value > 0) for value in A]))
    noise = jnp.sqrt(lifted(c.phat[0] / A[0] ** 2, NOISE_FLOOR**2))
    gaps = [high - low for low, high in zip(c.phat, c.phat[1:], strict=False)]
    spread = tuple(jnp.sqrt(lifted(gap / (A[i] * A[i + 1]), SPREAD_FLOOR**2)) for i, gap in enumerate(gaps))
    breaking = []
    for i, slope in enumerate(energy_slopes(fine, order, a)):
        y = order.breaking[i]
        relative = slope * y / (fine.alpha * jnp.abs(a.gains[i]) + 1e-30)
        scale = jax.lax.stop_gradient(jnp.sqrt(jnp.sum(order.spread[i] ** 2 * a.squares[i + 1])))
        relative = jnp.where(y * scale < _DEEPEST, relative, -1.0) + (_SHALLOWEST / (y * scale + 1e-30)) ** 2
        relative = jnp.where(jnp.max(order.spread[i]) > _NO_SPREAD, relative, 0.0)
        breaking.append(y * jnp.exp(_STEP * jnp.tanh(relative / _STEP)))
    new = Order(lifted(1 / A[-1], RESPONSE_FLOOR), c.mhat * q0 / A[0], noise, spread, tuple(breaking))
    return jax.tree_util.tree_map(lambda v: jnp.where(good, v, jnp.nan), new)


#: Scale on which d phi / dy, in units of its parts, moves log y.
_STEP = 0.5


# ---- the map ---------------------------------------------------------------------------------------------------


def refresh_inner(fine, frozen, order: Order, nodes: Nodes, found: Wells, steps: Any = 3) -> Wells:
    """Inner minimisers of one part at order parameters very near those that they were found for."""
    return wells.polish(sampled_problem(fine, order, draws(fine, frozen, nodes)), found, steps)


def averages_of(fine, frozen, order: Order, nodes: Nodes, found: Wells) -> Averages:
    """`averages` from one part of the nodes."""
    return in_blocks(lambda n, w: averages(fine, order, draws(fine, frozen, n), w), nodes, found)


#: (q - p)/q up to which all minima are one: it is of the order of the square of ten times the share of nodes with two
#: wells that does not break the symmetry.
_APART = 1e-4


def all_one(order: Order):
    """Whether all minima are one, for each step of symmetry breaking and kind of direction: (k,) or (k, 2)."""
    return jnp.stack([s**2 <= _APART * order.norm(TEACHER_SIZE) for s in order.spread])


def settled(fine: Finetuning, x):
    """Which of the solver's coordinates are no unknowns any more (n,): spreads of minima that are one, and y where all
    are. What samples say of them there is noise."""
    order = order_at(fine, x)
    if not order.levels:
        return jnp.zeros(len(x), bool)
    together = all_one(order)
    others = jnp.zeros(len(x) - together.size - order.levels, bool)
    return jnp.concatenate([others, together.ravel(), jnp.all(together.reshape(order.levels, -1), 1)])


def step(x, args: tuple[Finetuning, FrozenMap], const: tuple[Nodes, Wells]):
    """One sweep of state evolution in the solver's coordinates; `const` holds the inner minimisers at x."""
    fine, frozen = args
    order = order_at(fine, x)
    a = mean(over_replicas(lambda n, w: averages_of(fine, frozen, order, n, w), *const))
    return jnp.where(settled(fine, x), jax.lax.stop_gradient(x), order_parameters(fine, order, a).encode())
