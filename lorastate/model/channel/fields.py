"""Samples of the channel (Y0, Z_W), their second moments, and the Gaussian fields that they are made of."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from ...math.symmetric import complement, to_matrix


class Fields(NamedTuple):
    """Samples of the channel, (T, T, N) each: label pre-activation `y0` and frozen pre-activation `zw`."""

    y0: Float[Array, "T T N"]
    zw: Float[Array, "T T N"]


class Moments(NamedTuple):
    """E Y0^2, E Y0 Z_W, E Z_W^2 per entry, in units of (1 + delta_ab)."""

    yy: Any
    yz: Any
    zz: Any

    def effective_noise(self, b: Any = 1.0):
        """Variance of Y0 - b Z_W."""
        return self.yy - 2 * b * self.yz + b**2 * self.zz

    @property
    def best_scale(self):
        """The b that minimises it; 1 for a map that is zero."""
        live = self.zz > 1e-12
        return jnp.where(live, self.yz / jnp.where(live, self.zz, 1.0), 1.0)


def standard_fields(
    normal: Float[Array, "d N"], tokens: int, drop_shift: bool, count: int = 2
) -> tuple[Float[Array, "T T N"], ...]:
    """`count` independent GOE(T) fields of entry variance (1 + delta_ab), (T, T, N), from (count n_eff, N) nodes."""
    e = complement(tokens, drop_shift)
    n = len(e)
    # sqrt(2) times orthonormal standard-normal coordinates is GOE(T) of variance 1.
    return tuple(to_matrix(jnp.sqrt(2.0) * (e.T @ normal[k * n : (k + 1) * n])) for k in range(count))


def field_dimension(tokens: int, drop_shift: bool, count: int = 2) -> int:
    """Number of normal coordinates that `standard_fields` takes."""
    return count * len(complement(tokens, drop_shift))


def root(square):
    """sqrt of a variance that may be zero: then what it multiplies vanishes, and nothing is divided by it."""
    return jnp.sqrt(jnp.maximum(square, 1e-20))
