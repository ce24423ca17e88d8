"""Gradients of a prediction with respect to every continuous input, and descent over any of them.

All derivatives go through both fixed points by the implicit function theorem; positive inputs are descended in log
coordinates, shares between 0 and 1 in those of the logistic function.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import optax
from scipy.optimize import minimize as scipy_minimize
from tqdm import tqdm

from ..errors import Code, SettingError, SolveError, require_float64
from ..setting.fields import continuous_fields
from ..setting.paths import get, replace, replace_all
from ..setting.stages import Setting
from ..solution.gradients import (  # noqa: F401
    OBJECTIVES,
    SCALE,
    check_objective,
    evaluate,
    gradient,
    only_of_error,
    searches_scale,
    total_slopes,
    value_and_slopes,
    with_best_scale,
)
from ..solution.solution import Solution, predict
from .budgets import Within
from .budgets import budgets as _read_budgets


def _high(path: str) -> float:
    """Largest value of a positive input: one for a share, otherwise none."""
    return 1.0 if path.endswith((".rho", ".reused_fraction")) else math.inf


@dataclass
class Optimum:
    """Result of `optimize`: settings and solutions before and after, and the path between.

    `budgets`: for each budget its text, whether it `binds`, by how much it is exceeded, and its `price`: the multiplier
    mu of d objective + mu d excess = 0, that is the improvement of the objective per unit by which the budget is
    relaxed. `gradient_norm` is what of the gradient (in the descended coordinates, over the size of the objective) the
    binding budgets leave.
    `slopes`: total derivatives of the objective by every continuous field. `scanned`: one entry for each choice of the
    discrete fields, if any were scanned.
    """

    over: tuple[str, ...]
    minimize: str
    initial: Setting
    setting: Setting
    before: Solution
    after: Solution
    gradient_norm: float
    solves: int
    converged: bool
    message: str
    path: list[dict[str, float]] = field(default_factory=list)
    slopes: dict[str, float] = field(default_factory=dict)
    budgets: list[dict[str, Any]] = field(default_factory=list)
    scanned: list[dict[str, Any]] = field(default_factory=list)

    def summary(self) -> dict[str, Any]:
        """Plain numbers for JSON."""
        return {
            "over": list(self.over),
            "minimize": self.minimize,
            "converged": self.converged,
            "message": self.message,
            "gradient_norm": self.gradient_norm,
            "solves": self.solves,
            "before": self.before.summary(),
            "after": self.after.summary(),
            "budgets": self.budgets,
            "scanned": self.scanned,
            "path": self.path,
        }


class _Trial(NamedTuple):
    """The problem at one point u."""

    u: np.ndarray
    setting: Setting
    value: float  # -overlap for the objective "overlap"
    slope: np.ndarray  # d value / du
    slopes: dict[str, float]  # by field
    good: bool


_AWAY = "runs off"


class _Problem:
    """An objective over some fields in unbounded coordinates: u = log x, or log(x/(1 - x)) for a share."""

    def __init__(self, setting: Setting, over: tuple[str, ...], objective: str, bar: tqdm):
        self.setting, self.over, self.objective, self.bar = setting, over, objective, bar
        self.high = np.array([_high(p) for p in over])
        self.solves, self.size = 0, 0.0
        self.path: list[dict[str, float]] = []

    @property
    def start(self) -> np.ndarray:
        x = np.array([float(get(self.setting, p)) for p in self.over])
        return np.log(x) - np.log1p(-x / self.high)

    def fields(self, u):
        """The inputs from the coordinates (JAX or NumPy)."""
        return [jnp.exp(v) if high == math.inf else 1 / (1 + jnp.exp(-v)) for high, v in zip(self.high, u, strict=True)]

    def replaced(self, u) -> Setting:
        return replace_all(self.setting, dict(zip(self.over, self.fields(u), strict=True)))

    def at(self, u: np.ndarray) -> _Trial:
        self.solves += 1
        xs = [float(x) for x in self.fields(u)]
        s = replace_all(self.setting, dict(zip(self.over, xs, strict=True)))
        value, slopes, failed = evaluate(s, self.objective)
        self.bar.update()
        # dx/du = x (1 - x / high)
        slope = [slopes[p] * x * (1 - x / h) for p, x, h in zip(self.over, xs, self.high, strict=True)]
        return _Trial(np.array(u), s, value, np.array(slope), slopes, failed is None)

    def begin(self, u: np.ndarray) -> _Trial:
        """`at` the start, whose value sets the scale that gradients are judged in."""
        first = self.at(u)
        self.size = abs(first.value)
        return first

    def relative(self, trial: _Trial, norm: Any) -> float:
        """The norm of a gradient over the size of the objective."""
        return float(norm) / max(self.size, abs(trial.value), 1e-9)

    def boundary(self, trial: _Trial) -> str | None:
        """The field that runs off, in a sentence, where the gradient vanishes because the field does: the objective
        still falls half a unit further down its slope or, if that cannot be solved, Newton's step is far from short."""
        norm = float(np.linalg.norm(trial.slope))
        if norm == 0:
            return None
        down = -trial.slope / norm
        beyond = self.at(trial.u + 0.5 * down)
        if beyond.good:
            away = beyond.slope @ down < 0
        else:
            before = self.at(trial.u - 0.5 * down)
            away = before.good and 0.5 * norm > 0.05 * (-before.slope @ down - norm)
        if not away:
            return None
        k = int(np.argmax(np.abs(down)))
        return f"{self.over[k]} {_AWAY} ({float(self.fields(trial.u)[k]):.3g}): its best value is at the boundary"

    def record(self, trial: _Trial, norm: float) -> None:
        fields = (float(x) for x in self.fields(trial.u))
        self.path.append(dict(zip(self.over, fields, strict=True)) | {"value": trial.value, "gradient_norm": norm})
        self.bar.set_postfix_str(f"value {trial.value:.6g}, gradient {norm:.1e}")


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
    """Minimises E' ("test_error"), Delta_eff ("effective_noise") or -o_w ("overlap") over continuous fields.

    In u = log(field), or log(x/(1 - x)) for a share x (rho, reused_fraction), so that positive inputs stay positive.
    Without `budgets`: L-BFGS directions (optax) with backtracking; a trial whose solve fails is shortened. With
    `budgets` (sentences or functions, see `lorastate.design.budgets`): sequential quadratic programming (scipy's SLSQP)
    in a trust region, from the nearest point that keeps the budgets; `Optimum.budgets` says which bind and at what
    price. `scan` maps discrete fields, such as "pretraining.tokens", to the values to try: everything else is descended
    for each of them, and the best is returned.

    Stops when the norm of the gradient in u (of what the binding budgets leave of it), over the size of the objective
    (here or at the start), is below `tolerance`, and the objective does not go on falling beyond; anything else, a run
    to the boundary included, is `converged = False` with a message. Recalibration "error" joins the descent. Raises
    `SettingError` for an unknown field and for budgets that cannot be met, and `SolveError` when the starting point
    itself cannot be solved.
    """
    require_float64()
    objective = check_objective(minimize)
    over = tuple(dict.fromkeys(over))
    if searches_scale(setting):
        # Both searches minimise E': they are one.
        only_of_error(minimize)
        setting, over = replace(setting, SCALE, 1.0), (*over, SCALE)
    limits = _read_budgets(budgets, setting)
    if scan:
        keywords: dict[str, Any] = {"tolerance": tolerance, "max_steps": max_steps, "progress": progress}
        return _scanned(setting, over, minimize, limits, scan, keywords)
    known = continuous_fields(setting)
    for p in over:
        if p not in known:
            raise SettingError(f"over = {p!r} is not a continuous field; allowed: {', '.join(known)}")
        x, high = float(get(setting, p)), _high(p)
        if not 0 < x < high:
            allowed = "> 0" if high == math.inf else f"above 0 and below {high:g}"
            raise SettingError(f"{p} = {x!r} is out of range; allowed: {allowed} when it is descended")
    if not over:
        raise SettingError("over = () is empty; allowed: at least one continuous field")

    with tqdm(desc="descent", unit="solve", disable=not progress) as bar:
        problem = _Problem(setting, over, objective, bar)
        within = Within(problem.replaced, limits) if limits else None
        start = problem.start if within is None else within.nearest(problem.start)
        before = predict(setting)
        first = problem.begin(start)
        if not first.good:
            raise SolveError("optimize", Code.nonfinite, "the gradient at the starting point is not finite")
        if within is None:
            last, message = _descend(problem, first, tolerance, max_steps)
        else:
            last, message = _descend_within(problem, within, first, tolerance, max_steps)
    norm = problem.path[-1]["gradient_norm"]
    converged = norm < tolerance and _AWAY not in message
    if not converged and norm < 1e-5 and message.startswith("no step") and problem.boundary(last) is None:
        converged, message = True, f"gradient norm {norm:.1e}; no further decrease is resolved"
    after = predict(last.setting)
    return Optimum(
        over, minimize, setting, last.setting, before, after, norm, problem.solves, converged, message,
        problem.path, last.slopes, [] if within is None else within.report(last.u, last.slope),
    )  # fmt: skip


