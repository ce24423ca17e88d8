"""What all laws do with their arguments, elementwise: one shape and dtype, the limit delta -> 0+, the density."""

from typing import Any

import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike


def prepare(*args: ArrayLike) -> tuple[Array, ...]:
    """Broadcast to one shape and one floating dtype."""
    dtype = jnp.result_type(float, *args)
    return tuple(jnp.broadcast_arrays(*(jnp.asarray(v, dtype) for v in args)))


def last(values: Any, like: Array) -> Array:
    """Numbers along the last axis of arrays like this one."""
    return jnp.asarray(list(values), like.dtype).reshape((1,) * (like.ndim - 1) + (-1,))


#: delta below which laws are those of their limit 0+.
_SMALL = 1e-10


def limit(delta: Array) -> Array:
    """delta, or what is as good as its limit 0+: there all is linear in delta^2, with its slope.

    The slope matters: state evolution lives on dJ/d(delta^2), the response of the spectrum to noise, which is finite in
    the limit, and a solve with noiseless labels comes near it.
    """
    square = jnp.square(jnp.minimum(delta, _SMALL))
    near = jnp.sqrt(_SMALL**2 + (square - lax.stop_gradient(square)))
    return jnp.where(delta > _SMALL, delta, near)


def density_of(g: Array, delta: ArrayLike) -> Array:
    """``-Im g / pi``; infinite at delta = 0 where an atom or a hard edge is."""
    rho = -jnp.imag(g) / jnp.pi
    return jnp.where((jnp.asarray(delta) == 0) & (rho > 1e4), jnp.inf, rho)


def as_array(value: ArrayLike) -> Array:
    return prepare(value)[0]
