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


@dataclass
class Figure:
    """Reproduce a figure of arXiv:2606.05899, or draw the learned spectrum, the phase diagram, E' against the rank."""

    which: Annotated[Positional[str], arg(metavar="WHICH", help="1 to 6, spectrum, phase, rank, or all (but rank).")]
    simulate: Annotated[bool, arg(help="Add finite-size simulations to the theory lines.")] = False
    dimension: Annotated[int | None, arg(help="D of the simulated model (150; 300 for the spectrum).")] = None
    runs: Runs = 4
    out: Annotated[Path, arg(help="Directory for the figure.")] = Path("results")

    def __call__(self) -> int:
        from ..errors import SettingError

        figures = drawing()
        # Every rank is a program of its own: that figure alone would take a third of the time of all.
        names = [n for n in figures.FIGURES if n != "rank"] if self.which == "all" else [self.which]
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
