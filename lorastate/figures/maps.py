"""What the theory looks like beyond the published figures: learned spectrum, phase diagram, E' against the rank."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from ..bayes.finetuning import bayes_optimal_threshold
from ..diagnosis import thresholds
from ..errors import SettingError, SolveError
from ..predictions import axis_label
from ..setting.files import setting_to_dict
from ..setting.numerics import Numerics
from ..setting.paths import replace
from ..setting.stages import Finetuning, Pretraining, Setting
from ..simulation.simulate import simulate
from ..solution.solution import predict, pretrain
from .curves import NUMERICS, Curve, column, draw_curves, scan
from .drawing import Training, legend_below, save, side_by_side


def spectrum(out, training: Training | None = None, progress: bool = True) -> list[Path]:
    """Predicted density of the learned map, over the eigenvalues of trained ones (D = 300 or as asked)."""
    figure, panels = side_by_side(2, 10, 4.2)
    data: dict[str, Any] = {"figure": "spectrum", "panels": []}
    for axes, (name, lam) in zip(panels, (("identity", 0.1), ("softmax", 0.01)), strict=True):
        setting = Setting(Pretraining(0.1, lam, activation=name), Finetuning(3.0, 0.5), NUMERICS)
        law = pretrain(setting.pretraining, NUMERICS).spectrum
        edges = np.asarray(law.edges)
        x = np.linspace(1e-3, float(np.nanmax(edges)) * 1.05, 300)
        density = np.asarray(law.density(x))
        panel: dict[str, Any] = {
            "setting": setting_to_dict(setting), "x": x.tolist(), "density": density.tolist(),
            "atom": float(law.atom), "moments": [float(law.moment1), float(law.moment2)],
            "edge": float(np.nanmax(edges)),
        }  # fmt: skip
        axes.plot(x, density, "k", lw=1.8, label=f"theory, atom at 0: {float(law.atom):.3f}")
        if training is not None:
            found = simulate(setting, **training.size(300), progress=progress)
            values = found.eigenvalues.ravel()
            zero = np.mean(values < 1e-3 * values.max())
            panel["simulation"] = {**training.size(300), "atom": float(zero),
                                   "moments": [float(values.mean()), float(np.mean(values**2))],
                                   "largest": found.eigenvalues.max(-1).ravel().tolist()}  # fmt: skip
            shown = values[values > 1e-3 * values.max()]
            axes.hist(shown, bins=40, weights=np.full(len(shown), 1 / len(values) / ((shown.max() - shown.min()) / 40)),
                      color="C0", alpha=0.45, label=f"trained, D = {found.dimension}, atom {zero:.3f}")  # fmt: skip
        axes.set(xlabel="eigenvalue of $S$", ylabel="density", title=rf"{name}, $\lambda={lam:g}$", ylim=(0, None))
        axes.legend(fontsize=8)
        data["panels"].append(panel)
    figure.suptitle(r"$T=3$, $\alpha=0.1$, $\kappa_0=\kappa=1$, $\Delta=0.5$", fontsize=9)
    return save(figure, Path(out), "spectrum", data)


def phase(out, training: Training | None = None, progress: bool = True) -> list[Path]:
    """o_w over alpha' and Delta_eff, identity (which sees the channel through Delta_eff alone), with the thresholds of
    weak recovery and the line on which replica symmetry breaks."""
    numerics = Numerics(nodes=2048, finetuning_nodes=8192, replicas=4)
    base = Setting(Pretraining(0.3, 0.05, activation="identity", delta=0.01), Finetuning(1.0, 0.5, delta=0.0), numerics)
    gap = float(predict(base).effective_noise)
    noises, alphas = gap + np.geomspace(0.05, 4.0, 9), np.geomspace(0.08, 3.0, 15)
    rows, lines = [], {"weak_recovery": [], "weak_recovery_bayes_optimal": [], "instability": []}
    bar = tqdm(total=len(noises) * len(alphas), desc="theory", unit="solve", disable=not progress)
    for i, noise in enumerate(map(float, noises)):
        here = replace(base, "finetuning.delta", 2 * (noise - gap))
        row = scan(here, "finetuning.alpha", alphas, ("overlap",), bar)
        rows.append(row)
        lines["instability"] += [(noise, alpha) for alpha in _breaks(here, "finetuning.alpha", row)]
        if i % 2 == 0:
            lines["weak_recovery"].append((noise, _threshold(here)))
            lines["weak_recovery_bayes_optimal"].append(
                (noise, bayes_optimal_threshold(here.finetuning_resolved, noise))
            )
    bar.close()
    overlaps = np.abs([column(row, "overlap") for row in rows])
    figure, axes = side_by_side(1, 6.4, 5.0)
    axes.set_facecolor("0.8")  # of points that failed
    mesh = axes.pcolormesh(alphas, noises, overlaps, shading="gouraud", cmap="viridis", vmin=0, vmax=1)
    figure.colorbar(mesh, label=axis_label("overlap"))
    # Where symmetry comes back along a line there are more places than one: a line through all would lead nowhere.
    joined = "-" if [noise for noise, _ in lines["instability"]] == noises.tolist() else ""
    for name, style, label in (
        ("weak_recovery", {"color": "w"}, "weak recovery, trained"),
        ("weak_recovery_bayes_optimal", {"color": "w", "ls": "--"}, "weak recovery, Bayes-optimal"),
        (
            "instability",
            {"color": "C1", "ls": joined, "marker": "o", "ms": 4, "clip_on": False},
            "replica symmetry breaks",
        ),
    ):
        found = [pair for pair in lines[name] if pair[1] is not None]
        axes.plot([alpha for _, alpha in found], [noise for noise, _ in found], lw=1.6, label=label, **style)
    axes.set(xscale="log", yscale="log", xlabel=r"fine-tuning data $\alpha'$", ylabel=axis_label("effective_noise"),
             xlim=(alphas[0], alphas[-1]), ylim=(noises[0], noises[-1]),
             title=r"identity, $T=3$, $\lambda'=0.5$")  # fmt: skip
    figure.legend(fontsize=8, loc="outside lower center", ncols=3, facecolor="0.5", labelcolor="w")
    data = {"figure": "phase", "setting": setting_to_dict(base), "effective_noise": noises.tolist(), "rows": rows}
    return save(figure, Path(out), "phase", data | lines)


def _breaks(setting: Setting, path: str, rows) -> list[float]:
    """Where along the points of a line symmetry breaks or is restored; points that were not solved are passed over."""
    places = []
    for row, after in itertools.pairwise(row for row in rows if row["broken"] is not None):
        if row["broken"] != after["broken"]:
            low, high = row[path], after[path]
            try:
                places.append(thresholds.instability_threshold(setting, path, low, high, rtol=0.02))
            except (SettingError, SolveError):  # a solve between them failed: known to one step of the grid
                places.append(math.sqrt(low * high))
    return places


def _threshold(setting: Setting) -> float | None:
    """alpha' of weak recovery; None where it is not found."""
    try:
        return thresholds.weak_recovery_threshold(setting)
    except (SettingError, SolveError):
        return None


