"""What all laws do with their arguments, elementwise: one shape and dtype, the limit delta -> 0+, the density."""

import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike


def prepare(*args: ArrayLike) -> tuple[Array, ...]:
    """Broadcast to one shape and one floating dtype."""
    dtype = jnp.result_type(float, *args)
    return tuple(jnp.broadcast_arrays(*(jnp.asarray(v, dtype) for v in args)))


def limit(delta: Array) -> Array:
    """delta, or what is as good as its limit 0+."""
    return jnp.maximum(delta, 1e-8)


def density_of(g: Array, delta: ArrayLike) -> Array:
    """``-Im g / pi``; infinite at delta = 0 where an atom or a hard edge is."""
    rho = -jnp.imag(g) / jnp.pi
    return jnp.where((jnp.asarray(delta) == 0) & (rho > 1e4), jnp.inf, rho)


def as_array(value: ArrayLike) -> Array:
    return prepare(value)[0]
