"""Figures: solid lines are theory (dotted where replica symmetry is unstable, replicon >= 1), squares with error bars
are simulations, dashed lines mark minima.

Every figure writes PNG, PDF and one JSON file with its data, settings, seed and error bars.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from tqdm import tqdm

from ._version import __version__
from .bayes import bayes_optimal
from .errors import SolveError
from .program import together
from .setting import Finetuning, Numerics, Pretraining, Setting
from .setting_file import get, replace, setting_to_dict
from .solution import predict

#: Predictions that depend on the solution of fine-tuning.
_OF_LORA = ("test_error", "overlap")
_LABELS = {"test_error": "$E'$", "effective_noise": r"$\Delta_{\rm eff}$", "overlap": "$o_w$"}


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
    plt.close(figure)
    return paths


def _scan(setting: Setting, path: str, values, names, bar=None) -> list[dict[str, float | None]]:
    """Predictions `names` of the fine-tuning stage, and its replicon, along one field; None where a solve failed."""

    def at(x):
        row: dict[str, float | None] = {path: float(x)}
        solution = predict(replace(setting, path, np.asarray(x).item()), throw=False)
        good = solution.ok
        for name in (*names, "replicon"):
            value = float(solution.finetuning[name])
            row[name] = value if good and math.isfinite(value) else None
        for name in names:
            row[f"{name}_stderr"] = solution.stderr("finetuning", name) if row[name] is not None else None
        return row

    rows = []
    for row in together(at, values):
        rows.append(row)
        if bar is not None:
            bar.update()
    return rows


def _line(axes, rows, path, name, color, label=None, mark=True, style="-"):
    x = np.array([r[path] for r in rows])
    y = np.array([np.nan if r[name] is None else r[name] for r in rows])
    e = np.array([0.0 if r[f"{name}_stderr"] is None else r[f"{name}_stderr"] for r in rows])
    # Dotted where replica symmetry is unstable; the segment between a stable and an unstable point is dotted too.
    unstable = np.array([name in _OF_LORA and (r["replicon"] or 0.0) >= 1 for r in rows])
    spread = unstable.copy()
    spread[1:] |= unstable[:-1]
    spread[:-1] |= unstable[1:]
    axes.plot(x, np.where(unstable, np.nan, y), color=color, label=label, lw=1.8, ls=style)
    axes.plot(x, np.where(spread, y, np.nan), color=color, lw=1.8, ls=":")
    axes.fill_between(x, y - e, y + e, color=color, alpha=0.2, lw=0)
    if np.all(np.isnan(y)) or not mark:
        return None
    k = int(np.nanargmin(y))
    inside = 0 < k < len(x) - 1
    if inside:
        axes.axvline(x[k], color="darkred", ls="--", lw=0.8)
    return float(x[k]) if inside else None


@dataclass
class Training:
    """How simulation markers are made."""

    dimension: int = 150
    runs: int = 4
    memory: dict = field(default_factory=dict)

    @property
    def size(self) -> dict[str, Any]:
        """Its arguments to `simulate`, as they go into the figure's data."""
        return {"dimension": self.dimension, "runs": self.runs, "seed": 0}


def _square(axes, x, result, name: str, color) -> dict[str, float | None] | None:
    """A simulation marker with its error bar, and its numbers; a training that did not converge is left out, never
    averaged: then None."""
    try:
        mean, err = result.mean("finetuning", name), result.stderr("finetuning", name)
    except SolveError:
        return None
    axes.errorbar(x, mean, err, fmt="s", ms=4.5, mfc="white", color=color, capsize=2)
    return {"mean": mean, "stderr": err if math.isfinite(err) else None}


