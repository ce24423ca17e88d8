"""The pipeline: pre-training solve -> frozen map -> fine-tuning solve -> raw predictions with error bars.

Each stage is searched without derivatives (`solve_*`: loops) and then described with them (`describe_*`: none). Users
see this through `lorastate.solution.solution` and `lorastate.design.optimize`, which compile the pieces.

Fine-tuning is first taken to be replica symmetric, with smooth nodes: a small program, and fast. Where a node has two
wells, or the replicon is at least one, that is no solution of the theory, and the search with one step of breaking is
made (`levels` = 1).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ..errors import Code, succeeded
from ..evolution import finetuning as ft
from ..evolution import pretraining as pt
from ..evolution.order import RESPONSE_FLOOR, SPREAD_FLOOR, Order, decode, directions, from_norm
from ..evolution.test_errors import finetuning_error, node_dimension, pretraining_error
from ..math.fixed_point import FixedPoint, Method, Stage, attach, iterate, nan_slope, newton_step, plain_map
from ..math.quadrature import (
    Nodes,
    Slots,
    by_replica,
    for_parts,
    gaussian_nodes,
    in_blocks,
    mean,
    nested_nodes,
    over_replicas,
)
from ..math.symmetric import dimension
from ..model import wells
from ..model.channel.inputs import FrozenMap
from ..model.proximal import ldl_solve
from ..setting.stages import Finetuning, Numerics, Pretraining

#: Nodes that are averaged over together, and of which the first ones lead a search to the neighbourhood of a solution.
_MAP_PART, _LORA_PART, _TEST_PART = 512, 1024, 4096
#: Nodes of a replica from which on it is cut into parts, and those without images (of pre-training and test errors) and
#: coordinates that alternate (of fine-tuning) give smaller errors.
_PLAIN, _LORA = 2048, 4096
#: Where symmetry is broken: nodes of fine-tuning for one that has samples inside, and nodes of a part.
_FEWER, _BROKEN_PART = 4, 256
#: A glass is deep where (q - p)/q is above `DEEP`, or where no solution was found: samples at a node are then so many
#: times more. With few the averages over minima, weighted by exp(-y f), are those of one or two samples.
DEEP, _MORE = 0.4, 4


class NodeSets(NamedTuple):
    """Quadrature nodes of each expectation; None where a closed form needs none. `broken`: those of fine-tuning with
    samples inside, for steps of symmetry breaking."""

    pretraining: Nodes | None
    finetuning: Any
    pretraining_test: Nodes | None
    finetuning_test: Nodes | None
    broken: Nodes | None = None


def node_sets(pre: Pretraining, fine: Finetuning, numerics: Numerics) -> NodeSets:
    """The node sets of a setting (cached: they depend on static fields only), but for `broken`."""
    assert fine.tokens is not None
    map_nodes, map_test = map_node_sets(pre, numerics)
    count, r, seed = numerics.finetuning_nodes, numerics.replicas, numerics.seed
    order, part = (ft.node_order(fine), _LORA_PART) if count >= r * _LORA else (None, None)
    lora = gaussian_nodes(ft.node_dimension(fine), count, r, seed, ft.mirrored(fine), order, part)
    return NodeSets(map_nodes, lora, map_test, test_nodes(fine, numerics))


def test_nodes(fine: Finetuning, numerics: Numerics) -> Nodes | None:
    """Nodes of the test errors of fine-tuning."""
    assert fine.tokens is not None
    d = node_dimension(fine.activation, fine.tokens, (fine.rank, fine.teacher_rank))
    return _plain(d, 2 * numerics.finetuning_nodes, numerics, 2 * 10**6, _TEST_PART)


def map_node_sets(pre: Pretraining, numerics: Numerics) -> tuple[Nodes | None, Nodes | None]:
    """Nodes of pre-training and of its test errors."""
    d = node_dimension(pre.activation, pre.tokens)
    return (
        _plain(pt.node_dimension(pre), numerics.nodes, numerics, 0, _MAP_PART),
        _plain(d, 2 * numerics.finetuning_nodes, numerics, 10**6, _TEST_PART),
    )


def _plain(d: int, count: int, numerics: Numerics, stream: int, part: int) -> Nodes | None:
    if not d:
        return None
    large = count >= numerics.replicas * _PLAIN
    seed = numerics.seed + stream
    return gaussian_nodes(d, count, numerics.replicas, seed, () if large else None, part=part if large else None)


def with_broken(nodes: NodeSets, fine: Finetuning, numerics: Numerics, deep: bool = False) -> NodeSets:
    """The node sets with those for one step of breaking, with more samples for a `deep` glass."""
    assert fine.tokens is not None
    count, r = max(numerics.finetuning_nodes // _FEWER, 64 * numerics.replicas), numerics.replicas
    order = ft.node_order(fine) if count >= r * _LORA // _FEWER else None
    broken = nested_nodes(
        ft.node_dimension(fine), count, r, numerics.seed, ft.mirrored(fine), order, _BROKEN_PART,
        fine.rank * fine.tokens, (numerics.samples * (_MORE if deep else 1),),
    )  # fmt: skip
    return nodes._replace(broken=broken)


def _stages(numerics: Numerics, parts: int, rough: float, settle: float = np.inf, floor: float = 5e-3) -> list[Stage]:
    """One part of the nodes finds the neighbourhood with Newton steps; all of them finish with Broyden's cheaper ones.

    In both stages inner minimisers may jump from well to well, hence the floors (see `Method`).
    """
    steps = numerics.max_steps
    coarse = Method(tolerance=rough, max_steps=steps, floor=10 * floor, settle=settle)
    fine = Method(tolerance=numerics.tolerance, max_steps=steps, burn_in=0, floor=floor)
    return [Stage.of(coarse, 1), Stage.of(fine, parts, exact=False)]


class Solved(NamedTuple):
    """A fixed point with what its derivatives and averages need: the Jacobian there and the inner minimisers."""

    point: FixedPoint
    jacobian: Any
    inner: Any


def solve_pretraining(pre: Pretraining, numerics: Numerics, nodes: Nodes | None) -> Solved:
    """Fixed point of pre-training (no derivative), from the usual start or, where that fails, that of weak ridges."""
    pre = jax.lax.stop_gradient(pre)
    if nodes is None:
        fmap, memory = plain_map(pt.step, pre), Slots.of(None)
        rules = [Stage.of(Method(tolerance=numerics.tolerance, max_steps=numerics.max_steps))]
    else:
        fmap, memory = pt.state_evolution(pre, nodes), Slots.of(pt.no_inner(pre, nodes))
        rules = _stages(numerics, len(nodes.weight), 1e-4)
    usual = pt.start(pre)
    last = jnp.full_like(usual, jnp.nan)  # goes on where the stage before ended
    jobs = [(rules[0], _ALWAYS, usual), (rules[0], _FAILED, pt.start(pre, weak_ridge=True))]
    if nodes is not None:
        # The last stage twice: it begins with a cold search, which may find what following wells has missed. Near the
        # interpolation threshold noisy labels make the map large along a direction that is almost flat, and only plain
        # steps find their way there.
        plain = rules[1]._replace(burn_in=-1, damping=0.0, tolerance=1e-5)
        jobs += [(rules[1], _ALWAYS, last), (rules[1], _WELLS, last)]
        jobs += [(plain, _FAILED, usual), (rules[1], _AFTER, last)]

    def stage(carry, job):
        x, solved, jac, memory, made = carry
        rules, when, start = job
        two = jnp.array(True) if nodes is None else jnp.any(memory.read().two)
        skip = ((when == _FAILED) & solved) | ((when == _WELLS) & ~two) | ((when == _AFTER) & ~made)
        # NaN stops at once.
        x0 = jnp.where(skip, jnp.nan, jnp.where(jnp.isnan(start), x, start))
        point, found, memory = iterate(fmap, rules, True, x0, jac, memory)
        skip = skip | ((when == _FAILED) & ~(succeeded(point.code) | (point.code == Code.max_steps)))
        x, jac = jnp.where(skip, x, point.x), jnp.where(skip, jac, found)
        solved = jnp.where(skip, solved, succeeded(point.code))
        return (x, solved, jac, memory, ~skip), (point, skip)

    first = (usual, jnp.array(False), jnp.zeros((len(usual), len(usual))), memory, jnp.array(False))
    carry, (points, skipped) = jax.lax.scan(stage, first, _stacked(jobs))
    taken = jnp.max(jnp.where(skipped, 0, jnp.arange(len(jobs))))
    chosen = jax.tree_util.tree_map(lambda a: a[taken], points)
    chosen = chosen._replace(steps=jnp.sum(jnp.where(skipped, 0, points.steps)))
    return Solved(chosen, carry[2], carry[3].read())


#: When a stage of the search of pre-training is made: always, if what came before it has failed, if there are two
#: wells, if the stage before it was made.
_ALWAYS, _FAILED, _WELLS, _AFTER = range(4)


def _stacked(trees):
    return jax.tree_util.tree_map(lambda *a: jnp.stack([jnp.asarray(v) for v in a]), *trees)


class Branches(NamedTuple):
    """Fine-tuning solutions from the informative [0] and the small [1] start: m and q along the teacher, free energy,
    code; and which of them was taken."""

    overlap: Any
    norm: Any
    free_energy: Any
    code: Any
    chosen: Any


class Search(NamedTuple):
    """What differs between the searches of fine-tuning: steps of breaking, whether every node is taken to have one
    well, and the starts (informative and small)."""

    levels: int
    alone: bool
    starts: Any


_LAST, _ESCAPE, _FREE, _BACK = 1, 2, 3, 4


def _jobs(fine: Finetuning, numerics: Numerics, parts: int, levels: int):
    """(rules, kind, branch) of every stage of a search: both starts on a part of the nodes, there once more from a cold
    search, both on all of the nodes, and away from a solution that repels.

    With breaking y is on hold until then, and set free after a cold search. phi is so flat in it that on some nodes the
    maximum cannot be told from their noise: then all goes back to hold, and what that does to the rest is part of the
    error bars.
    """
    # Where m grows out of almost nothing, Newton steps would lead back to zero, or far off to where wells abound.
    coarse, refined = _stages(numerics, parts, 1e-3, settle=0.03)
    few = min(4, parts) if levels else 1
    coarse, refined = coarse._replace(index=(few, True)), refined._replace(index=(parts, True))
    if levels:
        coarse = coarse._replace(settle=0.1, burn_in=8, damping=0.4, hold=True, max_steps=40)
        refined = refined._replace(tolerance=max(numerics.tolerance, 1e-4), floor=1e-2, hold=True)
    if ft.spare(fine):
        # The response of spare directions overshoots, and the more so the more samples there are.
        coarse, refined = (rule._replace(damping=0.7) for rule in (coarse, refined))
    again = coarse._replace(burn_in=0)
    last = refined._replace(tolerance=1e-3) if levels else refined
    kinds = [(coarse, 0, 0), (coarse, 0, 1), (again, 0, 0), (again, 0, 1), (last, _LAST, 0), (last, _LAST, 1)]
    kinds.append((refined._replace(settle=0.0), _ESCAPE, 0))
    if levels:
        free = refined._replace(hold=False, index=(parts, False), max_steps=_TRIES)
        kinds += [(rules, kind, k) for rules, kind in ((free, _FREE), (refined, _BACK)) for k in (0, 1)]
    rules, which, branch = zip(*kinds, strict=True)
    return _stacked(rules), jnp.array(which), jnp.array(branch)


#: Steps in which y has to find its place.
_TRIES = 14
#: Distance in (m, q) below which two solutions on the first nodes are one, without and with breaking (y is flat there);
#: relative difference of free energies on them from which on the higher branch is not refined.
_SAME, _CLEARLY = (0.02, 0.04), 0.01


class _Found(NamedTuple):
    """What a search has found from both starts so far: points, Jacobians, rows of the memory, codes, free energies."""

    x: Any
    jacobian: Any
    row: Any
    code: Any
    energy: Any
    stale: Any  # whether a failed stage has written over the row


def search_finetuning(fine: Finetuning, frozen: FrozenMap, numerics: Numerics, nodes: Nodes, search: Search):
    """Solutions from both starts, stacked, with their Jacobians, free energies and rows of the memory; that memory;
    whether the two are the same one; where the first stage from the informative start ended. No derivatives.

    Where nodes are taken to have one well the search gives up after the first stage if some have two.
    """
    fine, frozen = jax.lax.stop_gradient((fine, frozen))
    fmap = ft.state_evolution(fine, frozen, nodes, search.levels)

    def energy_at(x, memory: Slots, count):
        first = 1.0 * (jnp.arange(len(nodes.weight)) < count)
        a = jax.tree_util.tree_map(lambda v: jnp.tensordot(first, v, 1) / count, memory.read().averages)
        return ft.free_energy(fine, ft.order_at(fine, x), a)

    def job(carry, rules_kind_branch):
        found, memory, same = carry
        rules, kind, k = rules_kind_branch
        close = jnp.max(jnp.abs(ft.apart(fine, found.x[0], found.x[1]))) < _SAME[min(search.levels, 1)]
        same = jnp.where((kind == _LAST) & (k == 0), close, same)
        # Where both starts have found the same solution the second is not refined again. Where nothing was found but a
        # solution that repels (m = 0 above the threshold, where Newton steps may end), plain steps lead away from it.
        # NaN stops at once.
        lost = (found.code[0] == Code.unstable) & ~succeeded(found.code[1])
        refining = (kind != 0) & (kind != _ESCAPE)
        skip = ((kind == _ESCAPE) & ~lost) | (refining & same & (k == 1))
        higher = jnp.array(False)
        if search.levels:
            gap = found.energy[k] - found.energy[1 - k]
            higher = refining & (gap > _CLEARLY * jnp.abs(found.energy[k])) & succeeded(found.code[1 - k])
        if search.alone:
            skip = skip | ((kind > 0) & _clearly_rough(memory, found.row))
        skip = skip | ((kind == _BACK) & ~found.stale[k])
        start = jnp.where(kind == _ESCAPE, ft.pushed(fine, found.x[k]), found.x[k])
        # The escape may fail: what it leaves must not be lost. The memory of the second start, which did, is free.
        memory = memory._replace(here=jnp.where(kind == _ESCAPE, found.row[1], found.row[k]))
        x0 = jnp.where(skip | higher, jnp.nan, start)
        point, jac, memory = iterate(fmap, rules, True, x0, found.jacobian[k], memory)
        optional = ((kind != 0) & (kind != _LAST)) | higher
        kept = (~jnp.all(jnp.isfinite(point.x)) & optional) | ((kind == _FREE) & (point.code != Code.ok))
        energy = energy_at(point.x, memory, rules.index[0])
        new = _Found(point.x, jac, memory.here, point.code, energy, jnp.array(False))
        put = jax.tree_util.tree_map(lambda a, v: a.at[k].set(jnp.where(kept, a[k], v)), found, new)
        stale = (kind == _FREE) & kept & ~skip & ~higher
        row = jnp.where(kept & ~stale, found.row[k], memory.here)
        put = put._replace(row=put.row.at[k].set(row), stale=put.stale.at[k].set(stale))
        return (put, memory, same), (point, kept)

    x0 = search.starts
    memory = Slots.of(ft.no_memory(fine, nodes, search.levels, search.alone), 3)
    jobs = _jobs(fine, numerics, len(nodes.weight), search.levels)
    none = jnp.zeros(2)
    nothing = _Found(x0, jnp.zeros((*x0.shape, x0.shape[1])), jnp.arange(2), jnp.zeros(2, int), none, none > 0)
    (found, memory, same), (points, kept) = jax.lax.scan(job, (nothing, memory, jnp.array(False)), jobs)
    # Of each start the last stage that was made counts.
    branch, index = jobs[2], jnp.arange(len(jobs[2]))
    last = jnp.stack([jnp.max(jnp.where((branch == k) & ~kept, index, k)) for k in (0, 1)])
    steps = jnp.stack([jnp.sum(jnp.where((branch == k) & ~kept, jnp.maximum(points.steps, 0), 0)) for k in (0, 1)])
    final = jax.tree_util.tree_map(lambda a: a[last], points)._replace(steps=steps)
    return final, found, memory, same, points.x[2]


#: Share of nodes with two wells up to which symmetry counts as unbroken, and the (q - p)/q that counts as zero: it is
#: of the order of the square of ten times that share.
FEW, _APART = 1e-3, 1e-4


def _rough(memory: Slots, row):
    """Whether more than a few nodes have two wells, in that row."""
    return jnp.mean(memory.data.averages.two_wells[row]) > FEW


def _clearly_rough(memory: Slots, rows):
    """The same in all of these rows, as far as the first part of the nodes can tell."""
    return jnp.all(memory.data.averages.two_wells[rows, 0] > 30 * FEW)


# ---- averages over nodes at the solution -----------------------------------------------------------------------


def map_averages(pre: Pretraining, order: Order, nodes: Nodes | None, found: wells.Wells | None):
    """(averages, E || D(Z - Omega)/D Omega ||_HS^2) of every part, stacked (the values themselves where no nodes are
    needed)."""
    if nodes is None or found is None:
        t = pre.tokens
        gap = dimension(t) * (4 * order.response / (t * t + 4 * order.response)) ** 2
        return pt.averages(pre, order, None, None), gap
    return over_replicas(lambda n, w: _map_part(pre, order, n, w), nodes, found)


def _map_part(pre, order, nodes, found):
    def block(nodes, found):
        problem = pt.inner_problem(pre, order, nodes)
        low = wells.lowest(problem, found)
        gap = low.pick([_response_gap(problem.terms(u)[2], 2 * order.response, len(u)) for u in low.u])
        return pt.averages(pre, order, nodes, found), jnp.sum(nodes.weight * gap)

    return in_blocks(block, nodes, found)


def _response_gap(hess, scale, along: int):
    """|| H^{-1}/scale - 1 ||_F^2 at every node: the derivative of (minimiser - field) with respect to the field.

    Where `along` is less than the number n of unknowns, of the four blocks before and from it on: (2, 2, N).
    """
    n, nodes = hess.shape[0], hess.shape[2]
    scale = jnp.broadcast_to(scale, (n, 1))
    parts = [slice(along)] if along >= n else [slice(along), slice(along, n)]
    total = []
    for part in parts:
        sums = [jnp.zeros((nodes,))] * len(parts)
        for i in range(n)[part]:
            e = jnp.zeros((n, nodes)).at[i].set(1.0)
            square = (ldl_solve(hess, e)[0] / scale[i] - e) ** 2
            sums = [total + jnp.sum(square[rows], 0) for total, rows in zip(sums, parts, strict=True)]
        total.append(jnp.stack(sums))
    return total[0][0] if along >= n else jnp.stack(total, 1)


def _lora_part(fine: Finetuning, frozen: FrozenMap, order: Order, nodes, found):
    """(averages, E || d(chi - omega)/d omega ||_F^2, (2, 2) where some directions are spare) of one part; the latter
    without breaking only: where minimisers jump it has no finite value."""

    def block(nodes, found):
        d = ft.draws(fine, frozen, nodes)
        a = ft.averages(fine, order, d, found)
        if order.levels:
            return a, jnp.full((2, 2) if ft.spare(fine) else (), jnp.nan)
        problem = ft.inner_problem(fine, order, d)
        low = wells.lowest(problem, found)
        gaps = [_response_gap(problem.terms(u)[2], problem.v, len(d.teacher)) for u in low.u]
        gap = low.pick([g.reshape(-1, g.shape[-1]) for g in gaps]).reshape(gaps[0].shape)
        return a, jnp.sum(d.weight * gap, -1)

    return in_blocks(block, nodes, found)


def lora_averages(fine: Finetuning, frozen: FrozenMap, order: Order, nodes: Nodes, found):
    """The averages of every part, stacked."""
    return over_replicas(lambda n, w: _lora_part(fine, frozen, order, n, w), nodes, found)


# ---- predictions -----------------------------------------------------------------------------------------------


def map_predictions(pre: Pretraining, x, averages, errors) -> dict[str, Any]:
    """Every pre-training prediction from the solver's coordinates, `map_averages` and (E, E noiseless)."""
    (a, gap), order = averages, decode(x)
    c = pt.conjugates(pre, order, a)
    live = order.response > 2 * RESPONSE_FLOOR
    V, M, Q = (jnp.where(live, v, 0.0) for v in (order.response, order.overlap, order.norm(pre.label_size)))
    delta, eps, _ = pt.thresholds(pre, c)
    return {
        "V": V,
        "M": M,
        "Q": Q,
        "M_down": jnp.where(live, pt.downstream_overlap(pre, x), 0.0),
        **c._asdict(),
        "overlap": jnp.where(live, M / jnp.sqrt(jnp.where(live, Q, 1.0) * pre.Q0), jnp.nan),
        "train_loss": pt.free_energy(pre, order, a),
        "train_error": pre.alpha * a.potential - c.qhat * order.response / 4,
        "test_error": errors[0],
        "test_error_noiseless": errors[1],
        "rank_fraction": 1 - pre.law.mass_below(eps, delta),
        "replicon": jnp.where(live, map_replicon(pre, order, c, gap), jnp.nan),
        "double_well_share": a.two_wells + jnp.zeros(()),
    }


