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
from . import spectrum
from .channel import FrozenMap
from .errors import Code, succeeded
from .fixed_point import FixedPoint, Method, attach, nan_slope, search, small_solve
from .generalization import finetuning_error, node_dimension, pretraining_error
from .order import RESPONSE_FLOOR, Order, decode
from .prox import ldl_solve
from .quadrature import Nodes, gaussian_nodes, mean, over_replicas
from .setting import Finetuning, Numerics, Pretraining
from .symmetric import dimension


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

    def test(activation, tokens, stream):
        d = node_dimension(activation, tokens)
        return gaussian_nodes(d, 2 * numerics.finetuning_nodes, r, seed + stream) if d else None

    d = pt.node_dimension(pre)
    return NodeSets(
        gaussian_nodes(d, numerics.nodes, r, seed) if d else None,
        gaussian_nodes(ft.node_dimension(fine), numerics.finetuning_nodes, r, seed, (t, 2 * t)),
        test(pre.activation, pre.tokens, 10**6),
        test(fine.activation, t, 2 * 10**6),
    )


def _method(numerics: Numerics, **changes) -> Method:
    return Method(tolerance=numerics.tolerance, max_steps=numerics.max_steps, **changes)


def _coarse(nodes: Nodes) -> Nodes:
    return jax.tree_util.tree_map(lambda a: a[:1], nodes)


def solve_pretraining(pre: Pretraining, numerics: Numerics, nodes: Nodes | None) -> FixedPoint:
    """Fixed point of pre-training; with nodes, one replica finds the neighbourhood and Newton on all finishes."""
    if nodes is None:
        return search(pt.step, _method(numerics), pt.start(pre), pre)
    rough = search(pt.step, Method(tolerance=1e-4, max_steps=numerics.max_steps), pt.start(pre), pre, _coarse(nodes))
    sol = search(pt.step, _method(numerics, burn_in=0), rough.x, pre, nodes)
    return sol._replace(steps=sol.steps + rough.steps)


class Branches(NamedTuple):
    """Fine-tuning solutions from the informative [0] and the small [1] start, with their free energies."""

    solution: FixedPoint
    free_energy: Any
    chosen: Any


def search_finetuning(fine: Finetuning, frozen: FrozenMap, numerics: Numerics, nodes: Nodes):
    """Solutions from both starts, stacked, and whether the two are the same one (no derivatives)."""
    args = (fine, frozen)
    rough_method = Method(tolerance=1e-3, max_steps=numerics.max_steps, floor=3e-2)
    method = _method(numerics, burn_in=0, floor=2e-3)

    def rough(x0):
        return search(ft.step, rough_method, x0, args, _coarse(nodes))

    first = jax.lax.map(rough, jnp.stack([ft.start(True), ft.start(False)]))
    # Where both starts have found the same solution the second is not refined again: NaN stops at once.
    same = jnp.max(jnp.abs(first.x[0] - first.x[1])) < 0.02
    x0 = jnp.stack([first.x[0], jnp.where(same, jnp.nan, first.x[1])])
    sols = jax.lax.map(lambda x: search(ft.step, method, x, args, nodes), x0)
    return sols._replace(steps=sols.steps + first.steps), same


# ---- averages over nodes at the solution -----------------------------------------------------------------------


class MapAverages(NamedTuple):
    """What pre-training predictions need of the nodes (one replica, or their mean)."""

    conjugates: pt.Conjugates
    potential: Any  # C
    susceptibility: Any  # E || D(Z - Omega)/D Omega ||_HS^2
    two_wells: Any
    unconverged: Any


def map_averages(pre: Pretraining, order: Order, nodes: Nodes | None) -> MapAverages:
    if nodes is None:
        t, zero = pre.tokens, jnp.zeros(())
        s = dimension(t) * (4 * order.response / (t * t + 4 * order.response)) ** 2
        c = pt.channel_potential(pre, order, None)
        return MapAverages(pt.conjugates(pre, order, None), c, s, zero, zero)

    def one(n):
        u, two, ok = pt.inner_minimum(pre, order, n)
        c, conjugates = pt.conjugates_at(pre, order, n, u)
        hess = pt.inner_problem(pre, order, n).terms(u)[2]
        s = jnp.sum(n.weight * _response_gap(hess, 2 * order.response))
        return MapAverages(conjugates, c, s, jnp.sum(n.weight * two), 1 - jnp.mean(1.0 * ok))

    return over_replicas(one, nodes)


