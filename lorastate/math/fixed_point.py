"""Fixed points x = F(x, theta) of a few order parameters: accelerated solve, result code, implicit derivative.

The map lives in unconstrained coordinates, x in R^n with small n. The method is a Newton iteration on the
residual G(x) = F(x) - x after a few damped Picard steps (which select the attracting solution); a Newton step
that does not reduce |G| is shortened, and replaced by a damped Picard step when that fails as well.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ..errors import Code, succeeded
from .implicit import attach, nan_slope
from .linear import small_solve, spectral_bounds


class Method(eqx.Module):
    """How a fixed point is searched. All fields are static: they are the method's, not the physics'."""

    tolerance: float = eqx.field(static=True, default=1e-10)
    max_steps: int = eqx.field(static=True, default=200)
    #: Damped Picard steps before the first Newton step; -1 means Picard only.
    burn_in: int = eqx.field(static=True, default=4)
    #: Residual above which up to `_SETTLING` more Picard steps come before the first Newton step: far from a solution a
    #: Newton step may go anywhere.
    settle: float = eqx.field(static=True, default=float("inf"))
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

    `residual` is the true one, max |F(x) - x|, undamped (without the outer coordinates of a `Map`). `rate` is
    the spectral radius of dF/dx (the contraction rate of the plain iteration), `growth` the largest real part of its
    eigenvalues (>= 1 means that even the damped iteration is repelled) and `error` = residual |(I - J)^{-1}| bounds
    |x - x*| to first order, which `offset` (n,) = |(I - J)^{-1} (F(x) - x)| is.
    """

    x: Float[Array, " n"]
    code: Int[Array, ""]
    residual: Float[Array, ""]
    rate: Float[Array, ""]
    growth: Float[Array, ""]
    error: Float[Array, ""]
    offset: Float[Array, " n"]
    steps: Int[Array, ""]

    @staticmethod
    def nowhere(n: int) -> FixedPoint:
        """What a loop over solves of n unknowns begins with."""
        none, zero = jnp.zeros(n), jnp.zeros(())
        return FixedPoint(none, jnp.array(0), zero, zero, zero, zero, none, jnp.array(0))


class Map(NamedTuple):
    """A fixed-point map for `iterate`, in two functions without derivatives.

    `image(x, memory, how, index) -> (F(x), memory)`: `memory` (any pytree) carries what makes the next evaluation
    cheaper, such as inner minimisers; `how` far it may be relied on is `WARM`, `ANEW` (what it holds is a beginning,
    and there may be more) or `COLD` (not at all). `commit(memory, accept)` makes that evaluation count or keeps the
    memory of the one before. `jacobian(x, memory, index)` is dF/dx at the last x that counts. `stale(x, memory)`:
    whether what is known there comes from too far away, so that F has to be evaluated anew before another point is
    compared with x.

    The last `outer` coordinates are those of a maximum that the others adjust to: there F(x) - x rises and falls as the
    slope of what is maximal. `iterate` leaves them where they are; `lorastate.math.maximum.climb` goes uphill.
    """

    image: Callable
    jacobian: Callable
    commit: Callable = lambda memory, accept: memory
    outer: int = 0
    stale: Callable = lambda x, memory: jnp.array(False)


#: How far an evaluation of a `Map` may rely on what is remembered.
WARM, ANEW, COLD = range(3)


#: Residual below which a Jacobian serves to the end of a stage that is not `exact`: it is off by about as much.
_NEAR = 1e-3
#: Picard steps at most that `Method.settle` adds to the first ones.
_SETTLING = 12
#: Growth from which on a solution with outer coordinates repels: its Jacobian is that of a sampled map, known to that.
_REPELS = 1.1


def newton_step(jac: Float[Array, "n n"], residual: Float[Array, " n"], outer: int = 0) -> Float[Array, " n"]:
    """(I - J)^{-1} residual, (n,); the last `outer` coordinates stay."""
    m = len(jac) - outer
    step = small_solve(jnp.eye(m, dtype=jac.dtype) - jac[:m, :m], residual[:m])
    return jnp.concatenate([step, jnp.zeros(outer, step.dtype)])


class _State(NamedTuple):
    x: Any
    image: Any
    memory: Any
    jac: Any
    known: Any  # the last Jacobian that has been computed, where jac may be updated from it
    exact: Any  # whether jac is the Jacobian at x, and not one carried over
    near: Any  # whether jac has been computed since the residual was below `_NEAR`
    stale: Any  # whether F is to be evaluated at x anew
    length: Any  # trial length of the next Newton step; 0 asks for a Picard step
    step: Any
    code: Any
    done: Any
    best: Any  # smallest residual so far, and how many steps ago
    since: Any
    previous: Any  # the point two accepted steps back, for cycles
    before: Any


