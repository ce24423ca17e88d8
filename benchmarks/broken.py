"""Settings where replica symmetry is broken: the theory beside training on the asymptotic channel. `python
benchmarks/broken.py` prints a Markdown table and writes broken.json.

Every number is of the lowest minimum that a search has found in each run, mean (standard error): descents from w* and
near it (informed), from random starts (random), and perturb-and-descend moves from the lowest random one (deep from
random) and from the lowest of all (lowest). `python benchmarks/broken.py A C --dimension 600 --runs 8`.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

#: Pre-training and fine-tuning of each. kappa plays no part in most but must be wide enough.
SETTINGS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "figure 1 right": (
        {"alpha": 0.1, "lam": 0.01, "delta": 2.0, "tokens": 3},
        {"alpha": 3.0, "lam": 0.05},
    ),
    "A": (
        {"alpha": 0.0422750, "lam": 0.00175652, "kappa0": 1.43304, "kappa": 1.5, "delta": 2.58385, "tokens": 2},
        {"alpha": 6.48606, "lam": 0.175731},
    ),
    "B": (
        {"alpha": 0.0584292, "lam": 0.00105021, "kappa0": 0.884608, "kappa": 1.5, "delta": 2.15973, "tokens": 2},
        {"alpha": 5.61813, "lam": 0.0732463},
    ),
    "C": (
        {"alpha": 0.595088, "lam": 0.0787781, "kappa0": 1.29212, "kappa": 1.5, "delta": 1.02538, "tokens": 2},
        {"alpha": 2.01866, "lam": 0.0493883},
    ),
    "everyday": ({"alpha": 0.14, "lam": 0.015, "kappa0": 0.8, "delta": 0.7, "tokens": 2}, {"alpha": 2.6, "lam": 0.12}),
    "published": (
        {"alpha": 0.0570866, "lam": 0.01, "kappa0": 0.5, "delta": 0.5, "tokens": 2},
        {"alpha": 3.0, "lam": 0.1},
    ),
    "identity T=3": (
        {
            "alpha": 0.086469,
            "lam": 0.0056193,
            "kappa0": 0.915230,
            "kappa": 1.5,
            "delta": 2.794392,
            "tokens": 3,
            "activation": "identity",
        },
        {"alpha": 0.620366, "lam": 0.364091},
    ),
    "identity T=2": (
        {"alpha": 0.1, "lam": 0.05, "delta": 1.0, "tokens": 2, "activation": "identity"},
        {"alpha": 1.2, "lam": 0.3},
    ),
    "T=4": ({"alpha": 0.05, "lam": 0.005, "delta": 2.5, "tokens": 4}, {"alpha": 2.0, "lam": 0.03}),
    "identity T=4": (
        {"alpha": 0.05, "lam": 0.02, "delta": 2.5, "tokens": 4, "activation": "identity"},
        {"alpha": 0.5, "lam": 0.3},
    ),
    "T=3 few samples": ({"alpha": 0.1, "lam": 0.02, "delta": 1.0, "tokens": 3}, {"alpha": 1.0, "lam": 0.1}),
    "reused": (
        {"alpha": 0.1, "lam": 0.05, "delta": 2.0, "kappa0": 0.5, "tokens": 2},
        {"alpha": 3.0, "lam": 0.05, "inputs": "reused"},
    ),
    "selected": (
        {"alpha": 0.1, "lam": 0.005, "delta": 2.0, "tokens": 2},
        {"lam": 0.1, "inputs": "selected", "rho": 0.03, "pool": 100.0},
    ),
    "recalibrated": (
        {"alpha": 0.06, "lam": 0.002, "delta": 2.0, "tokens": 2},
        {"alpha": 5.0, "lam": 0.1, "recalibration": "noise"},
    ),
    "r=2, r*=1": ({"alpha": 0.1, "lam": 0.02, "tokens": 3}, {"alpha": 3.0, "lam": 0.3, "rank": 2}),
    "identity r=2, r*=1": (
        {"alpha": 0.1, "lam": 0.1, "tokens": 3, "activation": "identity"},
        {"alpha": 3.0, "lam": 0.3, "rank": 2},
    ),
    # Where replica symmetry holds.
    "smooth": ({"alpha": 0.1, "lam": 0.01, "delta": 0.5, "tokens": 3}, {"alpha": 3.0, "lam": 0.05}),
}
NAMES = ("train_loss", "overlap", "test_error", "m", "q")


def setting(name: str):
    """The `Setting` of a row."""
    import lorastate as ls

    pre, fine = SETTINGS[name]
    return ls.Setting(ls.Pretraining(**pre), ls.Finetuning(**fine), ls.Numerics(replicas=8))


def reference(
    name: str, dimension: int, runs: int, seed: int = 0, starts: int = 6, moves: int = 60, progress: bool = False
) -> dict[str, Any]:
    """What training finds in a setting: {"searches": {search: {name: {"mean", "stderr"}}}, ...}, plain numbers."""
    import lorastate as ls

    began = time.perf_counter()
    found = ls.simulate(
        setting(name), stage="finetuning", dimension=dimension, runs=runs, seed=seed, starts=starts, moves=moves,
        progress=progress,
    )  # fmt: skip
    summary = found.summary(only_converged=True)
    theory = ls.predict(setting(name), throw=False)
    names = ("free_energy", "overlap", "test_error", "p", "q")
    return {
        "theory": {n: [float(theory.finetuning[n]), theory.stderr("finetuning", n)] for n in names},
        "symmetry": theory.symmetry, "code": theory.code("finetuning").name,
        "name": name, "dimension": dimension, "runs": runs, "seed": seed, "starts": starts, "moves": moves,
        "M": float(found.map.values["M"]), "Q": float(found.map.values["Q"]),
        "searches": {search: {n: rows[n] for n in NAMES} for search, rows in summary.items()},
        "lowest_loss": found.lowest["train_loss"].tolist(), "lowest_overlap": found.lowest["overlap"].tolist(),
        "random_loss": found.random_loss.tolist(), "random_overlap": found.random_overlap.tolist(),
        "verdict": found.verdict, "seconds": time.perf_counter() - began,
    }  # fmt: skip


def row(found: dict[str, Any]) -> str:
    """One line of the table."""

    def cell(search: str) -> str:
        rows = found["searches"][search]
        pairs = ((rows[n]["mean"], rows[n]["stderr"]) for n in ("train_loss", "overlap", "test_error"))
        return ", ".join(f"{mean:.4f}({bar or 0:.4f})" for mean, bar in pairs)

    known = ", ".join("{:.4f}({:.4f})".format(*found["theory"][n]) for n in ("free_energy", "overlap", "test_error"))
    known += "" if found["code"] == "ok" else f" ({found['code']})"
    cells = [known, *(cell(search) for search in ("informed", "random", "deep"))]
    return f"| {found['name']}, D = {found['dimension']}, {found['runs']} runs | " + " | ".join(cells) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", default=list(SETTINGS), help=f"rows: {', '.join(SETTINGS)}")
    parser.add_argument("--dimension", type=int, nargs="+", default=[300])
    parser.add_argument("--runs", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--starts", type=int, default=6)
    parser.add_argument("--moves", type=int, default=60)
    parser.add_argument("--out", type=Path, default=Path("broken.json"))
    options = parser.parse_args()
    if unknown := set(options.names) - set(SETTINGS):
        parser.error(f"unknown rows: {', '.join(sorted(unknown))}; allowed: {', '.join(SETTINGS)}")
    import jax

    jax.config.update("jax_enable_x64", True)
    print("phi, o_w, E' of the theory and of each search:\n")
    print("| setting | theory | informed | random | lowest |\n|---|---|---|---|---|", flush=True)
    results = []
    for name in options.names:
        for dimension in options.dimension:
            results.append(
                reference(name, dimension, options.runs, options.seed, options.starts, options.moves, progress=True)
            )
            print(row(results[-1]), flush=True)
            # What is finished is on disk, whatever happens next.
            options.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
