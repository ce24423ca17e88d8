"""Roots of functions of one number, found on the host."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from scipy.optimize import brentq


def root_between(f: Callable[[float], Any], a: float, b: float, xtol: float = 1e-10) -> float:
    """Root of a function that changes sign between a and b (Brent's method); one of the points it was evaluated at."""
    found: Any = brentq(f, a, b, xtol=xtol)
    return float(found)


def change_between(holds: Callable[[float], bool], a: float, b: float, xtol: float) -> float:
    """Where between a and b a statement starts or ceases to hold, to `xtol`, by bisection."""
    first = holds(a)
    while b - a > xtol:
        middle = (a + b) / 2
        a, b = (middle, b) if holds(middle) == first else (a, middle)
    return (a + b) / 2
