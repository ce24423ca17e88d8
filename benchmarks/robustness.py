"""Random settings over the whole space: does each converge, keep all bounds, and is its residual what the solver says?

    python benchmarks/robustness.py --count 10000 --out robustness.jsonl

alpha 1e-3 to 1e2, lambda 1e-4 to 1e2, delta 0 (one in eight) to 1e2, kappa0 0.05 to 5, alpha' 1e-2 to 1e2, lambda'
1e-3 to 1e2 (log-uniform), T 2 to 4 (6 with --tokens 6), beta 0.2 to 10, every channel, ranks, tasks and laws of the
base map. Settings of one kind, which share their programs, follow one another. Stopped at any moment, the same command
goes on; it ends with a report: how many were solved, which codes the others have, and every bound that is broken.
"""

from __future__ import annotations

import argparse
import collections
import json
import math
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

jax.config.update("jax_enable_x64", True)

import lorastate as ls  # noqa: E402
from lorastate.setting.files import setting_from_dict  # noqa: E402

NUMERICS = {"nodes": 2048, "finetuning_nodes": 4096, "replicas": 4}
#: What fine-tuning does with inputs, beside its sample size.
CHANNELS: tuple[dict[str, Any], ...] = (
    {}, {"inputs": "reused"}, {"inputs": "reused", "label_noise": "fresh"}, {"inputs": "mixed"},
    {"inputs": "selected"}, {"recalibration": "noise"}, {"rank": 2}, {"rank": 2, "teacher_rank": 2},
)  # fmt: skip
#: Settings of one kind that are made before the next kind is compiled.
_TOGETHER = 25
#: How far a bound may be passed: in error bars, and beside them.
_BARS, _ROUNDING = 4.0, 1e-6


