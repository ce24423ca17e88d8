"""Runs of a training, one after the other: each is in a directory as soon as it is made, if there is one, and the same
call goes on from there."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from tqdm import tqdm

from .._version import SOURCE
from ..errors import SettingError
from ..runtime.journal import Journal, held
from ..setting.files import description
from ..setting.stages import Setting
from .result import SimulationInterrupted

Result = TypeVar("Result")


def trained(
    one: Callable[[int, Any], Any], runs: range, bar: tqdm, out: Path | None, manifest: Mapping[str, Any],
    collected: Callable[[Mapping[int, Any]], Result],
) -> Result:  # fmt: skip
    """`collected({run: what one(run, bar) made})`; after Ctrl-C `SimulationInterrupted` with that of the complete runs.

    What a run makes are numbers, and lists, arrays and dictionaries of them. `bar` counts as many steps for each.
    """
    done: dict[int, Any] = {}
    with contextlib.ExitStack() as stack:
        stack.enter_context(bar)
        journal = None
        if out is not None:
            stack.enter_context(held(out, 0, "simulation"))
            journal = Journal(out, {"source": SOURCE, **manifest}, 0, "simulation")
            columns, rows = journal.rows()
            done = {run: _nested(columns, rows[run]) for run in runs if run in rows}
        bar.update(len(done) * (bar.total or 0) // len(runs))
        try:
            for run in runs:
                if run not in done:
                    done[run] = one(run, bar)
                    if journal:
                        flat = dict(_flat(done[run]))
                        journal.append(list(flat), {run: np.array(list(flat.values()))})
        except KeyboardInterrupt:
            if not done:
                raise
            raise SimulationInterrupted(collected(dict(sorted(done.items())))) from None
    return collected({run: done[run] for run in runs})


def described(setting: Setting, out: Any, data: Any = None, **options: Any) -> tuple[Path | None, dict[str, Any]]:
    """The directory, and what it is the directory of."""
    if out is None:
        return None, {}
    if data is not None:
        raise SettingError(f"out = {str(out)!r} cannot keep runs on data of one's own; allowed: one of out and data")
    return Path(out), {"setting": description(setting), **options}


def _flat(value: Any, path: str = "") -> Iterator[tuple[str, float]]:
    if isinstance(value, Mapping):
        pairs = value.items()
    elif isinstance(value, list | tuple) or np.ndim(value):
        pairs = enumerate(value)
    else:
        yield path, float(value)
        return
    for key, part in pairs:
        yield from _flat(part, f"{path}/{key}" if path else str(key))


def _nested(columns: Iterable[str], values: Iterable[float]) -> Any:
    """The inverse of `_flat`, with lists for what was counted."""
    root: dict[str, Any] = {}
    for path, value in zip(columns, values, strict=True):
        *names, last = path.split("/")
        place = root
        for name in names:
            place = place.setdefault(name, {})
        place[last] = float(value)
    return _counted(root)


def _counted(tree: Any) -> Any:
    if not isinstance(tree, dict):
        return tree
    parts = {key: _counted(part) for key, part in tree.items()}
    return list(parts.values()) if "0" in parts else parts
