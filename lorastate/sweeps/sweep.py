"""Sweeps: every prediction on a grid of settings, as one labelled dataset, on all devices and hosts.

Points of the same kind (tokens, activations, inputs, numerics) run through one compiled program, a chunk at a time. The
lanes of a chunk are shared out over the local devices (`jax.shard_map`); on a CPU a device takes its lanes one after
the other, so that a lane is what `predict` would give alone, on an accelerator all at once. With JAX's multi-process
runtime every process takes its share of the points. Each point is appended to a file once it is known: a sweep that was
stopped in any way goes on where it was.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from tqdm import tqdm

from .._version import SOURCE
from ..errors import SettingError, require_float64
from ..runtime.journal import Alive, Journal, held, write_whole
from ..setting.fields import continuous_fields
from ..setting.files import description
from ..setting.paths import replace_all
from ..setting.stages import Setting
from ..solution import gradients
from .chunks import GRADIENT, chosen_devices, kind, lanes_on, run
from .dataset import labelled
from .grid import blocks, plain_axes, point
from .optima import Descents

if TYPE_CHECKING:
    import xarray

#: Seconds without a sign of life after which another process counts as dead.
_PATIENCE = 30.0


class SweepInterrupted(KeyboardInterrupt):
    """Ctrl-C during `sweep`: `finished` of `total` points are done, and on disk if there is a directory."""

    def __init__(self, finished: int, total: int, out: Path | None):
        self.finished, self.total, self.out = finished, total, out
        kept = f"they are in {out}; the same command goes on from there" if out else "without a directory they are lost"
        super().__init__(f"{finished} of {total} points are finished; {kept}")


class SweepIncomplete(RuntimeError):
    """Another process of the sweep has stopped before its share was done."""


def sweep(
    setting: Setting,
    grid: Mapping[str, Iterable[Any]],
    *,
    out: str | os.PathLike[str] | None = None,
    gradient: str | None = None,
    optimize: Sequence[str] = (),
    minimize: str = "test_error",
    devices: Any = None,
    chunk: int | None = None,
    progress: bool = False,
    patience: float = _PATIENCE,
) -> xarray.Dataset:
    """Predicts `setting` at every point of `grid`, {dotted path: values}, as an `xarray.Dataset`.

    Its dimensions are the paths, its variables "pretraining.NAME" and "finetuning.NAME" for every prediction of
    `Solution`, "..._stderr" for their quadrature errors, and "STAGE.code", "residual", "rate", "steps" for the solves
    (`Code`; predictions of a failed stage are NaN). `gradient` = "test_error", "effective_noise" or "overlap" adds
    "gradient.PATH", its derivative by every continuous field. Axes may be numbers or words (activation, inputs).

    With `optimize`, fields that are not axes, every point is an optimum: they are descended as `optimize` does it to
    where `minimize` is lowest, from the optimum of the point before, one after the other on one device. Predictions are
    those at the optimum; "optimum.PATH" are the fields there, "optimum.gradient_norm" the norm of its gradient,
    "optimum.converged" whether it is an optimum, "optimum.end" how the descent ended and "optimum.solves" the number of
    solves. With an axis "numerics.seed" their spread over the seeds is the error bar of the fields.

    With `out`, a directory, finished points are written at once and `sweep.nc` at the end: after any interruption the
    same call goes on. One with another setting or another version of this package is refused, as is a second one at the
    same time, and a setting with code of your own in it, which nobody can tell apart from other code.

    `devices`: a number, "all", or JAX devices (default: one). `chunk`: points that each device takes at a time. Under
    `jax.distributed` every process takes its share of the points and `out` must be a directory that they all see;
    process 0 waits for the others, which return what is there when their own share is done.

    Raises `SettingError` for a bad grid (every point must be a setting), `SweepInterrupted` (a KeyboardInterrupt) on
    Ctrl-C, and `SweepIncomplete` when another process gives no sign of life for `patience` seconds. A point that cannot
    be solved raises nothing.
    """
    require_float64()
    axes = plain_axes(setting, grid)
    _check_options(gradient, optimize, chunk, out)
    chosen = chosen_devices(devices)
    task = _task(setting, axes, gradient, Descents.of(optimize, minimize, axes) if len(optimize) else None)
    most = -(-max(map(len, task.kinds.values())) // jax.process_count())
    mesh, lanes = Mesh(np.array(chosen), ("lane",)), lanes_on(chosen, chunk, most)
    # What is traced is made for these devices.
    with jax.default_device(chosen[0]), _opened(out, task) as journal:
        columns, rows = _finished(task, journal, mesh, lanes, patience, progress)
        data = labelled(setting, axes, columns, rows, gradient)
        if journal and jax.process_index() == 0:
            write_whole(journal.out / "sweep.nc", bytes(data.to_netcdf(engine="scipy", format="NETCDF3_64BIT")))
    return data


def _check_options(gradient: str | None, optimize: Sequence[str], chunk: int | None, out: Any) -> None:
    if gradient is not None:
        gradients.check_objective(gradient)
        if len(optimize):
            raise SettingError(f"gradient = {gradient!r} has no meaning beside optimize; allowed: one of them")
    if chunk is not None and (isinstance(chunk, bool) or not isinstance(chunk, int) or chunk < 1):
        raise SettingError(f"chunk = {chunk!r} is out of range; allowed: a whole number of at least 1")
    if jax.process_count() > 1 and out is None:
        raise SettingError("out is missing; allowed: a directory that all processes of the sweep see")


class _Task(NamedTuple):
    """What is to be done: the numbers of the points of the grid that go through the same program (`kinds`), and the
    columns that only some points have (`more`): derivatives by their fields. `descents`: what is descended at every
    point, if anything."""

    setting: Setting
    axes: dict[str, list[Any]]
    gradient: str | None
    kinds: dict[Any, list[int]]
    more: list[str]
    descents: Descents | None

    def at(self, index: int) -> Setting:
        return replace_all(self.setting, point(self.axes, index))

    @property
    def count(self) -> int:
        return math.prod(self.shape)

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(map(len, self.axes.values()))

    def share(self, process: int, processes: int) -> Sequence[int]:
        """The points of a process. Descents that follow one another along the last axis are those of one."""
        together = 1 if self.descents is None else self.shape[-1]
        if together == 1:
            return range(process, self.count, processes)
        return [i for i in range(self.count) if i // together % processes == process]

    def chunks(self, indices: Iterable[int], lanes: int) -> Iterator[list[int]]:
        """Points that are done together, of those in `indices`: of one kind, or one descent at a time."""
        left = set(indices)
        if self.descents is not None:
            yield from ([index] for index in sorted(left))
            return
        for alike in self.kinds.values():
            mine = [index for index in alike if index in left]
            for k in range(0, len(mine), lanes):
                yield mine[k : k + lanes]

    def found(
        self, indices: list[int], columns: list[str], rows, mesh: Mesh, lanes: int
    ) -> Iterator[dict[int, dict[str, float]]]:
        """Their rows by number, as soon as they are known; `columns` and `rows` are of those that are done."""
        if self.descents is None:
            for some in run([self.at(i) for i in indices], self.gradient, mesh, lanes):
                yield {indices[k]: row for k, row in some.items()}
            return
        for i in indices:
            near = self.descents.neighbour(i, self.shape, columns, rows)
            yield {i: self.descents.row(self.at(i), near)}


def _task(setting: Setting, axes: dict[str, list[Any]], gradient: str | None, descents: Descents | None) -> _Task:
    """All points, so that a bad one is found before any is solved."""
    task = _Task(setting, axes, gradient, {}, [], descents)
    more: dict[str, None] = dict.fromkeys(descents.columns if descents else ())
    for block, corners in blocks(axes, continuous_fields(task.at(0))):
        looked_at = [task.at(index) for index in corners]
        kinds = [kind(at) for at in looked_at]  # the first stands for all
        if descents is not None:
            for at in looked_at:
                descents.check(at)
        if gradient is not None:
            if gradients.searches_scale(looked_at[0]):
                gradients.only_of_error(gradient)
            more |= dict.fromkeys(GRADIENT + p for p in continuous_fields(looked_at[0]))
        task.kinds.setdefault(kinds[0], []).extend(block)
    for numbers in task.kinds.values():
        numbers.sort()
    return task._replace(more=list(more))


@contextlib.contextmanager
def _opened(out: str | os.PathLike[str] | None, task: _Task) -> Iterator[Journal | None]:
    """The journal in a directory that is this process's own for so long; None without a directory."""
    if out is None:
        yield None
        return
    folder, process = Path(out), jax.process_index()
    about = {"source": SOURCE, "gradient": task.gradient, "grid": task.axes, "setting": description(task.setting)}
    about |= {"descents": task.descents and task.descents._asdict()}
    with contextlib.ExitStack() as stack:
        stack.enter_context(held(folder, process))
        journal = Journal(folder, about, process)
        if jax.process_count() > 1:
            stack.enter_context(Alive(folder, process))
        yield journal


