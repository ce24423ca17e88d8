"""Settings of every kind, each verified: theory beside training extrapolated in D.

    python benchmarks/evidence.py --out evidence [NAME ...]

writes evidence/NAME/ as `lorastate verify` does (stopped at any moment, the same command goes on) and prints a row of
docs/evidence.md for each: verdict, median error bar of what training knows, farthest quantity, E' both ways. With
`--draw PICTURE` all gaps of what is in evidence/ are drawn.
"""

from __future__ import annotations

import argparse
import json
import re
import time
from pathlib import Path
from typing import Any

SOFT: dict[str, Any] = {"alpha": 0.1, "lam": 0.01, "delta": 0.5, "tokens": 3}
FLAT: dict[str, Any] = {"alpha": 0.1, "lam": 0.1, "delta": 0.5, "tokens": 3, "activation": "identity"}
USUAL: dict[str, Any] = {"alpha": 3.0, "lam": 0.1}

#: Pre-training and fine-tuning of each row.
SETTINGS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "softmax": (SOFT, {"alpha": 3.0, "lam": 0.05}),
    "identity": (FLAT, {"alpha": 3.0, "lam": 0.5}),
    "softmax, T = 2": ({"alpha": 0.2, "lam": 0.05, "delta": 0.3, "tokens": 2}, {"alpha": 4.0, "lam": 0.3}),
    "identity, T = 2": ({**FLAT, "alpha": 0.3, "tokens": 2}, {"alpha": 4.0, "lam": 0.5}),
    "softmax, T = 4": ({**SOFT, "alpha": 0.08, "tokens": 4}, {"alpha": 2.0, "lam": 0.1}),
    "identity, T = 4": ({**FLAT, "alpha": 0.06, "tokens": 4}, {"alpha": 2.0, "lam": 0.5}),
    "softmax, beta = 2": ({**SOFT, "beta": 2.0}, USUAL),
    "weak ridge": ({**SOFT, "alpha": 0.3, "lam": 0.0003}, USUAL),
    "narrow teacher": ({**SOFT, "kappa0": 0.2, "alpha": 0.06}, USUAL),
    "power law": (
        {**SOFT, "base": {"law": "power_law", "exponent": 1.0, "low": 0.1, "high": 3.0}, "kappa": 1.5}, USUAL,
    ),
    "atoms": (
        {**FLAT, "base": {"law": "atoms", "weights": [0.3, 0.7], "values": [1.5, 0.2]}, "kappa": 1.5},
        {"alpha": 3.0, "lam": 0.5},
    ),
    "another task": ({**SOFT, "task": {"a": 0.8, "c": 0.6, "kappa_perp": 1.0}}, USUAL),
    "reused": (SOFT, {**USUAL, "lam": 0.2, "inputs": "reused"}),
    "reused, fresh noise": (FLAT, {"alpha": 2.0, "lam": 0.5, "inputs": "reused", "label_noise": "fresh"}),
    "mixed": (SOFT, {**USUAL, "lam": 0.2, "inputs": "mixed", "reused_fraction": 0.5}),
    "selected": (SOFT, {"lam": 0.2, "inputs": "selected", "rho": 0.03, "pool": 100.0}),
    "recalibrated": (SOFT, {**USUAL, "lam": 0.2, "recalibration": "noise"}),
    "rank 2": ({**SOFT, "lam": 0.02}, {"alpha": 3.0, "lam": 0.3, "rank": 2, "teacher_rank": 2}),
    "spare direction": ({**FLAT, "delta": 1.0}, {"alpha": 3.0, "lam": 0.3, "rank": 2}),
    "one rank short": (FLAT, {"alpha": 3.0, "lam": 0.3, "teacher_rank": 2}),
    "near weak recovery": (FLAT, {"alpha": 0.35, "lam": 0.5}),
    "figure 1 right (glass)": ({**SOFT, "delta": 2.0}, {"alpha": 3.0, "lam": 0.05}),
    "everyday (glass)": (
        {"alpha": 0.14, "lam": 0.015, "kappa0": 0.8, "delta": 0.7, "tokens": 2}, {"alpha": 2.6, "lam": 0.12},
    ),
    "T = 4 (glass)": ({"alpha": 0.05, "lam": 0.005, "delta": 2.5, "tokens": 4}, {"alpha": 2.0, "lam": 0.03}),
    "identity, T = 2 (glass)": (
        {"alpha": 0.1, "lam": 0.05, "delta": 1.0, "tokens": 2, "activation": "identity"}, {"alpha": 1.2, "lam": 0.3},
    ),
    "recalibrated (glass)": (
        {"alpha": 0.06, "lam": 0.002, "delta": 2.0, "tokens": 2},
        {"alpha": 5.0, "lam": 0.1, "recalibration": "noise"},
    ),
}  # fmt: skip


def setting(name: str):
    """The `Setting` of a row."""
    import lorastate as ls

    pre, fine = SETTINGS[name]
    return ls.setting_from_dict({"pretraining": pre, "finetuning": fine})


