"""What is measured after training: errors on fresh inputs, overlaps, and the rank of the learned map."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

from .data import GAUSSIAN, Data
from .samples import draw_batch, lora_update, preactivation, square


def _mean(errors, key, base, delta, tokens: int, samples: int, data: Data):
    """Mean over fresh inputs of `errors(inputs, labels)`, sums over a batch, chunk by chunk: memory is bounded."""
    chunk = min(max(2_000_000 // (base.shape[0] * tokens), 50), samples)
    chunks = -(-samples // chunk)

    def one(total, keys):
        return total + errors(*draw_batch(keys[0], keys[1], base, delta, tokens, chunk, data)), None

    keys = jax.random.split(key, (chunks, 2))
    first = jax.eval_shape(lambda k: one(0.0, k)[0], keys[0])
    total, _ = jax.lax.scan(one, jnp.zeros(first.shape), keys)
    return total / (chunk * chunks)


@functools.partial(jax.jit, static_argnames=("tokens", "samples", "data"))
def map_errors(key, pre, base, learned, tokens: int, samples: int, data: Data = GAUSSIAN):
    """Errors of sigma(Z_W) on fresh inputs, against sigma(Y) and against sigma(Z*)."""
    sigma = pre.activation

    def errors(inputs, labels):
        out = sigma(preactivation(inputs, learned))
        return jnp.stack([square(out - sigma(label)) for label in (labels, preactivation(inputs, base))])

    return _mean(errors, key, base, pre.delta, tokens, samples, data)


@functools.partial(jax.jit, static_argnames=("tokens", "samples", "data"))
def adapted_errors(key, stage, base, learned, w, teacher, factors, tokens: int, samples: int, data: Data = GAUSSIAN):
    """Errors of sigma(Z_W + c chi chi^T) on fresh inputs, one for each of the factors c, against the labels of a stage:
    with chi* chi*^T of the `teacher` of the update or, if that is None, without."""
    sigma = stage.activation

    def errors(inputs, labels):
        frozen, update = preactivation(inputs, learned), lora_update(inputs, w)
        target = sigma(labels if teacher is None else labels + lora_update(inputs, teacher))
        return jax.lax.map(lambda c: square(sigma(frozen + c * update) - target), factors)

    return _mean(errors, key, base, stage.delta, tokens, samples, data)


#: c q at which E' is measured for its minimum in c.
FACTORS = np.geomspace(1e-3, 8.0, 45)


def best_factor(factors, errors) -> tuple[float, float]:
    """(c, E'(c)) at the lowest minimum of E', a polynomial in log c between neighbours; NaN where it is at an end."""
    k = int(np.argmin(errors))
    if not (2 <= k < len(errors) - 2 and np.all(np.isfinite(errors))):
        return np.nan, np.nan
    near = slice(k - 2, k + 3)
    curve = np.polynomial.Polynomial.fit(np.log(factors[near]), errors[near], 4)
    places = np.append(curve.deriv().roots(), np.log(factors[k]))
    places = places[np.isreal(places)].real
    inside = places[(places >= np.log(factors[k - 1])) & (places <= np.log(factors[k + 1]))]
    place = min(inside, key=curve)
    return float(np.exp(place)), float(curve(place))


def overlaps(student, teacher, dimension: int) -> tuple[float, float, float]:
    """<s, t>/D, <s, s>/D and the cosine, set to 0 for a student shrunk to zero (<s, s>/D < 1e-6)."""
    pairs = (student, teacher), (student, student), (teacher, teacher)
    inner, size, known = (float(jnp.vdot(a, b)) / dimension for a, b in pairs)
    return inner, size, inner / np.sqrt(size * known) if not size < 1e-6 else 0.0


def lora_overlaps(w, teacher) -> dict[str, float]:
    """m, q, q_spare (of columns of w beyond those of w*) and the overlap: what no rotation of w or of w* changes.

    With w^T w*/D = U diag(s) V^T, m is the mean of s, and q that of |w U|^2/D over the columns that follow the teacher.
    """
    dimension, rank = w.shape
    if not np.all(np.isfinite(w)):
        return dict.fromkeys(("m", "q", "overlap", "q_spare")[: 3 + (rank > teacher.shape[1])], np.nan)
    k = min(rank, teacher.shape[1])
    cross, own, known = (np.asarray(a.T @ b) / dimension for a, b in ((w, teacher), (w, w), (teacher, teacher)))
    u, s, _ = np.linalg.svd(cross)
    sizes = np.diag(u.T @ own @ u)
    norm = np.linalg.norm(own)
    cosine = np.linalg.norm(s) / np.sqrt(norm * np.linalg.norm(known)) if norm >= 1e-6 else 0.0
    spare = {"q_spare": float(sizes[k:].mean())} if rank > k else {}
    return {"m": float(s.mean()), "q": float(sizes[:k].mean()), "overlap": float(cosine), **spare}


def rank_fraction(eigenvalues) -> float:
    """Share of eigenvalues above 1e-3 of the largest, and above 1e-6 (a map shrunk to zero has rank 0)."""
    share = float(np.mean(eigenvalues > max(1e-3 * eigenvalues[-1], 1e-6)))
    return share if np.isfinite(eigenvalues[-1]) else np.nan
