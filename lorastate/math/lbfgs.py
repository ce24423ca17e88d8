"""L-BFGS for the finite-size training of `simulation`."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ..errors import Code

with warnings.catch_warnings():
    # jaxopt announces at import that it is no longer maintained.
    warnings.simplefilter("ignore", DeprecationWarning)
    import jaxopt

#: Steps between two visits to the host, so that Ctrl-C is answered within about a second.
_STEPS_PER_VISIT = 50


class Minimum(NamedTuple):
    """Where the descent stopped: `code` is ok, max_steps, stalled or nonfinite."""

    x: jax.Array
    value: float
    gradient: float
    steps: int
    code: Code


def _solver(fun: Callable) -> jaxopt.LBFGS:
    # `_advance` replaces jaxopt's own loop (tol, maxiter), which would end on a NaN without a word.
    return jaxopt.LBFGS(fun=fun, history_size=20, linesearch="zoom", implicit_diff=False)


def _scaled_gradient(x, state):
    """|grad f| |x| / |f|, with |x| at least that of unit entries (or it would vanish near a saddle at 0)."""
    size = jnp.maximum(jnp.linalg.norm(x), jnp.sqrt(1.0 * x.size))
    return jnp.linalg.norm(state.grad) * size / (jnp.abs(state.value) + jnp.finfo(x.dtype).tiny)


def _forget(state):
    s, y, rho = jax.tree.map(jnp.zeros_like, (state.s_history, state.y_history, state.rho_history))
    one = jnp.ones_like(state.gamma)
    return state._replace(s_history=s, y_history=y, rho_history=rho, gamma=one, stepsize=one)


@functools.partial(jax.jit, static_argnames="fun")
def _start(fun, x, data):
    return _solver(fun).init_state(x, data)


@functools.partial(jax.jit, static_argnames="fun")
def _advance(fun, x, state, data, tolerance, limit):
    solver = _solver(fun)

    def going(carry):
        x, state, stuck = carry
        error = _scaled_gradient(x, state)
        return (state.iter_num < limit) & (error > tolerance) & jnp.isfinite(error) & ~stuck

    def step(carry):
        x, state, _ = carry
        new_x, new = solver.update(x, state, data)
        failed = new.failed_linesearch & (new.value >= state.value)
        # jaxopt keeps pairs of negative curvature, after which it repeats a direction that climbs, for ever.
        # Without its memory the next direction is the gradient; if that fails too, nothing is left to try.
        back = (x, _forget(state)._replace(iter_num=new.iter_num))
        x, new = jax.lax.cond(failed, lambda: back, lambda: (new_x, new))
        return x, new, failed & ~jnp.any(state.rho_history)

    x, state, stuck = jax.lax.while_loop(going, step, (x, state, jnp.array(False)))
    return x, state, stuck, _scaled_gradient(x, state)


def minimise(fun: Callable, x: Any, data: Any, *, tolerance: float = 1e-4, max_steps: int = 3000) -> Minimum:
    """A local minimum of `fun(x, data)` from `x`, by L-BFGS with a zoom line search.

    Stops when |grad f| |x| / |f| <= `tolerance`, a relative rate of change of f: the scales of f and x do not
    matter. `fun` is compiled once per shape of its inputs: pass a module-level function. Never raises on a
    descent that fails: `code` says how it ended.
    """
    state = _start(fun, x, data)
    while True:
        limit = min(int(state.iter_num) + _STEPS_PER_VISIT, max_steps)
        x, state, stuck, error = _advance(fun, x, state, data, tolerance, limit)
        steps, gradient = int(state.iter_num), float(error)
        if not jnp.isfinite(error):
            code = Code.nonfinite
        elif gradient <= tolerance:
            code = Code.ok
        elif stuck:
            code = Code.stalled
        elif steps >= max_steps:
            code = Code.max_steps
        else:
            continue
        return Minimum(x, float(state.value), gradient, steps, code)
