"""The facts about a setting: what LoRA sees of pre-training, what to change, and how far it can be trusted."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from scipy.optimize import minimize_scalar
from tqdm import tqdm

from ..bayes.limits import bayes_optimal
from ..errors import SettingError, SolveError
from ..setting.files import setting_to_dict
from ..setting.paths import replace
from ..setting.stages import Setting
from ..solution.solution import Solution, predict
from . import thresholds as stability

_OBJECTIVES: dict[str, Callable[[Solution], Any]] = {
    "effective_noise": lambda s: s.effective_noise,
    "pretraining_test_error": lambda s: s.pretraining["test_error"],
    "test_error": lambda s: s.test_error,
    "overlap": lambda s: -np.nan_to_num(abs(s.overlap)),  # an update that is zero knows nothing of w*
}


def noise_decomposition(solution: Solution) -> dict[str, float]:
    """Delta_eff = (what Z_W cannot explain of Y0, label noise apart) + label noise + miscalibration.

    With yy, yz, zz the second moments of (Y0, Z_W): label noise delta'/2, of the share of inputs that do not keep
    that of pre-training; unexplained is the rest of yy - yz^2/zz (on fresh inputs Q0 - M^2/Q); miscalibration
    zz (b - yz/zz)^2, which the best b = yz/zz (M/Q) takes away.
    """
    fine, frozen = solution.setting.finetuning_resolved, stability.frozen_map(solution)
    moments, b = fine.moments(frozen), float(solution.finetuning["recalibration"])
    yy, yz, zz = (float(v) for v in moments)
    best = float(moments.best_scale) if zz > 1e-12 else 1.0
    # Reused labels keep their noise, part of which Z_W has learned: what is left of it is not told apart.
    label = float(fine.inputs.fresh_noise * fine.delta) / 2
    return {
        "label_noise": label,
        "unexplained": yy - best * yz - label,
        "miscalibration": zz * (b - best) ** 2,
        "total": float(moments.effective_noise(b)),
        "best_scale": best,
    }


def best_ridges(setting: Setting) -> dict[str, float | None]:
    """lam that minimises Delta_eff, E, E' and -o_w, all else as in the setting; None where it runs out of range.

    A grid over two and a half decades around the setting's lam, then Brent's method in the bracket.
    """
    memory: dict[float, Solution] = {}

    def at(log_lam: float) -> Solution:
        if log_lam not in memory:
            memory[log_lam] = predict(replace(setting, "pretraining.lam", float(np.exp(log_lam))), throw=False)
        return memory[log_lam]

    center = float(np.log(float(setting.pretraining.lam)))
    grid = center + np.linspace(-3.0, 3.0, 11)
    out: dict[str, float | None] = {}
    for name, value in _OBJECTIVES.items():

        def f(x, value=value):
            solution = at(float(x))
            height = float(value(solution)) if solution.ok else np.inf
            return height if np.isfinite(height) else np.inf

        heights = [f(x) for x in grid]
        k = int(np.argmin(heights))
        if not 0 < k < len(grid) - 1 or not heights[k] < min(heights[k - 1], heights[k + 1]):
            out[name] = None
            continue
        found: Any = minimize_scalar(f, bracket=tuple(grid[k - 1 : k + 2]), method="brent", options={"xtol": 1e-3})
        out[name] = float(np.exp(found.x))
    return out


def explain(setting: Setting, progress: bool = False) -> dict[str, Any]:
    """Everything that `lorastate explain` prints, as plain numbers; None where something does not exist here.

    Raises `SolveError` where the setting itself cannot be solved. Takes some fifty solves.
    """
    bar = tqdm(total=5, desc="explain", unit="part", disable=not progress)

    def begin(part: str) -> None:
        bar.update(1 if getattr(bar, "postfix", None) else 0)  # a bar that is not shown has none
        bar.set_postfix_str(part)

    begin("prediction")
    solution = predict(setting)
    pre, fine = setting.pretraining, setting.finetuning_resolved

    def attempt(f: Callable[[], Any]) -> Any:
        try:
            value = f()
        except (SettingError, SolveError):
            return None
        return value if not isinstance(value, float) or np.isfinite(value) else None

    begin("best lambda")
    ridges = best_ridges(setting)
    begin("best b")
    parts, predictions = noise_decomposition(solution), solution.summary()
    scales = {"effective_noise": parts["best_scale"]}
    scales["test_error"] = attempt(
        lambda: float(predict(replace(setting, "finetuning.recalibration", "error")).finetuning["recalibration"])
    )
    pair = stability.branches(solution)
    begin("Bayes-optimal limits")
    limits = attempt(lambda: bayes_optimal(setting))
    begin("thresholds")
    thresholds = {
        "interpolation_threshold": attempt(lambda: stability.interpolation_threshold(pre)),
        "weak_recovery_threshold": attempt(lambda: stability.weak_recovery_threshold(setting, solution)),
        "weak_recovery_threshold_bayes_optimal": attempt(lambda: stability.bayes_recovery_threshold(setting)),
    }
    bar.update()
    bar.close()
    return {
        "setting": setting_to_dict(setting),
        "predictions": predictions,
        "decomposition": parts,
        "best_lam": ridges,
        "best_scale": scales,
        "bayes_optimal": limits.summary() if limits else None,
        "stability": {
            "replicon": {s: predictions[s]["replicon"] for s in ("pretraining", "finetuning")},
            "symmetry": predictions["symmetry"],
            **thresholds,
            "branches": {"m": pair.m, "free_energy": pair.free_energy, "distinct": pair.distinct},
        },
        "alpha": {"pretraining": float(pre.alpha), "finetuning": float(fine.alpha)},
    }
