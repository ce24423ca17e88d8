"""Studies of cost: `python benchmarks/studies.py [NAME ...]` prints a Markdown table for each (all of them by default).

    optimum   best ridges by implicit gradients (`optimize`) against SciPy's bounded Brent and Nelder-Mead
    nodes, settings, tokens, dimension, devices   cost curves, time = a x^p with the standard error of p
    flops     operations of one solve and the share of this machine's measured peak

Times are processor seconds of this process, warm (the least of three), so that other work on the machine counts little;
for `devices` they are wall-clock seconds. Compilation is left out of all of them.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from typing import Any

import numpy as np
from main_job import machine

SMALL = {"nodes": 2048, "finetuning_nodes": 8192, "replicas": 8}


def _setting(lam=0.02, ridge=0.3, tokens=3, **numerics):
    import lorastate as ls

    return ls.Setting(
        ls.Pretraining(0.1, lam, tokens=tokens), ls.Finetuning(3.0, ridge), ls.Numerics(**(numerics or SMALL))
    )


def _seconds(f, clock=time.process_time, repeats: int = 3, calls: int = 1) -> float:
    """The least time of a few rounds of `calls` calls, after one that may compile.

    A round must take 0.1 s or more: a processor clock misses up to a tick, some ms, of what other threads are doing.
    """
    f()
    times = []
    for _ in range(repeats):
        start = clock()
        for _ in range(calls):
            f()
        times.append((clock() - start) / calls)
    return min(times)


def power(x, t) -> str:
    """p of t = a x^p with its standard error, by least squares in logarithms."""
    x, t = np.log(np.asarray(x, float)), np.log(np.asarray(t, float))
    if len(x) < 3:
        return f"{np.diff(t)[0] / np.diff(x)[0]:.2f}"
    fit, covariance = np.polyfit(x, t, 1, cov="unscaled")
    rest = t - np.polyval(fit, x)
    return f"{fit[0]:.2f} +- {np.sqrt(covariance[0, 0] * rest @ rest / (len(x) - 2)):.2f}"


def _curve(name: str, x, t) -> None:
    print(
        f"| {name} | {', '.join(f'{v:g}' for v in x)} | {', '.join(f'{v:.3g}' for v in t)} | {power(x, t)} |",
        flush=True,
    )


def optimum() -> None:
    from scipy.optimize import minimize, minimize_scalar

    import lorastate as ls
    from lorastate.solution import solution

    base = _setting(0.01, 0.3)
    paths = ("pretraining.lam", "finetuning.lam")
    count = 0

    def error(u, over):
        """E' at fields e^u, without error bars or derivatives."""
        nonlocal count
        count += 1
        s = base
        for path, x in zip(over, np.atleast_1d(u), strict=True):
            s = ls.replace(s, path, float(np.exp(x)))
        pre, fine = s.pretraining, s.finetuning_resolved
        nodes = node_sets(pre, fine, s.numerics)
        found = solution._describe_finetuning(pre, fine, nodes, *solution.solve(pre, fine, s.numerics, nodes))
        return float(found.finetuning["test_error"])

    def ours(over):
        best = ls.optimize(base, over=over, tolerance=1e-5)
        return [np.log(best.path[-1][path]) for path in over], best.solves

    def brent(over):
        found: Any = minimize_scalar(lambda u: error(u, over), bounds=np.log([1e-3, 0.3]), method="bounded",
                                options={"xatol": 1e-3})  # fmt: skip
        return [found.x], count

    def nelder_mead(over):
        start = np.log([0.01, 0.3])[: len(over)]
        found = minimize(error, start, args=(over,), method="Nelder-Mead", options={"xatol": 1e-3, "fatol": 1e-7})
        return list(found.x), count

    print("| fields | method | solves | seconds | log of the fields, less the optimum | E' less the least |")
    print("|---|---|---|---|---|---|")
    for over, methods in ((paths[:1], (ours, brent, nelder_mead)), (paths, (ours, nelder_mead))):
        exact = ls.optimize(base, over=over, tolerance=1e-8).path[-1]
        error(np.log([exact[p] for p in over]), over)
        for method in methods:
            count = 0
            start = time.process_time()
            u, solves = method(over)
            took = time.process_time() - start
            off = ", ".join(f"{v - np.log(exact[p]):+.0e}" for v, p in zip(u, over, strict=True))
            above = error(u, over) - exact["value"]
            print(f"| {len(over)} | {method.__name__} | {solves} | {took:.2f} | {off} | {above:.0e} |", flush=True)


def nodes() -> None:
    import lorastate as ls

    x = [2048, 4096, 8192, 16384]
    t = [_seconds(lambda n=n: ls.predict(_setting(nodes=n, finetuning_nodes=4 * n, replicas=8))) for n in x]
    _curve("nodes of pre-training (4 x as many of fine-tuning)", x, t)


def settings() -> None:
    import lorastate as ls

    x = [4, 8, 16, 32]
    lams = 0.02 * 1.02 ** np.arange(max(x))
    t = [
        _seconds(lambda n=n: ls.sweep(_setting(), {"pretraining.lam": lams[:n]}, chunk=4, devices=1), repeats=1)
        for n in x
    ]
    _curve("settings of a sweep", x, t)


def tokens() -> None:
    import lorastate as ls

    x = [2, 3, 4, 5]
    t = [_seconds(lambda n=n: ls.predict(_setting(tokens=n), throw=False)) for n in x]
    _curve("tokens T, both stages", x, t)


def dimension() -> None:
    import lorastate as ls

    x = [40, 60, 80, 120]
    t = [_seconds(lambda n=n: ls.simulate(_setting(), dimension=n, runs=1), repeats=1) for n in x]
    _curve("D of a training, both stages", x, t)


