"""Settings as TOML files and plain dictionaries, and single fields of a `Setting` by their dotted path."""

from __future__ import annotations

import dataclasses
import difflib
import os
import re
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import equinox as eqx
import numpy as np

from ..errors import SettingError
from ..model.activation import Softmax
from ..model.channel.inputs import CHANNELS, RECALIBRATIONS, FixedScale, Inputs, homes
from ..model.spectra.laws import BaseLaw, PowerLaw
from ..model.task import Task
from .stages import BASE_KEYS, BASE_LAWS, Finetuning, Numerics, Pretraining, Setting, as_base, as_inputs, as_task

#: Sections and keys of a settings file.
KEYS: dict[str, tuple[str, ...]] = {
    "pretraining": ("activation", "beta", "tokens", "alpha", "kappa0", "kappa", "delta", "lam"),
    "finetuning": ("alpha", "lam", "rank", "teacher_rank", "delta", "activation", "beta", "tokens", "inputs",
                   "label_noise", "reused_fraction", "rho", "pool", "score", "recalibration"),
    "numerics": ("nodes", "finetuning_nodes", "replicas", "seed", "tolerance", "max_steps", "samples", "symmetry"),
    "pretraining.task": ("a", "c", "kappa_perp"),
    "pretraining.base": ("law", *dict.fromkeys(key for keys in BASE_KEYS.values() for key in keys)),
}  # fmt: skip
_CONTINUOUS = ("alpha", "kappa0", "kappa", "delta", "lam", "beta")
_REQUIRED = {"pretraining": ("alpha", "lam"), "finetuning": ("alpha", "lam")}
#: Keys of the channel, which are fields of its `Inputs` object.
_CHANNEL = tuple(dict.fromkeys(key for kind in CHANNELS.values() for key in kind.options))
_BARE_WORD = re.compile(r"[A-Za-z_][\w-]*")


def load_setting(path: str | os.PathLike[str], overrides: Iterable[str] = ()) -> Setting:
    """The setting in a TOML file, with `overrides` such as "pretraining.lam=0.02" taking precedence.

    Fine-tuning `delta`, `activation`, `beta` and `tokens` that neither gives follow the pre-training ones.
    Raises `SettingError`, one sentence, for anything that is not a valid setting.
    """
    return setting_from_dict(_read(Path(path)), overrides)


def setting_from_dict(data: Mapping[str, Any], overrides: Iterable[str] = ()) -> Setting:
    """The setting in a dictionary {section: {key: value}}, as `load_setting` reads it from a file."""
    sections = _checked(data)
    _override(sections, overrides)
    for name, keys in _REQUIRED.items():
        for key in keys:
            selected = name == "finetuning" and key == "alpha" and sections[name].get("inputs") == "selected"
            if key not in sections[name] and not selected:
                raise SettingError(f"{name}.{key} is missing; allowed: {key} > 0")
    pre = Pretraining(
        **sections["pretraining"], task=sections["pretraining.task"] or None, base=sections["pretraining.base"] or None
    )
    fine = sections["finetuning"]
    if "beta" in fine:
        fine.setdefault("activation", pre.activation.name)
    return Setting(pre, Finetuning(**fine), Numerics(**sections["numerics"]))


def setting_to_dict(setting: Setting) -> dict[str, dict[str, Any]]:
    """The setting as plain values, with what fine-tuning takes over from pre-training written out."""
    fine = setting.finetuning_resolved
    stages = {"pretraining": setting.pretraining, "finetuning": fine}
    out: dict[str, dict[str, Any]] = {}
    for name, stage in stages.items():
        out[name] = {"activation": stage.activation.name}
        if isinstance(stage.activation, Softmax):
            out[name]["beta"] = _plain(stage.activation.beta)
        out[name] |= {key: _plain(getattr(stage, key)) for key in KEYS[name] if key not in (*_OBJECTS, *_CHANNEL)}
    task = setting.pretraining.task
    if setting.pretraining.base is not None:
        del out["pretraining"]["kappa0"]
        out["pretraining"]["base"] = _base_fields(setting.pretraining.base)
    if task is not None:
        out["pretraining"]["task"] = {key: _plain(getattr(task, key)) for key in KEYS["pretraining.task"]}
    out["finetuning"]["inputs"] = fine.inputs.name
    out["finetuning"] |= {key: _plain(getattr(fine.inputs, key)) for key in fine.inputs.options}
    out["finetuning"]["recalibration"] = _plain(_recalibration(fine))
    out["numerics"] = {key: getattr(setting.numerics, key) for key in KEYS["numerics"]}
    return out


