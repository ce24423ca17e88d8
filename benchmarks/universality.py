"""Tokens and noise that are not Gaussian: where the theory, which is derived for Gaussian ones, holds and where not.

    python benchmarks/universality.py --out universality.json

Trains both stages on tokens of other laws with mean zero and variance one, and on labels whose noise has another law,
at the same sizes as Gaussian ones, and prints each mean over runs beside the theory. "turned": the same tokens, each
multiplied by one random orthogonal matrix. "digits": rows of scikit-learn's images of handwritten digits, whitened in
the 40 directions in which they vary most (D = 40). Stopped at any moment, the same command goes on.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

jax.config.update("jax_enable_x64", True)

import lorastate as ls  # noqa: E402

NAMES = (("pretraining", "M"), ("pretraining", "Q"), ("pretraining", "test_error"), ("finetuning", "overlap"),
         ("finetuning", "test_error"))  # fmt: skip


# ---- laws of one number, mean zero and variance one --------------------------------------------------------------


def signs(key, shape):
    return jax.random.rademacher(key, shape, dtype=float)


def uniform(key, shape):
    return jax.random.uniform(key, shape, minval=-np.sqrt(3), maxval=np.sqrt(3))


def sparse(key, shape):
    """Nine of ten are zero, the others Gaussian: kurtosis 30."""
    keys = jax.random.split(key)
    return jax.random.bernoulli(keys[0], 0.1, shape) * jax.random.normal(keys[1], shape) * np.sqrt(10)


def heavy(key, shape):
    """Student's t with five degrees of freedom: kurtosis 9."""
    return jax.random.t(key, 5.0, shape) * np.sqrt(3 / 5)


# ---- tokens ------------------------------------------------------------------------------------------------------


@functools.cache
def _frame(dimension: int) -> np.ndarray:
    return np.linalg.qr(np.random.default_rng(7).standard_normal((dimension, dimension)))[0]


def turned(law, key, shape):
    return law(key, shape) @ _frame(shape[-1])


def alike(key, shape):
    """Gaussian tokens of one input that have a correlation of 0.3 with each other."""
    keys = jax.random.split(key)
    common = jax.random.normal(keys[0], (shape[0], 1, shape[2]))
    return np.sqrt(0.3) * common + np.sqrt(0.7) * jax.random.normal(keys[1], shape)


def coloured(key, shape):
    """Gaussian tokens whose entries have variances from 0.1 to 1.9."""
    return jax.random.normal(key, shape) * np.sqrt(np.linspace(0.1, 1.9, shape[-1]))


@functools.cache
def _digits(dimension: int) -> np.ndarray:
    rows = np.asarray(importlib.import_module("sklearn.datasets").load_digits().data)
    rows = rows - rows.mean(0)
    values, vectors = np.linalg.eigh(rows.T @ rows / len(rows))
    return rows @ (vectors[:, -dimension:] / np.sqrt(values[-dimension:]))


def digits(key, shape):
    rows = jnp.asarray(_digits(shape[-1]))
    return rows[jax.random.randint(key, shape[:-1], 0, len(rows))]


# One object each: `Data` is compiled against.
_TURNED = {name: functools.partial(turned, law) for name, law in (("signs", signs), ("sparse", sparse))}
_TURNED_DIGITS = functools.partial(turned, digits)
TOKENS = {
    "Gaussian": jax.random.normal, "signs": signs, "uniform": uniform, "sparse": sparse, "heavy tails": heavy,
    "signs, turned": _TURNED["signs"], "sparse, turned": _TURNED["sparse"], "tokens alike": alike,
    "unequal variances": coloured,
}  # fmt: skip
CASES = {
    **{f"{name} tokens": (80, ls.Data(inputs=law)) for name, law in TOKENS.items()},
    **{f"{name} noise": (80, ls.Data(noise=law)) for name, law in (("sign", signs), ("sparse", sparse))},
    "Gaussian tokens, D = 40": (40, ls.Data()),
    "digits": (40, ls.Data(inputs=digits)),
    "digits, turned": (40, ls.Data(inputs=_TURNED_DIGITS)),
}


def settings() -> dict[str, ls.Setting]:
    numerics = ls.Numerics(8192, 16384, 4)
    return {
        "softmax": ls.Setting(ls.Pretraining(0.3, 0.03, delta=1.0, tokens=2), ls.Finetuning(4.0, 0.5), numerics),
        "identity": ls.Setting(
            ls.Pretraining(0.3, 0.1, delta=1.0, tokens=2, activation="identity"), ls.Finetuning(4.0, 0.6), numerics
        ),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("universality.json"))
    parser.add_argument("--runs", type=int, default=6)
    options = parser.parse_args()
    known = json.loads(options.out.read_text()) if options.out.exists() else {}
    for activation, setting in settings().items():
        theory = ls.predict(setting)
        row = [f"{float(getattr(theory, stage)[name]):.4f}" for stage, name in NAMES]
        print(
            f"{activation}, {theory.symmetry}\n| | {' | '.join(n for _, n in NAMES)} |\n| theory | {' | '.join(row)} |"
        )
        for name, (dimension, data) in CASES.items():
            key = f"{activation}: {name}"
            if key not in known:
                found = ls.simulate(setting, dimension=dimension, runs=options.runs, data=data)
                known[key] = [[found.mean(stage, n), found.stderr(stage, n)] for stage, n in NAMES]
                options.out.write_text(json.dumps(known, indent=0))
            cells = [f"{mean:.3f}({bar:.3f})" for mean, bar in known[key]]
            print(f"| {name} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
