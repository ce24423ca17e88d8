"""Theory against training at several D, both ways, run by run: `verify`."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from .._version import SOURCE
from ..errors import Code, SettingError, require_float64
from ..predictions import measured_names
from ..runtime.journal import Journal, held
from ..setting.files import description
from ..setting.stages import Setting
from ..simulation.on_channel import channel_samples
from ..simulation.simulate import simulate
from ..simulation.sizes import sizes_at
from ..solution.solution import Solution, predict
from ..validation import whole
from .extrapolation import extrapolate, rate
from .result import WAYS, Row, Verification, judged

#: Runs are numbered D * _RUNS + run in a journal.
_RUNS = 10_000


class VerificationInterrupted(KeyboardInterrupt):
    """Ctrl-C during `verify`: how many runs were complete, and where they are."""

    def __init__(self, finished: int, total: int, out: Path | None):
        self.finished, self.total, self.out = finished, total, out
        kept = f" and kept in {out}: the same command goes on" if out else ""
        super().__init__(f"{finished} of {total} runs are complete{kept}")


class _Way(NamedTuple):
    """One way of training: the runs at every D, and what makes one of them: values by name, `code` among them."""

    runs: dict[int, int]
    train: Callable[[int, int], dict[str, float]]

    def left(self, rows: Mapping[int, Any]) -> list[tuple[int, int]]:
        """(D, run) of what is not done, small D first."""
        jobs = [(d, run) for d in sorted(self.runs) for run in range(self.runs[d])]
        return [(d, run) for d, run in jobs if d * _RUNS + run not in rows]


def verify(
    setting: Setting,
    *,
    out: str | os.PathLike[str] | None = None,
    dimensions: Sequence[int] = (50, 100, 200),
    alone: Sequence[int] = (100, 200, 400, 800),
    runs: int = 4,
    seed: int = 0,
    starts: int | None = None,
    moves: int | None = None,
    progress: bool = False,
) -> Verification:
    """Trains the whole model at `dimensions` and fine-tuning alone, on the channel that the theory assumes, at the
    dimensions `alone`, and extrapolates every measured quantity x(D) = limit + slope/D beside its prediction.

    `runs` at the largest D of each way, more at smaller ones in proportion to 1/D; `starts` and `moves` as `simulate`
    has them. Either list of dimensions may be empty. With `out`, a directory, every run is written at once and the same
    call goes on after any interruption, also with more runs or other dimensions. One run is in memory at a time.

    A quantity differs where limit and theory are apart by more than 4 standard errors and 2 %, and in a glass by more
    than the minima reached from w* are apart from the lowest ones. In a glass fine-tuning is judged alone only: there
    its lowest minima are searched for. What is zero in the theory is of order D^(-1/2) in training, and not judged.

    Raises `SettingError` on bad input, `SolveError` where there is no theory, `VerificationInterrupted` (a
    KeyboardInterrupt) on Ctrl-C.
    """
    require_float64()
    runs, seed = whole("runs", runs, 2, 1000), whole("seed", seed, 0, 2**32 - 1)
    starts = None if starts is None else whole("starts", starts, 1, 100)
    moves = None if moves is None else whole("moves", moves, 0, 1000)
    sizes = {"whole": _dimensions("dimensions", dimensions), "alone": _dimensions("alone", alone)}
    if not any(sizes.values()):
        raise SettingError("dimensions and alone are both empty; allowed: two or more dimensions in one of them")
    fine: Any = setting.finetuning_resolved
    for d in sizes["whole"]:
        sizes_at(setting.pretraining, fine, d, 1)
    for d in sizes["alone"]:
        channel_samples(fine, d, starts or 6)
    solution = predict(setting)
    ways = {
        "whole": _Way(_counts(sizes["whole"], runs), lambda d, run: _whole(setting, d, run, seed, starts)),
        "alone": _Way(_counts(sizes["alone"], runs), lambda d, run: _alone(setting, d, run, seed, starts, moves)),
    }
    folder = None if out is None else Path(out)
    manifest = {"source": SOURCE, "seed": seed, "starts": starts, "moves": moves}
    if folder:
        manifest["setting"] = description(setting)
    rows = _trained(ways, folder, manifest, progress)
    samples, failed = {}, {}
    for way, (columns, table) in rows.items():
        wanted = {i: v for i, v in table.items() if i % _RUNS < ways[way].runs.get(i // _RUNS, 0)}
        samples[way], failed[way] = _by_dimension(columns, wanted)
    found = tuple(row for way in WAYS for row in _rows(solution, way, samples[way]))
    counts = {way: ways[way].runs for way in WAYS}
    return Verification(setting, solution, found, samples, counts, failed, seed)


def _dimensions(name: str, given: Sequence[int]) -> list[int]:
    """Ascending, each once; none, or two at least."""
    found = sorted({whole(name, d, 10, 10_000) for d in given})
    if len(found) == 1:
        raise SettingError(f"{name} = {found} cannot be extrapolated; allowed: two dimensions or more, or none")
    return found


def _counts(dimensions: list[int], runs: int) -> dict[int, int]:
    """More runs at smaller D, for the same work and about the same error bars."""
    return {d: min(math.ceil(runs * dimensions[-1] / d), _RUNS) for d in dimensions}


# ---- training --------------------------------------------------------------------------------------------------


def _whole(setting: Setting, d: int, run: int, seed: int, starts: int | None) -> dict[str, float]:
    """Every quantity of both stages of one run, "STAGE.NAME", and the first code that is not ok."""
    found = simulate(setting, dimension=d, runs=1, seed=seed, first=run, starts=starts)
    values = {
        f"{stage}.{name}": float(table[name][0])
        for stage, table in found.tables.items()
        for name in measured_names(stage)
        if name in table
    }
    codes = [found.codes[stage][0] for stage in found.tables]
    return {**values, "code": float(next((code for code in codes if code != Code.ok), Code.ok))}


def _alone(setting: Setting, d: int, run: int, seed: int, starts: int | None, moves: int | None) -> dict[str, float]:
    """Every quantity of the lowest minimum of one run, and of the one reached from w*, "SEARCH.NAME"."""
    found = simulate(
        setting, stage="finetuning", dimension=d, runs=1, seed=seed, first=run, starts=starts, moves=moves
    )  # fmt: skip
    values = {
        f"{search}.{name}": float(column[0])
        for search in ("deep", "informed")
        for name, column in found.searches[search].items()
    }
    return {**values, "code": float(found.codes["deep"][0])}


@contextlib.contextmanager
def _journals(out: Path | None, manifest: dict[str, Any]) -> Iterator[dict[str, Journal]]:
    """A journal for each way, in a directory that is this process's own for so long; none without a directory."""
    with contextlib.ExitStack() as stack:
        if out is None:
            yield {}
            return
        stack.enter_context(held(out, 0, "verification"))
        for way in WAYS:
            (out / way).mkdir(parents=True, exist_ok=True)
        yield {way: Journal(out / way, manifest, 0, "verification") for way in WAYS}