def _descend(problem: _Problem, now: _Trial, tolerance: float, max_steps: int) -> tuple[_Trial, str]:
    """L-BFGS from a trial; the last one, and why it ended."""
    memory = optax.scale_by_lbfgs(memory_size=8)
    state = memory.init(jnp.asarray(now.u))
    problem.record(now, problem.relative(now, np.linalg.norm(now.slope)))
    for _ in range(max_steps):
        u, value, slope = now.u, now.value, now.slope
        norm = float(np.linalg.norm(slope))
        if problem.relative(now, norm) < tolerance:
            return now, problem.boundary(now) or f"gradient norm below {tolerance:g}"
        direction, state = memory.update(jnp.asarray(slope), state, jnp.asarray(u))
        step = -np.asarray(direction)
        if not np.all(np.isfinite(step)) or step @ slope >= 0:
            step, state = -slope / norm, memory.init(jnp.asarray(u))
        if len(problem.path) == 1:
            step = -slope / norm * 0.5  # no curvature known yet: half a unit of log
        step *= min(1.0, 1.5 / float(np.max(np.abs(step))))  # never more than a factor e^1.5 at once
        length, accepted = 1.0, False
        while length > 1e-4:
            trial = problem.at(u + length * step)
            # Near the minimum the decrease drowns in rounding; the slope along the step still tells.
            enough = trial.value <= value + 1e-4 * length * (step @ slope)
            flat = abs(trial.value - value) <= 1e-12 * max(1.0, abs(value))
            closer = flat and float(np.linalg.norm(trial.slope)) < norm
            if trial.good and (enough or closer):
                accepted = True
                break
            length /= 3
        if not accepted:
            return now, "no step along the descent direction lowers the objective (or every trial failed to solve)"
        now = trial
        problem.record(now, problem.relative(now, np.linalg.norm(now.slope)))
        if np.max(np.abs(now.u)) > 25:
            return now, f"a field {_AWAY} to zero or infinity: there is no interior optimum in this direction"
    return now, f"no convergence in {max_steps} steps"