def figure1(out: Path | str, training: Training | None = None, progress: bool = True, points: int = 13) -> list[Path]:
    """E' against lambda for lambda' in {0.05, 1, infinity}; inset: E' against lambda' at the best lambda.

    softmax, alpha = 0.1, alpha' = 3, T = 3, kappa0 = kappa = 1, Delta = 0.5 (left) and 2 (right). Minima are marked;
    `training` adds squares, the mean over its runs with the standard error.
    """
    from .design import optimize

    grid = np.geomspace(5e-3, 0.3, points)
    inset_grid = np.geomspace(0.01, 3, 9)
    sim_grid = np.geomspace(1e-2, 0.1, 3)
    ridges = (0.05, 1.0)
    colors = {0.05: "C0", 1.0: "C1", None: "C2"}
    figure, panels = plt.subplots(1, 2, figsize=(11, 4.2))
    data: dict[str, Any] = {"figure": 1, "panels": []}
    total = 2 * (len(ridges) * points + len(inset_grid))
    bar = tqdm(total=total, desc="theory", unit="solve", disable=not progress)
    for axes, delta in zip(panels, (0.5, 2.0), strict=True):
        pre = Pretraining(alpha=0.1, lam=0.01, delta=delta)
        setting = Setting(pre, Finetuning(alpha=3.0, lam=0.2), _NUMERICS)
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
        if training is not None:
            panel["simulation"] = _squares(axes, setting, sim_grid, ridges, colors, training, progress)
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


def _squares(axes, setting, grid, ridges, colors, training: Training, progress):
    from .simulation import simulate

    found = []
    for lam in tqdm(grid, desc="simulation", disable=not progress):
        memory: dict = {}
        for ridge in ridges:
            here = replace(replace(setting, "pretraining.lam", float(lam)), "finetuning.lam", ridge)
            result = simulate(here, **training.size, memory=memory)
            names = {ridge: "test_error"} | ({None: "test_error_frozen"} if ridge == ridges[-1] else {})
            for key, name in names.items():
                if numbers := _square(axes, lam, result, name, colors[key]):
                    found.append({"lam": float(lam), "ridge": key, **numbers, **training.size})
    return found


# ---- figures 2 to 6 --------------------------------------------------------------------------------------------

#: Numerics of figures 1 to 6: a quadrature error of E' of about 0.7 per cent, drawn as a band.
_NUMERICS = Numerics(nodes=8192, finetuning_nodes=8192, replicas=8)


@dataclass
class Curve:
    """One theory line: predictions along `path`; `marked` are the values that a simulation is made at."""

    label: str
    setting: Setting
    path: str
    grid: np.ndarray
    color: str
    marked: tuple[float, ...] = ()
    bayes: bool = False
    style: str = "-"


def _draw(panels: dict[str, Any], curves: list[Curve], training: Training | None, progress: bool) -> list[dict]:
    """Draws every curve into the panel of every prediction (name -> axes); returns the data."""
    total = sum(len(c.grid) for c in curves)
    bar = tqdm(total=total, desc="theory", unit="solve", disable=not progress)
    data = []
    for c in curves:
        rows = _scan(c.setting, c.path, c.grid, tuple(panels), bar)
        entry: dict[str, Any] = {"label": c.label, "setting": setting_to_dict(c.setting), "path": c.path, "rows": rows}
        for name, axes in panels.items():
            _line(axes, rows, c.path, name, c.color, c.label, mark=False, style=c.style)
        if c.bayes:
            entry["bayes_optimal"] = _bayes(panels, c, progress)
        if training is not None and c.marked:
            entry["simulation"] = _mark(panels, c, training, progress)
        data.append(entry)
    bar.close()
    for axes in panels.values():
        axes.legend(fontsize=7.5)
    return data


def _bayes(panels, c: Curve, progress: bool) -> list[dict]:
    """Bayes-optimal limits along a curve, dashed."""

    def at(x):
        limits = bayes_optimal(replace(c.setting, c.path, float(x)))
        return {c.path: float(x), **limits.finetuning, "test_error_stderr": limits.errors["finetuning"]["test_error"]}

    steps = together(at, c.grid)
    rows = list(tqdm(steps, total=len(c.grid), desc="Bayes-optimal", unit="solve", disable=not progress))
    for name, axes in panels.items():
        axes.plot(c.grid, [row[name] for row in rows], color=c.color, ls="--", lw=1.2)
    return rows


def _mark(panels, c: Curve, training: Training, progress: bool) -> list[dict]:
    """Simulation markers along a curve."""
    from .simulation import simulate

    found = []
    for x in tqdm(c.marked, desc="simulation", disable=not progress):
        here = replace(c.setting, c.path, x)
        result = simulate(here, **training.size, memory=training.memory)
        row: dict[str, Any] = {c.path: float(x), **training.size}
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
    figure.tight_layout()
    return _save(figure, Path(out), name, data)


