"""E' of a trained update from its overlaps m = w^T w*/D and q = w^T w/D, on no sample of inputs."""

from __future__ import annotations

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from ..evolution.test_errors import joint_fields, mean_square_distance, row_error
from ..math.quadrature import mean, over_replicas
from ..model.activation import Identity
from ..model.channel.frozen_map import FrozenMap
from ..model.proximal import gram
from ..setting.stages import Finetuning


def overlap_error(fine: Finetuning, frozen: FrozenMap, m, q, nodes: Any):
    """E' of an update with m = w^T w*/D (r, r*) and q = w^T w/D (r, r), any matrices, on fresh inputs.

    As `test_errors.finetuning_error`, which has symmetric m and q, on the same nodes (one replica; None for the
    identity): chi*_a is standard normal and omega_a = m chi*_a + (q - m m^T)^{1/2} g_a. The factor c on the update is
    one on w of sqrt(c).
    """
    frozen, t = frozen.scaled(fine.scale(frozen)), fine.tokens
    m, q = jnp.sqrt(fine.adapter_factor) * m, fine.adapter_factor * q
    assert t is not None
    rank, teacher_rank = m.shape
    law = (frozen.Q0 + fine.delta / 2, frozen.overlap, frozen.norm)
    if isinstance(fine.activation, Identity):
        gap, trace = law[0] - 2 * law[1] + law[2], jnp.trace(q)
        square = teacher_rank + jnp.sum(q**2) - 2 * jnp.sum(m**2)
        return (1 + 1 / t) * gap + ((t + 1) * square + (teacher_rank - trace) ** 2) / t
    sizes, frame = jnp.linalg.eigh(q - m @ m.T)
    noise = frame * jnp.sqrt(jnp.maximum(sizes, 0.0))
    x, count = nodes.normal, 1 if fine.activation.rowwise else t
    begin, end = teacher_rank * count, (teacher_rank + rank) * count
    chi, g = x[:begin].reshape(teacher_rank, count, -1), x[begin:end].reshape(rank, count, -1)
    omega = jnp.einsum("ij,jan->ian", m, chi) + jnp.einsum("ij,jan->ian", noise, g)
    if fine.activation.rowwise:
        one, two = chi[:, 0], omega[:, 0]
        own = jnp.sum(one**2, 0), jnp.sum(two**2, 0)
        update = own[0], jnp.sum((m @ one) * two, 0), jnp.sum((q @ two) * two, 0)
        return row_error(fine.activation, t, law, update, own, x[end:], nodes.weight)
    y, z = joint_fields(fine.activation, t, law, x[end:])
    y, z = (v + gram(u.reshape(-1, u.shape[-1]), t) for v, u in ((y, chi), (z, omega)))
    return mean_square_distance(fine.activation, y, z, nodes.weight)


@eqx.filter_jit
def errors(fine: Finetuning, frozen: FrozenMap, m, q, nodes):
    """E' of several updates, (B,), averaged over the replicas of the nodes."""

    def one(pair):
        m, q = pair
        if nodes is None:
            return overlap_error(fine, frozen, m, q, None)
        return mean(over_replicas(lambda n: overlap_error(fine, frozen, m, q, n), nodes))

    return jax.lax.map(one, (m, q))


def overlap_matrices(w, teacher):
    """m (B, r, r*) and q (B, r, r), with w and w* turned so that m is diagonal and >= 0.

    E' does not depend on it, but its nodes do: -w must have the error of w to all digits.
    """
    cross, own = np.swapaxes(w, 1, 2) @ teacher / len(teacher), np.swapaxes(w, 1, 2) @ w / len(teacher)
    u, sizes, _ = np.linalg.svd(cross)
    m, k = np.zeros_like(cross), np.arange(sizes.shape[1])
    m[:, k, k] = sizes
    return m, np.swapaxes(u, 1, 2) @ own @ u
