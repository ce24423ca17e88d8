"""Arrays from a user's files, `.npz` or `.safetensors`, by the names that the theory or PyTorch gives them."""

from __future__ import annotations

import importlib
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import SettingError

#: Each array by its name here, and how names in checkpoints end that mean the same, transposed as PyTorch keeps them.
NAMES: dict[str, tuple[str, ...]] = {
    "W": (),
    "S": (),
    "W_Q": ("q_proj.weight", "query.weight"),
    "W_K": ("k_proj.weight", "key.weight"),
    "X": (),
    "labels": (),
}


#: Largest entry, in size: fourth powers of logits are averaged.
_LARGEST = 1e12


def read(paths: Sequence[str | Path], layer: str = "") -> dict[str, np.ndarray]:
    """The arrays of `NAMES` that the files have, all of them float64 and finite.

    `layer`: what the names of one layer's arrays start with in a checkpoint of many, as "model.layers.3.self_attn". A
    `SettingError` says which file cannot be read and why, or which array is there twice.
    """
    found: dict[str, np.ndarray] = {}
    for path in map(Path, paths):
        names, get = _open(path)
        for own, (name, flip) in _wanted(path, names, layer).items():
            if own in found:
                raise SettingError(f"{str(path)!r} has {own}, which an earlier file has too; allowed: once")
            array = numbers(own, get(name))
            found[own] = array.T if flip else array
    return found


def _wanted(path: Path, names: Sequence[str], layer: str) -> dict[str, tuple[str, bool]]:
    """For each array that the file has: its name there, and whether it is transposed."""
    prefix = layer.rstrip(".") + "." if layer else ""
    inside = [name for name in names if name.startswith(prefix)]
    wanted: dict[str, tuple[str, bool]] = {}
    for own, endings in NAMES.items():
        ours = [name for name in names if name in (own, prefix + own)]
        theirs = [name for name in inside if endings and name.endswith(endings)]
        if len(ours + theirs) > 1:
            raise SettingError(
                f"{str(path)!r} has {len(ours + theirs)} arrays for {own} ({_some(ours + theirs)}); "
                "allowed: one, or layer = what the names of one layer start with"
            )
        if ours or theirs:
            wanted[own] = (ours + theirs)[0], not ours
    if not wanted:
        where = f" under {layer!r}" if layer else ""
        raise SettingError(f"{str(path)!r} has none of {', '.join(NAMES)}{where}; there are {_some(names)}")
    return wanted


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "") or "no arrays at all"


def _open(path: Path) -> tuple[list[str], Callable[[str], Any]]:
    """The names of a file's arrays, and what reads one."""
    readers = {".npz": _npz, ".safetensors": _safetensors}
    if path.suffix not in readers:
        raise SettingError(f"{str(path)!r} is no file of arrays; allowed: {', '.join(readers)}")
    if not path.is_file():
        raise SettingError(f"{str(path)!r} is not there; allowed: a file that exists")
    return readers[path.suffix](path)


def _unreadable(path: Path, error: BaseException) -> SettingError:
    why = str(error).splitlines()[0] if str(error) else type(error).__name__
    return SettingError(f"{str(path)!r} cannot be read ({why}); allowed: a whole {path.suffix} file of numbers")


def _npz(path: Path) -> tuple[list[str], Callable[[str], Any]]:
    try:
        with path.open("rb") as raw, np.load(raw, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files if name in NAMES or "." in name}
            return list(file.files), arrays.__getitem__
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise _unreadable(path, error) from None


def _safetensors(path: Path) -> tuple[list[str], Callable[[str], Any]]:
    try:
        safetensors = importlib.import_module("safetensors")
    except ImportError:
        raise SettingError(
            f"{str(path)!r} needs the package safetensors, which is not installed; "
            "allowed: pip install 'lorastate[practice]', or an .npz file"
        ) from None
    try:
        # As arrays of JAX: NumPy alone has no bfloat16.
        file = safetensors.safe_open(str(path), framework="flax")
        return list(file.keys()), file.get_tensor
    except (OSError, ValueError, safetensors.SafetensorError) as error:
        raise _unreadable(path, error) from None


def numbers(name: str, value: Any) -> np.ndarray:
    """A float64 array of finite numbers, else a `SettingError`."""
    try:
        array = np.asarray(value)
        if array.dtype.kind in "OSUcMm":
            raise TypeError
        array = np.asarray(array, np.float64)  # bfloat16 too
    except (TypeError, ValueError):
        raise SettingError(f"{name} is not an array of real numbers; allowed: floats") from None
    if not np.all(np.isfinite(array)):
        raise SettingError(f"{name} has {np.sum(~np.isfinite(array))} entries that are not finite; allowed: none")
    if np.max(np.abs(array), initial=0.0) > _LARGEST:
        raise SettingError(f"{name} has an entry of size {np.max(np.abs(array)):.3g}; allowed: up to {_LARGEST:g}")
    return array