def _response_gap(hess, scale):
    """|| H^{-1}/scale - 1 ||_F^2 at every node: the derivative of (minimiser - field) with respect to the field."""
    n, nodes = hess.shape[0], hess.shape[2]
    total = jnp.zeros((nodes,))
    for i in range(n):
        e = jnp.zeros((n, nodes)).at[i].set(1.0)
        total = total + jnp.sum((ldl_solve(hess, e)[0] / scale - e) ** 2, 0)
    return total


class LoraAverages(NamedTuple):
    """What fine-tuning predictions need of the nodes (one replica, or their mean)."""

    conjugates: ft.Conjugates
    potential: Any  # c
    susceptibility: Any  # E || d(chi - omega)/d omega ||_F^2
    two_wells: Any
    unconverged: Any


def lora_averages(fine: Finetuning, frozen: FrozenMap, order: Order, nodes: Nodes) -> LoraAverages:
    def use(d, chi, ok, two):
        c, conjugates = ft.conjugates_at(fine, order, d, chi)
        hess = ft.inner_problem(fine, order, d).terms(chi)[2]
        s = jnp.sum(d.weight * _response_gap(hess, order.response))
        return LoraAverages(conjugates, c, s, jnp.sum(d.weight * two), 1 - jnp.mean(1.0 * ok))

    return over_replicas(lambda n: ft.with_draws(fine, order, ft.draws(fine, frozen, n), use), nodes)


def free_energy(fine: Finetuning, order: Order, a: LoraAverages):
    """phi = (q' v + 2 m' m - l' q)/2 + alpha' c - (m'^2 q0 + q') / (2 (l' + 2 lam')), per D."""
    c, q0 = a.conjugates, ft.TEACHER_SIZE
    work = (c.qhat * order.response + 2 * c.mhat * order.overlap - c.lhat * order.norm(q0)) / 2
    return work + fine.alpha * a.potential - (c.mhat**2 * q0 + c.qhat) / (c.lhat + 2 * fine.lam) / 2


# ---- predictions -----------------------------------------------------------------------------------------------


def map_predictions(pre: Pretraining, order: Order, a: MapAverages, errors) -> dict[str, Any]:
    """Every pre-training prediction from the order parameters, the averages and (E, E noiseless)."""
    c = a.conjugates
    live = order.response > 2 * RESPONSE_FLOOR
    size = pre.label_size
    V, M, Q = (jnp.where(live, v, 0.0) for v in (order.response, order.overlap, order.norm(size)))
    delta, eps, _ = pt.thresholds(pre, c)
    phi = (c.qhat * V + 2 * c.mhat * M - c.shat * Q) / 4 + pre.alpha * a.potential - pt.prior_potential(pre, c)
    response = spectrum.pair_response(delta, eps, pre.kappa0)
    replicon = 2 * pre.alpha / order.response**2 * a.susceptibility / c.shat**2 * response
    return {
        "V": V,
        "M": M,
        "Q": Q,
        **c._asdict(),
        "overlap": jnp.where(live, M / jnp.sqrt(jnp.where(live, Q, 1.0) * pre.Q0), jnp.nan),
        "train_loss": phi,
        "train_error": pre.alpha * a.potential - c.qhat * order.response / 4,
        "test_error": errors[0],
        "test_error_noiseless": errors[1],
        "rank_fraction": 1 - spectrum.mass_below(eps, delta, pre.kappa0),
        "replicon": jnp.where(live, replicon, jnp.nan),
        "double_well_share": a.two_wells,
    }


