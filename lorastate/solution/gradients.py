"""Gradients of a prediction by every continuous input, and the b that minimises E', where one of them vanishes.

All derivatives go through both fixed points by the implicit function theorem.
"""

from __future__ import annotations

import math
import warnings
from typing import Any, NamedTuple

import equinox as eqx
import jax

from ..errors import Code, SettingError, SolveError, require_float64, succeeded
from ..evolution import finetuning as ft
from ..evolution import finetuning_map
from ..evolution import pretraining as pt
from ..math.implicit import sensitivity
from ..math.roots import root_between
from ..model.channel.recalibration import LeastError
from ..setting.fields import BY_PATH, Field, fields
from ..setting.paths import replace
from ..setting.stages import Setting
from .adapted import AdaptedLayer, best_factor, layer_error
from .finetuning import SecondStage, lora_overlap
from .pretraining import FirstStage, MapStage
from .problem import Problem, weighted
from .solve import Solves, failure, solve_alone
from .stage import FEW, averaged, test_errors

#: Objectives by name, each to be minimised, as functions of the adapted layer, the order parameters of pre-training (in
#: the solver's coordinates) and the nodes. Names without a stage are those of fine-tuning.
OBJECTIVES = {
    "test_error": lambda layer, x, nodes: layer_error(layer, nodes.finetuning_test),
    "effective_noise": lambda layer, x, nodes: layer.fine.effective_noise(layer.frozen),
    "overlap": lambda layer, x, nodes: -lora_overlap(layer.fine, layer.order),
    "forgetting_error": lambda layer, x, nodes: averaged(
        lambda n: layer.forgetting_error(n, layer.fine.adapter_factor), nodes.pretraining_test
    ),
    # Stationary in c, which need not be differentiated.
    "test_error_best_factor": lambda layer, x, nodes: layer_error(
        layer, nodes.finetuning_test, best_factor(layer, nodes.finetuning_test)
    ),
    "pretraining.test_error": lambda layer, x, nodes: test_errors(MapStage(layer.pre), x, nodes.pretraining_test)[0],
}


def value_and_slopes(problem: Problem, first: FirstStage, second: SecondStage, objective: str):
    """An objective and its derivatives, shaped like (pre, fine), at the fixed points that were found.

    Few inputs and no tape: forward mode needs a tenth of the memory of reverse mode, and compiles faster. Each stage is
    differentiated once, in its own order parameters and in everything that it is given; the chain rule does the rest.
    """
    params, rest = eqx.partition(problem.stages, eqx.is_inexact_array)
    x, y, nodes = first.solved.point.x, second.solved.point.x, problem.nodes
    prepared = problem.nodes_at(y, second.found, second.solved.weight)
    of_map = weighted(nodes.pretraining, first.solved.weight)
    levels = ft.order_at(problem.fine, y).levels

    def map_step(x, params, inner):
        pre, _ = eqx.combine(params, rest)
        return pt.step(x, pre, None if of_map is None else (of_map, inner))

    def lora(x, params):
        here = problem.at(eqx.combine(params, rest))
        return here.fine, here.frozen(x)

    def lora_step(y, given, inner):
        return ft.step(y, lora(*given), (prepared, inner))

    def value(y, x, params):
        here = problem.at(eqx.combine(params, rest))
        layer = AdaptedLayer(*here.stages, here.frozen(x), ft.order_at(here.fine, y))
        return OBJECTIVES[objective](layer, x, nodes)

    each = jax.tree_util.tree_map
    inner = second.solved.inner
    if levels:  # a search follows the wells that it knows: of those that could take over, derivatives need all
        inner = finetuning_map.locate_all(
            problem.fine, problem.frozen(x), ft.order_at(problem.fine, y), prepared, inner
        )
    dx = sensitivity(map_step, x, params, first.solved.inner)
    by_x, by_params = sensitivity(lora_step, y, (x, params), inner, levels)
    dy = each(lambda partial, dx: partial + by_x @ dx, by_params, dx)
    at_y, at_x, partial = jax.jacfwd(value, argnums=(0, 1, 2))(y, x, params)
    return value(y, x, params), each(lambda p, dx, dy: p + at_x @ dx + at_y @ dy, partial, dx, dy)


