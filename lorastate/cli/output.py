"""What goes to stdout, to stderr and to files: text and plain JSON."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .._version import __version__

if TYPE_CHECKING:
    from ..setting.stages import Setting


def say(text: str) -> None:
    _print(text, sys.stdout)


def warn(text: str) -> None:
    _print(f"lorastate: {text}", sys.stderr)


def _print(text: str, file: Any) -> None:
    tqdm = sys.modules.get("tqdm")
    if tqdm is None or not sys.stderr.isatty():
        print(text, file=file)
        return
    with tqdm.tqdm.external_write_mode(file=file):  # bars make room
        print(text, file=file, flush=True)


def clean(value: Any) -> Any:
    """The same in plain JSON types, undefined numbers as None."""
    if isinstance(value, Mapping):
        return {str(key): clean(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [clean(item) for item in value]
    if value is None or isinstance(value, str | bool):
        return value
    if hasattr(value, "tolist"):
        return clean(value.tolist())
    if isinstance(value, int):
        return int(value)
    return float(value) if math.isfinite(value) else None


def dumps(value: Any) -> str:
    return json.dumps(clean(value), indent=2, allow_nan=False)


def with_setting(result: Mapping[str, Any], setting: Setting) -> dict[str, Any]:
    """The result, the setting that it is of, and the version that made it."""
    from ..setting.files import setting_to_dict

    return {**result, "setting": setting_to_dict(setting), "version": __version__}


def print_json(value: Any) -> None:
    print(dumps(value))


def write_json(path: Path, value: Any) -> None:
    from ..errors import SettingError

    try:
        path.write_text(dumps(value) + "\n", encoding="utf-8")
    except OSError as error:
        raise SettingError(cannot_write(path, error)) from None


def cannot_write(out: Path, error: OSError) -> str:
    return f"--out {str(out)!r} cannot be written to ({error.strerror or error}); allowed: a writable directory"
