"""What the results of all trainings share: means over the runs that converged."""

from __future__ import annotations

import abc
from collections.abc import Mapping
from typing import ClassVar

import numpy as np

from ..errors import Code, SettingError, SolveError


class Runs(abc.ABC):
    """Tables {part: {name: one value per run}}, where a part is a stage or a search, and how its trainings ended."""

    #: What a part is called in a sentence, and the stage that its trainings are of (None: itself).
    PART: ClassVar[str] = "stage"
    STAGE: ClassVar[str | None] = None
    codes: dict[str, tuple[Code, ...]]

    @property
    @abc.abstractmethod
    def tables(self) -> Mapping[str, dict[str, np.ndarray]]:
        """What was measured, by part and name."""

    def converged(self, part: str) -> np.ndarray:
        """In which runs a part has reached a stationary point, (runs,) of bool."""
        if part not in self.tables:
            raise SettingError(f"{self.PART} = {part!r} is unknown; allowed: {', '.join(self.tables)}")
        return np.array([code == Code.ok for code in self.codes[part]])

    def _sample(self, part: str, name: str, only_converged: bool) -> np.ndarray:
        good, table = self.converged(part), self.tables[part]
        if name not in table:
            raise SettingError(f"name = {name!r} is unknown; allowed: {', '.join(table)}")
        if not good.all() and not only_converged:
            bad = np.flatnonzero(~good)
            whose = f"{part} {self.PART}, " if self.STAGE else ""
            where = f"{whose}in runs {bad.tolist()} of {len(good)}; only_converged=True leaves them out"
            raise SolveError(self.STAGE or part, self.codes[part][bad[0]], where)
        return table[name][good]

    def mean(self, part: str, name: str, only_converged: bool = False) -> float:
        """Mean over runs; `SolveError` if one did not converge, unless `only_converged` leaves it out."""
        sample = self._sample(part, name, only_converged)
        return float(np.mean(sample)) if len(sample) else np.nan

    def stderr(self, part: str, name: str, only_converged: bool = False) -> float:
        """Standard error of `mean` (ddof = 1); NaN for fewer than two runs."""
        sample = self._sample(part, name, only_converged)
        return float(np.std(sample, ddof=1) / np.sqrt(len(sample))) if len(sample) > 1 else np.nan

    def summary(self, only_converged: bool = False) -> dict[str, dict[str, dict[str, float | None]]]:
        """{part: {name: {"mean", "stderr"}}} of plain floats, None where undefined."""

        def entry(part: str, name: str) -> dict[str, float | None]:
            pair = {"mean": self.mean, "stderr": self.stderr}
            values = {key: method(part, name, only_converged) for key, method in pair.items()}
            return {key: x if np.isfinite(x) else None for key, x in values.items()}

        return {part: {name: entry(part, name) for name in table} for part, table in self.tables.items()}
