"""Pictures of a design: the path of a descent, what the optimum is sensitive to, and swept predictions."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import numpy as np

from ..predictions import axis_label
from ..setting.files import setting_to_dict
from ..setting.paths import get
from .curves import draw_line, scan
from .drawing import save, save_pictures, side_by_side


def optimization(optimum, out: Path | str, simulation=None, points: int = 25) -> list[Path]:
    """Objective along the first descended field (others at the optimum), the path of the descent, the minimum."""
    path, name = optimum.over[0], optimum.minimize
    center = float(get(optimum.setting, path))
    visited = [p[path] for p in optimum.path]
    low, high = min([*visited, center / 8]), max([*visited, center * 8])
    rows = scan(optimum.setting, path, np.geomspace(low, high, points), (name,))
    figure, axes = side_by_side(1, 6.2, 4.2)
    others = ", ".join(f"{p} = {float(get(optimum.setting, p)):.4g}" for p in optimum.over[1:])
    draw_line(axes, rows, path, name, "C0", "theory" + (f" at {others}" if others else ""))
    sign = -1.0 if name == "overlap" else 1.0
    axes.plot(
        visited, [sign * p["value"] for p in optimum.path], "o-", color="C1", ms=4, lw=0.9, label="path of the descent"
    )
    axes.plot(center, sign * optimum.path[-1]["value"], "*", color="darkred", ms=13, label=f"optimum, {center:.4g}")
    data: dict[str, Any] = {
        "curve": rows,
        "path": optimum.path,
        "setting": setting_to_dict(optimum.setting),
        "converged": optimum.converged,
    }
    if simulation is not None and name in ("test_error", "overlap"):
        mean, err = simulation.mean("finetuning", name), simulation.stderr("finetuning", name)
        label = f"simulation, D = {simulation.dimension}"
        axes.errorbar(center, mean, err, fmt="s", mfc="white", color="k", capsize=3, label=label)
        data["simulation"] = {"mean": mean, "stderr": err, "dimension": simulation.dimension}
        if not math.isfinite(err):
            data["simulation"]["stderr"] = None
    axes.set(xscale="log", xlabel=path, ylabel=axis_label(name))
    axes.legend(fontsize=8)
    return save(figure, Path(out), "optimization", data)


def sensitivities(found, optimum, out: Path | str) -> list[Path]:
    """Elasticities of the objective at the optimum, largest first: what a change of one per cent does, in per cent."""
    ordered = sorted(found.elasticities.items(), key=lambda item: abs(item[1]))
    figure, axes = side_by_side(1, 6.2, 0.9 + 0.3 * len(ordered))
    values = [value for _, value in ordered]
    axes.barh(range(len(ordered)), values, color=["C3" if value > 0 else "C0" for value in values])
    axes.set_yticks(
        range(len(ordered)), [path + (" *" if path in found.over else "") for path, _ in ordered], fontsize=8
    )
    axes.axvline(0, color="k", lw=0.7)
    axes.set(xlabel=f"elasticity of {axis_label(optimum.minimize)} (* descended)")
    axes.margins(y=0.02)
    data = {"sensitivities": found.summary(), "setting": setting_to_dict(optimum.setting)}
    return save(figure, Path(out), "sensitivities", data)


def sweep(dataset, out: Path | str, name: str = "finetuning.test_error") -> list[Path]:
    """A swept prediction over one axis (with error bars), or two: lines where one has few values, else a map.

    Axes with a single value are left out; with three or more others there is no picture and no file. Of a curve of
    optima: the fields there as well (see `optima`).
    """
    if "optimum.converged" in dataset:
        return optima(dataset, out, name)
    values, (stage, key) = dataset[name].squeeze(), name.split(".", 1)
    if values.ndim not in (1, 2) or not np.any(np.isfinite(values)):
        return []
    errors = dataset[f"{name}_stderr"].squeeze()
    axes_values = {str(d): values[d].values for d in values.dims}
    numeric = [d for d, v in axes_values.items() if v.dtype.kind in "iuf"]
    few = min(axes_values, key=lambda d: (d in numeric, len(axes_values[d]))) if values.ndim == 2 else ""
    figure, axes = side_by_side(1, 5.6, 4)
    if values.ndim == 2 and len(numeric) == 2 and len(axes_values[few]) > 6:
        y, x = axes_values
        mesh = axes.pcolormesh(axes_values[x], axes_values[y], values.values, shading="nearest", cmap="viridis")
        figure.colorbar(mesh, label=axis_label(key, stage))
        k, j = np.unravel_index(np.nanargmin(values.values), values.shape)
        axes.plot(axes_values[x][j], axes_values[y][k], "*", ms=13, color="w", mec="k", label="lowest")
        axes.set(xlabel=x, ylabel=y)
        scaled = {"x": axes_values[x], "y": axes_values[y]}
    else:
        x = next(d for d in axes_values if d != few)
        grid = axes_values[x] if x in numeric else np.arange(len(axes_values[x]))
        for k in range(len(axes_values[few]) if few else 1):
            line, bar = (values.isel({few: k}), errors.isel({few: k})) if few else (values, errors)
            shown = axes_values[few][k] if few else None
            label = (f"{few} = {shown:.4g}" if few in numeric else f"{few} = {shown}") if few else None
            axes.errorbar(grid, line.values, bar.values, fmt="o-", ms=3, lw=1.4, capsize=2, label=label)
        if x not in numeric:
            axes.set_xticks(grid, axes_values[x])
        axes.set(xlabel=x, ylabel=axis_label(key, stage))
        scaled = {"x": grid if x in numeric else np.zeros(0)}
    for which, v in scaled.items():
        if len(v) > 2 and np.all(v > 0) and np.allclose(np.diff(np.log(v)), np.log(v[1] / v[0]), rtol=1e-6):
            axes.set(**{f"{which}scale": "log"})
    if axes.get_legend_handles_labels()[1]:
        axes.legend(fontsize=8)
    return save_pictures(figure, Path(out), "sweep")


def optima(dataset, out: Path | str, name: str = "finetuning.test_error") -> list[Path]:
    """A curve of optima: a prediction there and every field that was descended, over the last axis; a line for every
    value of the others. Over an axis "numerics.seed" the mean, with its standard error. No picture of a grid without
    numbers on its last axis."""
    found = dataset.where(dataset["optimum.converged"] == 1)
    *others, x = [d for d in found.dims if d != "numerics.seed"]
    if found[x].dtype.kind not in "iuf":
        return []
    names = [name, *(v for v in found if v.startswith("optimum.") and v.count(".") > 1)]
    figure, panels = side_by_side(len(names), 4.2 * len(names), 3.8)
    for axes, variable in zip(panels, names, strict=True):
        values = found[variable]
        bars = found[f"{name}_stderr"] if variable == name else values * 0
        if "numerics.seed" in values.dims:
            bars = values.std("numerics.seed", ddof=1) / math.sqrt(values.sizes["numerics.seed"])
            values = values.mean("numerics.seed")
        for place in itertools.product(*(range(values.sizes[d]) for d in others)):
            here = dict(zip(others, place, strict=True))
            label = ", ".join(f"{d} = {found[d].values[k]}" for d, k in here.items())
            line, bar = values.isel(here), bars.isel(here)
            axes.errorbar(found[x], line, bar, fmt="o-", ms=3.5, lw=1.4, capsize=2, label=label or None)
        log = np.all(found[x] > 0) and found[x].size > 2
        label = axis_label(name) if variable == name else variable.removeprefix("optimum.")
        axes.set(
            xlabel=x, ylabel=label, xscale="log" if log else "linear", yscale="linear" if variable == name else "log"
        )
    if others:
        panels[0].legend(fontsize=8)
    return save_pictures(figure, Path(out), "sweep")
