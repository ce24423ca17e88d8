"""Random samples of the model at finite size: matrices, inputs, their pre-activations and noisy labels.

Inputs are arrays (N, T, D); pre-activations and outputs are node-last, (T, T, N), as activations take them.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ..errors import SettingError
from ..model.proximal import gram
from ..model.spectra.base import BaseLaw
from ..model.spectra.laws import Atoms, FreeSum, PowerLaw, Wishart
from .data import GAUSSIAN, Data

#: Independent random streams of one run. Append only: the positions fix what a seed means.
_STREAMS = ("teacher", "inputs", "noise", "start", "lora_teacher", "lora_inputs", "lora_noise", "lora_start",
            "test", "lora_test", "task", "channel", "informed", "moves")  # fmt: skip


def stream(run_key, name: str):
    """The key of one of the independent random streams of a run."""
    return jax.random.fold_in(run_key, _STREAMS.index(name))


def square(x):
    """||x||_F^2."""
    return (x * x).sum()


# ---- pre-activations and labels --------------------------------------------------------------------------------


def _centred(product, trace, dimension: int):
    return (product - trace * jnp.eye(product.shape[0])[:, :, None]) / np.sqrt(dimension)


def preactivation(inputs, matrix):
    """Z_ab = (x_a^T S x_b - delta_ab Tr S) / sqrt(D), from inputs (N, T, D) and symmetric S (D, D)."""
    product = jnp.einsum("nad,nbd->abn", inputs @ matrix, inputs)
    return _centred(product, jnp.trace(matrix), inputs.shape[2])


def factor_preactivation(inputs, W):
    """`preactivation` of S = W W^T / sqrt(P D), W of shape (D, P), by whichever of W and S is smaller."""
    dimension, width = W.shape
    scale = 1 / np.sqrt(width * dimension)
    if width >= dimension:
        return preactivation(inputs, scale * (W @ W.T))
    u = inputs @ W
    return _centred(scale * jnp.einsum("nap,nbp->abn", u, u), scale * square(W), dimension)


def lora_update(inputs, w):
    """chi chi^T with chi_a = x_a . w / sqrt(D), (T, T, N), from w of shape (D, r), or (D,) for rank one."""
    samples, tokens, dimension = inputs.shape
    chi = inputs @ w.reshape(dimension, -1) / np.sqrt(dimension)
    return gram(jnp.moveaxis(chi, 0, -1).swapaxes(0, 1).reshape(-1, samples), tokens)


def label_noise(key, variance, tokens: int, samples: int, data: Data = GAUSSIAN):
    """Symmetric noise with entry variance `variance` (1 + delta_ab), (T, T, N)."""
    g = data.noise(key, (tokens, tokens, samples))
    return jnp.sqrt(variance / 2) * (g + jnp.swapaxes(g, 0, 1))


class Batch(NamedTuple):
    """Inputs, and labels before the activation."""

    inputs: Any  # (N, T, D)
    labels: Any  # (T, T, N), noisy pre-activation: Y in pre-training, Y0 = Z* + Xi' in fine-tuning


@functools.partial(jax.jit, static_argnames=("tokens", "samples", "data"))
def draw_batch(inputs_key, noise_key, base, delta, tokens, samples, data: Data = GAUSSIAN) -> Batch:
    """Fresh inputs and their labels, for a map `base` and label noise `delta`."""
    inputs = data.inputs(inputs_key, (samples, tokens, base.shape[0]))
    return Batch(inputs, preactivation(inputs, base) + label_noise(noise_key, delta / 2, tokens, samples, data))


# ---- the matrices of the teacher -------------------------------------------------------------------------------


def draw_matrix(key, law: BaseLaw, dimension: int, rank: int):
    """A matrix of that law: of a Wishart one with `rank` factors, else with the law's quantiles for eigenvalues."""
    if isinstance(law, Wishart):
        return draw_wishart(key, dimension, rank)
    if isinstance(law, FreeSum):
        keys = jax.random.split(key, len(law.parts))
        ranks = [round(float(getattr(part.law, "kappa0", 0.0)) * dimension) for part in law.parts]
        terms = (p.factor * draw_matrix(k, p.law, dimension, r) for k, p, r in zip(keys, law.parts, ranks, strict=True))
        return sum(terms, jnp.zeros((dimension, dimension)))
    if not isinstance(law, Atoms | PowerLaw):
        raise SettingError(f"pretraining.base = {law} cannot be simulated; allowed: Wishart, Atoms, PowerLaw, FreeSum")
    frame, triangle = jnp.linalg.qr(jax.random.normal(key, (dimension, dimension)))
    frame = frame * jnp.sign(jnp.diag(triangle))
    return (frame * law.eigenvalues(dimension)) @ frame.T


def draw_wishart(key, dimension: int, rank: int):
    """W W^T / sqrt(rank D)."""
    factor = jax.random.normal(key, (dimension, rank))
    return factor @ factor.T / np.sqrt(rank * dimension)
