"""The continuous fields of a setting, one row each, and the keys that settings files have."""

from __future__ import annotations

import math
from collections.abc import Callable
from operator import attrgetter
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from ..model.activation import Softmax
from ..model.channel.recalibration import FixedScale
from ..model.spectra.laws import PowerLaw
from .named import BASE_KEYS
from .numerics import NAMES
from .stages import Setting


def _always(stage: Any) -> bool:
    return True


def _nothing(setting: Setting) -> dict[str, Any]:
    return {}


class Field(NamedTuple):
    """A number that predictions are differentiable in.

    `path`: its dotted path. `at`: where its stage has it, if not under its own key. `here(stage)`: whether the stage
    (explicit, as in `Setting.finetuning_resolved`) has it. `high`: its largest value, 1 for a share; all are positive.
    `moves(setting)`: leaves that follow it, by path, with their derivative by it.
    """

    path: str
    at: str = ""
    here: Callable[[Any], bool] = _always
    high: float = math.inf
    moves: Callable[[Setting], dict[str, Any]] = _nothing

    @property
    def stage(self) -> str:
        return self.path.partition(".")[0]

    @property
    def key(self) -> str:
        return self.path.partition(".")[2]

    def leaf(self, stage: Any) -> Any:
        """The field of its stage, or its entry in a gradient shaped like the stage."""
        return attrgetter(self.at or self.key)(stage)

    @property
    def allowed(self) -> str:
        """The open range of values that have a coordinate."""
        return "> 0" if self.high == math.inf else f"above 0 and below {self.high:g}"

    def coordinate(self, value: float) -> float:
        """log x, or log(x / (1 - x)) of a share: unbounded, as descents need it."""
        return float(np.log(value) - np.log1p(-value / self.high))

    def value(self, coordinate: Any) -> Any:
        """x from its coordinate (JAX)."""
        return jnp.exp(coordinate) if self.high == math.inf else self.high / (1 + jnp.exp(-coordinate))

    def pace(self, value: float) -> float:
        """dx / d coordinate."""
        return value * (1 - value / self.high)


def _softmax(stage: Any) -> bool:
    return isinstance(stage.activation, Softmax)


def _option(key: str) -> Callable[[Any], bool]:
    return lambda stage: key in stage.inputs.numbers


def _follows_noise(setting: Setting) -> dict[str, Any]:
    fine = setting.finetuning
    return {"finetuning.delta": 1.0} if fine.delta is None or fine.inputs.keeps_noise else {}


def _follows_beta(setting: Setting) -> dict[str, Any]:
    follows = setting.finetuning.follows_beta and _softmax(setting.finetuning_resolved)
    return {"finetuning.beta": 1.0} if follows else {}


def _selected_alpha(other: str) -> Callable[[Setting], dict[str, Any]]:
    return lambda setting: {"finetuning.alpha": getattr(setting.finetuning.inputs, other)}


#: In the order in which they are listed: those of pre-training, then those of fine-tuning.
FIELDS: tuple[Field, ...] = (
    Field("pretraining.alpha"),
    Field("pretraining.kappa0", here=lambda stage: stage.base is None),
    Field("pretraining.kappa"),
    Field("pretraining.delta", moves=_follows_noise),
    Field("pretraining.lam"),
    Field("pretraining.beta", "activation.beta", _softmax, moves=_follows_beta),
    *(
        Field(f"pretraining.base.{key}", here=lambda stage: isinstance(stage.base, PowerLaw))
        for key in BASE_KEYS["power_law"]
    ),
    *(Field(f"pretraining.task.{key}", here=lambda stage: stage.task is not None) for key in ("a", "c", "kappa_perp")),
    Field("finetuning.alpha", here=lambda stage: not hasattr(stage.inputs, "alpha")),
    Field("finetuning.lam"),
    Field("finetuning.delta", here=lambda stage: not stage.inputs.keeps_noise),
    Field("finetuning.beta", "activation.beta", _softmax),
    Field("finetuning.reused_fraction", "inputs.reused_fraction", _option("reused_fraction"), 1.0),
    Field("finetuning.rho", "inputs.rho", _option("rho"), 1.0, _selected_alpha("pool")),
    Field("finetuning.pool", "inputs.pool", _option("pool"), moves=_selected_alpha("rho")),
    Field("finetuning.recalibration", "recalibration.b", lambda stage: isinstance(stage.recalibration, FixedScale)),
    Field("finetuning.adapter_factor"),
)  # fmt: skip
BY_PATH = {field.path: field for field in FIELDS}


def _numbers(section: str) -> tuple[str, ...]:
    return tuple(f.path.removeprefix(f"{section}.") for f in FIELDS if f.path.rpartition(".")[0] == section)


#: Sections and keys of a settings file: continuous fields and, after them, whole numbers and words.
KEYS: dict[str, tuple[str, ...]] = {
    "pretraining": (*_numbers("pretraining"), "activation", "tokens"),
    "finetuning": (*_numbers("finetuning"), "rank", "teacher_rank", "activation", "tokens", "inputs", "label_noise",
                   "score"),
    "numerics": NAMES,
    "pretraining.task": _numbers("pretraining.task"),
    "pretraining.base": ("law", *dict.fromkeys(key for keys in BASE_KEYS.values() for key in keys)),
}  # fmt: skip


def fields(setting: Setting) -> tuple[Field, ...]:
    """The continuous fields that a setting has."""
    stages = {"pretraining": setting.pretraining, "finetuning": setting.finetuning_resolved}
    return tuple(field for field in FIELDS if field.here(stages[field.stage]))


def continuous_fields(setting: Setting) -> tuple[str, ...]:
    """Paths of all numbers that predictions are differentiable in.

    `beta` only where there is a softmax; on selected inputs `rho` and `pool` instead of `alpha`; no fine-tuning `delta`
    where reused labels keep the noise of pre-training.
    """
    return tuple(field.path for field in fields(setting))
