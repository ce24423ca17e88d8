"""Figures: solid lines are theory, in both phases; thin dotted ones what replica symmetry would say where it is
unstable. Squares with error bars are training.

Every figure writes PNG, PDF and one JSON file with its data, settings, seed and error bars. A point whose solve fails
is left out of its line; its row says the code. No figure needs or changes the backend that a user has chosen.
"""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from scipy.optimize import minimize_scalar
from tqdm import tqdm

from .._version import __version__
from ..bayes.limits import bayes_optimal
from ..errors import Code, SettingError, SolveError
from ..runtime.program import together
from ..setting.files import get, replace, setting_to_dict
from ..setting.stages import Finetuning, Numerics, Pretraining, Setting
from ..solution.solution import predict, pretrain

#: Predictions that depend on the solution of fine-tuning, and those that one without symmetry breaking has as well.
_OF_LORA = _OF_SYMMETRIC = ("test_error", "overlap")
_SCALE = "finetuning.recalibration"
_LABELS = {"test_error": "$E'$", "effective_noise": r"$\Delta_{\rm eff}$", "overlap": "$o_w$"}
#: Legend entries that are the same for lines and markers of several colours.
_SYMMETRIC, _BAYES, _MINIMUM = "replica symmetric, unstable", "Bayes-optimal", "minimum"
_NOISE, _ERROR = "$b=M/Q$", "best $b$"
_SHARED: dict[str, dict[str, Any]] = {
    _SYMMETRIC: {"color": "0.3", "lw": 1.0, "ls": ":"},
    _BAYES: {"color": "0.3", "lw": 1.2, "ls": "--"},
    _MINIMUM: {"color": "darkred", "lw": 0.8, "ls": "--"},
    _NOISE: {"color": "0.6", "ls": "", "marker": "*", "ms": 12, "mec": "k", "mew": 0.6},
    _ERROR: {"color": "0.6", "ls": "", "marker": "D", "ms": 6, "mec": "k", "mew": 0.6},
}
_SQUARE: dict[str, Any] = {"marker": "s", "ms": 4.5, "mfc": "white", "color": "0.3", "ls": ""}


def _panels(count: int, width: float, height: float) -> tuple[Figure, Any]:
    """A figure and its panels side by side (one that is the only one by itself), without a global backend."""
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(1, count)


def _legend(figure: Figure, panels) -> None:
    """One legend below all panels: inside them there is no place that no curve runs through."""
    entries: dict[str, Any] = {}
    for axes in panels:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            style = _SQUARE if label.startswith("training") else _SHARED.get(label)
            entries.setdefault(label, Line2D([], [], **style) if style else handle)
    labels = sorted(entries, key=lambda label: label in _SHARED)  # lines first
    columns = -(-len(labels) // -(-len(labels) // 5))
    handles = [entries[label] for label in labels]
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, fontsize=8)


def _save(figure, out: Path, name: str, data: dict[str, Any]) -> list[Path]:
    out.mkdir(parents=True, exist_ok=True)
    numbers = out / f"{name}.json"
    paths = [*_pictures(figure, out, name), numbers]
    numbers.write_text(json.dumps({**data, "version": __version__}, indent=1, allow_nan=False))
    return paths


def _pictures(figure, out: Path, name: str) -> list[Path]:
    """The figure as PNG and PDF."""
    paths = [out / f"{name}.{kind}" for kind in ("png", "pdf")]
    for path in paths:
        figure.savefig(path, dpi=150, bbox_inches="tight")
    return paths


# ---- lines -----------------------------------------------------------------------------------------------------


def _scan(setting: Setting, path: str, values, names, bar=None, symmetric: bool = False) -> list[dict[str, Any]]:
    """Predictions `names` of the fine-tuning stage along one field: one row a point, None where a solve failed.

    `broken` says whether symmetry is, `code` how the solve ended. With `symmetric`, every second point that is broken
    has the replica-symmetric values too, as `Solution.rs`: they cost a solve of their own.
    """

    def at(item):
        place, x = item
        row: dict[str, Any] = {path: float(x)}
        solution = predict(replace(setting, path, np.asarray(x).item()), throw=False)
        codes = {stage: solution.code(stage) for stage in ("pretraining", "finetuning")}
        bad = [f"{stage}: {code.name}" for stage, code in codes.items() if code is not Code.ok]
        row |= {"code": bad[0] if bad else "ok", "broken": None if bad else bool(solution.finetuning["broken"])}
        for name in names:
            # What pre-training alone decides is known even where fine-tuning is not solved.
            good = not bad or (name not in _OF_LORA and codes["pretraining"] is Code.ok)
            value = float(solution.finetuning[name])
            row[name] = value if good and math.isfinite(value) else None
            row[f"{name}_stderr"] = solution.stderr("finetuning", name) if row[name] is not None else None
        if symmetric and row["broken"] and place % 2 == 0:
            row["rs"] = solution.rs
        return row

    rows = []
    for row in together(at, enumerate(values)):
        rows.append(row)
        if bar is not None:
            bar.update()
    return rows


