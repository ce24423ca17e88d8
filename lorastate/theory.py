"""The pipeline: pre-training solve -> frozen map -> fine-tuning solve -> raw predictions with error bars.

One pure function, `evaluate`, takes the two stages and the nodes to plain dictionaries of arrays; everything that users
touch (`lorastate.solution`, `lorastate.design`) is a view of it. It is jitted once by its callers.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from . import finetuning as ft
from . import pretraining as pt
from . import wells
from .channel import FrozenMap
from .errors import Code, succeeded
from .fixed_point import FixedPoint, Method, Stage, attach, iterate, nan_slope, plain_map, small_solve
from .generalization import finetuning_error, node_dimension, pretraining_error
from .order import RESPONSE_FLOOR, Order, decode, directions, from_norm
from .prox import ldl_solve
from .quadrature import Nodes, Slots, by_replica, for_parts, gaussian_nodes, in_blocks, mean, over_replicas
from .setting import Finetuning, Numerics, Pretraining
from .symmetric import dimension

#: Nodes that are averaged over together, and of which the first ones lead a search to the neighbourhood of a solution.
_MAP_PART, _LORA_PART, _TEST_PART = 512, 1024, 4096
#: Nodes of a replica from which on it is cut into parts, and those without images (of pre-training and test errors) and
#: coordinates that alternate (of fine-tuning) give smaller errors.
_PLAIN, _LORA = 2048, 4096


class NodeSets(NamedTuple):
    """Quadrature nodes of each expectation; None where a closed form needs none."""

    pretraining: Nodes | None
    finetuning: Nodes
    pretraining_test: Nodes | None
    finetuning_test: Nodes | None


def node_sets(pre: Pretraining, fine: Finetuning, numerics: Numerics) -> NodeSets:
    """The node sets of a setting (cached: they depend on static fields only)."""
    r, seed, t = numerics.replicas, numerics.seed, fine.tokens
    assert t is not None

    def plain(d, count, stream, part):
        large = count >= r * _PLAIN
        return gaussian_nodes(d, count, r, seed + stream, () if large else None, part=part if large else None)

    def test(activation, tokens, stream, *ranks):
        d = node_dimension(activation, tokens, *ranks)
        return plain(d, 2 * numerics.finetuning_nodes, stream, _TEST_PART) if d else None

    d, lora_d, count = pt.node_dimension(pre), ft.node_dimension(fine), numerics.finetuning_nodes
    order, part = (ft.node_order(fine), _LORA_PART) if count >= r * _LORA else (None, None)
    return NodeSets(
        plain(d, numerics.nodes, 0, _MAP_PART) if d else None,
        gaussian_nodes(lora_d, count, r, seed, ft.mirrored(fine), order, part),
        test(pre.activation, pre.tokens, 10**6),
        test(fine.activation, t, 2 * 10**6, (fine.rank, fine.teacher_rank)),
    )


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
    # The first stage twice, from either start; the second time only if the first has failed: NaN stops at once.
    rules = _stacked([rules[0], *rules])
    usual = pt.start(pre)
    last = jnp.full_like(usual, jnp.nan)  # goes on where the stage before ended
    starts = jnp.stack([usual, pt.start(pre, weak_ridge=True), last][: len(rules[0])])
    index = jnp.arange(len(starts))

    def stage(carry, job):
        x, solved, jac, memory = carry
        rules, start, k = job
        x0 = jnp.where(k < 2, jnp.where(solved, jnp.nan, start), x)
        point, found, memory = iterate(fmap, rules, True, x0, jac, memory)
        skip = (k == 1) & (solved | ~succeeded(point.code))
        x, jac = jnp.where(skip, x, point.x), jnp.where(skip, jac, found)
        return (x, skip | succeeded(point.code), jac, memory), (point, skip)

    first = (usual, jnp.array(False), jnp.zeros((len(usual), len(usual))), memory)
    carry, (points, skipped) = jax.lax.scan(stage, first, (rules, starts, index))
    taken = jnp.max(jnp.where(skipped, 0, index))
    chosen = jax.tree_util.tree_map(lambda a: a[taken], points)
    chosen = chosen._replace(steps=jnp.sum(jnp.where(skipped, 0, points.steps)))
    return Solved(chosen, carry[2], carry[3].read())


def _stacked(trees):
    return jax.tree_util.tree_map(lambda *a: jnp.stack([jnp.asarray(v) for v in a]), *trees)


class Branches(NamedTuple):
    """Fine-tuning solutions from the informative [0] and the small [1] start, with their free energies."""

    solution: FixedPoint
    free_energy: Any
    chosen: Any


def search_finetuning(fine: Finetuning, frozen: FrozenMap, numerics: Numerics, nodes: Nodes, split: bool = True):
    """Solutions from both starts, stacked, with their Jacobians, c of every replica and rows of the memory as `inner`;
    that memory; whether the two are the same one. No derivatives. Without `split` for smooth nodes only: it gives up
    after the first stage where some ought to be split."""
    fine, frozen = jax.lax.stop_gradient((fine, frozen))
    fmap = ft.state_evolution(fine, frozen, nodes)
    last, escape = 1, 2

    def job(carry, rules_kind_branch):
        xs, jacs, potentials, rows, codes, memory, same = carry
        rules, kind, k = rules_kind_branch
        same = jnp.where((kind == last) & (k == 0), jnp.max(jnp.abs(xs[0] - xs[1])) < 0.02, same)
        # Where both starts have found the same solution the second is not refined again. Where nothing was found but a
        # solution that repels (m = 0 above the threshold, where Newton steps may end), plain steps lead away from it.
        # NaN stops at once.
        lost = (codes[0] == Code.unstable) & ~succeeded(codes[1])
        skip = ((kind == escape) & ~lost) | ((kind == last) & same & (k == 1))
        if not split and wells.splits(fine.rank):
            skip = skip | ((kind > 0) & jnp.any(_jumps(memory)[rows, 0]))
        x0 = jnp.where(skip, jnp.nan, jnp.where(kind == escape, ft.pushed(xs[k]), xs[k]))
        # The escape may fail: what it leaves must not be lost. The memory of the second start, which did, is free.
        here = jnp.where(kind == escape, rows[1], rows[k])
        memory = _with_flags(memory._replace(here=here), *(v[rows[k]] for v in _flags(memory)))
        point, jac, memory = iterate(fmap, rules, True, x0, jacs[k], memory)
        # What the first replica found at the end of the coarse stage decides how all of them are searched.
        thorough, needed = (v[memory.here] for v in _flags(memory))
        memory = _with_flags(memory, *(jnp.where(kind > 0, v, needed[0]) for v in (thorough, needed)))
        kept = (kind == escape) & ~jnp.all(jnp.isfinite(point.x))
        put = jax.tree_util.tree_map(
            lambda a, v: a.at[k].set(jnp.where(kept, a[k], v)),
            (xs, jacs, potentials, rows, codes),
            (point.x, jac, memory.data.potential[memory.here], memory.here, point.code),
        )
        return (*put, memory, same), (point, kept)

    x0 = jnp.stack([ft.start(fine, True), ft.start(fine, False)])
    memory = Slots.of(ft.no_memory(fine, nodes, split), 3)
    # Where m grows out of almost nothing, Newton steps would lead back to zero, or far off to where wells abound.
    rough, refined = _stages(numerics, len(nodes.weight), 1e-3, settle=0.03)
    if fine.rank > fine.teacher_rank:
        # The response of spare directions overshoots, and the more so the more samples there are.
        rough, refined = (rule._replace(damping=0.7) for rule in (rough, refined))
    rules = (rough, refined, refined._replace(settle=0.0))
    kinds, branches = jnp.array([0, 0, last, last, escape]), jnp.array([0, 1, 0, 1, 0])
    jobs = (_stacked([rules[i] for i in (0, 0, 1, 1, 2)]), kinds, branches)
    potentials, jacs = memory.data.potential[:2], jnp.zeros((*x0.shape, x0.shape[1]))
    state = (x0, jacs, potentials, jnp.arange(2), jnp.zeros(2, int), memory, jnp.array(False))
    (_, jacs, potentials, rows, _, memory, same), (points, kept) = jax.lax.scan(job, state, jobs)
    final = jax.tree_util.tree_map(lambda a: jnp.stack([jnp.where(kept[4], a[2], a[4]), a[3]]), points)
    steps = points.steps[:2] + points.steps[2:4] + jnp.array([1, 0]) * points.steps[4]
    return Solved(final._replace(steps=steps), jacs, (potentials, rows)), memory, same


def _jumps(memory: Slots):
    """Whether there are wells in a part of the nodes that smooth ones do not have, in every row."""
    return memory.data.inner.split | memory.data.inner.needed


def _flags(memory: Slots):
    return memory.data.inner.thorough, memory.data.inner.needed


def _with_flags(memory: Slots, thorough, needed) -> Slots:
    """The memory with these two flags of every replica in its valid row."""
    inner, here = memory.data.inner, memory.here
    inner = inner._replace(thorough=inner.thorough.at[here].set(thorough), needed=inner.needed.at[here].set(needed))
    return memory._replace(data=memory.data._replace(inner=inner))


# ---- averages over nodes at the solution -----------------------------------------------------------------------


class MapAverages(NamedTuple):
    """What pre-training predictions need of the nodes (one replica, or their mean)."""

    conjugates: pt.Conjugates
    potential: Any  # C
    susceptibility: Any  # E || D(Z - Omega)/D Omega ||_HS^2
    two_wells: Any


def map_averages(pre: Pretraining, order: Order, nodes: Nodes | None, inner: pt.Inner | None) -> MapAverages:
    """The averages of every replica, stacked (the values themselves where no nodes are needed)."""
    if nodes is None:
        t, zero = pre.tokens, jnp.zeros(())
        s = dimension(t) * (4 * order.response / (t * t + 4 * order.response)) ** 2
        c = pt.channel_potential(pre, order, None)
        return MapAverages(pt.conjugates_at(pre, order, None, None)[1], c, s, zero)

    return over_replicas(lambda n, i: _map_replica(pre, order, n, i), nodes, inner)


def _map_replica(pre, order, nodes, inner) -> MapAverages:
    def block(nodes, inner):
        u = pt.minimiser(pre, order, nodes, inner)
        c, conjugates = pt.conjugates_at(pre, order, nodes, u)
        hess = pt.inner_problem(pre, order, nodes).terms(u)[2]
        s = jnp.sum(nodes.weight * _response_gap(hess, 2 * order.response, len(u)))
        return MapAverages(conjugates, c, s, jnp.sum(nodes.weight * inner.two_wells))

    return in_blocks(block, nodes, inner)


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


class LoraAverages(NamedTuple):
    """What fine-tuning predictions need of the nodes (one replica, or their mean)."""

    conjugates: ft.Conjugates
    potential: Any  # c
    susceptibility: Any  # E || d(chi - omega)/d omega ||_F^2, (2, 2) where some directions are spare
    two_wells: Any


def _lora_replica(fine: Finetuning, frozen: FrozenMap, order: Order, nodes, inner) -> LoraAverages:
    def use(d, chi, two):
        c, conjugates = ft.conjugates_at(fine, order, d, chi)
        problem = ft.inner_problem(fine, order, d)
        s = jnp.sum(d.weight * _response_gap(problem.terms(chi)[2], problem.v, len(d.teacher)), -1)
        return LoraAverages(conjugates, c, s, jnp.sum(d.weight * two))

    def block(nodes, inner):
        return ft.with_minimisers(fine, order, ft.draws(fine, frozen, nodes), inner, use)

    return in_blocks(block, nodes, inner)


def lora_averages(fine: Finetuning, frozen: FrozenMap, order: Order, nodes: Nodes, inner) -> LoraAverages:
    """The averages of every replica, stacked."""
    return over_replicas(lambda n, i: _lora_replica(fine, frozen, order, n, i), nodes, inner)


# ---- predictions -----------------------------------------------------------------------------------------------


def map_predictions(pre: Pretraining, x, a: MapAverages, errors) -> dict[str, Any]:
    """Every pre-training prediction from the solver's coordinates, the averages and (E, E noiseless)."""
    c, order = a.conjugates, decode(x)
    live = order.response > 2 * RESPONSE_FLOOR
    size = pre.label_size
    V, M, Q = (jnp.where(live, v, 0.0) for v in (order.response, order.overlap, order.norm(size)))
    delta, eps, _ = pt.thresholds(pre, c)
    phi = (c.qhat * V + 2 * c.mhat * M - c.shat * Q) / 4 + pre.alpha * a.potential - pt.prior_potential(pre, c)
    response = pre.law.pair_response(delta, eps)
    replicon = 2 * pre.alpha / order.response**2 * a.susceptibility / c.shat**2 * response
    return {
        "V": V,
        "M": M,
        "Q": Q,
        "M_down": jnp.where(live, pt.downstream_overlap(pre, x), 0.0),
        **c._asdict(),
        "overlap": jnp.where(live, M / jnp.sqrt(jnp.where(live, Q, 1.0) * pre.Q0), jnp.nan),
        "train_loss": phi,
        "train_error": pre.alpha * a.potential - c.qhat * order.response / 4,
        "test_error": errors[0],
        "test_error_noiseless": errors[1],
        "rank_fraction": 1 - pre.law.mass_below(eps, delta),
        "replicon": jnp.where(live, replicon, jnp.nan),
        "double_well_share": a.two_wells,
    }


