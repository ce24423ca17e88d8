"""Random settings files and random command lines: never a traceback, never a hang.

    python benchmarks/fuzz.py --count 1000

Files: random bytes, valid files with bytes, values, keys or lines changed, and valid files cut somewhere. Command
lines: words drawn from the commands, options, fields and values there are, and from what there is not. Each goes
through `lorastate.cli.main.main` in this process. What is no valid call has to end within seconds in one sentence and
exit code 2; what happens to be valid is solved, on very few nodes, and ends in 0 or 3 (1 where it cannot be written).
Anything else is listed, with its number, which makes it again.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import io
import os
import random
import signal
import tempfile
import time
from pathlib import Path

FILE = """\
[pretraining]
alpha = 0.3
lam = 0.1
kappa0 = 0.5
kappa = 1.0
delta = 0.5
tokens = 2
activation = "identity"

[finetuning]
alpha = 3.0
lam = 0.5
inputs = "fresh"
rank = 1
recalibration = 1.0

[numerics]
nodes = 256
finetuning_nodes = 256
replicas = 2
max_steps = 60
"""
#: What stands for a value, right or wrong.
VALUES = (
    "0", "1", "-1", "0.5", "1e-3", "1e3", "1e-320", "1e400", "nan", "inf", "-inf", "-0.0", "1e", "0x1f", "1_000",
    "true", '"noise"', '"reused"', '"softmax"', '"identity"', '""', "[]", "[1, 2]", "{}", "{a = 1}", "1979-05-27", "'",
    '"', "\\u0000", "99999999999999999999999", "2", "3", "None", "weak", "é", "1,2", "=", " ",
)  # fmt: skip
FIELDS = (
    "alpha", "lam", "kappa0", "kappa", "delta", "tokens", "activation", "beta", "inputs", "rank", "teacher_rank",
    "recalibration", "rho", "pool", "score", "label_noise", "reused_fraction", "nodes", "finetuning_nodes", "replicas",
    "seed", "tolerance", "max_steps", "samples", "symmetry", "task", "base", "alhpa", "", "x.y.z", "q",
)  # fmt: skip
SECTIONS = ("pretraining", "finetuning", "numerics", "pretraining.task", "pretraining.base", "nothing", "")
COMMANDS = (
    "predict", "optimize", "gradient", "sweep", "explain", "simulate", "verify", "figure", "practice", "predcit",
)  # fmt: skip
OPTIONS = (
    "--set", "--grid", "--json", "--out", "--of", "--only", "--dimension", "--runs", "--seed", "--over", "--help", "-h",
    "--version", "--devices", "--stage", "--moves", "--starts", "--", "-", "--no-such", "--objective", "--free",
    "--vary", "--dimensions", "--alone", "--breaking-error", "--points", "--simulate", "--budget", "--task", "--tune",
)  # fmt: skip
GRIDS = ("log:0.1:1:3", "lin:1:2:2", "0.1,0.2", "log:0:1:3", "log:1", ":::", "lin:1:2:1e9", "log:0.1:1:-3")
#: Commands that, where they are valid, may take longer than a test of their words is worth.
_LONG = {"explain", "verify", "figure", "optimize", "practice", "simulate"}
#: Seconds that a call may take, what is valid and what is not.
PATIENCE, SOON = 240, 20


def random_file(rng: random.Random) -> bytes:
    """A settings file that is hardly one."""
    how = rng.randrange(6)
    data = bytearray(FILE.encode())
    lines = FILE.splitlines()
    if how == 0:
        return rng.randbytes(rng.randrange(300))
    if how == 1:
        for _ in range(rng.randrange(1, 6)):
            data[rng.randrange(len(data))] = rng.randrange(256)
        return bytes(data)
    if how == 2:
        return bytes(data[: rng.randrange(len(data))])
    k = rng.choice([i for i, line in enumerate(lines) if "=" in line])
    if how == 3:
        lines[k] = f"{lines[k].split('=')[0]}= {rng.choice(VALUES)}"
    elif how == 4:
        lines[k] = f"{rng.choice(FIELDS)} = {rng.choice(VALUES)}"
    else:
        lines[k], other = rng.choice(lines), rng.randrange(len(lines))
        lines[other] = f"[{rng.choice(SECTIONS)}]"
    return "\n".join(lines).encode("utf-8", "surrogateescape")


def random_words(rng: random.Random, file: str, folder: str) -> list[str]:
    """A command line; most are no valid call."""

    def word() -> str:
        kind = rng.randrange(8)
        if kind == 0:
            return rng.choice((file, folder, "no/such/file.toml", "/dev/null", ""))
        if kind == 1:
            return rng.choice(VALUES)
        if kind in (2, 3):
            return f"{rng.choice(SECTIONS)}.{rng.choice(FIELDS)}={rng.choice(VALUES)}"
        if kind == 4:
            return f"finetuning.lam={rng.choice(GRIDS)}"
        if kind == 5:
            return "".join(chr(rng.choice((rng.randrange(1, 128), rng.randrange(1, 0xD000)))) for _ in range(5))
        return rng.choice(OPTIONS)

    words = [rng.choice(COMMANDS)] if rng.random() < 0.95 else []
    if rng.random() < 0.8:
        words.append(file)
    return words + [word() for _ in range(rng.randrange(5))]


class Late(BaseException):
    """A call that takes too long."""


def call(words: list[str]) -> tuple[object, str]:
    """(exit code or error, what was said) of a command in this process."""
    from lorastate.cli.main import main

    def late(*_):
        raise Late

    out, err = (io.TextIOWrapper(io.BytesIO(), "utf-8", write_through=True) for _ in range(2))
    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(PATIENCE)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code: object = main(words)
    except SystemExit as error:
        code = error.code
    except Late:
        code = "late"
    except BaseException as error:  # a traceback, for who runs it
        code = f"{type(error).__name__}: {error}"
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    return code, err.buffer.getvalue().decode("utf-8", "replace")


def wrong(seconds: float, code: object, err: str) -> str | None:
    """What is wrong with the end of a call, if anything is."""
    if code not in (0, None, 1, 2, 3):
        return f"ended with {code}"
    if "Traceback" in err:
        return "a traceback was printed"
    if code == 2 and seconds > SOON:
        return f"took {seconds:.0f} s to be refused"
    said = [line for line in err.splitlines() if line.startswith("lorastate: ")]
    if code in (1, 2, 3) and not err.strip():
        return f"ended with {code} and without a word"
    if code == 2 and len(said) > 2:
        return f"refused in {len(said)} sentences"
    return None


def fuzz(kind: str, numbers: range, seed: int) -> tuple[collections.Counter, list[str]]:
    """How calls `numbers` of a kind, "file" or "words", ended, and those that ended badly."""
    ends: collections.Counter = collections.Counter()
    bad: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        good, here = Path(folder, "good.toml"), os.getcwd()
        good.write_text(FILE)
        os.chdir(folder)  # what a command line writes is written here
        try:
            for number in numbers:
                rng = random.Random(f"{seed} {kind} {number}")
                if kind == "file":
                    path = Path(folder, "setting.toml")
                    path.write_bytes(random_file(rng))
                    words = ["predict", str(path), "--only", "limits"]
                else:
                    words = random_words(rng, str(good), folder)
                    if words and words[0] in _LONG:  # what may be valid is not carried out
                        words.append("--no-such")
                began = time.perf_counter()
                code, err = call(words)
                what = wrong(time.perf_counter() - began, code, err)
                ends[str(code)] += 1
                if what:
                    last = err.strip().splitlines()[-1:] or [""]
                    bad.append(f"{kind} {number} {words}: {what}: {last[0][:200]}")
        finally:
            os.chdir(here)
    return ends, bad


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    for kind in ("file", "words"):
        began = time.perf_counter()
        ends, bad = fuzz(kind, range(given.first, given.first + given.count), given.seed)
        codes = ", ".join(f"{code}: {count}" for code, count in ends.most_common())
        print(
            f"{given.count} of {kind} in {time.perf_counter() - began:.0f} s; exit codes {codes}; bad: {len(bad)}",
            flush=True,
        )
        print("\n".join(bad), flush=True)


if __name__ == "__main__":
    main()