def lora_predictions(fine: Finetuning, frozen: FrozenMap, order: Order, a: LoraAverages, errors) -> dict[str, Any]:
    """Every fine-tuning prediction from the order parameters, the averages and (E', E' at w = 0)."""
    c, q0 = a.conjugates, ft.TEACHER_SIZE
    q = order.norm(q0)
    live = q > 1e-12
    phi = free_energy(fine, order, a)
    m, q = jnp.where(live, order.overlap, 0.0), jnp.where(live, q, 0.0)
    return {
        "v": order.response,
        "m": m,
        "q": q,
        **c._asdict(),
        "overlap": jnp.where(live, m / jnp.sqrt(jnp.where(live, q, 1.0) * q0), jnp.nan),
        "train_loss": phi,
        "train_error": fine.alpha * a.potential - c.qhat * order.response / 2,
        "test_error": errors[0],
        "test_error_frozen": errors[1],
        "effective_noise": fine.inputs.effective_noise(frozen, fine.delta),
        "free_energy": phi,
        "replicon": fine.alpha * a.susceptibility,
        "double_well_share": a.two_wells,
        "unconverged": a.unconverged,
    }


def _map_errors(pre, order, nodes):
    def one(n, size):
        return pretraining_error(pre.activation, pre.tokens, size, order.overlap, order.norm(pre.label_size), n)

    if nodes is None:
        return one(None, pre.label_size), one(None, pre.Q0)
    # The noiseless law has smaller labels but the same map: (Q0, M, Q).
    return over_replicas(lambda n: (one(n, pre.label_size), one(n, pre.Q0)), nodes)


def _lora_errors(fine, frozen, order, nodes):
    size = frozen.Q0 + fine.delta / 2

    def one(n):
        common = (fine.activation, fine.tokens, size, frozen.overlap, frozen.norm)
        return finetuning_error(*common, order, n), finetuning_error(*common, None, n)

    return one(None) if nodes is None else over_replicas(one, nodes)


def _frozen(pre: Pretraining, order: Order) -> FrozenMap:
    return FrozenMap(order.overlap, order.norm(pre.label_size), pre.Q0)


def _mean_if(nodes, tree):
    return tree if nodes is None else mean(tree)


# ---- everything ------------------------------------------------------------------------------------------------


class Evaluation(NamedTuple):
    """Output of `evaluate`: values and status of both stages."""

    pretraining: dict[str, Any]
    finetuning: dict[str, Any]
    branches: Branches
    status: dict[str, dict[str, Any]]


def evaluate(pre: Pretraining, fine: Finetuning, numerics: Numerics, nodes: NodeSets) -> Evaluation:
    """Solves both stages and predicts everything; differentiable in every leaf of `pre` and `fine`."""
    map_sol = solve_pretraining(pre, numerics, nodes.pretraining)
    map_x = nan_slope(attach(pt.step, map_sol.x, pre, nodes.pretraining), succeeded(map_sol.code))
    map_order = decode(map_x)
    a = _mean_if(nodes.pretraining, map_averages(pre, map_order, nodes.pretraining))
    map_values = map_predictions(
        pre, map_order, a, _mean_if(nodes.pretraining_test, _map_errors(pre, map_order, nodes.pretraining_test))
    )
    code = jnp.where(a.unconverged > 1e-3, int(Code.stalled), map_sol.code)
    narrow = map_values["rank_fraction"] > pre.kappa * (1 + 1e-9)
    code = jnp.where(succeeded(code) & narrow, int(Code.too_narrow), code)

    frozen = _frozen(pre, map_order)
    values, branches = _finetune(fine, frozen, numerics, nodes)
    sol = jax.tree_util.tree_map(lambda v: v[branches.chosen], branches.solution)
    lora_code = jnp.where(values["unconverged"] > 1e-3, int(Code.stalled), sol.code)
    lora_code = jnp.where(succeeded(code), lora_code, int(Code.upstream))
    values = {k: nan_slope(v, succeeded(lora_code)) for k, v in values.items()}
    status = {
        "pretraining": {**map_sol._asdict(), "code": code},
        "finetuning": {**sol._asdict(), "code": lora_code},
    }
    return Evaluation(map_values, values, branches, status)


