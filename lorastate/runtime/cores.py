"""The cores of a machine: how many there are for this process, and work that is shared out over them.

A CPU is one device of JAX, and a program on it keeps about one core busy. Where JAX has been told that there are more
(`jax_num_cpu_devices`, as the command line does), a program shares the parts of its nodes out over them.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ..errors import is_concrete

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


#: The mesh of the program that is being made.
_MESH: ContextVar[Mesh | None] = ContextVar("mesh", default=None)
#: The name of the axis of such a mesh.
PART = "part"


def shared() -> Mesh | None:
    """The cores that the program shares which is being made, if it shares any."""
    return _MESH.get()


@contextlib.contextmanager
def sharing(mesh: Mesh | None) -> Iterator[None]:
    """Programs made meanwhile share these cores, or none."""
    token = _MESH.set(mesh)
    try:
        yield
    finally:
        _MESH.reset(token)


def mesh_of(parts: Iterable[int]) -> Mesh | None:
    """The cores that a program on so many parts of each of its node sets can share: as many of JAX's devices on a CPU
    as divide all of them, or None for one alone."""
    config: Any = jax.config
    parts, elsewhere = list(parts), jax.process_count() > 1 or config.jax_default_device is not None
    if not parts or elsewhere or jax.default_backend() != "cpu":
        return None
    devices = jax.local_devices()
    count = int(np.gcd.reduce([2 ** (len(devices).bit_length() - 1), *parts]))
    return Mesh(np.array(devices[:count]), (PART,)) if count > 1 else None


def layout(shape: tuple[int, ...], mesh: Mesh | None) -> NamedSharding | None:
    """Where cores that share a program keep an array of that shape: large ones are known of every part of the nodes,
    and each core keeps those of its parts; all have the others. (Any layout will do: it decides what has to be moved.)
    """
    if mesh is None or len(shape) < 2 or np.prod(shape) < _LARGE or shape[0] % mesh.size:
        return None
    return NamedSharding(mesh, PartitionSpec(PART))


#: Entries of an array from which on it is large.
_LARGE = 2**12


def placed(array, mesh: Mesh | None):
    """An array where a program looks for it that the cores of `mesh` share."""
    wanted, there = layout(array.shape, mesh), getattr(array, "sharding", None)
    if wanted is not None:
        return array if there == wanted else jax.device_put(array, wanted)
    # What is bound to other devices, or to all of these, is not typed as belonging to any so.
    return np.asarray(array) if mesh is not None and there is not None and array.committed else array


def left_there(arrays: list, mesh: Mesh | None) -> list:
    """The results of a program, where the next one looks for them."""
    places = [layout(a.shape, mesh) for a in arrays]
    return [jax.lax.with_sharding_constraint(a, at) if at else a for a, at in zip(arrays, places, strict=True)]


def shape_of(leaf, mesh: Mesh | None) -> jax.ShapeDtypeStruct:
    """What `placed` is known by before it is there."""
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=layout(leaf.shape, mesh))


def gathered(tree):
    """The arrays of a tree on one device, from the cores that shared them."""

    def one(leaf):
        spread = isinstance(leaf, jax.Array) and is_concrete(leaf) and len(leaf.sharding.device_set) > 1
        return jnp.asarray(np.asarray(leaf)) if spread else leaf

    return jax.tree_util.tree_map(one, tree)


def together(f: Callable, values: Iterable[Any], alone: bool = True) -> Iterator[Any]:
    """`f` of every value, in their order, on up to four cores: a solve that shares none keeps one of them busy.

    The first call is made `alone`, where it may compile what the others share.
    """
    others = list(values)
    if alone:
        yield f(others.pop(0))
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
