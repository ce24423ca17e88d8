"""The labelled dataset that a sweep returns, and what is to be said of it in a few numbers."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from .._version import __version__
from ..design.descent import End
from ..errors import Code, succeeded
from ..predictions import prediction
from ..setting.files import setting_to_dict
from ..setting.stages import Setting
from .chunks import GRADIENT, STAGES
from .optima import OPTIMUM

if TYPE_CHECKING:
    import xarray


def labelled(
    setting: Setting,
    axes: Mapping[str, list[Any]],
    columns: Sequence[str],
    rows: Mapping[int, np.ndarray],
    gradient: str | None,
) -> xarray.Dataset:
    """The finished points, by their number in the grid, as a dataset: NaN, and code -1, where one is missing."""
    import xarray

    shape = tuple(len(v) for v in axes.values())
    table = np.full((math.prod(shape), len(columns)), np.nan)
    for index, values in rows.items():
        table[index] = values
    dims, variables = tuple(axes), {}
    for k, name in enumerate(columns):
        values, attributes = table[:, k].reshape(shape), _attributes(name, gradient)
        if name.endswith((".code", ".steps", "optimum.end", "optimum.solves")):
            values = np.where(np.isfinite(values), values, -1).astype(np.int32)
        # A word of an axis stands for a number that is found: both are there, by two names.
        variables[f"{name}_value" if name in axes else name] = (dims, values, attributes)
    attributes = {
        "title": "lorastate sweep",
        "setting": json.dumps(setting_to_dict(setting)),
        "version": __version__,
        "source": "arXiv:2606.05899",
    }
    return xarray.Dataset(variables, {p: (p, np.array(v)) for p, v in axes.items()}, attributes)


def _attributes(name: str, gradient: str | None) -> dict[str, Any]:
    if name.startswith(GRADIENT):
        return {"long_name": f"derivative of {gradient} by {name.removeprefix(GRADIENT)}"}
    if name.startswith(OPTIMUM):
        return _optimum_attributes(name.removeprefix(OPTIMUM))
    stage, key = name.split(".")
    if key == "code":
        values, words = np.array(list(Code), np.int32), " ".join(c.name for c in Code)
        return {"long_name": "result of the solve; -1 not done", "flag_values": values, "flag_meanings": words}
    plain = key.removesuffix("_stderr")
    meaning = prediction(stage, plain).meaning or plain
    return {"long_name": meaning if plain == key else f"quadrature standard error of: {meaning}"}


def _optimum_attributes(name: str) -> dict[str, Any]:
    if name == "end":
        return {
            "long_name": "how the descent ended; -1 not done",
            "flag_values": np.arange(len(End), dtype=np.int32), "flag_meanings": " ".join(e.name for e in End),
        }  # fmt: skip
    meanings = {
        "gradient_norm": "norm of the gradient in logarithms of the fields, over the size of the objective",
        "converged": "1 where the descent ended in an optimum, else 0",
        "solves": "solves that the descent took",
    }
    return {"long_name": meanings.get(name, f"{name} at the optimum")}


def summary(dataset: xarray.Dataset) -> dict[str, Any]:
    """How many points there are and were not solved, why, where E' is lowest, and how many are no optimum, if that is
    what was looked for (else None)."""
    codes = {stage: dataset[f"{stage}.code"].values.ravel() for stage in STAGES}
    failed = np.zeros(codes["pretraining"].size, bool)
    reasons: dict[str, int] = {}
    for stage, values in codes.items():
        for code, count in zip(*np.unique(values, return_counts=True), strict=True):
            if code < 0 or not succeeded(code):
                name = "not done" if code < 0 else f"{stage} {Code(code).name}"
                reasons[name] = int(count)
        failed |= ~np.asarray(succeeded(values))
    error = dataset["finetuning.test_error"]
    best = None
    if np.any(np.isfinite(error.values)):
        where = error.argmin(...)
        at = {str(p): dataset[p].values[int(k.values)].item() for p, k in where.items()}
        here = {p: int(k.values) for p, k in where.items()}
        stderr = float(dataset["finetuning.test_error_stderr"].isel(here))
        best = {"at": at, "test_error": float(error.isel(here)), "stderr": stderr}
    found = {"points": int(failed.size), "failed": int(failed.sum()), "codes": reasons, "best": best}
    converged = dataset.get(f"{OPTIMUM}converged")
    return found | {"no_optimum": None if converged is None else int((converged.values != 1.0).sum())}
