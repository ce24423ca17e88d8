"""Every frozen-map channel against training: `python benchmarks/channels.py` prints a Markdown table.

Each cell: theory / mean of the training (standard error), for E', the overlap o_w and q.
"""

from __future__ import annotations

import argparse

CASES = (
    ("softmax", {}),
    ("softmax", {"inputs": "reused"}),
    ("softmax", {"inputs": "reused", "label_noise": "fresh"}),
    ("softmax", {"inputs": "mixed", "reused_fraction": 0.5}),
    ("softmax", {"inputs": "selected", "rho": 0.03, "pool": 100.0}),
    ("softmax", {"inputs": "selected", "rho": 0.03, "pool": 100.0, "score": "without_shift"}),
    ("softmax", {"recalibration": "noise"}),
    ("softmax", {"recalibration": 0.7}),
    ("softmax", {"inputs": "selected", "rho": 0.03, "pool": 100.0, "recalibration": "error"}),
    ("identity", {"inputs": "reused"}),
    ("identity", {"inputs": "reused", "label_noise": "fresh"}),
    ("identity", {"inputs": "mixed", "reused_fraction": 0.5}),
    ("identity", {"inputs": "selected", "rho": 0.03, "pool": 100.0}),
    ("identity", {"recalibration": "noise"}),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dimension", type=int, default=100)
    parser.add_argument("--runs", type=int, default=12)
    options = parser.parse_args()
    import jax

    jax.config.update("jax_enable_x64", True)
    import lorastate as ls

    print("| channel | E' | o_w | q |\n|---|---|---|---|", flush=True)
    memory: dict = {}
    for activation, fine in CASES:
        pre = ls.Pretraining(alpha=0.1, lam=0.01 if activation == "softmax" else 0.1, activation=activation)
        alpha = None if "rho" in fine else 3.0
        setting = ls.Setting(pre, ls.Finetuning(alpha, 0.2, **fine))
        theory = ls.predict(setting)
        found = ls.simulate(setting, dimension=options.dimension, runs=options.runs, memory=memory)
        cells = [
            "{:.4f} / {:.4f}({:.4f})".format(
                float(theory.finetuning[n]), found.mean("finetuning", n), found.stderr("finetuning", n)
            )
            for n in ("test_error", "overlap", "q")
        ]
        label = ", ".join([activation, *(f"{k} {v}" for k, v in fine.items())])
        print(f"| {label} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
