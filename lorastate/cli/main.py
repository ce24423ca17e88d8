"""The command line: `lorastate predict | optimize | gradient | sweep | explain | simulate | figure`.

Results go to stdout; messages and progress bars to stderr. Exit codes: 0 when the answer is right, 2 for bad
input, 3 for a solve that failed. Whatever imports JAX is imported inside the commands: `--help` is fast.
"""

from __future__ import annotations

import _thread
import contextlib
import io
import json
import logging
import math
import os
import re
import signal
import socket
import sys
import tempfile
import threading
import warnings
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro
from tyro.conf import FlagCreatePairsOff, Positional, UseAppendAction, arg, subcommand

from .._version import __version__
from ..predictions import MEANING

if TYPE_CHECKING:
    from ..setting.stages import Setting
    from ..simulation.on_channel import ChannelSimulation
    from ..simulation.simulate import Simulation

BAD_INPUT, FAILED, INTERRUPTED, BROKEN_PIPE = 2, 3, 130, 141
#: Seconds after Ctrl-C that Python may take to see it.
_PATIENCE = 3.0

_TITLE = {"pretraining": "Pre-training", "finetuning": "Fine-tuning"}

_SettingPath = Annotated[Positional[Path], arg(metavar="SETTING", help="Settings file (TOML).")]
_Set = Annotated[
    UseAppendAction[tuple[str, ...]],
    arg(name="set", metavar="KEY=VALUE", help="Override a field, as pretraining.lam=0.02."),
]
_Json = Annotated[bool, arg(help="Print JSON only.")]
_Dimension = Annotated[int, arg(help="D of the simulated model.")]
_Runs = Annotated[int, arg(help="Independent training runs.")]
_Seed = Annotated[int, arg(help="Seed of the simulation.")]


@dataclass
class Predict:
    """Order parameters, losses and errors of both stages."""

    setting: _SettingPath
    set: _Set = ()
    breaking_error: Annotated[
        bool, arg(help="In a glass, also what a second step of symmetry breaking would change (a minute more).")
    ] = False
    json: _Json = False

    def __call__(self) -> int:
        from ..diagnosis import second_step
        from ..setting.files import load_setting, setting_to_dict
        from ..solution import solution

        setting = load_setting(self.setting, self.set)
        pool = ThreadPoolExecutor(1)  # compiles beside the other
        try:
            limits = pool.submit(_limits, setting)
            found = solution.predict(setting, throw=False)
            limits = limits.result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
        summary = found.summary()
        summary["bayes_optimal"] = limits.summary() if limits else None
        broken = summary["symmetry"] == "one-step broken"
        summary["rs"] = found.rs if broken else None
        if self.breaking_error and found.ok:
            summary["breaking_error"] = second_step.breaking_error(found)
        if self.json:
            _print_json({**summary, "setting": setting_to_dict(setting), "version": __version__})
        else:
            _say(_describe(setting))
            for stage in _TITLE:
                if summary["status"][stage]["code"] == "ok":
                    _say(_prediction_table(stage, summary))
        found.require_ok()
        if not self.json:
            if limits:
                _say(_limits_table(limits))
            _say(_status_line(summary["status"]))
            _say(_symmetry_lines(summary))
            _say(_branch_line(found.branches))
        return 0


@dataclass
class Optimize:
    """The best values of some fields of a setting, by gradient descent through the theory."""

    setting: _SettingPath
    set: _Set = ()
    over: Annotated[str, arg(help="Fields to optimise, separated by commas.")] = "pretraining.lam,finetuning.lam"
    minimize: Annotated[str, arg(help="test_error, effective_noise, or overlap (which is maximised).")] = "test_error"
    budget: Annotated[
        UseAppendAction[tuple[str, ...]],
        arg(
            metavar="SENTENCE",
            help="A constraint, as 'pretraining.alpha + 0.05 * finetuning.alpha <= 0.3', 'label_power <= 2.25', or "
            "'pairs' (labelled token pairs stay as many as they are).",
        ),
    ] = ()
    scan: Annotated[
        UseAppendAction[tuple[str, ...]],
        arg(metavar="KEY=VALUES", help="A discrete field and the values to try, as pretraining.tokens=2,3,4."),
    ] = ()
    sensitivities: Annotated[bool, arg(help="Also elasticities and curvatures at the optimum, with a chart.")] = False
    verify: Annotated[bool, arg(help="Also train the finite-size model at the optimum.")] = False
    dimension: _Dimension = 150
    runs: _Runs = 4
    seed: _Seed = 0
    out: Annotated[Path, arg(help="Directory for result.json and the figure.")] = Path("results")

    def __call__(self) -> int:
        from ..design import optimize as design
        from ..errors import SettingError
        from ..setting.files import continuous_fields, load_setting, setting_to_dict
        from ..sweeps import sweep as sweeps

        figures = _figures()
        setting = load_setting(self.setting, self.set)
        over = tuple(field.strip() for field in self.over.split(",") if field.strip())
        _check_fields("--over", over, continuous_fields(setting))
        _check_objective("--minimize", self.minimize)
        if self.verify:
            _check_simulation(setting, self.dimension, self.runs, self.seed)
        options: dict[str, Any] = {}
        if self.budget:
            options["budgets"] = self.budget
        if self.scan:
            options["scan"] = dict(sweeps.parse_axis(text, "scan") for text in self.scan)
        out = _directory(self.out)

        optimum = design.optimize(setting, over=over, minimize=self.minimize, progress=True, **options)
        result = {
            **optimum.summary(),
            "initial_setting": setting_to_dict(optimum.initial),
            "setting": setting_to_dict(optimum.setting),
            "version": __version__,
        }
        _say("At the optimum\n" + _describe(optimum.setting))
        _say(_optimum_table(optimum))
        if optimum.budgets:
            _say(_budget_table(optimum))
        if optimum.scanned:
            _say(_scan_table(optimum))
        # What is found is on disk before the simulation, which takes minutes and may be interrupted.
        _write_json(out / "result.json", result)

        simulation, status = None, 0
        if not optimum.converged:
            status = FAILED
            _warn(f"the descent did not converge ({optimum.message}); gradient norm {optimum.gradient_norm:.2e}")
        optimum.after.require_ok()
        charts: list[Path] = []
        if self.sensitivities:
            found = design.sensitivities(optimum.setting, optimum.over, optimum.minimize)
            result["sensitivities"] = found.summary()
            _write_json(out / "result.json", result)
            _say(_sensitivity_table(found))
            charts = figures.sensitivities(found, optimum, out)
        if self.verify:
            simulation, compared, verified = _simulate(
                optimum.setting, optimum.after.summary(), self.dimension, self.runs, self.seed
            )
            status = status or verified
            result["verification"] = compared
            _write_json(out / "result.json", result)
            _say(_simulation_tables(compared))
        try:
            written = figures.optimization(optimum, out, simulation=simulation)
        except OSError as error:
            raise SettingError(_cannot_write(out, error)) from None
        _say("written: " + ", ".join(str(path) for path in (out / "result.json", *charts, *written)))
        return status


