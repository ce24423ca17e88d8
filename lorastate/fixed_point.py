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


@jax.jit
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


@jax.jit
def spectral_radius(jac):
    """max |eigenvalue| of a small matrix; no eigensolver, so it runs under vmap and on a GPU."""
    return jnp.exp(_log_norm_of_power(jac, 10))


@jax.jit
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


WARM, COLD, CHECK = 0, 1, 2


class Map(NamedTuple):
    """A fixed-point map for `iterate`, in two functions without derivatives.

    `image(x, memory, cold, index) -> (F(x), memory, sure)`: `memory` (any pytree) carries what makes the next
    evaluation cheaper, such as inner minimisers. `cold` is `WARM`, `COLD` (do not rely on it) or `CHECK` (nor spare any
    effort); `sure` says that a check would give the same. `commit(memory, accept)` makes that evaluation count or keeps
    the memory of the one before. `jacobian(x, memory, index)` is dF/dx at the last x that counts.
    """

    image: Callable
    jacobian: Callable
    commit: Callable = lambda memory, accept: memory


#: Residual below which a Jacobian serves to the end of a stage that is not `exact`: it is off by about as much.
_NEAR = 1e-3
#: Residual at which a solve whose map may jump is first checked by a cold evaluation.
_CHECKED = 1e-4
#: Picard steps at most that `Method.settle` adds to the first ones.
_SETTLING = 12
#: Distance over which the slope of a map that jumps is measured.
_PROBE = 0.03


class _State(NamedTuple):
    x: Any
    image: Any
    memory: Any
    jac: Any
    known: Any  # the last Jacobian that has been computed, where jac may be updated from it
    exact: Any  # whether jac is the Jacobian at x, and not one carried over
    near: Any  # whether jac has been computed since the residual was below `_NEAR`
    extra: Any  # whether the tolerance has been reached and this is one step more
    length: Any  # trial length of the next Newton step; 0 asks for a Picard step
    step: Any
    code: Any
    done: Any
    cold: Any  # whether the next evaluation is a cold one at x itself: the last check of a solution
    ending: Any  # the code with which the iteration ends after that check if it fails
    target: Any  # residual at which the next check is due
    checked: Any  # residual at the last check that failed
    vain: Any  # checks in a row that failed by as much as the one before
    best: Any  # smallest residual so far, and how many steps ago
    since: Any
    previous: Any  # the point two accepted steps back, for cycles
    before: Any
    probe: Any  # after the end, the coordinate along which the slope is measured; -1 before


class Stage(NamedTuple):
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
    def of(method: Method, index: int = 0, exact: bool = True) -> Stage:
        m = method
        return Stage(
            float(m.tolerance), m.max_steps, m.burn_in, float(m.damping), float(m.bound), float(m.floor), index,
            float(m.settle), exact,
        )  # fmt: skip


def _size(v):
    return jnp.max(jnp.abs(v))