#: |w|^2 / D below which the update counts as zero.
_LIVE = 1e-12


def lora_overlap(fine: Finetuning, order: Order):
    """o_w = ||m||_F / sqrt(||q||_F ||q0 1||_F), for rank one m / sqrt(q q0); NaN where the update is zero."""
    n, k = directions(fine.rank, fine.teacher_rank), min(fine.rank, fine.teacher_rank)
    size = jnp.sqrt(jnp.sum(n * order.norm(ft.TEACHER_SIZE) ** 2))
    live = size > _LIVE
    most = jnp.sqrt(k * jnp.where(live, size, 1.0) * (ft.TEACHER_SIZE * np.sqrt(fine.teacher_rank)))
    return jnp.where(live, jnp.sum(n * order.overlap) / most, jnp.nan)


def _replicon(fine: Finetuning, a: LoraAverages):
    """Growth of a difference between the norms of two replicas, alike in the directions along the teacher and in the
    spare ones: largest eigenvalue of (alpha' / n_b) E || d(chi - omega)_b / d omega_b' ||_F^2, n_b directions in b."""
    n = directions(fine.rank, fine.teacher_rank)
    if np.ndim(n) == 0:
        return fine.alpha * a.susceptibility / n
    r = fine.alpha * a.susceptibility / n[:, None]
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
    v, m, q = (values[name] for name in "vmq")
    if "q_spare" in values:
        v, q = (jnp.stack([a, values[f"{name}_spare"]]) for name, a in (("v", v), ("q", q)))
        m = jnp.stack([m, jnp.zeros_like(m)])
    return from_norm(v, m, q, ft.TEACHER_SIZE)


