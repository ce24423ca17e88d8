"""Gaussian expectations: scrambled Sobol nodes in independent replicas, with moment-matched weights.

A node set is deterministic for a given seed, so a discretised expectation is an ordinary smooth function and
implicit differentiation of the discretised theory is exact. Each replica is an independent, unbiased estimate
of the same expectation: the spread over replicas is the quadrature error bar.
"""

from __future__ import annotations

import functools
from importlib.metadata import version
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from ..runtime.cores import PART, shared
from ..runtime.program import kept_arrays, platform
from .linear import small_solve
from .places import put, row


class Nodes(NamedTuple):
    """Standard normal nodes (R, dimension, n) in R parts, with weights (R, n): an expectation is the mean over parts of
    the weighted sum in each.

    A part is a replica, whose weights sum to one, or a share of its nodes, all of the same size. The second half of
    each part may mirror the first in some coordinates. `found` (R, ..., n/2): what has been searched for at the nodes
    of the first half, if anything. `inner`: one array (R, d, s, n) for each level of nested expectations, s samples of
    it at every node (see `nested_nodes`). Without the leading axis the same names describe one part.
    """

    normal: Any
    weight: Any
    found: Any = None
    inner: tuple = ()


@functools.lru_cache(maxsize=16)
def gaussian_nodes(
    dimension: int, nodes: int, replicas: int, seed: int, mirror: tuple[int, ...] | None = None,
    order: tuple[int, ...] | None = None, part: int | None = None,
) -> Nodes:  # fmt: skip
    """Scrambled Sobol nodes for E f(G), G ~ N(0, I); each replica of `nodes / replicas` nodes is scrambled apart.

    Half of a replica is the other half with the coordinates `mirror[0]` to `mirror[1] - 1` (default: all; none for the
    empty tuple, which makes all nodes different) negated, so functions odd in them are integrated exactly; the weights
    make all first and second moments exact as well (the least change of uniform weights: a quadratic control variate
    whose coefficients serve all functions). Weights sum to one in each replica.

    Coordinate k of the nodes is `order[k]` of the sequence, whose neighbouring coordinates fill their plane best.
    Replicas are cut into parts of `part` nodes (see `by_replica`).
    """
    per, images = nodes // replicas, mirror != ()
    points = per // 2 if images else per
    flip = np.ones((dimension, 1))
    if images:
        flip[slice(*mirror) if mirror else slice(None)] = -1.0

    def make():
        return _replicas(dimension, points, replicas, seed, flip, order, images)

    # Those of the first seeds are kept for the next start: SciPy takes half a second to import.
    words = f"nodes {(dimension, nodes, replicas, seed, mirror, order)} scipy {version('scipy')}"
    normal, weight = kept_arrays(words, make) if seed % 10**6 < 3 else make()
    found = Nodes(normal, weight)
    return found if part is None or part >= per else _parts(found, part, images)


def _replicas(dimension, points, replicas, seed, flip, order, images):
    """Nodes (R, dimension, n) and weights (R, n) of `gaussian_nodes`, from as many points of the sequence."""
    from scipy.special import ndtri
    from scipy.stats import qmc

    blocks, weights = [], []
    for child in np.random.SeedSequence([seed, dimension]).spawn(replicas):
        sobol = qmc.Sobol(dimension, scramble=True, bits=52, rng=np.random.default_rng(child))
        x = ndtri(np.clip(sobol.random(points), 2.0**-53, 1 - 2.0**-53)).T
        if order is not None:
            x = x[list(order)]
        weight = _matched_weights(x, flip[:, 0] > 0)
        blocks.append(np.concatenate([x, flip * x], 1) if images else x)
        weights.append(np.concatenate([weight, weight]) / 2 if images else weight)
    return np.stack(blocks), np.stack(weights)


