"""What a person sees in the first minute of a command on a fresh machine: every line of the screen with its second.

    python benchmarks/first_minute.py --out benchmarks/first_minute.md

Each command runs in a terminal of 100 columns with empty caches, in a folder of its own, and is stopped by Ctrl-C after
`--seconds` (60). Bars that are drawn anew over themselves appear once a second, and where they end.
"""

from __future__ import annotations

import argparse
import os
import platform
import pty
import re
import select
import shlex
import signal
import struct
import subprocess
import sys
import tempfile
import termios
import time
from fcntl import ioctl
from pathlib import Path

ROOT = Path(__file__).parents[1]
COMMANDS = (
    "optimize SOFTMAX --out results",
    "sweep SOFTMAX --grid pretraining.lam=log:1e-3:1:64 finetuning.alpha=0.5,1,2,4 --out results",
    "figure 1 --out results",
    "simulate SOFTMAX --dimension 100 --runs 2",
)
_ESCAPE = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


def seen(command: str, seconds: float) -> list[tuple[float, str]]:
    """(second, line) of what appears on the screen."""
    words = shlex.split(command.replace("SOFTMAX", str(ROOT / "examples/softmax.toml")))
    with tempfile.TemporaryDirectory() as folder:
        main, screen = pty.openpty()
        ioctl(screen, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 100, 0, 0))
        env = {**os.environ, "XDG_CACHE_HOME": folder + "/cache", "TERM": "xterm", "PYTHONPATH": str(ROOT)}
        env.pop("JAX_COMPILATION_CACHE_DIR", None)
        began = time.monotonic()
        process = subprocess.Popen(
            [sys.executable, "-m", "lorastate", *words], cwd=folder, env=env, stdin=screen, stdout=screen,
            stderr=screen, start_new_session=True,
        )  # fmt: skip
        os.close(screen)
        pieces, asked = [], False
        while True:
            now = time.monotonic() - began
            if now > seconds and not asked:
                os.killpg(process.pid, signal.SIGINT)
                asked = True
            if select.select([main], [], [], 0.1)[0]:
                try:
                    data = os.read(main, 65536)
                except OSError:  # the other side is closed
                    break
                if not data:
                    break
                pieces.append((time.monotonic() - began, data.decode(errors="replace")))
        process.wait()
        pieces.append((time.monotonic() - began, f"\n[exit code {process.returncode}]\n"))
    return list(_lines(pieces))


def _lines(pieces: list[tuple[float, str]]):
    """Whole lines, and of a line that is drawn over itself one state a second and the last."""
    line, shown, last = "", "", -1.0
    for when, text in pieces:
        for part in re.split(r"(\r\n|\n|\r)", _ESCAPE.sub("", text)):
            if part == "\r":
                if line.strip() and when - last >= 1 and line != shown:
                    yield when, line.rstrip()
                    shown, last = line, when
                line = ""
            elif part in ("\n", "\r\n"):
                if line.strip() and line != shown:
                    yield when, line.rstrip()
                line, shown = "", ""
            else:
                line += part


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=60.0)
    options = parser.parse_args()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # for commands, where a shell runs this behind it
    out = [
        "# The first minute\n",
        f"What appears on the screen, with the second in which it does. Empty caches, {os.cpu_count()} cores "
        f"({platform.machine()}), {time.strftime('%d %B %Y')}; `python benchmarks/first_minute.py --out FILE` records "
        f"it again. A command that is not done after {options.seconds:.0f} seconds is stopped by Ctrl-C.\n",
    ]
    for command in COMMANDS:
        shown = command.replace("SOFTMAX", "examples/softmax.toml")
        rows = [f"{when:6.1f}  {line}" for when, line in seen(command, options.seconds)]
        out += [f"## {command.split()[0]}\n", "```text", f"$ lorastate {shown}", *rows, "```\n"]
        print(f"{command}: first line after {rows[0].split()[0]} s, {rows[-1].strip()}", flush=True)
    options.out.write_text("\n".join(out))


if __name__ == "__main__":
    main()