def description(value: Any) -> Any:
    """Everything that a setting is made of, unresolved and unrounded, as JSON has it: one description, one setting.

    Raises `SettingError` for what contains code of the user's, such as an activation: that can only be run.
    """
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if eqx.is_array(value):
        return np.asarray(value).tolist()
    if isinstance(value, tuple):
        return [description(item) for item in value]
    if isinstance(value, eqx.Module) and type(value).__module__.startswith(f"{__package__}."):
        fields = {field.name: description(getattr(value, field.name)) for field in dataclasses.fields(value)}
        return {"kind": type(value).__name__} | fields
    raise SettingError(
        f"{_shown(value)} is code of your own, whose results cannot be known again; allowed: what settings files know"
    )


_OBJECTS = ("activation", "beta", "inputs", "recalibration")


def _recalibration(fine: Finetuning) -> Any:
    """b, or "noise" or "error"."""
    how = fine.recalibration
    if isinstance(how, FixedScale):
        return how.b
    return next(name for name, kind in RECALIBRATIONS.items() if isinstance(how, kind))


def continuous_fields(setting: Setting) -> tuple[str, ...]:
    """Paths of all numbers that predictions are differentiable in.

    `beta` only where there is a softmax; on selected inputs `rho` and `pool` instead of `alpha`; no fine-tuning `delta`
    where reused labels keep the noise of pre-training.
    """
    pre, fine = setting.pretraining, setting.finetuning_resolved

    def softmax(stage):
        return ("beta",) if isinstance(stage.activation, Softmax) else ()

    own = () if hasattr(fine.inputs, "alpha") else ("alpha",)
    own += ("lam", *(() if fine.inputs.keeps_noise else ("delta",)), *softmax(fine), *fine.inputs.numbers)
    own += ("recalibration",) if isinstance(fine.recalibration, FixedScale) else ()
    theirs = tuple(key for key in _CONTINUOUS if key not in ("beta", "kappa0")) + softmax(pre)
    if pre.base is None:
        theirs = (theirs[0], "kappa0", *theirs[1:])
    elif isinstance(pre.base, PowerLaw):
        theirs += tuple(f"base.{key}" for key in BASE_KEYS["power_law"])
    theirs += () if pre.task is None else tuple(f"task.{key}" for key in KEYS["pretraining.task"])
    return tuple(f"pretraining.{key}" for key in theirs) + tuple(f"finetuning.{key}" for key in own)


def get(setting: Setting, path: str) -> Any:
    """The value of one field; a fine-tuning field that follows pre-training gives the value it follows."""
    name, key = _split(path)
    if name == "pretraining.task":
        _needs_task(path, setting.pretraining)
        return getattr(setting.pretraining.task, key)
    if name == "pretraining.base":
        return _base_of(path, setting.pretraining.base)[key]
    stage = setting.finetuning_resolved if name == "finetuning" else getattr(setting, name)
    if key == "beta":
        _needs_softmax(path, stage.activation)
        return stage.activation.beta
    if key == "recalibration":
        return _recalibration(stage)
    if key in _CHANNEL:
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
        name, key = _split(path)
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
    inputs, options = own.pop("inputs", None), {key: own.pop(key) for key in _CHANNEL if key in own}
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
    return {k: getattr(stage, k) for k in KEYS["finetuning"] if k not in ("beta", *_CHANNEL)}


def _base_fields(base: BaseLaw) -> dict[str, Any]:
    """Plain values of a base law; of a law that files do not know, its description alone."""
    for name, kind in BASE_LAWS.items():
        if isinstance(base, kind):
            return {"law": name} | {key: _plain(getattr(base, key)) for key in BASE_KEYS[name]}
    return {"law": str(base)}


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


def _plain(value: Any) -> Any:
    return value if isinstance(value, int | str) else np.asarray(value).tolist()


