"""Test errors: expectations over fresh inputs, with no inner minimisation in them (arXiv:2606.05899).

    E  = E || sigma(Omega) - sigma(Y) ||_F^2                               pre-training
    E' = E || sigma(Z_W + omega omega^T) - sigma(Y0 + chi* chi*^T) ||_F^2  fine-tuning

Labels are noisy. The identity has closed forms. For a row-wise activation all rows contribute the same. Given the two
numbers chi*_1 and omega_1 the first row of (Y', Z') is Gaussian: with b over the other tokens

    Y'_11 = chi*_1^2 + sqrt(2) y_1,   Y'_1b = chi*_1 chi*_b + y_b,   Z' alike,
    cov(Y'_1b, Z'_1b) = C + [[chi*_1^2, m chi*_1 omega_1], [., q omega_1^2]],   C = [[size, M], [M, Q]]

so that 2 T + 2 of the T(T+1) + 2T dimensions are left. Softmax sees the differences to Y'_11 only: 2 T dimensions.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp

from .activation import Activation, Identity
from .channel import field_dimension, standard_fields
from .order import Order


def node_dimension(activation: Activation, tokens: int) -> int:
    """Normal dimensions of a test expectation: chi*, g (of one token where a row is enough), then the two fields."""
    if isinstance(activation, Identity):
        return 0
    if activation.rowwise:
        return 2 + 2 * (tokens - activation.forgets_shift)
    return 2 * tokens + field_dimension(tokens, activation.forgets_shift)


def finetuning_error(activation: Activation, tokens: int, label_size, overlap, norm, lora: Order | None, nodes: Any):
    """E' for label size Q0 + delta'/2, map overlap M and norm Q; `lora` is (v, m, q), or None for w = 0.

    `nodes` is one replica, or None for the identity:

        E' = (1 + 1/T) (label_size - 2 M + Q) + [T(T+2)(q0^2 + q^2) - 2 T q0 q - 2 T(T+1) m^2] / T^2,  q0 = 1.
    """
    t = tokens
    m, q, noise = (0.0, 0.0, 0.0) if lora is None else (lora.overlap, lora.norm(1.0), lora.noise)
    if isinstance(activation, Identity):
        gap = label_size - 2 * overlap + norm
        return (1 + 1 / t) * gap + (t * (t + 2) * (1 + q**2) - 2 * t * q - 2 * t * (t + 1) * m**2) / t**2
    x, count = nodes.normal, 1 if activation.rowwise else t
    chi, g, fields = x[:count], x[count : 2 * count], x[2 * count :]
    omega = m * chi + noise * g
    law = (label_size, overlap, norm)
    if activation.rowwise:
        return row_error(activation, t, law, (1.0, m, q), chi[0], omega[0], fields, nodes.weight)
    y, z = _fields(activation, t, law, fields)
    return _distance(activation, y + chi[:, None] * chi[None], z + omega[:, None] * omega[None], nodes.weight)


def pretraining_error(activation: Activation, tokens: int, label_size, overlap, norm, nodes: Any):
    """E of pre-training; identity: (1 + 1/T) (label_size - 2 M + Q). `label_size = Q0` gives the noiseless one."""
    law = (label_size, overlap, norm)
    if isinstance(activation, Identity):
        return (1 + 1 / tokens) * (label_size - 2 * overlap + norm)
    if activation.rowwise:
        return row_error(activation, tokens, law, (0.0, 0.0, 0.0), 0.0, 0.0, nodes.normal[2:], nodes.weight)
    return _distance(activation, *_fields(activation, tokens, law, nodes.normal[2 * tokens :]), nodes.weight)


def _distance(activation: Any, y, z, weight):
    return jnp.sum(weight * jnp.sum((activation(z) - activation(y)) ** 2, (0, 1)))


def _fields(activation, tokens: int, law, normal):
    """Y0 and Z_W, (T, T, N), with covariance [[size, M], [M, Q]] x (1 + delta_ab), from the normal nodes."""
    one, two = standard_fields(normal, tokens, activation.forgets_shift)
    a, b, c = _root_of(*law)
    return a * one, b * one + c * two


def _root_of(xx, xy, yy):
    """(a, b, c) with (a g, b g + c h) of covariance [[xx, xy], [xy, yy]] for independent standard normal g, h."""
    a = jnp.sqrt(xx)
    return a, xy / a, jnp.sqrt(jnp.maximum(yy - xy**2 / xx, 1e-20))


def row_error(activation, tokens: int, law, lora, chi, omega, normal, weight):
    """T times the mean square distance of one row of sigma between two attention maps.

    `law` and `lora` are (xx, xy, yy) of the fields and of the tokens' updates in both maps, `chi` and `omega` (N,) the
    first token's updates, `normal` the nodes of what is left (see the module).
    """
    both = [xx + square * p for xx, square, p in zip(law, lora, (chi**2, chi * omega, omega**2), strict=True)]
    rest = tokens - 1
    one, two = normal[:rest], normal[-rest:]
    a, b, c = _root_of(*both)
    if activation.forgets_shift:
        # Differences to the diagonal entry: its own variance, 2 x law, is shared by all of them. Their mean is apart.
        d, e, f = _root_of(*(v + 2 * rest * xx for v, xx in zip(both, law, strict=True)))
        mean = [v.mean(0) for v in (one, two)]
        one, two = one - mean[0], two - mean[1]
        y = a * one + d * mean[0]
        z = b * one + c * two + e * mean[0] + f * mean[1]
        first = [jnp.zeros_like(y[0])] * 2
        y, z = y - chi**2, z - omega**2
    else:
        d, e, f = (jnp.sqrt(2.0) * v for v in _root_of(*law))
        y, z = a * one, b * one + c * two
        first = [d * normal[rest] + chi**2, e * normal[rest] + f * normal[rest + 1] + omega**2]
    y, z = (jnp.concatenate([row[None], v]) for row, v in zip(first, (y, z), strict=True))
    return tokens * jnp.sum(weight * jnp.sum((activation.row(z) - activation.row(y)) ** 2, 0))
