"""Checks of single inputs, with one clear sentence when they fail."""

from __future__ import annotations

import math
from typing import Any

import jax.numpy as jnp
import numpy as np

from .errors import SettingError, is_concrete


def real(
    name: str, value: Any, allowed: str, low: float, closed: bool = False, high: float = math.inf, vector: bool = False
):
    """A float64 leaf, checked where its value is known; `allowed` says the range in words. Numbers, if a `vector`."""
    if value is None or isinstance(value, bool | str | bytes):
        raise SettingError(f"{name} = {value!r} is not a number; allowed: {allowed}")
    try:
        out = jnp.asarray(value, dtype=jnp.float64)
    except (TypeError, ValueError):
        raise SettingError(f"{name} = {value!r} is not a number; allowed: {allowed}") from None
    if out.ndim and not vector:
        raise SettingError(f"{name} has shape {out.shape}, not one number (sweeps take many); allowed: {allowed}")
    if is_concrete(out):
        x = np.asarray(out)
        good = np.isfinite(x) & ((x >= low) if closed else (x > low)) & (x <= high)
        if not np.all(good):
            shown = float(x[~good].flat[0]) if x.ndim else float(x)
            raise SettingError(f"{name} = {shown!r} is out of range; allowed: {allowed}, finite")
    return out


def whole(name: str, value: Any, low: int, high: int) -> int:
    """A whole number in its range."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise SettingError(f"{name} = {value!r} is not a whole number; allowed: {low} to {high}")
    if not low <= value <= high:
        raise SettingError(f"{name} = {value} is out of range; allowed: {low} to {high}")
    return int(value)
