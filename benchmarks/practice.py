"""Twenty simulated layers whose truth is known, assessed as a user would:  python benchmarks/practice.py OUT [SECONDS]

Each layer is pre-trained at D = 100 in a world of `lorastate.simulation`: four kinds (both activations, T = 2 and 3),
five settings of ridges and noise a kind. From the trained S, 300 labelled examples and a pool of 1000 inputs `assess`
estimates Delta_eff, b, the strength of the update and E'. Truth: the same from S and the teacher themselves; for E' the
theory at the true moments, and the LoRA trained on the same examples. What is done is kept in OUT; SECONDS ends a run
early.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import lorastate as ls
from lorastate.practice.forecast import Lora, equivalent
from lorastate.practice.labels import Moments
from lorastate.simulation.samples import draw_batch, lora_update, stream
from lorastate.simulation.worlds import BATCHES

jax.config.update("jax_enable_x64", True)

D, EXAMPLES, POOL, NUMERICS = 100, 300, 1000, ls.Numerics(1024, 8192)
#: Activation, T, alpha of pre-training.
KINDS = (("identity", 3, 0.1), ("softmax", 3, 0.1), ("identity", 2, 0.2), ("softmax", 2, 0.2))


def settings() -> list[ls.Setting]:
    """Twenty settings: log-uniform ridges and noise, the same seed for whoever runs this."""
    rng, found = np.random.default_rng(0), []
    for activation, tokens, alpha in KINDS:
        for _ in range(5):
            lam = np.exp(rng.uniform(*np.log([0.02, 0.3] if activation == "identity" else [0.003, 0.03])))
            noise, ridge = rng.uniform(0.1, 1.0), np.exp(rng.uniform(*np.log([0.05, 0.5])))
            pre = ls.Pretraining(alpha, lam, delta=noise, activation=activation, tokens=tokens)
            found.append(ls.Setting(pre, ls.Finetuning(EXAMPLES / D, ridge), NUMERICS))
    return found


def one(setting: ls.Setting, seed: int) -> dict:
    """Estimates, their standard errors and truths of one layer."""
    memory: dict = {}
    trained = ls.simulate(setting, dimension=D, runs=1, seed=seed, memory=memory)
    ((world, *_),) = memory.values()
    fine = setting.finetuning_resolved
    teacher = jax.random.normal(stream(world.key, "lora_teacher"), (D, 1))
    known = BATCHES[ls.Fresh](world, fine, EXAMPLES)
    key = jax.random.key(seed)
    pool = draw_batch(key, key, world.base, fine.delta, fine.tokens, POOL)
    labels = fine.activation(known.labels + lora_update(known.inputs, teacher))
    if fine.activation.name == "identity":
        labels = labels * fine.tokens
    S, base, lam = np.asarray(world.learned), np.asarray(world.base), float(fine.lam)
    arrays = {"S": S, "X": jnp.concatenate([known.inputs, pool.inputs]), "labels": jnp.moveaxis(labels, -1, 0)}
    found = ls.assess(arrays, activation=fine.activation.name, ridge=lam, numerics=NUMERICS, draws=12)
    size = float(fine.delta) / 2 + np.sum(base**2) / D
    true = Moments(size, np.sum(S * base) / D, np.sum(S**2) / D, float(jnp.sum(teacher**2)) / D)
    lora = Lora(D, EXAMPLES, lam, 1, 1)
    setup = equivalent(true, lora, fine.activation, fine.tokens, {"inputs": "fresh"}, 1.0, NUMERICS)
    unit = true.strength**2 if fine.activation.name == "identity" else 1.0
    rows = {
        "Delta_eff": (*found.effective_noise, true.effective_noise()),
        "Delta_eff at b": (*found.least_noise, true.effective_noise(true.best_scale)),
        "b": (*found.best_scale, true.best_scale),
        "strength": (*found.strength, true.strength),
    }
    first = found.forecasts[0] if found.forecasts else None
    if first is not None:
        rows["E'"] = (first.test_error, first.stderr, unit * float(ls.predict(setup).test_error))
        rows["E' trained"] = (first.test_error, first.stderr, float(trained.finetuning["test_error"][0]))
        rows["frozen error"] = (first.frozen, found.frozen_error[1], found.frozen_error[0])
    kind = f"{fine.activation.name}, T = {fine.tokens}"
    return {"kind": kind, "law": found.law.verdict, "why": found.no_forecast, "rows": rows}


def report(done: list[dict]) -> None:
    """Each estimate against its truth, and how often it is within one and two standard errors."""
    for name in ("Delta_eff", "Delta_eff at b", "b", "strength", "E'", "E' trained", "frozen error"):
        rows = np.array([d["rows"][name] for d in done if name in d["rows"]])
        z = (rows[:, 0] - rows[:, 2]) / rows[:, 1]
        off = np.abs(rows[:, 0] / rows[:, 2] - 1)
        inside = ", ".join(f"{np.sum(np.abs(z) < k)} within {k}" for k in (1, 2, 3))
        print(f"{name:15s} {len(z)} layers: {inside} s.e.; z mean {z.mean():+.2f}, rms {np.sqrt(np.mean(z**2)):.2f}; "
              f"typical error {100 * np.median(off):.1f} %")  # fmt: skip
    print("law:", {v: sum(d["law"] == v for d in done) for v in ("Gaussian", "nearly Gaussian", "not Gaussian")})
    for d in done:
        print(d["kind"], {k: [round(float(x), 3) for x in v] for k, v in d["rows"].items()}, d["why"])


def main(words: list[str]) -> int:
    out, limit, began = Path(words[0]), float(words[1]) if len(words) > 1 else np.inf, time.perf_counter()
    done = json.loads(out.read_text()) if out.exists() else []
    for k, setting in list(enumerate(settings()))[len(done) :]:
        if time.perf_counter() - began > limit:
            break
        start = time.perf_counter()
        done.append(one(setting, k))
        out.write_text(json.dumps(done))
        print(f"layer {k}: {time.perf_counter() - start:.0f} s", flush=True)
    report(done)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