def _finished(
    task: _Task, journal: Journal | None, mesh: Mesh, lanes: int, patience: float, progress: bool
) -> tuple[list[str], dict[int, np.ndarray]]:
    """Columns, and values by number, of every point: those of a former run, this process's share, and the others'."""
    process, processes, total = jax.process_index(), jax.process_count(), task.count
    columns, rows = journal.rows() if journal else ([], {})
    share = task.share(process, processes)
    mine = [i for i in share if i not in rows]
    bar = tqdm(
        total=len(share),
        initial=len(share) - len(mine),
        desc="sweep",
        unit="point",
        disable=not progress,
        smoothing=0.1,
    )
    with bar:
        try:
            chunks = task.chunks(mine, lanes)
            for found in itertools.chain.from_iterable(task.found(i, columns, rows, mesh, lanes) for i in chunks):
                columns = columns or [*(c for c in next(iter(found.values())) if c not in task.more), *task.more]
                new = {i: np.array([row.get(c, np.nan) for c in columns]) for i, row in found.items()}
                rows |= new
                if journal:
                    journal.append(columns, new)
                bar.update(len(new))
            if journal and processes > 1:
                columns, rows = journal.rows()
                if process == 0 and len(rows) < total:
                    bar.total = total
                    columns, rows = _await(task, journal, processes, patience, bar)
        except KeyboardInterrupt:
            raise SweepInterrupted(len(rows), total, journal.out if journal else None) from None
    return columns, rows


