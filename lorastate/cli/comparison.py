"""Theory beside training: what was measured, what was predicted, and the gap in units of the error bars."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from .exit_codes import FAILED, INTERRUPTED
from .output import warn
from .tables import TITLE

if TYPE_CHECKING:
    from ..setting.stages import Setting
    from ..simulation.channel_result import ChannelSimulation
    from ..simulation.result import Simulation


def theory_of(setting: Setting) -> dict[str, Any]:
    """Predictions of the stages that could be solved, as `Solution.summary` has them; a warning for one that failed.

    Training does not depend on them.
    """
    from ..errors import Code, SolveError, succeeded
    from ..solution import solution

    try:
        found = solution.predict(setting, throw=False)
    except SolveError as error:  # of a search that predicts at every step
        warn(f"no theory to compare with: {error}")
        empty = {stage: {} for stage in TITLE}
        return {
            **empty,
            "quadrature_error": {**empty},
            "status": {stage: {"code": error.code.name} for stage in TITLE},
        }
    theory = found.summary()
    for stage, title in TITLE.items():
        code = found.code(stage)
        if not succeeded(code):
            theory[stage], theory["quadrature_error"][stage] = {}, {}
            if code is not Code.upstream:
                warn(f"{title}: no theory to compare with: {code.name} ({code.message})")
    return theory


def _trained(setting: Setting, runs: int, options: Mapping[str, Any]) -> tuple[Any, int]:
    """What `simulate` found, and the exit code: after Ctrl-C the runs that are complete are what there is."""
    from ..simulation.result import SimulationInterrupted
    from ..simulation.simulate import simulate

    try:
        return simulate(setting, runs=runs, progress=True, **options), 0
    except SimulationInterrupted as stop:
        kept = f"kept in {options['out']}: the same command goes on" if "out" in options else "kept"
        warn(f"interrupted: {len(stop.finished.seeds)} of {runs} runs are complete and {kept}")
        return stop.finished, INTERRUPTED


def train_both(
    setting: Setting, theory: Mapping[str, Any], dimension: int, runs: int, seed: int, **options: Any
) -> tuple[Simulation, dict[str, Any], int]:
    """The runs, every quantity beside its prediction, and the exit code; runs that failed are left out."""
    found, status = _trained(setting, runs, {"dimension": dimension, "seed": seed, **options})
    runs = len(found.seeds)
    measured = found.summary(only_converged=True)
    compared: dict[str, Any] = {stage: _compare_all(measured[stage], theory, stage) for stage in TITLE}
    good = {stage: int(found.converged(stage).sum()) for stage in TITLE}
    compared |= {"dimension": dimension, "runs": runs, "seed": seed, "converged": good, **_theory_codes(theory)}
    failed = [_say_if_failed(stage, runs, found.codes[stage]) for stage in TITLE]
    return found, compared, status or (FAILED if any(failed) else 0)


def train_alone(
    setting: Setting, theory: Mapping[str, Any], dimension: int, runs: int, seed: int, **options: Any
) -> tuple[ChannelSimulation, dict[str, Any], int]:
    """`_simulate` of fine-tuning alone: every search beside the prediction."""
    given = {"stage": "finetuning", "dimension": dimension, "seed": seed, **options}
    found, status = _trained(setting, runs, given)
    runs = len(found.seeds)
    measured = found.summary(only_converged=True)
    compared: dict[str, Any] = {"stage": "finetuning", "dimension": dimension, "runs": runs, "seed": seed}
    compared |= {"starts": found.starts, "moves": found.moves, **_theory_codes(theory)}
    compared["searches"] = {search: _compare_all(rows, theory, "finetuning") for search, rows in measured.items()}
    compared["per_run"] = {search: dict(rows) for search, rows in found.searches.items()}
    compared["random_starts"] = {"train_loss": found.random_loss, "overlap": found.random_overlap}
    compared |= {"worse_starts": found.worse_starts, "verdict": found.verdict}
    compared["converged"] = {search: int(found.converged(search).sum()) for search in measured}
    failed = [_say_if_failed(f"{search} search", runs, found.codes[search]) for search in measured]
    return found, compared, status or (FAILED if any(failed) else 0)


def _theory_codes(theory: Mapping[str, Any]) -> dict[str, Any]:
    status = theory.get("status", {})
    return {"theory_codes": {stage: status[stage]["code"] for stage in TITLE if stage in status}}


def _say_if_failed(what: str, runs: int, codes: Sequence[Any]) -> bool:
    bad = [code for code in codes if code != 0]
    if bad:
        left_out = f"{len(bad)} of {runs} runs failed and are left out"
        warn(f"simulation, {what}: {left_out} ({bad[0].name}: {bad[0].message})")
    return bool(bad)


def _compare_all(measured: Mapping[str, Any], theory: Mapping[str, Any], stage: str) -> dict[str, Any]:
    errors = theory["quadrature_error"].get(stage, {})
    return {name: _compare(pair, theory[stage].get(name), errors.get(name)) for name, pair in measured.items()}


def _compare(measured: Mapping[str, Any], theory: float | None, quadrature: float | None) -> dict[str, Any]:
    mean, stderr = measured["mean"], measured["stderr"]
    gap = None
    if mean is not None and stderr is not None and theory is not None:
        bar = math.hypot(stderr, quadrature or 0.0)
        gap = (mean - theory) / bar if bar > 0 else None
    return {"mean": mean, "stderr": stderr, "theory": theory, "quadrature_error": quadrature, "gap": gap}