def slopes_at(found: Solves, objective: str):
    """`value_and_slopes` of every lane; compilation is most of their time."""
    return found.run(*sloped(objective))


def sloped(objective: str) -> tuple:
    """What `slopes_at` runs, as `solve` is told of it."""
    return value_and_slopes, 0, objective


def check_objective(name: str) -> str:
    """The name, if there is such an objective; else `SettingError`."""
    if not isinstance(name, str) or name not in OBJECTIVES:
        allowed = ", ".join(f'"{k}"' for k in OBJECTIVES)
        raise SettingError(f"objective = {name!r} is unknown; allowed: {allowed}")
    return name


class SlopeWarning(UserWarning):
    """Derivatives that are estimates, because minima jump from well to well."""


class Point(NamedTuple):
    """An objective at one setting: its `value` (-overlap for "overlap"), `slopes` = total derivatives by dotted path,
    why it could not be had, if so, and where minima `jump`, for which a kernel stands in the slopes."""

    value: float
    slopes: dict[str, float]
    failure: SolveError | None = None
    jump: str = ""


def total_slopes(setting: Setting, grads) -> dict[str, float]:
    """Total derivatives by dotted path, from partial ones shaped like (pre, resolved fine): what follows a field moves
    with it, and is part of its derivative."""
    by_stage: dict[str, Any] = dict(zip(("pretraining", "finetuning"), grads, strict=True))

    def partial(field: Field) -> float:
        return float(field.leaf(by_stage[field.stage]))

    return {
        field.path: partial(field) + sum(float(by) * partial(BY_PATH[p]) for p, by in field.moves(setting).items())
        for field in fields(setting)
    }


def evaluate(setting: Setting, objective: str) -> Point:
    """An objective and its slopes, whatever became of the solves."""
    return evaluated(setting, objective, solve_alone(Problem.of(setting), (value_and_slopes, 0, objective)))


def evaluated(setting: Setting, objective: str, found: Solves) -> Point:
    """The same from what `solve_alone` has found."""
    problem, first, second = found.problem, found.first, found.second
    value, grads = slopes_at(found, objective)
    slopes = total_slopes(setting, grads)
    ends = {"finetuning": (second.solved.point.code, second.solved.point.residual)}
    if problem.fine.inputs.needs_map:
        ends = {"pretraining": (first.status["code"], first.status["residual"])} | ends
    for stage, (code, residual) in ends.items():
        if not succeeded(int(code)):
            return Point(float(value), slopes, failure(stage, Code(int(code)), residual, problem.pre, first.values))
    if not all(map(math.isfinite, slopes.values())):
        return Point(float(value), slopes, SolveError("gradient", Code.nonfinite, f"objective {objective}"))
    return Point(float(value), slopes, jump=_jump(found))


def _jump(found: Solves) -> str:
    """Where minima jump from well to well, in words."""
    where, problem = [], found.problem
    share = float(found.first.values["double_well_share"])
    if problem.fine.inputs.needs_map and share > FEW:
        where.append(f"pre-training has many minima ({100 * share:.2g} % of its nodes have two wells)")
    if ft.order_at(problem.fine, found.second.solved.point.x).levels:
        where.append("fine-tuning is a glass")
    return " and ".join(where)


def gradient(setting: Setting, of: str = "test_error") -> tuple[float, dict[str, float]]:
    """Value of a prediction and its derivative by every continuous field.

    `of` is "test_error" (E'), "test_error_best_factor" (E' with the best factor on the update), "forgetting_error" (the
    adapted layer on the labels of pre-training), "effective_noise", "overlap" or "pretraining.test_error" (E).

    Fine-tuning fields left to follow pre-training count in the pre-training field (as `replace` would move both);
    the fine-tuning entry is the partial derivative. Raises `SolveError` when a solve failed. Where minima jump from
    well to well, in a glass and where pre-training has many minima, derivatives are estimates that get better with
    more nodes: a `SlopeWarning` says so. On thinned nodes (`numerics.thinning`) derivatives hold the weights of these
    fixed, and are as noisy as so few nodes make them.
    """
    require_float64()
    objective, searched = check_objective(of), searches_scale(setting)
    if searched:
        # E' is stationary in b: there is no need to differentiate the search.
        only_of_error(of)
        setting = with_best_scale(setting)
    value, slopes, failed, jump = evaluate(setting, objective)
    if failed is not None:
        raise failed
    if jump:
        warnings.warn(
            f"derivatives are estimates here, a few per cent off or, in the worst case measured, 20: {jump}; "
            "more nodes help",
            SlopeWarning,
            stacklevel=2,
        )
    if searched:
        del slopes[SCALE]
    sign = -1.0 if of == "overlap" else 1.0
    return sign * value, {k: sign * v for k, v in slopes.items()}


