"""Single fields of a `Setting` by their dotted path: read, replaced, and read from text."""

from __future__ import annotations

import difflib
import re
import tomllib
from collections.abc import Iterable, Mapping
from typing import Any

from ..errors import SettingError
from ..model.activation import Softmax
from ..model.channel.inputs import Inputs
from ..model.channel.recalibration import FixedScale
from ..model.spectra.laws import BaseLaw
from ..model.task import Task
from .fields import BY_PATH, KEYS
from .named import BASE_KEYS, BASE_LAWS, CHANNEL_KEYS, CHANNELS, RECALIBRATIONS, as_base, as_inputs, as_task, homes
from .stages import Finetuning, Pretraining, Setting

_BARE_WORD = re.compile(r"[A-Za-z_][\w-]*")


def get(setting: Setting, path: str) -> Any:
    """The value of one field; a fine-tuning field that follows pre-training gives the value it follows."""
    name, key = split(path)
    stage = setting.finetuning_resolved if name == "finetuning" else getattr(setting, name.partition(".")[0])
    field = BY_PATH.get(path)
    if field is not None and field.here(stage):
        return field.leaf(stage)
    if name == "pretraining.task":
        _needs_task(path, setting.pretraining)
    if name == "pretraining.base":
        return _base_of(path, setting.pretraining.base)[key]
    if key == "beta":
        _needs_softmax(path, stage.activation)
    if key == "recalibration":
        return recalibration_word(stage)
    if key in CHANNEL_KEYS:
        _needs_channel(key, stage.inputs)
        return getattr(stage.inputs, key)
    return getattr(stage, key)


def replace(setting: Setting, path: str, value: Any) -> Setting:
    """The setting with one field changed, validated as in the constructors (also under JAX transformations).

    Changing a pre-training field also changes what follows it in fine-tuning. Changing a fine-tuning field
    that follows pre-training cuts that tie; None, for `delta`, `activation` and `tokens`, restores it. A name changes
    no number: a softmax keeps its beta, or takes that of pre-training, and inputs keep the options that both kinds
    have. "pretraining.task" and "pretraining.base" as a whole are fields too; None takes them away.
    """
    return replace_all(setting, {path: value})


def replace_all(setting: Setting, values: Mapping[str, Any]) -> Setting:
    """`replace` of several fields at once: only what comes of all of them together has to be valid."""
    given: dict[str, dict[str, Any]] = {name: {} for name in KEYS}
    for path, value in values.items():
        name, key = split(path)
        given[name][key] = value
    pre, fine, numerics = setting.pretraining, setting.finetuning, setting.numerics
    if given["pretraining"] or given["pretraining.task"] or given["pretraining.base"]:
        pre = Pretraining(**_replaced_pretraining(pre, given))
    if given["finetuning"]:
        fine = Finetuning(**_replaced_finetuning(Setting(pre, fine, numerics), given["finetuning"]))
    if given["numerics"]:
        numerics = numerics.changed(**given["numerics"])
    return Setting(pre, fine, numerics)


