"""Searches for low minima of a LoRA loss: descents from near the teacher, from random starts, and deep moves."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ..errors import Code
from .channel_draws import Sample
from .descents import LoraData, Minima, descend
from .samples import stream

#: informed: descents from w* and from points near it; random: from random starts, which is what a user has;
#: deep_random: perturb and descend from the lowest random one, without knowing w*; deep: the same from the lowest of
#: all, and the lowest that any of the four has found.
SEARCHES = ("informed", "random", "deep_random", "deep")
#: Perturbation of w* for informed starts, and those of a minimum in deep moves, one after the other, in units of |w|.
#: Smaller ones (0.3) nearly always fall back into the minimum that they leave, larger ones (3) forget it.
_NEAR, _MOVES = 0.1, (1.0, 1.5)
#: Informed starts, and descents that share a product with the inputs.
INFORMED, TOGETHER = 3, 12


def _best(minima: Minima, among: Any = None) -> int:
    """The lowest one, of those that converged if any has; where several met in one minimum, the first of them."""
    index = np.arange(len(minima.loss)) if among is None else np.asarray(among)
    good = [i for i in index if minima.codes[i] == Code.ok] or [i for i in index if np.isfinite(minima.loss[i])]
    return int(min(good, key=lambda i: minima.loss[i])) if good else int(index[0])


def _take(minima: Minima, index) -> Minima:
    return Minima(minima.w[index], minima.loss[index], tuple(minima.codes[i] for i in index), minima.steps[index])


def _joined(parts: list[Minima]) -> Minima:
    w, loss, codes, steps = zip(*parts, strict=True)
    return Minima(np.concatenate(w), np.concatenate(loss), sum(codes, ()), np.concatenate(steps))


def _starts(key, teacher, rank: int, starts: int):
    """w* and points near it, then random w of |w|^2/D = 1, 0.01, 1, ... a column, (3 + starts, D, r).

    Columns that w has beyond those of w* start at random, those that w* has beyond those of w are left out.
    """
    dimension, k = teacher.shape[0], min(teacher.shape[1], rank)
    informed = jax.random.normal(stream(key, "informed"), (INFORMED, dimension, rank))
    near = teacher[:, :k] + _NEAR * informed[:, :, :k].at[0].set(0.0)
    scattered = jax.random.normal(stream(key, "lora_start"), (starts, dimension, rank))
    return jnp.concatenate([informed.at[:, :, :k].set(near), scattered.at[1::2].multiply(0.1)])


def _descend_all(points, data: LoraData, bar) -> Minima:
    """Descents from all points, in groups of nearly equal size."""
    groups = -(-len(points) // TOGETHER)
    found = []
    for part in np.array_split(np.asarray(points), groups):
        found.append(descend(part, data))
        bar.update(len(part))
    return _joined(found)


def _deepened(key, pair: Minima, data: LoraData, moves: int, bar) -> Minima:
    """Minima below those of `pair`: perturb by Gaussian noise, descend, keep what is lower, and again."""
    for move in range(moves):
        noise = np.asarray(jax.random.normal(jax.random.fold_in(key, move), pair.w.shape))
        size = np.sqrt(np.mean(pair.w**2, (1, 2), keepdims=True))
        new = descend(pair.w + _MOVES[move % len(_MOVES)] * size * noise, data)
        both = _joined([pair, new])
        lower = [k + 2 * (new.codes[k] == Code.ok and new.loss[k] < pair.loss[k]) for k in range(2)]
        pair = _take(both, lower)
        bar.update(2)
    return pair


def searched(key, sample: Sample, rank: int, starts: int, moves: int, bar) -> tuple[Minima, Minima]:
    """The minimum of each of `SEARCHES`, and those of all random starts."""
    found = _descend_all(_starts(key, sample.teacher, rank, starts), sample.data, bar)
    scattered = range(INFORMED, INFORMED + starts)
    informed, random, lowest = _best(found, range(INFORMED)), _best(found, scattered), _best(found)
    pair = _deepened(stream(key, "moves"), _take(found, [random, lowest]), sample.data, moves, bar)
    deep = _joined([_take(found, [informed, random]), _take(pair, [0]), _take(pair, [_best(pair)])])
    return deep, _take(found, list(scattered))