def random_setting(index: int, most_tokens: int) -> dict[str, Any]:
    """Setting number `index`, as a file has it. Its kind is that of its group."""
    group, rng = np.random.default_rng([1, index // _TOGETHER]), np.random.default_rng([2, index])

    def log(low: float, high: float) -> float:
        return float(np.exp(rng.uniform(np.log(low), np.log(high))))

    tokens, activation = int(group.integers(2, most_tokens + 1)), ("softmax", "identity")[int(group.integers(2))]
    fine: dict[str, Any] = dict(CHANNELS[int(group.integers(len(CHANNELS)))])
    law = ("wishart", "wishart", "task", "atoms", "power_law")[int(group.integers(5))]
    pre: dict[str, Any] = {"alpha": log(1e-3, 1e2), "lam": log(1e-4, 1e2), "delta": log(1e-2, 1e2)}
    pre |= {"kappa0": log(0.05, 5), "tokens": tokens, "activation": activation}
    pre["kappa"] = 1.0 + pre["kappa0"]
    if rng.uniform() < 1 / 8:
        pre["delta"] = 0.0
    if activation == "softmax":
        pre["beta"] = log(0.2, 10)
    if law == "task":
        pre["task"] = {"a": float(rng.uniform(0, 1.5)), "c": log(0.05, 2), "kappa_perp": log(0.1, 3)}
    elif law == "atoms":
        weight = float(rng.uniform(0.05, 0.95))
        pre["base"] = {"law": "atoms", "weights": [weight, 1 - weight], "values": [log(0.1, 3), log(0.01, 1)]}
    elif law == "power_law":
        low = log(0.01, 0.5)
        pre["base"] = {"law": "power_law", "exponent": log(0.3, 3), "low": low, "high": low * log(2, 30)}
    if law in ("atoms", "power_law"):
        del pre["kappa0"]
        pre["kappa"] = 1.5
    fine["lam"] = log(1e-3, 1e2)
    if fine.get("inputs") == "selected":
        fine |= {"rho": log(1e-3, 0.5), "pool": log(3, 300)}
    else:
        fine["alpha"] = log(1e-2, 1e2)
    if fine.get("inputs") == "mixed":
        fine["reused_fraction"] = float(rng.uniform())
    return {"pretraining": pre, "finetuning": fine, "numerics": {**NUMERICS, "seed": index}}


def broken_bounds(setting: ls.Setting, found: ls.Solution) -> list[str]:
    """The bounds that the predictions of a solved setting do not keep, within their error bars."""
    pre, fine, out = found.pretraining, found.finetuning, []

    def at_most(what: str, small: Any, large: Any, *bars: float) -> None:
        room = _BARS * math.hypot(*(b for b in bars if math.isfinite(b)), 0.0)
        if not float(small) <= float(large) + room + _ROUNDING * (1 + abs(float(large))):
            out.append(f"{what}: {float(small):.6g} > {float(large):.6g}")

    def bar(stage: str, name: str) -> float:
        return found.stderr(stage, name)

    Q0 = float(setting.pretraining.Q0)
    at_most("M^2 <= Q Q0", pre["M"] ** 2, pre["Q"] * Q0, 2 * float(pre["M"]) * bar("pretraining", "M"))
    if float(pre["Q"]) > 0:  # a student that is zero has none
        at_most("O_W <= 1", pre["overlap"], 1.0, bar("pretraining", "overlap"))
    at_most("0 <= rank <= 1", pre["rank_fraction"], 1.0)
    at_most("L - penalty <= L", pre["train_error"], pre["train_loss"])
    at_most("m^2 <= q", fine["m"] ** 2, fine["q"], 2 * abs(float(fine["m"])) * bar("finetuning", "m"))
    at_most("p <= q", fine["p"], fine["q"], bar("finetuning", "p"))
    if math.isfinite(float(fine["overlap"])):
        at_most("o_w <= 1", abs(fine["overlap"]), 1.0, bar("finetuning", "overlap"))
    at_most("L' - penalty <= L'", fine["train_error"], fine["train_loss"])
    at_most("L' <= L' at w = 0", fine["train_loss"], _at_zero(setting, found), bar("finetuning", "train_loss"))
    spectrum = found.spectrum
    second, share = float(spectrum.moment2), 1 - float(spectrum.atom)
    at_most("moment of the spectrum is Q", abs(second - float(pre["Q"])), 1e-4 * second, bar("pretraining", "Q"))
    rank = float(pre["rank_fraction"])
    at_most("atom of the spectrum", abs(share - rank), 1e-6, bar("pretraining", "rank_fraction"))
    return out


def _at_zero(setting: ls.Setting, found: ls.Solution) -> float:
    """The loss per D of no update at all: alpha' times the error on training inputs, known for fresh ones only."""
    fine: Any = setting.finetuning_resolved
    fresh = type(fine.inputs) is ls.Fresh
    return float(fine.alpha) * float(found.finetuning["test_error_frozen"]) * 1.02 if fresh else math.inf


def one(index: int, most_tokens: int) -> dict[str, Any]:
    """The row of a setting: codes, seconds, phase, and what is wrong with it."""
    given = random_setting(index, most_tokens)
    began = time.perf_counter()
    row: dict[str, Any] = {"index": index, "setting": given}
    try:
        setting = setting_from_dict(given)
        found = ls.predict(setting, throw=False)
    except (ls.SettingError, ls.SolveError) as error:
        return {**row, "refused": str(error)}
    codes = [found.code(stage).name for stage in ("pretraining", "finetuning")]
    row |= {"codes": codes, "seconds": time.perf_counter() - began, "symmetry": found.symmetry}
    row["test_error"] = float(found.test_error)
    row["stderr"] = found.stderr("finetuning", "test_error")
    row["wrong"] = broken_bounds(setting, found) if codes == ["ok", "ok"] else []
    return row


def report(rows: list[dict[str, Any]]) -> None:
    solved = [row for row in rows if row.get("codes") == ["ok", "ok"]]
    refused = [row for row in rows if "refused" in row]
    tried = len(rows) - len(refused)
    print(f"\n{len(rows)} settings, {len(refused)} refused, {len(solved)} of {tried} solved")
    codes = collections.Counter(" ".join(row["codes"]) for row in rows if "codes" in row and row not in solved)
    for code, count in codes.most_common():
        print(f"  {code}: {count}, such as {[r['index'] for r in rows if ' '.join(r.get('codes', [])) == code][:8]}")
    for row in solved:
        for what in row["wrong"]:
            print(f"  {row['index']}: {what}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--tokens", type=int, default=4, help="the most tokens")
    parser.add_argument("--out", type=Path, default=Path("robustness.jsonl"))
    options = parser.parse_args()
    rows = [json.loads(line) for line in options.out.read_text().splitlines()] if options.out.exists() else []
    done = {row["index"] for row in rows}
    with options.out.open("a") as file:
        for index in range(options.count):
            if index in done:
                continue
            rows.append(one(index, options.tokens))
            file.write(json.dumps(rows[-1]) + "\n")
            file.flush()
            last = rows[-1]
            print(index, last.get("codes", last.get("refused")), last.get("wrong", ""), flush=True)
            if (index + 1) % _TOGETHER == 0:
                jax.clear_caches()  # the programs of a kind that is done
    report(rows)


if __name__ == "__main__":
    main()