def lora_predictions(fine: Finetuning, frozen: FrozenMap, order: Order, a: LoraAverages, errors) -> dict[str, Any]:
    """Every fine-tuning prediction from the order parameters, the averages and (E', E' at w = 0)."""
    c, q0 = a.conjugates, ft.TEACHER_SIZE
    q = order.norm(q0)
    live = q > _LIVE
    phi = ft.free_energy(fine, order, c, a.potential)
    m, q = jnp.where(live, order.overlap, 0.0), jnp.where(live, q, 0.0)
    penalty = jnp.sum(directions(fine.rank, fine.teacher_rank) * c.qhat * order.response)
    return {
        **_by_direction({"v": order.response, "m": m, "q": q, **c._asdict()}),
        "overlap": lora_overlap(fine, order),
        "train_loss": phi,
        "train_error": fine.alpha * a.potential - penalty / 2,
        "test_error": errors[0],
        "test_error_frozen": errors[1],
        "effective_noise": fine.effective_noise(frozen),
        "recalibration": fine.scale(frozen),
        "free_energy": phi,
        "replicon": _replicon(fine, a),
        "double_well_share": a.two_wells,
    }


def _map_errors(pre, order, nodes):
    def one(size):
        return pretraining_error(pre.activation, pre.tokens, size, order.overlap, order.norm(pre.label_size), nodes)

    # The noiseless law has smaller labels but the same map: (Q0, M, Q).
    return one(pre.label_size), one(pre.Q0)


