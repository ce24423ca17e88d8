"""The command line: `lorastate predict | optimize | gradient | sweep | explain | simulate | verify | figure |
practice`.

Results go to stdout; messages and progress bars to stderr. Exit codes: 0 when the answer is right, 2 for bad
input, 3 for a solve that failed. Whatever imports JAX is imported inside the commands: `--help` is fast.
"""

from __future__ import annotations

import _thread
import contextlib
import io
import os
import re
import signal
import socket
import sys
import threading
import warnings
from collections.abc import Sequence
from typing import Any

import tyro
from tyro.conf import FlagCreatePairsOff

from .._version import __version__
from .commands import Command, spread
from .environment import float64_refused, no_device, set_up_jax
from .exit_codes import BAD_INPUT, BROKEN_PIPE, FAILED, INTERRUPTED, UNWRITTEN
from .output import say, warn
from .screen import at_work

#: Seconds after Ctrl-C that Python may take to see it, and those that may go by until the command has ended.
_PATIENCE, _LONGEST = 3.0, 10.0


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code; usage errors and `--help` leave through `SystemExit`."""
    if _nobody_reads():
        return UNWRITTEN
    with _interruptible() as seen:
        try:
            status = _main(list(sys.argv[1:] if argv is None else argv))
        except Exception:  # an import that is interrupted may end in any error
            if not seen.is_set():
                raise
            warn("interrupted")
            status = INTERRUPTED
    if status == INTERRUPTED and argv is None:  # the process ends here: threads that compile cannot be stopped
        sys.stdout.flush()
        os._exit(status)
    return status


def _nobody_reads() -> bool:
    """Whether the shell has closed stdout, which is said. What is closed is opened on nothing: the next file that is
    opened would have its number, and be written what libraries say."""
    closed = sys.stdout is None
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_RDWR), mode))
    if closed:
        warn("input or output failed (stdout is closed)")
    return closed


@contextlib.contextmanager
def _interruptible():
    """Ctrl-C also where the compiler is at work, which does not let Python see it, and where other code takes it for
    another error and goes on: after some seconds the process ends.

    A second Ctrl-C ends it at once. Yields an event that says whether there was one.
    """
    seen, ended = threading.Event(), threading.Event()
    if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield seen
        return
    told, tell = socket.socketpair()

    def watch():
        with told:
            while word := told.recv(1):
                if word[0] == signal.SIGINT and not (seen.wait(_PATIENCE) and ended.wait(_LONGEST)):
                    _leave()

    def interrupt(*_):
        if seen.is_set():
            _leave()
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
        yield seen
    finally:
        ended.set()
        sys.unraisablehook = usual
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.set_wakeup_fd(before)
        tell.close()


def _main(words: list[str]) -> int:
    if isinstance(sys.stdout, io.TextIOWrapper):  # a path, say, in letters that the terminal has not
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        if words == ["--version"]:
            say(__version__)
            sys.stdout.flush()
            return 0
        if any("\0" in word for word in words):
            warn("an argument holds a null byte; allowed: text")
            return BAD_INPUT
        command = tyro.cli(
            Command,
            prog="lorastate",
            description="High-dimensional theory of LoRA fine-tuning in attention.",
            args=spread(words),
            config=(FlagCreatePairsOff,),
        )
        status = _run(command)
        sys.stdout.flush()
        return status
    except KeyboardInterrupt:
        warn("interrupted")
        return INTERRUPTED
    except OSError as error:
        # Whatever is still buffered must not be written, and fail again, when Python exits.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(error, BrokenPipeError):
            return BROKEN_PIPE
        warn(f"input or output failed ({error})")
        return UNWRITTEN


#: What another process was just writing, or a disk that is full: it is compiled here, as it would be without a cache.
_OF_THE_CACHE = re.compile("Error (reading|writing) persistent compilation cache entry")


def _run(command: Any) -> int:
    if float64_refused():
        return BAD_INPUT
    with at_work():
        return _computed(command)


@contextlib.contextmanager
def _imports():
    """Ctrl-C ends the process at once: extensions that are interrupted while they are loaded make other errors of it,
    and libraries go on without them."""
    usual = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or usual is signal.SIG_IGN:
        yield
        return
    signal.signal(signal.SIGINT, _leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, usual)


def _leave(*_) -> None:
    warn("interrupted")
    os._exit(INTERRUPTED)


def _computed(command: Any) -> int:
    try:
        with _imports():
            import jax

            from ..errors import SettingError, SolveError
    except ValueError as error:  # a variable of the environment with a value that JAX does not know
        warn(f"JAX does not start: {error}; allowed: what its documentation lists, or leaving it out")
        return BAD_INPUT
    set_up_jax()
    with _own_warnings():
        try:
            return command()
        except SettingError as error:
            warn(str(error))
            return BAD_INPUT
        except SolveError as error:
            warn(str(error))
            return FAILED
        except (MemoryError, jax.errors.JaxRuntimeError) as error:
            if not isinstance(error, MemoryError) and "RESOURCE_EXHAUSTED" not in str(error):
                raise
            warn("memory ran out; take fewer numerics.nodes or a smaller --dimension")
            return FAILED
        except (RuntimeError, AssertionError):
            reason = no_device()
            if reason is None:
                raise
            warn(reason)
            return BAD_INPUT


@contextlib.contextmanager
def _own_warnings():
    """Warnings of this package as messages, those of the cache not at all, others as usual."""
    usual = warnings.showwarning

    def show(message, category, *args, **kwargs):
        if _OF_THE_CACHE.match(str(message)):
            return
        if category.__module__.startswith("lorastate."):
            warn(str(message))
        else:
            usual(message, category, *args, **kwargs)

    try:
        warnings.showwarning = show
        yield
    finally:
        warnings.showwarning = usual


if __name__ == "__main__":
    sys.exit(main())
