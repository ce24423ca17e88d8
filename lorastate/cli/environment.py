"""What the machine gives: devices, a folder for what is compiled, and how JAX is set up for these equations."""

from __future__ import annotations

import contextlib
import logging
import os
import tempfile
from pathlib import Path
from typing import Any

from .output import warn


def float64_refused() -> bool:
    """Whether the environment switches float64 off, which is said."""
    wanted = os.environ.get("JAX_ENABLE_X64")
    if wanted is None or wanted.lower() in ("1", "true", "t", "yes", "y", "on"):
        return False
    warn(
        f"float64 is switched off by JAX_ENABLE_X64={wanted!r} in the environment; "
        "allowed: JAX_ENABLE_X64=1 or leaving it out"
    )
    return True


#: Double precision, and none of what the environment may ask of JAX to find faults in programs of one's own, or to draw
#: other random numbers.
_RULES = {
    "jax_enable_x64": True,
    "jax_debug_nans": False,  # what is undefined is NaN
    "jax_debug_infs": False,
    "jax_disable_jit": False,
    "jax_no_tracing": False,
    "jax_numpy_dtype_promotion": "standard",
    "jax_numpy_rank_promotion": "allow",
    "jax_transfer_guard": "allow",
    "jax_default_prng_impl": "threefry2x32",
}


def set_up_jax() -> None:
    """JAX as these equations need it, and what is compiled kept on disk."""
    import jax

    from ..runtime.cores import cores

    for name, value in _RULES.items():
        jax.config.update(name, value)
    share_cores(cores())
    logging.getLogger("matplotlib").setLevel(logging.ERROR)  # where it keeps its fonts is nobody's concern
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        # Compiled once per machine and version of jax; JAX_COMPILATION_CACHE_DIR moves it.
        jax.config.update("jax_compilation_cache_dir", cache())
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        # Small programs too: many of them take a second together.
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.02)


def share_cores(count: int) -> None:
    """Makes JAX see so many cores of a CPU as devices, unless the environment has its own say or JAX has begun."""
    import jax

    chosen = "host_platform_device_count" in os.environ.get("XLA_FLAGS", "") or "JAX_NUM_CPU_DEVICES" in os.environ
    if not chosen:
        with contextlib.suppress(RuntimeError):  # inside a Python that has used JAX they are what they are
            jax.config.update("jax_num_cpu_devices", count)


def cache() -> str | None:
    """The user's folder for what is compiled; None, and a warning, where nothing can be kept safely."""
    from ..runtime.program import alone
    from ..runtime.room import make_room

    try:
        home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        folder = (home if home.is_absolute() else Path.home() / ".cache") / "lorastate"
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        with tempfile.TemporaryFile(dir=folder):
            pass
        if alone(folder):
            make_room(folder, 2**30)
            return str(folder)
        reason = f"others may write to {str(folder)!r}"
    except OSError as error:
        reason = f"{error.filename!r}: {error.strerror}"
    except RuntimeError:  # no HOME, and a user without name
        reason = "there is no home directory"
    warn(f"nothing is kept for the next start ({reason}); JAX_COMPILATION_CACHE_DIR names another folder")
    return None


def no_device() -> str | None:
    """Why JAX has nothing to compute on, if it has not."""
    import jax

    try:
        jax.devices()
        return None
    except (RuntimeError, AssertionError) as error:  # of CUDA it says nothing
        asked = os.environ.get("JAX_PLATFORMS", "")
        why = str(error).split("\n")[0] or f"this machine or this JAX has no {asked}"
        return f"JAX finds nothing to compute on with JAX_PLATFORMS={asked!r} ({why}); allowed: cpu, or leaving it out"


def drawing() -> Any:
    """The package that draws, without TeX: its labels are not made for it, and few machines have it."""
    import matplotlib

    from .. import figures

    matplotlib.rcParams["text.usetex"] = False
    return figures
