"""The search of fine-tuning: both starts, first with replica symmetry, then with one step of breaking.

Fine-tuning is first taken to be replica symmetric, with smooth nodes: a small program, and fast. Where a node has two
wells, or the replicon is at least one, that is no solution of the theory, and the search with one step of breaking is
made (`levels` = 1).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ..errors import Code, succeeded
from ..evolution import control, finetuning_map
from ..evolution import finetuning as ft
from ..evolution.starts import apart, beside, broken_start, fitted, pushed, start
from ..math.fixed_point import FixedPoint
from ..math.maximum import climb
from ..math.places import put, row
from ..math.quadrature import Nodes, Slots, over_replicas, sweep
from ..model import wells
from ..model.channel.frozen_map import FrozenMap
from ..setting.numerics import Numerics
from ..setting.stages import Finetuning
from .finetuning import Branches, LoraStage, SecondStage, Starts, replicon
from .nodes import DEEP
from .pretraining import FirstStage, stacked
from .problem import Problem, weighted
from .schedule import AFRESH, AGAIN, CHECK, CLIMB, ESCAPE, FIRST, LAST, SECOND, Job, schedule
from .stage import FEW, Solved


class Search(NamedTuple):
    """What differs between the searches of fine-tuning: steps of breaking, whether every node is taken to have one
    well, the starts, and whether minima are held together."""

    levels: int
    alone: bool
    starts: Starts
    held: Any = False


#: Steps in log y back from where a quarter of the nodes has it: far above its place the slope may be small once more.
_BACK = 0.4
#: Distance in (m, q) below which two solutions on the first nodes are one, without and with breaking (y is flat there);
#: relative difference of free energies on them from which on the higher branch is not refined.
_SAME, _CLEARLY = (0.02, 0.04), 0.01


def _averaged(memory: Slots, count):
    """The averages over the first `count` parts of the nodes."""

    def first(v):
        return jnp.tensordot(1.0 * (jnp.arange(len(v)) < count), v, 1) / count

    return jax.tree_util.tree_map(first, row(memory.data.averages, memory.here))


def _where_from(fine: Finetuning, search: Search, x, job: Job, outside):
    """Where a stage begins after one that has ended at x: with w turned to the teacher's side, to which samples may
    have led or not. With breaking it knows some of w*: what few nodes take for m = 0, which Newton steps would not
    leave, need not be that on more of them. `outside`: whether the equations had no value at the start."""
    kind, d = job.kind, 1 + ft.spare(fine)
    first, anew = row(search.starts.both, job.branch), kind == AFRESH
    if search.levels:
        first, anew = jnp.where(outside, search.starts.instead, first), anew | (outside & (kind == SECOND))
    y = jnp.where(anew, first, jnp.where(kind == ESCAPE, pushed(fine, x), x))
    order = ft.order_at(fine, y).along
    least = _LEAST_OVERLAP * jnp.sqrt(order.norm(ft.TEACHER_SIZE)) if search.levels else 0.0
    y = y.at[d].set(jnp.maximum(jnp.abs(order.overlap), least))
    if search.levels:
        y = y.at[-1].add(jnp.where(kind == LAST, -_BACK, 0.0))
    return jnp.where(kind >= CHECK, x, y)


#: o_w at least that a stage of a search with breaking begins with.
_LEAST_OVERLAP = 0.1


class _Found(NamedTuple):
    """What a search has found from both starts so far: points, Jacobians, rows of the memory, codes, free energies,
    whether y has found its place, and weights of the nodes."""

    x: Any
    jacobian: Any
    row: Any
    code: Any
    energy: Any
    placed: Any
    weight: Any


class _Progress(NamedTuple):
    """What is known between two stages of a search: `same`, whether both starts have found one solution, `above` (2,),
    which of them lies clearly above the other, and `outside` (2,), at which starts the equations had no value."""

    found: _Found
    memory: Slots
    same: Any
    above: Any
    outside: Any


def _close(fine: Finetuning, search: Search, found: _Found):
    """Whether both starts have found one solution."""
    return jnp.max(jnp.abs(apart(fine, found.x[0], found.x[1]))) < _SAME[min(search.levels, 1)]


def _solved_alike(fine: Finetuning, search: Search, found: _Found):
    """The same once the first start's has been solved."""
    return _close(fine, search, found) & (found.code[0] == Code.ok) & found.placed[0]