def map_replicon(pre: Pretraining, order: Order, c: pt.Conjugates, gap):
    """(2 alpha / V^2) E ||D(Z - Omega)/D Omega||_HS^2 / s^^2 E ((f(x) - f(y))/(x - y))^2, f = ReLU(. - 2 lam~), x and y
    from the law of m^ S* + sqrt(q^) Z: replica symmetry of pre-training is stable below one (arXiv:2509.24914)."""
    delta, eps, _ = pt.thresholds(pre, c)
    return 2 * pre.alpha / order.response**2 * gap / c.shat**2 * pre.law.pair_response(delta, eps)


#: |w|^2 / D below which the update counts as zero.
_LIVE = 1e-12


def lora_overlap(fine: Finetuning, order: Order):
    """o_w = ||m||_F / sqrt(||q||_F ||q0 1||_F), for rank one m / sqrt(q q0); NaN where the update is zero."""
    n, k = directions(fine.rank, fine.teacher_rank), min(fine.rank, fine.teacher_rank)
    size = jnp.sqrt(jnp.sum(n * order.norm(ft.TEACHER_SIZE) ** 2))
    live = size > _LIVE
    most = jnp.sqrt(k * jnp.where(live, size, 1.0) * (ft.TEACHER_SIZE * np.sqrt(fine.teacher_rank)))
    return jnp.where(live, jnp.sum(n * order.overlap) / most, jnp.nan)


