"""The mismatch regime: the ridge lam that is best for the test error is not the one that is best for the overlap.

On reused inputs the overlap o_w follows the reduced noise of training inputs while E' pays that of fresh ones. The
disagreement is  log(lam_o / lam_E),  lam_E = argmin E', lam_o = argmax o_w; by the implicit function theorem

    d log lam_E / d theta = - (d2 E' / d log lam d theta) / (d2 E' / d log lam^2)

where second derivatives are central differences of exact gradients along log lam.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from tqdm import tqdm

from ..errors import Code, SettingError, SolveError
from ..setting.fields import continuous_fields
from ..setting.paths import get, replace
from ..setting.stages import Setting
from ..solution.gradients import gradient
from .optimize import optimize

_LAM = "pretraining.lam"


@dataclass(frozen=True)
class Mismatch:
    """Where E' is least (`lam_error`) and where o_w is largest (`lam_overlap`), at the setting's other inputs.

    `disagreement` = log(lam_overlap / lam_error); `price` = E' at `lam_overlap` less the least E'; `slopes` =
    d disagreement / d log of each field of `over`.
    """

    setting: Setting
    lam_error: float
    lam_overlap: float
    disagreement: float
    price: float
    slopes: dict[str, float]
    path: list[dict[str, float]] = field(default_factory=list)


def _best(setting: Setting, objective: str, over: Sequence[str]) -> tuple[float, dict[str, float]]:
    """lam at the optimum and d log lam / d log field for the fields of `over`."""
    found = optimize(setting, over=(_LAM,), minimize=objective, tolerance=1e-6)
    if not found.converged:
        raise SolveError("mismatch", Code.stalled, f"no best lam for {objective}: {found.message}")
    log_lam, h = math.log(float(found.setting.pretraining.lam)), 0.02
    paths = (_LAM, *over)

    def slopes(x):
        here = replace(found.setting, _LAM, math.exp(x))
        by = gradient(here, of=objective)[1]
        return np.array([by[p] * float(get(here, p)) for p in paths])

    # An optimum may be so flat that a small gradient says little about its place: Newton's method closes in.
    for _ in range(8):
        up, down = slopes(log_lam + h), slopes(log_lam - h)
        # d (d objective / d log field) / d log lam; its first entry is the curvature.
        mixed = (up - down) / (2 * h)
        if mixed[0] * (1 if objective == "test_error" else -1) <= 0:
            raise SolveError("mismatch", Code.stalled, f"no best lam for {objective}: the descent ended off a minimum")
        step = -float(slopes(log_lam)[0] / mixed[0])
        log_lam += min(max(step, -0.5), 0.5)
        if abs(step) < 1e-4:
            return math.exp(log_lam), {p: -float(m / mixed[0]) for p, m in zip(over, mixed[1:], strict=True)}
    raise SolveError("mismatch", Code.max_steps, f"the best lam for {objective} is too flat to be placed")


def measure_mismatch(setting: Setting, over: Sequence[str] = ()) -> Mismatch:
    """The two best lam of a setting, and how their disagreement changes with the fields of `over`.

    Raises `SettingError` for unknown fields and `SolveError` where one of the two has no interior optimum.
    """
    known = continuous_fields(setting)
    for path in over:
        if path not in known or path == _LAM:
            allowed = ", ".join(p for p in known if p != _LAM)
            raise SettingError(f"over = {path!r} is not a continuous field beside {_LAM}; allowed: {allowed}")
    lam_error, by_error = _best(setting, "test_error", over)
    lam_overlap, by_overlap = _best(setting, "overlap", over)
    errors = [gradient(replace(setting, _LAM, lam))[0] for lam in (lam_overlap, lam_error)]
    slopes = {path: by_overlap[path] - by_error[path] for path in over}
    return Mismatch(setting, lam_error, lam_overlap, math.log(lam_overlap / lam_error), errors[0] - errors[1], slopes)


def find_mismatch(
    setting: Setting, over: Sequence[str] = ("pretraining.delta", "finetuning.alpha"), steps: int = 8,
    reach: float = 1.5, progress: bool = False,
) -> Mismatch:  # fmt: skip
    """Goes by gradient ascent to where the two best lam disagree most, within a factor e^reach of the start.

    Each step follows d |disagreement| / d log field, at most 0.5 in any field, halved while it does not help. Returns
    the best `Mismatch`, its `path` with every accepted one.
    """
    start = np.log([float(get(setting, p)) for p in over])
    current = measure_mismatch(setting, over)
    path = [_row(current, over)]
    for _ in tqdm(range(steps), desc="ascent", disable=not progress):
        u = np.log([float(get(current.setting, p)) for p in over])
        direction = np.sign(current.disagreement) * np.array([current.slopes[p] for p in over])
        if np.max(np.abs(direction)) < 1e-3:
            break
        length = 0.5 / np.max(np.abs(direction))
        better = None
        for _ in range(4):
            trial = np.clip(u + length * direction, start - reach, start + reach)
            here = setting
            for p, x in zip(over, trial, strict=True):
                here = replace(here, p, float(np.exp(x)))
            try:
                found = measure_mismatch(here, over)
            except SolveError:
                found = None
            if found is not None and abs(found.disagreement) > abs(current.disagreement) + 1e-6:
                better = found
                break
            length /= 2
        if better is None:
            break
        current = better
        path.append(_row(current, over))
    return Mismatch(**{**vars(current), "path": path})


def _row(found: Mismatch, over: Sequence[str]) -> dict[str, float]:
    fields = {p: float(get(found.setting, p)) for p in over}
    return {**fields, "lam_error": found.lam_error, "lam_overlap": found.lam_overlap,
            "disagreement": found.disagreement, "price": found.price}  # fmt: skip
