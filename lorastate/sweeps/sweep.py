"""Sweeps: every prediction on a grid of settings, as one labelled dataset, on all devices and hosts.

Points of the same kind (tokens, activations, inputs, numerics) run through one compiled program, a chunk at a time. The
lanes of a chunk are shared out over the local devices (`jax.shard_map`); on a CPU a device takes its lanes one after
the other, so that a lane is what `predict` would give alone, on an accelerator all at once. With JAX's multi-process
runtime every process takes its share of the points. Each finished chunk is appended to a file at once: a sweep that was
stopped in any way goes on where it was.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import os
import socket
import threading
import time
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec
from tqdm import tqdm

from .._version import SOURCE, __version__
from ..design import optimize as design
from ..errors import Code, SettingError, SolveError, require_float64, succeeded
from ..predictions import MEANING
from ..runtime.program import Program
from ..setting.files import continuous_fields, description, get, parse_value, replace, replace_all, setting_to_dict
from ..setting.stages import Setting
from ..solution import theory
from ..solution.solution import by_work

try:
    import fcntl
except ImportError:  # not POSIX
    fcntl = None

if TYPE_CHECKING:
    import xarray

#: Lanes that a device takes at once: a CPU runs them one by one, and few of them share out the work evenly.
_LANES = {"cpu": 4}
_LANES_ELSEWHERE = 32
#: Solves that a sweep stands for where a program is chosen by its work: not how many are left to do or whose they are,
#: for other programs have other bits.
_SOLVES = 128
#: Seconds without a sign of life after which another process counts as dead.
_PATIENCE = 30.0
_GRADIENT = "gradient."
_STAGES = ("pretraining", "finetuning")


class SweepInterrupted(KeyboardInterrupt):
    """Ctrl-C during `sweep`: `finished` of `total` points are done, and on disk if there is a directory."""

    def __init__(self, finished: int, total: int, out: Path | None):
        self.finished, self.total, self.out = finished, total, out
        kept = f"they are in {out}; the same command goes on from there" if out else "without a directory they are lost"
        super().__init__(f"{finished} of {total} points are finished; {kept}")


class SweepIncomplete(RuntimeError):
    """Another process of the sweep has stopped before its share was done."""


# ---- the grid --------------------------------------------------------------------------------------------------


def parse_axis(text: str, option: str = "grid") -> tuple[str, list[Any]]:
    """Path and values of "pretraining.lam=log:1e-3:1:64", "...=lin:0:1:11" or "...=0.5,1,2"."""
    path, equals, words = text.partition("=")
    path, words = path.strip(), words.strip()
    if not equals or not words:
        raise SettingError(
            f"{option} {text!r} has no values; allowed: path=log:low:high:count, path=lin:..., path=a,b,c"
        )
    kind, *numbers = words.split(":")
    if not numbers:
        return path, [parse_value(path, word.strip()) for word in words.split(",") if word.strip()]
    try:
        low, high, count = float(numbers[0]), float(numbers[1]), int(numbers[2])
        good = len(numbers) == 3 and kind in ("log", "lin") and 1 <= count <= 10**6 and math.isfinite(low + high)
    except (ValueError, IndexError):
        good = False
    if not good:
        raise SettingError(
            f"{option} {text!r} is not readable; allowed: path=log:low:high:count, path=lin:..., path=a,b,c"
        )
    if kind == "log" and not min(low, high) > 0:
        raise SettingError(
            f"{option} {text!r} has a bound at or below zero; allowed: log:low:high:count with both above"
        )
    return path, (np.geomspace if kind == "log" else np.linspace)(low, high, count).tolist()


def _axes(setting: Setting, grid: Mapping[str, Iterable[Any]]) -> dict[str, list[Any]]:
    """The axes as plain values; those of a whole number may come as floats, as log:... and lin:... make them."""
    if not grid:
        raise SettingError("the grid is empty; allowed: at least one path with its values, as pretraining.lam")
    axes = {}
    for path, values in grid.items():
        if isinstance(values, str | bytes) or not isinstance(values, Iterable):
            raise SettingError(f"grid {path} = {values!r} is not a list of values; allowed: numbers or words")
        plain: list[Any] = [v.item() if hasattr(v, "item") else v for v in values]
        if not plain:
            raise SettingError(f"grid {path} has no values; allowed: at least one")
        for value in plain:
            if not isinstance(value, int | float | str):
                raise SettingError(f"grid {path} has a value {value!r}; allowed: numbers or words")
        if len(set(plain)) < len(plain):
            raise SettingError(f"grid {path} names a value more than once; allowed: each value once")
        axes[path] = [round(v) for v in plain] if _counts(setting, path) and all(map(_is_whole, plain)) else plain
    return axes


def _counts(setting: Setting, path: str) -> bool:
    """Whether a field is a whole number."""
    try:
        return isinstance(get(setting, path), int)
    except SettingError:  # it has a meaning at the other points
        return False


def _is_whole(value: Any) -> bool:
    return isinstance(value, int | float) and math.isclose(value, round(value), rel_tol=1e-12)


# ---- lanes -----------------------------------------------------------------------------------------------------


def _sharded(f, mesh: Mesh):
    """`f(*lane, *shared)` on every lane, shared out over the devices of the mesh."""

    def many(lanes, shared):
        def one(lane):
            return f(*lane, *shared)

        return jax.lax.map(one, lanes) if mesh.devices.flat[0].platform == "cpu" else jax.vmap(one)(lanes)

    lane, every = PartitionSpec("lane"), PartitionSpec()
    return jax.shard_map(many, mesh=mesh, in_specs=(lane, every), out_specs=lane, check_vma=False)


# Several programs, as in `solution`: the compiler's time and memory grow faster than a program's size.


def _pretrain(mesh, numerics, rest, params, nodes):
    def one(params, nodes):
        pre, _ = eqx.combine(params, rest)
        return theory.describe_pretraining(pre, nodes, theory.solve_pretraining(pre, numerics, nodes.pretraining))

    return _sharded(one, mesh)((params,), (nodes,))


def _symmetric(mesh, numerics, alone, rest, params, nodes, first):
    def one(params, first, nodes):
        pre, fine = eqx.combine(params, rest)
        return theory.solve_symmetric(pre, fine, first, numerics, nodes, alone)

    return _sharded(one, mesh)((params, first), (nodes.finetuning,))


def _broken(mesh, numerics, rest, params, nodes, first, coarse):
    def one(params, first, coarse, nodes):
        pre, fine = eqx.combine(params, rest)
        return theory.solve_broken(pre, fine, first, numerics, nodes, coarse)

    return _sharded(one, mesh)((params, first, coarse), (nodes.broken,))


_pretrainings = Program(_pretrain, quick=True), Program(_pretrain)
_symmetrics = Program(_symmetric, quick=True), Program(_symmetric)
_brokens = Program(_broken, quick=True), Program(_broken)


def _describe(mesh, numerics, rest, params, nodes, first, second):
    def one(params, first, second, nodes):
        pre, fine = eqx.combine(params, rest)
        out = theory.describe_finetuning(pre, fine, nodes, first, second)
        bars = theory.quadrature_errors(pre, fine, numerics, nodes, out)
        row = {}
        for stage, values, bar in zip(_STAGES, (out.pretraining, out.finetuning), bars, strict=True):
            status = theory.final_status(out.status[stage], bar)
            good = succeeded(status["code"])
            for name, value in values.items():
                row[f"{stage}.{name}"] = jnp.where(good, value, jnp.nan)
                row[f"{stage}.{name}_stderr"] = jnp.where(good, bar.errors[name], jnp.nan)
            row |= {f"{stage}.{k}": 1.0 * status[k] for k in ("code", "residual", "rate", "steps")}
        return row

    return _sharded(one, mesh)((params, first, second), (nodes,))


_descriptions = Program(_describe, quick=True), Program(_describe)


@partial(Program, quick=True)
def _slopes(mesh, objective, rest, params, nodes, first, second):
    def one(params, first, second, nodes):
        pre, fine = eqx.combine(params, rest)
        return design.value_and_slopes(objective, pre, fine, nodes, first.solved, second)[1]

    return _sharded(one, mesh)((params, first, second), (nodes,))


def _run(settings: Sequence[Setting], objective: str | None, mesh: Mesh, lanes: int) -> list[dict[str, float]]:
    """Rows of a chunk of settings of one kind, padded to the number of lanes that the program was compiled for.

    As `solution.solve` does: the replica-symmetric search first, and another where that will not do.
    """
    plain, lost = [], {}
    for k, s in enumerate(settings):
        try:
            plain.append(design.with_best_scale(s) if design.searches_scale(s) else s)
        except SolveError as error:  # what does not depend on b is there all the same
            plain.append(replace(s, "finetuning.recalibration", 1.0))
            lost[k] = error.code
    chunk = _Chunk(plain, mesh, lanes)
    symmetry = chunk.numerics.symmetry
    first = chunk.first()
    second = chunk.symmetric(first, True)
    here = {"rs": chunk.wells, "1rsb": lambda _: list(range(len(plain))), "auto": chunk.rough}[symmetry](second)
    rows = [{} for _ in plain] if len(here) == len(plain) else chunk.rows(first, second, objective)
    index, coarse = here, second.coarse
    for deep in (False, True):
        if not index:
            break
        chunk = _Chunk([plain[k] for k in index], mesh, lanes, None if symmetry == "rs" else deep)
        first, coarse = chunk.take(here, (first, coarse))
        found = chunk.symmetric(first, False) if symmetry == "rs" else chunk.broken(first, coarse)
        here = [] if symmetry == "rs" or deep else chunk.rough(found)
        if len(here) < len(index):
            for k, row in zip(index, chunk.rows(first, found, objective), strict=True):
                rows[k] = row
        index = [index[k] for k in here]
    for s, row in zip(settings, rows, strict=True):
        if design.searches_scale(s):
            row["finetuning.recalibration_stderr"] = math.nan  # of the search: not known
    for k, code in lost.items():
        if succeeded(int(rows[k]["pretraining.code"])):
            rows[k] |= dict.fromkeys((name for name in rows[k] if not name.startswith("pretraining.")), math.nan)
            rows[k]["finetuning.code"] = float(code)
    return rows


class _Chunk:
    """Settings of one kind, stacked, and the programs that they go through together."""

    def __init__(self, settings: Sequence[Setting], mesh: Mesh, lanes: int, deep: bool | None = None):
        """`deep`: whether for deep glasses, where symmetry is broken."""
        self.settings, self.mesh, self.lanes = settings, mesh, lanes
        stages = [eqx.partition((s.pretraining, s.finetuning_resolved), eqx.is_array) for s in settings]
        stages += [stages[-1]] * (lanes - len(stages))
        self.params = jax.tree_util.tree_map(lambda *a: np.stack(a), *(p for p, _ in stages))
        self.rest = stages[0][1]
        pre, fine, numerics = settings[0].pretraining, settings[0].finetuning_resolved, settings[0].numerics
        self.nodes = theory.node_sets(pre, fine, numerics)
        if deep is not None:
            self.nodes = theory.with_broken(self.nodes, fine, numerics, deep)
        self.numerics = numerics.without_seed

    def take(self, index: Sequence[int], tree):
        """Lanes of what another chunk has found, padded."""
        padded = np.array([*index, *[index[-1]] * (self.lanes - len(index))])
        return jax.tree_util.tree_map(lambda a: np.asarray(a)[padded], jax.device_get(tree))

    def first(self):
        program = by_work(_pretrainings, 4 * self.numerics.nodes, _SOLVES)
        return program(self.mesh, self.numerics, self.rest, self.params, self.nodes)

    def symmetric(self, first, alone: bool):
        program = by_work(_symmetrics, self.numerics.finetuning_nodes, _SOLVES)
        return program(self.mesh, self.numerics, alone, self.rest, self.params, self.nodes, first)

    def broken(self, first, coarse):
        program = by_work(_brokens, self.numerics.finetuning_nodes * self.numerics.samples // 4, _SOLVES)
        return program(self.mesh, self.numerics, self.rest, self.params, self.nodes, first, coarse)

    def rough(self, second) -> list[int]:
        """Lanes whose search was too rough."""
        return jax.device_get(second.rough)[: len(self.settings)].nonzero()[0].tolist()

    def wells(self, second) -> list[int]:
        """Lanes that have nodes with two wells, or are not solved."""
        two = jnp.any(second.solved.inner.two, (1, 2)) | ~succeeded(second.solved.point.code)
        return jax.device_get(two)[: len(self.settings)].nonzero()[0].tolist()

    def rows(self, first, second, objective: str | None) -> list[dict[str, float]]:
        """Every prediction of every setting, and the slopes of the objective."""
        given = self.rest, self.params, self.nodes, first, second
        describe = by_work(_descriptions, self.numerics.finetuning_nodes, _SOLVES)
        table = jax.device_get(describe(self.mesh, self.numerics, *given))
        rows = [{name: float(column[k]) for name, column in table.items()} for k in range(len(self.settings))]
        if objective is None:
            return rows
        slopes = jax.device_get(_slopes(self.mesh, objective, *given))
        for k, row in enumerate(rows):
            lane = jax.tree_util.tree_map(lambda a, k=k: a[k], slopes)
            failed = not all(succeeded(int(row[f"{s}.code"])) for s in _STAGES)
            sign = -1.0 if objective == "overlap" else 1.0
            for path, slope in design.total_slopes(self.settings[k], lane).items():
                row[_GRADIENT + path] = math.nan if failed else sign * slope
        return rows


# ---- files -----------------------------------------------------------------------------------------------------


class _Journal:
    """The finished points of a sweep in a directory: `sweep.json` says of what, `points-P.bin` has those of process P.

    A record is (index, values, checksum), little-endian; whatever a killed process has left of its last one is dropped.
    """

    def __init__(self, out: Path, manifest: dict[str, Any], process: int):
        self.out, self.manifest = out, manifest
        self.path, self._end = out / f"points-{process}.bin", -1
        file = out / "sweep.json"
        if file.exists():
            self._same(file)
        else:
            _write(file, json.dumps(manifest, indent=1) + "\n", process)

    def _same(self, file: Path) -> None:
        try:
            before = json.loads(file.read_text())
        except ValueError:
            raise SettingError(f"{str(file)!r} is not the record of a sweep; allowed: another directory") from None
        if not isinstance(before, dict) or before.get("source") != self.manifest["source"]:
            raise SettingError(
                f"{str(self.out)!r} holds a sweep by another version of lorastate, or of its source; allowed: another "
                "directory"
            )
        for key, now in self.manifest.items():
            if before.get(key) != now:
                was, now = _first_difference(key, before.get(key), now)
                raise SettingError(
                    f"{str(self.out)!r} holds a sweep with {was}, not {now}; allowed: the same sweep, or another "
                    "directory"
                )

    def _record(self, columns: Sequence[str]) -> np.dtype:
        return np.dtype([("index", "<i8"), ("values", "<f8", (len(columns),)), ("check", "<u4")])

    def _read(self, path: Path) -> tuple[list[str], np.ndarray, int]:
        """(columns, valid records, bytes up to the end of the last one)."""
        data = path.read_bytes()
        end = data.find(b"\n") + 1
        try:
            columns = json.loads(data[:end])["columns"]
        except (ValueError, KeyError, TypeError):
            return [], np.zeros(0), 0
        record = self._record(columns)
        whole = np.frombuffer(data, record, (len(data) - end) // record.itemsize, end)
        good = [_checksum(r) == r["check"] for r in whole]
        count = good.index(False) if False in good else len(good)
        return columns, whole[:count], end + count * record.itemsize

    def rows(self) -> tuple[list[str], dict[int, np.ndarray]]:
        """All finished points, of every process: columns, and values by index."""
        columns, found = [], {}
        for path in sorted(self.out.glob("points-*.bin")):
            names, records, _ = self._read(path)
            columns = names or columns
            found |= {int(r["index"]): r["values"] for r in records}
        return columns, found

    def size(self) -> int:
        """Bytes of the points of every process."""
        return sum(path.stat().st_size for path in self.out.glob("points-*.bin"))

    def append(self, columns: Sequence[str], rows: Mapping[int, np.ndarray]) -> None:
        record = self._record(columns)
        block = np.zeros(len(rows), record)
        for k, (index, values) in enumerate(rows.items()):
            block[k]["index"], block[k]["values"] = index, values
            block[k]["check"] = _checksum(block[k])
        if self._end < 0:  # the first time: after the last whole record of a former process
            self._end = self._read(self.path)[2] if self.path.exists() else 0
        with open(self.path, "r+b" if self.path.exists() else "w+b") as file:
            file.truncate(self._end)
            file.seek(self._end)
            if not self._end:
                file.write(json.dumps({"columns": list(columns)}).encode() + b"\n")
            file.write(block.tobytes())
            file.flush()
            os.fsync(file.fileno())
            self._end = file.tell()


def _checksum(record) -> int:
    return zlib.crc32(np.asarray(record["values"]).tobytes(), int(record["index"]) & 0xFFFFFFFF)


def _write(path: Path, text: str | bytes, process: int = 0) -> None:
    """Writes a file that is there either as a whole or not at all."""
    part = path.with_name(f"{path.name}.{process}.part")
    part.write_bytes(text if isinstance(text, bytes) else text.encode())
    part.replace(path)


def _first_difference(key: str, before: Any, now: Any) -> tuple[str, str]:
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        for name in dict.fromkeys([*before, *now]):
            if before.get(name) != now.get(name):
                return _first_difference(f"{key}.{name}", before.get(name), now.get(name))
    key = key.removeprefix("setting.")
    return tuple(f"{key} = {str(v)[:60]}{'...' if len(str(v)) > 60 else ''}" for v in (before, now))  # type: ignore[return-value]


@contextlib.contextmanager
def _held(out: Path, process: int):
    """Keeps the directory from other sweeps: the operating system lets go of the lock when the process ends.

    Raises `SettingError` while another one has it. Processes of one sweep each have their own.
    """
    out.mkdir(parents=True, exist_ok=True)
    with open(out / f"process-{process}.lock", "a+") as file:
        try:
            if fcntl:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise SettingError(
                f"{str(out)!r} is in use by another sweep (process {file.read() or 'unknown'}); allowed: another "
                "directory, or waiting for its end"
            ) from None
        except OSError:  # a file system without locks
            pass
        file.truncate(0)
        file.write(f"{os.getpid()} on {socket.gethostname()}")
        file.flush()
        yield
        file.truncate(0)


class _Alive:
    """A file that changes while this process is at work."""

    def __init__(self, out: Path, process: int):
        self._path, self._stop = out / f"process-{process}.alive", threading.Event()
        self._thread = threading.Thread(target=self._beat, daemon=True)

    def _beat(self) -> None:
        for count in itertools.count():
            self._path.write_text(str(count))
            if self._stop.wait(1.0):
                break

    def __enter__(self):
        self._thread.start()

    def __exit__(self, *_):
        self._stop.set()
        self._thread.join()


def _await(journal: _Journal, total: int, processes: int, patience: float, bar) -> tuple[list[str], dict]:
    """All points, once the other processes have finished theirs."""
    seen: dict[int, tuple[str, float]] = {}
    columns, rows, size = [], {}, -1
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
            missing = len([i for i in range(total) if i % processes == other and i not in rows])
            if missing and time.monotonic() - seen[other][1] > patience:
                raise SweepIncomplete(
                    f"process {other} of {processes} gives no sign of life for {patience:.0f} s and {missing} of its "
                    f"points are missing; {len(rows)} of {total} are in {journal.out}: the same command completes them"
                )
        time.sleep(0.5)


# ---- the sweep -------------------------------------------------------------------------------------------------


def _devices(devices: Any) -> list[Any]:
    config: Any = jax.config
    default = config.jax_default_device
    local = jax.local_devices(backend=getattr(default, "platform", default))
    if devices is None:
        return [default if isinstance(default, jax.Device) else local[0]]
    if devices == "all":
        return local
    if isinstance(devices, int) and not isinstance(devices, bool):
        if not 1 <= devices <= len(local):
            raise SettingError(f"devices = {devices} is out of range; allowed: 1 to {len(local)}, or 'all'")
        return local[:devices]
    if isinstance(devices, Sequence) and not isinstance(devices, str) and devices:
        return list(devices)
    raise SettingError(f"devices = {devices!r} is unknown; allowed: a number, 'all', or a list of JAX devices")


def _chunks(kinds: Mapping[Any, list[int]], lanes: int) -> Iterator[list[int]]:
    for indices in kinds.values():
        for k in range(0, len(indices), lanes):
            yield indices[k : k + lanes]


def sweep(
    setting: Setting,
    grid: Mapping[str, Iterable[Any]],
    *,
    out: str | os.PathLike[str] | None = None,
    gradient: str | None = None,
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
    axes = _axes(setting, grid)
    if gradient is not None:
        design.check_objective(gradient)
    if chunk is not None and (isinstance(chunk, bool) or not isinstance(chunk, int) or chunk < 1):
        raise SettingError(f"chunk = {chunk!r} is out of range; allowed: a whole number of at least 1")
    process, processes = jax.process_index(), jax.process_count()
    if processes > 1 and out is None:
        raise SettingError("out is missing; allowed: a directory that all processes of the sweep see")
    chosen = _devices(devices)
    mesh = Mesh(np.array(chosen), ("lane",))
    lanes = len(chosen) * (chunk or _LANES.get(chosen[0].platform, _LANES_ELSEWHERE))

    points = [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]
    kinds: dict[Any, list[int]] = {}
    slopes: dict[str, None] = {}
    for index, point in enumerate(points):  # all of them, so that a bad one is found before any is solved
        at = replace_all(setting, point)
        kind = _kind(at)
        if kind not in kinds and gradient is not None:
            if design.searches_scale(at):
                design.only_of_error(gradient)
            slopes |= dict.fromkeys(_GRADIENT + p for p in continuous_fields(at))
        kinds.setdefault(kind, []).append(index)

    journal, columns, rows = None, [], {}
    with contextlib.ExitStack() as stack:
        stack.enter_context(jax.default_device(chosen[0]))  # what is traced is made for these devices
        if out is not None:
            manifest = {"source": SOURCE, "gradient": gradient, "grid": axes, "setting": description(setting)}
            stack.enter_context(_held(Path(out), process))
            journal = _Journal(Path(out), json.loads(json.dumps(manifest)), process)
            columns, rows = journal.rows()
            if processes > 1:
                stack.enter_context(_Alive(journal.out, process))
        mine = {k: [i for i in v if i % processes == process and i not in rows] for k, v in kinds.items()}
        share = sum(i % processes == process for i in range(len(points)))
        left = sum(map(len, mine.values()))
        bar = tqdm(total=share, initial=share - left, desc="sweep", unit="point", disable=not progress, smoothing=0.1)
        stack.enter_context(bar)
        try:
            for indices in _chunks(mine, lanes):
                found = _run([replace_all(setting, points[i]) for i in indices], gradient, mesh, lanes)
                columns = columns or [*(c for c in found[0] if c not in slopes), *slopes]
                values = (np.array([row.get(c, np.nan) for c in columns]) for row in found)
                new = dict(zip(indices, values, strict=True))
                rows |= new
                if journal:
                    journal.append(columns, new)
                bar.update(len(indices))
            if journal and processes > 1:
                columns, rows = journal.rows()
                if process == 0 and len(rows) < len(points):
                    bar.total = len(points)
                    columns, rows = _await(journal, len(points), processes, patience, bar)
        except KeyboardInterrupt:
            raise SweepInterrupted(len(rows), len(points), journal.out if journal else None) from None
        dataset = _dataset(setting, axes, columns, rows, gradient)
        if journal and process == 0:
            _write(journal.out / "sweep.nc", bytes(dataset.to_netcdf(engine="scipy", format="NETCDF3_64BIT")))
    return dataset


def _kind(setting: Setting) -> Any:
    """What settings that go through the same program have in common: all that is static."""
    return jax.tree_util.tree_structure((setting.pretraining, setting.finetuning_resolved, setting.numerics))


def _dataset(setting: Setting, axes, columns, rows, gradient) -> xarray.Dataset:
    import xarray

    shape = tuple(len(v) for v in axes.values())
    table = np.full((math.prod(shape), len(columns)), np.nan)
    for index, values in rows.items():
        table[index] = values
    dims, variables = tuple(axes), {}
    for k, name in enumerate(columns):
        values, attributes = table[:, k].reshape(shape), _attributes(name, gradient)
        if name.endswith((".code", ".steps")):
            values = np.where(np.isfinite(values), values, -1).astype(np.int32)
        variables[name] = (dims, values, attributes)
    attributes = {
        "title": "lorastate sweep",
        "setting": json.dumps(setting_to_dict(setting)),
        "version": __version__,
        "source": "arXiv:2606.05899",
    }
    return xarray.Dataset(variables, {p: (p, np.array(v)) for p, v in axes.items()}, attributes)


def _attributes(name: str, gradient: str | None) -> dict[str, Any]:
    if name.startswith(_GRADIENT):
        return {"long_name": f"derivative of {gradient} by {name.removeprefix(_GRADIENT)}"}
    stage, key = name.split(".")
    if key == "code":
        values, words = np.array(list(Code), np.int32), " ".join(c.name for c in Code)
        return {"long_name": "result of the solve; -1 not done", "flag_values": values, "flag_meanings": words}
    plain = key.removesuffix("_stderr")
    meaning = MEANING[stage].get(plain, plain)
    return {"long_name": meaning if plain == key else f"quadrature standard error of: {meaning}"}


def summary(dataset: xarray.Dataset) -> dict[str, Any]:
    """How many points there are and were not solved, why, and where E' is lowest."""
    codes = {stage: dataset[f"{stage}.code"].values.ravel() for stage in _STAGES}
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
    return {"points": int(failed.size), "failed": int(failed.sum()), "codes": reasons, "best": best}
