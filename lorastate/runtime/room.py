"""Room for programs: on disk, where they are kept, and in memory in a long session."""

from __future__ import annotations

import contextlib
import gc
from pathlib import Path

import jax

_MAPS, _LIMIT = Path("/proc/self/maps"), Path("/proc/sys/vm/max_map_count")
#: Share of the mappings of memory that a process may have, above which programs are dropped; and by which they have to
#: grow before that is tried again: what the user holds on to cannot be dropped.
_FULL, _STEP = 0.6, 0.1
_left = [0]  # mappings after the last time


def drop_if_full() -> None:
    """Before another program is compiled: where there is hardly room for it, what was compiled before is dropped.

    Linux lets a process have 65,530 mappings of memory by default, a prediction of a new kind takes two thousand of
    them, and the compiler that gets none ends the process. What is needed again is compiled again, or read from disk.
    """
    try:
        limit, used = int(_LIMIT.read_text()), _mappings()
    except (OSError, ValueError):  # another system
        return
    if used > max(_FULL * limit, _left[0] + _STEP * limit):
        jax.clear_caches()
        gc.collect()
        _left[0] = _mappings()


def _mappings() -> int:
    return _MAPS.read_bytes().count(b"\n")


def make_room(folder: Path, most: int) -> None:
    """Removes the oldest files of a folder, so that the others have no more bytes than `most`."""
    found = []
    for file in folder.iterdir():
        with contextlib.suppress(OSError):  # another process has made room
            status = file.stat()
            if file.is_file():
                found.append((-status.st_mtime, status.st_size, file))
    size = 0
    for _, bytes_, file in sorted(found):
        size += bytes_
        if size > most:
            file.unlink(missing_ok=True)
