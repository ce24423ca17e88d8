"""float64 for the whole suite, and one compilation cache for it and the processes that it starts."""

import atexit
import itertools
import os
import shutil
import tempfile

import pytest

if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="lorastate-tests-")
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.3")
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)

import jax

jax.config.update("jax_enable_x64", True)

_finished = itertools.count(1)


def _memory_maps() -> int:
    try:
        with open("/proc/self/maps") as file:
            return sum(1 for _ in file)
    except OSError:  # not Linux
        return 0


@pytest.fixture(autouse=True)
def _few_programs_at_a_time():
    """Compiled programs hold memory maps, of which Linux lets a process have 65530: a worker that keeps those of half
    of the suite is killed."""
    yield
    if next(_finished) % 8 == 0 and _memory_maps() > 30_000:
        jax.clear_caches()