def _compared(fine: Finetuning, search: Search, s: _Progress, kind, k) -> _Progress:
    """Both starts compared, before either is refined: whether they are one, before y climbs, and whether one lies
    above the other, after that. phi is maximal in y: a branch whose y has not found its place may yet rise above.
    Once both have climbed, or are refined, they may still turn out to be one."""
    found, last = s.found, (kind == LAST) & (k == 0)
    now = (kind == (CLIMB if search.levels else LAST)) & (k == 0)
    again = (kind >= (LAST if search.levels else CHECK)) & (k == 0)
    same = s.same | (now & _close(fine, search, found)) | (again & _solved_alike(fine, search, found))
    gap = found.energy - found.energy[::-1]
    placed = (succeeded(found.code) & found.placed)[::-1]
    clearly = ~same & (gap > _CLEARLY * jnp.abs(found.energy)) & placed
    return s._replace(same=same, above=jnp.where(last & (search.levels > 0), clearly, s.above))


def _outside(s: _Progress, job: Job, code):
    """`outside` after a stage that has ended with this code."""
    first = (job.kind == FIRST) & (code == Code.nonfinite)
    return put(s.outside, row(s.outside, job.branch) | first, job.branch)


def _needless(search: Search, s: _Progress, mine: _Found, kind, k):
    """Whether a stage is left out, and whether that is because its branch is not the lowest."""
    found, refining = s.found, kind >= CLIMB
    # Where both starts have found the same solution the second is not refined again. Where nothing was found but a
    # solution that repels (m = 0 above the threshold, where Newton steps may end), plain steps lead away from it.
    lost = (found.code[0] == Code.unstable) & (s.same | ~succeeded(found.code[1]))
    failed = (mine.code == Code.nonfinite) | ~jnp.any(succeeded(found.code))
    # Weights that suit the solution itself move it, and phi, by less than their errors; done twice, by so little that
    # neighbours lie on smooth curves, and both starts where they have found one solution end there.
    unsolved = ~(succeeded(mine.code) & mine.placed)
    idle = ((kind == AFRESH) & ~failed) | ((kind >= CHECK) & unsolved)
    skip = ((kind == ESCAPE) & ~lost) | (s.same & (k == 1)) | idle
    if search.levels:  # what repels leads to the other solution
        skip = skip | (refining & (mine.code == Code.unstable) & succeeded(row(found.code, 1 - k)))
    if search.alone:
        skip = skip | ((kind > SECOND) & _clearly_rough(s.memory, found.row))
    return skip, refining & row(s.above, k)


def search_finetuning(fine: Finetuning, frozen: FrozenMap, numerics: Numerics, nodes: Nodes, many: Any, search: Search):
    """Solutions from both starts, stacked, with their Jacobians, free energies and rows of the memory; that memory;
    whether the two are the same one; where few nodes led from the informative start. No derivatives. `many`: nodes that
    the weights of these are to suit, if any.

    Where nodes are taken to have one well the search gives up after the first stage if some have two.
    """
    fine, frozen = jax.lax.stop_gradient((fine, frozen))

    def one(s: _Progress, job: Job):
        rules, kind, k = job.rules, job.kind, job.branch
        s = _compared(fine, search, s, kind, k)
        found, mine, escape = s.found, row(s.found, k), kind == ESCAPE
        skip, higher = _needless(search, s, mine, kind, k)
        # The escape may fail: what it leaves must not be lost. The memory of the second start, which did, is free.
        memory = s.memory._replace(here=jnp.where(escape, found.row[1], mine.row))
        begin = _where_from(fine, search, mine.x, job, row(s.outside, k))
        x0 = jnp.where(skip | higher, jnp.nan, begin)  # NaN stops at once
        weight = None
        if many is not None:
            given = fine, frozen, ft.order_at(fine, begin), nodes, many, numerics.replicas
            weight = jax.lax.cond(
                job.weighted & ~(skip | higher), lambda: control.lora_weights(*given), lambda: control.own(nodes)
            )
        held = search.held
        if search.levels:  # how far minima part is known by then
            held = held | ((kind == AGAIN) & ft.all_one(ft.order_at(fine, x0)))
        fmap = finetuning_map.state_evolution(fine, frozen, weighted(nodes, weight), search.levels, held)
        (point, _, jac, memory), placed = climb(
            fmap, rules, True, x0, mine.jacobian, memory, job.tries, job.level, lambda x: pushed(fine, x),
            kind == AGAIN, numerics.max_steps,
        )  # fmt: skip
        # Where the first nodes show no maximum in y, all of them begin where that climb did.
        kept = skip | higher | (escape & ~jnp.all(jnp.isfinite(point.x))) | ((kind == CLIMB) & ~placed)
        # What was solved stays so where a last pass is not.
        if search.levels:
            kept = kept | ((kind == AGAIN) & ~((point.code == Code.ok) & placed))
        energy = ft.free_energy(fine, ft.order_at(fine, point.x), _averaged(memory, rules.index))
        new = _Found(point.x, jac, memory.here, point.code, energy, placed, weight)
        rows = put(found.row, memory.here, jnp.where(escape, 1, k))
        rows = jnp.where(escape & ~kept, rows[::-1], rows)
        repels = (kind == CLIMB) & (point.code == Code.unstable)
        new = jax.tree_util.tree_map(lambda old, new: jnp.where(kept, old, new), mine, new)
        new = new._replace(code=jnp.where(repels, point.code, new.code))
        found = put(found, new, k)._replace(row=rows)
        return s._replace(found=found, memory=memory, outside=_outside(s, job, point.code)), (point, kept)

    jobs, begin = schedule(fine, numerics, nodes, search.levels), _begin(fine, nodes, many, search)
    s, (points, kept) = jax.lax.scan(one, begin, jobs)
    same = s.same
    if search.levels:  # one solution has other weights, and another phi, where it was found in another way
        same = same | _solved_alike(fine, search, s.found)
    return _final(jobs, points, kept), s.found, s.memory, same, points.x[2]