def _against_samples(number: int, activation: str, out, training, progress):
    """E' and o_w against the fine-tuning data alpha', for three sizes of the pre-training set."""
    grid, lam = np.geomspace(0.5, 10, 7), 0.02 if activation == "softmax" else 0.1
    curves = [
        Curve(
            rf"$\alpha={alpha:g}$",
            Setting(Pretraining(alpha, lam, activation=activation), Finetuning(1.0, 0.5), _NUMERICS),
            "finetuning.alpha", grid, color, (1.0, 5.0), bayes=True,
        )
        for alpha, color in ((0.03, "C0"), (0.1, "C1"), (0.3, "C2"))
    ]  # fmt: skip
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4))
    panels = {"test_error": left, "overlap": right}
    data = {"figure": number, "curves": _draw(panels, curves, training, progress)}
    title = rf"{activation}, $T=3$, $\kappa_0=\kappa=1$, $\Delta=0.5$, $\lambda={lam:g}$, $\lambda'=0.5$"
    title += "; dashed: Bayes-optimal"
    return _finish(figure, panels, out, f"figure{number}", r"fine-tuning data $\alpha'$", title, data)


def figure2(out, training: Training | None = None, progress: bool = True) -> list[Path]:
    """What pre-training does to fine-tuning, softmax: E' and o_w against alpha', Bayes-optimal limits dashed."""
    return _against_samples(2, "softmax", out, training, progress)


def figure5(out, training: Training | None = None, progress: bool = True) -> list[Path]:
    """Figure 2 for the rescaled identity."""
    return _against_samples(5, "identity", out, training, progress)


def figure3(out, training: Training | None = None, progress: bool = True) -> list[Path]:
    """Fine-tuning inputs from the pre-training set against fresh ones: E' and o_w against lam, best values dashed."""
    pre = Pretraining(0.2, 0.01, kappa0=0.5, tokens=2)
    kinds = (("fresh", {}, "C0"), ("reused", {"inputs": "reused"}, "C1"))
    curves = [
        Curve(label, Setting(pre, Finetuning(3.0, 0.3, **kind), _NUMERICS), "pretraining.lam",
              np.geomspace(3e-3, 0.3, 13), color, (0.01, 0.1))
        for label, kind, color in kinds
    ]  # fmt: skip
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4))
    panels = {"test_error": left, "overlap": right}
    data = {"figure": 3, "curves": _draw(panels, curves, training, progress)}
    for (name, axes), best in zip(panels.items(), (np.nanargmin, np.nanargmax), strict=True):
        for curve, (_, _, color) in zip(data["curves"], kinds, strict=True):
            values = np.array([np.nan if r[name] is None else r[name] for r in curve["rows"]])
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
    pre, grid = Pretraining(0.1, 0.01, delta=0.0), np.geomspace(0.1, 1.5, 7)
    curves = []
    for rho, color in ((0.04, "C0"), (0.02, "C1"), (0.015, "C2")):
        for label, kind, style in (
            (rf"selected, $\rho={rho:g}$", Finetuning(None, 0.5, inputs="selected", rho=rho, pool=100.0), "-"),
            (rf"uniform, $\alpha'={100 * rho:g}$", Finetuning(100 * rho, 0.5), "-."),
        ):
            marked = (0.2, 1.0) if style == "-" else ()
            setting = Setting(pre, kind, _NUMERICS)
            curves.append(Curve(label, setting, "finetuning.lam", grid, color, marked, style=style))
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4))
    panels = {"test_error": left, "overlap": right}
    data = {"figure": 4, "curves": _draw(panels, curves, training, progress)}
    title = (
        r"softmax, $T=3$, $\alpha=0.1$, $\lambda=0.01$, $\Delta=0$, pool $\alpha'_{\rm pool}=100$, score $\|Z_W\|_F^2$"
    )
    return _finish(figure, panels, out, "figure4", r"fine-tuning regularisation $\lambda'$", title, data)