def iterate(fmap: Map, stage: Stage, require_stable: bool, x0, jac0, memory):
    """Solves x = F(x) by the rules of one stage; returns `(FixedPoint, Jacobian, memory)`."""

    n, dtype, exact = x0.shape[0], x0.dtype, jnp.asarray(stage.exact)

    def early(step, residual):
        """Whether the next step is a Picard step of the beginning."""
        settling = (residual > stage.settle) & (step < stage.burn_in + _SETTLING)
        return (step < stage.burn_in) | (stage.burn_in < 0) | settling

    def running(s):
        return ~s.done & (s.code == Code.ok) & (s.step < stage.max_steps)

    def cond(s):
        return jnp.where(s.probe < 0, running(s), s.probe < n)

    def body(s):
        probing = s.probe >= 0
        g = s.image - s.x
        newton = small_solve(jnp.eye(s.x.shape[0], dtype=s.x.dtype) - s.jac, g)
        picard = (1.0 - stage.damping) * g
        use_picard = early(s.step, _size(g)) | (s.length < 0.02) | ~jnp.all(jnp.isfinite(newton))
        # A Newton step in log or atanh coordinates longer than a few units means nothing: cut it.
        cut = jnp.minimum(1.0, 2.0 / jnp.maximum(_size(newton), 1e-300))
        # The first pass evaluates at the start itself: one compiled copy of the map serves the whole loop.
        first, check = s.step < 0, s.cold
        stay = (first | check) & ~probing
        trial = s.x + jnp.where(stay, 0.0, jnp.where(use_picard, picard, s.length * cut * newton))
        trial = jnp.where(probing, s.x + _PROBE * (jnp.arange(n) == s.probe), trial)
        mode = jnp.where(stay, jnp.where(check, CHECK, COLD), WARM)
        image, memory, sure = fmap.image(trial, s.memory, mode, stage.index)
        column = (image - s.image) / _PROBE
        probed = s.known.at[:, s.probe].set(column)
        probed = s._replace(jac=probed, known=probed, probe=s.probe + 1)
        sure = sure | stay
        finite = jnp.all(jnp.isfinite(image))
        residual = _size(image - trial)
        accept = stay | use_picard | (finite & (residual < (1.0 - 1e-3 * s.length) * _size(g)))
        done = accept & finite & sure & (residual <= stage.tolerance)
        # Near the solution steps converge fast: one more makes it the same from wherever it was reached.
        extra = done & ~exact & (residual > 1e-2 * stage.tolerance) & ~s.extra & ~check
        done = (done & ~extra) | (s.extra & ~probing)
        cold = accept & finite & ~sure & (residual <= jnp.maximum(s.target, stage.tolerance))
        # A rejected step with an old Jacobian says nothing yet about the length: try again with a new one.
        renew = ~accept & ~s.exact & ~s.extra
        length = jnp.where(accept, jnp.where(use_picard, 1.0, jnp.minimum(1.0, 4.0 * s.length)), s.length / 4)
        length = jnp.where(stay | renew, s.length, length)
        x = jnp.where(accept, trial, s.x)
        memory = fmap.commit(memory, accept & ~probing)
        move, change = trial - s.x, image - s.image
        square = move @ move
        secant = s.jac + jnp.outer(change - s.jac @ move, move) / jnp.where(square > 0, square, 1.0)
        usable = accept & ~stay & finite & (square > 0) & jnp.all(jnp.isfinite(secant))
        jac = jnp.where(usable, secant, s.jac)
        close = ~exact & (residual < _NEAR)
        newton_next = ~early(s.step + 1, residual) & (exact | (close & ~s.near)) & ~(check & s.exact)
        last = done & ~(check & s.exact) & ~(close & s.near)
        wanted = ((accept & newton_next) | renew | last) & jnp.all(jnp.isfinite(x)) & ~probing
        jac = jax.lax.cond(wanted, lambda: fmap.jacobian(x, memory, stage.index), lambda: jac)
        finite = finite & jnp.all(jnp.isfinite(jac))
        # A check that fails starts the count anew, and the next one is due where it can tell more: at once if the
        # image has changed, at the tolerance if it was only confirmed.
        failed = check & ~done & finite
        changed = residual > 2 * _size(g)
        target = jnp.where(failed, jnp.where(changed, 0.1 * residual, 0.0), s.target)
        # Jumps are felt where checks do not find less and less, twice in a row.
        jumps = failed & changed & (residual > 0.3 * s.checked)
        vain = jnp.where(failed, jnp.where(jumps, s.vain + 1, 0), s.vain)
        checked = jnp.where(failed, residual, s.checked)
        improved = (residual < 0.9 * s.best) | failed
        since = jnp.where(improved, 0, s.since + 1)
        best = jnp.where(failed, residual, jnp.minimum(s.best, jnp.where(finite, residual, jnp.inf)))
        moved = _size(x - s.x)
        cycle = accept & (moved > 1e-6) & (_size(x - s.before) < 1e-3 * moved) & (since > 8)
        ending = jnp.where(cycle, Code.cycle, Code.ok)
        # Below the floor a jump is the likely reason, and more steps will not help.
        patience = jnp.where(best < stage.floor, 5, 15 + stage.burn_in)
        ending = jnp.where((since > patience) & (stage.burn_in >= 0), Code.stalled, ending)
        ending = jnp.where(~accept & (length < 0.02) & (_size(g) < stage.floor), Code.floor, ending)
        # The last word has a cold evaluation, unless the last one was as good.
        ends = (ending != Code.ok) & ~check
        code = jnp.where(ends & sure, ending, s.code)
        # Where the check only confirms what was known, the iteration ends; where it changed the image, it goes on.
        code = jnp.where(failed & (s.ending != Code.ok) & ~changed, s.ending, code)
        code = jnp.where(vain > 1, Code.stalled, code)
        cold = cold | (ends & ~sure)
        code = jnp.where(accept & (_size(x) > stage.bound), Code.diverged, code)
        code = jnp.where(accept & ~finite, Code.nonfinite, code)
        new = _State(
            x,
            jnp.where(accept, image, s.image),
            memory,
            jac,
            jnp.where(wanted, jac, s.known),
            wanted | (~accept & s.exact) | (check & s.exact),
            s.near | (wanted & close),
            extra,
            length,
            s.step + 1,
            jnp.where(done & finite, Code.ok, code),
            done & finite,
            cold,
            jnp.where(ends & ~sure, ending, Code.ok),
            target,
            checked,
            vain,
            best,
            since,
            jnp.where(accept, s.before, s.previous),
            jnp.where(accept, s.x, s.before),
            s.probe,
        )
        # A map that jumps changes by more than its smooth part: its slope is measured over a finite distance.
        felt = (new.code == Code.stalled) | (new.code == Code.floor)
        new = new._replace(probe=jnp.where(felt & check, 0, s.probe))
        small = (probed._replace(memory=None), new._replace(memory=None))
        return jax.tree_util.tree_map(lambda a, b: jnp.where(probing, a, b), *small)._replace(memory=memory)

    inf, no, far, zero = jnp.full_like(x0, jnp.inf), jnp.array(False), jnp.array(jnp.inf, dtype), jnp.array(0)
    start = _State(
        x0, x0, memory, jac0, jac0, no, no, no, jnp.ones((), dtype), jnp.array(-1),
        jnp.where(jnp.all(jnp.isfinite(x0)), int(Code.ok), int(Code.nonfinite)),
        no, no, jnp.array(int(Code.ok)), jnp.array(_CHECKED, dtype), far, zero, far, zero, inf, inf, jnp.array(-1),
    )  # fmt: skip
    s = jax.lax.while_loop(cond, body, start)
    code = jnp.where((s.code == Code.ok) & ~s.done & ~s.extra, Code.max_steps, s.code)
    growth = spectral_abscissa(s.known)
    residual = _size(s.image - s.x)
    below = residual < stage.floor
    code = jnp.where(below & (code == Code.stalled), int(Code.floor), code)
    code = jnp.where(~below & (code == Code.floor), int(Code.stalled), code)
    if require_stable:
        code = jnp.where(succeeded(code) & ~(growth < 1.0), Code.unstable, code)
    eye = jnp.eye(n, dtype=dtype)
    error = residual * jnp.max(jnp.sum(jnp.abs(small_solve(eye - s.known, eye)), 1))
    return FixedPoint(s.x, code, residual, spectral_radius(s.known), growth, error, s.step), s.known, s.memory