def row(name: str, found, seconds: float) -> str:
    """One line of the table."""
    judged = [r for r in found.rows if r.verdict in ("agrees", "differs")]
    known = sorted(r.law.limit_error / abs(r.theory) for r in judged if r.theory)
    worst = max(judged, key=lambda r: abs(r.gap))

    def error(way: str) -> str:
        for r in found.rows:
            if (r.way, r.stage, r.name) == (way, "finetuning", "test_error"):
                return f"{r.law.limit:.4f}({r.law.limit_error:.4f})"
        return ""

    theory, bar = found.solution.test_error, found.solution.stderr("finetuning", "test_error")
    farthest = f"{worst.name}, {worst.way}: {worst.gap:+.1f}, {100 * worst.share:+.1f} %"
    cells = [name, "glass" if found.solution.finetuning["broken"] else "symmetric", f"{theory:.4f}({bar:.4f})"]
    cells += [error("whole"), error("alone"), f"{100 * known[len(known) // 2]:.1f} %", farthest]
    cells += ["stands" if found.stands else "differs", f"{seconds:.0f} s"]
    return "| " + " | ".join(cells) + " |"


def folder(out: Path, name: str) -> Path:
    return out / re.sub(r"[ ,()=.]+", "_", name).strip("_")


def draw(out: Path, picture: Path) -> None:
    """All gaps of all rows that are there, in standard errors: by row, and their distribution beside a normal one."""
    import numpy as np
    from matplotlib.figure import Figure

    files = {name: folder(out, name) / "verify.json" for name in SETTINGS}
    known = {name: json.loads(file.read_text())["rows"] for name, file in files.items() if file.exists()}
    figure = Figure(figsize=(10.5, 0.24 * len(known) + 1.4), layout="constrained")
    by_row, spread = figure.subplots(1, 2, width_ratios=(1.7, 1))
    gaps: dict[str, list[float]] = {"whole": [], "alone": []}
    for place, rows in enumerate(known.values()):
        for way, shift, colour in (("whole", 0.15, "C0"), ("alone", -0.15, "C3")):
            z = [r["gap"] for r in rows if r["way"] == way and r["verdict"] in ("agrees", "differs")]
            gaps[way] += z
            label = {"whole": "both stages trained", "alone": "fine-tuning alone"}[way] if place == 0 else None
            by_row.plot(z, np.full(len(z), -place + shift), ".", ms=5, alpha=0.6, color=colour, label=label)
    by_row.axvspan(-2, 2, color="0.93", zorder=0)
    by_row.set_yticks(-np.arange(len(known)), list(known), fontsize=7)
    by_row.set(xlabel="trained and extrapolated less predicted, in standard errors", ylim=(-len(known), 1))
    by_row.legend(fontsize=7, loc="upper left")
    z, x = np.array(gaps["whole"] + gaps["alone"]), np.linspace(-5, 5, 200)
    spread.hist(z, np.arange(-5, 5.1, 0.5), density=True, color="0.75", label=f"{len(z)} comparisons")
    spread.plot(x, np.exp(-(x**2) / 2) / np.sqrt(2 * np.pi), "k", label="normal")
    spread.set(xlabel="standard errors", ylabel="density")
    spread.legend(fontsize=7)
    figure.savefig(picture, dpi=110)
    far = [np.mean(np.abs(z) > k) for k in (1, 2, 3)]
    print(f"{len(known)} rows, {len(z)} comparisons, beyond 1, 2, 3: " + ", ".join(f"{share:.3f}" for share in far))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=list(SETTINGS), help=f"rows: {', '.join(SETTINGS)}")
    parser.add_argument("--out", type=Path, default=Path("evidence"))
    parser.add_argument("--dimensions", type=int, nargs="+", default=[40, 80, 120])
    parser.add_argument("--alone", type=int, nargs="+", default=[100, 200, 400])
    parser.add_argument("--runs", type=int, default=4)
    parser.add_argument("--draw", type=Path, help="only draw all gaps of the rows in OUT, as this picture")
    options = parser.parse_args()
    if unknown := set(options.names) - set(SETTINGS):
        parser.error(f"unknown rows: {', '.join(sorted(unknown))}; allowed: {', '.join(SETTINGS)}")
    if options.draw:
        return draw(options.out, options.draw)
    import jax

    jax.config.update("jax_enable_x64", True)
    import lorastate as ls
    from lorastate.cli.output import write_json
    from lorastate.figures import verification

    print("| setting | phase | E' | whole | alone | known to | farthest | verdict | time |\n|---" + "|---" * 8 + "|")
    for name in options.names:
        out, began = folder(options.out, name), time.time()
        try:
            found = ls.verify(
                setting(name), out=out, dimensions=options.dimensions, alone=options.alone, runs=options.runs,
                moves=20, progress=True,
            )  # fmt: skip
        except (ls.SolveError, ls.SettingError) as error:
            print(f"| {name} | {error} |", flush=True)
            continue
        write_json(out / "verify.json", found.summary())
        verification(found, out)
        print(row(name, found, time.time() - began), flush=True)
        jax.clear_caches()  # every D has programs of its own


if __name__ == "__main__":
    main()
