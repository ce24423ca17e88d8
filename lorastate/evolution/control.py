"""A control variate for averages over minima: what one minimum would give, on the same nodes and on many more.

Averages with samples inside cost as many times more as there are samples, and most of the error of so few nodes is that
of what any one minimum would give at them: the fields and the label of a node matter more than where among its minima
it is. With S the averages of one minimum, which are known on many nodes,

    A  ->  A + beta (S on many nodes - S)

has the same expectation for any beta, and two to four times smaller errors for a good one. S has the law of omega
alone and the response 1/A_0 = v + sum_i y_i (p_i - p_{i-1}): were f quadratic in x, its f would be f_0. A good beta is
how much of what a node does to A is common to all minima: all of it for c and |g_k|^2, rho = E|g_0|^2 / E|g_k|^2 for
|g_0|^2 and <div g>, and sqrt(rho) for g_0 (the regression over nodes gives about as much, from rho = 0.4 to 1). The
gain <f_i> - f_{i-1} is -y_i (p_i - p_{i-1}) |g_{i-1}|^2/2 and what does not depend on the node, for such an f. 1 - rho
goes as q - p: where minima meet, so do their control variates, and what is left of <f_1> - f_0 and |g_1|^2 - |g_0|^2
is zero.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from ..math.quadrature import Nodes, by_replica, for_parts, over_replicas
from ..model.channel.frozen_map import FrozenMap
from ..setting.stages import Finetuning
from . import finetuning as ft
from .finetuning_map import locate_inner, no_memory
from .order import Order

#: o_w at least at which S is taken: E g_0 . chi* is odd in m, and what is added to it goes as m. Noise at least, in
#: sqrt(q): E <div g> is an average divided by that, and minima may have nothing in common along spare directions.
_SOME_OVERLAP, _SOME_NOISE = 0.05, 0.05


def one_minimum(order: Order) -> Order:
    """The order parameters of S."""
    response = order.response
    for spread, y in zip(order.spread, order.breaking, strict=True):
        response = response + y * spread**2
    along = 1.0 if jnp.ndim(order.overlap) == 0 else np.array([1.0, 0.0])
    size = jnp.sqrt(order.norm(ft.TEACHER_SIZE))
    overlap = along * jnp.maximum(jnp.abs(order.overlap), _SOME_OVERLAP * size)
    return Order(response, overlap, jnp.maximum(order.noise, _SOME_NOISE * size))


def _averages(fine: Finetuning, frozen: FrozenMap, order: Order, nodes: Nodes) -> ft.Averages:
    """Those of one minimum, of every part."""
    nodes = nodes._replace(inner=(), control=None)

    def at(n, found):
        return ft.averages_of(fine, frozen, order, n, locate_inner(fine, frozen, order, n, found))

    return over_replicas(at, nodes, no_memory(fine, nodes, alone=True).found)


def none(a: ft.Averages, levels: int) -> ft.Control:
    """A control variate that adds nothing to averages like these."""
    zero, kinds = jnp.zeros_like(a.potential), jnp.zeros_like(a.divergence)
    return ft.Control(zero, kinds, kinds, kinds, (kinds,) * levels)


def control(
    fine: Finetuning, frozen: FrozenMap, order: Order, nodes: Nodes, many: Nodes, replicas: int, a: ft.Averages
) -> ft.Control:
    """That of the averages over each part of the `nodes`, (R, ...), which are about `a` on the whole. `many`: nodes of
    as many replicas."""
    one = one_minimum(order)
    here, there = (_averages(fine, frozen, one, n) for n in (nodes, many))
    more = jax.tree_util.tree_map(jnp.subtract, for_parts(by_replica(there, replicas), nodes), here)
    m, (*overlaps, q) = one.overlap, order.norms(ft.TEACHER_SIZE)
    teacher = jnp.where(m > 0, more.teacher / jnp.where(m > 0, m, 1.0), 0.0)
    rho = [jnp.clip(s / a.squares[-1], 0.0, 1.0) for s in a.squares[:-1]]
    parting = tuple(
        jnp.broadcast_to((1 - r) / (q - p), more.divergence.shape) for r, p in zip(rho, overlaps, strict=True)
    )
    return ft.Control(more.potential, teacher, more.divergence, more.squares[0], parting)
