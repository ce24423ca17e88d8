"""Optima on a grid: at every point of a sweep some fields are descended to where an objective is lowest."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from ..design.descent import End, check_over
from ..design.optimize import optimize
from ..design.optimum import Optimum
from ..errors import SettingError, SolveError
from ..setting.paths import replace_all
from ..setting.stages import Setting
from ..solution.gradients import SCALE, check_objective, searches_scale
from ..solution.solution import predict
from .chunks import columns_of

#: How the names of what belongs to a descent begin in a row: the fields found, and how it ended.
OPTIMUM = "optimum."
#: What is said of every descent: the norm of its gradient (in logarithms of the fields, over the objective), whether
#: that is an optimum, the place of its `End` in the list of them, and how many solves it took.
ENDS = ("gradient_norm", "converged", "end", "solves")


class Descents(NamedTuple):
    """What is descended at every point of a grid: the fields `over`, to where `minimize` is lowest."""

    over: tuple[str, ...]
    minimize: str

    @staticmethod
    def of(over: Sequence[str], minimize: str, axes: Mapping[str, Any]) -> Descents:
        """Raises `SettingError` for fields that are not there to be descended."""
        if isinstance(over, str) or not over:
            raise SettingError(f"optimize = {over!r} names no fields; allowed: a list such as ['pretraining.lam']")
        for path in over:
            if path in axes:
                raise SettingError(f"optimize names {path}, which is an axis of the grid; allowed: one of them")
        return Descents(tuple(dict.fromkeys(over)), check_objective(minimize))

    def check(self, setting: Setting) -> None:
        """Raises `SettingError` where a point does not have the fields, or finds one of them by itself."""
        check_over(setting, self.over)
        if searches_scale(setting):
            raise SettingError(f'finetuning.recalibration = "error" is an optimum itself; allowed: {SCALE} in optimize')

    @property
    def columns(self) -> list[str]:
        return [OPTIMUM + name for name in (*self.over, *ENDS)]

    def row(self, setting: Setting, before: Mapping[str, float] | None) -> dict[str, float]:
        """Every prediction at the optimum, the fields there and how the descent ended; from where it was `before`, at a
        neighbour, or else, and where that leads nowhere, from the setting itself."""
        found = None
        for start in ([] if before is None else [replace_all(setting, before)]) + [setting]:
            try:
                tried = optimize(start, self.over, self.minimize)
            except SolveError:
                continue
            found = tried if found is None or _rank(tried) < _rank(found) else found
            if found.converged:
                break
        if found is None:
            solution = predict(setting, throw=False)
            nothing = dict.fromkeys(self.columns, math.nan) | {f"{OPTIMUM}converged": 0.0}
            return columns_of(solution.values, solution.errors, solution.status) | nothing
        after = found.after
        fields = {OPTIMUM + path: found.path[-1][path] for path in self.over}
        ends = found.gradient_norm, found.converged, list(End).index(found.end), found.solves
        row = columns_of(after.values, after.errors, after.status)
        return row | fields | {OPTIMUM + name: float(x) for name, x in zip(ENDS, ends, strict=True)}

    def neighbour(self, index: int, shape: tuple[int, ...], columns: list[str], rows: Mapping[int, np.ndarray]):
        """The fields at the optimum of the nearest point on the way to the first one, if there is any."""
        while index:
            index = before(index, shape)
            if index in rows:
                row = dict(zip(columns, rows[index].tolist(), strict=True))
                if row[f"{OPTIMUM}converged"] == 1.0:
                    return {path: row[OPTIMUM + path] for path in self.over}
        return None


def before(index: int, shape: tuple[int, ...]) -> int:
    """The point before one on its way to the first: a step back along the last axis on which there is one."""
    place = list(np.unravel_index(index, shape))
    k = max(k for k, at in enumerate(place) if at)
    place[k] -= 1
    return int(np.ravel_multi_index(place, shape))


def _rank(found: Optimum) -> tuple[bool, float]:
    return not found.converged, found.path[-1]["value"]
