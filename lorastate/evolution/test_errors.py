"""Test errors: expectations over fresh inputs, with no inner minimisation in them (arXiv:2606.05899).

    E  = E || sigma(Omega) - sigma(Y) ||_F^2                                 pre-training
    E' = E || sigma(Z_W + c omega omega^T) - sigma(Y0 + chi* chi*^T) ||_F^2  fine-tuning, omega in R^{T x r}
         E || sigma(Z_W + c omega omega^T) - sigma(Y) ||_F^2                 what fine-tuning makes of E

Labels are noisy; c is the factor that the update is applied with. The identity has closed forms. For a row-wise
activation all rows contribute the same. Given the updates chi*_1 and omega_1 of one token the first row of (Y', Z') is
Gaussian: with b over the other tokens

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

    `ranks` = (r, r*) of the update and of its teacher. E of pre-training leaves those of an update alone.
    """
    if isinstance(activation, Identity):
        return 0
    if activation.rowwise:
        return sum(ranks) + 2 * (tokens - activation.forgets_shift)
    return sum(ranks) * tokens + field_dimension(tokens, activation.forgets_shift)


def finetuning_error(
    activation: Activation, tokens: int, label_size, overlap, norm, lora: Order, nodes: Any,
    ranks: tuple[int, int] = (1, 1), factor: Any = 1.0,
):  # fmt: skip
    """E' for label size Q0 + delta'/2, map overlap M and norm Q; `lora` is (v, m, q), `factor` the c on w w^T.

    `ranks` = (r, r*); `nodes` is one replica, or None for the identity, where Gaussian moments give

        E' = (1 + 1/T) (label_size - 2 M + Q)
             + [(T+1) (r* + c^2 Tr q^2 - 2 c Tr m m^T) + (r* - c Tr q)^2] / T,   q0 = 1.
    """
    law, (rank, along) = (label_size, overlap, norm), ranks
    if isinstance(activation, Identity):
        return _identity_error(tokens, law, lora, ranks, factor, True)
    count = 1 if activation.rowwise else tokens
    rows, along = rank * count, along * count
    chi, g = nodes.normal[:along], nodes.normal[along : along + rows]
    base, scale = student_field(lora, chi, rows, 1.0)
    m, q = (per_row(v, along, rows) for v in (lora.overlap, lora.norm(1.0)))
    return _error(activation, tokens, law, (chi, base + scale * g), (m, q), factor, nodes)


def forgetting_error(
    activation: Activation, tokens: int, label_size, overlap, norm, lora: Order, nodes: Any,
    ranks: tuple[int, int] = (1, 1), factor: Any = 1.0,
):  # fmt: skip
    """E || sigma(Z_W + c omega omega^T) - sigma(Y) ||_F^2: the adapted layer on the labels of pre-training, which know
    nothing of w*; arguments as in `finetuning_error`, with the label size Q0 + delta/2 and the nodes of pre-training.

    Identity: (1 + 1/T) (label_size - 2 M + Q) + c^2 [(T+1) Tr q^2 + (Tr q)^2] / T, for rank one c^2 (T+2) q^2 / T.
    """
    law = (label_size, overlap, norm)
    if isinstance(activation, Identity):
        return _identity_error(tokens, law, lora, ranks, factor, False)
    count = 1 if activation.rowwise else tokens
    rows = ranks[0] * count
    q = per_row(lora.norm(1.0), ranks[1] * count, rows)
    x = nodes.normal[:rows]
    return _error(activation, tokens, law, (x[:0], jnp.sqrt(q) * x), (0.0, q), factor, nodes)


def pretraining_error(activation: Activation, tokens: int, label_size, overlap, norm, nodes: Any):
    """E of pre-training; identity: (1 + 1/T) (label_size - 2 M + Q). `label_size = Q0` gives the noiseless one."""
    law = (label_size, overlap, norm)
    if isinstance(activation, Identity):
        return _map_error(tokens, law)
    if activation.rowwise:
        fields = _fields(activation, tokens, nodes)
        none = jnp.zeros_like(nodes.weight)
        return row_error(activation, tokens, law, (none,) * 3, (none,) * 2, fields, nodes.weight)
    y, z = joint_fields(activation, tokens, law, _fields(activation, tokens, nodes))
    return mean_square_distance(activation, y, z, nodes.weight)


def _map_error(t: int, law):
    size, overlap, norm = law
    return (1 + 1 / t) * (size - 2 * overlap + norm)


def _identity_error(t: int, law, lora: Order, ranks: tuple[int, int], c, taught: bool):
    """From Gaussian moments; `taught`: whether the labels have w* in them."""
    n, q = directions(*ranks), lora.norm(1.0)
    teacher, cross = (ranks[1], c * jnp.sum(n * lora.overlap**2)) if taught else (0, 0.0)
    trace, square = c * jnp.sum(n * q), c**2 * jnp.sum(n * q**2)
    return _map_error(t, law) + ((t + 1) * (teacher + square - 2 * cross) + (teacher - trace) ** 2) / t


def _fields(activation: Activation, tokens: int, nodes: Any):
    """The last coordinates of the nodes: those of updates come first, however many there are."""
    return nodes.normal[-node_dimension(activation, tokens, (0, 0)) :]


def _error(activation: Activation, t: int, law, updates, moments, c, nodes: Any):
    """The error with `updates` = (chi*, omega) in the labels and, times c, in the map; `moments` = (m, q) of omega, one
    number or one for each of its rows. Of one token each where a row is enough."""
    (chi, omega), (m, q), fields = updates, moments, _fields(activation, t, nodes)
    if activation.rowwise:
        sizes = jnp.sum(chi**2, 0), c * jnp.sum(omega**2, 0)
        cross, square = jnp.sum(m * matched(chi, len(omega)) * omega, 0), jnp.sum(q * omega**2, 0)
        return row_error(activation, t, law, (sizes[0], c * cross, c**2 * square), sizes, fields, nodes.weight)
    y, z = joint_fields(activation, t, law, fields)
    y = y + gram(chi, t) if len(chi) else y
    return mean_square_distance(activation, y, z + c * gram(omega, t), nodes.weight)


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
    a, b, c = (v[None] for v in _root_of(*both))
    if activation.forgets_shift:
        # Differences to the diagonal entry: its own variance, 2 x law, is shared by all of them. Their mean is apart.
        d, e, f = (r[None] for r in _root_of(*(v + 2 * rest * xx for v, xx in zip(both, law, strict=True))))
        mean = [v.mean(0, keepdims=True) for v in (one, two)]
        one, two = one - mean[0], two - mean[1]
        y = a * one + d * mean[0]
        z = b * one + c * two + e * mean[0] + f * mean[1]
        first = [jnp.zeros_like(y[0])] * 2
        y, z = y - sizes[0][None], z - sizes[1][None]
    else:
        d, e, f = (jnp.sqrt(2.0) * v for v in _root_of(*law))
        y, z = a * one, b * one + c * two
        first = [d * normal[rest] + sizes[0], e * normal[rest] + f * normal[rest + 1] + sizes[1]]
    y, z = (jnp.concatenate([row[None], v]) for row, v in zip(first, (y, z), strict=True))
    return tokens * jnp.sum(weight * jnp.sum((activation.row(z) - activation.row(y)) ** 2, 0))