def _replicon(fine: Finetuning, gap):
    """Growth of a difference between the norms of two replicas, alike in the directions along the teacher and in the
    spare ones: largest eigenvalue of (alpha' / n_b) E || d(chi - omega)_b / d omega_b' ||_F^2, n_b directions in b."""
    n = directions(fine.rank, fine.teacher_rank)
    if np.ndim(n) == 0:
        return fine.alpha * gap / n
    r = fine.alpha * gap / n[:, None]
    half, off = (r[0, 0] - r[1, 1]) / 2, r[0, 1] * r[1, 0]
    return (r[0, 0] + r[1, 1]) / 2 + jnp.sqrt(half**2 + off + 1e-30)


def _by_direction(values: dict[str, Any]) -> dict[str, Any]:
    """Pairs as two predictions: of the directions along the teacher under their name, of the spare ones as `_spare`."""
    out = {}
    for name, value in values.items():
        if jnp.ndim(value) == 0:
            out[name] = value
        else:
            out[name] = value[0]
            if name not in ("m", "mhat"):
                out[f"{name}_spare"] = value[1]
    return out


def lora_order(values: dict[str, Any]) -> Order:
    """The order parameters of fine-tuning from its predictions."""
    v, m, p, q = (values[name] for name in "vmpq")
    if "q_spare" in values:
        v, p, q = (jnp.stack([a, values[f"{name}_spare"]]) for name, a in (("v", v), ("p", p), ("q", q)))
        m = jnp.stack([m, jnp.zeros_like(m)])
    order = from_norm(v, m, p, ft.TEACHER_SIZE)
    if not values["broken"]:
        return order
    return order._replace(spread=(jnp.sqrt(jnp.maximum(q - p, SPREAD_FLOOR**2)),), breaking=(values["breaking"],))