def _final(jobs: Job, points: FixedPoint, kept) -> FixedPoint:
    """Of each start the last stage that was made, with the steps of all of them."""
    index, made = jnp.arange(len(jobs.branch)), [(jobs.branch == k) & ~kept for k in (0, 1)]
    last = [jnp.max(jnp.where(made[k], index, k)) for k in (0, 1)]
    steps = jnp.stack([jnp.sum(jnp.where(made[k], points.steps, 0)) for k in (0, 1)])
    return stacked([row(points, k) for k in last])._replace(steps=steps)


def _begin(fine: Finetuning, nodes: Nodes, many: Any, search: Search) -> _Progress:
    """Before the first stage of a search."""
    x, none = search.starts.both, jnp.zeros(2)
    memory = Slots.of(finetuning_map.no_memory(fine, nodes, search.levels, search.alone), 3)
    weight = None if many is None else jnp.stack([control.own(nodes)] * 2)
    codes = jnp.zeros(2, int)
    found = _Found(x, jnp.zeros((*x.shape, x.shape[1])), jnp.arange(2), codes, none, none > 0, weight)
    return _Progress(found, memory, jnp.asarray(search.starts.same), none > 0, none > 0)


def _rough(memory: Slots, row):
    """Whether more than a few nodes have two wells, in that row."""
    return jnp.mean(memory.data.averages.two_wells[row]) > FEW


def _clearly_rough(memory: Slots, rows):
    """The same in all of these rows, as far as the first part of the nodes can tell."""
    return jnp.all(memory.data.averages.two_wells[rows, 0] > 30 * FEW)


#: Replicon up to which minima differ by so little that a symmetric solution will do where one with breaking fails: what
#: it is off by is of the order of the square of the replicon less one.
_MARGINAL = 1.1


def _lowest(code, energies, levels: int):
    """The branch of lowest free energy. One that was nearly solved counts where it lies clearly lower: then the answer
    is that the solve failed, not the other branch. Not so with breaking, where it counts if there is no other: its y
    has not found its place, and phi is maximal in y."""
    nearly = (code == Code.floor) | (code == Code.stalled) | (code == Code.max_steps) | (code == Code.cycle)
    most = 1e6 if levels else 2e-3 * (1 + jnp.abs(energies))
    handicap = jnp.where(code == Code.ok, 0.0, jnp.where(nearly, most, jnp.inf))
    return jnp.argmin(jnp.where(jnp.isfinite(energies), energies, jnp.inf) + handicap)


#: Distance from a solution, in log v, m, p and q, from which on a stop at a jump of few samples asks for more of them.
_FAR = 0.01


def _far(stage: LoraStage, point: FixedPoint):
    """Whether a solve has stopped at a jump, too far from its solution."""
    off = stage.judged(point.x + point.offset) - stage.judged(point.x)
    return (point.code == Code.floor) & ~(jnp.max(jnp.abs(off)) < _FAR)


#: Replicon on an eighth of the nodes from which on all of them are asked.
_SURELY = 0.7