class Rules(NamedTuple):
    """One stage of a search: the rules of its `Method` as arrays, so that all stages share one compiled loop.

    `index` is handed to the map (e.g. how many replicas it averages). With `exact` every Newton step has a new
    Jacobian; without, the stage starts from the last one, computes it once more near the solution and updates it by
    Broyden's rule.
    """

    tolerance: Any
    max_steps: Any
    burn_in: Any
    damping: Any
    bound: Any
    floor: Any
    index: Any
    settle: Any
    exact: Any

    @staticmethod
    def of(method: Method, index: int = 0, exact: bool = True) -> Rules:
        m = method
        return Rules(
            float(m.tolerance), m.max_steps, m.burn_in, float(m.damping), float(m.bound), float(m.floor), index,
            float(m.settle), exact,
        )  # fmt: skip


def _size(v):
    return jnp.max(jnp.abs(v))


def _residual(fmap: Map, image, x):
    """F(x) - x, zero in the outer coordinates."""
    g = image - x
    return g.at[len(g) - fmap.outer :].set(0.0) if fmap.outer else g


def _early(rules: Rules, step, residual):
    """Whether the next step is a Picard step of the beginning."""
    settling = (residual > rules.settle) & (step < rules.burn_in + _SETTLING)
    return (step < rules.burn_in) | (rules.burn_in < 0) | settling


def _proposed(fmap: Map, rules: Rules, s: _State):
    """The next trial, and whether it is a Picard step. The first pass evaluates at the start itself."""
    g = _residual(fmap, s.image, s.x)
    newton = newton_step(s.jac, g, fmap.outer)
    picard = _early(rules, s.step, _size(g)) | (s.length < 0.02) | ~jnp.all(jnp.isfinite(newton))
    # A Newton step in log or atanh coordinates longer than a few units means nothing: cut it.
    cut = jnp.minimum(1.0, 2.0 / jnp.maximum(_size(newton), 1e-300))
    move = jnp.where(picard, (1.0 - rules.damping) * g, s.length * cut * newton)
    return s.x + jnp.where(s.step < 0, 0.0, move), picard


def broyden(jac, move, change, usable):
    """Broyden's update of the Jacobian."""
    square = move @ move
    new = jac + jnp.outer(change - jac @ move, move) / jnp.where(square > 0, square, 1.0)
    return jnp.where(usable & (square > 0) & jnp.all(jnp.isfinite(new)), new, jac)


def _advanced(fmap: Map, rules: Rules, warm: Any, s: _State) -> _State:
    """One pass: propose, evaluate, accept or not, renew the Jacobian, judge."""
    first, exact = s.step < 0, jnp.asarray(rules.exact)
    trial, picard = _proposed(fmap, rules, s)
    trial = jnp.where(s.stale, s.x, trial)
    how = jnp.where(first & ~warm, COLD, jnp.where(s.stale, ANEW, WARM))
    image, memory = fmap.image(trial, s.memory, how, rules.index)
    finite = jnp.all(jnp.isfinite(image))
    residual, size = _size(_residual(fmap, image, trial)), _size(_residual(fmap, s.image, s.x))
    less = residual < (1.0 - 1e-3 * s.length) * size
    accept = first | s.stale | picard | (finite & less)
    # A rejected step with an old Jacobian says nothing yet about the length: try again with a new one.
    renew = ~accept & ~s.exact
    length = jnp.where(accept, jnp.where(picard, 1.0, jnp.minimum(1.0, 4.0 * s.length)), s.length / 4)
    length = jnp.where(first | s.stale | renew, s.length, length)
    x, memory = jnp.where(accept, trial, s.x), fmap.commit(memory, accept)
    stale = accept & ~s.stale & fmap.stale(x, memory)
    done = accept & finite & ~stale & (residual <= rules.tolerance)
    jac = broyden(s.jac, trial - s.x, image - s.image, accept & ~first & finite)
    close = ~exact & (residual < _NEAR)
    newton_next = ~_early(rules, s.step + 1, residual) & (exact | (close & ~s.near))
    wanted = ((accept & newton_next) | renew | (done & ~(close & s.near))) & jnp.all(jnp.isfinite(x))
    jac = jax.lax.cond(wanted, lambda: fmap.jacobian(x, memory, rules.index), lambda: jac)
    finite = finite & jnp.all(jnp.isfinite(jac))
    improved = residual < 0.9 * s.best
    best = jnp.minimum(s.best, jnp.where(finite, residual, jnp.inf))
    since = jnp.where(improved, 0, s.since + 1)
    moved = _size(x - s.x)
    cycle = accept & (moved > 1e-6) & (_size(x - s.before) < 1e-3 * moved) & (since > 8)
    code = jnp.where(cycle, Code.cycle, s.code)
    # Below the floor a jump is the likely reason, and more steps will not help.
    patience = jnp.where(best < rules.floor, 4, 15 + rules.burn_in)
    code = jnp.where((since > patience) & (rules.burn_in >= 0), Code.stalled, code)
    code = jnp.where(~accept & (length < 0.02) & (size < rules.floor), Code.floor, code)
    code = jnp.where(accept & (_size(x) > rules.bound), Code.diverged, code)
    code = jnp.where(accept & ~finite, Code.nonfinite, code)
    done = done & finite
    return _State(
        x, jnp.where(accept, image, s.image), memory, jac, jnp.where(wanted, jac, s.known),
        wanted | (~accept & s.exact), s.near | (wanted & close), stale, length, s.step + 1,
        jnp.where(done, Code.ok, code), done, best, since, jnp.where(accept, s.before, s.previous),
        jnp.where(accept, s.x, s.before),
    )  # fmt: skip


