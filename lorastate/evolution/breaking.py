"""Averages over the samples of one level of symmetry breaking, weighted by exp(-y f)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from ..model.wells import debiased
from .order import Order


def kinds_of(rows: int, along: int, spare: bool) -> np.ndarray:
    """(1, rows), or (2, rows) with spare directions: which rows are summed over for each kind of direction."""
    if not spare:
        return np.ones((1, rows))
    first = np.arange(rows) < along
    return np.stack([1.0 * first, 1.0 * ~first])


def level(y, kinds, f, known):
    """One step of breaking, over the axis of its samples: f_{i-1}, averages of all that is `known` (g_i first), and
    |g_{i-1}|^2 by kind.

    Samples are two halves of the same kind; what a few samples do to nonlinear functions of averages is taken away.
    """
    count = f.shape[0]
    low = jax.lax.stop_gradient(jnp.min(f, 0))
    weight = jnp.exp(-y * (f - low[None])).reshape(2, count // 2, *f.shape[1:])
    halves = weight.mean(1)
    whole = halves.mean(0)

    def average(a):
        """Of all samples, (rows, ...), and of each half, (2, rows, ...)."""
        parts = (weight[None] * a.reshape(len(a), 2, count // 2, *a.shape[2:])).mean(2)
        return parts.mean(1) / whole[None], jnp.moveaxis(parts / halves[None], 1, 0)

    def size(g):
        return jnp.tensordot(kinds, g**2, 1)

    found = [average(a) for a in known]
    free = debiased(low - jnp.log(whole) / y, low[None] - jnp.log(halves) / y)
    square = debiased(size(found[0][0]), jnp.stack([size(g) for g in found[0][1]]))
    return free, [debiased(*pair) for pair in found], square


def divergence_of(order: Order, squares, pulls):
    """E <div g>, from E g_i . z_i = s_i (E <div g> - R_i) of every level i, where N_i = E |g_i|^2 and
    R_i = y_i N_i + sum_{j>i} y_j (N_j - N_{j-1}) (s_0 the noise, z_0 the g of omega, y_0 = 0): together they weigh as
    their parts of x do."""
    sizes = [jnp.atleast_1d(s) for s in (order.noise, *order.spread)]
    y = (0.0, *order.breaking)
    total, weight = 0.0, 0.0
    for i, size in enumerate(sizes):
        rest = y[i] * squares[i] if i else 0.0
        for j in range(i + 1, len(sizes)):
            rest = rest + y[j] * (squares[j] - squares[j - 1])
        total, weight = total + size * (pulls[i] + size * rest), weight + size**2
    return total / weight