def _lora_errors(fine, frozen, order, nodes):
    # Test inputs are fresh, whatever the fine-tuning inputs were; the factor on the map stays.
    frozen = frozen.scaled(fine.scale(frozen))
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
    """Output of `evaluate_pretraining`."""

    values: dict[str, Any]
    x: Any  # order parameters in the solver's coordinates, with their derivative
    status: dict[str, Any]
    solved: Solved


class SecondStage(NamedTuple):
    """Output of `solve_finetuning`: the branch taken, both branches, what the channel searched for, and whether a
    search for smooth nodes will not do."""

    solved: Solved
    branches: Branches
    found: Any
    rough: Any


class Evaluation(NamedTuple):
    """Output of `evaluate`: values and status of both stages, and what `quadrature_errors` starts from."""

    pretraining: dict[str, Any]
    finetuning: dict[str, Any]
    branches: Branches
    status: dict[str, dict[str, Any]]
    solved: tuple[Solved, Solved, Any]  # of both stages, and what the channel searched for


def evaluate(pre: Pretraining, fine: Finetuning, numerics: Numerics, nodes: NodeSets) -> Evaluation:
    """Solves both stages and predicts everything; differentiable in every leaf of `pre` and `fine`.

    Each stage is searched without derivatives (`solve_*`: loops) and then described with them (`describe_*`: none), so
    that a program of values and a program of gradients can share the compiled searches.
    """
    first = describe_pretraining(pre, nodes, solve_pretraining(pre, numerics, nodes.pretraining))
    second = solve_finetuning(pre, fine, first, numerics, nodes.finetuning)
    return describe_finetuning(pre, fine, nodes, first, second)