def lora_predictions(fine: Finetuning, frozen: FrozenMap, order: Order, averages, errors) -> dict[str, Any]:
    """Every fine-tuning prediction from the order parameters, the averages and (E', E' at w = 0)."""
    (a, gap), q0 = averages, ft.TEACHER_SIZE
    c, norms = ft.conjugates(fine, order, a), order.norms(q0)
    live = norms[-1] > _LIVE
    phi = ft.free_energy(fine, order, a)
    m, p, q = (jnp.where(live, v, 0.0) for v in (order.overlap, norms[0], norms[-1]))
    penalty = jnp.sum(directions(fine.rank, fine.teacher_rank) * c.qhat * order.response)
    none, broken = jnp.full((), jnp.nan), jnp.array(False)
    breaking = complexity = none
    if order.levels:
        broken = jnp.any(order.spread[0] ** 2 > _APART * norms[-1])  # otherwise all minima are one
        breaking = jnp.where(broken, order.breaking[0], none)
        complexity = jnp.where(broken, order.breaking[0] ** 2 * ft.energy_slopes(fine, order, a)[0], none)
    hats = {"qhat": c.qhat, "mhat": c.mhat, "lhat": c.lhat}
    return {
        **_by_direction({"v": order.response, "m": m, "p": p, "q": q, **hats}),
        "overlap": lora_overlap(fine, order),
        "train_loss": phi,
        "train_error": fine.alpha * a.potential - penalty / 2,
        "test_error": errors[0],
        "test_error_frozen": errors[1],
        "effective_noise": fine.effective_noise(frozen),
        "recalibration": fine.scale(frozen),
        "free_energy": phi,
        "replicon": _replicon(fine, gap),
        "double_well_share": a.two_wells,
        "broken": 1.0 * broken,
        "breaking": breaking,
        "complexity": complexity,
    }


