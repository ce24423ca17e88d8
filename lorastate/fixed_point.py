"""Fixed points x = F(x, theta) of a few order parameters: accelerated solve, result code, implicit derivative.

The map lives in unconstrained coordinates, x in R^n with small n. The method is a Newton iteration on the
residual G(x) = F(x) - x after a few damped Picard steps (which select the attracting solution); a Newton step
that does not reduce |G| is shortened, and replaced by a damped Picard step when that fails as well.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp

from .errors import Code, succeeded


class Method(eqx.Module):
    """How a fixed point is searched. All fields are static: they are the method's, not the physics'."""

    tolerance: float = eqx.field(static=True, default=1e-10)
    max_steps: int = eqx.field(static=True, default=200)
    #: Damped Picard steps before the first Newton step; -1 means Picard only.
    burn_in: int = eqx.field(static=True, default=4)
    #: Fraction of the old point that a Picard step keeps.
    damping: float = eqx.field(static=True, default=0.3)
    #: max |x| beyond which the iteration counts as diverged.
    bound: float = eqx.field(static=True, default=1e4)
    #: Residual below which a solve that Newton steps cannot improve counts as `floor`, a success. A map averaged over
    #: nodes whose inner minimiser jumps has small jumps itself, and need not have an exact fixed point.
    floor: float = eqx.field(static=True, default=0.0)
    #: Whether a fixed point that repels the damped iteration is reported as `unstable`.
    require_stable: bool = eqx.field(static=True, default=True)


class FixedPoint(NamedTuple):
    """Result of `fixed_point`.

    `residual` is the true one, max |F(x) - x|, undamped. `rate` is the spectral radius of dF/dx (the
    contraction rate of the plain iteration), `growth` the largest real part of its eigenvalues (>= 1 means that
    even the damped iteration is repelled) and `error` = residual |(I - J)^{-1}| bounds |x - x*| to first order.
    """

    x: Any
    code: Any
    residual: Any
    rate: Any
    growth: Any
    error: Any
    steps: Any


def small_solve(a, b):
    """Solves a x = b, a (n, n), b (n,) or (n, k), by unrolled elimination with row exchanges; no LAPACK call."""
    n = a.shape[0]
    vector = b.ndim == 1
    rows, rhs = [a[i] for i in range(n)], [b[i][None] if vector else b[i] for i in range(n)]
    for k in range(n):
        for i in range(k + 1, n):
            swap = jnp.abs(rows[i][k]) > jnp.abs(rows[k][k])
            rows[k], rows[i] = jnp.where(swap, rows[i], rows[k]), jnp.where(swap, rows[k], rows[i])
            rhs[k], rhs[i] = jnp.where(swap, rhs[i], rhs[k]), jnp.where(swap, rhs[k], rhs[i])
        for i in range(k + 1, n):
            factor = rows[i][k] / rows[k][k]
            rows[i] = rows[i] - rows[k] * factor
            rhs[i] = rhs[i] - rhs[k] * factor
    x: list[Any] = [None] * n
    for i in reversed(range(n)):
        s = rhs[i]
        for j in range(i + 1, n):
            s = s - rows[i][j] * x[j]
        x[i] = s / rows[i][i]
    out = jnp.stack(x)
    return out[:, 0] if vector else out


def _log_norm_of_power(a, squarings: int):
    """log |a^(2^k)| / 2^k by repeated squaring, renormalised: tends to the log of the spectral radius."""
    log = jnp.zeros(())
    for k in range(squarings):
        norm = jnp.sqrt(jnp.sum(a * a))
        safe = jnp.where(norm > 0, norm, 1.0)
        log = log + jnp.log(safe) / 2**k
        a = (a / safe) @ (a / safe)
    norm = jnp.sqrt(jnp.sum(a * a))
    return jnp.where(norm > 0, log + jnp.log(jnp.where(norm > 0, norm, 1.0)) / 2**squarings, -jnp.inf)


def spectral_radius(jac):
    """max |eigenvalue| of a small matrix; no eigensolver, so it runs under vmap and on a GPU."""
    return jnp.exp(_log_norm_of_power(jac, 10))


def spectral_abscissa(jac):
    """max Re(eigenvalue), from the growth of exp(s J): the stability of the damped iteration."""
    n = jac.shape[0]
    scale = 1.0 + jnp.sqrt(jnp.sum(jac * jac))
    a = jac / (16 * scale)
    term = total = jnp.eye(n, dtype=jac.dtype)
    for k in range(1, 9):
        term = term @ a / k
        total = total + term
    return 16 * scale * _log_norm_of_power(total, 18)


class _State(NamedTuple):
    x: Any
    image: Any
    jac: Any
    length: Any  # trial length of the next Newton step; 0 asks for a Picard step
    step: Any
    code: Any
    done: Any
    best: Any  # smallest residual so far, and how many steps ago
    since: Any
    previous: Any  # the point two accepted steps back, for cycles
    before: Any


def _iterate(step, method: Method, x0, args, const):
    def evaluate(x):
        def both(x):
            y = step(x, args, const)
            return y, y

        jac, image = jax.jacfwd(both, has_aux=True)(x)
        return image, jac

    def size(v):
        return jnp.max(jnp.abs(v))

    def cond(s):
        return ~s.done & (s.code == Code.ok) & (s.step < method.max_steps)

    def body(s):
        g = s.image - s.x
        newton = small_solve(jnp.eye(s.x.shape[0], dtype=s.x.dtype) - s.jac, g)
        picard = (1.0 - method.damping) * g
        early = (s.step < method.burn_in) | (method.burn_in < 0)
        use_picard = early | (s.length < 0.02) | ~jnp.all(jnp.isfinite(newton))
        # A Newton step in log or atanh coordinates longer than a few units means nothing: cut it.
        cut = jnp.minimum(1.0, 2.0 / jnp.maximum(size(newton), 1e-300))
        # The first pass evaluates at the start itself: one compiled copy of the map serves the whole loop.
        first = s.step < 0
        trial = s.x + jnp.where(first, 0.0, jnp.where(use_picard, picard, s.length * cut * newton))
        image, jac = evaluate(trial)
        finite = jnp.all(jnp.isfinite(image)) & jnp.all(jnp.isfinite(jac))
        residual = size(image - trial)
        accept = first | use_picard | (finite & (residual < (1.0 - 1e-3 * s.length) * size(g)))
        length = jnp.where(accept, jnp.where(use_picard, 1.0, jnp.minimum(1.0, 4.0 * s.length)), s.length / 4)
        x = jnp.where(accept, trial, s.x)
        improved = residual < 0.9 * s.best
        since = jnp.where(improved, 0, s.since + 1)
        best = jnp.minimum(s.best, jnp.where(finite, residual, jnp.inf))
        done = accept & (residual <= method.tolerance)
        moved = size(x - s.x)
        cycle = accept & (moved > 1e-6) & (size(x - s.before) < 1e-3 * moved) & (since > 8)
        code = jnp.where(cycle, Code.cycle, s.code)
        code = jnp.where((since > 15 + method.burn_in) & (method.burn_in >= 0), Code.stalled, code)
        stuck = ~accept & (length < 0.02) & (size(g) < method.floor)
        code = jnp.where(stuck, Code.floor, code)
        code = jnp.where(accept & (size(x) > method.bound), Code.diverged, code)
        code = jnp.where(accept & ~finite, Code.nonfinite, code)
        return _State(
            x,
            jnp.where(accept, image, s.image),
            jnp.where(accept, jac, s.jac),
            length,
            s.step + 1,
            jnp.where(done, Code.ok, code),
            done,
            best,
            since,
            jnp.where(accept, s.before, s.previous),
            jnp.where(accept, s.x, s.before),
        )

    n, dtype = x0.shape[0], x0.dtype
    inf = jnp.full_like(x0, jnp.inf)
    start = _State(
        x0, x0, jnp.zeros((n, n), dtype), jnp.ones((), dtype), jnp.array(-1),
        jnp.where(jnp.all(jnp.isfinite(x0)), int(Code.ok), int(Code.nonfinite)),
        jnp.array(False), jnp.array(jnp.inf, dtype), jnp.array(0), inf, inf,
    )  # fmt: skip
    s = jax.lax.while_loop(cond, body, start)
    code = jnp.where((s.code == Code.ok) & ~s.done, Code.max_steps, s.code)
    growth = spectral_abscissa(s.jac)
    near = (size(s.image - s.x) < method.floor) & (code == Code.stalled)
    code = jnp.where(near, int(Code.floor), code)
    if method.require_stable:
        code = jnp.where(succeeded(code) & ~(growth < 1.0), Code.unstable, code)
    residual = size(s.image - s.x)
    inverse = small_solve(jnp.eye(x0.shape[0], dtype=x0.dtype) - s.jac, jnp.eye(x0.shape[0], dtype=x0.dtype))
    error = residual * jnp.max(jnp.sum(jnp.abs(inverse), 1))
    return FixedPoint(s.x, code, residual, spectral_radius(s.jac), growth, error, s.step)


def search(step: Callable, method: Method, x0, args, const=None) -> FixedPoint:
    """`fixed_point` without a derivative."""
    stop = jax.lax.stop_gradient
    return _iterate(step, method, stop(x0), stop(args), stop(const))


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def attach(step: Callable, x, args, const=None):
    """Returns the fixed point `x` and gives it its derivative with respect to `args`.

    dx = (I - dF/dx)^{-1} (dF/dargs) dargs, by the implicit function theorem.
    """
    return x


@attach.defjvp
def _attach_jvp(step, primals, tangents):
    x, args, const = primals
    x = attach(step, x, args, const)
    jac = jax.jacfwd(lambda y: step(y, args, const))(x)
    _, db = jax.jvp(lambda a: step(x, a, const), (args,), (tangents[1],))
    return x, small_solve(jnp.eye(x.shape[0], dtype=x.dtype) - jac, db)


@jax.custom_jvp
def nan_slope(x, good):
    """`x`, whose derivative is NaN where `good` is false: a failed solve has none."""
    return x


@nan_slope.defjvp
def _nan_slope_jvp(primals, tangents):
    x, good = primals
    return nan_slope(x, good), tangents[0] * jnp.where(good, 1.0, jnp.nan)


def fixed_point(step: Callable, method: Method, x0, args, const=None) -> FixedPoint:
    """Solves x = step(x, args, const).

    `step` is a pure function of x (n,), of `args` (any pytree; every leaf is differentiable) and of `const` (a
    pytree without derivative, e.g. quadrature nodes). `x` is differentiable with respect to `args` in forward and
    reverse mode, to any order and under vmap (see `attach`); the start carries no derivative, and where the solve
    failed the derivative is NaN.

    Never raises: read `code` (see `lorastate.errors.Code`).
    """
    sol = search(step, method, x0, args, const)
    return sol._replace(x=nan_slope(attach(step, sol.x, args, const), succeeded(sol.code)))
