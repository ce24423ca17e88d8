"""The adapted layer b Z_W + c chi chi^T on fresh inputs: its errors on both tasks, and the c that is best for E'.

c is a factor on w w^T once it is trained. E'(c) is known at every c from the same order parameters; for the identity it
is a parabola, and

    c = [(T+1) Tr m m^T + r* Tr q] / [(T+1) Tr q^2 + (Tr q)^2],   for rank one (q + (T+1) m^2) / ((T+2) q^2).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ..evolution import finetuning as ft
from ..evolution.order import Order
from ..evolution.test_errors import finetuning_error, forgetting_error
from ..math.quadrature import Nodes
from ..model.channel.frozen_map import FrozenMap
from ..setting.stages import Finetuning, Pretraining
from .stage import averaged

#: |w|^2 / D below which the update counts as zero.
LIVE = 1e-12


class AdaptedLayer(NamedTuple):
    """The layer after fine-tuning: `frozen` as pre-training leaves it, and the `order` parameters of the update."""

    pre: Pretraining
    fine: Finetuning
    frozen: FrozenMap
    order: Order

    @property
    def size(self):
        """The largest |w_k|^2 / D, or 1 for an update that is zero."""
        q = jnp.max(self.order.norm(ft.TEACHER_SIZE))
        return jnp.where(q > LIVE, q, 1.0)

    def test_error(self, nodes: Nodes | None, factor: Any):
        """E' with the factor c on one part of the nodes. Test inputs are fresh, whatever those of fine-tuning were; the
        factor on the map stays."""
        fine, frozen = self.fine, self.frozen.scaled(self.fine.scale(self.frozen))
        law = frozen.Q0 + fine.delta / 2, frozen.overlap, frozen.norm
        ranks = fine.rank, fine.teacher_rank
        return finetuning_error(fine.activation, fine.tokens, *law, self.order.merged, nodes, ranks, factor)

    def forgetting_error(self, nodes: Nodes | None, factor: Any):
        """The error on the labels of pre-training, likewise; NaN where what the map knows of them is not known."""
        pre, fine, frozen = self.pre, self.fine, self.frozen.scaled(self.fine.scale(self.frozen))
        of_label = jnp.nan if frozen.label_overlap is None else frozen.label_overlap
        law, ranks = (pre.label_size, of_label, frozen.norm), (fine.rank, fine.teacher_rank)
        return forgetting_error(pre.activation, pre.tokens, *law, self.order.merged, nodes, ranks, factor)


def layer_error(layer: AdaptedLayer, nodes: Nodes | None, factor: Any = None):
    """E', the mean over replicas, with the factor of the setting or another."""
    c = layer.fine.adapter_factor if factor is None else factor
    return averaged(lambda n: layer.test_error(n, c), nodes)


#: E' is taken at c (1 + t) for these t, and is a polynomial between them.
STENCIL = np.linspace(-0.2, 0.2, 5)
_COEFFICIENTS = np.linalg.inv(np.vander(STENCIL, increasing=True))
#: Largest t of a minimum.
_REACH = 0.4


def minimum(factor, values):
    """(c, E'(c)) at the minimum of E' from its `values` on the stencil around a c near it; NaN where it has none."""
    a, b, c, d, e = _COEFFICIENTS @ values
    t = jnp.zeros(())
    for _ in range(4):  # Newton's steps
        slope, curvature = b + t * (2 * c + t * (3 * d + t * 4 * e)), 2 * c + t * (6 * d + t * 12 * e)
        t = t - slope / curvature
    good = (jnp.abs(t) < _REACH) & (curvature > 0) & jnp.isfinite(factor)
    lowest = a + t * (b + t * (c + t * (d + t * e)))
    return jnp.where(good, factor * (1 + t), jnp.nan), jnp.where(good, lowest, jnp.nan)


def errors_at(layer: AdaptedLayer, nodes: Nodes | None, factors):
    """E' at each of the factors on one part of the nodes."""
    return jax.vmap(lambda c: layer.test_error(nodes, c))(factors)


def best_factor(layer: AdaptedLayer, nodes: Nodes | None):
    """The c that is best for E', without derivative; NaN where there is none (see `near_minimum`)."""
    near, layer = near_minimum(layer, nodes), jax.lax.stop_gradient(layer)
    return minimum(near, averaged(lambda n: errors_at(layer, n, near * (1 + STENCIL)), nodes))[0]


#: c q that are tried, between `_LOW` and `_HIGH`: `_POINTS` of them in steps that shrink to a quarter `_ROUNDS` times,
#: with so many nodes that the stencil reaches the minimum.
_LOW, _HIGH, _POINTS, _ROUNDS, _NODES = 1e-3, 8.0, 17, 4, 2**13


def near_minimum(layer: AdaptedLayer, nodes: Nodes | None):
    """A c from which `minimum` finds the lowest one of E'; no derivative. NaN where that is not between c q = 0.001 and
    8, where the update is all that a softmax sees."""
    layer = jax.lax.stop_gradient(layer)
    size = layer.size
    if nodes is None:  # a parabola
        low, middle, high = (layer.test_error(None, c / size) for c in (0.0, 1.0, 2.0))
        return (1 - (high - low) / 2 / (low - 2 * middle + high)) / size
    count = max(_NODES // nodes.weight.shape[-1], 1)
    some = jax.tree_util.tree_map(lambda a: a[:count], nodes)
    unit = jnp.linspace(-1.0, 1.0, _POINTS)

    def zoom(window, _):
        middle, half = window
        place = middle + half * unit
        errors = averaged(lambda n: errors_at(layer, n, jnp.exp(place) / size), some)
        return (place[jnp.argmin(errors)], half / 4), None

    low, high = np.log(_LOW), np.log(_HIGH)
    (place, _), _ = jax.lax.scan(zoom, (jnp.asarray((low + high) / 2), jnp.asarray((high - low) / 2)), None, _ROUNDS)
    return jnp.where((place > low) & (place < high), jnp.exp(place) / size, jnp.nan)