class _Lost(Exception):
    """A trial whose solve failed."""


def _tried(problem: _Problem, trials: dict[bytes, _Trial], u) -> _Trial:
    """The trial at u, from those made before if it is among them."""
    name = np.asarray(u, float).tobytes()
    if name not in trials:
        trials[name] = problem.at(np.array(u, float))
    if not trials[name].good:
        raise _Lost
    return trials[name]


def _descend_within(problem: _Problem, within: Within, now: _Trial, tolerance: float, max_steps: int):
    """SLSQP in a box around the best point so far, then Newton steps on the conditions of stationarity.

    The first finds which budgets bind; the second ends with as many digits as the gradient has: SLSQP alone creeps.
    """
    reach, best = 2.0, now
    problem.record(now, problem.relative(now, within.rest(now.u, now.slope)))
    for _ in range(max_steps):
        begin, trials = best, {best.u.tobytes(): best}
        at = functools.partial(_tried, problem, trials)
        try:
            found: Any = scipy_minimize(
                lambda u, at=at: at(u).value, begin.u, jac=lambda u, at=at: at(u).slope, method="SLSQP",
                bounds=list(zip(begin.u - reach, begin.u + reach, strict=True)), constraints=within.constraints,
                options={"maxiter": 30, "ftol": 1e-7 * max(1e-3, abs(begin.value))},
            )  # fmt: skip
            at(within.nearest(found.x))
        except _Lost:
            reach /= 3
        kept = [trial for trial in trials.values() if trial.good and within.met(trial.u)]
        best = min([begin, *kept], key=lambda trial: trial.value)
        near_edge = np.max(np.abs(best.u - begin.u)) > 0.9 * reach
        if not near_edge:
            best = _stationary(problem, within, best, tolerance)
        norm = problem.relative(best, within.rest(best.u, best.slope))
        problem.record(best, norm)
        if norm < tolerance:
            free = norm == problem.relative(best, np.linalg.norm(best.slope))
            return best, (problem.boundary(best) if free else None) or f"gradient norm below {tolerance:g}"
        far = int(np.argmax(np.abs(best.u - now.u)))
        if abs(best.u[far] - now.u[far]) > 6.5:
            field = problem.over[far]
            return best, f"{field} {_AWAY} ({problem.path[-1][field]:.3g}): its best value is at the boundary"
        if not near_edge and begin.value - best.value < 1e-9 * max(1.0, abs(best.value)):
            reach /= 3
        if reach < 1e-4:
            return best, "no step within the budgets lowers the objective (or every trial failed to solve)"
    return best, f"no convergence in {max_steps} rounds"