@dataclass
class Gradient:
    """A prediction and its derivatives in every continuous field."""

    setting: _SettingPath
    set: _Set = ()
    of: Annotated[str, arg(help="test_error, effective_noise or overlap.")] = "test_error"
    json: _Json = False

    def __call__(self) -> int:
        from ..design import optimize as design
        from ..setting.files import get, load_setting, setting_to_dict

        setting = load_setting(self.setting, self.set)
        _check_objective("--of", self.of)
        value, gradient = design.gradient(setting, of=self.of)
        value, gradient = float(value), {path: float(slope) for path, slope in gradient.items()}
        if self.json:
            _print_json(
                {
                    "value": value,
                    "gradient": gradient,
                    "of": self.of,
                    "setting": setting_to_dict(setting),
                    "version": __version__,
                }
            )
        else:
            _say(_describe(setting))
            rows = [(path, _number(float(get(setting, path))), _number(slope)) for path, slope in gradient.items()]
            _say(f"{self.of} = {_number(value)}\n")
            _say(_table(("field", "value", f"d {self.of} / d field"), rows))
        bad = [path for path, slope in gradient.items() if not math.isfinite(slope)]
        if bad or not math.isfinite(value):
            _warn(f"{self.of} has no finite derivative in {', '.join(bad) or 'any field'}")
            return FAILED
        return 0


@dataclass
class Sweep:
    """Every prediction on a grid of settings, on all devices; stopped at any moment, the same command goes on."""

    setting: _SettingPath
    grid: Annotated[
        UseAppendAction[tuple[str, ...]],
        arg(metavar="KEY=VALUES", help="An axis, as pretraining.lam=log:1e-3:1:64, ...=lin:0:1:5, ...=0.5,1,2."),
    ] = ()
    set: _Set = ()
    out: Annotated[Path, arg(help="Directory for sweep.nc and what is finished on the way.")] = Path("results")
    gradient: Annotated[str | None, arg(help="Also derivatives of test_error, effective_noise or overlap.")] = None
    devices: Annotated[str, arg(help="Number of local devices (of a CPU: cores), or all.")] = "all"
    chunk: Annotated[int | None, arg(help="Points that each device takes at a time.")] = None
    coordinator: Annotated[str | None, arg(help="HOST:PORT of process 0, in a job of several processes.")] = None
    processes: Annotated[int | None, arg(help="How many processes there are.")] = None
    process: Annotated[int | None, arg(help="Which of them this is, from 0.")] = None
    json: _Json = False

    def __call__(self) -> int:
        import jax

        from ..errors import SettingError
        from ..setting.files import load_setting, setting_to_dict
        from ..sweeps import sweep as sweeps

        devices = self._prepare()
        setting = load_setting(self.setting, self.set)
        grid = dict(map(sweeps.parse_axis, self.grid))
        if len(grid) < len(self.grid):
            raise SettingError("--grid names a field more than once; allowed: each field once")
        if self.gradient is not None:
            _check_objective("--gradient", self.gradient)
        out = _directory(self.out)
        try:
            data = sweeps.sweep(
                setting, grid, out=out, gradient=self.gradient, devices=devices, chunk=self.chunk, progress=True
            )
        except sweeps.SweepInterrupted as stop:
            _warn(f"interrupted: {stop}")
            return INTERRUPTED
        except sweeps.SweepIncomplete as lost:
            _warn(str(lost))
            # The runtime of several processes would wait for the one that is gone.
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(FAILED)
        except OSError as error:
            raise SettingError(_cannot_write(out, error)) from None
        if jax.process_index():
            return 0
        found = sweeps.summary(data)
        written = [out / "sweep.nc", *_figures().sweep(data, out)]
        if self.json:
            _print_json({**found, "setting": setting_to_dict(setting), "version": __version__})
        else:
            _say(_describe(setting))
            _say(_sweep_lines(found))
            _say("written: " + ", ".join(map(str, written)))
        return FAILED if found["failed"] == found["points"] else 0

    def _prepare(self) -> Any:
        """Before JAX looks for its devices: cores of a CPU as devices, and the other processes."""
        import jax

        from ..errors import SettingError
        from ..runtime.program import cores

        if self.devices != "all" and not (self.devices.isdecimal() and int(self.devices) > 0):
            raise SettingError(f"--devices {self.devices!r} is unknown; allowed: a number of at least 1, or all")
        devices = self.devices if self.devices == "all" else int(self.devices)
        chosen = "host_platform_device_count" in os.environ.get("XLA_FLAGS", "") or "JAX_NUM_CPU_DEVICES" in os.environ
        if not chosen:
            jax.config.update("jax_num_cpu_devices", cores() if devices == "all" else devices)
        given = (self.coordinator, self.processes, self.process)
        if any(v is not None for v in given):
            if any(v is None for v in given):
                raise SettingError("--coordinator, --processes and --process belong together; allowed: all three")
            assert self.processes is not None and self.process is not None
            if not 0 <= self.process < self.processes:
                raise SettingError(f"--process {self.process} is out of range; allowed: 0 to {self.processes - 1}")
            if hasattr(jax.config, "jax_enable_recoverability"):
                jax.config.update("jax_enable_recoverability", True)  # one that dies must not take the others along
            jax.distributed.initialize(self.coordinator, self.processes, self.process)
        return devices


