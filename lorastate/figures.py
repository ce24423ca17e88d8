"""Figures: solid lines are theory (dotted where replica symmetry is unstable, replicon >= 1), squares with error bars
are simulations, dashed lines mark minima.

Every figure writes PNG, PDF and one JSON file with its data, settings, seed and error bars.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from tqdm import tqdm

from ._version import __version__
from .errors import SolveError
from .setting import Finetuning, Numerics, Pretraining, Setting
from .setting_file import get, replace, setting_to_dict
from .solution import predict

#: Predictions that depend on the solution of fine-tuning.
_OF_LORA = ("test_error", "overlap")
_LABELS = {"test_error": "$E'$", "effective_noise": r"$\Delta_{\rm eff}$", "overlap": "$o_w$"}


def _save(figure, out: Path, name: str, data: dict[str, Any]) -> list[Path]:
    out.mkdir(parents=True, exist_ok=True)
    paths = [out / f"{name}.{kind}" for kind in ("png", "pdf", "json")]
    figure.savefig(paths[0], dpi=150, bbox_inches="tight")
    figure.savefig(paths[1], bbox_inches="tight")
    plt.close(figure)
    paths[2].write_text(json.dumps({**data, "version": __version__}, indent=1, allow_nan=False))
    return paths


def _scan(setting: Setting, path: str, values, names, bar=None) -> list[dict[str, float | None]]:
    """Predictions `names` of the fine-tuning stage, and its replicon, along one field; None where a solve failed."""
    rows = []
    for x in values:
        row: dict[str, float | None] = {path: float(x)}
        solution = predict(replace(setting, path, float(x)), throw=False)
        good = solution.ok
        for name in (*names, "replicon"):
            value = float(solution.finetuning[name])
            row[name] = value if good and math.isfinite(value) else None
        for name in names:
            row[f"{name}_stderr"] = solution.stderr("finetuning", name) if row[name] is not None else None
        rows.append(row)
        if bar is not None:
            bar.update()
    return rows


def _line(axes, rows, path, name, color, label=None):
    x = np.array([r[path] for r in rows])
    y = np.array([np.nan if r[name] is None else r[name] for r in rows])
    e = np.array([0.0 if r[f"{name}_stderr"] is None else r[f"{name}_stderr"] for r in rows])
    # Dotted where replica symmetry is unstable; the segment between a stable and an unstable point is dotted too.
    unstable = np.array([name in _OF_LORA and (r["replicon"] or 0.0) >= 1 for r in rows])
    spread = unstable.copy()
    spread[1:] |= unstable[:-1]
    spread[:-1] |= unstable[1:]
    axes.plot(x, np.where(unstable, np.nan, y), color=color, label=label, lw=1.8)
    axes.plot(x, np.where(spread, y, np.nan), color=color, lw=1.8, ls=":")
    axes.fill_between(x, y - e, y + e, color=color, alpha=0.2, lw=0)
    if np.all(np.isnan(y)):
        return None
    k = int(np.nanargmin(y))
    inside = 0 < k < len(x) - 1
    if inside:
        axes.axvline(x[k], color="darkred", ls="--", lw=0.8)
    return float(x[k]) if inside else None


def figure1(
    out: Path | str,
    simulate: bool = False,
    points: int = 17,
    dimension: int = 150,
    runs: int = 4,
    progress: bool = True,
) -> list[Path]:
    """E' against lambda for lambda' in {0.05, 1, infinity}; inset: E' against lambda' at the best lambda.

    softmax, alpha = 0.1, alpha' = 3, T = 3, kappa0 = kappa = 1, Delta = 0.5 (left) and 2 (right). Minima are marked;
    `simulate` adds squares, the mean over `runs` trainings at `dimension` with its standard error.
    """
    from .design import optimize

    grid = np.geomspace(3e-3, 0.3, points)
    inset_grid = np.geomspace(0.01, 3, 9)
    sim_grid = np.geomspace(1e-2, 0.1, 3)
    ridges = (0.05, 1.0)
    colors = {0.05: "C0", 1.0: "C1", None: "C2"}
    numerics = Numerics(nodes=8192, finetuning_nodes=16384, replicas=16)
    figure, panels = plt.subplots(1, 2, figsize=(11, 4.2))
    data: dict[str, Any] = {"figure": 1, "panels": []}
    total = 2 * (len(ridges) * points + len(inset_grid))
    bar = tqdm(total=total, desc="theory", unit="solve", disable=not progress)
    for axes, delta in zip(panels, (0.5, 2.0), strict=True):
        pre = Pretraining(alpha=0.1, lam=0.01, delta=delta)
        setting = Setting(pre, Finetuning(alpha=3.0, lam=0.2), numerics)
        panel: dict[str, Any] = {"delta": delta, "setting": setting_to_dict(setting), "curves": {}}
        for ridge in ridges:
            rows = _scan(
                replace(setting, "finetuning.lam", ridge), "pretraining.lam", grid,
                ("test_error", "test_error_frozen"), bar,
            )  # fmt: skip
            panel["curves"][f"{ridge:g}"] = rows
            _line(axes, rows, "pretraining.lam", "test_error", colors[ridge], rf"$\lambda'={ridge:g}$")
            if ridge == ridges[-1]:
                frozen = rows
        _line(axes, frozen, "pretraining.lam", "test_error_frozen", colors[None], r"$\lambda'=\infty$")
        best = optimize(setting)
        panel["optimum"] = {"converged": best.converged, **best.path[-1]}
        inset = axes.inset_axes((0.13, 0.62, 0.36, 0.33))
        rows = _scan(best.setting, "finetuning.lam", inset_grid, ("test_error",), bar)
        panel["inset"] = rows
        _line(inset, rows, "finetuning.lam", "test_error", "k")
        inset.set(xscale="log")
        inset.set_xlabel(r"$\lambda'$", fontsize=8, labelpad=0)
        inset.set_ylabel("$E'$", fontsize=8, labelpad=0)
        inset.tick_params(labelsize=7)
        if simulate:
            panel["simulation"] = _squares(axes, setting, sim_grid, ridges, colors, dimension, runs, progress)
        axes.set(
            xscale="log", xlabel=r"pre-training regularisation $\lambda$", ylabel="fine-tuning test error $E'$",
            title=rf"softmax, $T=3$, $\alpha=0.1$, $\alpha'=3$, $\kappa_0=\kappa=1$, $\Delta={delta:g}$",
        )  # fmt: skip
        low, high = axes.get_ylim()
        axes.set_ylim(low, high + 0.75 * (high - low))  # room for the inset
        axes.title.set_fontsize(9)
        axes.legend(loc="upper right", fontsize=8)
        data["panels"].append(panel)
    bar.close()
    figure.tight_layout()
    return _save(figure, Path(out), "figure1", data)


def _squares(axes, setting, grid, ridges, colors, dimension, runs, progress):
    from .simulation import simulate

    found = []
    for lam in tqdm(grid, desc="simulation", disable=not progress):
        memory: dict = {}
        for ridge in ridges:
            here = replace(replace(setting, "pretraining.lam", float(lam)), "finetuning.lam", ridge)
            result = simulate(here, dimension=dimension, runs=runs, seed=0, memory=memory)
            names = {ridge: "test_error"} | ({None: "test_error_frozen"} if ridge == ridges[-1] else {})
            for key, name in names.items():
                try:
                    mean, err = result.mean("finetuning", name), result.stderr("finetuning", name)
                except SolveError:
                    continue  # a training that did not converge is left out, never averaged
                axes.errorbar(lam, mean, err, fmt="s", ms=4.5, mfc="white", color=colors[key], capsize=2)
                found.append(
                    {"lam": float(lam), "ridge": key, "mean": mean, "stderr": err, "dimension": dimension,
                     "runs": runs, "seed": 0}
                )  # fmt: skip
    return found


def optimization(optimum, out: Path | str, simulation=None, points: int = 21) -> list[Path]:
    """Objective along the first descended field (others at the optimum), the path of the descent, the minimum."""
    path, name = optimum.over[0], optimum.minimize
    center = float(get(optimum.setting, path))
    visited = [p[path] for p in optimum.path]
    low, high = min([*visited, center / 8]), max([*visited, center * 8])
    rows = _scan(optimum.setting, path, np.geomspace(low, high, points), (name,))
    figure, axes = plt.subplots(figsize=(6.2, 4.2))
    others = ", ".join(f"{p} = {float(get(optimum.setting, p)):.4g}" for p in optimum.over[1:])
    _line(axes, rows, path, name, "C0", "theory" + (f" at {others}" if others else ""))
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
    axes.set(xscale="log", xlabel=path, ylabel=_LABELS[name])
    axes.legend(fontsize=8)
    figure.tight_layout()
    return _save(figure, Path(out), "optimization", data)