class Iterated(NamedTuple):
    """What `iterate` returns: the result, F(x), the Jacobian and the memory there."""

    point: FixedPoint
    image: Any
    jacobian: Any
    memory: Any


def iterate(
    fmap: Map, rules: Rules, require_stable: bool, x0: Float[Array, " n"], jac0: Float[Array, "n n"], memory: Any,
    warm: Any = False, near: Any = False,
) -> Iterated:  # fmt: skip
    """Solves x = F(x) by the rules of one stage. If `warm` the memory is that of a point not far from x0, if `near`
    the Jacobian serves to the end."""
    n, dtype = x0.shape[0], x0.dtype
    jac0 = jnp.where(jnp.all(jnp.isfinite(jac0)), jac0, 0.0)  # a stage that failed may have left anything
    inf, no, zero = jnp.full_like(x0, jnp.inf), jnp.array(False), jnp.array(0)
    begin = jnp.where(jnp.all(jnp.isfinite(x0)), int(Code.ok), int(Code.nonfinite))
    start = _State(
        x0, x0, memory, jac0, jac0, no, jnp.array(near), no, jnp.ones((), dtype), jnp.array(-1), begin, no,
        jnp.array(jnp.inf, dtype), zero, inf, inf,
    )  # fmt: skip
    s = jax.lax.while_loop(
        lambda s: ~s.done & (s.code == Code.ok) & (s.step < rules.max_steps),
        lambda s: _advanced(fmap, rules, jnp.array(warm), s),
        start,
    )
    code = jnp.where((s.code == Code.ok) & ~s.done, Code.max_steps, s.code)
    inner, g = s.known[: n - fmap.outer, : n - fmap.outer], _residual(fmap, s.image, s.x)
    (rate, growth), residual = spectral_bounds(inner), _size(g)
    below = residual < rules.floor
    code = jnp.where(below & (code == Code.stalled), int(Code.floor), code)
    code = jnp.where(~below & (code == Code.floor), int(Code.stalled), code)
    if require_stable:
        code = jnp.where(succeeded(code) & ~(growth < (_REPELS if fmap.outer else 1.0)), Code.unstable, code)
    eye = jnp.eye(n - fmap.outer, dtype=dtype)
    inverse = small_solve(eye - inner, eye)
    error = residual * jnp.max(jnp.sum(jnp.abs(inverse), 1))
    offset = jnp.zeros_like(g).at[: len(inner)].set(jnp.abs(inverse @ g[: len(inner)]))
    point = FixedPoint(s.x, code, residual, rate, growth, error, offset, s.step)
    return Iterated(point, s.image, s.known, s.memory)


def plain_map(step: Callable, args, const=None) -> Map:
    """A map x -> step(x, args, const) that remembers nothing."""

    def image(x, memory, *_):
        return step(x, args, const), memory

    def jacobian(x, *_):
        return jax.jacfwd(lambda y: step(y, args, const))(x)

    return Map(image, jacobian)


def search(step: Callable, method: Method, x0: Float[Array, " n"], args, const=None) -> FixedPoint:
    """`fixed_point` without a derivative."""
    x0, args, const = jax.lax.stop_gradient((x0, args, const))
    jac0 = jnp.zeros((x0.shape[0], x0.shape[0]), x0.dtype)
    return iterate(plain_map(step, args, const), Rules.of(method), method.require_stable, x0, jac0, None).point


def fixed_point(step: Callable, method: Method, x0: Float[Array, " n"], args, const=None) -> FixedPoint:
    """Solves x = step(x, args, const).

    `step` is a pure function of x (n,), of `args` (any pytree; every leaf is differentiable) and of `const` (a
    pytree without derivative, e.g. quadrature nodes). `x` is differentiable with respect to `args` in forward and
    reverse mode, to any order and under vmap (see `attach`); the start carries no derivative, and where the solve
    failed the derivative is NaN.

    Never raises: read `code` (see `lorastate.errors.Code`).
    """
    sol = search(step, method, x0, args, const)
    return sol._replace(x=nan_slope(attach(step, 0, sol.x, args, const), succeeded(sol.code)))
