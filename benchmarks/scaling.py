"""Scaling: `python benchmarks/scaling.py [ROW ...]` prints how the warm time of a solve grows, with exponents.

Every row runs in a process of its own; those of devices one process each, on as many virtual devices. The exponent is
the slope of a straight line through (log size, log time), its error what the points scatter about it.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time

import numpy as np
from main_job import machine

SMOOTH = {"alpha": 3.0, "lam": 0.5}


def _setting(nodes=4096, tokens=3, **fine):
    import lorastate as ls

    numerics = ls.Numerics(nodes=nodes, finetuning_nodes=4 * nodes, replicas=4)
    pre = ls.Pretraining(alpha=0.1, lam=0.05, tokens=tokens)
    return ls.Setting(pre, ls.Finetuning(**{**SMOOTH, **fine}), numerics)


def _warm(solve, times: int = 5) -> float:
    """Median time of `solve(k)` after a first call."""
    solve(0)
    taken = []
    for k in range(1, times + 1):
        start = time.perf_counter()
        solve(k)
        taken.append(time.perf_counter() - start)
    return statistics.median(taken)


def _alone(base) -> float:
    import lorastate as ls

    def solve(k):
        found = ls.predict(ls.replace(base, "pretraining.lam", 0.05 + 0.001 * k))
        assert found.symmetry == "replica symmetric"

    return _warm(solve)


def _sweep(settings: int) -> float:
    import lorastate as ls

    base = _setting(1024)

    def solve(k):
        lams = np.geomspace(0.05, 0.1, settings) * (1 + 0.01 * k)
        data = ls.sweep(base, {"pretraining.lam": lams.tolist()}, devices="all")
        assert int((data["finetuning.code"] != 0).sum()) == 0

    return _warm(solve, 3)


ROWS = {
    "nodes": ("nodes of fine-tuning, a quarter as many of pre-training", (8192, 16384, 32768, 65536, 131072, 262144)),
    "tokens": ("tokens T, 4096 and 16,384 nodes", (2, 3, 4, 5, 6, 8)),
    "rank": ("rank of update and teacher, 4096 and 16,384 nodes", (1, 2, 3, 4)),
    "settings": ("settings of a sweep, 1024 and 4096 nodes", (8, 32, 128, 512)),
    "devices": ("virtual devices, a sweep of 128 settings", (1, 2, 4, 8)),
}


def measure(row: str, size: int) -> float:
    """Seconds for one size of a row."""
    import jax

    jax.config.update("jax_enable_x64", True)
    jax.config.update("jax_enable_compilation_cache", False)
    jax.config.update("jax_num_cpu_devices", size if row == "devices" else len(os.sched_getaffinity(0)))
    if row == "nodes":
        return _alone(_setting(size // 4))
    if row == "tokens":
        return _alone(_setting(tokens=size, lam=2.0))  # T = 2 has many minima at the ridge of the others
    if row == "rank":
        return _alone(_setting(rank=size, teacher_rank=size, alpha=8.0))
    return _sweep(size if row == "settings" else 128)


def exponent(sizes, times) -> tuple[float, float]:
    """Slope of log time by log size, and its standard error."""
    x, y = np.log(sizes), np.log(times)
    x = x - x.mean()
    slope = x @ y / (x @ x)
    rest = y - y.mean() - slope * x
    return slope, float(np.sqrt(rest @ rest / (len(x) - 2) / (x @ x)))


def main() -> None:
    if sys.argv[1:2] == ["--one"]:
        print(json.dumps(measure(sys.argv[2], int(sys.argv[3]))))
        return
    print(f"{machine()}\n\n| size | seconds | exponent |\n|---|---|---|")
    for name in sys.argv[1:] or ROWS:
        title, sizes = ROWS[name]
        times = []
        for size in sizes:
            given = [sys.executable, __file__, "--one", name, str(size)]
            done = subprocess.run(given, capture_output=True, text=True, check=False)
            if done.returncode:
                sys.exit(f"{name} {size}: {done.stderr.strip().splitlines()[-1]}")
            times.append(json.loads(done.stdout.splitlines()[-1]))
        slope, error = exponent(sizes, times)
        words = ", ".join(f"{size}: {t:.3g}" for size, t in zip(sizes, times, strict=True))
        print(f"| {title} | {words} | {slope:.2f}({error:.2f}) |", flush=True)


if __name__ == "__main__":
    main()