def _numbers(rows, name: str) -> np.ndarray:
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


def _line(axes, rows, path, name, color, label=None, mark=True, style="-", top=1.0):
    """One line of the theory with its error band; returns where its minimum is, if that lies inside. The mark of the
    minimum ends at the height `top` of the panel."""
    x, y = _numbers(rows, path), _numbers(rows, name)
    e = np.nan_to_num(_numbers(rows, f"{name}_stderr"))
    axes.plot(x, y, color=color, label=label, lw=1.8, ls=style)
    axes.fill_between(x, y - e, y + e, color=color, alpha=0.2, lw=0)
    if name in _OF_SYMMETRIC and any("rs" in row for row in rows):
        axes.plot(*_continuation(rows, path, name), color=color, lw=1.0, ls=":", label=_SYMMETRIC)
    if np.all(np.isnan(y)) or not mark:
        return None
    k = int(np.nanargmin(y))
    inside = 0 < k < len(x) - 1
    if inside:
        axes.axvline(x[k], ymax=top, color="darkred", ls="--", lw=0.8, label=_MINIMUM)
    return float(x[k]) if inside else None


@dataclass
class Training:
    """How simulation markers are made: at which D (None: what suits the figure), from how many runs."""

    dimension: int | None = None
    runs: int = 4
    memory: dict = field(default_factory=dict)

    def size(self, usual: int = 150) -> dict[str, Any]:
        """Its arguments to `simulate`, as they go into the figure's data."""
        return {"dimension": self.dimension or usual, "runs": self.runs, "seed": 0}


def _square(axes, x, result, name: str, color, search: str = "finetuning") -> dict[str, float | None] | None:
    """A simulation marker with its error bar, and its numbers; a training that did not converge is left out, never
    averaged: then None."""
    try:
        mean, err = result.mean(search, name), result.stderr(search, name)
    except SolveError:
        return None
    label = f"training, D = {result.dimension}"
    axes.errorbar(x, mean, err, fmt="s", ms=4.5, mfc="white", color=color, capsize=2, zorder=5, label=label)
    return {"mean": mean, "stderr": err if math.isfinite(err) else None}


# ---- figure 1 --------------------------------------------------------------------------------------------------

#: Numerics of figures 1 to 6: a quadrature error of E' of about one per cent, drawn as a band.
_NUMERICS = Numerics(nodes=8192, finetuning_nodes=16384, replicas=8)
#: lambda' of figure 1; None is infinity.
_RIDGES = {0.05: "C0", 1.0: "C1", None: "C2"}
#: Part of the height of figure 1's panels that the inset leaves to the curves.
_BELOW_INSET = 0.55
#: Searches of a training for figure 1: deep enough for the lowest minima.
_SEARCH: dict[str, Any] = {"starts": 4, "moves": 20}