def _replaced_pretraining(pre: Pretraining, given: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    """Arguments of pre-training with the changes."""
    own = dict(given["pretraining"])
    fields = _fields(pre) | _activation("pretraining", pre.activation, pre.activation, own) | own
    if given["pretraining.task"]:
        # A task that is not there yet is that of plain pre-training, a = 1 and c = 0.
        task = as_task(fields["task"]) or Task()
        fields["task"] = {key: getattr(task, key) for key in KEYS["pretraining.task"]} | given["pretraining.task"]
    for key in given["pretraining.base"]:
        fields["base"] = _base_of(f"pretraining.base.{key}", as_base(fields["base"]))
    if given["pretraining.base"]:
        fields["base"] |= given["pretraining.base"]
    if fields["base"] is not None and "kappa0" not in own:
        fields.pop("kappa0", None)
    return fields


def _replaced_finetuning(setting: Setting, own: dict[str, Any]) -> dict[str, Any]:
    """Arguments of fine-tuning with the changes; pre-training has its own already."""
    fine, own = setting.finetuning, dict(own)
    fields = _fields(fine) | _activation("finetuning", fine.activation, setting.finetuning_activation, own)
    inputs, options = own.pop("inputs", None), {key: own.pop(key) for key in CHANNEL_KEYS if key in own}
    if isinstance(inputs, Inputs):
        fields |= {"inputs": inputs, **options}
    elif inputs is not None or options:
        name = fine.inputs.name if inputs is None else inputs
        kind = CHANNELS.get(name) if isinstance(name, str) else None
        both = () if kind is None else set(kind.options) & set(fine.inputs.options)
        fields["inputs"] = as_inputs(name, {key: getattr(fine.inputs, key) for key in both} | options)
    if hasattr(fields["inputs"], "alpha"):
        if "alpha" in own:
            raise SettingError("finetuning.alpha is rho * pool on selected inputs; allowed: replace rho or pool")
        if hasattr(fine.inputs, "alpha"):
            del fields["alpha"]
    return fields | own


def _activation(stage: str, now: Any, resolved: Any, own: dict[str, Any]) -> dict[str, Any]:
    """Arguments for the activation and its beta, taken out of the changes where they are not themselves arguments."""
    if "beta" in own:
        if own["beta"] is None:
            raise SettingError(f"{stage}.beta = None is not a number; allowed: beta > 0")
        if "activation" not in own:
            _needs_softmax(f"{stage}.beta", resolved)
            return {"activation": "softmax"}
    elif isinstance(own.get("activation"), str) and own["activation"] == "softmax" and isinstance(now, Softmax):
        del own["activation"]
    return {}


def _fields(stage: Pretraining | Finetuning) -> dict[str, Any]:
    """Arguments that make the same stage again."""
    if isinstance(stage, Pretraining):
        fields = {k: getattr(stage, k) for k in KEYS["pretraining"] if k != "beta"}
        if stage.base is not None:
            del fields["kappa0"]
        return fields | {"task": stage.task, "base": stage.base}
    return {k: getattr(stage, k) for k in KEYS["finetuning"] if k not in ("beta", *CHANNEL_KEYS)}


def _base_of(path: str, base: BaseLaw | None) -> dict[str, Any]:
    """Name and parameters of the base law, `path` among them."""
    for name, kind in BASE_LAWS.items():
        if isinstance(base, kind) and path.removeprefix("pretraining.base.") in ("law", *BASE_KEYS[name]):
            return {"law": name} | {key: getattr(base, key) for key in BASE_KEYS[name]}
    raise SettingError(f"{path} has no meaning here; allowed: where [pretraining.base] has such a key")


def _needs_task(path: str, pre: Pretraining) -> None:
    if pre.task is None:
        raise SettingError(f"{path} has no meaning without a task; allowed: where [pretraining.task] is given")


def _needs_channel(key: str, inputs: Inputs) -> None:
    if key not in inputs.options:
        raise SettingError(f'finetuning.{key} has no meaning on "{inputs.name}" inputs; allowed: on {homes(key)} ones')


def _needs_softmax(path: str, activation: Any) -> None:
    if not isinstance(activation, Softmax):
        raise SettingError(f"{path} has no meaning for the {activation.name} activation; allowed: softmax only")


def recalibration_word(fine: Finetuning) -> Any:
    """b, or "noise" or "error"."""
    how = fine.recalibration
    if isinstance(how, FixedScale):
        return how.b
    return next(name for name, kind in RECALIBRATIONS.items() if isinstance(how, kind))


# ---- paths and values as text ---------------------------------------------------------------------------------


def parse_value(path: str, text: str) -> Any:
    """A TOML value, or a bare word, which stands for itself."""
    try:
        parsed = tomllib.loads(f"value = {text}")
        if parsed.keys() == {"value"} and "\n" not in text:
            return parsed["value"]
    except (ValueError, RecursionError):
        if _BARE_WORD.fullmatch(text):
            return text
    raise SettingError(f"override {path}={text[:40]} has no readable value; allowed: a number such as 0.02, or a word")


def split(path: str) -> tuple[str, str]:
    """Section and key of a dotted path, both known."""
    name, dot, key = path.partition(".")
    inner, inner_dot, last = path.rpartition(".")
    if inner in KEYS:
        name, dot, key = inner, inner_dot, last
    if not dot or not name or not key:
        homes = [f"{section}.{path}" for section, keys in KEYS.items() if path in keys]
        hint = f"did you mean {' or '.join(homes)}? " if homes else ""
        raise SettingError(f"{path!r} is not a section.key path; {hint}allowed: for example pretraining.lam")
    if name not in KEYS:
        raise SettingError(unknown_section(name))
    if key not in KEYS[name] and path not in KEYS:
        raise SettingError(unknown_key(name, key))
    return name, key


def shown(value: Any, longest: int = 40) -> str:
    """A value for a message, cut where it is long."""
    if isinstance(value, int) and abs(value) > 10**longest:
        return "a very large number"
    text = repr(value)
    return text if len(text) <= longest else text[:longest] + "..."


def _nearest(word: str, known: Iterable[str], cutoff: float = 0.55) -> str | None:
    return next(iter(difflib.get_close_matches(word.lower(), list(known), n=1, cutoff=cutoff)), None)


def unknown_section(name: str) -> str:
    """The sentence about a section that does not exist."""
    homes = [f"{section}.{name}" for section, keys in KEYS.items() if name in keys]
    near = _nearest(name, KEYS)
    hint = " or ".join(homes) if homes else near
    return f"unknown section {shown(name)}{f' (did you mean {hint}?)' if hint else ''}; allowed: {', '.join(KEYS)}"


def unknown_key(name: str, key: str) -> str:
    """The sentence about a key that does not exist."""
    near = _nearest(key, KEYS[name])
    return (
        f"unknown key {name}.{shown(key)[1:-1]}{f' (did you mean {near}?)' if near else ''}; "
        f"allowed in [{name}]: {', '.join(KEYS[name])}"
    )
