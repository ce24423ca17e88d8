"""Many descents of a LoRA loss at once, for training on the asymptotic channel (`asymptotic`).

The loss sees w through chi = X w / sqrt(D) alone. Descents from several starts share the product with X, the only
large one, which then reads X once for all of them; and along a line chi moves linearly, so that a line search costs no
product at all: every step of L-BFGS takes two, one for the new chi and one for the new gradient.

Arrays: w (D, r, B), chi (B, T, r, N), B descents side by side; X/sqrt(D) is kept as a matrix (T N, D).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ..errors import Code

_HISTORY, _LINE_STEPS = 20, 25
#: Steps between two visits to the host, so that Ctrl-C is answered within about a second.
_STEPS_PER_VISIT = 25


class LoraData(NamedTuple):
    """What the loss is made of: X/sqrt(D) (T N, D), Z_W and sigma(Y') (T, T, N), the ridge and sigma."""

    inputs: Any
    frozen: Any
    target: Any
    lam: Any
    activation: Any


class Minima(NamedTuple):
    """Where B descents stopped: w (B, D, r), the losses L'/D (B,), the codes and steps of each."""

    w: np.ndarray
    loss: np.ndarray
    codes: tuple[Code, ...]
    steps: np.ndarray


class _State(NamedTuple):
    w: Any
    chi: Any
    value: Any
    gradient: Any
    memory: Any  # (s, y, rho), the newest pair last; rho = 0 where there is none
    stuck: Any
    steps: Any


def _dot(a, b):
    return jnp.sum(a * b, (0, 1))


def _product(data: LoraData, w):
    """chi = X w / sqrt(D), one matrix product for all descents."""
    d, r, many = w.shape
    tokens = data.frozen.shape[0]
    chi = (data.inputs @ w.reshape(d, r * many)).reshape(tokens, -1, r, many)
    return jnp.transpose(chi, (3, 0, 2, 1))


def _fit(chi, data: LoraData):
    """sum_mu ||sigma(Z_W + chi chi^T) - sigma(Y')||_F^2 of one descent, from its chi (T, r, N)."""
    update = sum(chi[:, None, k] * chi[None, :, k] for k in range(chi.shape[1]))
    return jnp.sum((data.activation(data.frozen + update) - data.target) ** 2)


def _each(f, *args):
    """`f` of every descent, one after the other: elementwise work is fastest where it fits the cache."""
    return jax.lax.map(lambda a: f(*a), args)


def _at(w, chi, data: LoraData):
    """L'/D and its gradient in w."""
    d = w.shape[0]
    fit, slope = _each(jax.value_and_grad(lambda c: _fit(c, data)), chi)
    slope = jnp.moveaxis(slope, 2, 0).reshape(w.shape[1] * w.shape[2], -1)
    back = (slope @ data.inputs).T.reshape(w.shape)
    return (fit + data.lam * _dot(w, w)) / d, (back + 2 * data.lam * w) / d


def _size(w):
    """|w|, at least that of unit entries: relative changes would mean nothing near the saddle at 0."""
    return jnp.sqrt(jnp.maximum(_dot(w, w), 1.0 * w.shape[0] * w.shape[1]))


def _error(state: _State):
    """|grad f| |w| / |f|, the relative rate of change of the loss."""
    tiny = jnp.finfo(state.value.dtype).tiny
    return jnp.sqrt(_dot(state.gradient, state.gradient)) * _size(state.w) / (jnp.abs(state.value) + tiny)


def _direction(gradient, memory):
    """-H grad by the two loops of L-BFGS; a pair with rho = 0 leaves everything as it is."""

    def down(g, pair):
        s, y, rho = pair
        a = rho * _dot(s, g)
        return g - a * y, a

    def up(g, pair):
        (s, y, rho), a = pair
        return g + (a - rho * _dot(y, g)) * s, None

    g, a = jax.lax.scan(down, gradient, memory, reverse=True)
    s, y, rho = (v[-1] for v in memory)
    scale = jnp.where(rho > 0, _dot(s, y) / jnp.where(rho > 0, _dot(y, y), 1.0), 1.0)
    return -jax.lax.scan(up, scale * g, (memory, a))[0]


def _line_search(along, value, slope, first, active):
    """Steps (B,) that satisfy the strong Wolfe conditions, and whether the loss fell; 0 for who is not active.

    `along(t) -> (loss, derivative)`. Bisection between a point that still descends and one that is too far, refined by
    the secant of the derivatives; what is returned if it runs out is the best point that descends.
    """

    def search(carry):
        k, t, low, low_slope, high, high_slope, _ = carry
        f, g = along(t)
        far = ~(f <= value + 1e-4 * t * slope)  # NaN is too far
        good = ~far & (jnp.abs(g) <= -0.9 * slope)
        short = ~far & (g < 0) | good
        low, low_slope = jnp.where(short, t, low), jnp.where(short, g, low_slope)
        high, high_slope = jnp.where(short, high, t), jnp.where(short, high_slope, jnp.where(far, jnp.nan, g))
        secant = low_slope / (low_slope - high_slope)
        share = jnp.clip(jnp.where(jnp.isfinite(secant), secant, 0.5), 0.1, 0.9)
        new = jnp.where(jnp.isfinite(high), low + share * (high - low), 3 * t)
        return k + 1, jnp.where(good, t, new), low, low_slope, high, high_slope, good | ~active

    def going(carry):
        return (carry[0] < _LINE_STEPS) & ~jnp.all(carry[-1])

    zero = jnp.zeros_like(value)
    start = (0, first, zero, slope, zero + jnp.inf, zero + jnp.nan, ~active)
    low = jnp.where(active, jax.lax.while_loop(going, search, start)[2], 0.0)
    return low, low > 0


def _step(state: _State, data: LoraData, active):
    """One step of every active descent."""
    w, chi, value, gradient, memory = state[:5]
    direction = _direction(gradient, memory)
    slope = _dot(direction, gradient)
    uphill = ~(slope < 0)
    direction = jnp.where(uphill, -gradient, direction)
    slope = jnp.where(uphill, -_dot(gradient, gradient), slope)
    fresh = ~jnp.any(memory[2] > 0, 0) | uphill
    # Without memory of the curvature: a tenth of the size of w.
    cautious = 0.1 * _size(w) / jnp.sqrt(_dot(direction, direction))
    move = _product(data, direction)
    d, ww, wd, dd = w.shape[0], _dot(w, w), _dot(w, direction), _dot(direction, direction)

    def along(t):
        def fit(t, chi, move):
            return jax.jvp(lambda t: _fit(chi + t * move, data), (t,), (jnp.ones_like(t),))

        f, g = _each(fit, t, chi, move)
        return (f + data.lam * (ww + 2 * t * wd + t * t * dd)) / d, (g + 2 * data.lam * (wd + t * dd)) / d

    t, fell = _line_search(along, value, slope, jnp.where(fresh, cautious, 1.0), active)
    new_w, new_chi = w + t * direction, chi + t[:, None, None, None] * move
    new_value, new_gradient = _at(new_w, new_chi, data)
    s, y = new_w - w, new_gradient - gradient
    curvature = _dot(s, y)
    # Pairs of negative curvature are left out; a line search that fails clears the memory.
    fine = curvature > 1e-12 * jnp.sqrt(_dot(s, s) * _dot(y, y))
    pair = (s, y, 1 / jnp.where(fine, curvature, 1.0))
    pushed = (jnp.concatenate([old[1:], new[None]]) for old, new in zip(memory, pair, strict=True))
    s, y, rho = (jnp.where(fine, new, old) for old, new in zip(memory, pushed, strict=True))
    memory = s, y, jnp.where(fell | ~active, rho, 0.0)
    # If there was none, nothing is left to try.
    stuck = state.stuck | (active & ~fell & fresh)
    return _State(new_w, new_chi, new_value, new_gradient, memory, stuck, state.steps + active)


def _active(state: _State, tolerance, limit):
    error = _error(state)
    return (error > tolerance) & jnp.isfinite(error) & ~state.stuck & (state.steps < limit)


@jax.jit
def _start(w, data: LoraData) -> _State:
    chi = _product(data, w)
    lanes = jnp.zeros(w.shape[-1])
    pairs = jnp.zeros((_HISTORY, *w.shape))
    memory = (pairs, pairs, jnp.zeros((_HISTORY, w.shape[-1])))
    return _State(w, chi, *_at(w, chi, data), memory, lanes > 0, lanes.astype(int))


@jax.jit
def _advance(state: _State, data: LoraData, tolerance, limit):
    def going(carry):
        return jnp.any(carry[1]) & (carry[2] < _STEPS_PER_VISIT)

    def body(carry):
        state, active, k = carry
        state = _step(state, data, active)
        return state, _active(state, tolerance, limit), k + 1

    carry = jax.lax.while_loop(going, body, (state, _active(state, tolerance, limit), 0))
    return carry[0], carry[1], _error(carry[0])


def descend(starts: Any, data: LoraData, *, tolerance: float = 1e-4, max_steps: int = 3000) -> Minima:
    """Local minima of L'(w)/D from `starts` (B, D, r), by L-BFGS, all at once.

    A descent stops when |grad f| |w| / |f| <= `tolerance`. Never raises on a descent that fails: its code says how it
    ended. Compiled once per shape.
    """
    state = _start(jnp.moveaxis(jnp.asarray(starts, float), 0, -1), data)
    active = np.array(True)
    error = np.array(np.nan)
    while np.any(active):
        state, active, error = _advance(state, data, tolerance, max_steps)
    steps, stuck, error = (np.asarray(v) for v in (state.steps, state.stuck, error))

    def code(k: int) -> Code:
        if not np.isfinite(error[k]):
            return Code.nonfinite
        if error[k] <= tolerance:
            return Code.ok
        return Code.stalled if stuck[k] else Code.max_steps

    w, loss = np.moveaxis(np.asarray(state.w), -1, 0), np.asarray(state.value)
    return Minima(w, loss, tuple(code(k) for k in range(len(loss))), steps)