def _map_errors(pre, order, nodes):
    def one(size):
        return pretraining_error(pre.activation, pre.tokens, size, order.overlap, order.norm(pre.label_size), nodes)

    # The noiseless law has smaller labels but the same map: (Q0, M, Q).
    return one(pre.label_size), one(pre.Q0)


def _lora_errors(fine, frozen, order, nodes):
    # Test inputs are fresh, whatever the fine-tuning inputs were; the factor on the map stays.
    frozen, order = frozen.scaled(fine.scale(frozen)), order.merged
    size = frozen.Q0 + fine.delta / 2
    common = (fine.activation, fine.tokens, size, frozen.overlap, frozen.norm)
    ranks = fine.rank, fine.teacher_rank
    return finetuning_error(*common, order, nodes, ranks), finetuning_error(*common, None, nodes, ranks)


def lora_error(fine: Finetuning, frozen: FrozenMap, order: Order, nodes: Nodes | None):
    """E' alone."""
    return _averaged(lambda n: _lora_errors(fine, frozen, order, n)[0], nodes)


def _averaged(f, nodes):
    """Mean over replicas of `f(replica)`; `f(None)` where a closed form needs no nodes."""
    return f(None) if nodes is None else mean(over_replicas(f, nodes))


# ---- everything ------------------------------------------------------------------------------------------------


