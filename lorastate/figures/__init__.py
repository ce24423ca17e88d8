"""Figures: solid lines are theory, in both phases; thin dotted ones what replica symmetry would say where it is
unstable. Squares with error bars are training.

Every figure writes PNG, PDF and one JSON file with its data, settings, seed and error bars. A point whose solve fails
is left out of its line; its row says the code. No figure needs or changes the backend that a user has chosen.
"""

from typing import Any

from .designs import optimization, sensitivities, sweep
from .drawing import Training
from .evidence import verification
from .maps import phase, rank, spectrum
from .published import figure1, figure2, figure3, figure4, figure5, figure6
from .questions import decay, factor, forgetting

#: Figures by name; each takes (out, training, progress).
FIGURES: dict[str, Any] = {
    "1": figure1, "2": figure2, "3": figure3, "4": figure4, "5": figure5, "6": figure6, "spectrum": spectrum,
    "phase": phase, "rank": rank, "forgetting": forgetting, "factor": factor, "decay": decay,
}  # fmt: skip

__all__ = [
    "FIGURES", "Training", "decay", "factor", "figure1", "figure2", "figure3", "figure4", "figure5", "figure6",
    "forgetting", "optimization", "phase", "rank", "sensitivities", "spectrum", "sweep", "verification",
]  # fmt: skip
