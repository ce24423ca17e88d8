"""Theory beside training as a law in D: a panel for every quantity of a verification."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from ..predictions import prediction
from ..verification.extrapolation import points
from ..verification.result import WAYS, Row, Verification
from .drawing import legend_below, save_pictures

_COLOURS, _MARKS = {"whole": "C0", "alone": "C3"}, {"whole": "s", "alone": "o"}
_ACROSS = 4


def verification(found: Verification, out: Path | str) -> list[Path]:
    """Means over runs against 1/D, the law that was fitted through them, and the theory at 1/D = 0."""
    panels: dict[tuple[str, str], list[Row]] = {}
    for row in found.rows:
        panels.setdefault((row.stage, row.name), []).append(row)
    across = min(_ACROSS, max(len(panels), 1))
    down = -(-len(panels) // across) or 1
    figure = Figure(figsize=(3.1 * across, 2.3 * down + 0.5), layout="constrained")
    axes = figure.subplots(down, across, squeeze=False).ravel()
    for (stage, name), panel in zip(panels, axes, strict=False):
        _panel(panel, found, panels[stage, name])
        row = prediction(stage, name)
        panel.set_title(row.label or row.symbol, fontsize=9)
    for panel in axes[len(panels) :]:
        panel.set_axis_off()
    for panel in axes[max(len(panels) - across, 0) : len(panels)]:
        panel.set_xlabel("$1/D$")
    legend_below(figure, axes[: len(panels)])
    return save_pictures(figure, Path(out), "verify")


def _panel(axes: Any, found: Verification, rows: list[Row]) -> None:
    for row in rows:
        colour, mark = _COLOURS[row.way], _MARKS[row.way]
        known = points(found.samples[row.way][row.column])
        assert known is not None  # a row has a law through them
        size, means, bars = known
        label = f"{WAYS[row.way]}, trained"
        axes.errorbar(1 / size, means, bars, fmt=mark, ms=4, mfc="white", color=colour, capsize=2, label=label)
        x = np.linspace(0, 1 / row.law.smallest, 50)
        axes.plot(x, row.law.limit + row.law.slope * x**row.law.power, color=colour, lw=0.9)
    first = rows[0]
    axes.errorbar(0, first.theory, first.theory_error, fmt="*", ms=11, color="k", capsize=2, zorder=5, label="theory")
    axes.set_xlim(left=-0.0007)
    axes.tick_params(labelsize=7)
    axes.locator_params(axis="x", nbins=4)
    if any(row.verdict == "differs" for row in rows):
        axes.set_facecolor("#fff0f0")
