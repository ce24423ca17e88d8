"""Speed: `python benchmarks/speed.py [ROW ...]` prints a Markdown table; where JAX finds a GPU it measures that.

Every row runs in a process of its own. Cold is import, compile and first answer without a compilation cache; warm is
the time of further calls on changed inputs (median of several, or one large batch).
"""

from __future__ import annotations

import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from main_job import machine

#: Half as many nodes again as by default, in larger replicas: a quadrature error of E' of 0.1 % in the setting below.
FINE = {"nodes": 24576, "finetuning_nodes": 98304, "replicas": 6}
ROOT = Path(__file__).parents[1]


def _setting(numerics=None):
    import lorastate as ls

    pre = ls.Pretraining(alpha=0.1, lam=0.02)
    return ls.Setting(pre, ls.Finetuning(alpha=3.0, lam=0.3), numerics or ls.Numerics())


def identity_batch(count: int = 10_000) -> dict:
    """Identity pre-training of a batch of settings, shared out over all devices."""
    import equinox as eqx
    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax.sharding import Mesh, PartitionSpec

    import lorastate as ls
    from lorastate.solution.pretraining import search_pretraining
    from lorastate.solution.problem import Problem

    numerics = ls.Numerics()
    lams = jnp.geomspace(0.01, 0.5, count)
    params, rest = eqx.partition(ls.Pretraining(0.1, 0.1, activation="identity"), eqx.is_array)

    def one(lam):
        pre = eqx.tree_at(lambda p: p.lam, eqx.combine(params, rest), lam)
        point = search_pretraining(Problem.of_pretraining(pre, numerics)).point
        return point.x, point.code

    devices = jax.local_devices()
    spec = PartitionSpec("lane")
    # On a CPU groups of lanes: one that is slow holds its group only.
    size = 250 if devices[0].platform == "cpu" else count // len(devices)

    solve = jax.jit(jax.shard_map(lambda x: jax.lax.map(jax.vmap(one), x.reshape(-1, size)),
                                  mesh=Mesh(np.array(devices), ("lane",)), in_specs=spec, out_specs=spec,
                                  check_vma=False))  # fmt: skip
    start = time.perf_counter()
    jax.block_until_ready(solve(lams))
    cold = time.perf_counter() - start
    times = []
    for k in range(5):
        start = time.perf_counter()
        _, code = jax.block_until_ready(solve(lams * (1 + 0.01 * k)))
        times.append(time.perf_counter() - start)
    warm = statistics.median(times)
    return {"cold": cold, "warm": warm, "rate": f"{count / warm:.0f} settings/s, {int(np.sum(code != 0))} failed"}


def softmax_one(thinning: int = 1) -> dict:
    """Both stages of one softmax setting, with all error bars."""
    import lorastate as ls

    base = _setting(ls.Numerics(**FINE, thinning=thinning))
    start = time.perf_counter()
    ls.predict(base)
    cold = time.perf_counter() - start
    times, values, bars = [], [], []
    for k in range(1, 12):
        start = time.perf_counter()
        float(ls.predict(ls.replace(base, "pretraining.lam", 0.02 + 0.001 * k)).test_error)
        times.append(time.perf_counter() - start)
    for seed in range(1, 13):
        found = ls.predict(ls.replace(base, "numerics.seed", seed))
        values.append(float(found.test_error))
        bars.append(found.stderr("finetuning", "test_error"))
    mean = statistics.mean(values)
    error, spread = statistics.mean(b * b for b in bars) ** 0.5 / mean, statistics.stdev(values) / mean
    rate = f"error of E' {error:.2%} as reported, {spread:.2%} as seen over 12 seeds"
    return {"cold": cold, "warm": statistics.median(times), "rate": rate}


def softmax_thinned() -> dict:
    """The same with `numerics.thinning` = 8."""
    return softmax_one(8)


