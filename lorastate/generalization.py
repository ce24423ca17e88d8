"""Test errors: expectations over fresh inputs, with no inner minimisation in them (arXiv:2606.05899).

    E  = E || sigma(Omega) - sigma(Y) ||_F^2                               pre-training
    E' = E || sigma(Z_W + omega omega^T) - sigma(Y0 + chi* chi*^T) ||_F^2  fine-tuning

Labels are noisy. The identity has closed forms. For a row-wise activation all rows contribute the same, and one row
of a GOE(T) field is T independent normals, so only 4 T of the T(T+1) + 2T dimensions are left.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp

from .activation import Activation, Identity
from .channel import field_dimension, standard_fields
from .order import Order


def node_dimension(activation: Activation, tokens: int) -> int:
    """Normal dimensions of a test expectation: chi*, g, then the two fields (one row each where that is enough)."""
    if isinstance(activation, Identity):
        return 0
    return 2 * tokens + (2 * tokens if activation.rowwise else field_dimension(tokens, activation.forgets_shift))


def finetuning_error(activation: Activation, tokens: int, label_size, overlap, norm, lora: Order | None, nodes: Any):
    """E' for label size Q0 + delta'/2, map overlap M and norm Q; `lora` is (v, m, q), or None for w = 0.

    `nodes` is one replica, or None for the identity:

        E' = (1 + 1/T) (label_size - 2 M + Q) + [T(T+2)(q0^2 + q^2) - 2 T q0 q - 2 T(T+1) m^2] / T^2,  q0 = 1.
    """
    t = tokens
    if isinstance(activation, Identity):
        m, q = (0.0, 0.0) if lora is None else (lora.overlap, lora.norm(1.0))
        gap = label_size - 2 * overlap + norm
        return (1 + 1 / t) * gap + (t * (t + 2) * (1 + q**2) - 2 * t * q - 2 * t * (t + 1) * m**2) / t**2
    x = nodes.normal
    chi = x[:t]
    omega = jnp.zeros_like(chi) if lora is None else lora.overlap * chi + lora.noise * x[t : 2 * t]
    return _difference(activation, t, label_size, overlap, norm, x[2 * t :], nodes.weight, chi, omega)


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
        y = y + (chi[:1] * chi if activation.rowwise else chi[:, None] * chi[None])
        z = z + (omega[:1] * omega if activation.rowwise else omega[:, None] * omega[None])
    if activation.rowwise:
        return t * jnp.sum(weight * jnp.sum((activation.row(z) - activation.row(y)) ** 2, 0))
    return jnp.sum(weight * jnp.sum((activation(z) - activation(y)) ** 2, (0, 1)))
