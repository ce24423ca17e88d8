"""A second opinion on a solution: both fixed points and all gradients by another solver.

The maps are the same; everything around them is not. jaxopt's Anderson acceleration starts away from the solution,
looks for the inner minimisers anew at every step, and differentiates in reverse mode by its own rule, through both
stages at once. Ours is a Newton iteration that follows the minimisers, and forward mode stage by stage.
"""

from __future__ import annotations

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp

from ..errors import SettingError
from ..evolution import finetuning as ft
from ..evolution import finetuning_map
from ..evolution import pretraining as pt
from ..evolution.order import decode
from ..math.quadrature import over_replicas
from ..math.second_opinion import anderson
from ..setting.stages import Setting
from ..solution.adapted import AdaptedLayer
from ..solution.gradients import OBJECTIVES, check_objective, evaluated, total_slopes
from ..solution.problem import Problem, weighted
from ..solution.solve import solve_alone

#: How far away from the solution the other solver starts, in the solver's coordinates.
_AWAY = 0.05


def cross_check(setting: Setting, of: str = "test_error") -> dict[str, Any]:
    """`value` and `gradient` of a prediction (by dotted path): each `ours`, `other` and their `difference`, and the
    `residual` that the other solver was left with in both stages.

    In the replica-symmetric phase; raises `SettingError` where symmetry is broken (the other solver has no maximum to
    find) and for recalibration "error", `SolveError` where our own solve fails.
    """
    check_objective(of)
    found = solve_alone(Problem.of(setting))
    problem, here = found.problem, evaluated(setting, of, found)
    if here.failure is not None:
        raise here.failure
    y = found.second.solved.point.x
    if ft.order_at(problem.fine, y).levels:
        raise SettingError("symmetry is broken here; allowed: a setting that is replica symmetric")
    params, rest = eqx.partition(problem.stages, eqx.is_inexact_array)
    nodes = problem.nodes
    of_map = weighted(nodes.pretraining, found.first.solved.weight)
    of_lora = weighted(nodes.finetuning, found.second.solved.weight)
    x0, y0 = (jax.lax.stop_gradient(v) + _AWAY for v in (found.first.x, y))

    def value(params):
        here = problem.at(eqx.combine(params, rest))
        x, left = anderson(lambda x, pre: map_image(x, pre, of_map), x0, here.pre)
        fine, frozen = here.fine, here.frozen(x)
        y, left_too = anderson(lambda y, args: _lora_image(y, args, of_lora), y0, (fine, frozen))
        found = OBJECTIVES[of](AdaptedLayer(here.pre, fine, frozen, ft.order_at(fine, y)), x, nodes)
        return found, jnp.stack([left, left_too])

    (other, residual), grads = jax.jit(jax.value_and_grad(value, has_aux=True))(params)
    slopes = total_slopes(setting, grads)
    sign = -1.0 if of == "overlap" else 1.0

    def compared(a, b):
        return {"ours": sign * float(a), "other": sign * float(b), "difference": sign * float(b - a)}

    return {
        "value": compared(here.value, other),
        "gradient": {path: compared(here.slopes[path], slope) for path, slope in slopes.items()},
        "residual": {"pretraining": float(residual[0]), "finetuning": float(residual[1])},
    }


def map_image(x, pre, nodes):
    """One sweep of pre-training's state evolution at x, its inner minimisers looked for anew."""
    if nodes is None:
        return pt.step(x, pre, None)

    def at(n, w):
        return pt.locate_inner(pre, decode(x), n, w, True)

    found = over_replicas(at, nodes, pt.no_inner(pre, nodes))
    return pt.step(x, pre, (nodes, jax.lax.stop_gradient(found)))


def _lora_image(y, args, nodes):
    fine, frozen = args
    nodes, order = ft.prepare(fine, frozen, nodes), ft.order_at(fine, y)

    def at(n, w):
        return finetuning_map.locate_inner(fine, frozen, order, n, w, True)

    found = over_replicas(at, nodes, finetuning_map.no_memory(fine, nodes, 0, True).found)
    return ft.step(y, args, (nodes, jax.lax.stop_gradient(found)))