def _sweep_lines(found: Mapping[str, Any]) -> str:
    lines = [f"{found['points']} points, {found['failed']} of them not solved"]
    for reason, count in found["codes"].items():
        lines.append(f"  {reason}: {count}")
    if found["best"]:
        at = ", ".join(f"{path} = {v if isinstance(v, str) else _number(v)}" for path, v in found["best"]["at"].items())
        error = f"{found['best']['test_error']:.6g} +- {found['best']['stderr']:.1e}"
        lines.append(f"lowest E' = {error} at {at}")
    return "\n".join(lines)


@dataclass
class Explain:
    """One page about a setting: what LoRA sees of pre-training, what to change, how far it can be trusted."""

    setting: _SettingPath
    set: _Set = ()
    json: _Json = False

    def __call__(self) -> int:
        from ..diagnosis import explain as report
        from ..setting.files import load_setting

        setting = load_setting(self.setting, self.set)
        facts = report.explain(setting, progress=True)
        if self.json:
            _print_json({**facts, "version": __version__})
        else:
            _say(_describe(setting))
            _say(report.page(facts))
        return 0


@dataclass
class Simulate:
    """Train the finite-size model and show it beside the theory, where there is one."""

    setting: _SettingPath
    set: _Set = ()
    stage: Annotated[
        Literal["both", "finetuning"],
        arg(help="finetuning: the second stage alone, on the law of the frozen map that the theory assumes."),
    ] = "both"
    dimension: Annotated[int | None, arg(help="D of the simulated model (150; 600 for fine-tuning alone).")] = None
    runs: _Runs = 4
    seed: _Seed = 0
    starts: Annotated[int | None, arg(help="Starts of fine-tuning (3; 6 random ones for fine-tuning alone).")] = None
    moves: Annotated[int | None, arg(help="Deep moves, for fine-tuning alone (10).")] = None
    map_starts: Annotated[int | None, arg(help="Random starts of pre-training, of which the lowest counts (1).")] = None
    json: _Json = False

    def __call__(self) -> int:
        from ..setting.files import load_setting, setting_to_dict
        from ..simulation.simulate import _check_options

        setting = load_setting(self.setting, self.set)
        dimension = self.dimension if self.dimension is not None else 150 if self.stage == "both" else 600
        options = {"starts": self.starts, "moves": self.moves, "map_starts": self.map_starts}
        _check_options(self.stage, **options, test_samples=None, memory=None)
        options = {name: value for name, value in options.items() if value is not None}
        alone = self.stage == "finetuning"
        _check_simulation(setting, dimension, self.runs, self.seed, alone, **options)
        train, tables = (_train_alone, _channel_tables) if alone else (_simulate, _simulation_tables)
        _, compared, status = train(setting, _theory(setting), dimension, self.runs, self.seed, **options)
        if self.json:
            _print_json({**compared, "setting": setting_to_dict(setting), "version": __version__})
        else:
            _say(_describe(setting))
            _say(tables(compared))
        return status


