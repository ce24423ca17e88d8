"""One readable page about a setting: what LoRA sees of pre-training, what to change, and how far it can be trusted."""

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
from ..solution.search import FEW
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


def double_wells(summary: dict[str, Any]) -> float | None:
    """The share of pre-training's nodes that have two wells, where they are more than a few: then its minima are many,
    which its theory takes for one. Else None."""
    share = summary["pretraining"]["double_well_share"]
    return share if share is not None and share > FEW else None


def page(facts: dict[str, Any]) -> str:
    """`explain` as text."""
    f, d, r, s = facts["predictions"]["finetuning"], facts["decomposition"], facts["best_lam"], facts["stability"]

    def show(x, digits=4):
        return "out of range" if x is None else f"{x:.{digits}g}"

    recovered = r["overlap"] is not None or abs(f["overlap"] or 0.0) > 1e-6
    lam, inputs = facts["setting"]["pretraining"]["lam"], facts["setting"]["finetuning"]["inputs"]
    names = {
        "effective_noise": "Delta_eff",
        "pretraining_test_error": "E",
        "test_error": "E'",
        "overlap": "o_w (largest)",
    }
    lines = [
        "What LoRA sees of pre-training",
        f"  Delta_eff = {show(d['total'])} on {inputs} inputs, b = {f['recalibration']:g}",
        f"    label noise      {show(d['label_noise'])}",
        f"    not explained    {show(d['unexplained'])}",
        f"    miscalibration   {show(d['miscalibration'])}   (none at b = {show(d['best_scale'])})",
        f"  E' = {show(f['test_error'])} (without the update {show(f['test_error_frozen'])})",
        "  " + _known(f["overlap"]),
        "",
        f"Which lambda is best, all else as it is (now {lam:g})",
        *(
            f"  for {title:<14} lambda = {show(r[name])}"
            for name, title in names.items()
            if recovered or name != "overlap"
        ),
        "  " + _verdict(r),
        "",
        "Which factor b on the frozen map is best",
        f"  for Delta_eff  b = {show(facts['best_scale']['effective_noise'])}",
        f"  for E'         b = {show(facts['best_scale']['test_error'])}",
        "",
        "How far from the best possible (fresh inputs)",
    ]
    limits = facts["bayes_optimal"]
    if limits is None:
        lines.append("  not known for this activation, or a teacher of this rank")
    else:
        p = facts["predictions"]["pretraining"]
        lines += [
            f"  E   {show(p['test_error'])}, Bayes-optimal {show(limits['pretraining']['test_error'])}",
            f"  E'  {show(f['test_error'])}, Bayes-optimal {show(limits['finetuning']['test_error'])}",
        ]
    alpha, share = facts["alpha"], double_wells(facts["predictions"])
    lines += [
        "",
        "Stability and thresholds",
        f"  replicon of pre-training (stable below 1): {show(s['replicon']['pretraining'])}"
        + (f", but {share:.2g} of its nodes have two wells: its minima are many, taken for one here" if share else ""),
        *_phase(facts["predictions"]),
        f"  pre-training interpolates (lambda -> 0) below alpha = {show(s['interpolation_threshold'])}; "
        f"here {alpha['pretraining']:g}",
        f"  m = 0 is unstable from alpha' = {show(s['weak_recovery_threshold'])} "
        f"(Bayes-optimal {show(s['weak_recovery_threshold_bayes_optimal'])}); here {alpha['finetuning']:g}",
        "  " + _branches(s["branches"]),
    ]
    return "\n".join(lines)


def _known(overlap: float | None) -> str:
    if abs(overlap or 0.0) > 1e-6:
        return f"o_w = {overlap:.4g}"
    return "o_w = 0: below recovery, nothing of w* is learned; raise alpha' or lower lambda'"


def _verdict(ridges: dict[str, float | None]) -> str:
    known = [x for x in ridges.values() if x is not None]
    if len(known) < 2:
        return "No two of them have an optimum within reach."
    spread = max(known) / min(known)
    if spread < 1.1:
        return "They agree within 10 %: minimising Delta_eff is the right prescription here."
    return f"They differ by up to a factor {spread:.2g}: minimising Delta_eff is not all that counts here."


def _phase(predictions: dict[str, Any]) -> list[str]:
    """What the phase of fine-tuning means for whoever trains."""
    f = predictions["finetuning"]
    if predictions["symmetry"] == "replica symmetric":
        return [f"  fine-tuning is replica symmetric (replicon {f['replicon']:.3g}): training finds one minimum"]
    return [
        f"  fine-tuning is a glass (one-step broken): many minima, whose overlap is p/q = {f['p'] / f['q']:.3g};",
        "  the numbers are those of the lowest. One run of training ends in some minimum: try several starts, and",
        "  compare their losses (`lorastate simulate --stage finetuning` shows what random starts find)",
    ]


def _branches(branches: dict[str, Any]) -> str:
    if not branches["distinct"]:
        return "one branch: both starts lead to the same solution"
    (a, b), (e, g) = branches["m"], branches["free_energy"]
    return f"two branches: m = {a:.4g} (free energy {e:.6g}) and m = {b:.4g} ({g:.6g}); the lower one counts"
