"""What a verification has found: a row for every quantity, and a verdict."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from ..predictions import prediction
from ..setting.stages import Setting
from ..solution.solution import Solution
from .extrapolation import Law

#: The ways of training: both stages of the whole model, and fine-tuning alone on the channel that the theory assumes.
WAYS = {"whole": "whole model", "alone": "fine-tuning alone"}
#: A quantity differs where it is off by more than so many standard errors, and by more than this share of its value.
SIGMAS, SHARE = 4.0, 0.02


class Row(NamedTuple):
    """One quantity, trained one way.

    `theory` with its quadrature error; `law`, the fit in 1/D; `gap` = (limit - theory) over their standard errors
    together; `rate` and its error: how training approaches the theory, D^-rate; `spread`: in a glass, how far minima
    reached from w* are from the lowest, which the theory speaks of. `verdict`: "agrees", "differs", or why it is not
    judged.
    """

    way: str
    stage: str
    name: str
    theory: float
    theory_error: float
    law: Law
    rate: float
    rate_error: float
    spread: float
    verdict: str

    @property
    def column(self) -> str:
        """What its runs are called in `Verification.samples`: of fine-tuning alone those of the lowest minima."""
        return f"{'deep' if self.way == 'alone' else self.stage}.{self.name}"

    @property
    def gap(self) -> float:
        bar = math.hypot(self.law.limit_error, self.theory_error)
        return (self.law.limit - self.theory) / bar if bar > 0 else math.nan

    @property
    def share(self) -> float:
        """The gap as a share of the theory's value."""
        return self.law.limit / self.theory - 1 if self.theory else math.nan

    def summary(self) -> dict[str, Any]:
        """Plain values."""
        flat = {key: value for key, value in self._asdict().items() if key != "law"}
        return {**flat, **self.law._asdict(), "gap": self.gap, "share": self.share}


def judged(row: Row, why_not: str) -> Row:
    """The row with its verdict; `why_not`: why it is not judged, or ""."""
    if why_not:
        return row._replace(verdict=why_not)
    far = abs(row.law.limit - row.theory) > SHARE * abs(row.theory) + row.spread
    return row._replace(verdict="differs" if far and abs(row.gap) > SIGMAS else "agrees")


@dataclass(frozen=True, eq=False)
class Verification:
    """Theory against training as a law in D.

    `rows`: every quantity; `samples[way][name]`: {D: values of the runs that converged}; `failed[way]`: how many runs
    did not; `runs[way]`: {D: how many were made}; `solution`: the theory.
    """

    setting: Setting
    solution: Solution
    rows: tuple[Row, ...]
    samples: Mapping[str, Mapping[str, Mapping[int, np.ndarray]]]
    runs: Mapping[str, Mapping[int, int]]
    failed: Mapping[str, int]
    seed: int

    @property
    def stands(self) -> bool:
        """Whether something was judged, and nothing differs."""
        verdicts = [row.verdict for row in self.rows]
        return "agrees" in verdicts and "differs" not in verdicts

    @property
    def verdict(self) -> str:
        """One sentence."""
        agree = [row for row in self.rows if row.verdict == "agrees"]
        differ = [row for row in self.rows if row.verdict == "differs"]
        if not agree and not differ:
            return "Nothing could be judged: no quantity has both a theory and training at two D."

        def named(row: Row) -> str:
            symbol = prediction(row.stage, row.name).symbol
            return f"{symbol} ({WAYS[row.way]}: {100 * row.share:+.1f} %, {row.gap:+.1f} standard errors)"

        if differ:
            worst = sorted(differ, key=lambda row: -abs(row.gap))[:3]
            return (
                f"The theory does not stand: {len(differ)} of {len(agree) + len(differ)} quantities differ, "
                + ("most of all " if len(differ) > 3 else "")
                + "; ".join(map(named, worst))
                + "."
            )
        known = [row.law.limit_error / abs(row.theory) for row in agree if row.theory]
        text = (
            f"The theory stands: all {len(agree)} quantities agree with training extrapolated in D, which knows them "
            f"to {100 * float(np.median(known)):.1f} % (median)"
        )
        wide = [row for row in agree if abs(row.law.limit - row.theory) > SHARE * abs(row.theory)]
        within = [row for row in wide if abs(row.gap) > SIGMAS]
        if within:
            text += f"; {', '.join(map(named, within))} within the spread of the minima of a glass"
        elif wide:
            text += f"; farthest is {named(max(agree, key=lambda row: abs(row.gap)))}"
        return text + "."

    def summary(self) -> dict[str, Any]:
        """Plain numbers and words: rows, runs, verdict."""
        return {
            "verdict": self.verdict,
            "stands": self.stands,
            "symmetry": self.solution.symmetry,
            "rows": [row.summary() for row in self.rows],
            "runs": {way: {str(d): n for d, n in runs.items()} for way, runs in self.runs.items()},
            "failed": dict(self.failed),
            "seed": self.seed,
        }