@dataclass
class Figure:
    """Reproduce a figure of arXiv:2606.05899, or draw the learned spectrum, the phase diagram, E' against the rank."""

    which: Annotated[Positional[str], arg(metavar="WHICH", help="1 to 6, spectrum, phase, rank, or all (but rank).")]
    simulate: Annotated[bool, arg(help="Add finite-size simulations to the theory lines.")] = False
    dimension: Annotated[int | None, arg(help="D of the simulated model (150; 300 for the spectrum).")] = None
    runs: _Runs = 4
    out: Annotated[Path, arg(help="Directory for the figure.")] = Path("results")

    def __call__(self) -> int:
        from ..errors import SettingError

        figures = _figures()
        # Every rank is a program of its own: that figure alone would take a third of the time of all.
        names = [n for n in figures.FIGURES if n != "rank"] if self.which == "all" else [self.which]
        if not set(names) <= set(figures.FIGURES):
            raise SettingError(f"figure {self.which} is not available; allowed: {', '.join(figures.FIGURES)}, all")
        if self.simulate:
            _check_sizes(150 if self.dimension is None else self.dimension, self.runs)
        out = _directory(self.out)
        for name in names:
            training = figures.Training(self.dimension, self.runs) if self.simulate else None
            try:
                written = figures.FIGURES[name](out, training, progress=True)
            except OSError as error:
                raise SettingError(_cannot_write(out, error)) from None
            _say("written: " + ", ".join(str(path) for path in written))
        return 0


_Command = (
    Annotated[Predict, subcommand("predict")]
    | Annotated[Optimize, subcommand("optimize")]
    | Annotated[Gradient, subcommand("gradient")]
    | Annotated[Sweep, subcommand("sweep")]
    | Annotated[Explain, subcommand("explain")]
    | Annotated[Simulate, subcommand("simulate")]
    | Annotated[Figure, subcommand("figure")]
)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code; usage errors and `--help` leave through `SystemExit`."""
    with _interruptible():
        status = _main(list(sys.argv[1:] if argv is None else argv))
    if status == INTERRUPTED and argv is None:  # the process ends here: threads that compile cannot be stopped
        sys.stdout.flush()
        os._exit(status)
    return status


@contextlib.contextmanager
def _interruptible():
    """Ctrl-C also where the compiler is at work, which does not let Python see it: after some seconds the process ends.

    A second Ctrl-C ends it at once.
    """
    if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return
    seen, (told, tell) = threading.Event(), socket.socketpair()

    def leave():
        _warn("interrupted")
        os._exit(INTERRUPTED)

    def watch():
        with told:
            while word := told.recv(1):
                if word[0] == signal.SIGINT and not seen.wait(_PATIENCE):
                    leave()

    def interrupt(*_):
        if seen.is_set():
            leave()
        seen.set()
        raise KeyboardInterrupt

    def swallowed(what):
        """Where Python runs code at odd moments, to collect garbage, an interrupt is lost: it comes once more."""
        if not issubclass(what.exc_type, KeyboardInterrupt):
            return usual(what)
        seen.clear()
        threading.Timer(0.1, _thread.interrupt_main).start()

    tell.setblocking(False)
    before = signal.set_wakeup_fd(tell.fileno(), warn_on_full_buffer=False)
    signal.signal(signal.SIGINT, interrupt)
    usual, sys.unraisablehook = sys.unraisablehook, swallowed
    threading.Thread(target=watch, daemon=True).start()
    try:
        yield
    finally:
        sys.unraisablehook = usual
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.set_wakeup_fd(before)
        tell.close()


def _main(words: list[str]) -> int:
    if isinstance(sys.stdout, io.TextIOWrapper):  # a path, say, in letters that the terminal has not
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        if words == ["--version"]:
            _say(__version__)
            sys.stdout.flush()
            return 0
        command = tyro.cli(
            _Command,
            prog="lorastate",
            description="High-dimensional theory of LoRA fine-tuning in attention.",
            args=_spread(words),
            config=(FlagCreatePairsOff,),
        )
        status = _run(command)
        sys.stdout.flush()
        return status
    except KeyboardInterrupt:
        _warn("interrupted")
        return INTERRUPTED
    except OSError as error:
        # Whatever is still buffered must not be written, and fail again, when Python exits.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(error, BrokenPipeError):
            return BROKEN_PIPE
        _warn(f"input or output failed ({error})")
        return 1


#: What another process was just writing, or a disk that is full: it is compiled here, as it would be without a cache.
_OF_THE_CACHE = re.compile("Error (reading|writing) persistent compilation cache entry")


def _cache() -> str | None:
    """The user's folder for what is compiled; None, and a warning, where nothing can be kept safely."""
    from ..runtime.program import alone, make_room

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
    _warn(f"nothing is kept for the next start ({reason}); JAX_COMPILATION_CACHE_DIR names another folder")
    return None


def _no_device() -> str | None:
    """Why JAX has nothing to compute on, if it has not."""
    import jax

    try:
        jax.devices()
        return None
    except (RuntimeError, AssertionError) as error:  # of CUDA it says nothing
        asked = os.environ.get("JAX_PLATFORMS", "")
        why = str(error).split("\n")[0] or f"this machine or this JAX has no {asked}"
        return f"JAX finds nothing to compute on with JAX_PLATFORMS={asked!r} ({why}); allowed: cpu, or leaving it out"


def _figures() -> Any:
    """The module that draws, without TeX: its labels are not made for it, and few machines have it."""
    import matplotlib

    from ..figures import figures

    matplotlib.rcParams["text.usetex"] = False
    return figures


