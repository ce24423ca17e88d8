"""What those who run LoRA ask, as pictures: what fine-tuning forgets, how strongly to apply its update, and which
weight decay to pre-train with if fine-tuning follows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from ..errors import SolveError
from ..predictions import axis_label
from ..setting.files import setting_to_dict
from ..setting.numerics import Numerics
from ..setting.paths import replace
from ..setting.stages import Finetuning, Pretraining, Setting
from ..simulation.simulate import simulate
from ..solution.solution import predict
from ..sweeps.sweep import sweep
from .curves import NUMERICS, column, scan
from .drawing import ALONG_FACTOR, Training, finite, legend_below, save, side_by_side

_RIDGE, _FACTOR, _LAM = "finetuning.lam", "finetuning.adapter_factor", "pretraining.lam"
#: Activation, and the ridge of pre-training that goes with it.
_KINDS = (("softmax", 0.01), ("identity", 0.1))
_TITLE = r"$T=3$, $\alpha=0.1$, $\kappa_0=\kappa=1$, $\Delta=0.5$"
_PLACES = ("forgetting_error", "test_error")
_BEST = ("best_adapter_factor", "test_error_best_factor")


def _square(axes, names: tuple[str, str], result, color) -> dict[str, Any]:
    """What training measures of two predictions, as a marker with both error bars; nothing if it did not converge."""
    try:
        (x, dx), (y, dy) = ((result.mean("finetuning", n), result.stderr("finetuning", n)) for n in names)
    except SolveError:
        return {}
    label = f"training, D = {result.dimension}"
    axes.errorbar(x, y, dy, dx, fmt="s", ms=4.5, mfc="white", color=color, capsize=2, zorder=5, label=label)
    bars = {f"{n}_stderr": finite(bar) for n, bar in zip(names, (dx, dy), strict=True)}
    return dict(zip(names, (x, y), strict=True)) | bars


def forgetting(out, training: Training | None = None, progress: bool = True) -> list[Path]:
    """E' against the error on the labels of pre-training: along the ridge of fine-tuning, for three numbers of
    samples, and from the best of its ridges along the factor on the update."""
    figure, panels = side_by_side(2, 10, 4.6)
    ridges, factors = np.geomspace(0.1, 12.0, 23), np.linspace(0.0, 1.2, 16)
    data: dict[str, Any] = {"figure": "forgetting"}
    bar = tqdm(total=2 * 3 * (len(ridges) + len(factors)), desc="theory", unit="solve", disable=not progress)
    for axes, (name, lam) in zip(panels, _KINDS, strict=True):
        lines: list[dict[str, Any]] = []
        data[name] = lines
        for alpha, color in ((1.0, "C0"), (3.0, "C1"), (10.0, "C2")):
            setting = Setting(Pretraining(0.1, lam, activation=name), Finetuning(alpha, 0.5), NUMERICS)
            rows = scan(setting, _RIDGE, ridges, _PLACES, bar)
            best = rows[int(np.nanargmin(column(rows, "test_error")))]
            after = scan(replace(setting, _RIDGE, best[_RIDGE]), _FACTOR, factors, _PLACES, bar)
            x, y = (column(rows, place) for place in _PLACES)
            axes.plot(x, y, color=color, lw=1.8, label=rf"$\alpha'={alpha:g}$, along $\lambda'$")
            axes.plot(*(column(after, place) for place in _PLACES), color=color, lw=1.2, ls="--",
                      label=ALONG_FACTOR)  # fmt: skip
            axes.plot(*(best[place] for place in _PLACES), "*", ms=11, color=color, mec="k", mew=0.5, zorder=6)
            line = {"setting": setting_to_dict(setting), "ridges": rows, "factors": after}
            if training is not None:
                line["simulation"] = [
                    {_RIDGE: ridge, **_square(axes, _PLACES, _trained(setting, ridge, training, progress), color)}
                    for ridge in (0.3, 1.0, 3.0)
                ]
            lines.append(line)
        before = float(predict(setting).pretraining["test_error"])
        axes.axvline(before, color="0.6", lw=0.8, label="before fine-tuning")
        axes.set(xlabel=axis_label("forgetting_error"), ylabel=axis_label("test_error"),
                 title=rf"{name}, $\lambda={lam:g}$")  # fmt: skip
    bar.close()
    figure.suptitle(_TITLE + r"; stars: $\lambda'$ best for $E'$", fontsize=9)
    legend_below(figure, panels)
    return save(figure, Path(out), "forgetting", data)


def _trained(setting: Setting, ridge: float, training: Training, progress: bool):
    here = replace(setting, _RIDGE, ridge)
    return simulate(here, **training.size(), memory=training.memory, progress=progress)


def factor(out, training: Training | None = None, progress: bool = True) -> list[Path]:
    """E' against the factor c on the update at inference, for three ridges of fine-tuning; stars at the best c, which
    training knows too."""
    figure, panels = side_by_side(2, 10, 4.4)
    data: dict[str, Any] = {"figure": "factor"}
    bar = tqdm(total=2 * 3 * 25, desc="theory", unit="solve", disable=not progress)
    for axes, (name, lam), most in zip(panels, _KINDS, (8.0, 2.5), strict=True):
        factors, lines = np.geomspace(0.25, most, 25), []
        data[name] = lines
        for ridge, color in ((0.05, "C0"), (0.5, "C1"), (2.0, "C2")):
            setting = Setting(Pretraining(0.1, lam, activation=name), Finetuning(3.0, ridge), NUMERICS)
            rows = scan(setting, _FACTOR, factors, ("test_error", *_BEST), bar)
            axes.plot(factors, column(rows, "test_error"), color=color, lw=1.8, label=rf"$\lambda'={ridge:g}$")
            axes.plot(*(rows[0][n] for n in _BEST), "*", ms=8, color=color, mec="k", mew=0.5, zorder=6)
            line = {"setting": setting_to_dict(setting), "rows": rows}
            if training is not None:
                line["simulation"] = _square(axes, _BEST, _trained(setting, ridge, training, progress), color)
            lines.append(line)
        lowest = np.nanmin([column(line["rows"], "test_error") for line in lines])
        frozen = float(predict(setting).finetuning["test_error_frozen"])
        axes.axhline(frozen, color="0.6", lw=0.8, label="without the update")
        axes.axvline(1.0, color="0.6", lw=0.8, ls="--", label="as trained, $c=1$")
        axes.set(xscale="log", xlabel="factor $c$ on the update at inference", ylabel=axis_label("test_error"),
                 title=rf"{name}, $\lambda={lam:g}$", ylim=(0.9 * lowest, 1.25 * frozen))  # fmt: skip
        ticks = [c for c in (0.25, 0.5, 1.0, 2.0, 4.0, 8.0) if c <= most]
        axes.set_xticks(ticks, [f"{c:g}" for c in ticks])
        axes.minorticks_off()
    bar.close()
    figure.suptitle(_TITLE + r", $\alpha'=3$; stars: best $c$", fontsize=9)
    legend_below(figure, panels)
    return save(figure, Path(out), "factor", data)


def decay(out, training: Training | None = None, progress: bool = True) -> list[Path]:
    """The ridges of both stages that are best for E' and that of pre-training that is best for E, against the data of
    pre-training, with error bars over seeds of the quadrature; rings are lowest points of dense grids.

    There is nothing to train: a grid of ridges would need hundreds of runs."""
    few = Numerics(nodes=4096, finetuning_nodes=8192, replicas=4)
    setting = Setting(Pretraining(0.1, 0.01), Finetuning(3.0, 0.2), few)
    alphas = np.geomspace(0.03, 0.5, 13).tolist()
    figure, panels = side_by_side(2, 10, 4.2)
    data: dict[str, Any] = {"figure": "decay", "setting": setting_to_dict(setting), "pretraining.alpha": alphas}
    for minimize, paths, color, label in (
        ("pretraining.test_error", (_LAM,), "k", "best for $E$"),
        ("test_error", (_LAM, _RIDGE), "darkred", "best for $E'$"),
    ):
        grid = {"numerics.seed": [0, 1, 2], "pretraining.alpha": alphas}
        found = sweep(setting, grid, optimize=paths, minimize=minimize, progress=progress)
        found = found.where(found["optimum.converged"] == 1)
        entry = data[minimize] = {}
        for path, axes in zip(paths, panels, strict=False):
            values = found[f"optimum.{path}"]
            mean = values.mean("numerics.seed", skipna=False).values
            bars = values.std("numerics.seed", ddof=1, skipna=False).values / math.sqrt(values.sizes["numerics.seed"])
            axes.errorbar(alphas, mean, bars, fmt="o-", ms=3.5, lw=1.6, capsize=2, color=color, label=label)
            entry[path] = {
                "values": [[*map(finite, row)] for row in values.values],
                "mean": [*map(finite, mean)], "stderr": [*map(finite, bars)],
            }  # fmt: skip
        entry["dense"] = []
        for k in range(2, len(alphas), 4):
            places = {path: entry[path]["mean"][k] for path in paths}
            low = _dense(replace(setting, "pretraining.alpha", alphas[k]), places, minimize, progress)
            entry["dense"].append({"pretraining.alpha": alphas[k], **low})
            for path, axes in zip(paths, panels, strict=False):
                axes.plot(alphas[k], low.get(path, math.nan), "o", ms=9, mfc="none", color="C1", mew=1.3, zorder=5,
                          label="dense grid")  # fmt: skip
    for axes, label in zip(panels, (r"$\lambda$ of pre-training", r"$\lambda'$ of fine-tuning"), strict=True):
        axes.set(xscale="log", yscale="log", xlabel=r"data of pre-training $\alpha$", ylabel=label)
        for axis, ticks in ((axes.xaxis, (0.03, 0.1, 0.3)), (axes.yaxis, (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.4))):
            low, high = axis.get_view_interval()
            shown = [tick for tick in ticks if low <= tick <= high]
            axis.set_ticks(shown, [f"{tick:g}" for tick in shown])
            axis.set_minor_formatter("")
    figure.suptitle(r"softmax, $T=3$, $\alpha'=3$, $\kappa_0=\kappa=1$, $\Delta=0.5$", fontsize=9)
    legend_below(figure, panels)
    return save(figure, Path(out), "decay", data)


def _dense(setting: Setting, places, minimize: str, progress: bool) -> dict[str, float]:
    """Where an objective is lowest on a grid that has the `places` of an optimum in its middle, from the grid alone;
    nothing where there is no optimum or the lowest point lies at the edge."""
    if None in places.values():
        return {}
    grid = {path: (place * np.geomspace(0.6, 1 / 0.6, 7)).tolist() for path, place in places.items()}
    name = minimize if "." in minimize else f"finetuning.{minimize}"
    low = lowest(list(grid.values()), sweep(setting, grid, progress=progress)[name].values)
    return {path: x for path, x in zip(places, low, strict=True) if math.isfinite(x)}


def lowest(axes: Sequence[Any], values: np.ndarray) -> tuple[float, ...]:
    """Where the paraboloid in logarithms through the lowest point of a grid and its neighbours has its minimum; NaN
    where that point lies at the edge."""
    place = np.unravel_index(np.nanargmin(values), values.shape)
    if any(not 0 < k < n - 1 for k, n in zip(place, values.shape, strict=True)):
        return (math.nan,) * len(axes)
    near = np.ix_(*(range(k - 1, k + 2) for k in place))
    logs = [np.log(axis) for axis in axes]
    steps = np.meshgrid(*(log[k - 1 : k + 2] - log[k] for log, k in zip(logs, place, strict=True)), indexing="ij")
    x = np.stack([step.ravel() for step in steps], 1)
    i, j = np.triu_indices(len(axes))
    terms = np.hstack([np.ones((len(x), 1)), x, x[:, i] * x[:, j]])
    fit = np.linalg.lstsq(terms, values[near].ravel(), rcond=None)[0]
    hessian = np.zeros((len(axes), len(axes)))
    hessian[i, j] = fit[1 + len(axes) :]
    step = -np.linalg.solve(hessian + hessian.T, fit[1 : 1 + len(axes)])
    return tuple(float(np.exp(log[k] + d)) for log, k, d in zip(logs, place, step, strict=True))
