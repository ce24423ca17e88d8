"""What is made point by point, in a directory: finished points, appended as they come; its lock; signs of life."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import socket
import threading
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import SettingError

try:
    import fcntl
except ImportError:  # not POSIX
    fcntl = None


class Journal:
    """The finished points of a sweep in a directory: `sweep.json` says of what, `points-P.bin` has those of process P.
    Or of anything else that is made point by point: `what`.

    A record is (index, values, checksum), little-endian; whatever a killed process has left of its last one is dropped,
    and so is all that follows a damaged one. No database: SQLite survives kills and full disks no better, appends four
    times more slowly, reads a flipped bit without a word, and needs locks that shared file systems may not have.
    """

    def __init__(self, out: Path, manifest: dict[str, Any], process: int, what: str = "sweep"):
        self.out, self.what = out, what
        self.manifest = json.loads(json.dumps(manifest))  # as it comes back from the file
        self.path, self._end = out / f"points-{process}.bin", -1
        file = out / f"{what}.json"
        if file.exists():
            self._same(file)
        else:
            write_whole(file, json.dumps(manifest, indent=1) + "\n", process)

    def _same(self, file: Path) -> None:
        try:
            before = json.loads(file.read_text())
        except ValueError:
            raise SettingError(
                f"{str(file)!r} is not the record of a {self.what}; allowed: another directory"
            ) from None
        source = self.manifest["source"]  # empty where it cannot be read
        if not isinstance(before, dict) or not source or before.get("source") != source:
            raise SettingError(
                f"{str(self.out)!r} holds a {self.what} by another version of lorastate, or of its source; allowed: "
                "another directory"
            )
        for key, now in self.manifest.items():
            if before.get(key) != now:
                was, now = _first_difference(key, before.get(key), now)
                raise SettingError(
                    f"{str(self.out)!r} holds a {self.what} with {was}, not {now}; allowed: the same one, or "
                    "another directory"
                )

    def _record(self, columns: Sequence[str]) -> np.dtype:
        return np.dtype([("index", "<i8"), ("values", "<f8", (len(columns),)), ("check", "<u4")])

    def _read(self, path: Path) -> tuple[list[str], np.ndarray, int]:
        """(columns, valid records, bytes up to the end of the last one)."""
        data = path.read_bytes()
        end = data.find(b"\n") + 1
        try:
            columns, check = (json.loads(data[:end])[key] for key in ("columns", "check"))
        except (ValueError, KeyError, TypeError):
            return [], np.zeros(0), 0
        if check != _checksum_of_names(columns):
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
                names = {"columns": list(columns), "check": _checksum_of_names(columns)}
                file.write(json.dumps(names).encode() + b"\n")
            file.write(block.tobytes())
            file.flush()
            os.fsync(file.fileno())
            self._end = file.tell()


def _checksum(record) -> int:
    """Of everything in a record but its own place, the last four bytes."""
    return zlib.crc32(record.tobytes()[:-4])


def _checksum_of_names(columns: Sequence[str]) -> int:
    return zlib.crc32(json.dumps(list(columns)).encode())


def write_whole(path: Path, text: str | bytes, process: int = 0) -> None:
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
def held(out: Path, process: int, what: str = "sweep"):
    """Keeps the directory from others: the operating system lets go of the lock when the process ends.

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
                f"{str(out)!r} is in use by another {what} (process {file.read() or 'unknown'}); allowed: another "
                "directory, or waiting for its end"
            ) from None
        except OSError:  # a file system without locks
            pass
        file.truncate(0)
        file.write(f"{os.getpid()} on {socket.gethostname()}")
        file.flush()
        yield
        file.truncate(0)


class Alive:
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
