"""L-BFGS with a zoom line search (optax), for the finite-size training of `simulation`."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from ..errors import Code

#: Steps between two visits to the host, so that Ctrl-C is answered within about a second.
_STEPS_PER_VISIT = 50

_LBFGS = optax.lbfgs(memory_size=20, linesearch=optax.scale_by_zoom_linesearch(max_linesearch_steps=30))


class Minimum(NamedTuple):
    """Where the descent stopped: `code` is ok, max_steps, stalled or nonfinite."""

    x: jax.Array
    value: float
    gradient: float
    steps: int
    code: Code


class _State(NamedTuple):
    x: Any
    value: Any
    slope: Any
    memory: Any
    steps: Any
    fresh: Any  # whether the memory is empty, and the next direction the gradient
    stuck: Any


def _scaled_gradient(s: _State):
    """|grad f| |x| / |f|, with |x| at least that of unit entries (or it would vanish near a saddle at 0)."""
    size = jnp.maximum(jnp.linalg.norm(s.x), jnp.sqrt(1.0 * s.x.size))
    return jnp.linalg.norm(s.slope) * size / (jnp.abs(s.value) + jnp.finfo(s.x.dtype).tiny)


@functools.partial(jax.jit, static_argnames="fun")
def _start(fun, x, data) -> _State:
    value, slope = jax.value_and_grad(fun)(x, data)
    return _State(x, value, slope, _LBFGS.init(x), jnp.array(0), jnp.array(True), jnp.array(False))


@functools.partial(jax.jit, static_argnames="fun")
def _advance(fun, s: _State, data, tolerance, limit):
    def value_of(x):
        return fun(x, data)

    def going(s: _State):
        error = _scaled_gradient(s)
        return (s.steps < limit) & (error > tolerance) & jnp.isfinite(error) & ~s.stuck

    def step(s: _State):
        move, memory = _LBFGS.update(s.slope, s.memory, s.x, value=s.value, grad=s.slope, value_fn=value_of)
        # Older versions of optax count in 32 bits what begins in 64.
        memory = jax.tree_util.tree_map(lambda new, old: new.astype(old.dtype), memory, s.memory)
        x = optax.apply_updates(s.x, move)
        value, slope = optax.value_and_grad_from_state(value_of)(x, state=memory)
        new = _State(x, value, slope, memory, s.steps + 1, jnp.array(False), jnp.array(False))
        # A direction that does not descend is forgotten with the memory it comes from: the next one is the gradient,
        # and if that fails too nothing is left to try.
        back = s._replace(memory=_LBFGS.init(s.x), steps=s.steps + 1, fresh=jnp.array(True), stuck=s.fresh)
        # Near the minimum the decrease drowns in rounding; the slope still tells.
        level = value <= s.value + 1e-12 * jnp.abs(s.value)
        good = (value < s.value) | (level & (jnp.linalg.norm(slope) < jnp.linalg.norm(s.slope)))
        return jax.lax.cond(good, lambda: new, lambda: back)

    s = jax.lax.while_loop(going, step, s)
    return s, _scaled_gradient(s)


def minimise(fun: Callable, x: Any, data: Any, *, tolerance: float = 1e-4, max_steps: int = 3000) -> Minimum:
    """A local minimum of `fun(x, data)` from `x`.

    Stops when |grad f| |x| / |f| <= `tolerance`, a relative rate of change of f: the scales of f and x do not
    matter. `fun` is compiled once per shape of its inputs: pass a module-level function. Never raises on a
    descent that fails: `code` says how it ended.
    """
    state = _start(fun, x, data)
    while True:
        state, error = _advance(fun, state, data, tolerance, min(int(state.steps) + _STEPS_PER_VISIT, max_steps))
        steps, gradient = int(state.steps), float(error)
        if not jnp.isfinite(error):
            code = Code.nonfinite
        elif gradient <= tolerance:
            code = Code.ok
        elif state.stuck:
            code = Code.stalled
        elif steps >= max_steps:
            code = Code.max_steps
        else:
            continue
        return Minimum(state.x, float(state.value), gradient, steps, code)