def _run(command: Any) -> int:
    wanted = os.environ.get("JAX_ENABLE_X64")
    if wanted is not None and wanted.lower() not in ("1", "true", "t", "yes", "y", "on"):
        _warn(
            f"float64 is switched off by JAX_ENABLE_X64={wanted!r} in the environment; "
            "allowed: JAX_ENABLE_X64=1 or leaving it out"
        )
        return BAD_INPUT

    import jax

    jax.config.update("jax_enable_x64", True)
    jax.config.update("jax_debug_nans", False)  # what is undefined is NaN
    jax.config.update("jax_debug_infs", False)
    logging.getLogger("matplotlib").setLevel(logging.ERROR)  # where it keeps its fonts is nobody's concern
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        # Compiled once per machine and version of jax; JAX_COMPILATION_CACHE_DIR moves it.
        jax.config.update("jax_compilation_cache_dir", _cache())
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        # Small programs too: many of them take a second together.
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.02)
    from ..errors import SettingError, SolveError

    usual = warnings.showwarning

    def show(message, category, *args, **kwargs):
        if _OF_THE_CACHE.match(str(message)):
            return
        if category.__module__.startswith("lorastate."):
            _warn(str(message))
        else:
            usual(message, category, *args, **kwargs)

    try:
        warnings.showwarning = show
        return command()
    except SettingError as error:
        _warn(str(error))
        return BAD_INPUT
    except SolveError as error:
        _warn(str(error))
        return FAILED
    except (MemoryError, jax.errors.JaxRuntimeError) as error:
        if not isinstance(error, MemoryError) and "RESOURCE_EXHAUSTED" not in str(error):
            raise
        _warn("memory ran out; take fewer numerics.nodes or a smaller --dimension")
        return FAILED
    except (RuntimeError, AssertionError):
        reason = _no_device()
        if reason is None:
            raise
        _warn(reason)
        return BAD_INPUT
    finally:
        warnings.showwarning = usual


def _spread(words: Sequence[str]) -> list[str]:
    """`--set a.b=1 c.d=2` as `--set a.b=1 --set c.d=2`: one flag, --set or --grid, may carry several fields."""
    out: list[str] = []
    inside = ""
    for i, word in enumerate(words):
        if word in ("--set", "--grid"):
            inside = word
        elif inside and i and words[i - 1] != inside:
            inside = inside if re.match(r"\w+\.\w+=", word) else ""
            if inside:
                out.append(inside)
        out.append(word)
    return out


# Checks that come before any computation.


def _check_fields(option: str, fields: Sequence[str], known: Sequence[str]) -> None:
    import difflib

    from ..errors import SettingError

    if not fields:
        raise SettingError(f"{option} names no field; allowed: {', '.join(known)}")
    for field in fields:
        if field not in known:
            near = difflib.get_close_matches(field, known, n=1)
            hint = f" (did you mean {near[0]}?)" if near else ""
            raise SettingError(f"{option} {field!r} is not a continuous field{hint}; allowed: {', '.join(known)}")
        if fields.count(field) > 1:
            raise SettingError(f"{option} names {field} more than once; allowed: each field once")


def _check_objective(option: str, name: str) -> None:
    from ..design.optimize import OBJECTIVES
    from ..errors import SettingError

    if name not in OBJECTIVES:
        raise SettingError(f"{option} {name!r} is unknown; allowed: {', '.join(OBJECTIVES)}")


def _check_sizes(dimension: int, runs: int, seed: int = 0) -> None:
    from ..errors import SettingError

    for option, value, low, high in (
        ("--dimension", dimension, 10, 10_000),
        ("--runs", runs, 1, 10_000),
        ("--seed", seed, 0, 2**32 - 1),
    ):
        if not low <= value <= high:
            raise SettingError(f"{option} {value} is out of range; allowed: {low} to {high}")


def _check_simulation(
    setting: Setting, dimension: int, runs: int, seed: int, alone: bool = False, **options: int
) -> None:
    """Bad sizes are found before the theory is solved, which may take minutes; `alone`: of fine-tuning alone."""
    from ..simulation import on_channel as asymptotic
    from ..simulation import simulate as simulation

    _check_sizes(dimension, runs, seed)
    for name, value in options.items():
        simulation._whole(name, value, 0 if name == "moves" else 1, 1000 if name == "moves" else 100)
    fine = setting.finetuning_resolved
    if alone:
        asymptotic.channel_samples(fine, dimension, options.get("starts", 6))
    else:
        simulation._sizes(setting.pretraining, fine, dimension, 1)


def _directory(out: Path) -> Path:
    """The directory, made if need be, once it is known that files can be written there."""
    from ..errors import SettingError

    if out.exists() and not out.is_dir():
        raise SettingError(f"--out {str(out)!r} is a file; allowed: a directory, existing or new")
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):
            pass
    except OSError as error:
        raise SettingError(_cannot_write(out, error)) from None
    return out


def _cannot_write(out: Path, error: OSError) -> str:
    return f"--out {str(out)!r} cannot be written to ({error.strerror or error}); allowed: a writable directory"


# Comparing theory and simulation.


def _theory(setting: Setting) -> dict[str, Any]:
    """Predictions of the stages that could be solved, as `Solution.summary` has them; a warning for one that failed.

    Training does not depend on them.
    """
    from ..errors import Code, SolveError, succeeded
    from ..solution import solution

    try:
        found = solution.predict(setting, throw=False)
    except SolveError as error:  # of a search that predicts at every step
        _warn(f"no theory to compare with: {error}")
        empty = {stage: {} for stage in _TITLE}
        return {
            **empty,
            "quadrature_error": {**empty},
            "status": {stage: {"code": error.code.name} for stage in _TITLE},
        }
    theory = found.summary()
    for stage, title in _TITLE.items():
        code = found.code(stage)
        if not succeeded(code):
            theory[stage], theory["quadrature_error"][stage] = {}, {}
            if code is not Code.upstream:
                _warn(f"{title}: no theory to compare with: {code.name} ({code.message})")
    return theory


