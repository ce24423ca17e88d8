"""What a design search has found: settings and solutions before and after, and how it got there."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from ..setting.stages import Setting
from ..solution.solution import Solution
from .descent import End


@dataclass
class Optimum:
    """Result of `optimize`: settings and solutions before and after, and the path between.

    `budgets`: for each budget its text, whether it `binds`, by how much it is exceeded, and its `price`: the multiplier
    mu of d objective + mu d excess = 0, that is the improvement of the objective per unit by which the budget is
    relaxed. `gradient_norm` is what of the gradient (in the descended coordinates, over the size of the objective) the
    binding budgets leave. `end` says how the descent ended, `message` in a sentence. `slopes`: total derivatives of the
    objective by every continuous field. `scanned`: one entry for each choice of the discrete fields, if any were
    scanned.
    """

    over: tuple[str, ...]
    minimize: str
    initial: Setting
    setting: Setting
    before: Solution
    after: Solution
    gradient_norm: float
    solves: int
    converged: bool
    message: str
    end: End
    path: list[dict[str, float]] = field(default_factory=list)
    slopes: dict[str, float] = field(default_factory=dict)
    budgets: list[dict[str, Any]] = field(default_factory=list)
    scanned: list[dict[str, Any]] = field(default_factory=list)

    def summary(self) -> dict[str, Any]:
        """Plain numbers for JSON."""
        return {
            "over": list(self.over),
            "minimize": self.minimize,
            "converged": self.converged,
            "message": self.message,
            "gradient_norm": self.gradient_norm,
            "solves": self.solves,
            "before": self.before.summary(),
            "after": self.after.summary(),
            "budgets": self.budgets,
            "scanned": self.scanned,
            "path": self.path,
        }
