"""Discrete fields of a design: one descent for every combination of their values, and the best of them."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ..errors import Code, SettingError, SolveError
from ..setting.fields import continuous_fields
from ..setting.paths import replace_all
from ..setting.stages import Setting
from .optimum import Optimum


def best_choice(setting: Setting, scan: Mapping[str, Sequence[Any]], descend: Callable[[Setting], Optimum]) -> Optimum:
    """The best of the descents from every combination of the discrete fields in `scan`."""
    choices = _choices(setting, scan)
    settings = [replace_all(setting, choice) for choice in choices]  # raises where a field or a value does not exist
    for at in settings:
        at.finetuning_resolved  # noqa: B018  raises where the stages do not go together
    results: list[tuple[dict[str, Any], Optimum | None, str]] = []
    for choice, at in zip(choices, settings, strict=True):
        try:
            found = descend(at)
            results.append((choice, found, found.message))
        except SolveError as error:
            results.append((choice, None, str(error)))
    done = [found for _, found, _ in results if found is not None]
    if not done:
        raise SolveError("optimize", Code.nonfinite, f"every choice of {', '.join(scan)}: {results[0][2]}")
    best = min(done, key=lambda o: (not o.converged, o.path[-1]["value"]))
    best.scanned = [
        choice
        | {
            "value": None if found is None else found.path[-1]["value"],
            "converged": found is not None and found.converged,
            "message": message,
            **({} if found is None else {p: found.path[-1][p] for p in found.over}),
        }
        for choice, found, message in results
    ]
    best.solves = sum(found.solves for found in done)
    best.initial = setting
    return best


def _choices(setting: Setting, scan: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    """Every combination of values, by path."""
    for path, values in scan.items():
        if not isinstance(values, Sequence) or isinstance(values, str) or not len(values):
            raise SettingError(f"scan of {path!r} has no values; allowed: a list such as [2, 3, 4]")
        if path in continuous_fields(setting):
            raise SettingError(f"scan of {path!r}: this field is continuous; allowed: descend it with `over`")
    return [dict(zip(scan, combination, strict=True)) for combination in itertools.product(*scan.values())]