def figure6(out, training: Training | None = None, progress: bool = True) -> list[Path]:
    """Recalibration of the frozen map, Z_W -> b Z_W: E' against b (left), and against lam with and without (right)."""
    figure, axes = plt.subplots(1, 2, figsize=(10, 4))
    base = {
        name: Setting(Pretraining(0.1, 0.1, activation=name), Finetuning(3.0, 0.5), _NUMERICS)
        for name in ("softmax", "identity")
    }
    left = [
        Curve(name, setting, "finetuning.recalibration", np.linspace(0.2, 2.0, 13), color, (0.6, 1.4))
        for (name, setting), color in zip(base.items(), ("C0", "C1"), strict=True)
    ]
    data = {"figure": 6, "against_b": _draw({"test_error": axes[0]}, left, training, progress)}
    for curve, row in zip(left, data["against_b"], strict=True):
        noise = predict(replace(curve.setting, curve.path, "noise"), throw=False)
        row["least_noise"] = {"b": float(noise.finetuning["recalibration"]), "test_error": float(noise.test_error)}
        axes[0].plot(*row["least_noise"].values(), "*", color=curve.color, ms=12)
    axes[0].axvline(1.0, color="0.6", lw=0.8)
    right = [
        Curve(f"{name}, {label}", replace(setting, "finetuning.recalibration", b), "pretraining.lam",
              np.geomspace(0.01, 0.5, 9), color, (0.1,) if b == 1.0 else (), style=style)
        for (name, setting), color in zip(base.items(), ("C0", "C1"), strict=True)
        for label, b, style in (("$b=1$", 1.0, "-"), ("$b=M/Q$", "noise", "-."))
    ]  # fmt: skip
    data["against_lam"] = _draw({"test_error": axes[1]}, right, training, progress)
    axes[0].set(xlabel="factor $b$ on the frozen map (star: $M/Q$)", ylabel="$E'$")
    axes[1].set(xlabel=r"pre-training regularisation $\lambda$", ylabel="$E'$", xscale="log")
    figure.suptitle(
        r"$T=3$, $\alpha=0.1$, $\alpha'=3$, $\kappa_0=\kappa=1$, $\Delta=0.5$, $\lambda'=0.5$; left: $\lambda=0.1$",
        fontsize=9,
    )
    figure.tight_layout()
    return _save(figure, Path(out), "figure6", data)


def spectrum(out, training: Training | None = None, progress: bool = True) -> list[Path]:
    """Predicted density of the learned map, over the eigenvalues of trained ones (D = 300 or as asked)."""
    figure, panels = plt.subplots(1, 2, figsize=(10, 3.8))
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
            from .simulation import simulate

            found = simulate(setting, **training.size, progress=progress)
            values = found.eigenvalues.ravel()
            zero = np.mean(values < 1e-3 * values.max())
            panel["simulation"] = {**training.size, "atom": float(zero),
                                   "moments": [float(values.mean()), float(np.mean(values**2))]}  # fmt: skip
            shown = values[values > 1e-3 * values.max()]
            axes.hist(shown, bins=40, weights=np.full(len(shown), 1 / len(values) / ((shown.max() - shown.min()) / 40)),
                      color="C0", alpha=0.45, label=f"trained, D = {training.dimension}, atom {zero:.3f}")  # fmt: skip
        axes.set(xlabel="eigenvalue of $S$", ylabel="density", title=rf"{name}, $\lambda={lam:g}$", ylim=(0, None))
        axes.legend(fontsize=8)
        data["panels"].append(panel)
    figure.suptitle(r"$T=3$, $\alpha=0.1$, $\kappa_0=\kappa=1$, $\Delta=0.5$", fontsize=9)
    figure.tight_layout()
    return _save(figure, Path(out), "spectrum", data)