def _finetune(fine: Finetuning, frozen: FrozenMap, numerics: Numerics, nodes: NodeSets):
    """Predictions on the branch of lowest free energy among those that were solved, and both branches."""
    sols, same = search_finetuning(fine, frozen, numerics, nodes.finetuning)
    finite = jnp.isfinite(sols.x)
    xs = jax.lax.stop_gradient(jnp.where(finite, sols.x, ft.start(True)))

    def values_at(x):
        order = decode(attach(ft.step, x, (fine, frozen), nodes.finetuning))
        b = mean(lora_averages(fine, frozen, order, nodes.finetuning))
        errors = _mean_if(nodes.finetuning_test, _lora_errors(fine, frozen, order, nodes.finetuning_test))
        return lora_predictions(fine, frozen, order, b, errors)

    def nothing(_):
        return jax.tree_util.tree_map(lambda v: jnp.zeros(v.shape, v.dtype), jax.eval_shape(values_at, xs[0]))

    # Where the second start found nothing new its predictions are not computed again.
    both = jax.lax.map(
        lambda a: jax.lax.cond(a[1], values_at, nothing, a[0]), (xs, jnp.stack([jnp.array(True), ~same]))
    )
    copy = jax.tree_util.tree_map(lambda a: jnp.where(same, a[0], a[1]), sols)
    sols = jax.tree_util.tree_map(lambda a, b: jnp.stack([a[0], b]), sols, copy)
    energy = jnp.where(same, both["free_energy"][0], both["free_energy"])
    chosen = jnp.where(same, 0, jnp.argmin(jnp.where(succeeded(sols.code), energy, jnp.inf)))
    return {k: v[chosen] for k, v in both.items()}, Branches(sols, energy, chosen)


def quadrature_errors(pre: Pretraining, fine: Finetuning, numerics: Numerics, nodes: NodeSets, map_x, x):
    """Standard error of every prediction, from the spread over replicas: two dictionaries.

    Replica r would solve x = F_r(x). To first order its solution is x + (I - J)^{-1} (F_r(x) - F(x)), so no second
    solve is needed. What its pre-training does to its fine-tuning is carried along in the same way.
    """
    r = numerics.replicas

    def map_outputs(y):
        order = decode(y)
        return map_averages(pre, order, nodes.pretraining), _map_errors(pre, order, nodes.pretraining_test)

    def map_image(c):
        return pt.order_parameters(pre, c).encode()

    shift, (a, errors) = _respond(map_outputs, map_image, map_x, jnp.zeros((r, 0)))
    map_values = jax.vmap(lambda d, a, e: map_predictions(pre, decode(map_x + d), a, e))(shift, a, errors)

    def outputs(z):
        order, frozen = decode(z[:3]), _frozen(pre, decode(z[3:]))
        averages = lora_averages(fine, frozen, order, nodes.finetuning)
        return averages, _lora_errors(fine, frozen, order, nodes.finetuning_test)

    def image(c):
        return ft.order_parameters(fine, c).encode()

    own, (b, errors) = _respond(outputs, image, jnp.concatenate([x, map_x]), shift)

    def predict(d, s, b, e):
        return lora_predictions(fine, _frozen(pre, decode(map_x + s)), decode(x + d), b, e)

    return _standard_errors(map_values), _standard_errors(jax.vmap(predict)(own, shift, b, errors))


def _respond(outputs, image, z, upstream):
    """Shifts of the three order parameters of every replica (R, 3), and its averages there, to first order.

    `outputs(z) -> (averages, errors)` at z = (own order parameters, those upstream, shifted by `upstream`).
    """
    r = upstream.shape[0]

    def stacked(y):
        out = jax.tree_util.tree_map(lambda v: jnp.broadcast_to(v, (r,)), outputs(y))
        return out, out

    jac, (averages, errors) = jax.jacfwd(stacked, has_aux=True)(z)
    slope = mean(jac)
    center = mean(averages.conjugates)
    by_conjugate = jnp.stack(jax.jacfwd(image)(center), 1)
    j = by_conjugate @ jnp.stack(slope[0].conjugates)
    force = jax.vmap(image)(averages.conjugates) - image(center) + upstream @ j[:, 3:].T
    shift = jax.vmap(lambda f: small_solve(jnp.eye(3) - j[:, :3], f))(force)
    total = jnp.concatenate([shift, upstream], 1)
    moved = jax.tree_util.tree_map(lambda v, d: v + total @ d, (averages, errors), slope)
    return shift, moved


def _standard_errors(values: dict[str, Any]) -> dict[str, Any]:
    return {k: jnp.std(v, ddof=1) / np.sqrt(v.shape[0]) for k, v in values.items()}