def describe_pretraining(pre: Pretraining, nodes: NodeSets, solved: Solved) -> FirstStage:
    """Predictions of pre-training, and its order parameters with their derivative, at the fixed point found."""
    const = None if nodes.pretraining is None else (nodes.pretraining, solved.inner)
    lost = 0.0 if nodes.pretraining is None else 1 - jnp.mean(1.0 * solved.inner.ok)
    code = jnp.where(lost > 1e-3, int(Code.stalled), solved.point.code)
    x = nan_slope(attach(pt.step, solved.point.x, pre, const), succeeded(solved.point.code))
    order = decode(x)
    a = map_averages(pre, order, nodes.pretraining, solved.inner)
    errors = _averaged(lambda n: _map_errors(pre, order, n), nodes.pretraining_test)
    values = map_predictions(pre, x, a if nodes.pretraining is None else mean(a), errors)
    narrow = values["rank_fraction"] > pre.kappa * (1 + 1e-9)
    code = jnp.where(succeeded(code) & narrow, int(Code.too_narrow), code)
    return FirstStage(values, x, {**solved.point._asdict(), "code": code}, solved)


def frozen_at(pre: Pretraining, fine: Finetuning, x) -> FrozenMap:
    """The frozen map at the solver's coordinates `x` of pre-training."""
    return fine.inputs.freeze(pre, decode(x), pt.downstream_overlap(pre, x))


def describe_finetuning(
    pre: Pretraining, fine: Finetuning, nodes: NodeSets, first: FirstStage, second: SecondStage
) -> Evaluation:
    """Predictions of fine-tuning on the branch that was taken, and the status of both stages."""
    frozen = frozen_at(pre, fine, first.x)
    prepared, solved = nodes.finetuning._replace(found=second.found), second.solved
    x = jnp.where(jnp.isfinite(solved.point.x), solved.point.x, ft.start(fine, True))
    order = decode(attach(ft.step, x, (fine, frozen), (prepared, solved.inner)))
    b = mean(lora_averages(fine, frozen, order, prepared, solved.inner))
    errors = _averaged(lambda n: _lora_errors(fine, frozen, order, n), nodes.finetuning_test)
    values = lora_predictions(fine, frozen, order, b, errors)
    values = {k: nan_slope(v, succeeded(solved.point.code)) for k, v in values.items()}
    status = {"pretraining": first.status, "finetuning": solved.point._asdict()}
    return Evaluation(first.values, values, second.branches, status, (first.solved, solved, second.found))


