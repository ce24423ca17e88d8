"""Theory against training at several D, both activations: `python benchmarks/finite_size.py` prints a Markdown table.

Each entry is the relative deviation of the training's mean from the theory, in per cent, with its standard error. What
is left beyond the standard error is the bias of finite D, which falls as D grows.
"""

from __future__ import annotations

import argparse
import math

ROWS = (
    ("pretraining", "M"), ("pretraining", "Q"), ("pretraining", "overlap"), ("pretraining", "train_loss"),
    ("pretraining", "test_error"), ("finetuning", "m"), ("finetuning", "q"), ("finetuning", "overlap"),
    ("finetuning", "train_loss"), ("finetuning", "test_error"),
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dimensions", default="75,150")
    parser.add_argument("--runs", type=int, default=8, help="runs at the largest D; more at smaller ones")
    options = parser.parse_args()
    import jax

    jax.config.update("jax_enable_x64", True)
    import lorastate as ls

    dimensions = [int(d) for d in options.dimensions.split(",")]
    columns = [(name, D) for name in ("softmax", "identity") for D in dimensions]
    table: dict[tuple[str, str], list[str]] = {row: [] for row in ROWS}
    for name in ("softmax", "identity"):
        setting = ls.load_setting(f"examples/{name}.toml")
        theory = ls.predict(setting)
        for D in dimensions:
            runs = options.runs * max(dimensions) // D
            found = ls.simulate(setting, dimension=D, runs=runs, progress=True)
            for stage, quantity in ROWS:
                value = float(getattr(theory, stage)[quantity])
                mean, bar = found.mean(stage, quantity), found.stderr(stage, quantity)
                bar = math.hypot(bar, theory.stderr(stage, quantity)) / abs(value)
                table[stage, quantity].append(f"{100 * (mean / value - 1):+.1f} +- {100 * bar:.1f}")
    print("| quantity | " + " | ".join(f"{name}, D = {D}" for name, D in columns) + " |")
    print("|---" * (len(columns) + 1) + "|")
    for (stage, quantity), cells in table.items():
        print(f"| {stage} {quantity} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
