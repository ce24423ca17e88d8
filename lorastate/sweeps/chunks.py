"""Chunks: settings of one kind that go through the same programs together, on the devices that were chosen."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import jax
from jax.sharding import Mesh

from ..errors import SettingError, SolveError, succeeded
from ..setting.paths import replace
from ..setting.stages import Setting
from ..solution import gradients
from ..solution.lanes import Lanes
from ..solution.problem import Problem
from ..solution.solve import Solves, answered, solve

#: Lanes that a device takes at once: a CPU runs them one by one, and few of them share out the work evenly.
_LANES = {"cpu": 4}
_LANES_ELSEWHERE = 32
#: How the names of derivatives begin in a row, and the stages that the other names begin with.
GRADIENT = "gradient."
STAGES = ("pretraining", "finetuning")


def chosen_devices(devices: Any) -> list[Any]:
    """JAX devices from a number, "all", a list of them, or None for the default one."""
    config: Any = jax.config
    default = config.jax_default_device
    local = jax.local_devices(backend=getattr(default, "platform", default))
    if devices is None:
        return [default if isinstance(default, jax.Device) else local[0]]
    if devices == "all":
        return local
    if isinstance(devices, int) and not isinstance(devices, bool):
        if not 1 <= devices <= len(local):
            raise SettingError(f"devices = {devices} is out of range; allowed: 1 to {len(local)}, or 'all'")
        return local[:devices]
    if isinstance(devices, Sequence) and not isinstance(devices, str) and devices:
        return list(devices)
    raise SettingError(f"devices = {devices!r} is unknown; allowed: a number, 'all', or a list of JAX devices")


def lanes_on(devices: Sequence[Any], chunk: int | None, points: int) -> int:
    """Settings that go through a program at once, `chunk` or the usual number on each device; fewer where there are not
    so many `points` of one kind, whether or not some are done."""
    usual = chunk or _LANES.get(devices[0].platform, _LANES_ELSEWHERE)
    return len(devices) * min(usual, -(-points // len(devices)))


def kind(setting: Setting) -> Any:
    """What settings that go through the same program have in common: all that is static."""
    return jax.tree_util.tree_structure((setting.pretraining, setting.finetuning_resolved, setting.numerics))


def run(
    settings: Sequence[Setting], objective: str | None, mesh: Mesh, width: int
) -> Iterator[dict[int, dict[str, float]]]:
    """Rows of a chunk of settings of one kind by their numbers in it, as soon as they are known; the chunk is padded to
    the `width` that the programs were compiled for."""
    plain, lost = [], {}
    for k, s in enumerate(settings):
        try:
            plain.append(gradients.with_best_scale(s) if gradients.searches_scale(s) else s)
        except SolveError as error:  # what does not depend on b is there all the same
            plain.append(replace(s, "finetuning.recalibration", 1.0))
            lost[k] = error.code
    problems = [Problem.of(s) for s in plain]
    then = answered(problems[0]), *([] if objective is None else [gradients.sloped(objective)])
    for where, found in solve(Lanes.of(problems, mesh, width), *then):
        rows = _rows(plain, where, found, objective)
        for k, row in rows.items():
            if gradients.searches_scale(settings[k]):
                row["finetuning.recalibration_stderr"] = math.nan  # of the search: not known
            if k in lost and succeeded(int(row["pretraining.code"])):
                row |= dict.fromkeys((name for name in row if not name.startswith("pretraining.")), math.nan)
                row["finetuning.code"] = float(lost[k])
        yield rows


def _rows(
    settings: Sequence[Setting], where: dict[int, int], found: Solves, objective: str | None
) -> dict[int, dict[str, float]]:
    """Every prediction of the settings that were `found`, {number: place in its arrays}, with its error bar and status,
    and the slopes of the objective: NaN where a stage was not solved."""
    answers = jax.device_get(found.answer())
    slopes = None if objective is None else jax.device_get(gradients.slopes_at(found, objective)[1])
    rows = {}
    for k, place in where.items():
        answer, slope = jax.tree_util.tree_map(lambda a, place=place: a[place], (answers, slopes))
        row = columns_of(answer.values, answer.errors, answer.status)
        if objective is not None:
            solved = all(succeeded(int(row[f"{stage}.code"])) for stage in STAGES)
            sign = (-1.0 if objective == "overlap" else 1.0) if solved else math.nan
            row |= {GRADIENT + p: sign * s for p, s in gradients.total_slopes(settings[k], slope).items()}
        rows[k] = row
    return rows


def columns_of(values, errors, status) -> dict[str, float]:
    """Every prediction of both stages with its error bar, and the status, by column: NaN of a stage that failed."""
    row = {}
    for stage in STAGES:
        solved = succeeded(int(status[stage]["code"]))
        for name, value in values[stage].items():
            pair = (value, errors[stage][name]) if solved else (math.nan, math.nan)
            row[f"{stage}.{name}"], row[f"{stage}.{name}_stderr"] = map(float, pair)
        row |= {f"{stage}.{k}": float(status[stage][k]) for k in ("code", "residual", "rate", "steps")}
    return row
