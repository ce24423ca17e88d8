"""What is measured after training: test errors on fresh inputs, overlaps, and the rank of the learned map."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

from .samples import draw_batch, lora_update, preactivation, square


@functools.partial(jax.jit, static_argnames=("tokens", "samples"))
def test_errors(key, stage, base, learned, lora, tokens: int, samples: int):
    """Two errors on fresh inputs, chunk by chunk so that memory is bounded.

    Without `lora`: of sigma(Z_W) against sigma(Y) and against sigma(Z*). With `lora` = (w*, w), both against
    sigma(Y'): of sigma(Z_W + chi chi^T) and of sigma(Z_W).
    """
    dimension, sigma = base.shape[0], stage.activation
    chunk = min(max(2_000_000 // (dimension * tokens), 50), samples)
    chunks = -(-samples // chunk)

    def one(total, keys):
        inputs, labels = draw_batch(keys[0], keys[1], base, stage.delta, tokens, chunk)
        frozen = preactivation(inputs, learned)
        if lora is None:
            pairs = (frozen, labels), (frozen, preactivation(inputs, base))
        else:
            labels = labels + lora_update(inputs, lora[0])
            pairs = (frozen + lora_update(inputs, lora[1]), labels), (frozen, labels)
        return total + jnp.stack([square(sigma(out) - sigma(label)) for out, label in pairs]), None

    total, _ = jax.lax.scan(one, jnp.zeros(2), jax.random.split(key, (chunks, 2)))
    return total / (chunk * chunks)


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
