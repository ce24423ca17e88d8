"""The published figures 1 to 6 of arXiv:2606.05899."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import numpy as np
from scipy.optimize import minimize_scalar
from tqdm import tqdm

from ..bayes.limits import bayes_optimal
from ..design.optimize import optimize
from ..errors import SolveError
from ..predictions import axis_label
from ..runtime.cores import together
from ..setting.files import setting_to_dict
from ..setting.paths import replace
from ..setting.stages import Finetuning, Pretraining, Setting
from ..simulation.simulate import simulate
from ..solution.solution import predict, pretrain
from .curves import NUMERICS, Curve, column, draw_curves, draw_line, finish, scan
from .drawing import ERROR, NOISE, SHARED, Training, draw_square, legend_below, save, side_by_side

_SCALE, _MAP_ERROR = "finetuning.recalibration", "pretraining.test_error"
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
    lowest minima found by training fine-tuning alone, where the first stage has no finite D.
    """
    figure, panels = side_by_side(2, 11, 5.2)
    grids = np.geomspace(5e-3, 0.3, points), np.geomspace(0.01, 3, max(15, points // 2))
    bar = tqdm(total=2 * (2 * len(grids[0]) + len(grids[1])), desc="theory", unit="solve", disable=not progress)
    settings = [Setting(Pretraining(0.1, 0.01, delta=d), Finetuning(alpha=3.0, lam=0.2), NUMERICS) for d in (0.5, 2.0)]
    predict(settings[0], throw=False)  # compiles what both panels share
    # While one of them descends to its optimum, or compiles for itself, the other has the cores.
    found = list(together(lambda s: _panel(s, *grids, bar), settings, alone=False))
    bar.close()
    for axes, setting, panel in zip(panels, settings, found, strict=True):
        delta = panel["delta"]
        _draw_against_ridge(axes, panel)
        _draw_inset(axes.inset_axes((0.14, 0.64, 0.36, 0.33)), panel["inset"])
        if training is not None:
            panel["simulation"] = _squares(axes, setting, training, progress)
        axes.set(
            xscale="log", xlabel=r"pre-training regularisation $\lambda$",
            ylabel=f"fine-tuning test error {axis_label('test_error')}",
            title=rf"softmax, $T=3$, $\alpha=0.1$, $\alpha'=3$, $\kappa_0=\kappa=1$, $\Delta={delta:g}$",
        )  # fmt: skip
        axes.title.set_fontsize(9)
        low, high = axes.get_ylim()
        axes.set_ylim(low, low + (high - low) / _BELOW_INSET)
    legend_below(figure, panels)
    return save(figure, Path(out), "figure1", {"figure": 1, "panels": found})


def _panel(setting: Setting, grid, inset_grid, bar) -> dict[str, Any]:
    """The numbers of one panel of figure 1: its curves and two levels, and the curve of its inset."""
    # First what one core does alone, then what keeps all of them busy.
    path, best, limits = "pretraining.lam", optimize(setting), bayes_optimal(setting)
    curves = {
        f"{ridge:g}": scan(
            replace(setting, "finetuning.lam", ridge), path, grid, ("test_error", "test_error_frozen", _MAP_ERROR), bar,
            symmetric=True,
        )
        for ridge in _RIDGES if ridge is not None
    }  # fmt: skip
    level, error = limits.finetuning["test_error"], limits.errors["finetuning"]["test_error"]
    return {
        "delta": float(setting.pretraining.delta),
        "setting": setting_to_dict(setting),
        "curves": curves,
        "best_for_E": _best_map(setting, path, next(iter(curves.values()))),
        "bayes_optimal": {"test_error": level, "test_error_stderr": error},
        "optimum": {"converged": best.converged, **best.path[-1]},
        "inset": scan(best.setting, "finetuning.lam", inset_grid, ("test_error",), bar, symmetric=True),
    }


def _draw_against_ridge(axes, panel: dict[str, Any]) -> None:
    """E' against lambda for every lambda'; at lambda' = infinity w is zero, whatever the other ridges are."""
    path, top = "pretraining.lam", _BELOW_INSET
    for ridge, color in _RIDGES.items():
        if ridge is not None:
            rows, label = panel["curves"][f"{ridge:g}"], rf"$\lambda'={ridge:g}$"
            draw_line(axes, rows, path, "test_error", color, label, top=top)
        else:
            draw_line(axes, rows, path, "test_error_frozen", color, r"$\lambda'=\infty$", top=top)
    if (best := panel["best_for_E"]) is not None:
        axes.axvline(best, ymax=top, color="k", ls="--", lw=1.0, label=r"$\lambda$ best for $E$")
    axes.axhline(panel["bayes_optimal"]["test_error"], color="0.3", ls="-.", lw=1.0, label="Bayes-optimal $E'$")


def _draw_inset(inset, rows) -> None:
    """E' against lambda' at the lambda that is best for E'."""
    draw_line(inset, rows, "finetuning.lam", "test_error", "k")
    inset.set(xscale="log")
    inset.set_xlabel(r"$\lambda'$", fontsize=8, labelpad=0)
    inset.set_ylabel(axis_label("test_error"), fontsize=8, labelpad=0)
    inset.tick_params(labelsize=7)


def _best_map(setting: Setting, path: str, rows) -> float | None:
    """The lambda that is best for E of pre-training, between the points of a line; None where that is at an end."""

    def error(log_lam):
        there = replace(setting, path, math.exp(log_lam))
        return float(pretrain(there.pretraining, setting.numerics, throw=False).values["test_error"])

    errors = column(rows, _MAP_ERROR)
    best = 0 if np.isnan(errors).all() else int(np.nanargmin(errors))
    if not 0 < best < len(rows) - 1:
        return None
    ends = [math.log(rows[k][path]) for k in (best - 1, best + 1)]
    found = minimize_scalar(error, bounds=ends, method="bounded", options={"xatol": 1e-3})
    return math.exp(found.x) if math.isfinite(found.fun) else None


def _squares(axes, setting: Setting, training: Training, progress: bool) -> list[dict[str, Any]]:
    """Training on the lines of finite lambda': without an update there is nothing to train."""
    found, size = [], training.size(600) | _SEARCH
    pairs = list(itertools.product(np.geomspace(1e-2, 0.1, 3), [ridge for ridge in _RIDGES if ridge is not None]))
    for lam, ridge in tqdm(pairs, desc="simulation", disable=not progress):
        here = replace(replace(setting, "pretraining.lam", float(lam)), "finetuning.lam", ridge)
        result = simulate(here, stage="finetuning", **size)
        if numbers := draw_square(axes, lam, result, "test_error", _RIDGES[ridge], "deep"):
            found.append({"lam": float(lam), "ridge": ridge, **numbers, **size})
    return found


# ---- figures 2 to 6 --------------------------------------------------------------------------------------------


def _against_samples(number: int, activation: str, out, training, progress):
    """E' and o_w against the fine-tuning data alpha', for three sizes of the pre-training set."""
    grid, lam = np.geomspace(0.5, 10, 25), 0.02 if activation == "softmax" else 0.1
    curves = [
        Curve(
            rf"$\alpha={alpha:g}$",
            Setting(Pretraining(alpha, lam, activation=activation), Finetuning(1.0, 0.5), NUMERICS),
            "finetuning.alpha", grid, color, (1.0, 5.0), bayes=True, symmetric=True,
        )
        for alpha, color in ((0.03, "C0"), (0.1, "C1"), (0.3, "C2"))
    ]  # fmt: skip
    figure, (left, right) = side_by_side(2, 10, 4.4)
    panels = {"test_error": left, "overlap": right}
    data = {"figure": number, "curves": draw_curves(panels, curves, training, progress)}
    title = rf"{activation}, $T=3$, $\kappa_0=\kappa=1$, $\Delta=0.5$, $\lambda={lam:g}$, $\lambda'=0.5$"
    return finish(figure, panels, out, f"figure{number}", r"fine-tuning data $\alpha'$", title, data)


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
    # Where the phase changes from point to point the curves are as smooth as the error bars are small.
    fine = NUMERICS.changed(nodes=16384, finetuning_nodes=65536)
    curves = [
        Curve(label, Setting(pre, Finetuning(3.0, 0.3, **kind), fine), "pretraining.lam",
              np.geomspace(3e-3, 0.3, 25), color, (0.01, 0.1), symmetric=True)
        for label, kind, color in kinds
    ]  # fmt: skip
    figure, (left, right) = side_by_side(2, 10, 4.4)
    panels = {"test_error": left, "overlap": right}
    data = {"figure": 3, "curves": draw_curves(panels, curves, training, progress)}
    for (name, axes), best in zip(panels.items(), (np.nanargmin, np.nanargmax), strict=True):
        for curve, (_, _, color) in zip(data["curves"], kinds, strict=True):
            values = column(curve["rows"], name)
            k = int(best(values))
            if 0 < k < len(values) - 1:
                axes.axvline(curve["rows"][k]["pretraining.lam"], color=color, ls="--", lw=0.8)
    title = (
        r"softmax, $T=2$, $\alpha=0.2$, $\alpha'=3$, $\kappa_0=0.5$, $\kappa=1$, $\Delta=0.5$, $\lambda'=0.3$; "
        "dashed: least $E'$, largest $o_w$"
    )
    return finish(figure, panels, out, "figure3", r"pre-training regularisation $\lambda$", title, data)


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
            setting = Setting(pre, kind, NUMERICS)
            curves.append(Curve(label, setting, "finetuning.lam", grid, color, marked, style=style))
    figure, (left, right) = side_by_side(2, 10, 4.4)
    panels = {"test_error": left, "overlap": right}
    data = {"figure": 4, "curves": draw_curves(panels, curves, training, progress)}
    title = (
        r"softmax, $T=3$, $\alpha=0.1$, $\lambda=0.01$, $\Delta=0$, pool $\alpha'_{\rm pool}=100$, score $\|Z_W\|_F^2$"
    )
    return finish(figure, panels, out, "figure4", r"fine-tuning regularisation $\lambda'$", title, data)


def figure6(out, training: Training | None = None, progress: bool = True) -> list[Path]:
    """Recalibration of the frozen map, Z_W -> b Z_W: E' against b (left), and against lam with and without (right)."""
    figure, panels = side_by_side(2, 10, 4.4)
    base = {
        name: Setting(Pretraining(0.1, 0.1, activation=name), Finetuning(3.0, 0.5), NUMERICS)
        for name in ("softmax", "identity")
    }
    left = [
        Curve(name, setting, _SCALE, np.linspace(0.2, 2.0, 25), color, (0.6, 1.4))
        for (name, setting), color in zip(base.items(), ("C0", "C1"), strict=True)
    ]
    data = {"figure": 6, "against_b": draw_curves({"test_error": panels[0]}, left, training, progress)}
    for curve, row in zip(left, data["against_b"], strict=True):
        for choice, label in (("noise", NOISE), ("error", ERROR)):
            row[f"least_{choice}"] = found = _scaled(curve.setting, choice)
            if found["test_error"] is not None:
                style = SHARED[label] | {"color": curve.color, "label": label, "zorder": 4}
                panels[0].plot(found["b"], found["test_error"], **style)
    panels[0].axvline(1.0, color="0.6", lw=0.8)
    right = [
        Curve(label, replace(setting, _SCALE, b), "pretraining.lam", np.geomspace(0.01, 0.5, 25), color,
              (0.1,) if b == 1.0 else (), style=style)
        for (name, setting), color in zip(base.items(), ("C0", "C1"), strict=True)
        for label, b, style in ((name, 1.0, "-"), (f"{name}, always $b=M/Q$", "noise", "-."))
    ]  # fmt: skip
    data["against_lam"] = draw_curves({"test_error": panels[1]}, right, training, progress)
    panels[0].set(xlabel="factor $b$ on the frozen map", ylabel=axis_label("test_error"))
    panels[1].set(xlabel=r"pre-training regularisation $\lambda$", ylabel=axis_label("test_error"), xscale="log")
    figure.suptitle(
        r"$T=3$, $\alpha=0.1$, $\alpha'=3$, $\kappa_0=\kappa=1$, $\Delta=0.5$, $\lambda'=0.5$; left: $\lambda=0.1$; "
        "right, solid: $b=1$", fontsize=9,
    )  # fmt: skip
    legend_below(figure, panels)
    return save(figure, Path(out), "figure6", data)


def _scaled(setting: Setting, choice: str) -> dict[str, Any]:
    """The b of a choice ("noise": M/Q, "error": that of least E') and the E' that it leads to."""
    try:
        solution = predict(replace(setting, _SCALE, choice))
    except SolveError as error:
        return {"b": None, "test_error": None, "code": str(error)}
    return {"b": float(solution.finetuning["recalibration"]), "test_error": float(solution.test_error), "code": "ok"}
