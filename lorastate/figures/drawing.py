"""Panels, legends, files and the squares of training: what every figure is made of."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from .._version import __version__
from ..errors import SolveError

#: Legend entries that are the same for lines and markers of several colours.
SYMMETRIC, BAYES, MINIMUM = "replica symmetric, unstable", "Bayes-optimal", "minimum"
NOISE, ERROR = "$b=M/Q$", "best $b$"
ALONG_FACTOR = r"along $c$, at the best $\lambda'$"
SHARED: dict[str, dict[str, Any]] = {
    SYMMETRIC: {"color": "0.3", "lw": 1.0, "ls": ":"},
    BAYES: {"color": "0.3", "lw": 1.2, "ls": "--"},
    MINIMUM: {"color": "darkred", "lw": 0.8, "ls": "--"},
    ALONG_FACTOR: {"color": "0.3", "lw": 1.2, "ls": "--"},
    NOISE: {"color": "0.6", "ls": "", "marker": "*", "ms": 12, "mec": "k", "mew": 0.6},
    ERROR: {"color": "0.6", "ls": "", "marker": "D", "ms": 6, "mec": "k", "mew": 0.6},
}
_SQUARE: dict[str, Any] = {"marker": "s", "ms": 4.5, "mfc": "white", "color": "0.3", "ls": ""}


def side_by_side(count: int, width: float, height: float) -> tuple[Figure, Any]:
    """A figure and its panels side by side (one that is the only one by itself), without a global backend."""
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(1, count)


def legend_below(figure: Figure, panels) -> None:
    """One legend below all panels: inside them there is no place that no curve runs through."""
    entries: dict[str, Any] = {}
    for axes in panels:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            style = _SQUARE if label.startswith("training") else SHARED.get(label)
            entries.setdefault(label, Line2D([], [], **style) if style else handle)
    labels = sorted(entries, key=lambda label: label in SHARED)  # lines first
    columns = -(-len(labels) // -(-len(labels) // 5))
    handles = [entries[label] for label in labels]
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, fontsize=8)


def finite(value: Any) -> float | None:
    """The number as figures and JSON, which has no NaN, take it: None where there is none."""
    return float(value) if math.isfinite(value) else None


def save(figure, out: Path, name: str, data: dict[str, Any]) -> list[Path]:
    out.mkdir(parents=True, exist_ok=True)
    numbers = out / f"{name}.json"
    paths = [*save_pictures(figure, out, name), numbers]
    numbers.write_text(json.dumps({**data, "version": __version__}, indent=1, allow_nan=False))
    return paths


def save_pictures(figure, out: Path, name: str) -> list[Path]:
    """The figure as PNG and PDF."""
    paths = [out / f"{name}.{kind}" for kind in ("png", "pdf")]
    for path in paths:
        figure.savefig(path, dpi=150, bbox_inches="tight")
    return paths


@dataclass
class Training:
    """How simulation markers are made: at which D (None: what suits the figure), from how many runs."""

    dimension: int | None = None
    runs: int = 4
    memory: dict = field(default_factory=dict)

    def size(self, usual: int = 150) -> dict[str, Any]:
        """Its arguments to `simulate`, as they go into the figure's data."""
        return {"dimension": self.dimension or usual, "runs": self.runs, "seed": 0}


def draw_square(axes, x, result, name: str, color, search: str = "finetuning") -> dict[str, float | None] | None:
    """A simulation marker with its error bar, and its numbers; a training that did not converge is left out, never
    averaged: then None."""
    try:
        mean, err = result.mean(search, name), result.stderr(search, name)
    except SolveError:
        return None
    label = f"training, D = {result.dimension}"
    axes.errorbar(x, mean, err, fmt="s", ms=4.5, mfc="white", color=color, capsize=2, zorder=5, label=label)
    return {"mean": mean, "stderr": finite(err)}
