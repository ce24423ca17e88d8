"""The cores of a machine: how many there are for this process, and work that is shared out over them."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax

#: Where a container is told how much of the processor it may use: microseconds, and in how many of them (cgroups 2, 1).
_QUOTAS = (
    ("/sys/fs/cgroup/cpu.max",),
    ("/sys/fs/cgroup/cpu/cpu.cfs_quota_us", "/sys/fs/cgroup/cpu/cpu.cfs_period_us"),
)


def cores() -> int:
    """Cores that this process may use: those that it sees, or what its container grants where that is less."""
    seen = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    for files in _QUOTAS:
        with contextlib.suppress(OSError, ValueError):  # another system, or no limit ("max")
            granted, period = map(float, " ".join(Path(file).read_text() for file in files).split())
            if granted > 0:
                seen = min(seen, max(1, round(granted / period)))
    return seen


def together(f: Callable, values: Iterable[Any]) -> Iterator[Any]:
    """`f` of every value, in their order, on up to four cores: a solve on a CPU keeps one of them busy.

    The first call is made alone, since it may compile what the others share.
    """
    first, *others = values
    yield f(first)
    config: Any = jax.config
    device = config.jax_default_device

    def there(value):
        with jax.default_device(device):  # which other threads do not see
            return f(value)

    pool = ThreadPoolExecutor(min(cores(), 4))
    try:
        for call in [pool.submit(there, value) for value in others]:
            yield call.result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
