"""Gaussian expectations: scrambled Sobol nodes in independent replicas, with moment-matched weights.

A node set is deterministic for a given seed, so a discretised expectation is an ordinary smooth function and
implicit differentiation of the discretised theory is exact. Each replica is an independent, unbiased estimate
of the same expectation: the spread over replicas is the quadrature error bar.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from scipy.special import ndtri
from scipy.stats import qmc


class Nodes(NamedTuple):
    """Standard normal nodes (R, dimension, n) in R replicas, with weights (R, n) that sum to one in each.

    The second half of each replica mirrors the first in some coordinates; `side` (R, n) is +1 and -1 on the halves.
    `found` (R, ..., n/2): what has been searched for at the nodes of the first half, if anything. Without the leading
    axis the same names describe one replica.
    """

    normal: Any
    weight: Any
    side: Any
    found: Any = None


@functools.lru_cache(maxsize=16)
def gaussian_nodes(
    dimension: int, nodes: int, replicas: int, seed: int, mirror: tuple[int, int] | None = None
) -> Nodes:
    """Scrambled Sobol nodes for E f(G), G ~ N(0, I); each replica of `nodes / replicas` nodes is scrambled apart.

    Half of a replica is the other half with the coordinates `mirror[0]` to `mirror[1] - 1` (default: all) negated,
    so functions odd in them are integrated exactly; the weights make all first and second moments
    exact as well (the least change of uniform weights: a quadratic control variate whose coefficients serve
    all functions). Weights sum to one in each replica.
    """
    per = nodes // replicas
    flip = np.ones((dimension, 1))
    flip[slice(*mirror) if mirror else slice(None)] = -1.0
    blocks, weights = [], []
    for child in np.random.SeedSequence([seed, dimension]).spawn(replicas):
        sobol = qmc.Sobol(dimension, scramble=True, bits=52, rng=np.random.default_rng(child))
        half = ndtri(np.clip(sobol.random(per // 2), 2.0**-53, 1 - 2.0**-53)).T
        blocks.append(np.concatenate([half, flip * half], 1))
        weights.append(_matched_weights(half, flip[:, 0] > 0))
    side = np.tile(np.repeat([1.0, -1.0], per // 2), (replicas, 1))
    return Nodes(np.stack(blocks), np.stack(weights), side)


def over_replicas(f, nodes: Nodes, *mapped):
    """`f(one replica, *its slices)` for every replica, stacked: one after the other on a CPU, where a replica fits
    the cache; together on an accelerator."""
    xs = (nodes, *mapped)
    if jax.default_backend() == "cpu":
        return jax.lax.map(lambda x: f(*x), xs)
    return jax.vmap(lambda x: f(*x))(xs)


class Slots(NamedTuple):
    """What a search remembers of every replica, in several rows (rows, R, ...): it reads `here` and writes `there`.

    Large arrays are then never copied: a step that is accepted only changes the places of the two rows.
    """

    data: Any
    here: Any
    there: Any

    @staticmethod
    def of(memory, rows: int = 2) -> Slots:
        many = jax.tree_util.tree_map(lambda a: jnp.broadcast_to(a, (rows, *jnp.shape(a))), memory)
        return Slots(many, jnp.array(0), jnp.array(rows - 1))

    def read(self):
        """What is remembered: the row that is valid."""
        return jax.tree_util.tree_map(lambda a: a[self.here], self.data)

    def commit(self, accept) -> Slots:
        """What was written last counts, if `accept`."""
        return self._replace(
            here=jnp.where(accept, self.there, self.here), there=jnp.where(accept, self.here, self.there)
        )


def sweep(f, nodes: Nodes, memory: Slots, count, write: bool = True):
    """Mean of `value` over the first `count` replicas, and the new memory, for `f(replica, memory) -> (value, memory)`.

    `count` may be traced: a coarse and a fine solve share one compiled loop. An accelerator takes all replicas at
    once whatever `count` is. Without `write` the memory stays as it is. Forward-mode derivatives only.
    """
    nodes = jax.tree_util.tree_map(jnp.asarray, nodes)
    each = jax.tree_util.tree_map
    if jax.default_backend() != "cpu":
        values, new = jax.vmap(f)(nodes, memory.read())
        if write:
            memory = memory._replace(data=each(lambda m, n: m.at[memory.there].set(n), memory.data, new))
        return mean(values), memory

    def at(r, data):
        return f(each(lambda a: a[r], nodes), each(lambda a: a[memory.here, r], data))

    def one(r, carry):
        total, data = carry
        value, new = at(r, memory.data if data is None else data)
        if data is not None:
            data = each(lambda m, n: m.at[memory.there, r].set(n), data, new)
        return each(lambda t, v: t + v / count, total, value), data

    shape = jax.eval_shape(lambda: at(0, memory.data)[0])
    zero = each(lambda v: jnp.zeros(v.shape, v.dtype), shape)
    total, data = jax.lax.fori_loop(0, count, one, (zero, memory.data if write else None))
    return total, memory._replace(data=data) if write else memory


#: Nodes that are averaged over together on a CPU, so that their matrices stay in its caches.
_BLOCK = 256


def in_blocks(f, nodes: Nodes, inner):
    """`f(nodes, inner)` of one replica, a sum over its nodes, as the sum over blocks of them on a CPU.

    `inner` (any pytree): arrays whose last axis runs over the nodes, or over several copies of them, and scalars.
    A node and its mirror image are in the same block.
    """
    half = nodes.weight.shape[-1] // 2
    size = min(half, _BLOCK // 2)
    count = half // size
    if count == 1 or half % size or jax.default_backend() != "cpu":
        return f(nodes, inner)

    def cut(a, k):
        a = jnp.asarray(a)
        if a.ndim == 0:
            return a
        parts = a.reshape(*a.shape[:-1], -1, half)
        return jax.lax.dynamic_slice_in_dim(parts, k * size, size, -1).reshape(*a.shape[:-1], -1)

    def at(k):
        return f(*jax.tree_util.tree_map(lambda a: cut(a, k), (nodes, inner)))

    def one(total, k):
        return jax.tree_util.tree_map(jnp.add, total, at(k)), None

    shape = jax.eval_shape(at, 0)
    zero = jax.tree_util.tree_map(lambda v: jnp.zeros(v.shape, v.dtype), shape)
    return jax.lax.scan(one, zero, jnp.arange(count))[0]


def mean(tree):
    """Average over the leading replica axis of every leaf."""
    return jax.tree_util.tree_map(lambda a: a.mean(0), tree)


def _matched_weights(half: np.ndarray, even: np.ndarray) -> np.ndarray:
    """Weights, equal on mirror images, nearest to uniform under which first and second moments are exact."""
    d, n = half.shape
    i, j = np.triu_indices(d)
    keep = even[i] == even[j]  # mixed products cancel between mirror images
    i, j = i[keep], j[keep]
    features = np.concatenate([np.ones((1, n)), half[even], half[i] * half[j] - (i == j)[:, None]])
    if len(features) > n / 3:  # too few nodes to afford the constraints
        return np.full(2 * n, 0.5 / n)
    target = np.zeros(len(features))
    target[0] = 1.0
    weight = (1.0 + _least_change(features, target - features.mean(1))) / n
    return np.concatenate([weight, weight]) / 2


def _least_change(features: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """The shortest w (n,) with `features @ w / n = wanted`, by conjugate gradients: features are nearly orthonormal.

    Without BLAS, whose threads take a hundred times longer where other work keeps the cores busy.
    """
    n = features.shape[1]
    w, residual = np.zeros(n), wanted
    direction, size = np.zeros_like(wanted), np.inf
    for _ in range(20 * len(wanted)):
        before, size = size, np.sum(residual**2)
        if size <= 1e-32 * np.sum(wanted**2):
            break
        direction = residual + size / before * direction
        along = np.einsum("ij,i->j", features, direction)
        length = size * n / np.sum(along**2)
        w = w + length * along
        residual = residual - length / n * np.einsum("ij,j->i", features, along)
    return w
