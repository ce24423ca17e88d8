"""Recalibration of the frozen map: the factor b on it, Z_W -> b Z_W."""

from __future__ import annotations

import abc
from typing import Any

import equinox as eqx
from jaxtyping import Array, Float

from ...errors import SettingError
from .fields import Moments


class Recalibration(eqx.Module):
    """Factor b on the frozen map, Z_W -> b Z_W (W -> sqrt(b) W), at training and at test time."""

    @abc.abstractmethod
    def factor(self, moments: Moments) -> Float[Array, ""]:
        """b, from the moments of the channel before."""


class FixedScale(Recalibration):
    """b itself (a differentiable leaf)."""

    b: Any

    def factor(self, moments):
        return self.b


class LeastNoise(Recalibration):
    """The b that minimises Delta_eff on the fine-tuning inputs: E Y0 Z_W / E Z_W^2, on fresh inputs M / Q."""

    def factor(self, moments):
        return moments.best_scale


class LeastError(Recalibration):
    """The b that minimises E'. It is found by `predict` and `gradient`, which put a `FixedScale` in its place."""

    def factor(self, moments):
        raise SettingError(
            "finetuning.recalibration = 'error' needs a search over b; allowed here: a number or 'noise' (predict and "
            "gradient, outside of jit, do the search)"
        )