def _growth(stage: LoraStage, x, nodes: Nodes, inner):
    """The replicon; where an eighth of the nodes says that it is far below one, what they say."""
    parts, found = len(nodes.weight), Slots.of(inner, 1)

    def ask(state):
        count, *_ = state
        (_, gap), _ = sweep(lambda n, w: (stage.part(x, n, w), w), nodes, found, count, write=False)
        growth = replicon(stage.fine, gap)
        return jnp.array(parts), growth, (growth < _SURELY) | (count == parts)

    first = jnp.array(max(parts // 8, min(parts, 8))), jnp.zeros(()), jnp.array(False)
    return jax.lax.while_loop(lambda state: ~state[2], ask, first)[1]


def solve_symmetric(problem: Problem, first: FirstStage, alone: bool = True) -> SecondStage:
    """Replica-symmetric fixed point of fine-tuning on the map of pre-training (no derivative): the branch of lowest
    free energy among those that were solved. With `alone` on nodes that have one well each, `rough` where that will not
    do; without, on any, for a comparison: where nodes have two wells that is not the solution of the theory."""
    fine = jax.lax.stop_gradient(problem.fine)
    size = fitted(fine, problem.frozen(jax.lax.stop_gradient(first.x)))
    starts = jnp.stack([start(fine, informative, size) for informative in (True, False)])
    search, asked = Search(0, alone, Starts(starts)), problem.numerics.symmetry
    found = _solve(problem, first, problem.nodes.finetuning, search)
    if asked != "auto":
        found = found._replace(marginal=jnp.array(False))
    if asked == "1rsb":
        return found._replace(rough=jnp.array(True))
    if asked == "rs":  # wells matter here only because these nodes are taken to have one
        return found._replace(rough=jnp.any(found.solved.inner.two) | ~succeeded(found.solved.point.code))
    return found


def solve_broken(problem: Problem, first: FirstStage, begin: Any, held: Any = False) -> SecondStage:
    """The same with one step of symmetry breaking, after a search that says where to `begin` (`SecondStage.begin`). If
    `held` (may be traced) minima are held together: the symmetric solution, by the same program."""
    if not isinstance(begin, Starts):
        fine = jax.lax.stop_gradient(problem.fine)
        size = fitted(fine, problem.frozen(jax.lax.stop_gradient(first.x)))
        both = [broken_start(fine, begin, informative, size) for informative in (True, False)]
        begin = Starts(jnp.stack(both), beside(fine, begin))
    return _solve(problem, first, problem.nodes.broken, Search(1, False, begin, held))


def _solve(problem: Problem, first: FirstStage, nodes: Any, search: Search) -> SecondStage:
    fine, frozen = jax.lax.stop_gradient((problem.fine, problem.frozen(first.x)))
    prepared = ft.prepare(fine, frozen, nodes)
    many = problem.nodes.lora_control
    if search.levels and many is None:
        many = problem.nodes.finetuning
    if many is not None:
        many = ft.prepare(fine, frozen, many)
    points, found, memory, same, few = search_finetuning(fine, frozen, problem.numerics, prepared, many, search)
    if search.levels:  # where y has not found its place the rest is not known either, whatever its error bars say
        lost = succeeded(points.code) & ~found.placed
        points = points._replace(code=jnp.where(lost, int(Code.stalled), points.code))
    # Where the second start found nothing new it stands for the first.
    tried = jax.tree_util.tree_map(lambda a: jnp.stack([a[0], jnp.where(same, a[0], a[1])]), points)
    energies = jnp.where(same, found.energy[0], found.energy)
    chosen = jnp.where(same, 0, _lowest(tried.code, energies, search.levels))
    point, taken = row(points, chosen), row(found, chosen)
    inner = memory._replace(here=taken.row).read().found
    if search.levels:
        # A last pass that was not taken has left minimisers of its own.
        order = ft.order_at(fine, point.x)
        inner = over_replicas(lambda *part: ft.refresh_inner(fine, frozen, order, *part), prepared, inner)
    prepared = weighted(prepared, taken.weight)
    best = Solved(point, taken.jacobian, inner, taken.weight)
    code = jnp.where(wells.lost(best.inner) > 1e-3, int(Code.stalled), best.point.code)
    rough = ~succeeded(code)
    if search.levels:
        p, *_, q = ft.order_at(fine, best.point.x).along.norms(ft.TEACHER_SIZE)
        rough = rough | ~(p > (1 - DEEP) * q) | _far(LoraStage(fine, frozen), best.point)
    else:
        rough = rough | _rough(memory, taken.row)
    if fine.inputs.needs_map:
        code = jnp.where(succeeded(first.status["code"]), code, int(Code.upstream))
    best = best._replace(point=best.point._replace(code=code))
    marginal = jnp.array(False)
    if search.alone:
        growth = _growth(LoraStage(fine, frozen), best.point.x, prepared, best.inner)
        rough, marginal = rough | ~(growth < 1), ~rough & (growth < _MARGINAL)
    orders = [ft.order_at(fine, x).along for x in tried.x]
    m, q = (jnp.stack(v) for v in zip(*((jnp.abs(o.overlap), o.norm(ft.TEACHER_SIZE)) for o in orders), strict=True))
    branches = Branches(m, q, energies, tried.code, chosen)
    begin = _begin_again(search.starts, found, same) if search.levels else few
    return SecondStage(best, branches, prepared.found, rough & (code != Code.upstream), begin, marginal)


def _begin_again(before: Starts, found: _Found, same) -> Starts:
    """Where one with more samples begins: where this one has ended, as far as it has found solutions."""
    solved = succeeded(found.code) & found.placed & jnp.all(jnp.isfinite(found.x), 1)
    ends = jnp.where(solved[:, None], found.x, before.both)
    same = same & solved[0]
    return before._replace(both=jnp.where(same, ends[0], ends), same=same)
