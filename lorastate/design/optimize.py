"""The optimal design: an objective descended over continuous fields, within budgets, for choices of discrete ones.

All derivatives go through both fixed points by the implicit function theorem; positive inputs are descended in log
coordinates, shares between 0 and 1 in those of the logistic function.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from tqdm import tqdm

from ..errors import Code, SettingError, SolveError, require_float64
from ..predictions import stage_and_name
from ..setting.paths import replace
from ..setting.stages import Setting
from ..solution.gradients import SCALE, check_objective, only_of_error, searches_scale
from ..solution.solution import Solution, predict
from .budgets import Budget, Within
from .budgets import budgets as _read_budgets
from .constrained import descend_within
from .descent import End, Ending, Landscape, Trial, check_over, descend
from .optimum import Optimum
from .scan import best_choice


def optimize(
    setting: Setting,
    over: Sequence[str] = ("pretraining.lam", "finetuning.lam"),
    minimize: str = "test_error",
    *,
    budgets: Iterable[Any] = (),
    scan: Mapping[str, Sequence[Any]] | None = None,
    tolerance: float = 1e-6,
    max_steps: int = 60,
    progress: bool = False,
) -> Optimum:
    """Minimises E' ("test_error"), Delta_eff ("effective_noise"), -o_w ("overlap"), the error on the labels of
    pre-training before ("pretraining.test_error") or after fine-tuning ("forgetting_error"), or E' with the best factor
    on the update ("test_error_best_factor") over continuous fields.

    In u = log(field), or log(x/(1 - x)) for a share x (rho, reused_fraction), so that positive inputs stay positive.
    Without `budgets`: L-BFGS directions (optax) with backtracking; a trial whose solve fails is shortened. With
    `budgets` (sentences or functions, see `lorastate.design.budgets`): sequential quadratic programming (scipy's SLSQP)
    in a trust region, from the nearest point that keeps the budgets; `Optimum.budgets` says which bind and at what
    price. `scan` maps discrete fields, such as "pretraining.tokens", to the values to try: everything else is descended
    for each of them, and the best is returned.

    Stops when the norm of the gradient in u (of what the binding budgets leave of it), over the size of the objective
    (here or at the start), is below `tolerance`, and the objective does not go on falling beyond; in a glass, whose
    slopes are estimates, where it is below the error bar of the objective and no step lowers it. Anything else, a run
    to the boundary included, is `converged = False` with a message. Recalibration "error" joins the descent. Raises
    `SettingError` for an unknown field and for budgets that cannot be met, and `SolveError` when the starting point
    itself cannot be solved.
    """
    require_float64()
    objective = check_objective(minimize)
    if searches_scale(setting):
        # Both searches minimise E': they are one.
        only_of_error(minimize)
        setting, over = replace(setting, SCALE, 1.0), (*over, SCALE)
    limits = _read_budgets(budgets, setting)

    def descend_from(start: Setting) -> Optimum:
        checked = check_over(start, over)
        if not checked:
            raise SettingError("over = () is empty; allowed: at least one continuous field")
        with tqdm(desc="descent", unit="solve", disable=not progress) as bar:
            return _optimum(Landscape(start, checked, objective, bar), limits, tolerance, max_steps)

    return best_choice(setting, scan, descend_from) if scan else descend_from(setting)


def _optimum(landscape: Landscape, limits: tuple[Budget, ...], tolerance: float, max_steps: int) -> Optimum:
    """The descent of a landscape, with the solutions before and after."""
    within = Within(landscape.replaced, limits) if limits else None
    start = landscape.start if within is None else within.nearest(landscape.start)
    before = predict(landscape.setting)
    first = landscape.begin(start)
    if not first.good:
        raise SolveError("optimize", Code.nonfinite, "the gradient at the starting point is not finite")
    if within is None:
        last, ending = descend(landscape, first, tolerance, max_steps)
    else:
        last, ending = descend_within(landscape, within, first, tolerance, max_steps)
    norm = landscape.path[-1]["gradient_norm"]
    converged = norm < tolerance and ending.end not in (End.boundary, End.away)
    stuck = ending.end in (End.no_step, End.no_step_within)
    after, report = predict(last.setting), [] if within is None else within.report(last.u, last.slope)
    if not converged and stuck and norm < _resolved(landscape, last, after) and landscape.boundary(last) is None:
        converged, ending = True, Ending(End.unresolved, {"norm": norm})
    return Optimum(
        landscape.over, landscape.objective, landscape.setting, last.setting, before, after, norm, landscape.solves,
        converged, ending.message, ending.end, landscape.path, last.slopes, report,
    )  # fmt: skip


def _resolved(landscape: Landscape, last: Trial, after: Solution) -> float:
    """The relative gradient below which a search that finds no lower value has come to its end: where minima jump, as
    in a glass, the relative error bar of the objective, below which no descent is known."""
    bar = after.stderr(*stage_and_name(landscape.objective)) if last.jumps else 0.0
    return max(1e-5, landscape.relative(last, bar))