def _trained(setting: Setting, runs: int, options: Mapping[str, Any]) -> tuple[Any, int]:
    """What `simulate` found, and the exit code: after Ctrl-C the runs that are complete are what there is."""
    from ..simulation.simulate import SimulationInterrupted, simulate

    try:
        return simulate(setting, runs=runs, progress=True, **options), 0
    except SimulationInterrupted as stop:
        _warn(f"interrupted: {len(stop.finished.seeds)} of {runs} runs are complete and kept")
        return stop.finished, INTERRUPTED


def _simulate(
    setting: Setting, theory: Mapping[str, Any], dimension: int, runs: int, seed: int, **options: int
) -> tuple[Simulation, dict[str, Any], int]:
    """The runs, every quantity beside its prediction, and the exit code; runs that failed are left out."""
    found, status = _trained(setting, runs, {"dimension": dimension, "seed": seed, **options})
    runs = len(found.seeds)
    measured = found.summary(only_converged=True)
    compared: dict[str, Any] = {stage: _compare_all(measured[stage], theory, stage) for stage in _TITLE}
    good = {stage: int(found.converged(stage).sum()) for stage in _TITLE}
    compared |= {"dimension": dimension, "runs": runs, "seed": seed, "converged": good, **_theory_codes(theory)}
    failed = [_say_if_failed(stage, runs, found.codes[stage]) for stage in _TITLE]
    return found, compared, status or (FAILED if any(failed) else 0)


def _train_alone(
    setting: Setting, theory: Mapping[str, Any], dimension: int, runs: int, seed: int, **options: int
) -> tuple[ChannelSimulation, dict[str, Any], int]:
    """`_simulate` of fine-tuning alone: every search beside the prediction."""
    given = {"stage": "finetuning", "dimension": dimension, "seed": seed, **options}
    found, status = _trained(setting, runs, given)
    runs = len(found.seeds)
    measured = found.summary(only_converged=True)
    compared: dict[str, Any] = {"stage": "finetuning", "dimension": dimension, "runs": runs, "seed": seed}
    compared |= {"starts": found.starts, "moves": found.moves, **_theory_codes(theory)}
    compared["searches"] = {search: _compare_all(rows, theory, "finetuning") for search, rows in measured.items()}
    compared["per_run"] = {search: dict(rows) for search, rows in found.searches.items()}
    compared["random_starts"] = {"train_loss": found.random_loss, "overlap": found.random_overlap}
    compared |= {"worse_starts": found.worse_starts, "verdict": found.verdict}
    compared["converged"] = {search: int(found.converged(search).sum()) for search in measured}
    failed = [_say_if_failed(f"{search} search", runs, found.codes[search]) for search in measured]
    return found, compared, status or (FAILED if any(failed) else 0)


def _theory_codes(theory: Mapping[str, Any]) -> dict[str, Any]:
    status = theory.get("status", {})
    return {"theory_codes": {stage: status[stage]["code"] for stage in _TITLE if stage in status}}


def _say_if_failed(what: str, runs: int, codes: Sequence[Any]) -> bool:
    bad = [code for code in codes if code != 0]
    if bad:
        left_out = f"{len(bad)} of {runs} runs failed and are left out"
        _warn(f"simulation, {what}: {left_out} ({bad[0].name}: {bad[0].message})")
    return bool(bad)


def _compare_all(measured: Mapping[str, Any], theory: Mapping[str, Any], stage: str) -> dict[str, Any]:
    errors = theory["quadrature_error"].get(stage, {})
    return {name: _compare(pair, theory[stage].get(name), errors.get(name)) for name, pair in measured.items()}


def _compare(measured: Mapping[str, Any], theory: float | None, quadrature: float | None) -> dict[str, Any]:
    mean, stderr = measured["mean"], measured["stderr"]
    gap = None
    if mean is not None and stderr is not None and theory is not None:
        bar = math.hypot(stderr, quadrature or 0.0)
        gap = (mean - theory) / bar if bar > 0 else None
    return {"mean": mean, "stderr": stderr, "theory": theory, "quadrature_error": quadrature, "gap": gap}


# Text and JSON.


def _say(text: str) -> None:
    print(text)


def _warn(text: str) -> None:
    print(f"lorastate: {text}", file=sys.stderr)


