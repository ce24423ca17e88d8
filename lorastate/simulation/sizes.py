"""The whole numbers of a simulation, and whether what they need fits in memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from ..errors import SettingError, is_concrete
from ..model.channel.inputs import Fresh
from ..model.channel.selected import Selected
from ..setting.stages import Pretraining

#: Bytes that a simulation may take.
MEMORY = 8 * 2**30


class Sizes(NamedTuple):
    """The whole numbers of a simulation: D, P0 = kappa0 D, P = kappa D, N = alpha D^2, N' = alpha' D, and
    kappa_perp D (0 without a task)."""

    dimension: int
    base_rank: int
    width: int
    samples: int
    lora_samples: int
    test_samples: int
    task_rank: int = 0


def known_number(name: str, value: Any) -> None:
    """A `SettingError` where a field is traced, or an array."""
    if not is_concrete(value) or np.ndim(value):
        raise SettingError(f"{name} = {value} is not one known number; allowed: just one")


def rounded(name: str, value: Any, scale: int, dimension: int) -> int:
    """round(value scale), a `SettingError` where that is 0."""
    if (count := round(float(value) * scale)) < 1:
        low = f"{name} >= {0.5 / scale:.2g} at dimension {dimension}"
        raise SettingError(f"{name} = {float(value):g} rounds to none at all; allowed: {low}")
    return count


def fits_memory(needed: Callable[[int], float], dimension: int, more: str = "") -> None:
    """A `SettingError` that names the largest dimension, where the bytes `needed(dimension)` are too many."""
    if needed(dimension) > MEMORY:
        fits = max((d for d in range(1, dimension) if needed(d) <= MEMORY), default=0)
        raise SettingError(
            f"dimension = {dimension} needs {needed(dimension) / 2**30:.0f} GiB of memory here; allowed: up to "
            f"{MEMORY >> 30} GiB, dimension <= {fits} (or a smaller alpha{more})"
        )


def sizes_at(pre: Pretraining, fine: Any, D: int, test_samples: int) -> Sizes:
    """The sizes of a setting at dimension D, a `SettingError` where they cannot be had."""
    for stage, part in (("pretraining", pre), ("finetuning", fine)):
        for name in ("alpha", "lam", "delta", "kappa0", "kappa"):
            known_number(f"{stage}.{name}", getattr(part, name, 0.0))
    check_memory(pre, fine, D)
    if not isinstance(fine.inputs, (Fresh, Selected)) and float(fine.alpha) * D > float(pre.alpha) * D**2:
        raise SettingError(
            f"finetuning.alpha = {float(fine.alpha):g} needs more samples than pre-training has to reuse at dimension "
            f"{D}; allowed: up to {float(pre.alpha) * D:g}"
        )

    def count(name: str, value: Any, scale: int) -> int:
        return rounded(name, value, scale, D)

    ranks = count("pretraining.kappa0", pre.kappa0, D), count("pretraining.kappa", pre.kappa, D)
    samples = count("pretraining.alpha", pre.alpha, D**2), count("finetuning.alpha", fine.alpha, D)
    task_rank = 0 if pre.task is None else count("pretraining.task.kappa_perp", pre.task.kappa_perp, D)
    return Sizes(D, *ranks, *samples, test_samples, task_rank)


def check_memory(pre: Pretraining, fine: Any, D: int, kept: int = 0, known: int = 0) -> None:
    """Raises `SettingError` if one run, what `kept` more runs leave and `known` bytes do not fit."""

    def needed(d: int) -> float:
        samples = float(pre.alpha) * d**2
        drawn = float(fine.inputs.pool if isinstance(fine.inputs, Selected) else fine.alpha)
        inputs = max(pre.tokens * samples * d, fine.tokens * drawn * d**2)
        left = 8 * (samples * (pre.tokens * d + pre.tokens**2) + (3 + float(pre.kappa)) * d**2)
        # Inputs, two temporaries; L-BFGS history of W.
        return 24 * inputs + 400 * float(pre.kappa) * d**2 + kept * left + known

    fits_memory(needed, D, ", or no memory that keeps all runs" if kept or known else "")
