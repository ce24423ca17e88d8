"""Test errors: expectations over fresh inputs, with no inner minimisation in them (arXiv:2606.05899).

    E  = E || sigma(Omega) - sigma(Y) ||_F^2                               pre-training
    E' = E || sigma(Z_W + omega omega^T) - sigma(Y0 + chi* chi*^T) ||_F^2  fine-tuning, omega in R^{T x r}

Labels are noisy. The identity has closed forms. For a row-wise activation all rows contribute the same, and one row
of a GOE(T) field is T independent normals, so only (2 + r + r*) T of the T(T+1) + (r + r*) T dimensions are left.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp

from .activation import Activation, Identity
from .channel import field_dimension, standard_fields
from .order import Order, directions, student_field
from .prox import columns, gram


def node_dimension(activation: Activation, tokens: int, ranks: tuple[int, int] = (1, 1)) -> int:
    """Normal dimensions of a test expectation: chi*, g, then the two fields (one row each where that is enough).

    `ranks` = (r, r*) of the update and of its teacher. The nodes of pre-training leave those of an update alone.
    """
    if isinstance(activation, Identity):
        return 0
    fields = 2 * tokens if activation.rowwise else field_dimension(tokens, activation.forgets_shift)
    return sum(ranks) * tokens + fields


def finetuning_error(
    activation: Activation, tokens: int, label_size, overlap, norm, lora: Order | None, nodes: Any,
    ranks: tuple[int, int] = (1, 1),
):  # fmt: skip
    """E' for label size Q0 + delta'/2, map overlap M and norm Q; `lora` is (v, m, q), or None for w = 0.

    `ranks` = (r, r*); `nodes` is one replica, or None for the identity, where Gaussian moments give

        E' = (1 + 1/T) (label_size - 2 M + Q) + [(T+1) (r* + Tr q^2 - 2 Tr m m^T) + (r* - Tr q)^2] / T,  q0 = 1.
    """
    t, (rank, teacher_rank) = tokens, ranks
    if isinstance(activation, Identity):
        gap = label_size - 2 * overlap + norm
        if lora is None:
            trace = cross = square = 0.0
        else:
            n, q = directions(rank, teacher_rank), lora.norm(1.0)
            trace, square, cross = jnp.sum(n * q), jnp.sum(n * q**2), jnp.sum(n * lora.overlap**2)
        return (1 + 1 / t) * gap + ((t + 1) * (teacher_rank + square - 2 * cross) + (teacher_rank - trace) ** 2) / t
    begin, end = teacher_rank * t, (teacher_rank + rank) * t
    x = nodes.normal
    chi, g = x[:begin], x[begin:end]
    omega = jnp.zeros_like(g)
    if lora is not None:
        base, scale = student_field(lora, chi, len(g), 1.0)
        omega = base + scale * g
    return _difference(activation, t, label_size, overlap, norm, x[end:], nodes.weight, chi, omega)


def pretraining_error(activation: Activation, tokens: int, label_size, overlap, norm, nodes: Any):
    """E of pre-training; identity: (1 + 1/T) (label_size - 2 M + Q). `label_size = Q0` gives the noiseless one."""
    if isinstance(activation, Identity):
        return (1 + 1 / tokens) * (label_size - 2 * overlap + norm)
    fields = nodes.normal[2 * tokens :]
    return _difference(activation, tokens, label_size, overlap, norm, fields, nodes.weight, None, None)


def _difference(activation, t, label_size, overlap, norm, normal, weight, chi, omega):
    if activation.rowwise:
        scale = jnp.ones((t, 1)).at[0].set(jnp.sqrt(2.0))  # the diagonal entry of a row has twice the variance
        one, two = scale * normal[:t], scale * normal[t : 2 * t]
    else:
        one, two = standard_fields(normal, t, activation.forgets_shift)
    y = jnp.sqrt(label_size) * one
    z = overlap / label_size * y + jnp.sqrt(jnp.maximum(norm - overlap**2 / label_size, 1e-20)) * two
    if chi is not None:
        y, z = (a + _update(u, t, activation.rowwise) for a, u in ((y, chi), (z, omega)))
    if activation.rowwise:
        return t * jnp.sum(weight * jnp.sum((activation.row(z) - activation.row(y)) ** 2, 0))
    return jnp.sum(weight * jnp.sum((activation(z) - activation(y)) ** 2, (0, 1)))


def _update(chi, tokens: int, rowwise: bool):
    """chi chi^T (T, T, N), or its first row (T, N)."""
    return sum(c[:1] * c for c in columns(chi, tokens)) if rowwise else gram(chi, tokens)
