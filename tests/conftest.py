"""float64 for the whole suite, and one compilation cache for it and the processes that it starts."""

import atexit
import itertools
import os
import shutil
import subprocess
import sys
import tempfile

import pytest

#: Most of the suite's time goes into compilation: what is jitted without options of its own is optimised less here.
_FLAGS = (
    "--xla_backend_optimization_level=1 --xla_cpu_use_fusion_emitters=false --xla_llvm_disable_expensive_passes=true"
)


def _understood(flags: str) -> bool:
    """Whether the installed compiler knows these flags: one that does not ends the process."""
    probe = [sys.executable, "-c", "import jax; jax.devices()"]
    return subprocess.run(probe, env={**os.environ, "XLA_FLAGS": flags}, capture_output=True).returncode == 0


# The processes that run tests, and those that tests start, inherit what the first one has found.
if "XLA_FLAGS" not in os.environ and _understood(_FLAGS):
    os.environ["XLA_FLAGS"] = _FLAGS

if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="lorastate-tests-")
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.3")
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)

import jax  # noqa: E402

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


#: Files whose tests make no whole solve, but for those that are marked `solve`: the layer `pytest -m unit`.
_UNIT = (
    "test_fixed_point", "test_generalization", "test_layout", "test_prox", "test_quadrature", "test_setting",
    "test_site", "test_spectrum", "test_stage", "test_theory_page", "test_wells",
)  # fmt: skip


def pytest_collection_modifyitems(items):
    for item in items:
        if item.path.stem in _UNIT and not item.get_closest_marker("solve"):
            item.add_marker("unit")
