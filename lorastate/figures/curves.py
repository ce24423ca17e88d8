"""Lines of the theory: predictions along one field, drawn with their error bands, limits and training."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from ..bayes.limits import bayes_optimal
from ..errors import Code
from ..predictions import axis_label, stage_and_name
from ..runtime.cores import together
from ..setting.files import setting_to_dict
from ..setting.numerics import Numerics
from ..setting.paths import replace
from ..setting.stages import Setting
from ..simulation.simulate import simulate
from ..solution.solution import predict
from .drawing import BAYES, MINIMUM, SYMMETRIC, Training, draw_square, finite, legend_below, save

#: Numerics of a published figure: a quadrature error of E' of a few thousandths, drawn as a band. (Thinning makes it a
#: quarter larger at most, and a smooth point three times faster.)
NUMERICS = Numerics(nodes=8192, finetuning_nodes=16384, replicas=8, thinning=4)
#: Points of a line that have the replica-symmetric values too, where symmetry is broken: they are smooth.
_SYMMETRIC_POINTS = 12
#: Predictions that a solution without symmetry breaking has as well.
_OF_SYMMETRIC = ("test_error", "overlap")
#: Predictions of fine-tuning that do not depend on its solution.
_OF_MAP = ("test_error_frozen", "forgetting_error_frozen", "effective_noise", "recalibration")


def scan(setting: Setting, path: str, values, names, bar=None, symmetric: bool = False) -> list[dict[str, Any]]:
    """Predictions `names` (of fine-tuning, or "pretraining.NAME") along one field: one row a point, None where a solve
    failed.

    `broken` says whether symmetry is, `code` how the solve ended. With `symmetric`, every second point that is broken,
    on a fine grid fewer, has the replica-symmetric values too, as `Solution.rs`: they cost a solve of their own.
    """
    every = max(2, len(values) // _SYMMETRIC_POINTS)

    def at(item):
        place, x = item
        row: dict[str, Any] = {path: float(x)}
        solution = predict(replace(setting, path, np.asarray(x).item()), throw=False)
        codes = {stage: solution.code(stage) for stage in ("pretraining", "finetuning")}
        bad = [f"{stage}: {code.name}" for stage, code in codes.items() if code is not Code.ok]
        row |= {"code": bad[0] if bad else "ok", "broken": None if bad else bool(solution.finetuning["broken"])}
        for name in names:
            # What pre-training alone decides is known even where fine-tuning is not solved.
            stage, key = stage_and_name(name)
            good = not bad or ((stage == "pretraining" or name in _OF_MAP) and codes["pretraining"] is Code.ok)
            row[name] = finite(getattr(solution, stage)[key]) if good else None
            # Of an update that is zero there may be no error.
            row[f"{name}_stderr"] = None if row[name] is None else finite(solution.stderr(stage, key))
        if symmetric and row["broken"] and place % every == 0:
            row["rs"] = solution.rs
        return row

    rows = []
    for row in together(at, enumerate(values)):
        rows.append(row)
        if bar is not None:
            bar.update()
    return rows


def column(rows, name: str) -> np.ndarray:
    return np.array([np.nan if row.get(name) is None else row[name] for row in rows], float)


def _continuation(rows, path: str, name: str) -> tuple[np.ndarray, np.ndarray]:
    """The replica-symmetric values where they are unstable, joined to the line where they are not; else NaN."""
    broken = [bool(row.get("broken")) for row in rows]
    x, y = [], []
    for row, one, *beside in zip(rows, broken, [False, *broken], [*broken[1:], False], strict=False):
        if one and "rs" in row:
            value = row["rs"][name]
        elif not one:
            value = row[name] if any(beside) else None
        else:
            continue  # one of those that it was not asked for
        x.append(row[path])
        y.append(np.nan if value is None else value)
    return np.array(x), np.array(y)


def draw_line(axes, rows, path, name, color, label=None, mark=True, style="-", top=1.0):
    """One line of the theory with its error band; returns where its minimum is, if that lies inside. The mark of the
    minimum ends at the height `top` of the panel."""
    x, y = column(rows, path), column(rows, name)
    e = np.nan_to_num(column(rows, f"{name}_stderr"))
    axes.plot(x, y, color=color, label=label, lw=1.8, ls=style)
    axes.fill_between(x, y - e, y + e, color=color, alpha=0.2, lw=0)
    if name in _OF_SYMMETRIC and any("rs" in row for row in rows):
        axes.plot(*_continuation(rows, path, name), color=color, lw=1.0, ls=":", label=SYMMETRIC)
    if np.all(np.isnan(y)) or not mark:
        return None
    k = int(np.nanargmin(y))
    inside = 0 < k < len(x) - 1
    if inside:
        axes.axvline(x[k], ymax=top, color="darkred", ls="--", lw=0.8, label=MINIMUM)
    return float(x[k]) if inside else None


@dataclass
class Curve:
    """One theory line: predictions along `path`; `marked` are the values that a simulation is made at, `symmetric`
    draws what replica symmetry would say where it is unstable."""

    label: str
    setting: Setting
    path: str
    grid: np.ndarray
    color: str
    marked: tuple[float, ...] = ()
    bayes: bool = False
    style: str = "-"
    symmetric: bool = False


def draw_curves(panels: dict[str, Any], curves: list[Curve], training: Training | None, progress: bool) -> list[dict]:
    """Draws every curve into the panel of every prediction (name -> axes); returns the data."""
    total = sum(len(c.grid) for c in curves)
    bar = tqdm(total=total, desc="theory", unit="solve", disable=not progress)
    data = []
    for c in curves:
        rows = scan(c.setting, c.path, c.grid, tuple(panels), bar, c.symmetric)
        entry: dict[str, Any] = {"label": c.label, "setting": setting_to_dict(c.setting), "path": c.path, "rows": rows}
        for name, axes in panels.items():
            draw_line(axes, rows, c.path, name, c.color, c.label, mark=False, style=c.style)
        if c.bayes:
            entry["bayes_optimal"] = _bayes(panels, c, progress)
        if training is not None and c.marked:
            entry["simulation"] = _mark(panels, c, training, progress)
        data.append(entry)
    bar.close()
    return data


def _bayes(panels, c: Curve, progress: bool) -> list[dict]:
    """Bayes-optimal limits along a curve, dashed: smooth enough for every second point of its grid."""
    grid = c.grid[::2]

    def at(x):
        limits = bayes_optimal(replace(c.setting, c.path, float(x)))
        return {c.path: float(x), **limits.finetuning, "test_error_stderr": limits.errors["finetuning"]["test_error"]}

    steps = together(at, grid)
    rows = list(tqdm(steps, total=len(grid), desc="Bayes-optimal", unit="solve", disable=not progress))
    for name, axes in panels.items():
        axes.plot(grid, [row[name] for row in rows], color=c.color, ls="--", lw=1.2, label=BAYES)
    return rows


def _mark(panels, c: Curve, training: Training, progress: bool) -> list[dict]:
    """Simulation markers along a curve."""
    found = []
    for x in tqdm(c.marked, desc="simulation", disable=not progress):
        here = replace(c.setting, c.path, x)
        result = simulate(here, **training.size(), memory=training.memory)
        row: dict[str, Any] = {c.path: float(x), **training.size()}
        for name, axes in panels.items():
            if numbers := draw_square(axes, x, result, name, c.color):
                row |= {name: numbers["mean"], f"{name}_stderr": numbers["stderr"]}
        found.append(row)
    return found


def finish(figure, panels: dict[str, Any], out, name: str, xlabel: str, title: str, data, log: bool = True):
    for key, axes in panels.items():
        axes.set(xlabel=xlabel, ylabel=axis_label(key))
        if log:
            axes.set_xscale("log")
    figure.suptitle(title, fontsize=9)
    legend_below(figure, panels.values())
    return save(figure, Path(out), name, data)
