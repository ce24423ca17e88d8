"""Rows of arrays at traced places that are in range: one slice each, where indexing would first look for negative ones
and write by a scatter, which a CPU compiles to a loop."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp


def _begin(a, places) -> tuple:
    """Unsigned, so that nothing is done for negative ones."""
    places = tuple(jnp.asarray(k).astype(jnp.uint32) for k in places)
    return places + (jnp.zeros((), jnp.uint32),) * (jnp.ndim(a) - len(places))


def row(tree: Any, *places: Any) -> Any:
    """`a[places]` of every leaf."""

    def of(a):
        cut = jax.lax.dynamic_slice(a, _begin(a, places), (1,) * len(places) + jnp.shape(a)[len(places) :])
        return cut.reshape(jnp.shape(a)[len(places) :])

    return jax.tree_util.tree_map(of, tree)


def put(tree: Any, new: Any, *places: Any) -> Any:
    """The tree with `new` at `places` of every leaf."""

    def into(a, value):
        value = jnp.asarray(value, a.dtype).reshape((1,) * len(places) + jnp.shape(a)[len(places) :])
        return jax.lax.dynamic_update_slice(a, value, _begin(a, places))

    return jax.tree_util.tree_map(into, tree, new)
