"""The frozen-map channel: the joint law of (Y0, Z_W) on a fine-tuning input.

This law is everything that LoRA sees of pre-training (Y0 = Z* + Xi' is the label pre-activation without the LoRA
teacher, Z_W the pre-activation of the frozen map), and the only interface between the two stages. A channel is a
small `Inputs` object that turns standard normal nodes into samples of it. At test time inputs are always fresh.
"""

from __future__ import annotations

import abc
from typing import Any, ClassVar, NamedTuple

import equinox as eqx
import jax.numpy as jnp

from .symmetric import complement, to_matrix


class FrozenMap(NamedTuple):
    """What pre-training leaves behind: `overlap` M, `norm` Q of the learned map and Q0 of the teacher's."""

    overlap: Any
    norm: Any
    Q0: Any

    def gap(self, delta):
        """Delta_eff on fresh inputs, the variance of Y0 - Z_W: delta'/2 + Q0 - 2 M + Q."""
        return delta / 2 + self.Q0 - 2 * self.overlap + self.norm


class Fields(NamedTuple):
    """Samples of the channel, (T, T, N) each: label pre-activation `y0` and frozen pre-activation `zw`."""

    y0: Any
    zw: Any


def standard_fields(normal, tokens: int, drop_shift: bool):
    """Two independent GOE(T) fields of entry variance (1 + delta_ab), (T, T, N), from (2 n_eff, N) normal nodes."""
    e = complement(tokens, drop_shift)
    n = len(e)
    # sqrt(2) times orthonormal standard-normal coordinates is GOE(T) of variance 1.
    return tuple(to_matrix(jnp.sqrt(2.0) * (e.T @ normal[k * n : (k + 1) * n])) for k in range(2))


def field_dimension(tokens: int, drop_shift: bool) -> int:
    """Number of normal coordinates that `standard_fields` takes."""
    return 2 * len(complement(tokens, drop_shift))


class Inputs(eqx.Module):
    """Where the fine-tuning inputs come from."""

    #: How settings files call it.
    name: ClassVar[str]

    @abc.abstractmethod
    def dimension(self, tokens: int, drop_shift: bool) -> int:
        """Number of standard normal coordinates that `fields` takes."""

    @abc.abstractmethod
    def fields(self, frozen: FrozenMap, delta, tokens: int, drop_shift: bool, normal) -> Fields:
        """(Y0, Z_W) at the normal nodes (dimension, N) for label noise `delta`."""

    @abc.abstractmethod
    def effective_noise(self, frozen: FrozenMap, delta):
        """Delta_eff, the variance of Y0 - Z_W in units of (1 + delta_ab)."""


class Fresh(Inputs):
    """Inputs that pre-training has not seen: (Y0, Z_W) Gaussian, covariance [[Q0 + delta'/2, M], [M, Q]]."""

    name = "fresh"

    def dimension(self, tokens, drop_shift):
        return field_dimension(tokens, drop_shift)

    def fields(self, frozen, delta, tokens, drop_shift, normal):
        one, two = standard_fields(normal, tokens, drop_shift)
        size = frozen.Q0 + delta / 2
        y0 = jnp.sqrt(size) * one
        # The learned map may be zero: then both terms of zw vanish, and nothing is divided by its norm.
        noise = jnp.sqrt(jnp.maximum(frozen.norm - frozen.overlap**2 / size, 1e-20))
        return Fields(y0, frozen.overlap / size * y0 + noise * two)

    def effective_noise(self, frozen, delta):
        return frozen.gap(delta)
