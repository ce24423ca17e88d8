"""Test errors: expectations over fresh inputs, with no inner minimisation in them (arXiv:2606.05899).

    E  = E || sigma(Omega) - sigma(Y) ||_F^2                               pre-training
    E' = E || sigma(Z_W + omega omega^T) - sigma(Y0 + chi* chi*^T) ||_F^2  fine-tuning, omega in R^{T x r}

Labels are noisy. The identity has closed forms. For a row-wise activation all rows contribute the same. Given the
updates chi*_1 and omega_1 of one token the first row of (Y', Z') is Gaussian: with b over the other tokens

    Y'_11 = |chi*_1|^2 + sqrt(2) y_1,   Y'_1b = chi*_1 . chi*_b + y_b,   Z' alike,
    cov(Y'_1b, Z'_1b) = C + [[|chi*_1|^2, chi*_1 . m omega_1], [., omega_1 . q omega_1]],   C = [[size, M], [M, Q]]

so that 2 T + r + r* of the T(T+1) + (r + r*) T dimensions are left. Softmax sees the differences to Y'_11 only: two
less.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp

from ..model.activation import Activation, Identity
from ..model.channel.fields import field_dimension, standard_fields
from ..model.proximal import gram
from .order import Order, directions, matched, per_row, student_field


def node_dimension(activation: Activation, tokens: int, ranks: tuple[int, int] = (1, 1)) -> int:
    """Normal dimensions of a test expectation: chi*, g (of one token where a row is enough), then the two fields.

    `ranks` = (r, r*) of the update and of its teacher. The nodes of pre-training leave those of an update alone.
    """
    if isinstance(activation, Identity):
        return 0
    if activation.rowwise:
        return sum(ranks) + 2 * (tokens - activation.forgets_shift)
    return sum(ranks) * tokens + field_dimension(tokens, activation.forgets_shift)


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
    x, count = nodes.normal, 1 if activation.rowwise else t
    begin, end = teacher_rank * count, (teacher_rank + rank) * count
    chi, g, fields = x[:begin], x[begin:end], x[end:]
    omega = jnp.zeros_like(g)
    if lora is not None:
        base, scale = student_field(lora, chi, len(g), 1.0)
        omega = base + scale * g
    law = (label_size, overlap, norm)
    if activation.rowwise:
        sizes = jnp.sum(chi**2, 0), jnp.sum(omega**2, 0)
        zero = jnp.zeros_like(sizes[0])
        update = (sizes[0], zero, zero)
        if lora is not None:
            m, q = (per_row(v, begin, end - begin) for v in (lora.overlap, lora.norm(1.0)))
            update = (sizes[0], jnp.sum(m * matched(chi, rank) * omega, 0), jnp.sum(q * omega**2, 0))
        return row_error(activation, t, law, update, sizes, fields, nodes.weight)
    y, z = joint_fields(activation, t, law, fields)
    return mean_square_distance(activation, y + gram(chi, t), z + gram(omega, t), nodes.weight)


def pretraining_error(activation: Activation, tokens: int, label_size, overlap, norm, nodes: Any):
    """E of pre-training; identity: (1 + 1/T) (label_size - 2 M + Q). `label_size = Q0` gives the noiseless one."""
    law = (label_size, overlap, norm)
    if isinstance(activation, Identity):
        return (1 + 1 / tokens) * (label_size - 2 * overlap + norm)
    if activation.rowwise:
        return row_error(activation, tokens, law, (0.0, 0.0, 0.0), (0.0, 0.0), nodes.normal[2:], nodes.weight)
    return mean_square_distance(
        activation, *joint_fields(activation, tokens, law, nodes.normal[2 * tokens :]), nodes.weight
    )


def mean_square_distance(activation: Any, y, z, weight):
    """E || sigma(z) - sigma(y) ||_F^2 over the nodes, y and z (T, T, N)."""
    return jnp.sum(weight * jnp.sum((activation(z) - activation(y)) ** 2, (0, 1)))


def joint_fields(activation, tokens: int, law, normal):
    """Y0 and Z_W, (T, T, N), with covariance [[size, M], [M, Q]] x (1 + delta_ab), from the normal nodes."""
    one, two = standard_fields(normal, tokens, activation.forgets_shift)
    a, b, c = _root_of(*law)
    return a * one, b * one + c * two


def _root_of(xx, xy, yy):
    """(a, b, c) with (a g, b g + c h) of covariance [[xx, xy], [xy, yy]] for independent standard normal g, h."""
    a = jnp.sqrt(xx)
    return a, xy / a, jnp.sqrt(jnp.maximum(yy - xy**2 / xx, 1e-20))


def row_error(activation, tokens: int, law, update, sizes, normal, weight):
    """T times the mean square distance of one row of sigma between two attention maps.

    `law` is (xx, xy, yy) of the fields in both maps, `update` what the first token's updates add to it off the diagonal
    and `sizes` what they add to the diagonal entries themselves, (N,) each; `normal`: nodes of what is left (see the
    module).
    """
    both = [xx + more for xx, more in zip(law, update, strict=True)]
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
        y, z = y - sizes[0], z - sizes[1]
    else:
        d, e, f = (jnp.sqrt(2.0) * v for v in _root_of(*law))
        y, z = a * one, b * one + c * two
        first = [d * normal[rest] + sizes[0], e * normal[rest] + f * normal[rest + 1] + sizes[1]]
    y, z = (jnp.concatenate([row[None], v]) for row, v in zip(first, (y, z), strict=True))
    return tokens * jnp.sum(weight * jnp.sum((activation.row(z) - activation.row(y)) ** 2, 0))