def _stationary(problem: _Problem, within: Within, now: _Trial, tolerance: float) -> _Trial:
    """Newton steps for d objective + sum mu d excess = 0 and excess = 0 on the budgets that bind, as long as they help.

    The Hessian of the objective comes from one difference of exact gradients per field, taken once.
    """
    n, h = len(now.u), 1e-4
    norm = within.rest(now.u, now.slope)
    if problem.relative(now, norm) < tolerance:
        return now
    around = [problem.at(now.u + h * e) for e in np.eye(n)]
    if not all(trial.good for trial in around):
        return now
    hessian = np.array([(trial.slope - now.slope) / h for trial in around])
    hessian = (hessian + hessian.T) / 2
    for _ in range(8):
        step = within.newton_step(now.u, now.slope, hessian)
        if step is None or np.max(np.abs(step)) > 0.5:
            return now
        # Budgets are curved in u: a step along them leaves them by its square.
        trial = problem.at(within.nearest(now.u + step))
        rest = within.rest(trial.u, trial.slope)
        # A saddle or a maximum is stationary too: the objective must not rise.
        good = trial.good and within.met(trial.u) and trial.value <= now.value + 1e-9 * max(1.0, abs(now.value))
        if not good or not rest < norm:
            return now
        now, norm = trial, rest
        if problem.relative(now, norm) < tolerance:
            break
    return now


