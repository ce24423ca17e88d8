"""What kills, full disks, lost folders and damaged files do to a command that is at work.

    python benchmarks/faults.py --out faults.md

Each of sweep, verify, simulate and optimize is killed (SIGKILL) at `--kills` random moments and started again by the
same command, until it ends: no finished record may be lost on the way, and the result must be that of a run that
nobody disturbed. Then, on a sweep: a disk that fills up (a tmpfs of one megabyte; root only), a folder that vanishes, a
damaged file, a second process on the same folder.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

SETTING = """\
[pretraining]
alpha = 0.3
lam = 0.1
tokens = 2
activation = "identity"
[finetuning]
alpha = 3.0
lam = 0.5
[numerics]
nodes = 512
finetuning_nodes = 1024
replicas = 2
"""
COMMANDS = {
    "sweep": "sweep SETTING --grid finetuning.lam=log:0.3:3:60 pretraining.lam=log:0.05:0.5:10 --out OUT",
    "verify": "verify SETTING --dimensions 16,24 --alone 32,48 --runs 4 --moves 1 --out OUT",
    "simulate": "simulate SETTING --dimension 30 --runs 20 --json --out OUT",
    "optimize": "optimize SETTING --out OUT",
}
ROOT = Path(__file__).parents[1]
WORST = 300  # seconds that anything may take


def start(command: str, folder: Path, out: Path) -> subprocess.Popen:
    setting = folder / "setting.toml"
    setting.write_text(SETTING)
    words = [w.replace("SETTING", str(setting)).replace("OUT", str(out)) for w in command.split()]
    env = {**os.environ, "XDG_CACHE_HOME": str(folder / "cache"), "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [sys.executable, "-m", "lorastate", *words], env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def ended(process: subprocess.Popen) -> tuple[int, str, str]:
    """(code, what was printed, last line of what was said)."""
    printed, said = process.communicate(timeout=WORST)
    lines = [line for line in said.replace("\r", "\n").splitlines() if line.strip()]
    return process.returncode, printed, lines[-1].strip() if lines else ""


def records(out: Path) -> int:
    """Whole records in all journals of a folder."""
    from lorastate.runtime.journal import Journal

    count = 0
    for path in out.rglob("points-*.bin"):
        reader = Journal.__new__(Journal)
        count += len(reader._read(path)[1])
    return count


def result(name: str, out: Path, printed: str):
    """What must not depend on what happened on the way."""
    if name == "sweep":
        return (out / "sweep.nc").read_bytes()
    if name == "simulate":
        return json.loads(printed)
    found = json.loads((out / ("verify.json" if name == "verify" else "result.json")).read_text())
    return {k: v for k, v in found.items() if k not in ("seconds",)}


def killed(name: str, folder: Path, kills: int, rng: random.Random) -> str:
    command = COMMANDS[name]
    code, printed, _ = ended(start(command, folder, folder / "warm"))  # fills the caches
    began = time.monotonic()
    code, printed, _ = ended(start(command, folder, folder / "whole"))
    took, want = time.monotonic() - began, result(name, folder / "whole", printed)
    rounds, known, lost, done = 1, 0, 0, 0
    while done < kills:
        out = folder / f"killed {rounds}"
        process = start(command, folder, out)
        try:
            process.wait(rng.uniform(0.3, took))
        except subprocess.TimeoutExpired:
            process.kill()
            done += 1
        process.communicate()
        now = records(out)
        lost, known = lost + (now < known), now
        for file in out.rglob("*.json"):
            json.loads(file.read_text())  # whole, or not there
        if process.returncode == 0:  # it was done before: once more from the beginning
            assert name == "simulate" or result(name, out, "") == want
            rounds, known = rounds + 1, 0
    code, printed, _ = ended(start(command, folder, out))
    same = result(name, out, printed) == want
    return (
        f"| {name} | {took:.1f} s | {kills}, in {rounds} rounds | {lost} | exit code {code}, "
        f"{'the same result' if same else 'ANOTHER RESULT'} |"
    )


# ---- faults of a sweep -------------------------------------------------------------------------------------------


def wait_for_records(out: Path, process: subprocess.Popen) -> None:
    while records(out) < 1 and process.poll() is None:
        time.sleep(0.05)


def full_disk(folder: Path) -> str:
    disk = folder / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", disk], capture_output=True).returncode:
        return "not tried: no tmpfs can be mounted here"
    try:
        (disk / "ballast").write_bytes(bytes(900_000))
        code, _, said = ended(start(COMMANDS["sweep"], folder, disk / "out"))
        (disk / "ballast").unlink()
        again, _, _ = ended(start(COMMANDS["sweep"].replace(":60", ":50"), folder, disk / "other"))
        return f"exit code {code}: {said}; with room again exit code {again}"
    finally:
        subprocess.run(["umount", disk])


def vanished(folder: Path) -> str:
    process = start(COMMANDS["sweep"], folder, out := folder / "gone")
    wait_for_records(out, process)
    shutil.rmtree(out)
    code, _, said = ended(process)
    return f"exit code {code}: {said}"


def damaged(folder: Path) -> str:
    process = start(COMMANDS["sweep"], folder, out := folder / "damaged")
    wait_for_records(out, process)
    process.kill()
    process.communicate()
    path, before = next(out.glob("points-*.bin")), records(out)
    data = bytearray(path.read_bytes()[:-5])  # half of the last record
    data[-200] ^= 1  # and one bit before it
    path.write_bytes(data)
    after = records(out)
    code, _, _ = ended(start(COMMANDS["sweep"], folder, out))
    same = (out / "sweep.nc").read_bytes() == (folder / "whole/sweep.nc").read_bytes()
    return f"{before} records, {after} of them trusted; then exit code {code}, {'the same' if same else 'ANOTHER'} file"


def second(folder: Path) -> str:
    process = start(COMMANDS["sweep"], folder, out := folder / "both")
    while not out.exists() or not list(out.glob("*.lock")):
        time.sleep(0.05)
    code, _, said = ended(start(COMMANDS["sweep"], folder, out))
    first, _, _ = ended(process)
    return f"second: exit code {code}: {said}; first: exit code {first}"


FAULTS: dict[str, Callable[[Path], str]] = {
    "a disk that is full": full_disk, "a folder that vanishes": vanished, "a damaged file": damaged,
    "two on one folder": second,
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--out", type=Path, default=Path("faults.md"))
    options = parser.parse_args()
    rng, lines = random.Random(0), []

    def say(line: str) -> None:
        lines.append(line.replace(str(ROOT), "."))
        print(lines[-1], flush=True)

    say("| command | alone | kills | records lost | at the end |\n|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as place:
        folders = {name: Path(place) / name for name in COMMANDS}
        for name, folder in folders.items():
            folder.mkdir()
            say(killed(name, folder, options.kills, rng))
        say("\n| fault of a sweep | what it says |\n|---|---|")
        for name, fault in FAULTS.items():
            say(f"| {name} | {fault(folders['sweep']).replace(place, '')} |")
    options.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
