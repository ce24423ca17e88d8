"""The command `figure`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

from .checks import check_sizes, directory
from .environment import drawing
from .options import Runs
from .output import cannot_write, say

#: Figures that are not part of all: each takes some minutes.
_ALONE = ("rank", "forgetting", "factor", "decay")


@dataclass
class Figure:
    """Reproduce a figure of arXiv:2606.05899, or draw the learned spectrum, the phase diagram, E' against the rank,
    what is forgotten, the factor on the update, the best ridges."""

    which: Annotated[
        Positional[str],
        arg(metavar="WHICH", help="1 to 6, spectrum, phase, rank, forgetting, factor, decay, or all (1 to phase)."),
    ]
    simulate: Annotated[bool, arg(help="Add finite-size simulations to the theory lines.")] = False
    dimension: Annotated[int | None, arg(help="D of the simulated model (150; 300 for the spectrum).")] = None
    runs: Runs = 4
    out: Annotated[Path, arg(help="Directory for the figure.")] = Path("results")

    def __call__(self) -> int:
        from ..errors import SettingError

        figures = drawing()
        names = [n for n in figures.FIGURES if n not in _ALONE] if self.which == "all" else [self.which]
        if not set(names) <= set(figures.FIGURES):
            raise SettingError(f"figure {self.which} is not available; allowed: {', '.join(figures.FIGURES)}, all")
        if self.simulate:
            check_sizes(150 if self.dimension is None else self.dimension, self.runs)
        out = directory(self.out)
        for name in names:
            training = figures.Training(self.dimension, self.runs) if self.simulate else None
            try:
                written = figures.FIGURES[name](out, training, progress=True)
            except OSError as error:
                raise SettingError(cannot_write(out, error)) from None
            say("written: " + ", ".join(str(path) for path in written))
        return 0