def _scanned(setting, over, minimize, limits, scan, keywords) -> Optimum:
    """The best of the descents for every combination of the discrete fields in `scan`."""
    for path, values in scan.items():
        if not isinstance(values, Sequence) or isinstance(values, str) or not len(values):
            raise SettingError(f"scan of {path!r} has no values; allowed: a list such as [2, 3, 4]")
        if path in continuous_fields(setting):
            raise SettingError(f"scan of {path!r}: this field is continuous; allowed: descend it with `over`")
    choices = [dict(zip(scan, combination, strict=True)) for combination in itertools.product(*scan.values())]
    settings = [replace_all(setting, choice) for choice in choices]  # raises where a field or a value does not exist
    for at in settings:
        at.finetuning_resolved  # noqa: B018  raises where the stages do not go together
    results: list[tuple[dict[str, Any], Optimum | None, str]] = []
    for choice, at in zip(choices, settings, strict=True):
        try:
            found = optimize(at, over, minimize, budgets=limits, **keywords)
            results.append((choice, found, found.message))
        except SolveError as error:
            results.append((choice, None, str(error)))
    done = [found for _, found, _ in results if found is not None]
    if not done:
        raise SolveError("optimize", Code.nonfinite, f"every choice of {', '.join(scan)}: {results[0][2]}")
    best = min(done, key=lambda o: (not o.converged, o.path[-1]["value"]))
    best.scanned = [
        choice
        | {
            "value": None if found is None else found.path[-1]["value"],
            "converged": found is not None and found.converged,
            "message": message,
            **({} if found is None else {p: found.path[-1][p] for p in found.over}),
        }
        for choice, found, message in results
    ]
    best.solves = sum(found.solves for found in done)
    best.initial = setting
    return best


class Sensitivities(NamedTuple):
    """How the objective reacts around a setting.

    `elasticities`: d log|objective| / d log(field) of every continuous field (d log / d field where the field is 0).
    `hessian` (n, n): second derivatives of the objective in the coordinates of the descent, log(field) or the logit of
    a share, of the fields `over`; `curvatures` its eigenvalues, ascending, and `directions` (n, n) its eigenvectors in
    columns: a flat direction is a combination of inputs that does not matter.
    """

    over: tuple[str, ...]
    elasticities: dict[str, float]
    hessian: np.ndarray
    curvatures: np.ndarray
    directions: np.ndarray

    def summary(self) -> dict[str, Any]:
        """Plain numbers for JSON."""
        return {
            "elasticities": self.elasticities,
            "over": list(self.over),
            "hessian": self.hessian.tolist(),
            "curvatures": self.curvatures.tolist(),
        }


def sensitivities(
    setting: Setting, over: Sequence[str] = ("pretraining.lam", "finetuning.lam"), of: str = "test_error"
) -> Sensitivities:
    """Elasticities of an objective and its Hessian: central differences (steps of 0.01) of exact gradients.

    2 n + 1 solves for n fields. Raises `SolveError` where one of them fails.
    """
    require_float64()
    objective, over = check_objective(of), tuple(dict.fromkeys(over))
    with tqdm(disable=True) as bar:
        problem = _Problem(setting, over, objective, bar)
        center = problem.at(problem.start)
        h, steps = 0.01, np.eye(len(over))
        pairs = [(problem.at(center.u + h * e), problem.at(center.u - h * e)) for e in steps]
    if not all(trial.good for trial in (center, *(t for pair in pairs for t in pair))):
        predict(setting)
        raise SolveError("sensitivities", Code.nonfinite, f"objective {of}")
    hessian = np.array([(up.slope - down.slope) / (2 * h) for up, down in pairs]).reshape(len(over), len(over))
    hessian = (hessian + hessian.T) / 2
    curvatures, directions = np.linalg.eigh(hessian) if over else (np.zeros(0), np.zeros((0, 0)))
    elasticities = {}
    for path, slope in center.slopes.items():
        x = float(get(setting, path))
        elasticities[path] = slope * (x if x != 0 else 1.0) / center.value
    return Sensitivities(over, elasticities, hessian, curvatures, directions)
