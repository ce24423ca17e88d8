"""One readable page about a setting, from its facts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..solution.stage import FEW


def double_wells(summary: Mapping[str, Any]) -> float | None:
    """The share of pre-training's nodes that have two wells, where they are more than a few: then its minima are many,
    which its theory takes for one. Else None."""
    share = summary["pretraining"].get("double_well_share")
    return share if share is not None and share > FEW else None


def page(facts: dict[str, Any]) -> str:
    """`lorastate.diagnosis.explain.explain` as text."""
    return "\n".join([*_channel(facts), "", *_optima(facts), "", *_limits(facts), "", *_stability(facts)])


def _show(x: float | None) -> str:
    return "out of range" if x is None else f"{x:.4g}"


def _channel(facts: dict[str, Any]) -> list[str]:
    f, d = facts["predictions"]["finetuning"], facts["decomposition"]
    inputs = facts["setting"]["finetuning"]["inputs"]
    return [
        "What LoRA sees of pre-training",
        f"  Delta_eff = {_show(d['total'])} on {inputs} inputs, b = {f['recalibration']:g}",
        f"    label noise      {_show(d['label_noise'])}",
        f"    not explained    {_show(d['unexplained'])}",
        f"    miscalibration   {_show(d['miscalibration'])}   (none at b = {_show(d['best_scale'])})",
        f"  E' = {_show(f['test_error'])} (without the update {_show(f['test_error_frozen'])})",
        "  " + _known(f["overlap"]),
    ]


#: What a ridge is best for, by the name that `explain` gives it.
_TITLES = {
    "effective_noise": "Delta_eff",
    "pretraining_test_error": "E",
    "test_error": "E'",
    "overlap": "o_w (largest)",
}


def _optima(facts: dict[str, Any]) -> list[str]:
    """The best lambda and the best b."""
    ridges, scales = facts["best_lam"], facts["best_scale"]
    recovered = ridges["overlap"] is not None or _recovered(facts["predictions"]["finetuning"]["overlap"])
    return [
        f"Which lambda is best, all else as it is (now {facts['setting']['pretraining']['lam']:g})",
        *(
            f"  for {title:<14} lambda = {_show(ridges[name])}"
            for name, title in _TITLES.items()
            if recovered or name != "overlap"
        ),
        "  " + _verdict(ridges),
        "",
        "Which factor b on the frozen map is best",
        f"  for Delta_eff  b = {_show(scales['effective_noise'])}",
        f"  for E'         b = {_show(scales['test_error'])}",
    ]


def _limits(facts: dict[str, Any]) -> list[str]:
    title, limits = "How far from the best possible (fresh inputs)", facts["bayes_optimal"]
    if limits is None:
        return [title, "  not known for this activation, or a teacher of this rank"]
    p, f = (facts["predictions"][stage] for stage in ("pretraining", "finetuning"))
    return [
        title,
        f"  E   {_show(p['test_error'])}, Bayes-optimal {_show(limits['pretraining']['test_error'])}",
        f"  E'  {_show(f['test_error'])}, Bayes-optimal {_show(limits['finetuning']['test_error'])}",
    ]


def _stability(facts: dict[str, Any]) -> list[str]:
    s, alpha, share = facts["stability"], facts["alpha"], double_wells(facts["predictions"])
    return [
        "Stability and thresholds",
        f"  replicon of pre-training (stable below 1): {_show(s['replicon']['pretraining'])}"
        + (f", but {share:.2g} of its nodes have two wells: its minima are many, taken for one here" if share else ""),
        *_phase(facts["predictions"]),
        f"  pre-training interpolates (lambda -> 0) below alpha = {_show(s['interpolation_threshold'])}; "
        f"here {alpha['pretraining']:g}",
        f"  m = 0 is unstable from alpha' = {_show(s['weak_recovery_threshold'])} "
        f"(Bayes-optimal {_show(s['weak_recovery_threshold_bayes_optimal'])}); here {alpha['finetuning']:g}",
        "  " + _branches(s["branches"]),
    ]


def _recovered(overlap: float | None) -> bool:
    return abs(overlap or 0.0) > 1e-6


def _known(overlap: float | None) -> str:
    if _recovered(overlap):
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