def _parts(nodes: Nodes, size: int, images: bool) -> Nodes:
    """Replicas cut into parts of `size` nodes; mirror images stay with what they mirror."""
    copies = 2 if images else 1

    def cut(a):
        r, n = len(a), a.shape[-1]
        split = a.reshape(r, -1, copies, n // size, size // copies)
        return np.moveaxis(split, 3, 1).reshape(r * (n // size), *a.shape[1:-1], size)

    count = nodes.weight.shape[-1] // size
    return Nodes(cut(nodes.normal), count * cut(nodes.weight))


@functools.lru_cache(maxsize=16)
def nested_nodes(
    dimension: int, nodes: int, replicas: int, seed: int, mirror: tuple[int, ...], order: tuple[int, ...] | None,
    part: int, inner: int, samples: tuple[int, ...],
) -> Nodes:  # fmt: skip
    """`gaussian_nodes`, each with `samples[i]` standard normal samples z in R^`inner` of every level i of expectations
    inside (a power of two, at least four).

    A short Sobol sequence, shifted at random (modulo one) at every node, with the opposite of every sample: the error
    of an average over so few samples is then independent from node to node and averages out. The samples are two
    halves of the same kind, so that a bias that falls as 1 / samples can be told and taken away (`debiased` in
    `lorastate.model.wells`). Mirror images of a node have its samples.
    """
    outer = gaussian_nodes(dimension, nodes, replicas, seed, mirror, order, part)
    r, n = outer.weight.shape

    def make():
        from scipy.special import ndtri
        from scipy.stats import qmc

        rng = np.random.default_rng([seed, inner, 1])
        out = []
        for count in samples:
            base = qmc.Sobol(inner, scramble=False).random_base2(int(np.log2(count // 2))).T
            shift = rng.random((r, inner, 1, n // 2))
            z = ndtri(np.clip((base[:, :, None] + shift) % 1.0, 1e-12, 1 - 1e-12))
            z = np.concatenate([half * sign for half in np.split(z, 2, axis=2) for sign in (1, -1)], 2)
            out.append(np.concatenate([z, z], -1))
        return tuple(out)

    words = f"samples {(r, n, inner, samples, seed)} scipy {version('scipy')}"
    return outer._replace(inner=kept_arrays(words, make) if seed < 3 else make())


#: A function whose shape is asked for before it is called: both are one trace.
traced_once = functools.partial(jax.jit, inline=True)


def when(wanted, f):
    """`f()` where it is `wanted` (a flag, may be traced), else zeros in its place."""
    if wanted is True:
        return f()
    f = traced_once(f)
    nothing = jax.tree_util.tree_map(lambda s: jnp.zeros(s.shape, s.dtype), jax.eval_shape(f))
    return jax.lax.cond(wanted, f, lambda: nothing)


def by_replica(tree, replicas: int):
    """What is known of every part, (R k, ...), averaged over the k parts of each of R replicas, (R, ...)."""
    return jax.tree_util.tree_map(lambda a: a.reshape(replicas, -1, *a.shape[1:]).mean(1), tree)


def for_parts(tree, nodes: Nodes):
    """What holds for every replica, (R, ...), for each of its parts, (R k, ...)."""
    count = len(nodes.weight)
    return jax.tree_util.tree_map(lambda a: jnp.repeat(a, count // len(a), 0), tree)


def over_replicas(f, nodes: Nodes, *mapped):
    """`f(one part, *its slices)` for every part of all replicas, stacked: one after the other on a core of a CPU, where
    a part fits the cache; together on an accelerator."""
    xs = jax.tree_util.tree_map(jnp.asarray, (nodes, *mapped))
    if platform() != "cpu":
        return jax.vmap(lambda x: f(*x))(xs)

    def each(xs):
        return jax.lax.map(lambda x: f(*x), xs)

    mesh, part = shared(), PartitionSpec(PART)
    if mesh is None or len(jax.tree_util.tree_leaves(xs)[0]) % mesh.size:
        return each(xs)
    return jax.shard_map(each, mesh=mesh, in_specs=part, out_specs=part, check_vma=False)(xs)


class Slots(NamedTuple):
    """What a search remembers of every part of the nodes, in several rows (rows, R, ...): it reads `here` and writes
    `there`.

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
        return row(self.data, self.here)

    def commit(self, accept) -> Slots:
        """What was written last counts, if `accept`."""
        return self._replace(
            here=jnp.where(accept, self.there, self.here), there=jnp.where(accept, self.here, self.there)
        )


def sweep(f, nodes: Any, memory: Slots, count, write: bool = True):
    """Mean of `value` over the first `count` parts, and the new memory, for `f(part, memory) -> (value, memory)`.

    `count` may be traced: a coarse and a fine solve share one compiled loop. An accelerator takes all parts at
    once whatever `count` is. Without `write` the memory stays as it is. Forward-mode derivatives only.
    """
    nodes = jax.tree_util.tree_map(jnp.asarray, nodes)
    if platform() != "cpu":
        values, new = jax.vmap(f)(nodes, memory.read())
        if write:
            memory = memory._replace(data=put(memory.data, new, memory.there))
        return mean(values), memory

    mesh, parts = shared(), len(jax.tree_util.tree_leaves(nodes)[0])
    if mesh is None or parts % mesh.size:
        total, data = _sum(f, nodes, memory, count, write)
    else:

        def mine(nodes, data):
            size = parts // mesh.size
            here = jnp.clip(count - size * jax.lax.axis_index(PART), 0, size)
            total, data = _sum(f, nodes, memory._replace(data=data), here, write)
            return jax.lax.psum(total, PART), data

        part, rows, every = PartitionSpec(PART), PartitionSpec(None, PART), PartitionSpec()
        sum_ = jax.shard_map(mine, mesh=mesh, in_specs=(part, rows), out_specs=(every, rows), check_vma=False)
        total, data = sum_(nodes, memory.data)
    value = jax.tree_util.tree_map(lambda v: v / count, total)
    return value, memory._replace(data=data) if write else memory


def _sum(f, nodes: Any, memory: Slots, count, write: bool):
    """The sum of `value` over the first `count` parts, and what is remembered then (see `sweep`)."""
    each = jax.tree_util.tree_map

    @traced_once
    def at(r, data):
        return f(row(nodes, r), row(data, memory.here, r))

    def one(r, carry):
        total, data = carry
        value, new = at(r, memory.data if data is None else data)
        if data is not None:
            data = put(data, new, memory.there, r)
        return each(jnp.add, total, value), data

    shape, _ = jax.eval_shape(at, jnp.asarray(count), memory.data)
    zero = each(lambda v: jnp.zeros(v.shape, v.dtype), shape)
    total, data = jax.lax.fori_loop(0, count, one, (zero, memory.data if write else None))
    return total, memory.data if data is None else data


#: Nodes at least that are averaged over together on a CPU, and entries of what is known of them: their matrices stay in
#: its caches so.
_BLOCK, _ENTRIES = 256, 2**13


def in_blocks(f, nodes: Nodes, inner):
    """`f(nodes, inner)` of one replica, a sum over its nodes, as the sum over blocks of them on a CPU.

    `inner` (any pytree): arrays whose last axis runs over the nodes, or over several copies of them, and scalars.
    A node and its mirror image are in the same block.
    """
    half = nodes.weight.shape[-1] // 2
    entries = sum(np.size(a) for a in jax.tree_util.tree_leaves(inner)) // (2 * half)
    size = min(half, max(_BLOCK, 2 ** int(np.log2(_ENTRIES / max(entries, 1)))) // 2)
    count = half // size
    if count == 1 or half % size or platform() != "cpu":
        return f(nodes, inner)

    def cut(a, k):
        a = jnp.asarray(a)
        if a.ndim == 0:
            return a
        parts = a.reshape(*a.shape[:-1], -1, half)
        return jax.lax.dynamic_slice_in_dim(parts, k * size, size, -1).reshape(*a.shape[:-1], -1)

    @traced_once
    def at(k):
        return f(*jax.tree_util.tree_map(lambda a: cut(a, k), (nodes, inner)))

    def one(total, k):
        return jax.tree_util.tree_map(jnp.add, total, at(k)), None

    steps = jnp.arange(count)
    shape = jax.eval_shape(at, steps[0])
    zero = jax.tree_util.tree_map(lambda v: jnp.zeros(v.shape, v.dtype), shape)
    return jax.lax.scan(one, zero, steps)[0]


def mean(tree):
    """Average over the leading axis, that of the parts, of every leaf."""
    return jax.tree_util.tree_map(lambda a: a.mean(0), tree)


def reweighted(nodes: Nodes, values, wanted, replicas: int):
    """The weights nearest to those of the nodes under which the `values` (R, K, n) at them have the averages `wanted`
    (replicas, K) in each replica; they still sum to one. Its own where a replica has no such weights."""
    one = jnp.ones((len(values), 1, values.shape[-1]))
    values, wanted = jnp.concatenate([one, values], 1), jnp.concatenate([jnp.ones((replicas, 1)), wanted], 1)
    gram = by_replica(jnp.einsum("pn,pkn,pln->pkl", nodes.weight, values, values), replicas)
    scale = jnp.sqrt(jnp.diagonal(gram, axis1=1, axis2=2)) + 1e-30
    known = by_replica(jnp.einsum("pn,pkn->pk", nodes.weight, values), replicas)
    # Values that say the same, or nothing, share what there is to change.
    normal = gram / scale[:, :, None] / scale[:, None, :] + _RIDGE * jnp.eye(values.shape[1])
    c = for_parts(jax.vmap(small_solve)(normal, (wanted - known) / scale) / scale, nodes)
    weight = nodes.weight * (1 + jnp.einsum("pk,pkn->pn", c, values))
    return jnp.where(jnp.all(jnp.isfinite(weight)), weight, nodes.weight)


#: What is added to the diagonal of the normal equations of weights.
_RIDGE = 1e-11


def _matched_weights(x: np.ndarray, even: np.ndarray) -> np.ndarray:
    """Weights nearest to uniform under which first and second moments are exact, of the nodes x (d, n) together with
    their mirror images, which have the same weights and the same `even` coordinates. They sum to one."""
    d, n = x.shape
    i, j = np.triu_indices(d)
    keep = even[i] == even[j]  # mixed products cancel between mirror images
    i, j = i[keep], j[keep]
    features = np.concatenate([np.ones((1, n)), x[even], x[i] * x[j] - (i == j)[:, None]])
    if len(features) > n / 3:  # too few nodes to afford the constraints
        return np.full(n, 1 / n)
    target = np.zeros(len(features))
    target[0] = 1.0
    return (1.0 + _least_change(features, target - features.mean(1))) / n


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
