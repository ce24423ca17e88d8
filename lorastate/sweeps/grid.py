"""Grids of settings: what an axis says, as plain values, and the points that axes span."""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from ..errors import SettingError
from ..setting.paths import get, parse_value
from ..setting.stages import Setting

#: Points of a grid, and values of an axis: all of them are made into settings before the first is solved.
_MOST = 10**6


def parse_axis(text: str, option: str = "grid") -> tuple[str, list[Any]]:
    """Path and values of "pretraining.lam=log:1e-3:1:64", "...=lin:0:1:11" or "...=0.5,1,2"."""
    path, equals, words = text.partition("=")
    path, words = path.strip(), words.strip()
    if not equals or not words:
        raise SettingError(
            f"{option} {text!r} has no values; allowed: path=log:low:high:count, path=lin:..., path=a,b,c"
        )
    kind, *numbers = words.split(":")
    if not numbers:
        return path, [parse_value(path, word.strip()) for word in words.split(",") if word.strip()]
    try:
        low, high, count = float(numbers[0]), float(numbers[1]), int(numbers[2])
        good = (
            len(numbers) == 3 and kind in ("log", "lin") and 1 <= count <= _MOST and math.isfinite(abs(low) + abs(high))
        )
    except (ValueError, IndexError):
        good = False
    if not good:
        raise SettingError(
            f"{option} {text!r} is not readable; allowed: path=log:low:high:count (count from 1 to {_MOST:,}), "
            "path=lin:..., path=a,b,c"
        )
    if kind == "log" and not min(low, high) > 0:
        raise SettingError(
            f"{option} {text!r} has a bound at or below zero; allowed: log:low:high:count with both above"
        )
    return path, (np.geomspace if kind == "log" else np.linspace)(low, high, count).tolist()


def plain_axes(setting: Setting, grid: Mapping[str, Iterable[Any]]) -> dict[str, list[Any]]:
    """The axes as plain values; those of a whole number may come as floats, as log:... and lin:... make them."""
    if not grid:
        raise SettingError("the grid is empty; allowed: at least one path with its values, as pretraining.lam")
    axes = {}
    for path, values in grid.items():
        if isinstance(values, str | bytes) or not isinstance(values, Iterable):
            raise SettingError(f"grid {path} = {values!r} is not a list of values; allowed: numbers or words")
        plain: list[Any] = [v.item() if hasattr(v, "item") else v for v in values]
        if not plain:
            raise SettingError(f"grid {path} has no values; allowed: at least one")
        for value in plain:
            if not isinstance(value, int | float | str):
                raise SettingError(f"grid {path} has a value {value!r}; allowed: numbers or words")
        if len(set(plain)) < len(plain):
            raise SettingError(f"grid {path} names a value more than once; allowed: each value once")
        axes[path] = [round(v) for v in plain] if _counts(setting, path) and all(map(_is_whole, plain)) else plain
    count = math.prod(map(len, axes.values()))
    if count > _MOST:
        raise SettingError(f"the grid has {count:,} points; allowed: at most {_MOST:,}")
    return axes


def _counts(setting: Setting, path: str) -> bool:
    """Whether a field is a whole number."""
    try:
        return isinstance(get(setting, path), int)
    except SettingError:  # it has a meaning at the other points
        return False


def _is_whole(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value) and math.isclose(value, round(value), rel_tol=1e-12)


def point(axes: Mapping[str, list[Any]], index: int) -> dict[str, Any]:
    """A point of the grid, in the order of its values: the last axis fastest."""
    place = np.unravel_index(index, tuple(map(len, axes.values())))
    return {path: values[k] for (path, values), k in zip(axes.items(), place, strict=True)}


def blocks(axes: Mapping[str, list[Any]], continuous: Collection[str]) -> Iterator[tuple[list[int], list[int]]]:
    """Points that differ in `continuous` fields only, and their corners: the least and the largest of each field.

    What is allowed of a number, or of two of them together, are inequalities: where all corners are, all points are.
    """
    numbers = np.arange(math.prod(map(len, axes.values()))).reshape(*map(len, axes.values()))
    ends = [
        sorted({int(f(values)) for f in (np.argmin, np.argmax)})
        if path in continuous and not any(isinstance(v, str) for v in values)
        else None
        for path, values in axes.items()
    ]
    fixed = (range(len(values)) if end is None else (None,) for values, end in zip(axes.values(), ends, strict=True))
    for place in itertools.product(*fixed):
        block = numbers[tuple(slice(None) if k is None else slice(k, k + 1) for k in place)]
        corners = block[np.ix_(*([0] if end is None else end for end in ends))]
        yield block.ravel().tolist(), corners.ravel().tolist()
