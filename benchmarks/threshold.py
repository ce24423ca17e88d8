"""Weak recovery against training at several D: `python benchmarks/threshold.py` prints a Markdown table.

Identity, T = 3, lambda = 0.1, lambda' = 0.5. Rows are alpha' around the predicted alpha'_c; entries are the overlap
o_w of the lowest of ten descents, mean over runs (standard error). Below alpha'_c the theory says 0 and training must
fall towards it as D grows; above, it must stay.
"""

from __future__ import annotations

import argparse


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dimensions", default="60,120,240")
    parser.add_argument("--runs", type=int, default=8, help="runs at the largest D; more at smaller ones")
    options = parser.parse_args()
    import jax

    jax.config.update("jax_enable_x64", True)
    import lorastate as ls
    from lorastate.diagnosis.thresholds import weak_recovery_threshold

    dimensions = [int(d) for d in options.dimensions.split(",")]
    setting = ls.Setting(ls.Pretraining(0.1, 0.1, activation="identity"), ls.Finetuning(1.0, 0.5))
    threshold = weak_recovery_threshold(setting)
    print(f"alpha'_c = {threshold:.4f}\n")
    print("| alpha' / alpha'_c | theory | " + " | ".join(f"D = {d}" for d in dimensions) + " |")
    print("|---" * (len(dimensions) + 2) + "|", flush=True)
    memory: dict = {}
    for factor in (0.4, 0.7, 1.2, 1.5, 2.0, 2.6):
        at = ls.replace(setting, "finetuning.alpha", factor * threshold)
        overlap = ls.predict(at, throw=False).finetuning["overlap"]
        cells = []
        for d in dimensions:
            runs = options.runs * max(dimensions) // d
            found = ls.simulate(at, dimension=d, runs=runs, starts=10, memory=memory)
            cells.append(
                "{:.3f}({:.3f})".format(*(f("finetuning", "overlap", True) for f in (found.mean, found.stderr)))
            )
        print(f"| {factor} | {abs(float(overlap)):.3f} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
