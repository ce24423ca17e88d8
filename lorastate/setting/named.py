"""What settings call by name: activations, tasks, base laws, inputs and recalibrations, from plain values."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..errors import SettingError
from ..model.activation import Activation, Custom, Identity, Softmax
from ..model.channel.inputs import BayesOptimal, Fresh, Inputs, Mixed, Reused
from ..model.channel.recalibration import FixedScale, LeastError, LeastNoise, Recalibration
from ..model.channel.selected import Selected
from ..model.spectra.laws import Atoms, BaseLaw, PowerLaw
from ..model.task import Task
from ..validation import real


def as_activation(stage: str, value: Any, beta: Any = None, unsaid: Any = 1.0) -> Activation:
    """An `Activation` from one, from the name "softmax" or "identity", or from a callable on T x T matrices.

    The beta of a softmax that is given by name alone is `unsaid`.
    """
    if isinstance(value, str) and value == "softmax":
        value, beta = Softmax(unsaid if beta is None else real(f"{stage}.beta", beta, "beta > 0", 0.0)), None
    if beta is not None:
        why = (
            f"has no meaning for the {value} activation; allowed: leave it out"
            if isinstance(value, str)
            else "stands beside an activation that has its own numbers; allowed: one of them"
        )
        raise SettingError(f"{stage}.beta = {beta!r} {why}")
    if isinstance(value, Activation):
        if isinstance(value, Softmax) and (value.beta is not None or unsaid is not None):
            real(f"{stage}.beta", value.beta, "beta > 0", 0.0)
        return value
    if isinstance(value, str) and value == "identity":
        return Identity()
    if callable(value):
        return Custom(value)
    raise SettingError(
        f'{stage}.activation = {value!r} is unknown; allowed: "softmax", "identity" (or a callable in Python)'
    )


def as_task(value: Any) -> Task | None:
    """A `Task` from one, from a mapping of its fields, or None."""
    if value is None or isinstance(value, Task):
        return value
    if not isinstance(value, Mapping):
        raise SettingError(f"pretraining.task = {value!r} is not a task; allowed: a, c and kappa_perp")
    for key in value:
        if key not in ("a", "c", "kappa_perp"):
            raise SettingError(f"pretraining.task.{key} is unknown; allowed: a, c, kappa_perp")
    return Task(**value)


#: Laws of the base map that settings files know, by name.
BASE_LAWS: dict[str, type[BaseLaw]] = {"atoms": Atoms, "power_law": PowerLaw}
#: Their keys.
BASE_KEYS = {"atoms": ("weights", "values"), "power_law": ("exponent", "low", "high")}


def as_base(value: Any) -> BaseLaw | None:
    """A base law from one, from a mapping of its name and parameters, or None for the Wishart law of kappa0."""
    if value is None or isinstance(value, BaseLaw):
        return value
    known = ", ".join(f'"{name}"' for name in BASE_LAWS)
    if not isinstance(value, Mapping):
        raise SettingError(
            f"pretraining.base = {value!r} is not a law; allowed: law = one of {known}, with its parameters"
        )
    given = {key: v for key, v in value.items() if key != "law"}
    name = value.get("law")
    if name not in BASE_LAWS:
        raise SettingError(f"pretraining.base.law = {name!r} is unknown; allowed: {known}")
    for key in given:
        if key not in BASE_KEYS[name]:
            raise SettingError(
                f'pretraining.base.{key} has no meaning for "{name}"; allowed: {", ".join(BASE_KEYS[name])}'
            )
    for key in BASE_KEYS[name]:
        if key not in given:
            raise SettingError(f'pretraining.base.{key} is missing; allowed: {", ".join(BASE_KEYS[name])} for "{name}"')
    return BASE_LAWS[name](**given)


#: Channels by the name that settings files use.
CHANNELS: dict[str, type[Inputs]] = {kind.name: kind for kind in (Fresh, Reused, Mixed, Selected, BayesOptimal)}
#: Keys of the channel, which are fields of its `Inputs` object.
CHANNEL_KEYS = tuple(dict.fromkeys(key for kind in CHANNELS.values() for key in kind.options))
_MISSING = {"reused_fraction": "0 to 1", "rho": "0 < rho <= 1", "pool": "pool > 0 (inputs in the pool / D)"}


def as_inputs(inputs: Any, options: Mapping[str, Any]) -> Inputs:
    """`Inputs` from one, or from its name and options."""
    given = {key: value for key, value in options.items() if value is not None}
    known = {key for kind in CHANNELS.values() for key in kind.options}
    for key in options:
        if key not in known:
            raise TypeError(f"Finetuning got an unexpected keyword argument {key!r}")
    if isinstance(inputs, Inputs):
        for key in given:
            raise SettingError(
                f"finetuning.{key} = {given[key]!r} stands beside inputs that have their own; allowed: one of them"
            )
        return inputs
    if not isinstance(inputs, str) or inputs not in CHANNELS:
        allowed = ", ".join(f'"{kind}"' for kind in CHANNELS)
        raise SettingError(f"finetuning.inputs = {inputs!r} is unknown; allowed: {allowed}")
    kind = CHANNELS[inputs]
    for key in given:
        if key not in kind.options:
            raise SettingError(
                f'finetuning.{key} = {given[key]!r} has no meaning on "{inputs}" inputs; allowed: on {homes(key)} ones'
            )
    for key in kind.numbers:
        if key not in given:
            raise SettingError(f'finetuning.{key} is missing; allowed: {_MISSING[key]}, which "{inputs}" inputs need')
    return kind(**given)


def homes(key: str) -> str:
    """The channels that an option belongs to, for messages."""
    return " or ".join(f'"{kind.name}"' for kind in CHANNELS.values() if key in kind.options)


#: The two recalibrations that are not numbers, by the name that settings files use.
RECALIBRATIONS: dict[str, type[Recalibration]] = {"noise": LeastNoise, "error": LeastError}


def as_recalibration(value: Any) -> Recalibration:
    """A `Recalibration` from one, from its name, or from the number b."""
    if isinstance(value, Recalibration):
        return value
    if isinstance(value, str):
        if value in RECALIBRATIONS:
            return RECALIBRATIONS[value]()
        raise SettingError(f'finetuning.recalibration = {value!r} is unknown; allowed: a number >= 0, "noise", "error"')
    return FixedScale(real("finetuning.recalibration", value, 'a number >= 0, "noise", "error"', 0.0, closed=True))