def gradients() -> dict:
    """All gradients of E', beside the prediction with its error bars."""
    import lorastate as ls

    base = _setting()
    start = time.perf_counter()
    ls.gradient(base)
    cold = time.perf_counter() - start
    ls.predict(base)
    predicting, sloping = [], []
    for k in range(1, 8):
        here = ls.replace(base, "pretraining.lam", 0.02 + 0.001 * k)
        start = time.perf_counter()
        float(ls.predict(here).test_error)
        predicting.append(time.perf_counter() - start)
        start = time.perf_counter()
        ls.gradient(here)
        sloping.append(time.perf_counter() - start)
    a, b = statistics.median(predicting), statistics.median(sloping)
    return {"cold": cold, "warm": b, "rate": f"{b / a:.2f} x predict ({a:.2f} s)"}


def sweep_thinned() -> dict:
    """The same with `numerics.thinning` = 8."""
    return softmax_sweep(thinning=8)


def softmax_sweep(count: int = 120, thinning: int = 1) -> dict:
    """A sweep of 120 softmax settings on all devices, with the nodes of the row above."""
    import jax

    import lorastate as ls

    base = _setting(ls.Numerics(**FINE, thinning=thinning))
    lams = [0.02 * 1.02**k for k in range(count // 4)]
    grid = {"pretraining.lam": lams[:4], "finetuning.lam": [0.3, 0.5]}
    start = time.perf_counter()
    ls.sweep(base, grid, devices="all")
    cold = time.perf_counter() - start
    start = time.perf_counter()
    data = ls.sweep(base, {"pretraining.lam": lams, "finetuning.lam": [0.2, 0.3, 0.5, 1.0]}, devices="all")
    warm = time.perf_counter() - start
    error = float((data["finetuning.test_error_stderr"] / data["finetuning.test_error"]).median())
    rate = f"{60 * count / warm:.0f} settings/min on {len(jax.local_devices())} devices, error {error:.2%}"
    return {"cold": cold, "warm": warm, "rate": rate}


def _tokens(count: int) -> dict:
    """Both stages of a smooth softmax setting with so many tokens, few nodes."""
    import lorastate as ls

    base = ls.replace(
        _setting(ls.Numerics(nodes=4096, finetuning_nodes=16384, replicas=4)), "pretraining.tokens", count
    )
    times = []
    for k in range(6):
        start = time.perf_counter()
        found = ls.predict(ls.replace(base, "pretraining.lam", 0.02 + 0.001 * k))
        times.append(time.perf_counter() - start)
    error = found.stderr("finetuning", "test_error") / float(found.test_error)
    return {"cold": times[0], "warm": statistics.median(times[1:]), "rate": f"error of E' {error:.2%}"}


def tokens_2() -> dict:
    """Both stages, T = 2, 4096 and 16384 nodes."""
    return _tokens(2)


def tokens_4() -> dict:
    """The same, T = 4."""
    return _tokens(4)


def tokens_6() -> dict:
    """The same, T = 6."""
    return _tokens(6)


def tokens_8() -> dict:
    """The same, T = 8."""
    return _tokens(8)


def optimize_command() -> dict:
    """`lorastate optimize examples/softmax.toml`, process to figure, with an empty and a filled cache."""
    with tempfile.TemporaryDirectory() as out:
        first, second = _command("optimize", "examples/softmax.toml", "--out", out)
    return {"cold": first, "warm": second, "rate": ""}


def _command(*args: str) -> tuple[float, float]:
    """Seconds of a command of `lorastate` with an empty compilation cache, and with what that has left."""
    times = []
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(2):
            start = time.perf_counter()
            subprocess.run(
                [sys.executable, "-m", "lorastate", *args], check=True, capture_output=True, cwd=ROOT,
                env={**os.environ, "XDG_CACHE_HOME": folder},
            )  # fmt: skip
            times.append(time.perf_counter() - start)
    return times[0], times[1]


def command_smooth() -> dict:
    """`lorastate predict`, alpha' = 3, lambda' = 0.3: process to answer, with an empty and a filled cache."""
    first, second = _command("predict", "examples/softmax.toml", "--set", "finetuning.lam=0.3")
    return {"cold": first, "warm": second, "rate": ""}


def command_broken() -> dict:
    """The same with Delta = 2 and lambda' = 0.05, where symmetry is broken: another search is compiled."""
    given = ("--set", "pretraining.delta=2", "--set", "finetuning.lam=0.05")
    first, second = _command("predict", "examples/softmax.toml", *given)
    return {"cold": first, "warm": second, "rate": ""}


def _broken(pre: dict, fine: dict, nodes: int) -> dict:
    """One setting with broken symmetry on six seeds."""
    import lorastate as ls

    stages = ls.Pretraining(kappa=1.5, **pre), ls.Finetuning(**fine)
    times, values, bars = [], [], []
    for seed in range(6):
        start = time.perf_counter()
        found = ls.predict(ls.Setting(*stages, ls.Numerics(16384, nodes, seed=seed)))
        values.append(float(found.test_error))
        times.append(time.perf_counter() - start)
        bars.append(found.stderr("finetuning", "test_error"))
    error, spread = statistics.mean(bars) / values[0], statistics.stdev(values) / statistics.mean(values)
    rate = f"error of E' {error:.2%} as reported, {spread:.2%} as seen over 6 seeds"
    return {"cold": times[0], "warm": statistics.median(times[1:]), "rate": rate}


def broken_3() -> dict:
    """Figure 1 right, T = 3, symmetry broken, 32768 nodes."""
    return _broken({"alpha": 0.1, "lam": 0.01, "delta": 2.0}, {"alpha": 3.0, "lam": 0.05}, 32768)


def broken_3_fine() -> dict:
    """The same with 131072 nodes."""
    return _broken({"alpha": 0.1, "lam": 0.01, "delta": 2.0}, {"alpha": 3.0, "lam": 0.05}, 131072)


def broken_2() -> dict:
    """Setting A of the tables of benchmarks/README.md, T = 2, symmetry broken, 65536 nodes."""
    pre = {"alpha": 0.042275, "lam": 0.00175652, "kappa0": 1.43304, "delta": 2.58385, "tokens": 2}
    return _broken(pre, {"alpha": 6.48606, "lam": 0.175731}, 65536)


def figure_one() -> dict:
    """`lorastate figure 1`, process to PNG, with an empty and a filled cache."""
    with tempfile.TemporaryDirectory() as out:
        first, second = _command("figure", "1", "--out", out)
    return {"cold": first, "warm": second, "rate": ""}


def simulation() -> dict:
    """Training of the real model: D = 150, 4 runs, both stages, softmax."""
    import lorastate as ls

    start = time.perf_counter()
    ls.simulate(_setting(), dimension=150, runs=4)
    return {"cold": time.perf_counter() - start, "rate": "D = 150, 4 runs"}


ROWS = {
    f.__name__: f
    for f in (
        identity_batch, softmax_one, softmax_thinned, gradients, softmax_sweep, sweep_thinned,
        broken_3, broken_3_fine, broken_2,
        command_smooth, command_broken, optimize_command, figure_one, simulation,
        tokens_2, tokens_4, tokens_6, tokens_8,
    )
}  # fmt: skip


def measure(name: str) -> dict:
    began = time.perf_counter()
    import jax

    jax.config.update("jax_enable_x64", True)
    jax.config.update("jax_enable_compilation_cache", False)
    jax.config.update("jax_num_cpu_devices", len(os.sched_getaffinity(0)))
    jax.local_devices()
    started = time.perf_counter() - began
    out = ROWS[name]()
    out["cold"] += started
    used = (resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    out["memory"] = max(used) / 2**20
    out["accelerator"] = "" if jax.default_backend() == "cpu" else f"{jax.devices()[0].device_kind}, "
    return out


def main() -> None:
    if sys.argv[1:2] == ["--row"]:
        print(json.dumps(measure(sys.argv[2])))
        return
    names = sys.argv[1:] or list(ROWS)
    lines, accelerator = [], ""
    for name in names:
        done = subprocess.run([sys.executable, __file__, "--row", name], capture_output=True, text=True)
        if done.returncode:
            lines.append(f"| {name} | failed | | {done.stderr.strip().splitlines()[-1][:80]} | |")
            continue
        r = json.loads(done.stdout.splitlines()[-1])
        accelerator = r["accelerator"]
        title = (ROWS[name].__doc__ or name).rstrip(".")
        warm = f"{r['warm']:.3g} s" if "warm" in r else ""
        lines.append(f"| {title} | {r['cold']:.1f} s | {warm} | {r['rate']} | {r['memory']:.2f} GB |")
    print(f"{accelerator}{machine()}\n")
    print("| work | cold | warm | rate | peak memory |\n|---|---|---|---|---|")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
