"""Derivatives of a fixed point by the implicit function theorem."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from .linear import small_solve

#: Least curvature of a maximum (see `lorastate.math.fixed_point.Map`) that is believed.
CURVED = 5e-3


@partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def attach(step: Callable, outer: int, x: Float[Array, " n"], args, const=None) -> Float[Array, " n"]:
    """Returns the fixed point `x` and gives it its derivative with respect to `args`.

    dx = (I - dF/dx)^{-1} (dF/dargs) dargs, by the implicit function theorem; `outer` as in `Map`.
    """
    return x


@attach.defjvp
def _attach_jvp(step, outer, primals, tangents):
    x, args, const = primals
    x = attach(step, outer, x, args, const)
    jac = jax.jacfwd(lambda y: step(y, args, const))(x)
    _, db = jax.jvp(lambda a: step(x, a, const), (args,), (tangents[1],))
    return x, implicit(jac, db, outer)


def curvature(jac, outer: int):
    """How the other coordinates answer to the last `outer` ones, (n - outer, outer), and how fast the slope of what is
    maximal in these then falls, (outer,): below zero where there is no maximum."""
    n = len(jac)
    gap, m = jnp.eye(n, dtype=jac.dtype) - jac, n - outer
    answer = small_solve(gap[:m, :m], -gap[:m, m:])
    return answer, jnp.diag(gap[m:, m:] + gap[m:, :m] @ answer)


def implicit(jac: Float[Array, "n n"], change: Float[Array, "n *k"], outer: int = 0) -> Float[Array, "n *k"]:
    """(I - J)^{-1} change, (n,) or (n, k). A maximum (see `Map.outer`) too flat to be placed stays where it is."""
    if not outer:
        return small_solve(jnp.eye(len(jac), dtype=jac.dtype) - jac, change)
    curved = curvature(jac, outer)[1] > CURVED
    still = jnp.concatenate([jnp.zeros(len(jac) - outer, bool), ~curved])
    gap = jnp.eye(len(jac), dtype=jac.dtype) - jac
    gap = jnp.where(still[:, None], jnp.eye(len(jac), dtype=jac.dtype), gap)
    return small_solve(gap, jnp.where(still if change.ndim == 1 else still[:, None], 0.0, change))


def sensitivity(step: Callable, x: Float[Array, " n"], args, const=None, outer: int = 0):
    """dx/dargs of the fixed point `x`, shaped like `args` with a leading axis (n,): the rule of `attach`, written out.

    One compiled derivative of `step` where `jacfwd` of `attach` has two; for scalar leaves and first derivatives.
    """
    by_x, by_args = jax.jacfwd(lambda x, a: step(x, a, const), argnums=(0, 1))(x, args)
    return jax.tree_util.tree_map(lambda j: implicit(by_x, j, outer), by_args)


@jax.custom_jvp
def nan_slope(x, good):
    """`x`, whose derivative is NaN where `good` is false: a failed solve has none."""
    return x


@nan_slope.defjvp
def _nan_slope_jvp(primals, tangents):
    x, good = primals
    return nan_slope(x, good), tangents[0] * jnp.where(good, 1.0, jnp.nan)