def rank(out, training: Training | None = None, progress: bool = True) -> list[Path]:
    """E' against the rank r of the update at fixed data, for a teacher of rank two and three numbers of samples."""
    figure, panels = side_by_side(2, 10, 4.4)
    data: dict[str, Any] = {"figure": "rank"}
    numerics, ranks = Numerics(nodes=4096, finetuning_nodes=8192, replicas=8), np.arange(1, 5)
    for axes, (name, lam) in zip(panels, (("identity", 0.1), ("softmax", 0.02)), strict=True):
        pre = Pretraining(0.1, lam, activation=name)
        curves = [
            Curve(rf"$\alpha'={alpha:g}$", Setting(pre, Finetuning(alpha, 0.3, teacher_rank=2), numerics),
                  "finetuning.rank", ranks, color, (1, 2, 3, 4))
            for alpha, color in ((1.0, "C0"), (3.0, "C1"), (10.0, "C2"))
        ]  # fmt: skip
        data[name] = draw_curves({"test_error": axes}, curves, training, progress)
        for line in axes.lines:
            line.set(marker="o", ms=4)  # there is nothing between whole ranks
        axes.set(xlabel="rank $r$ of the update", ylabel=axis_label("test_error"), xticks=ranks,
                 title=rf"{name}, $\lambda={lam:g}$")  # fmt: skip
        axes.axvline(2, color="0.6", lw=0.8)
    figure.suptitle(
        r"teacher of rank $r^*=2$ (grey), $T=3$, $\alpha=0.1$, $\kappa_0=\kappa=1$, $\Delta=0.5$, $\lambda'=0.3$",
        fontsize=9,
    )
    legend_below(figure, panels)
    return save(figure, Path(out), "rank", data)