class FirstStage(NamedTuple):
    """Output of `describe_pretraining`."""

    values: dict[str, Any]
    x: Any  # order parameters in the solver's coordinates, with their derivative
    status: dict[str, Any]
    solved: Solved


class SecondStage(NamedTuple):
    """Output of a search of fine-tuning: the branch taken, both branches, what the channel searched for, and whether it
    was too `rough`: nothing was solved, wells were found where none should be, the replicon is not below one, or with
    breaking the glass is deep. `coarse` (n,): where the first stage of the informative search ended."""

    solved: Solved
    branches: Branches
    found: Any
    rough: Any
    coarse: Any


class Evaluation(NamedTuple):
    """Values and status of both stages, and what `quadrature_errors` starts from."""

    pretraining: dict[str, Any]
    finetuning: dict[str, Any]
    branches: Branches
    status: dict[str, dict[str, Any]]
    solved: tuple[Solved, Solved, Any]  # of both stages, and what the channel searched for


def describe_pretraining(pre: Pretraining, nodes: NodeSets, solved: Solved) -> FirstStage:
    """Predictions of pre-training, and its order parameters with their derivative, at the fixed point found."""
    const = None if nodes.pretraining is None else (nodes.pretraining, solved.inner)
    lost = 0.0 if nodes.pretraining is None else wells.lost(solved.inner)
    code = jnp.where(lost > 1e-3, int(Code.stalled), solved.point.code)
    x = nan_slope(attach(pt.step, 0, solved.point.x, pre, const), succeeded(solved.point.code))
    order = decode(x)
    a = map_averages(pre, order, nodes.pretraining, solved.inner)
    errors = _averaged(lambda n: _map_errors(pre, order, n), nodes.pretraining_test)
    values = map_predictions(pre, x, a if nodes.pretraining is None else mean(a), errors)
    narrow = values["rank_fraction"] > pre.kappa * (1 + 1e-9)
    code = jnp.where(succeeded(code) & narrow, int(Code.too_narrow), code)
    return FirstStage(values, x, _status(solved.point._replace(code=code)), solved)


def _status(point: FixedPoint) -> dict[str, Any]:
    return {name: getattr(point, name) for name in ("code", "residual", "rate", "growth", "steps")}


def frozen_at(pre: Pretraining, fine: Finetuning, x) -> FrozenMap:
    """The frozen map at the solver's coordinates `x` of pre-training."""
    return fine.inputs.freeze(pre, decode(x), pt.downstream_overlap(pre, x))


def lora_nodes(fine: Finetuning, nodes: NodeSets, x, found) -> Nodes:
    """The nodes that a solution `x` of fine-tuning was found with, with what the channel has `found` at them."""
    chosen = nodes.broken if ft.order_at(fine, x).levels else nodes.finetuning
    assert chosen is not None
    return chosen._replace(found=found)


def describe_finetuning(
    pre: Pretraining, fine: Finetuning, nodes: NodeSets, first: FirstStage, second: SecondStage
) -> Evaluation:
    """Predictions of fine-tuning on the branch that was taken, and the status of both stages."""
    frozen = frozen_at(pre, fine, first.x)
    solved = second.solved
    prepared = lora_nodes(fine, nodes, solved.point.x, second.found)
    x = jnp.where(jnp.isfinite(solved.point.x), solved.point.x, second.coarse)
    x = attach(ft.step, ft.order_at(fine, x).levels, x, (fine, frozen), (prepared, solved.inner))
    order = ft.order_at(fine, x)
    b = mean(lora_averages(fine, frozen, order, prepared, solved.inner))
    errors = _averaged(lambda n: _lora_errors(fine, frozen, order, n), nodes.finetuning_test)
    values = lora_predictions(fine, frozen, order, b, errors)
    values = {k: nan_slope(v, succeeded(solved.point.code)) for k, v in values.items()}
    status = {"pretraining": first.status, "finetuning": _status(solved.point)}
    return Evaluation(first.values, values, second.branches, status, (first.solved, solved, second.found))


