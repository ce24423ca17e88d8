"""Descent within budgets: quadratic programs in a trust region, then Newton steps on the conditions of stationarity."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
from scipy.optimize import minimize as scipy_minimize

from .budgets import Within
from .descent import End, Ending, Landscape, Trial


class _Lost(Exception):
    """A trial whose solve failed."""


def _tried(landscape: Landscape, trials: dict[bytes, Trial], u) -> Trial:
    """The trial at u, from those made before if it is among them."""
    name = np.asarray(u, float).tobytes()
    if name not in trials:
        trials[name] = landscape.at(np.array(u, float))
    if not trials[name].good:
        raise _Lost
    return trials[name]


def descend_within(
    landscape: Landscape, within: Within, now: Trial, tolerance: float, max_steps: int
) -> tuple[Trial, Ending]:
    """SLSQP in a box around the best point so far, then Newton steps on the conditions of stationarity.

    The first finds which budgets bind; the second ends with as many digits as the gradient has: SLSQP alone creeps.
    """
    reach, best = 2.0, now
    landscape.record(now, landscape.relative(now, within.rest(now.u, now.slope)))
    for _ in range(max_steps):
        begin, trials = best, {best.u.tobytes(): best}
        at = functools.partial(_tried, landscape, trials)
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
            best = _stationary(landscape, within, best, tolerance)
        norm = landscape.relative(best, within.rest(best.u, best.slope))
        landscape.record(best, norm)
        if norm < tolerance:
            free = norm == landscape.relative(best, np.linalg.norm(best.slope))
            return best, (landscape.boundary(best) if free else None) or Ending(End.small, {"tolerance": tolerance})
        far = int(np.argmax(np.abs(best.u - now.u)))
        if abs(best.u[far] - now.u[far]) > 6.5:
            return best, landscape.runs_off(best, far)
        if not near_edge and begin.value - best.value < 1e-9 * max(1.0, abs(best.value)):
            reach /= 3
        if reach < 1e-4:
            return best, Ending(End.no_step_within)
    return best, Ending(End.max_rounds, {"steps": max_steps})


def _stationary(landscape: Landscape, within: Within, now: Trial, tolerance: float) -> Trial:
    """Newton steps for d objective + sum mu d excess = 0 and excess = 0 on the budgets that bind, as long as they help.

    The Hessian of the objective comes from one difference of exact gradients per field, taken once.
    """
    n, h = len(now.u), 1e-4
    norm = within.rest(now.u, now.slope)
    if landscape.relative(now, norm) < tolerance:
        return now
    around = [landscape.at(now.u + h * e) for e in np.eye(n)]
    if not all(trial.good for trial in around):
        return now
    hessian = np.array([(trial.slope - now.slope) / h for trial in around])
    hessian = (hessian + hessian.T) / 2
    for _ in range(8):
        step = within.newton_step(now.u, now.slope, hessian)
        if step is None or np.max(np.abs(step)) > 0.5:
            return now
        # Budgets are curved in u: a step along them leaves them by its square.
        trial = landscape.at(within.nearest(now.u + step))
        rest = within.rest(trial.u, trial.slope)
        # A saddle or a maximum is stationary too: the objective must not rise.
        good = trial.good and within.met(trial.u) and trial.value <= now.value + 1e-9 * max(1.0, abs(now.value))
        if not good or not rest < norm:
            return now
        now, norm = trial, rest
        if landscape.relative(now, norm) < tolerance:
            break
    return now