def devices() -> None:
    x = [1, 2, 4, 8]
    t = []
    for n in x:
        done = subprocess.run(
            [sys.executable, __file__, "--devices", str(n)], check=True, capture_output=True, text=True
        )
        t.append(json.loads(done.stdout.splitlines()[-1]))
    _curve(f"virtual devices on {len(os.sched_getaffinity(0))} cores, 8192 identity pre-trainings", x, t)


def _on_devices(count: int) -> float:
    import jax

    jax.config.update("jax_num_cpu_devices", count)
    import equinox as eqx
    import jax.numpy as jnp
    from jax.sharding import Mesh, PartitionSpec

    import lorastate as ls
    from lorastate.solution.pretraining import solve_pretraining

    params, rest = eqx.partition(ls.Pretraining(0.1, 0.1, activation="identity"), eqx.is_array)

    def one(lam):
        pre = eqx.tree_at(lambda p: p.lam, eqx.combine(params, rest), lam)
        return solve_pretraining(pre, ls.Numerics(), None).point.x

    spec = PartitionSpec("lane")
    solve = jax.jit(jax.shard_map(lambda x: jax.lax.map(jax.vmap(one), x.reshape(-1, 8)),
                                  mesh=Mesh(np.array(jax.local_devices()), ("lane",)), in_specs=spec, out_specs=spec,
                                  check_vma=False))  # fmt: skip
    lams = jnp.geomspace(0.01, 0.5, 8192)
    return _seconds(lambda: jax.block_until_ready(solve(lams)), time.perf_counter, 5, 5)


def flops() -> None:
    """The compiler's count of a Newton step at a node, its time where arrays stay in the cache, and how many of them
    would take as long as the whole search."""
    import jax
    import jax.numpy as jnp

    from lorastate.evolution import finetuning as ft
    from lorastate.evolution import pretraining as pt
    from lorastate.evolution.order import decode
    from lorastate.math.linear import ldl_solve
    from lorastate.solution import solution

    s = _setting(nodes=16384, finetuning_nodes=65536, replicas=32)
    pre, fine = s.pretraining, s.finetuning_resolved
    sets = node_sets(pre, fine, s.numerics)
    first, second = solution.solve(pre, fine, s.numerics, sets)

    a = jnp.asarray(np.random.default_rng(0).normal(size=(768, 768)))
    multiply = jax.jit(lambda a: a @ a)
    peak = 2 * 768**3 / _seconds(lambda: jax.block_until_ready(multiply(a)), calls=40)

    def newton(problem, u):
        _, g, h = problem.terms(u)
        return u - ldl_solve(h, g, 0.0, 1e-3)[0]

    def stage(problem, u, steps=20_000):
        many = jax.jit(lambda p, u: jax.lax.fori_loop(0, steps, lambda _, u: u + 1e-9 * (newton(p, u) - u), u))
        cost: Any = jax.jit(newton).lower(problem, u).compile().cost_analysis()
        took = _seconds(lambda: jax.block_until_ready(many(problem, u)))
        return cost["flops"] / u.shape[1], cost.get("transcendentals", 0) / u.shape[1], took / steps / u.shape[1]

    few = slice(0, 128)
    replica = jax.tree_util.tree_map(lambda v: jnp.asarray(v[0]), sets.pretraining)
    of_map = pt.inner_problem(pre, decode(first.solved.point.x), replica).take(few)
    one = stage(of_map, first.solved.inner.u[0, 0][:, few])
    draws = ft.draws(fine, fine.inputs.freeze(pre, first.order),
                     jax.tree_util.tree_map(lambda v: jnp.asarray(v[0]), sets.finetuning))  # fmt: skip
    of_lora = ft.inner_problem(fine, decode(second.solved.point.x), draws).take(few)
    two = stage(of_lora, second.solved.inner.chi[0, 0][:, few])
    (_, pretrain), (_, search), given = solution._solve_pretraining, solution._solve_finetuning, s.numerics.without_seed
    took = (
        _seconds(lambda: jax.block_until_ready(pretrain(pre, given, sets.pretraining))),
        _seconds(lambda: jax.block_until_ready(search(pre, fine, first, given, sets.finetuning, False))),
    )
    print(f"peak of one core, by a matrix product: {peak / 1e9:.1f} GFLOP/s\n")
    print("| stage | operations of a Newton step | transcendental | time | of peak | search | steps' worth, a node |")
    print("|---|---|---|---|---|---|---|")
    for name, (operations, special, each), whole, n in (("pre-training", one, took[0], 16384),
                                                      ("fine-tuning", two, took[1], 65536)):  # fmt: skip
        share = operations / each / peak
        print(f"| {name} | {operations:.0f} | {special:.0f} | {1e9 * each:.0f} ns | {share:.1%} | {whole:.2f} s | "
              f"{whole / each / n:.0f} |", flush=True)  # fmt: skip


STUDIES = {f.__name__: f for f in (optimum, nodes, settings, tokens, dimension, devices, flops)}


def main() -> None:
    import jax

    jax.config.update("jax_enable_x64", True)
    if sys.argv[1:2] == ["--devices"]:
        print(json.dumps(_on_devices(int(sys.argv[2]))))
        return
    print(f"{machine()}\n")
    curves = False
    for name in sys.argv[1:] or STUDIES:
        curve = name not in ("optimum", "flops")
        if curve and not curves:
            print("| cost against | x | seconds | power of x |\n|---|---|---|---|")
        curves = curve
        STUDIES[name]()
        if not curve:
            print()


if __name__ == "__main__":
    main()
