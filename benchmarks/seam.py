"""Across the line of instability: is everything continuous, and are gradients those of the curves that one sees?

    python benchmarks/seam.py

prints, along the label noise of a softmax setting that leaves the replica-symmetric phase (T = 3, and T = 2), E', o_w
and phi with their error bars, and elasticities d log E'/d log Delta and d log Q/d log Delta: implicit derivatives
beside central differences over the neighbours, 4 per cent away.

    python benchmarks/seam.py --gradients

prints elasticities of E' in two glasses beside central differences with steps of 4 per cent, mean over three seeds.
"""

from __future__ import annotations

import argparse
import warnings
from typing import Any

import jax
import numpy as np

jax.config.update("jax_enable_x64", True)

from broken import SETTINGS as BROKEN  # noqa: E402

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


#: Two glasses, and the fields in which E' is differentiated there.
GLASSES = ("A", "figure 1 right")
FIELDS = ("pretraining.lam", "pretraining.delta", "finetuning.lam", "finetuning.alpha")


def elasticities() -> None:
    print("| |" + " | ".join(FIELDS) + " |\n" + "|---" * (1 + len(FIELDS)) + "|")
    for name in GLASSES:
        pre, fine = BROKEN[name]
        found = {"derivative": [], "difference": []}
        for seed in range(3):
            setting = ls.Setting(ls.Pretraining(**pre), ls.Finetuning(**fine), ls.Numerics(seed=seed))
            error, slopes = ls.gradient(setting)
            at = {path: float(ls.get(setting, path)) for path in FIELDS}
            found["derivative"].append([slopes[path] * x / error for path, x in at.items()])
            found["difference"].append([_difference(setting, path, x) for path, x in at.items()])
        for kind, rows in found.items():
            mean, bar = np.mean(rows, 0), np.std(rows, 0, ddof=1) / np.sqrt(len(rows))
            cells = (f"{m:.4f}({b:.4f})" for m, b in zip(mean, bar, strict=True))
            print(f"| {name}, {kind} | " + " | ".join(cells) + " |", flush=True)


def _difference(setting: ls.Setting, path: str, x: float) -> float:
    low, high = (float(ls.predict(ls.replace(setting, path, x * f)).test_error) for f in (1 / RATIO, RATIO))
    return float(np.log(high / low)) / (2 * np.log(RATIO))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--points", type=int, default=4, help="on either side of the line")
    parser.add_argument("--gradients", action="store_true", help="elasticities in two glasses")
    options = parser.parse_args()
    if options.gradients:
        warnings.simplefilter("ignore", ls.SlopeWarning)
        elasticities()
        return
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