def _lowest(code, energies):
    """The branch of lowest free energy. One that was nearly solved counts where it lies clearly lower: then the answer
    is that the solve failed, not the other branch."""
    nearly = (code == Code.stalled) | (code == Code.max_steps) | (code == Code.cycle)
    handicap = jnp.where(succeeded(code), 0.0, jnp.where(nearly, 1e-3 * (1 + jnp.abs(energies)), jnp.inf))
    return jnp.argmin(jnp.where(jnp.isfinite(energies), energies, jnp.inf) + handicap)


def solve_finetuning(
    pre: Pretraining, fine: Finetuning, first: FirstStage, numerics: Numerics, nodes: Nodes, split: bool = True
) -> SecondStage:
    """Fixed point of fine-tuning on the map of pre-training (no derivative): the branch of lowest free energy among
    those that were solved.

    Without `split` all nodes are taken to be smooth, which is faster to compile and to solve. Where they are not, or
    anything has failed, the result is `rough`, and only a search with `split` can be trusted.
    """
    frozen = jax.lax.stop_gradient(frozen_at(pre, fine, first.x))
    fine = jax.lax.stop_gradient(fine)
    prepared = ft.prepare(fine, frozen, nodes)
    solved, memory, same = search_finetuning(fine, frozen, numerics, prepared, split)
    potentials, rows = solved.inner
    # Where the second start found nothing new it stands for the first.
    starts = jax.tree_util.tree_map(lambda a: jnp.stack([a[0], jnp.where(same, a[0], a[1])]), solved.point)

    def energy_at(x, potential):
        order = decode(x)
        return ft.free_energy(fine, order, ft.conjugates_of(fine, order), potential.mean())

    energies = jax.vmap(energy_at)(solved.point.x, potentials)
    energies = jnp.where(same, energies[0], energies)
    chosen = jnp.where(same, 0, _lowest(starts.code, energies))
    point, jacobian = jax.tree_util.tree_map(lambda a: a[chosen], (solved.point, solved.jacobian))
    best = Solved(point, jacobian, memory._replace(here=rows[chosen]).read().inner)
    code = jnp.where(wells.lost(best.inner) > 1e-3, int(Code.stalled), best.point.code)
    failed = ~succeeded(code) | ~jnp.all(succeeded(starts.code))
    code = jnp.where(succeeded(first.status["code"]), code, int(Code.upstream))
    best = best._replace(point=best.point._replace(code=code))
    rough = jnp.array(False)
    if not split and wells.splits(fine.rank):
        jumps = jnp.any(_jumps(memory)[rows, :], 1)
        rough = (jumps[0] | (jumps[1] & ~same) | failed) & (code != Code.upstream)
    return SecondStage(best, Branches(starts, energies, chosen), prepared.found, rough)


#: Error above which a solve that stopped at a jump (`Code.floor`) is not good enough, in quadrature errors.
_FLOOR_SHARE = 0.3


def final_code(stage: str, status: dict[str, Any], errors: dict[str, Any]):
    """The code of a stage once its quadrature errors are known: a solve that stopped at a jump must be well inside the
    largest error of its order parameters."""
    names = ("V", "M", "Q") if stage == "pretraining" else ("v", "m", "q", "v_spare", "q_spare")
    names = [n for n in names if n in errors]
    allowed = _FLOOR_SHARE * jnp.max(jnp.stack([jnp.asarray(errors[n]) for n in names]))
    far = (status["code"] == Code.floor) & ~(status["error"] <= allowed)
    return jnp.where(far, int(Code.stalled), status["code"])


# ---- error bars ------------------------------------------------------------------------------------------------


