"""A control variate by weights: few nodes with the minimisers of their inner problems, many with something near them.

Most of the time goes into inner minimisers, at every node and once for every step of a search. What two Gauss-Newton
steps make of the fields needs no search and is close: it leaves a hundredth of the variance over nodes of the averages
that the equations need (up to a twentieth of E |g|^2). So the few nodes, at which minimisers are known, are given the
weights nearest to their own under which h, these averages without a search, are what they are on many nodes,

    sum_k w_k h_k  =  E_many h      w = w0 (1 + c . h)      sum_k w_k = 1

It is a control variate whose coefficients come from a regression over the nodes, and serves whatever is averaged over
them. A solution has weights that do so for all nodes together (what a regression does to its own average goes as
1/n); for error bars every replica has weights by itself: replicas stay independent.

h depends on the order parameters: a stage is solved with the nodes' own weights first, and once more with those that
suit what was found. Derivatives hold the weights fixed, as they hold the nodes.

Nodes are few where thinning is asked for, and where symmetry is broken: each has samples inside then. What a node does
to the averages over minima is for the most part what it does to one of them, whose minimisers are searched for at all
nodes: that costs little beside those of the samples.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from ..math.linear import ldl_solve
from ..math.quadrature import Nodes, by_replica, over_replicas, reweighted
from ..math.symmetric import to_coordinates
from ..model import wells
from ..model.channel.fields import standard_fields
from ..model.channel.frozen_map import FrozenMap
from ..setting.stages import Finetuning, Pretraining
from . import finetuning as ft
from . import pretraining as pt
from .breaking import kinds_of
from .finetuning_map import locate_inner
from .order import Order, matched

#: Gauss-Newton steps.
_STEPS = 2


def _approached(problem, u):
    """What they make of u (n, N), and its value (N,)."""

    def step(_, u):
        g, hess = problem.gauss_newton(u)
        return u - ldl_solve(hess, g)[0]

    u = jax.lax.fori_loop(0, _STEPS, step, u)
    return u, problem.terms(u)[0]


def of_map(pre: Pretraining, order: Order, nodes: Nodes):
    """h of pre-training at the nodes of one part, (4, N): f, h . Y, h . G and |h|^2 for the averages that
    `lorastate.evolution.pretraining.Averages` names."""
    one, two = (to_coordinates(z) for z in standard_fields(nodes.normal, pre.tokens, pre.activation.forgets_shift))
    problem = pt.inner_problem(pre, order, nodes)
    omega, y = to_coordinates(problem.omega), jnp.sqrt(pre.label_size) * one
    # Where labels are fitted well the minimiser is nearer to Y than Omega is.
    between = (omega + y) / 2
    u, f = _approached(problem, jnp.where(problem.terms(between)[0] < problem.terms(omega)[0], between, omega))
    force = (omega - u) / (2 * order.response)
    return jnp.stack([f, jnp.sum(force * y, 0), jnp.sum(force * two, 0), jnp.sum(force**2, 0)])


def one_minimum(order: Order) -> Order:
    """The order parameters of any one of many minima: the law of omega, and the response 1/A_0 that f_0 would have were
    f quadratic."""
    response = order.response
    for spread, y in zip(order.spread, order.breaking, strict=True):
        response = response + y * spread**2
    return Order(response, order.overlap, order.noise)


def of_lora(fine: Finetuning, frozen: FrozenMap, order: Order, nodes: Nodes):
    """h of fine-tuning, (4, N) or (7, N): f, and by kind of direction g . chi*, g . g_noise and |g|^2. With breaking of
    one minimum, searched for: v is large then, and where minima meet averages are those over many nodes. (Where the
    channel has several parts, the mean over all of them.)"""
    d, one = ft.draws(fine, frozen, nodes), one_minimum(order)
    problem, rows = ft.inner_problem(fine, one, d), len(d.noise)
    kinds = kinds_of(rows, len(d.teacher), ft.spare(fine))
    if order.levels:
        unknown = jax.tree_util.tree_map(lambda a: a[0], wells.nothing(1, rows, d.noise.shape[-1], 1, True))
        low = wells.lowest(problem, locate_inner(fine, frozen, one, nodes, unknown))
        u, f = low.pick(low.u), low.depth
    else:
        u, f = _approached(problem, problem.omega)
    g = (problem.omega - u) / problem.v
    h = jnp.concatenate([f[None], *(kinds @ v for v in (g * matched(d.teacher, rows), g * d.noise, g**2))])
    # Weights belong to nodes: each has its share of every part of the channel.
    parts = d.weight.reshape(-1, nodes.weight.shape[-1]) / nodes.weight
    return jnp.sum(parts * h.reshape(len(h), *parts.shape), 1)


def weights(h, nodes: Nodes, many: Nodes, replicas: int):
    """The weights of the `nodes` under which the averages of h(one part) are those over `many`, of as many replicas: of
    all together, and of each replica by itself, (2, R, n). No derivative."""
    here = over_replicas(h, nodes)
    there = by_replica(over_replicas(lambda n: jnp.sum(n.weight * h(n), -1), many), replicas)
    both = reweighted(nodes, here, there.mean(0, keepdims=True), 1), reweighted(nodes, here, there, replicas)
    return jax.lax.stop_gradient(jnp.stack(both))


def lora_weights(fine: Finetuning, frozen: FrozenMap, order: Order, nodes: Nodes, many: Nodes, replicas: int):
    """`weights` of fine-tuning."""
    return weights(lambda n: of_lora(fine, frozen, order, n), nodes, many, replicas)


def map_weights(pre: Pretraining, order: Order, nodes: Nodes, many: Nodes, replicas: int):
    """`weights` of pre-training."""
    return weights(lambda n: of_map(pre, order, n), nodes, many, replicas)


def own(nodes: Nodes):
    """The weights that nodes have anyway, in the same form."""
    return jnp.stack([nodes.weight, nodes.weight])
