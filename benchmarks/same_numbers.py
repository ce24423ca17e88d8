"""Do the numbers stay what they were? Every prediction of thirty settings, kept and compared.

    python benchmarks/same_numbers.py keep before.json      (on the code before a change)
    python benchmarks/same_numbers.py compare before.json   (after it)

All channels, ranks, tasks, base laws, activations and both phases, on few nodes. What differs by more than 1e-9,
relative to 1 + |value|, is printed; the exit code is then 1.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import jax

jax.config.update("jax_enable_x64", True)

import lorastate as ls  # noqa: E402

NUMERICS = ls.Numerics(nodes=1024, finetuning_nodes=2048, replicas=4)
CHANNELS: dict[str, dict] = {
    "fresh": {},
    "noise": {"delta": 1.5},
    "reused": {"inputs": "reused"},
    "reused, fresh noise": {"inputs": "reused", "label_noise": "fresh"},
    "mixed": {"inputs": "mixed", "reused_fraction": 0.4},
    "selected": {"inputs": "selected", "rho": 0.03, "pool": 100.0},
    "without shift": {"inputs": "selected", "rho": 0.03, "pool": 100.0, "score": "without_shift"},
    "optimal map": {"inputs": "bayes_optimal"},
    "scaled": {"recalibration": 0.7},
    "least noise": {"recalibration": "noise"},
    "rank 2": {"rank": 2, "teacher_rank": 2},
    "spare": {"rank": 2, "teacher_rank": 1},
    "too few": {"rank": 1, "teacher_rank": 2},
}


def settings() -> dict[str, ls.Setting]:
    def make(activation="softmax", alpha=0.1, lam=0.01, fine=(3.0, 0.2), channel=None, **more):
        pre = ls.Pretraining(alpha, lam, **({"kappa": 1.5, "delta": 0.5, "tokens": 3, "activation": activation} | more))
        given = {"lam": fine[1]} | (channel or {}) | ({} if "pool" in (channel or {}) else {"alpha": fine[0]})
        return ls.Setting(pre, ls.Finetuning(**given), NUMERICS)

    out = {f"softmax, {name}": make(channel=channel) for name, channel in CHANNELS.items()}
    for name, channel in CHANNELS.items():
        if name not in ("without shift",):
            out[f"identity, {name}"] = make("identity", lam=0.1, channel=channel)
    out["softmax, T = 2, broken"] = make(alpha=0.06, lam=0.002, kappa=1.5, delta=2.2, tokens=2, fine=(5.6, 0.07))
    out["identity, T = 2, broken"] = make("identity", lam=0.05, delta=1.0, tokens=2, fine=(1.2, 0.3))
    out["softmax, T = 4"] = make(tokens=4)
    out["task"] = make("identity", lam=0.1, task=ls.Task(a=0.6, c=0.4))
    out["power law"] = make("identity", lam=0.1, base=ls.PowerLaw(1.5, 0.1, 10.0))
    return out


def predictions() -> dict[str, dict]:
    out = {}
    for name, setting in settings().items():
        found = ls.predict(setting, throw=False)
        values = {
            f"{stage}.{k}": v for stage in ("pretraining", "finetuning") for k, v in getattr(found, stage).items()
        }
        out[name] = {k: float(v) for k, v in values.items()}
        print(f"{name}: E' {float(found.finetuning['test_error']):.6f}, {found.code('finetuning').name}", flush=True)
    return out


def main() -> int:
    command, path = sys.argv[1], Path(sys.argv[2])
    now = predictions()
    if command == "keep":
        path.write_text(json.dumps(now, indent=0))
        return 0
    before, worst, count = json.loads(path.read_text()), 0.0, 0
    for name, values in before.items():
        for key, old in values.items():
            new = now[name].get(key, float("nan"))
            gap = 0.0 if old != old and new != new else abs(new - old) / (1 + abs(old))
            count, worst = count + 1, max(worst, gap) if gap == gap else float("inf")
            if not gap <= 1e-9:
                print(f"{name}: {key} {old!r} -> {new!r}")
    print(f"{count} predictions of {len(before)} settings, largest difference {worst:.1e}")
    return int(not worst <= 1e-9)


if __name__ == "__main__":
    sys.exit(main())