def _await(task: _Task, journal: Journal, processes: int, patience: float, bar) -> tuple[list[str], dict]:
    """All points, once the other processes have finished theirs."""
    seen: dict[int, tuple[str, float]] = {}
    columns, rows, size, total = [], {}, -1, task.count
    while True:
        if size != journal.size():  # sizes only: reading all points twice a second would be work in vain
            size = journal.size()
            columns, rows = journal.rows()
        bar.n = len(rows)
        bar.refresh()
        if len(rows) == total:
            return columns, rows
        for other in range(1, processes):
            file = journal.out / f"process-{other}.alive"
            beat = file.read_text() if file.exists() else ""
            if other not in seen or seen[other][0] != beat:
                seen[other] = beat, time.monotonic()
            if time.monotonic() - seen[other][1] <= patience:
                continue
            share = task.share(other, processes)
            if all(i in rows for i in share):
                continue
            columns, rows = journal.rows()  # sizes may be old news on a disk of the net, files that are opened are not
            missing = sum(i not in rows for i in share)
            if missing:
                raise SweepIncomplete(
                    f"process {other} of {processes} gives no sign of life for {patience:.0f} s and {missing} of its "
                    f"points are missing; {len(rows)} of {total} are in {journal.out}: the same command completes them"
                )
        time.sleep(0.5)
