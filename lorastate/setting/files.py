"""Settings as TOML files and plain dictionaries."""

from __future__ import annotations

import dataclasses
import os
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import equinox as eqx
import numpy as np

from ..errors import SettingError
from ..model.activation import Softmax
from ..model.spectra.laws import BaseLaw
from .fields import KEYS
from .named import BASE_KEYS, BASE_LAWS, CHANNEL_KEYS
from .numerics import Numerics
from .paths import (
    parse_value,
    recalibration_word,
    shown,
    split,
    unknown_key,
    unknown_section,
)
from .stages import Finetuning, Pretraining, Setting

_REQUIRED = {"pretraining": ("alpha", "lam"), "finetuning": ("alpha", "lam")}
#: How the names of this package's modules begin.
_PACKAGE = __name__.partition(".")[0] + "."

_OBJECTS = ("activation", "beta", "inputs", "recalibration")


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
        out[name] |= {key: _plain(getattr(stage, key)) for key in KEYS[name] if key not in (*_OBJECTS, *CHANNEL_KEYS)}
    task = setting.pretraining.task
    if setting.pretraining.base is not None:
        del out["pretraining"]["kappa0"]
        out["pretraining"]["base"] = _base_fields(setting.pretraining.base)
    if task is not None:
        out["pretraining"]["task"] = {key: _plain(getattr(task, key)) for key in KEYS["pretraining.task"]}
    out["finetuning"]["inputs"] = fine.inputs.name
    out["finetuning"] |= {key: _plain(getattr(fine.inputs, key)) for key in fine.inputs.options}
    out["finetuning"]["recalibration"] = _plain(recalibration_word(fine))
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
    if isinstance(value, eqx.Module) and type(value).__module__.startswith(_PACKAGE):
        fields = {field.name: description(getattr(value, field.name)) for field in dataclasses.fields(value)}
        return {"kind": type(value).__name__} | fields
    raise SettingError(
        f"{shown(value)} is code of your own, whose results cannot be known again; allowed: what settings files know"
    )


def _base_fields(base: BaseLaw) -> dict[str, Any]:
    """Plain values of a base law; of a law that files do not know, its description alone."""
    for name, kind in BASE_LAWS.items():
        if isinstance(base, kind):
            return {"law": name} | {key: _plain(getattr(base, key)) for key in BASE_KEYS[name]}
    return {"law": str(base)}


def _plain(value: Any) -> Any:
    return value if isinstance(value, int | str) else np.asarray(value).tolist()


#: Bytes that a settings file may have: what is longer, or without end, is none.
_MOST = 10**6


def _read(path: Path) -> dict[str, Any]:
    where = str(path)
    try:
        with path.open("rb") as file:
            data = file.read(_MOST + 1)
        if len(data) > _MOST:
            raise SettingError(f"{where!r} has more than {_MOST:,} bytes; allowed: a TOML file of a few lines")
        text = data.decode("utf-8-sig")
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
            raise SettingError(unknown_section(name))
        if not isinstance(section, Mapping):
            raise SettingError(f"{name} = {shown(section)} is not a section; allowed: [{name}] and keys below it")
        for key, value in section.items():
            if f"{name}.{key}" in KEYS and isinstance(value, Mapping):
                for inner, entry in value.items():
                    _set(out, f"{name}.{key}", inner, entry)
            else:
                _set(out, name, key, value)
    return out


def _set(sections: dict[str, dict[str, Any]], name: str, key: str, value: Any) -> None:
    if key not in KEYS[name]:
        raise SettingError(unknown_key(name, key))
    path = f"{name}.{key}"
    vector = path in ("pretraining.base.weights", "pretraining.base.values") and isinstance(value, list)
    if isinstance(value, list | Mapping) and not vector:
        raise SettingError(f"{path} = {shown(value)} is not a single value; allowed: one number or one word")
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) > 2**63:
        raise SettingError(f"{path} = {shown(value)} is out of range; allowed: below 2^63 in size")
    sections[name][key] = value


def _override(sections: dict[str, dict[str, Any]], overrides: Iterable[str]) -> None:
    given = set()
    for text in overrides:
        path, equals, value = text.partition("=")
        if not equals:
            raise SettingError(f"override {text!r} has no '='; allowed: section.key=value, as pretraining.lam=0.02")
        name, key = split(path.strip())
        _set(sections, name, key, parse_value(path.strip(), value.strip()))
        given.add((name, key))
    # Switching to the identity on top of a softmax file leaves no way to delete its beta: it goes by itself.
    own = "activation" in sections["finetuning"]
    for name in ("pretraining", "finetuning"):
        source = "finetuning" if name == "finetuning" and own else "pretraining"
        switched = (source, "activation") in given and sections[source]["activation"] == "identity"
        if switched and (name, "beta") not in given:
            sections[name].pop("beta", None)