def _lowest(code, energies):
    """The branch of lowest free energy. One that was nearly solved counts where it lies clearly lower: then the answer
    is that the solve failed, not the other branch."""
    nearly = (code == Code.stalled) | (code == Code.max_steps) | (code == Code.cycle)
    handicap = jnp.where(succeeded(code), 0.0, jnp.where(nearly, 1e-3 * (1 + jnp.abs(energies)), jnp.inf))
    return jnp.argmin(jnp.where(jnp.isfinite(energies), energies, jnp.inf) + handicap)


def solve_symmetric(
    pre: Pretraining, fine: Finetuning, first: FirstStage, numerics: Numerics, nodes: Nodes, alone: bool = True
) -> SecondStage:
    """Replica-symmetric fixed point of fine-tuning on the map of pre-training (no derivative): the branch of lowest
    free energy among those that were solved. With `alone` on nodes that have one well each, `rough` where that will not
    do; without, on any, for a comparison: where nodes have two wells that is not the solution of the theory."""
    fine, frozen = jax.lax.stop_gradient((fine, frozen_at(pre, fine, first.x)))
    starts = jnp.stack([ft.start(fine, True), ft.start(fine, False)])
    return _solve(fine, frozen, first, numerics, nodes, Search(0, alone, starts))


def solve_broken(
    pre: Pretraining, fine: Finetuning, first: FirstStage, numerics: Numerics, nodes: Nodes, coarse
) -> SecondStage:
    """The same with one step of symmetry breaking; `coarse`: where a replica-symmetric search came to."""
    fine, frozen = jax.lax.stop_gradient((fine, frozen_at(pre, fine, first.x)))
    starts = jnp.stack([ft.broken_start(fine, coarse, True), ft.broken_start(fine, coarse, False)])
    return _solve(fine, frozen, first, numerics, nodes, Search(1, False, starts))


def _solve(fine, frozen, first: FirstStage, numerics: Numerics, nodes: Nodes, search: Search) -> SecondStage:
    prepared = ft.prepare(fine, frozen, nodes)
    points, found, memory, same, coarse = search_finetuning(fine, frozen, numerics, prepared, search)
    # Where the second start found nothing new it stands for the first.
    starts = jax.tree_util.tree_map(lambda a: jnp.stack([a[0], jnp.where(same, a[0], a[1])]), points)
    energies = jnp.where(same, found.energy[0], found.energy)
    chosen = jnp.where(same, 0, _lowest(starts.code, energies))
    point = jax.tree_util.tree_map(lambda a: a[chosen], points)
    best = Solved(point, found.jacobian[chosen], memory._replace(here=found.row[chosen]).read().found)
    code = jnp.where(wells.lost(best.inner) > 1e-3, int(Code.stalled), best.point.code)
    rough = ~succeeded(code)
    if search.levels:
        p, *_, q = ft.order_at(fine, best.point.x).along.norms(ft.TEACHER_SIZE)
        rough = rough | ~(p > (1 - DEEP) * q)
    else:
        rough = rough | _rough(memory, found.row[chosen])
    if fine.inputs.needs_map:
        code = jnp.where(succeeded(first.status["code"]), code, int(Code.upstream))
    best = best._replace(point=best.point._replace(code=code))
    if search.alone:
        order = ft.order_at(fine, best.point.x)
        _, gap = mean(lora_averages(fine, frozen, order, prepared, best.inner))
        rough = rough | ~(_replicon(fine, gap) < 1)
    orders = [ft.order_at(fine, x).along for x in starts.x]
    m, q = (jnp.stack(v) for v in zip(*((o.overlap, o.norm(ft.TEACHER_SIZE)) for o in orders), strict=True))
    branches = Branches(m, q, energies, starts.code, chosen)
    return SecondStage(best, branches, prepared.found, rough & (code != Code.upstream), coarse)


# ---- error bars ------------------------------------------------------------------------------------------------


class Bars(NamedTuple):
    """Standard errors of the predictions of a stage, and how far its solve is off, in those of its order parameters
    (`FixedPoint.offset`; the largest)."""

    errors: dict[str, Any]
    shift: Any


def quadrature_errors(pre: Pretraining, fine: Finetuning, numerics: Numerics, nodes: NodeSets, out: Evaluation):
    """`Bars` of both stages, from the spread over replicas.

    Replica r would solve x = F_r(x). One step with the Jacobian of all replicas takes it there to first order,
    x_r = x + (I - J)^{-1} (F_r(x) - x), and its predictions are evaluated at x_r with its own nodes: no second
    solve. What its pre-training does to its fine-tuning is carried along. The distance of the mean over replicas from
    the prediction is added in quadrature: what the solve has left undone, and the bias of so few nodes.
    """
    stop = jax.lax.stop_gradient
    pre, fine, out = stop(pre), stop(fine), stop(out)
    map_bars, map_x = map_errors(pre, numerics, nodes, out.pretraining, out.solved[0])
    _, of_lora, found = out.solved
    levels = ft.order_at(fine, of_lora.point.x).levels
    prepared = lora_nodes(fine, nodes, of_lora.point.x, found)

    def lora_at(steps, n, x, inner, upstream):
        frozen, order = frozen_at(pre, fine, upstream), ft.order_at(fine, x)
        n = ft.refresh_nodes(fine, frozen, n)
        inner = ft.refresh_inner(fine, frozen, order, n, inner, steps)
        return _lora_part(fine, frozen, order, n, inner), inner

    def lora_image(averages, x):
        return ft.order_parameters(fine, ft.order_at(fine, x), averages[0]).encode()

    xs, b = _own_solutions(lora_at, lora_image, of_lora, prepared, numerics.replicas, levels, map_x)

    def errors_at(n, x, upstream):
        return _lora_errors(fine, frozen_at(pre, fine, upstream), ft.order_at(fine, x), n)

    if nodes.finetuning_test is None:
        errors = jax.vmap(lambda x, u: errors_at(None, x, u))(xs, map_x)
    else:
        errors = _of_replicas(errors_at, nodes.finetuning_test, xs, map_x)

    def predictions(x, upstream, b, e):
        return lora_predictions(fine, frozen_at(pre, fine, upstream), ft.order_at(fine, x), b, e)

    values = jax.vmap(predictions)(xs, map_x, b, errors)

    def numbers(x):
        # How far minima are apart, and y, matter little where they are nearly one: what they do is in the bars.
        order = ft.order_at(fine, x)
        norms = order.norms(ft.TEACHER_SIZE)
        return jnp.concatenate([jnp.ravel(v) for v in (jnp.log(order.response), order.overlap, norms[0], norms[-1])])

    return map_bars, _bars(values, out.finetuning, xs, of_lora, numbers)