def _trained(ways: dict[str, _Way], out: Path | None, manifest: dict[str, Any], progress: bool):
    """Columns, and values by number, of the runs of each way."""
    with _journals(out, manifest) as journals:
        found = {way: journals[way].rows() if journals else ([], {}) for way in ways}
        left = {way: ways[way].left(found[way][1]) for way in ways}
        total = sum(sum(way.runs.values()) for way in ways.values())
        done = total - sum(map(len, left.values()))
        with tqdm(total=total, initial=done, disable=not progress, desc="verify", unit="run") as bar:
            for way, jobs in left.items():
                for d, run in jobs:
                    bar.set_postfix_str(f"{WAYS[way]}, D = {d}")
                    try:
                        row = ways[way].train(d, run)
                    except KeyboardInterrupt:
                        raise VerificationInterrupted(done, total, out) from None
                    columns, rows = found[way]
                    columns = columns or list(row)
                    new = {d * _RUNS + run: np.array([row[name] for name in columns])}
                    if journals:
                        journals[way].append(columns, new)
                    found[way] = columns, rows | new
                    done += 1
                    bar.update()
    return found


def _by_dimension(columns: list[str], rows: Mapping[int, np.ndarray]):
    """{name: {D: values of the runs that converged}}, and how many did not."""
    good = {i: row for i, row in sorted(rows.items()) if row[columns.index("code")] == Code.ok}
    dimensions = sorted({i // _RUNS for i in good})

    def at(d: int, k: int) -> np.ndarray:
        return np.array([row[k] for i, row in good.items() if i // _RUNS == d])

    samples = {name: {d: at(d, k) for d in dimensions} for k, name in enumerate(columns) if name != "code"}
    return samples, len(rows) - len(good)


# ---- judging ---------------------------------------------------------------------------------------------------


def _rows(solution: Solution, way: str, samples: Mapping[str, Mapping[int, np.ndarray]]) -> Iterator[Row]:
    """A row for every quantity that has a theory and training at two D."""
    glass = solution.symmetry == "one-step broken"
    for column, runs in samples.items():
        head, name = column.split(".", 1)
        if head == "informed" or (name == "M_down" and solution.setting.pretraining.task is None):
            continue
        stage = "finetuning" if way == "alone" else head
        theory = float(getattr(solution, stage).get(name, math.nan))
        law = extrapolate(runs, _power(solution, way, stage))
        if law is None or not math.isfinite(theory) or not math.isfinite(law.limit):
            continue
        error = solution.stderr(stage, name)
        spread = 0.0
        if glass and way == "alone":
            near = extrapolate(samples[f"informed.{name}"])
            spread = abs(near.limit - law.limit) if near else 0.0
        falls = rate(runs, theory)
        error = error if math.isfinite(error) else 0.0
        row = Row(way, stage, name, theory, error, law, *falls, spread, "")
        why_not = "zero in the theory" if abs(theory) < 1e-6 else ""
        if glass and way == "whole" and stage == "finetuning" and not name.endswith("_frozen"):
            why_not = "a glass: judged alone"
        yield judged(row, why_not)


def _power(solution: Solution, way: str, stage: str) -> float:
    """Corrections are of order 1/D, but where training picks the largest of random singular values of w*."""
    fine: Any = solution.setting.finetuning_resolved
    return 0.5 if way == "whole" and stage == "finetuning" and fine.rank < fine.teacher_rank else 1.0
