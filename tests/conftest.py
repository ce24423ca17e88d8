"""float64 for the whole suite, and one compilation cache for it and the processes that it starts."""

import atexit
import collections
import gc
import itertools
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

#: Most of the suite's time goes into compilation, of programs that run once or twice: nothing is optimised here.
_FLAGS = " ".join((
    "--xla_backend_optimization_level=0", "--xla_llvm_disable_expensive_passes=true",
    "--xla_cpu_use_fusion_emitters=false", "--xla_cpu_parallel_codegen_split_count=1",
))  # fmt: skip


def _understood(flags: str) -> bool:
    """Whether the installed compiler knows these flags: one that does not ends the process."""
    probe = [sys.executable, "-c", "import jax; jax.devices()"]
    return subprocess.run(probe, env={**os.environ, "XLA_FLAGS": flags}, capture_output=True).returncode == 0


# The processes that run tests, and those that tests start, inherit what the first one has found.
if "XLA_FLAGS" not in os.environ and _understood(_FLAGS):
    os.environ["XLA_FLAGS"] = _FLAGS

# Before numpy is loaded: the threads of its BLAS wait for each other by spinning, on cores that both workers want.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="lorastate-tests-")
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.3")
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)

import jax  # noqa: E402

from lorastate.runtime import program, room  # noqa: E402
from lorastate.solution import lanes, solve  # noqa: E402

# The package's own options come before these: they are for what is run on an eighth as many nodes as usual, and faster
# compilation is for what is then slow.
program._USUAL, program._QUICK, lanes._MUCH = program._QUICK, {}, lanes._MUCH // 8
jax.config.update("jax_enable_x64", True)
# All cores are busy, and where symmetry is broken some of what is compiled ahead is not needed.
solve._AHEAD = False

# Tracing makes many objects, most of which stay: the collector would go through all of them again and again.
gc.set_threshold(50_000, 10, 10)

_finished = itertools.count(1)


def _resident() -> int:
    """Bytes of memory that this process holds."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:  # not Linux
        return 0


@pytest.fixture(autouse=True)
def _few_programs_at_a_time():
    """Those that tests compile by themselves count too: a worker that keeps the programs of half of the suite is
    killed (see `room`)."""
    yield
    if next(_finished) % 4 == 0:
        room.drop_if_full()


@pytest.fixture(autouse=True, scope="module")
def _memory_for_the_next_file():
    """Files share few programs: those of the last ones are given up where they take much memory."""
    yield
    if _resident() > 2**31:
        jax.clear_caches()
        gc.collect()


@pytest.fixture(autouse=True)
def _nothing_is_promoted(request):
    """Mathematics, model and evolution are tested without implicit promotion: arrays of two types, or of two ranks,
    meet only where it is said that they do."""
    if request.node.path.stem not in _STRICT or request.node.get_closest_marker("promotes"):
        yield
        return
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        yield


#: Files whose tests make no whole solve, but for those that are marked `solve`: the layer `pytest -m unit`.
_UNIT = (
    "test_fixed_point", "test_generalization", "test_layout", "test_maxima", "test_order", "test_prox",
    "test_quadrature", "test_setting", "test_site", "test_spectrum", "test_stage", "test_theory_page", "test_wells",
)  # fmt: skip


#: Those whose tests run without implicit promotion.
_STRICT = (
    "test_fixed_point", "test_generalization", "test_maxima", "test_order", "test_prox", "test_quadrature",
    "test_spectrum", "test_wells",
)  # fmt: skip

#: Seconds that each file takes, on one core: the longest begin first, so that no worker is left with one at the end.
#: A file stays on one worker (`--dist loadfile`), which compiles what its tests share once.
_DURATIONS = Path(__file__).with_name("durations.json")
_seconds = collections.Counter()


def pytest_addoption(parser):
    parser.addoption("--keep-durations", action="store_true", help=f"write what each file took to {_DURATIONS.name}")


def pytest_sessionstart():
    jax.devices()  # there is one for all tests from here on: commands would make as many as there are cores


def pytest_collection_modifyitems(items):
    for item in items:
        if item.path.stem in _UNIT and not item.get_closest_marker("solve"):
            item.add_marker("unit")
    known = json.loads(_DURATIONS.read_text())
    items.sort(key=lambda item: -known.get(item.path.stem, math.inf))  # what is not known begins first


def pytest_runtest_logreport(report):
    _seconds[Path(report.fspath).stem] += report.duration


def pytest_sessionfinish(session):
    if session.config.getoption("--keep-durations") and not hasattr(session.config, "workerinput"):
        known = json.loads(_DURATIONS.read_text()) | {name: round(value) for name, value in _seconds.items()}
        _DURATIONS.write_text(json.dumps(dict(sorted(known.items(), key=lambda kv: -kv[1])), indent=1) + "\n")