def quadrature_errors(pre: Pretraining, fine: Finetuning, numerics: Numerics, nodes: NodeSets, solved):
    """Standard error of every prediction, from the spread over replicas: two dictionaries.

    Replica r would solve x = F_r(x). One step with the Jacobian of all replicas takes it there to first order,
    x_r = x + (I - J)^{-1} (F_r(x) - F(x)), and its predictions are evaluated at x_r with its own nodes: no second
    solve. What its pre-training does to its fine-tuning is carried along.
    """
    stop = jax.lax.stop_gradient
    pre, fine, (of_map, of_lora, found) = stop(pre), stop(fine), stop(solved)
    prepared = nodes.finetuning._replace(found=found)
    if nodes.pretraining is None or nodes.pretraining_test is None:
        order = decode(of_map.point.x)
        a = map_averages(pre, order, None, None)
        one = map_predictions(pre, of_map.point.x, a, _map_errors(pre, order, None))
        map_x = jnp.broadcast_to(of_map.point.x, (numerics.replicas, len(of_map.point.x)))
        map_values = {k: jnp.broadcast_to(v, (numerics.replicas,)) for k, v in one.items()}
    else:

        def map_at(steps, n, x, inner):
            inner = pt.refresh_inner(pre, decode(x), n, inner, steps)
            return _map_replica(pre, decode(x), n, inner), inner

        def map_image(c):
            return pt.image_of(pre, c)

        map_x, a = _own_solutions(map_at, map_image, of_map, nodes.pretraining, numerics.replicas)
        errors = _of_replicas(lambda n, x: _map_errors(pre, decode(x), n), nodes.pretraining_test, map_x)
        map_values = jax.vmap(lambda x, a, e: map_predictions(pre, x, a, e))(map_x, a, errors)

    def lora_at(steps, n, x, inner, upstream):
        frozen, order = frozen_at(pre, fine, upstream), decode(x)
        n = ft.refresh_nodes(fine, frozen, n)
        inner = ft.refresh_inner(fine, frozen, order, n, inner, steps)
        return _lora_replica(fine, frozen, order, n, inner), inner

    def lora_image(c):
        return ft.order_parameters(fine, c).encode()

    xs, b = _own_solutions(lora_at, lora_image, of_lora, prepared, numerics.replicas, map_x)

    def errors_at(n, x, upstream):
        return _lora_errors(fine, frozen_at(pre, fine, upstream), decode(x), n)

    if nodes.finetuning_test is None:
        errors = jax.vmap(lambda x, u: errors_at(None, x, u))(xs, map_x)
    else:
        errors = _of_replicas(errors_at, nodes.finetuning_test, xs, map_x)
    values = jax.vmap(lambda x, u, b, e: lora_predictions(fine, frozen_at(pre, fine, u), decode(x), b, e))(
        xs, map_x, b, errors
    )
    return _standard_errors(map_values), _standard_errors(values)


def _of_replicas(f, nodes: Nodes, *of_replica):
    """`f(nodes, *of_replica)` averaged over the parts of every replica, (R, ...); `of_replica` (R, ...)."""
    values = over_replicas(f, nodes, *for_parts(of_replica, nodes))
    return by_replica(values, len(of_replica[0]))


def _own_solutions(averages_at, image, solved: Solved, nodes: Nodes, replicas: int, *upstream):
    """Order parameters (R, n) and averages of every replica at its own fixed point, to first order.

    `averages_at(steps, part, x, inner, *upstream) -> (averages, inner)`, with some steps of the inner minimisers to
    where they are at x; `image(conjugates)` is the second half-step. The first pass makes one step with the common
    Jacobian (cut to 1), the second evaluates there: one compiled copy serves both.
    """
    gap = jnp.eye(len(solved.jacobian)) - solved.jacobian
    upstream = for_parts(upstream, nodes)

    def one_pass(carry, steps):
        xs, inner = carry
        at = for_parts(xs, nodes)
        averages, inner = over_replicas(lambda *a: averages_at(steps, *a), nodes, at, inner, *upstream)
        averages = by_replica(averages, replicas)
        shift = jax.vmap(lambda c, x: small_solve(gap, image(c) - x))(averages.conjugates, xs)
        return (xs + jnp.clip(shift, -1.0, 1.0), inner), (xs, averages)

    start = jnp.broadcast_to(solved.point.x, (replicas, len(gap))), solved.inner
    # What pre-training does to the first pass of fine-tuning moves the minimisers there too.
    steps = jnp.array([1 if upstream else 0, 2])
    _, passes = jax.lax.scan(one_pass, start, steps)
    return jax.tree_util.tree_map(lambda v: v[-1], passes)


def _standard_errors(values: dict[str, Any]) -> dict[str, Any]:
    return {k: jnp.std(v, ddof=1) / np.sqrt(v.shape[0]) for k, v in values.items()}