def _read(path: Path) -> dict[str, Any]:
    where = str(path)
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        raise SettingError(f"there is no settings file {where!r}; allowed: the path of a TOML file") from None
    except IsADirectoryError:
        raise SettingError(f"{where!r} is a directory; allowed: the path of a TOML file") from None
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise SettingError(f"{where!r} cannot be read ({reason}); allowed: the path of a TOML file") from None
    except UnicodeDecodeError as error:
        raise SettingError(
            f"{where!r} is not a text file (byte {error.start} is not UTF-8); allowed: a TOML file"
        ) from None
    try:
        return tomllib.loads(text)
    except RecursionError:
        raise SettingError(f"{where!r} is nested too deeply; allowed: a TOML file") from None
    except ValueError as error:  # tomllib's own error, and that of int() for numbers of thousands of digits
        raise SettingError(f"{where!r} is not a TOML file: {error}; allowed: key = value lines") from None


def _checked(data: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """A copy with every section present, once every name is known and every value is a single one."""
    out: dict[str, dict[str, Any]] = {name: {} for name in KEYS}
    for name, section in data.items():
        if name not in KEYS:
            raise SettingError(_unknown_section(name))
        if not isinstance(section, Mapping):
            raise SettingError(f"{name} = {_shown(section)} is not a section; allowed: [{name}] and keys below it")
        for key, value in section.items():
            if f"{name}.{key}" in KEYS and isinstance(value, Mapping):
                for inner, entry in value.items():
                    _set(out, f"{name}.{key}", inner, entry)
            else:
                _set(out, name, key, value)
    return out


def _set(sections: dict[str, dict[str, Any]], name: str, key: str, value: Any) -> None:
    if key not in KEYS[name]:
        raise SettingError(_unknown_key(name, key))
    path = f"{name}.{key}"
    vector = path in ("pretraining.base.weights", "pretraining.base.values") and isinstance(value, list)
    if isinstance(value, list | Mapping) and not vector:
        raise SettingError(f"{path} = {_shown(value)} is not a single value; allowed: one number or one word")
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) > 2**63:
        raise SettingError(f"{path} = {_shown(value)} is out of range; allowed: below 2^63 in size")
    sections[name][key] = value


def _shown(value: Any, longest: int = 40) -> str:
    if isinstance(value, int) and abs(value) > 10**longest:
        return "a very large number"
    text = repr(value)
    return text if len(text) <= longest else text[:longest] + "..."


def _override(sections: dict[str, dict[str, Any]], overrides: Iterable[str]) -> None:
    given = set()
    for text in overrides:
        path, equals, value = text.partition("=")
        if not equals:
            raise SettingError(f"override {text!r} has no '='; allowed: section.key=value, as pretraining.lam=0.02")
        name, key = _split(path.strip())
        _set(sections, name, key, parse_value(path.strip(), value.strip()))
        given.add((name, key))
    # Switching to the identity on top of a softmax file leaves no way to delete its beta: it goes by itself.
    own = "activation" in sections["finetuning"]
    for name in ("pretraining", "finetuning"):
        source = "finetuning" if name == "finetuning" and own else "pretraining"
        switched = (source, "activation") in given and sections[source]["activation"] == "identity"
        if switched and (name, "beta") not in given:
            sections[name].pop("beta", None)


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


def _split(path: str) -> tuple[str, str]:
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
        raise SettingError(_unknown_section(name))
    if key not in KEYS[name] and path not in KEYS:
        raise SettingError(_unknown_key(name, key))
    return name, key


def _nearest(word: str, known: Iterable[str], cutoff: float = 0.55) -> str | None:
    return next(iter(difflib.get_close_matches(word.lower(), list(known), n=1, cutoff=cutoff)), None)


def _unknown_section(name: str) -> str:
    homes = [f"{section}.{name}" for section, keys in KEYS.items() if name in keys]
    near = _nearest(name, KEYS)
    hint = " or ".join(homes) if homes else near
    return f"unknown section {_shown(name)}{f' (did you mean {hint}?)' if hint else ''}; allowed: {', '.join(KEYS)}"


def _unknown_key(name: str, key: str) -> str:
    near = _nearest(key, KEYS[name])
    return (
        f"unknown key {name}.{_shown(key)[1:-1]}{f' (did you mean {near}?)' if near else ''}; "
        f"allowed in [{name}]: {', '.join(KEYS[name])}"
    )
