"""Roots of functions of one number: on the host, and inside of transformations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


def root_between(f: Callable[[float], Any], a: float, b: float, xtol: float = 1e-10) -> float:
    """Root of a function that changes sign between a and b (Brent's method); one of the points it was evaluated at."""
    from scipy.optimize import brentq  # which takes a while, and few need it

    found: Any = brentq(f, a, b, xtol=xtol)
    return float(found)


def change_between(holds: Callable[[float], bool], a: float, b: float, xtol: float) -> float:
    """Where between a and b a statement starts or ceases to hold, to `xtol`, by bisection."""
    first = holds(a)
    while b - a > xtol:
        middle = (a + b) / 2
        a, b = (middle, b) if holds(middle) == first else (a, middle)
    return (a + b) / 2


def falling_root(f: Callable, low, high, tolerance: float, most: int = 100):
    """(x, f(x)) with |f(x)| <= tolerance for a function that falls from above zero at `low` to below zero at `high`, by
    regula falsi with the Illinois rule; a larger |f(x)| where rounding or `most` evaluations end the search. Without
    derivatives."""

    def going(state):
        _, ends, (_, value), count = state
        return (jnp.abs(value) > tolerance) & (ends[1] > ends[0]) & (count < most)

    def step(state):
        right_moved, (a, b, at_a, at_b), _, count = state
        x = jnp.clip((a * at_b - b * at_a) / (at_b - at_a), a, b)
        value = f(x)
        right = value < 0
        # An end that stays while the other one moves twice counts half: it would stay for ever.
        half = jnp.where(right == right_moved, 0.5, 1.0)
        ends = (
            jnp.where(right, a, x),
            jnp.where(right, x, b),
            jnp.where(right, half * at_a, value),
            jnp.where(right, value, half * at_b),
        )
        return right, ends, (x, value), count + 1

    begin = jax.lax.map(f, jnp.stack([low, high]))
    state = jnp.asarray(False), (low, high, *begin), (high, begin[1]), jnp.asarray(2)
    return jax.lax.while_loop(going, step, state)[2]