def plain_map(step: Callable, args, const=None) -> Map:
    """A map x -> step(x, args, const) that remembers nothing."""

    def image(x, memory, *_):
        return step(x, args, const), memory, True

    def jacobian(x, *_):
        return jax.jacfwd(lambda y: step(y, args, const))(x)

    return Map(image, jacobian)


def search(step: Callable, method: Method, x0, args, const=None) -> FixedPoint:
    """`fixed_point` without a derivative."""
    x0, args, const = jax.lax.stop_gradient((x0, args, const))
    jac0 = jnp.zeros((x0.shape[0], x0.shape[0]), x0.dtype)
    return iterate(plain_map(step, args, const), Stage.of(method), method.require_stable, x0, jac0, None)[0]


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


def sensitivity(step: Callable, x, args, const=None):
    """dx/dargs of the fixed point `x`, shaped like `args` with a leading axis (n,): the rule of `attach`, written out.

    One compiled derivative of `step` where `jacfwd` of `attach` has two; for scalar leaves and first derivatives.
    """
    by_x, by_args = jax.jacfwd(lambda x, a: step(x, a, const), argnums=(0, 1))(x, args)
    gap = jnp.eye(x.shape[0], dtype=x.dtype) - by_x
    return jax.tree_util.tree_map(lambda j: small_solve(gap, j), by_args)


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
