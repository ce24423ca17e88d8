"""A sweep by eight processes on the loopback address, one of which is killed; then the same commands once more.

    python benchmarks/many_processes.py [--points 400] [--processes 8]

Stands for eight hosts: says what each process says when one is lost, what is on disk then, what the second start adds,
and whether the dataset is that of one process alone, bit for bit; bytes a point, for the plan of a larger one.
"""

from __future__ import annotations

import argparse
import socket
import tempfile
import time
from pathlib import Path

import faults
from faults import ended, records


def start(folder: Path, out: Path, points: int, process: int = 0, processes: int = 1, address: str = ""):
    team = f" --coordinator {address} --processes {processes} --process {process}" if processes > 1 else ""
    return faults.start(
        f"sweep SETTING --grid finetuning.lam=log:0.3:3:{points} --devices 1 --out OUT{team}", folder, out
    )


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--points", type=int, default=400)
    parser.add_argument("--processes", type=int, default=8)
    options = parser.parse_args()
    count, points = options.processes, options.points
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        code, _, _ = ended(start(folder, folder / "alone", points))
        size = (folder / "alone/points-0.bin").stat().st_size / points
        whole = (folder / "alone/sweep.nc").stat().st_size / points
        print(
            f"one process: exit code {code}; {size:.0f} bytes a point in the journal, {whole:.0f} in sweep.nc",
            flush=True,
        )
        out = folder / "shared"
        address = f"127.0.0.1:{free_port()}"
        team = [start(folder, out, points, k, count, address) for k in range(count)]
        while not (out / f"points-{count - 1}.bin").exists() and team[-1].poll() is None:
            time.sleep(0.02)
        began = time.monotonic()
        team[-1].kill()
        said = [ended(process) for process in team]
        print(f"process {count - 1} killed; the others have ended after {time.monotonic() - began:.0f} s:")
        for code, line in sorted({(code, line) for code, _, line in said}):
            print(f"  exit code {code}: {line.replace(place, '')}")
        print(f"on disk: {records(out)} of {points} points", flush=True)
        address = f"127.0.0.1:{free_port()}"
        team = [start(folder, out, points, k, count, address) for k in range(count)]
        codes = [ended(process)[0] for process in team]
        same = (out / "sweep.nc").read_bytes() == (folder / "alone/sweep.nc").read_bytes()
        print(f"the same commands again: exit codes {sorted(set(codes))}, {records(out)} points, ", end="")
        print("the file of one process" if same else "ANOTHER FILE")


if __name__ == "__main__":
    main()