def phase(out, training: Training | None = None, progress: bool = True) -> list[Path]:
    """o_w over alpha' and Delta_eff, identity (which sees the channel through Delta_eff alone); thresholds overlaid."""
    from .bayes import weak_recovery_threshold as bayes_threshold
    from .stability import weak_recovery_threshold

    numerics = Numerics(nodes=1024, finetuning_nodes=2048, replicas=4)
    base = Setting(Pretraining(0.3, 0.05, activation="identity", delta=0.01), Finetuning(1.0, 0.5, delta=0.0), numerics)
    gap = float(predict(base).effective_noise)
    noises, alphas = gap + np.geomspace(0.05, 4.0, 7), np.geomspace(0.08, 3.0, 9)
    overlaps = np.full((len(noises), len(alphas)), np.nan)
    learned, best = [], []
    bar = tqdm(total=overlaps.size, desc="theory", unit="solve", disable=not progress)
    for i, noise in enumerate(noises):
        here = replace(base, "finetuning.delta", 2 * float(noise - gap))

        def at(alpha, here=here):
            solution = predict(replace(here, "finetuning.alpha", float(alpha)), throw=False)
            value = float(solution.finetuning["overlap"])
            return (abs(value) if math.isfinite(value) else 0.0) if solution.ok else np.nan

        for j, value in enumerate(together(at, alphas)):
            overlaps[i, j] = value
            bar.update()
        if i % 2 == 0:
            learned.append((float(noise), weak_recovery_threshold(here)))
            best.append((float(noise), bayes_threshold(here.finetuning_resolved, float(noise))))
    bar.close()
    figure, axes = plt.subplots(figsize=(6.2, 4.4))
    axes.set_facecolor("0.8")  # of points that failed
    mesh = axes.pcolormesh(alphas, noises, overlaps, shading="nearest", cmap="viridis", vmin=0, vmax=1)
    figure.colorbar(mesh, label="$o_w$")
    for rows, style, label in (
        (learned, "w-", "weak recovery, trained"),
        (best, "w--", "weak recovery, Bayes-optimal"),
    ):
        axes.plot([r[1] for r in rows], [r[0] for r in rows], style, lw=1.6, label=label)
    axes.set(xscale="log", xlabel=r"fine-tuning data $\alpha'$", ylabel=r"$\Delta_{\rm eff}$",
             xlim=(alphas[0], alphas[-1]), ylim=(noises[0], noises[-1]),
             title=r"identity, $T=3$, $\lambda'=0.5$")  # fmt: skip
    axes.legend(fontsize=8, loc="upper right", facecolor="0.4", labelcolor="w")
    figure.tight_layout()
    data = {
        "figure": "phase", "setting": setting_to_dict(base), "alpha": alphas.tolist(),
        "effective_noise": noises.tolist(),
        "overlap": [[None if np.isnan(v) else float(v) for v in row] for row in overlaps],
        "weak_recovery": learned, "weak_recovery_bayes_optimal": best,
    }  # fmt: skip
    return _save(figure, Path(out), "phase", data)


def rank(out, training: Training | None = None, progress: bool = True) -> list[Path]:
    """E' against the rank r of the update at fixed data, for a teacher of rank two and three numbers of samples."""
    figure, panels = plt.subplots(1, 2, figsize=(10, 4))
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
        r"teacher of rank $r^*=2$ (grey), $T=3$, $\alpha=0.1$, $\kappa_0=\kappa=1$, $\Delta=0.5$, $\lambda'=0.3$; "
        "dotted: replica symmetry unstable", fontsize=9,
    )  # fmt: skip
    figure.tight_layout()
    return _save(figure, Path(out), "rank", data)


#: Figures by name; each takes (out, training, progress).
FIGURES: dict[str, Any] = {
    "1": figure1, "2": figure2, "3": figure3, "4": figure4, "5": figure5, "6": figure6, "spectrum": spectrum,
    "phase": phase, "rank": rank,
}  # fmt: skip


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


def sensitivities(found, optimum, out: Path | str) -> list[Path]:
    """Elasticities of the objective at the optimum, largest first: what a change of one per cent does, in per cent."""
    ordered = sorted(found.elasticities.items(), key=lambda item: abs(item[1]))
    figure, axes = plt.subplots(figsize=(6.2, 0.9 + 0.3 * len(ordered)))
    values = [value for _, value in ordered]
    axes.barh(range(len(ordered)), values, color=["C3" if value > 0 else "C0" for value in values])
    axes.set_yticks(
        range(len(ordered)), [path + (" *" if path in found.over else "") for path, _ in ordered], fontsize=8
    )
    axes.axvline(0, color="k", lw=0.7)
    axes.set(xlabel=f"elasticity of {_LABELS[optimum.minimize]} (* descended)")
    axes.margins(y=0.02)
    figure.tight_layout()
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
    figure, axes = plt.subplots(figsize=(5.6, 4))
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
    figure.tight_layout()
    return _pictures(figure, Path(out), "sweep")