def _clean(value: Any) -> Any:
    """The same in plain JSON types, undefined numbers as None."""
    if isinstance(value, Mapping):
        return {str(key): _clean(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_clean(item) for item in value]
    if value is None or isinstance(value, str | bool):
        return value
    if hasattr(value, "tolist"):
        return _clean(value.tolist())
    if isinstance(value, int):
        return int(value)
    return float(value) if math.isfinite(value) else None


def _dumps(value: Any) -> str:
    return json.dumps(_clean(value), indent=2, allow_nan=False)


def _print_json(value: Any) -> None:
    print(_dumps(value))


def _write_json(path: Path, value: Any) -> None:
    from ..errors import SettingError

    try:
        path.write_text(_dumps(value) + "\n", encoding="utf-8")
    except OSError as error:
        raise SettingError(_cannot_write(path, error)) from None


def _number(value: float | None, digits: int = 6) -> str:
    return "-" if value is None or not math.isfinite(value) else f"{value:.{digits}g}"


def _bar(value: float | None) -> str:
    return "" if value is None or not math.isfinite(value) else f"{value:.1e}"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Aligned columns: the first to the left, numbers to the right, one without a title to the left."""
    lines = [list(head), *(list(row) for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    lines.insert(1, ["-" * width if title else "" for width, title in zip(widths, head, strict=True)])

    def cell(i: int, text: str) -> str:
        return text.ljust(widths[i]) if i == 0 or not head[i] else text.rjust(widths[i])

    return "\n".join("  ".join(cell(i, text) for i, text in enumerate(line)).rstrip() for line in lines) + "\n"


def _describe(setting: Setting) -> str:
    """The setting in two lines."""
    from ..setting.files import setting_to_dict

    lines = []
    for stage, title in _TITLE.items():
        values = dict(setting_to_dict(setting)[stage])
        activation = f"{values.pop('activation')}"
        beta = values.pop("beta", None)
        shown = [activation if beta is None else f"{activation}(beta={beta:g})"]
        shown += [f"{k} {v:.6g}" if isinstance(v, float) else f"{k} {v}" for k, v in values.items()]
        lines.append(f"{title + ':':<14}{', '.join(shown)}")
    return "\n".join(lines) + "\n"


def _prediction_table(stage: str, summary: Mapping[str, Any]) -> str:
    errors, meaning = summary["quadrature_error"].get(stage, {}), MEANING[stage]
    rows = [
        (name, _number(value), _bar(errors.get(name)), meaning.get(name, "")) for name, value in summary[stage].items()
    ]
    return _table((_TITLE[stage], "value", "+- quadrature", ""), rows)


def _limits(setting: Setting) -> Any:
    """Bayes-optimal limits; None where there is no formula (activations of one's own) or the solve failed."""
    from ..bayes.limits import bayes_optimal
    from ..errors import SettingError, SolveError

    try:
        return bayes_optimal(setting)
    except (SettingError, SolveError):
        return None


def _limits_table(limits: Any) -> str:
    rows = [
        (f"{stage} {name}", _number(value), _bar(limits.errors[stage].get(name)))
        for stage, values in limits.summary().items()
        for name, value in values.items()
    ]
    return _table(("Bayes-optimal, fresh inputs", "value", "+- quadrature"), rows)


def _status_line(status: Mapping[str, Mapping[str, Any]]) -> str:
    from ..errors import Code

    def one(stage: str) -> str:
        code, residual, steps = (status[stage].get(key) for key in ("code", "residual", "steps"))
        name = code if isinstance(code, str) else Code(int(code or 0)).name
        return f"{_TITLE[stage]} {name}, residual {_number(residual, 2)}, {steps} steps"

    return "; ".join(one(stage) for stage in _TITLE) + "."


def _symmetry_lines(summary: Mapping[str, Any]) -> str:
    """In which phase fine-tuning is, and what to think of pre-training."""
    from ..solution.theory import FEW

    lines = []
    for stage, title in _TITLE.items():
        replicon = summary[stage]["replicon"]
        if replicon is not None and replicon >= 1:
            unstable = f"replica symmetry is unstable (replicon {replicon:.3g}, stable below 1)"
            lines.append(f"{title}: {unstable}: training may differ from these numbers.")
    share = summary["pretraining"]["double_well_share"]
    if share is not None and share > FEW:
        lines.append(
            f"Pre-training has many minima as well ({100 * share:.2g} % of its nodes have two wells), which its"
            " replica-symmetric theory takes for one: training may differ by some per cent."
        )
    if summary["rs"]:
        rs = ", ".join(f"{name} {_number(summary['rs'][name], 4)}" for name in ("test_error", "overlap", "free_energy"))
        lines.append(
            "Fine-tuning is a glass: many minima, one-step broken replica symmetry. Numbers are those of the lowest;"
            f" training from a random start may end higher.\nReplica-symmetric, unstable: {rs}."
        )
        lines += _depth_lines(summary)
    else:
        lines.append(f"Fine-tuning is {summary['symmetry']}.")
    return "\n".join(lines)


def _depth_lines(summary: Mapping[str, Any]) -> list[str]:
    """How deep the glass is, and what a second step of breaking changes if that was asked for."""
    from ..solution.theory import DEEP

    p, q = summary["finetuning"]["p"], summary["finetuning"]["q"]
    lines = []
    if p < (1 - DEEP) * q:
        lines.append(f"The glass is deep (p/q = {p / q:.2g}): training has to search long to come near these minima.")
    if "breaking_error" in summary:
        change = summary["breaking_error"]
        if change is None:
            lines.append("Two steps of breaking found no solution.")
        else:
            parts = (f"{name} by {change[name]:+.2g}" for name in ("test_error", "overlap", "free_energy"))
            lines.append(f"A second step of breaking changes {', '.join(parts)}.")
    return lines


def _branch_line(branches: Any) -> str:
    """Both branches of fine-tuning with m and free energy, and which one was taken."""
    from ..errors import Code

    parts = []
    for k, name in enumerate(("informative", "small")):
        energy, m = float(branches.free_energy[k]), float(branches.overlap[k])
        code = Code(int(branches.code[k])).name
        mark = " (taken)" if int(branches.chosen) == k else ""
        parts.append(f"{name} start {code}, m {_number(m, 4)}, phi {_number(energy)}{mark}")
    if abs(float(branches.free_energy[0]) - float(branches.free_energy[1])) < 1e-9:
        return "Branches: both starts lead to the same one."
    return f"Branches: {'; '.join(parts)}."


def _optimum_table(optimum: Any) -> str:
    from ..setting.files import get

    before, after = optimum.before.summary(), optimum.after.summary()
    names = {"pretraining.lam": "lambda", "finetuning.lam": "lambda'"}
    rows: list[tuple[str, ...]] = []
    for path in (*names, *(path for path in optimum.over if path not in names)):
        old, new = (_number(float(get(setting, path))) for setting in (optimum.initial, optimum.setting))
        rows.append((names.get(path, path), old, "", new, ""))
    quantities = (
        ("Delta_eff", "finetuning", "effective_noise"),
        ("E", "pretraining", "test_error"),
        ("E'", "finetuning", "test_error"),
        ("o_w", "finetuning", "overlap"),
        ("O_W", "pretraining", "overlap"),
    )
    for title, stage, name in quantities:
        pairs = [(s[stage].get(name), s["quadrature_error"].get(stage, {}).get(name)) for s in (before, after)]
        rows.append((title, *(text for value, error in pairs for text in (_number(value), _bar(error)))))
    first = optimum.path[0].get("gradient_norm") if optimum.path else None
    rows.append(("gradient norm", _bar(first) or "-", "", _bar(optimum.gradient_norm) or "-", ""))
    rows.append(("solves used", "", "", str(optimum.solves), ""))
    return _table((f"Optimum ({optimum.minimize})", "before", "+- quadrature", "after", "+- quadrature"), rows)


def _budget_table(optimum: Any) -> str:
    rows = [
        (entry["budget"], "yes" if entry["binds"] else "no", _number(entry["excess"]), _number(entry["price"]))
        for entry in optimum.budgets
    ]
    title = f"gain in {optimum.minimize} per unit of relaxation"
    return _table(("budget", "binds", "excess", title), rows)


def _scan_table(optimum: Any) -> str:
    keys = [key for key in optimum.scanned[0] if key not in ("value", "converged", "message")]
    rows = [
        (
            *(str(entry[key]) if isinstance(entry.get(key), int) else _number(entry.get(key)) for key in keys),
            _number(entry["value"]),
            "yes" if entry["converged"] else entry["message"],
        )
        for entry in optimum.scanned
    ]
    return _table((*keys, optimum.minimize, "converged"), rows)


def _sensitivity_table(found: Any) -> str:
    ordered = sorted(found.elasticities.items(), key=lambda item: -abs(item[1]))
    text = _table(("field", "elasticity"), [(path, _number(value)) for path, value in ordered])
    rows = []
    for k, curvature in enumerate(found.curvatures):
        weights = sorted(zip(found.over, found.directions[:, k], strict=True), key=lambda item: -abs(item[1]))
        name = ", ".join(f"{weight:+.2f} {path}" for path, weight in weights if abs(weight) > 0.1)
        rows.append((name, _number(float(curvature))))
    return text + "\n\n" + _table(("direction (in logarithms)", "curvature"), rows)


def _simulation_tables(compared: Mapping[str, Any]) -> str:
    head = ("theory", "+- quadrature", "simulation", "+- stderr", "gap")
    tables = []
    for stage, title in _TITLE.items():
        rows = [
            (
                name,
                _number(entry["theory"]),
                _bar(entry["quadrature_error"]),
                _number(entry["mean"]),
                _bar(entry["stderr"]),
                "" if entry["gap"] is None else f"{entry['gap']:+.1f}",
            )
            for name, entry in compared[stage].items()
        ]
        tables.append(_table((title, *head), rows))
    runs, D = compared["runs"], compared["dimension"]
    tables.append(
        f"Simulation at D = {D}, {runs} run{'s' if runs > 1 else ''}, seed {compared['seed']}; the gap is "
        "simulation minus theory in units of the combined error bar.\n"
    )
    return "\n".join(tables)


def _channel_tables(compared: Mapping[str, Any]) -> str:
    searches = compared["searches"]
    titles = {"deep_random": "deep, from random", "deep": "deep = lowest"}
    head = ["Fine-tuning alone", "theory", "+- quadrature"]
    for search in searches:
        head += [titles.get(search, search), "+- stderr"]
    rows = []
    for name, entry in searches["deep"].items():
        row = [name, _number(entry["theory"]), _bar(entry["quadrature_error"])]
        for found in searches.values():
            row += [_number(found[name]["mean"]), _bar(found[name]["stderr"])]
        rows.append(row)
    runs, D, starts = compared["runs"], compared["dimension"], compared["starts"]
    told = (
        f"Trained on the asymptotic channel at D = {D}, {runs} run{'s' if runs > 1 else ''}, seed {compared['seed']}; "
        f"in each the lowest minimum reached from w*, from {starts} random start{'s' if starts > 1 else ''}, and by "
        f"{compared['moves']} deep moves (perturb and descend) from the lowest random one and from the lowest of all.\n"
    )
    return "\n".join([_table(head, rows), told] + ([compared["verdict"] + "\n"] if compared["verdict"] else []))


if __name__ == "__main__":
    sys.exit(main())
