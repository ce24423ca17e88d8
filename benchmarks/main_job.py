"""Time and memory of the main job: `python benchmarks/main_job.py` prints a Markdown table.

Every row is measured in a process of its own (so that peak memory is that row's), with compilation and warm time
apart: cold = import, compile and answer; warm = the median of further calls on changed inputs.
"""

from __future__ import annotations

import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time

ROWS = ("identity pre-training", "softmax predict", "softmax gradient")


def measure(row: str) -> dict[str, float]:
    began = time.perf_counter()
    import jax

    jax.config.update("jax_enable_x64", True)
    jax.config.update("jax_enable_compilation_cache", False)
    import lorastate as ls
    from lorastate.solution.pretraining import search_pretraining
    from lorastate.solution.problem import Problem

    pre = ls.Pretraining(alpha=0.1, lam=0.01, activation="identity" if row.startswith("identity") else "softmax")
    setting = ls.Setting(pre, ls.Finetuning(alpha=3.0, lam=0.05))
    settings = [ls.replace(setting, "pretraining.lam", 0.01 + 0.0002 * k) for k in range(12)]
    out: dict[str, float] = {}

    solve = jax.jit(lambda p: search_pretraining(Problem.of_pretraining(p, setting.numerics)).point)

    def run(s):
        if row == "identity pre-training":
            jax.block_until_ready(solve(s.pretraining))
        elif row == "softmax gradient":
            ls.gradient(s)
        else:
            found = ls.predict(s)
            out["relative quadrature error of E'"] = found.stderr("finetuning", "test_error") / float(found.test_error)

    run(settings[0])
    out["cold"] = time.perf_counter() - began
    times = []
    for s in settings[1:]:
        start = time.perf_counter()
        run(s)
        times.append(time.perf_counter() - start)
    out["warm"] = statistics.median(times)
    out["memory"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return out


def machine() -> str:
    import jax

    model = platform.processor() or platform.machine()
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo") as lines:
            names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
        model = names[0] if names else model
    threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{model}, {threads} threads, Python {platform.python_version()}, jax {jax.__version__}, float64"


def main() -> None:
    print(f"{machine()}\n")
    print("| work | cold: import, compile, answer | warm | peak memory | relative quadrature error of E' |")
    print("|---|---|---|---|---|")
    found = {}
    for row in ROWS:
        text = subprocess.run([sys.executable, __file__, row], check=True, capture_output=True, text=True).stdout
        r = found[row] = json.loads(text)
        error = r.get("relative quadrature error of E'")
        warm = f"{1e3 * r['warm']:.2f} ms" if r["warm"] < 0.1 else f"{r['warm']:.2f} s"
        shown = "" if error is None else f"{100 * error:.2f} %"
        print(f"| {row} | {r['cold']:.1f} s | {warm} | {r['memory']:.2f} GB | {shown} |", flush=True)
    ratio = found["softmax gradient"]["warm"] / found["softmax predict"]["warm"]
    print(f"\nAll gradients of E' together take {ratio:.2f} times the time of `predict`, error bars included.")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        print(json.dumps(measure(sys.argv[1])))
    else:
        main()