# ---- the b that minimises E' -----------------------------------------------------------------------------------


def searches_scale(setting: Setting) -> bool:
    """Whether the recalibration is "error": a b that has to be searched for."""
    return isinstance(setting.finetuning.recalibration, LeastError)


def only_of_error(objective: str) -> None:
    """Raises `SettingError` where a b that minimises E' would go with another objective."""
    if objective != "test_error":
        raise SettingError(
            f"finetuning.recalibration = 'error' goes with the objective test_error only, not with {objective}; "
            'allowed: a number or "noise"'
        )


#: The field of b.
SCALE = "finetuning.recalibration"
#: Slope of log E' by log b that counts as none, and that above which none was found; how far log b is looked for.
_FLAT, _STEEP, _FAR = 1e-7, 1e-4, 12.0


def with_best_scale(setting: Setting) -> Setting:
    """The setting with recalibration "error" replaced by the b that minimises E': the root of dE'/d log b that is next
    to b = 1 downhill. Raises `SolveError` where there is none or a solve fails."""
    at = _OfScale(setting)
    if at.slope(0.0) == 0:
        return at.setting(0.0)
    low, high = _bracket(at)
    flat = min(_FLAT, 1e-6 * max(abs(at.slope(low)), abs(at.slope(high))))
    root = root_between(lambda x: at.slope(x) if abs(at.slope(x)) > flat else 0.0, low, high, 1e-9)
    (value, slope), (first, _) = at.known[root], at.known[0.0]
    # A jump of E' is no minimum, nor is what lies above the start by more than a solve is off.
    if not (value <= first + 1e-6 * abs(first) and abs(slope) < _STEEP):
        raise _no_scale(Code.stalled, f"at b = {math.exp(root):.3g} it stops falling without a minimum")
    return at.setting(root)


class _OfScale:
    """E' as a function of log b; `known`: E' and d log E' / d log b where they were solved."""

    def __init__(self, setting: Setting):
        self.given = setting
        self.known: dict[float, tuple[float, float]] = {}

    def setting(self, log_b: float) -> Setting:
        return replace(self.given, SCALE, math.exp(log_b))

    def slope(self, log_b: float) -> float:
        if log_b not in self.known:
            value, slopes, failed, _ = evaluate(self.setting(log_b), "test_error")
            if failed is not None and not self.known:
                raise failed  # whatever b is
            if failed is not None:
                raise _no_scale(failed.code, f"b = {math.exp(log_b):.3g} was not solved ({failed})") from failed
            self.known[log_b] = value, slopes[SCALE] * math.exp(log_b) / max(abs(value), 1e-9)
        return self.known[log_b][1]


def _bracket(at: _OfScale) -> tuple[float, float]:
    """Two log b between which E' stops falling: from 0 downhill by steps that grow, or shrink where a solve fails."""
    start = at.slope(0.0)
    down, step, last = -math.copysign(1.0, start), 0.25, 0.0
    while abs(last) < _FAR:
        try:
            slope = at.slope(last + down * step)
        except SolveError:
            step /= 3
            if step < 1e-3:
                raise
            continue
        if slope * start <= 0:
            return last, last + down * step
        last, step = last + down * step, 2 * step
    raise _no_scale(Code.stalled, f"it falls all the way to b = {'zero' if down < 0 else 'infinity'}")


def _no_scale(code: Code, why: str) -> SolveError:
    return SolveError("recalibration", code, f"in the search for the b that minimises E', {why}")
