"""Checks that come before any computation: each raises `SettingError`."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from .output import cannot_write

if TYPE_CHECKING:
    from ..setting.stages import Setting


def check_fields(option: str, fields: Sequence[str], known: Sequence[str]) -> None:
    import difflib

    from ..errors import SettingError

    if not fields:
        raise SettingError(f"{option} names no field; allowed: {', '.join(known)}")
    for field in fields:
        if field not in known:
            near = difflib.get_close_matches(field, known, n=1)
            hint = f" (did you mean {near[0]}?)" if near else ""
            raise SettingError(f"{option} {field!r} is not a continuous field{hint}; allowed: {', '.join(known)}")
        if fields.count(field) > 1:
            raise SettingError(f"{option} names {field} more than once; allowed: each field once")


def check_objective(option: str, name: str) -> None:
    from ..errors import SettingError
    from ..solution.gradients import OBJECTIVES

    if name not in OBJECTIVES:
        raise SettingError(f"{option} {name!r} is unknown; allowed: {', '.join(OBJECTIVES)}")


def check_sizes(dimension: int, runs: int, seed: int = 0) -> None:
    from ..errors import SettingError

    for option, value, low, high in (
        ("--dimension", dimension, 10, 10_000),
        ("--runs", runs, 1, 10_000),
        ("--seed", seed, 0, 2**32 - 1),
    ):
        if not low <= value <= high:
            raise SettingError(f"{option} {value} is out of range; allowed: {low} to {high}")


def check_simulation(
    setting: Setting, dimension: int, runs: int, seed: int, alone: bool = False, **options: int
) -> None:
    """Bad sizes are found before the theory is solved, which may take minutes; `alone`: of fine-tuning alone."""
    from ..simulation.on_channel import channel_samples
    from ..simulation.sizes import sizes_at
    from ..validation import whole

    check_sizes(dimension, runs, seed)
    for name, value in options.items():
        whole(name, value, 0 if name == "moves" else 1, 1000 if name == "moves" else 100)
    fine = setting.finetuning_resolved
    if alone:
        channel_samples(fine, dimension, options.get("starts", 6))
    else:
        sizes_at(setting.pretraining, fine, dimension, 1)


def directory(out: Path) -> Path:
    """The directory, made if need be, once it is known that files can be written there."""
    from ..errors import SettingError

    try:
        if out.exists() and not out.is_dir():
            raise SettingError(f"--out {str(out)!r} is a file; allowed: a directory, existing or new")
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):
            pass
    except OSError as error:
        raise SettingError(cannot_write(out, error)) from None
    return out
