"""Turns of two columns in their plane, at many nodes at once."""

from __future__ import annotations

import jax.numpy as jnp

#: Newton steps that find a turn.
_TURNS = 3


def nearest_turn(a, b, to_a, to_b, pull_a, pull_b, alike: bool):
    """Cosine and sine (N,) of the turn (c a + s b, c b - s a) of two columns (T, N) that brings them nearest to `to_a`
    and `to_b`, in units of their pulls; where these are not `alike` a turn to the next minimum, or none."""

    def dot(x, y):
        return jnp.sum(x * y, 0)

    # Half the distances are, but for a constant, -p c - q s + (d (c^2 - s^2) + 2 g c s)/2.
    p = pull_a * dot(a, to_a) + pull_b * dot(b, to_b)
    q = pull_a * dot(b, to_a) - pull_b * dot(a, to_b)
    length = jnp.sqrt(p**2 + q**2)
    some = length > 0
    c, s = (jnp.where(some, x / jnp.where(some, length, 1.0), y) for x, y in ((p, 1.0), (q, 0.0)))
    if alike:
        return c, s
    d, g = (pull_a - pull_b) * (dot(a, a) - dot(b, b)) / 2, (pull_a - pull_b) * dot(a, b)

    def nearer(c, s):
        """Whether such a turn brings them nearer, by more than rounding."""
        return -p * c - q * s + d * (c**2 - s**2 - 1) / 2 + g * c * s < -p - 1e-14 * jnp.abs(p)

    begin = nearer(c, s)
    c, s = jnp.where(begin, c, 1.0), jnp.where(begin, s, 0.0)
    for _ in range(_TURNS):
        slope = p * s - q * c - 2 * d * c * s + g * (c**2 - s**2)
        bend = p * c + q * s - 2 * d * (c**2 - s**2) - 4 * g * c * s
        half = jnp.clip(-slope / (2 * jnp.maximum(jnp.abs(bend), 1e-300)), -0.25, 0.25)
        x, y = (1 - half**2) / (1 + half**2), 2 * half / (1 + half**2)
        c, s = c * x - s * y, s * x + c * y
    better = nearer(c, s)
    return jnp.where(better, c, 1.0), jnp.where(better, s, 0.0)
