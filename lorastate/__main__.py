"""The command line, `lorastate` or `python -m lorastate`."""

import contextlib
import os
import signal
import sys


def _leave(*_) -> None:
    with contextlib.suppress(OSError):
        os.write(2, b"lorastate: interrupted\n")
    os._exit(130)


def main() -> int:
    """`lorastate.cli.main.main`, which takes a moment to import: Ctrl-C ends the process until it can see to it."""
    usual = signal.getsignal(signal.SIGINT)
    if usual is signal.default_int_handler:
        signal.signal(signal.SIGINT, _leave)
    from .cli.main import main as run

    signal.signal(signal.SIGINT, usual)
    return run()


if __name__ == "__main__":
    sys.exit(main())
