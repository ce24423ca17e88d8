"""Across the line of instability: is everything continuous, and are gradients those of the curves that one sees?

    python benchmarks/seam.py

prints, along the label noise of a softmax setting that leaves the replica-symmetric phase (T = 3, and T = 2), E', o_w
and phi with their error bars, and elasticities d log E'/d log Delta and d log Q/d log Delta: implicit derivatives
beside central differences over the neighbours, 4 per cent away.
"""

from __future__ import annotations

import argparse
from typing import Any

import jax
import numpy as np

jax.config.update("jax_enable_x64", True)

import lorastate as ls  # noqa: E402

FIELD, RATIO = "pretraining.delta", 1.04
SETTINGS = {
    "T = 3": ({"alpha": 0.1, "lam": 0.01, "delta": 0.8, "tokens": 3}, {"alpha": 3.0, "lam": 0.05}),
    "T = 2": ({"alpha": 0.3, "lam": 0.05, "delta": 0.4, "tokens": 2}, {"alpha": 4.0, "lam": 0.5}),
}


def row(setting: ls.Setting) -> dict[str, Any]:
    found = ls.predict(setting)
    error, slopes = ls.gradient(setting)
    values, bars = found.finetuning, found.errors["finetuning"]
    out: dict[str, float | str] = {"symmetry": found.symmetry, "replicon": float(values["replicon"])}
    for name in ("test_error", "overlap", "free_energy"):
        out |= {name: float(values[name]), f"{name}_error": float(bars[name])}
    x = float(ls.get(setting, FIELD))
    out["slope"] = float(slopes[FIELD]) * x / float(error)
    out["Q"], out["Q_slope"] = float(found.pretraining["Q"]), _map_slope(setting, x)
    return out


def _map_slope(setting: ls.Setting, x: float) -> float:
    """d log Q / d log Delta."""

    def log_q(delta):
        return jax.numpy.log(ls.pretrain(ls.replace(setting, FIELD, delta).pretraining, setting.numerics).values["Q"])

    return float(jax.grad(log_q)(x)) * x


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--points", type=int, default=4, help="on either side of the line")
    options = parser.parse_args()
    for title, (pre, fine) in SETTINGS.items():
        setting = ls.Setting(ls.Pretraining(**pre), ls.Finetuning(**fine))
        line = float(ls.instability_threshold(setting, FIELD, 0.1, 3.0))
        print(f"\n{title}: symmetry breaks at Delta = {line:.4f}\n", flush=True)
        print("| Delta | phase | E' | o_w | phi | derivative | difference | of log Q | difference |")
        print("|---" * 9 + "|", flush=True)
        xs = line * RATIO ** (np.arange(-options.points, options.points + 1) + 0.5)
        rows = [row(ls.replace(setting, FIELD, float(x))) for x in xs]
        for k, x in enumerate(xs):
            cells = [f"{x:.4f}", "symmetric" if rows[k]["symmetry"] == "replica symmetric" else "broken"]
            for name in ("test_error", "overlap", "free_energy"):
                cells.append(f"{rows[k][name]:.5f}({rows[k][f'{name}_error']:.5f})")
            inside = 0 < k < len(xs) - 1
            for name, slope in (("test_error", "slope"), ("Q", "Q_slope")):
                gap = np.log(rows[k + 1][name] / rows[k - 1][name]) / (2 * np.log(RATIO)) if inside else np.nan
                cells += [f"{rows[k][slope]:.4f}", f"{gap:.4f}" if inside else ""]
            print("| " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