def figure1(out: Path | str, training: Training | None = None, progress: bool = True, points: int = 25) -> list[Path]:
    """E' against lambda for lambda' in {0.05, 1, infinity}; inset: E' against lambda' at the best lambda.

    softmax, alpha = 0.1, alpha' = 3, T = 3, kappa0 = kappa = 1, Delta = 0.5 (left) and 2 (right). Minima are marked, so
    are the lambda that is best for E of pre-training (black) and the Bayes-optimal E'. `training` adds squares: the
    lowest minima found on the asymptotic channel (`asymptotic`), where the first stage has no finite D.
    """
    figure, panels = _panels(2, 11, 5.2)
    inset_points = max(15, points // 2)
    bar = tqdm(total=2 * (2 * points + inset_points), desc="theory", unit="solve", disable=not progress)
    data: dict[str, Any] = {"figure": 1, "panels": []}
    for axes, delta in zip(panels, (0.5, 2.0), strict=True):
        setting = Setting(Pretraining(alpha=0.1, lam=0.01, delta=delta), Finetuning(alpha=3.0, lam=0.2), _NUMERICS)
        panel: dict[str, Any] = {"delta": delta, "setting": setting_to_dict(setting)}
        panel |= _against_ridge(axes, setting, np.geomspace(5e-3, 0.3, points), bar)
        inset = axes.inset_axes((0.14, 0.64, 0.36, 0.33))
        panel |= _inset(inset, setting, np.geomspace(0.01, 3, inset_points), bar)
        if training is not None:
            panel["simulation"] = _squares(axes, setting, training, progress)
        axes.set(
            xscale="log", xlabel=r"pre-training regularisation $\lambda$", ylabel="fine-tuning test error $E'$",
            title=rf"softmax, $T=3$, $\alpha=0.1$, $\alpha'=3$, $\kappa_0=\kappa=1$, $\Delta={delta:g}$",
        )  # fmt: skip
        axes.title.set_fontsize(9)
        low, high = axes.get_ylim()
        axes.set_ylim(low, low + (high - low) / _BELOW_INSET)
        data["panels"].append(panel)
    bar.close()
    _legend(figure, panels)
    return _save(figure, Path(out), "figure1", data)


def _against_ridge(axes, setting: Setting, grid, bar) -> dict[str, Any]:
    """The curves of one panel of figure 1 and its two levels; returns its data."""
    path, curves, rows = "pretraining.lam", {}, []
    for ridge, color in _RIDGES.items():
        if ridge is not None:
            here = replace(setting, "finetuning.lam", ridge)
            rows = _scan(here, path, grid, ("test_error", "test_error_frozen"), bar, symmetric=True)
            curves[f"{ridge:g}"] = rows
            _line(axes, rows, path, "test_error", color, rf"$\lambda'={ridge:g}$", top=_BELOW_INSET)
        else:  # w = 0, whatever the last ridge was
            _line(axes, rows, path, "test_error_frozen", color, r"$\lambda'=\infty$", top=_BELOW_INSET)
    best = _best_map(setting, grid[0], grid[-1])
    if best is not None:
        axes.axvline(best, ymax=_BELOW_INSET, color="k", ls="--", lw=1.0, label=r"$\lambda$ best for $E$")
    limits = bayes_optimal(setting)
    level, error = limits.finetuning["test_error"], limits.errors["finetuning"]["test_error"]
    axes.axhline(level, color="0.3", ls="-.", lw=1.0, label="Bayes-optimal $E'$")
    return {"curves": curves, "best_for_E": best, "bayes_optimal": {"test_error": level, "test_error_stderr": error}}


def _best_map(setting: Setting, low: float, high: float) -> float | None:
    """The lambda between `low` and `high` that is best for E of pre-training; None where E is best at an end."""

    def error(log_lam):
        there = replace(setting, "pretraining.lam", float(np.exp(log_lam)))
        return float(pretrain(there.pretraining, setting.numerics, throw=False).values["test_error"])

    ends = np.log(low), np.log(high)
    found = minimize_scalar(error, bounds=ends, method="bounded", options={"xatol": 1e-3})
    inside = np.isfinite(found.fun) and found.fun < min(map(error, ends))
    return float(np.exp(found.x)) if inside else None


def _inset(inset, setting: Setting, grid, bar) -> dict[str, Any]:
    """E' against lambda' at the lambda that is best for E'; returns its data."""
    from ..design.optimize import optimize

    best = optimize(setting)
    rows = _scan(best.setting, "finetuning.lam", grid, ("test_error",), bar, symmetric=True)
    _line(inset, rows, "finetuning.lam", "test_error", "k")
    inset.set(xscale="log")
    inset.set_xlabel(r"$\lambda'$", fontsize=8, labelpad=0)
    inset.set_ylabel("$E'$", fontsize=8, labelpad=0)
    inset.tick_params(labelsize=7)
    return {"optimum": {"converged": best.converged, **best.path[-1]}, "inset": rows}


def _squares(axes, setting: Setting, training: Training, progress: bool) -> list[dict[str, Any]]:
    """Training on the lines of finite lambda': without an update there is nothing to train."""
    from ..simulation.simulate import simulate

    found, size = [], training.size(600) | _SEARCH
    pairs = list(itertools.product(np.geomspace(1e-2, 0.1, 3), [ridge for ridge in _RIDGES if ridge is not None]))
    for lam, ridge in tqdm(pairs, desc="simulation", disable=not progress):
        here = replace(replace(setting, "pretraining.lam", float(lam)), "finetuning.lam", ridge)
        result = simulate(here, stage="finetuning", **size)
        if numbers := _square(axes, lam, result, "test_error", _RIDGES[ridge], "deep"):
            found.append({"lam": float(lam), "ridge": ridge, **numbers, **size})
    return found


# ---- figures 2 to 6 --------------------------------------------------------------------------------------------


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


def _draw(panels: dict[str, Any], curves: list[Curve], training: Training | None, progress: bool) -> list[dict]:
    """Draws every curve into the panel of every prediction (name -> axes); returns the data."""
    total = sum(len(c.grid) for c in curves)
    bar = tqdm(total=total, desc="theory", unit="solve", disable=not progress)
    data = []
    for c in curves:
        rows = _scan(c.setting, c.path, c.grid, tuple(panels), bar, c.symmetric)
        entry: dict[str, Any] = {"label": c.label, "setting": setting_to_dict(c.setting), "path": c.path, "rows": rows}
        for name, axes in panels.items():
            _line(axes, rows, c.path, name, c.color, c.label, mark=False, style=c.style)
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
        axes.plot(grid, [row[name] for row in rows], color=c.color, ls="--", lw=1.2, label=_BAYES)
    return rows


def _mark(panels, c: Curve, training: Training, progress: bool) -> list[dict]:
    """Simulation markers along a curve."""
    from ..simulation.simulate import simulate

    found = []
    for x in tqdm(c.marked, desc="simulation", disable=not progress):
        here = replace(c.setting, c.path, x)
        result = simulate(here, **training.size(), memory=training.memory)
        row: dict[str, Any] = {c.path: float(x), **training.size()}
        for name, axes in panels.items():
            if numbers := _square(axes, x, result, name, c.color):
                row |= {name: numbers["mean"], f"{name}_stderr": numbers["stderr"]}
        found.append(row)
    return found


def _finish(figure, panels: dict[str, Any], out, name: str, xlabel: str, title: str, data, log: bool = True):
    for key, axes in panels.items():
        axes.set(xlabel=xlabel, ylabel=_LABELS[key])
        if log:
            axes.set_xscale("log")
    figure.suptitle(title, fontsize=9)
    _legend(figure, panels.values())
    return _save(figure, Path(out), name, data)


def _against_samples(number: int, activation: str, out, training, progress):
    """E' and o_w against the fine-tuning data alpha', for three sizes of the pre-training set."""
    grid, lam = np.geomspace(0.5, 10, 25), 0.02 if activation == "softmax" else 0.1
    curves = [
        Curve(
            rf"$\alpha={alpha:g}$",
            Setting(Pretraining(alpha, lam, activation=activation), Finetuning(1.0, 0.5), _NUMERICS),
            "finetuning.alpha", grid, color, (1.0, 5.0), bayes=True, symmetric=True,
        )
        for alpha, color in ((0.03, "C0"), (0.1, "C1"), (0.3, "C2"))
    ]  # fmt: skip
    figure, (left, right) = _panels(2, 10, 4.4)
    panels = {"test_error": left, "overlap": right}
    data = {"figure": number, "curves": _draw(panels, curves, training, progress)}
    title = rf"{activation}, $T=3$, $\kappa_0=\kappa=1$, $\Delta=0.5$, $\lambda={lam:g}$, $\lambda'=0.5$"
    return _finish(figure, panels, out, f"figure{number}", r"fine-tuning data $\alpha'$", title, data)


def figure2(out, training: Training | None = None, progress: bool = True) -> list[Path]:
    """What pre-training does to fine-tuning, softmax: E' and o_w against alpha', Bayes-optimal limits dashed."""
    return _against_samples(2, "softmax", out, training, progress)


def figure5(out, training: Training | None = None, progress: bool = True) -> list[Path]:
    """Figure 2 for the rescaled identity."""
    return _against_samples(5, "identity", out, training, progress)


def figure3(out, training: Training | None = None, progress: bool = True) -> list[Path]:
    """Fine-tuning inputs from the pre-training set against fresh ones: E' and o_w against lam, best values marked."""
    pre = Pretraining(0.2, 0.01, kappa0=0.5, tokens=2)
    kinds = (("fresh", {}, "C0"), ("reused", {"inputs": "reused"}, "C1"))
    curves = [
        Curve(label, Setting(pre, Finetuning(3.0, 0.3, **kind), _NUMERICS), "pretraining.lam",
              np.geomspace(3e-3, 0.3, 25), color, (0.01, 0.1), symmetric=True)
        for label, kind, color in kinds
    ]  # fmt: skip
    figure, (left, right) = _panels(2, 10, 4.4)
    panels = {"test_error": left, "overlap": right}
    data = {"figure": 3, "curves": _draw(panels, curves, training, progress)}
    for (name, axes), best in zip(panels.items(), (np.nanargmin, np.nanargmax), strict=True):
        for curve, (_, _, color) in zip(data["curves"], kinds, strict=True):
            values = _numbers(curve["rows"], name)
            k = int(best(values))
            if 0 < k < len(values) - 1:
                axes.axvline(curve["rows"][k]["pretraining.lam"], color=color, ls="--", lw=0.8)
    title = (
        r"softmax, $T=2$, $\alpha=0.2$, $\alpha'=3$, $\kappa_0=0.5$, $\kappa=1$, $\Delta=0.5$, $\lambda'=0.3$; "
        "dashed: least $E'$, largest $o_w$"
    )
    return _finish(figure, panels, out, "figure3", r"pre-training regularisation $\lambda$", title, data)


def figure4(out, training: Training | None = None, progress: bool = True) -> list[Path]:
    """Active fine-tuning: E' and o_w against lam' for selected inputs (solid) and uniform ones (dash-dotted)."""
    pre, grid = Pretraining(0.1, 0.01, delta=0.0), np.geomspace(0.1, 1.5, 25)
    curves = []
    for rho, color in ((0.04, "C0"), (0.02, "C1"), (0.015, "C2")):
        for label, kind, style in (
            (rf"selected, $\rho={rho:g}$", Finetuning(None, 0.5, inputs="selected", rho=rho, pool=100.0), "-"),
            (rf"uniform, $\alpha'={100 * rho:g}$", Finetuning(100 * rho, 0.5), "-."),
        ):
            marked = (0.2, 1.0) if style == "-" else ()
            setting = Setting(pre, kind, _NUMERICS)
            curves.append(Curve(label, setting, "finetuning.lam", grid, color, marked, style=style))
    figure, (left, right) = _panels(2, 10, 4.4)
    panels = {"test_error": left, "overlap": right}
    data = {"figure": 4, "curves": _draw(panels, curves, training, progress)}
    title = (
        r"softmax, $T=3$, $\alpha=0.1$, $\lambda=0.01$, $\Delta=0$, pool $\alpha'_{\rm pool}=100$, score $\|Z_W\|_F^2$"
    )
    return _finish(figure, panels, out, "figure4", r"fine-tuning regularisation $\lambda'$", title, data)


def figure6(out, training: Training | None = None, progress: bool = True) -> list[Path]:
    """Recalibration of the frozen map, Z_W -> b Z_W: E' against b (left), and against lam with and without (right)."""
    figure, panels = _panels(2, 10, 4.4)
    base = {
        name: Setting(Pretraining(0.1, 0.1, activation=name), Finetuning(3.0, 0.5), _NUMERICS)
        for name in ("softmax", "identity")
    }
    left = [
        Curve(name, setting, _SCALE, np.linspace(0.2, 2.0, 25), color, (0.6, 1.4))
        for (name, setting), color in zip(base.items(), ("C0", "C1"), strict=True)
    ]
    data = {"figure": 6, "against_b": _draw({"test_error": panels[0]}, left, training, progress)}
    for curve, row in zip(left, data["against_b"], strict=True):
        for choice, label in (("noise", _NOISE), ("error", _ERROR)):
            row[f"least_{choice}"] = found = _scaled(curve.setting, choice)
            if found["test_error"] is not None:
                style = _SHARED[label] | {"color": curve.color, "label": label, "zorder": 4}
                panels[0].plot(found["b"], found["test_error"], **style)
    panels[0].axvline(1.0, color="0.6", lw=0.8)
    right = [
        Curve(label, replace(setting, _SCALE, b), "pretraining.lam", np.geomspace(0.01, 0.5, 25), color,
              (0.1,) if b == 1.0 else (), style=style)
        for (name, setting), color in zip(base.items(), ("C0", "C1"), strict=True)
        for label, b, style in ((name, 1.0, "-"), (f"{name}, always $b=M/Q$", "noise", "-."))
    ]  # fmt: skip
    data["against_lam"] = _draw({"test_error": panels[1]}, right, training, progress)
    panels[0].set(xlabel="factor $b$ on the frozen map", ylabel="$E'$")
    panels[1].set(xlabel=r"pre-training regularisation $\lambda$", ylabel="$E'$", xscale="log")
    figure.suptitle(
        r"$T=3$, $\alpha=0.1$, $\alpha'=3$, $\kappa_0=\kappa=1$, $\Delta=0.5$, $\lambda'=0.5$; left: $\lambda=0.1$; "
        "right, solid: $b=1$", fontsize=9,
    )  # fmt: skip
    _legend(figure, panels)
    return _save(figure, Path(out), "figure6", data)


def _scaled(setting: Setting, choice: str) -> dict[str, Any]:
    """The b of a choice ("noise": M/Q, "error": that of least E') and the E' that it leads to."""
    try:
        solution = predict(replace(setting, _SCALE, choice))
    except SolveError as error:
        return {"b": None, "test_error": None, "code": str(error)}
    return {"b": float(solution.finetuning["recalibration"]), "test_error": float(solution.test_error), "code": "ok"}


# ---- others ----------------------------------------------------------------------------------------------------


def spectrum(out, training: Training | None = None, progress: bool = True) -> list[Path]:
    """Predicted density of the learned map, over the eigenvalues of trained ones (D = 300 or as asked)."""
    figure, panels = _panels(2, 10, 4.2)
    data: dict[str, Any] = {"figure": "spectrum", "panels": []}
    for axes, (name, lam) in zip(panels, (("identity", 0.1), ("softmax", 0.01)), strict=True):
        setting = Setting(Pretraining(0.1, lam, activation=name), Finetuning(3.0, 0.5), _NUMERICS)
        law = predict(setting).spectrum
        edges = np.asarray(law.edges)
        x = np.linspace(1e-3, float(np.nanmax(edges)) * 1.05, 300)
        density = np.asarray(law.density(x))
        panel: dict[str, Any] = {
            "setting": setting_to_dict(setting), "x": x.tolist(), "density": density.tolist(),
            "atom": float(law.atom), "moments": [float(law.moment1), float(law.moment2)],
        }  # fmt: skip
        axes.plot(x, density, "k", lw=1.8, label=f"theory, atom at 0: {float(law.atom):.3f}")
        if training is not None:
            from ..simulation.simulate import simulate

            found = simulate(setting, **training.size(300), progress=progress)
            values = found.eigenvalues.ravel()
            zero = np.mean(values < 1e-3 * values.max())
            panel["simulation"] = {**training.size(300), "atom": float(zero),
                                   "moments": [float(values.mean()), float(np.mean(values**2))]}  # fmt: skip
            shown = values[values > 1e-3 * values.max()]
            axes.hist(shown, bins=40, weights=np.full(len(shown), 1 / len(values) / ((shown.max() - shown.min()) / 40)),
                      color="C0", alpha=0.45, label=f"trained, D = {found.dimension}, atom {zero:.3f}")  # fmt: skip
        axes.set(xlabel="eigenvalue of $S$", ylabel="density", title=rf"{name}, $\lambda={lam:g}$", ylim=(0, None))
        axes.legend(fontsize=8)
        data["panels"].append(panel)
    figure.suptitle(r"$T=3$, $\alpha=0.1$, $\kappa_0=\kappa=1$, $\Delta=0.5$", fontsize=9)
    return _save(figure, Path(out), "spectrum", data)


def phase(out, training: Training | None = None, progress: bool = True) -> list[Path]:
    """o_w over alpha' and Delta_eff, identity (which sees the channel through Delta_eff alone), with the thresholds of
    weak recovery and the line on which replica symmetry breaks."""
    from ..bayes.limits import weak_recovery_threshold as bayes_threshold

    numerics = Numerics(nodes=1024, finetuning_nodes=2048, replicas=4)
    base = Setting(Pretraining(0.3, 0.05, activation="identity", delta=0.01), Finetuning(1.0, 0.5, delta=0.0), numerics)
    gap = float(predict(base).effective_noise)
    noises, alphas = gap + np.geomspace(0.05, 4.0, 9), np.geomspace(0.08, 3.0, 15)
    rows, lines = [], {"weak_recovery": [], "weak_recovery_bayes_optimal": [], "instability": []}
    bar = tqdm(total=len(noises) * len(alphas), desc="theory", unit="solve", disable=not progress)
    for i, noise in enumerate(map(float, noises)):
        here = replace(base, "finetuning.delta", 2 * (noise - gap))
        row = _scan(here, "finetuning.alpha", alphas, ("overlap",), bar)
        rows.append(row)
        lines["instability"] += [(noise, alpha) for alpha in _breaks(here, "finetuning.alpha", row)]
        if i % 2 == 0:
            lines["weak_recovery"].append((noise, _threshold(here)))
            lines["weak_recovery_bayes_optimal"].append((noise, bayes_threshold(here.finetuning_resolved, noise)))
    bar.close()
    overlaps = np.abs([_numbers(row, "overlap") for row in rows])
    figure, axes = _panels(1, 6.4, 5.0)
    axes.set_facecolor("0.8")  # of points that failed
    mesh = axes.pcolormesh(alphas, noises, overlaps, shading="nearest", cmap="viridis", vmin=0, vmax=1)
    figure.colorbar(mesh, label="$o_w$")
    for name, style, label in (
        ("weak_recovery", {"color": "w"}, "weak recovery, trained"),
        ("weak_recovery_bayes_optimal", {"color": "w", "ls": "--"}, "weak recovery, Bayes-optimal"),
        ("instability", {"color": "C1", "ls": "", "marker": "o", "ms": 4, "clip_on": False}, "replica symmetry breaks"),
    ):
        found = [pair for pair in lines[name] if pair[1] is not None]
        axes.plot([alpha for _, alpha in found], [noise for noise, _ in found], lw=1.6, label=label, **style)
    axes.set(xscale="log", xlabel=r"fine-tuning data $\alpha'$", ylabel=r"$\Delta_{\rm eff}$",
             xlim=(alphas[0], alphas[-1]), ylim=(noises[0], noises[-1]),
             title=r"identity, $T=3$, $\lambda'=0.5$")  # fmt: skip
    figure.legend(fontsize=8, loc="outside lower center", ncols=3, facecolor="0.5", labelcolor="w")
    data = {"figure": "phase", "setting": setting_to_dict(base), "effective_noise": noises.tolist(), "rows": rows}
    return _save(figure, Path(out), "phase", data | lines)


def _breaks(setting: Setting, path: str, rows) -> list[float]:
    """Where along the points of a line symmetry breaks or is restored."""
    from ..diagnosis.thresholds import instability_threshold

    places = []
    for row, after in itertools.pairwise(rows):
        if None not in (row["broken"], after["broken"]) and row["broken"] != after["broken"]:
            low, high = row[path], after[path]
            try:
                places.append(instability_threshold(setting, path, low, high, rtol=0.02))
            except (SettingError, SolveError):  # a solve between them failed: known to one step of the grid
                places.append(math.sqrt(low * high))
    return places


def _threshold(setting: Setting) -> float | None:
    """alpha' of weak recovery; None where it is not found."""
    from ..diagnosis.thresholds import weak_recovery_threshold

    try:
        return weak_recovery_threshold(setting)
    except (SettingError, SolveError):
        return None


def rank(out, training: Training | None = None, progress: bool = True) -> list[Path]:
    """E' against the rank r of the update at fixed data, for a teacher of rank two and three numbers of samples."""
    figure, panels = _panels(2, 10, 4.4)
    data: dict[str, Any] = {"figure": "rank"}
    numerics, ranks = Numerics(nodes=4096, finetuning_nodes=8192, replicas=8), np.arange(1, 5)
    for axes, (name, lam) in zip(panels, (("identity", 0.1), ("softmax", 0.02)), strict=True):
        pre = Pretraining(0.1, lam, activation=name)
        curves = [
            Curve(rf"$\alpha'={alpha:g}$", Setting(pre, Finetuning(alpha, 0.3, teacher_rank=2), numerics),
                  "finetuning.rank", ranks, color, (1, 2, 3, 4))
            for alpha, color in ((1.0, "C0"), (3.0, "C1"), (10.0, "C2"))
        ]  # fmt: skip
        data[name] = _draw({"test_error": axes}, curves, training, progress)
        axes.set(xlabel="rank $r$ of the update", ylabel="$E'$", title=rf"{name}, $\lambda={lam:g}$", xticks=ranks)
        axes.axvline(2, color="0.6", lw=0.8)
    figure.suptitle(
        r"teacher of rank $r^*=2$ (grey), $T=3$, $\alpha=0.1$, $\kappa_0=\kappa=1$, $\Delta=0.5$, $\lambda'=0.3$",
        fontsize=9,
    )
    _legend(figure, panels)
    return _save(figure, Path(out), "rank", data)


#: Figures by name; each takes (out, training, progress).
FIGURES: dict[str, Any] = {
    "1": figure1, "2": figure2, "3": figure3, "4": figure4, "5": figure5, "6": figure6, "spectrum": spectrum,
    "phase": phase, "rank": rank,
}  # fmt: skip


def optimization(optimum, out: Path | str, simulation=None, points: int = 25) -> list[Path]:
    """Objective along the first descended field (others at the optimum), the path of the descent, the minimum."""
    path, name = optimum.over[0], optimum.minimize
    center = float(get(optimum.setting, path))
    visited = [p[path] for p in optimum.path]
    low, high = min([*visited, center / 8]), max([*visited, center * 8])
    rows = _scan(optimum.setting, path, np.geomspace(low, high, points), (name,))
    figure, axes = _panels(1, 6.2, 4.2)
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
    return _save(figure, Path(out), "optimization", data)


def sensitivities(found, optimum, out: Path | str) -> list[Path]:
    """Elasticities of the objective at the optimum, largest first: what a change of one per cent does, in per cent."""
    ordered = sorted(found.elasticities.items(), key=lambda item: abs(item[1]))
    figure, axes = _panels(1, 6.2, 0.9 + 0.3 * len(ordered))
    values = [value for _, value in ordered]
    axes.barh(range(len(ordered)), values, color=["C3" if value > 0 else "C0" for value in values])
    axes.set_yticks(
        range(len(ordered)), [path + (" *" if path in found.over else "") for path, _ in ordered], fontsize=8
    )
    axes.axvline(0, color="k", lw=0.7)
    axes.set(xlabel=f"elasticity of {_LABELS[optimum.minimize]} (* descended)")
    axes.margins(y=0.02)
    data = {"sensitivities": found.summary(), "setting": setting_to_dict(optimum.setting)}
    return _save(figure, Path(out), "sensitivities", data)


def sweep(dataset, out: Path | str, name: str = "finetuning.test_error") -> list[Path]:
    """A swept prediction over one axis (with error bars), or two: lines where one has few values, else a map.

    Axes with a single value are left out; with three or more others there is no picture and no file.
    """
    values = dataset[name].squeeze()
    if values.ndim not in (1, 2) or not np.any(np.isfinite(values)):
        return []
    errors = dataset[f"{name}_stderr"].squeeze()
    axes_values = {str(d): values[d].values for d in values.dims}
    numeric = [d for d, v in axes_values.items() if v.dtype.kind in "iuf"]
    few = min(axes_values, key=lambda d: (d in numeric, len(axes_values[d]))) if values.ndim == 2 else ""
    figure, axes = _panels(1, 5.6, 4)
    if values.ndim == 2 and len(numeric) == 2 and len(axes_values[few]) > 6:
        y, x = axes_values
        mesh = axes.pcolormesh(axes_values[x], axes_values[y], values.values, shading="nearest", cmap="viridis")
        figure.colorbar(mesh, label=_LABELS.get(name.split(".")[1], name))
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
        axes.set(xlabel=x, ylabel=_LABELS.get(name.split(".")[1], name))
        scaled = {"x": grid if x in numeric else np.zeros(0)}
    for which, v in scaled.items():
        if len(v) > 2 and np.all(v > 0) and np.allclose(np.diff(np.log(v)), np.log(v[1] / v[0]), rtol=1e-6):
            axes.set(**{f"{which}scale": "log"})
    if axes.get_legend_handles_labels()[1]:
        axes.legend(fontsize=8)
    return _pictures(figure, Path(out), "sweep")