def map_errors(pre: Pretraining, numerics: Numerics, nodes: NodeSets, values: dict[str, Any], solved: Solved):
    """`Bars` of pre-training, and the order parameters (R, n) of every replica."""
    if nodes.pretraining is None or nodes.pretraining_test is None:
        xs = jnp.broadcast_to(solved.point.x, (numerics.replicas, len(solved.point.x)))
        return Bars({k: 0.0 * v for k, v in values.items()}, jnp.zeros(())), xs

    def at(steps, n, x, inner):
        inner = pt.refresh_inner(pre, decode(x), n, inner, steps)
        return _map_part(pre, decode(x), n, inner), inner

    def image(averages, x):
        return pt.image_of(pre, pt.conjugates(pre, decode(x), averages[0]))

    xs, a = _own_solutions(at, image, solved, nodes.pretraining, numerics.replicas, 0)
    errors = _of_replicas(lambda n, x: _map_errors(pre, decode(x), n), nodes.pretraining_test, xs)
    return _bars(jax.vmap(lambda x, a, e: map_predictions(pre, x, a, e))(xs, a, errors), values, xs, solved), xs


def _of_replicas(f, nodes: Nodes, *of_replica):
    """`f(nodes, *of_replica)` averaged over the parts of every replica, (R, ...); `of_replica` (R, ...)."""
    values = over_replicas(f, nodes, *for_parts(of_replica, nodes))
    return by_replica(values, len(of_replica[0]))


def _own_solutions(averages_at, image, solved: Solved, nodes: Nodes, replicas: int, outer: int, *upstream):
    """Order parameters (R, n) and averages of every replica at its own fixed point, to first order.

    `averages_at(steps, part, x, inner, *upstream) -> (averages, inner)`, with some steps of the inner minimisers to
    where they are at x; `image(averages, x)` makes F(x) of them. The first pass makes one step with the common
    Jacobian (cut to 1), the second evaluates there: one compiled copy serves both.
    """
    upstream = for_parts(upstream, nodes)

    def one_pass(carry, steps):
        xs, inner = carry
        at = for_parts(xs, nodes)
        averages, inner = over_replicas(lambda *a: averages_at(steps, *a), nodes, at, inner, *upstream)
        averages = by_replica(averages, replicas)
        shift = jax.vmap(lambda a, x: newton_step(solved.jacobian, image(a, x) - x, outer, uphill=0.5))(averages, xs)
        return (xs + jnp.clip(shift, -1.0, 1.0), inner), (xs, averages)

    start = jnp.broadcast_to(solved.point.x, (replicas, len(solved.jacobian))), solved.inner
    # What pre-training does to the first pass of fine-tuning moves the minimisers there too.
    steps = jnp.array([1 if upstream else 0, 2])
    _, passes = jax.lax.scan(one_pass, start, steps)
    return jax.tree_util.tree_map(lambda v: v[-1], passes)


def _bars(of_replicas: dict[str, Any], values: dict[str, Any], xs, solved: Solved, numbers=lambda x: x) -> Bars:
    """`numbers(x)`: what the distance from the solution is judged by."""

    def error(v):
        return jnp.std(v, axis=0, ddof=1) / np.sqrt(len(v))

    errors = {k: jnp.hypot(error(v), jnp.mean(v) - values[k]) for k, v in of_replicas.items()}
    x = solved.point.x
    off = jnp.abs(numbers(x + solved.point.offset) - numbers(x))
    return Bars(errors, jnp.max(off / (error(jax.vmap(numbers)(xs)) + _FINE)))


#: Distance from the solution at which a stop at a jump (`Code.floor`) is not good enough, in quadrature errors; those
#: of order parameters below which none has to be.
_FLOOR_SHARE, _FINE = 2.0, 5e-4


def final_status(status: dict[str, Any], bars: Bars) -> dict[str, Any]:
    """The status of a stage once its quadrature errors are known: a solve that stopped at a jump is one if it is inside
    the error of every order parameter. (By how much it is off is part of the bars.)"""
    near = bars.shift <= _FLOOR_SHARE
    code = jnp.where(status["code"] == Code.floor, jnp.where(near, int(Code.ok), int(Code.stalled)), status["code"])
    return status | {"code": code}
