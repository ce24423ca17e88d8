"""What tokens and the noise on labels are made of: Gaussian numbers, as the theory assumes, or others."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax


class Data(NamedTuple):
    """`inputs(key, (N, T, D))` draws tokens, `noise(key, (T, T, N))` the matrices g of Xi = sqrt(Delta/4) (g + g^T), of
    any law with mean zero and variance one. Default: Gaussian, for which alone the theory is derived.

    Both are compiled: give functions that stay the same object, not a new lambda for every call.
    """

    inputs: Callable[[Any, tuple[int, ...]], Any] = jax.random.normal
    noise: Callable[[Any, tuple[int, ...]], Any] = jax.random.normal


GAUSSIAN = Data()
