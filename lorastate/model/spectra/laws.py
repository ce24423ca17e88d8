"""General laws of the base teacher: free sums of Wishart matrices, given eigenvalues, power laws.

Every law here is that of ``S = A + sum_i c_i W_i``, free, with W_i Wishart of rank ratio kappa_i and A a matrix whose
Stieltjes transform G_A is explicit (A = 0 for a sum of Wisharts). R-transforms add, so with ``mu_delta = law of S +
delta * (semicircle of variance 1)`` and the subordination variable u,

    g = G_A(u),    z(u) = u + R(G_A(u)),    R(g) = delta^2 g + sum_i c_i kappa_i / (sqrt(kappa_i) - c_i g)

(arXiv:2509.24914 has one Wishart; a sum of two makes ``z(u) = x`` a quartic in g = 1/u). Three facts carry the module.

1. ``z(u) = u - N(u)`` with N a Pick function (``Im N >= 0`` where ``Im u >= 0``), so the solution u(x + i0) lies on the
   curve ``u = a + i v(a)``, where v(a) = 0 if ``N'(a) <= 1`` and else solves ``Im N / v = 1``; ``x(a) = z(a + i v(a))``
   increases with a. Two nested monotone equations: nothing is selected among roots, and band edges are as well
   conditioned as they can be.
2. z and G_A are analytic above the real axis, so integrals over mu_delta above eps are contour integrals from
   ``u_e = u(eps + i0)`` to any real point right of all singularities: spectral accuracy, also where poles meet.
3. The contour integrand of J vanishes to third order at u_e: u_e and the contour are constants under differentiation.

All functions are elementwise in delta >= 0 (0: the limit 0+), x, eps, broadcast, and run under jit, vmap and
differentiation anywhere.
"""

from __future__ import annotations

import abc
from collections.abc import Iterable
from functools import partial
from typing import Any, ClassVar, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.typing import ArrayLike

from ...errors import SettingError, is_concrete, require_float64
from ...validation import real
from . import wishart as spectrum
from .wishart import BandNodes, density_of, limit

_NODES = 72  # Gauss-Legendre nodes on the contour
_LOG_NODES = 40  # and on the support of a power law
_PANELS = 8  # panels of the curve there


def _gauss_legendre(n: int) -> tuple[np.ndarray, np.ndarray]:
    """Nodes and weights on [0, 1]."""
    x, w = np.polynomial.legendre.leggauss(n)
    return (x + 1) / 2, w / 2


def prepare(*args: ArrayLike) -> tuple[Array, ...]:
    """Broadcast to one shape and one floating dtype."""
    dtype = jnp.result_type(float, *args)
    return tuple(jnp.broadcast_arrays(*(jnp.asarray(v, dtype) for v in args)))


# ---- the map z(u) ----------------------------------------------------------------------------------------------


class _Form(NamedTuple):
    """``factor * law + shift + sum_i c_i Wishart(kappa_i)``: what all general laws reduce to."""

    factor: Array
    law: Any
    shift: Array
    c: Array
    kappa: Array


class _Point(NamedTuple):
    """``g = G_A(u)``, ``dg = G_A'(u)``, ``r = R(g)`` and ``dr = dR(G_A(u))/du``, so that z = u + r and z' = 1 + dr."""

    g: Array
    dg: Array
    r: Array
    dr: Array


def _at(form: _Form, delta: Array, u: Array) -> _Point:
    g, dg = form.law._transform(u, form.factor)
    v = 1 / (jnp.sqrt(form.kappa) - form.c * g[..., None])
    r = delta**2 * g + form.shift + jnp.sum(form.c * form.kappa * v, -1)
    slope = delta**2 + jnp.sum(form.c**2 * form.kappa * v * v, -1)
    return _Point(g, dg, r, slope * dg)


def _variance(form: _Form, delta: Array) -> Array:
    """Mass of the measure of N: the variance of everything but A."""
    return delta**2 + jnp.sum(form.c**2)


# ---- the solution u(x + i0) ------------------------------------------------------------------------------------


def _stretch(form: _Form, delta: Array, a: Array) -> Array:
    """``N'(a)`` at real a off the singularities: mu_delta has density at z(a) unless it is at most 1."""
    slope = -jnp.real(_at(form, delta, lax.complex(a, jnp.zeros_like(a))).dr)
    return jnp.where(form.law._covers(a, form.factor), jnp.inf, slope)


def _lift(form: _Form, delta: Array, a: Array, guess: Array) -> Array:
    """v(a) >= 0 of the curve ``Im z(a + i v) = 0``, from a guess of v.

    With S = Im N / v, 1/S is concave and increasing in y = v^2: Newton steps for 1/S = 1 approach from the left.
    """
    top = _variance(form, delta)
    inside = ~(_stretch(form, delta, a) <= 1)
    y = jnp.clip(guess * guess, 1e-24 * top, top)

    def advance(state):
        y, going, k = state
        v = jnp.sqrt(y)
        p = _at(form, delta, lax.complex(a, v))
        s = -jnp.imag(p.r) / v
        slope = jnp.maximum((s + jnp.real(p.dr)) / (2 * y * s * s), 1 / top)  # at least its limit at infinity
        f = 1 / s - 1
        new = jnp.clip(y - f / slope, y / 100, top)
        new = jnp.where(going, new, y)
        noise = 1e-15 * (1 + jnp.abs(p.r) / v) if form.law._wide else 1e-15
        return new, going & (jnp.abs(new - y) > 1e-7 * y) & (jnp.abs(f) > noise), k + 1

    y, _, _ = lax.while_loop(lambda s: jnp.any(s[1]) & (s[2] < 40), advance, (y, inside, 0))
    return jnp.where(inside, jnp.sqrt(y), 0.0)


def _locate(form: _Form, x: Array, delta: Array) -> Array:
    """u(x + i0): bracketed Newton steps along the curve, then free ones where u is not real."""
    form, x, delta = lax.stop_gradient((form, x, delta))
    tau = jnp.sqrt(_variance(form, delta))
    middle = x - form.shift - jnp.sum(form.c * jnp.sqrt(form.kappa))  # |N| <= tau sqrt(S) about it, and S <= 1
    low, high = middle - tau, middle + tau

    def advance(state):
        low, high, a, v, width, going, k = state
        v_new = _lift(form, delta, a, v)
        u = lax.complex(a, v_new)
        p = _at(form, delta, u)
        miss = x - jnp.real(u + p.r)
        low_new, high_new = jnp.where(miss >= 0, a, low), jnp.where(miss <= 0, a, high)
        slope = jnp.where(v_new > 0, 1 + p.dr, 1 + jnp.real(p.dr))
        step = jnp.where(slope == 0, jnp.inf, miss / jnp.where(slope == 0, 1.0, slope))
        a_new = a + jnp.real(step)
        # Bisect where the step leaves the bracket, and wherever two steps have not halved it.
        slow = (k % 3 == 2) & (high_new - low_new > width / 2)
        a_new = jnp.where((a_new > low_new) & (a_new < high_new) & ~slow, a_new, (low_new + high_new) / 2)
        width = jnp.where(k % 3 == 2, high_new - low_new, width)
        size = jnp.abs(u) + 1e-300
        near = jnp.where(v_new > 0, jnp.abs(step) < 1e-7 * v_new, jnp.abs(a_new - a) <= 4e-16 * size)
        near |= jnp.abs(miss) <= 2e-16 * (size + jnp.abs(p.r))
        done = near | (high_new - low_new <= 4e-16 * size)
        keep = lambda new, old: jnp.where(going, new, old)  # noqa: E731
        a_next = jnp.where(done, a, a_new)  # v belongs to a, and on an edge the step is noise
        v_next = jnp.where(done | ~jnp.isfinite(step), v_new, jnp.abs(v_new + jnp.imag(step)))
        out = keep(low_new, low), keep(high_new, high), keep(a_next, a), keep(v_next, v)
        return (*out, keep(width, width), going & ~done, k + 1)

    going = jnp.isfinite(x) & jnp.isfinite(tau)
    start = (low, high, middle, tau / 2, 2 * tau, going, 0)
    _, _, a, v, _, _, _ = lax.while_loop(lambda s: jnp.any(s[5]) & (s[6] < 150), advance, start)

    def polish(_, av):
        a, v = av
        u = lax.complex(a, jnp.where(v > 0, v, 1.0))
        p = _at(form, delta, u)
        step = (x - u - p.r) / (1 + p.dr)
        good = (v > 0) & (jnp.abs(step) < v / 4)  # a larger one is rounding noise of two colliding roots
        return jnp.where(good, a + jnp.real(step), a), jnp.where(good, v + jnp.imag(step), v)

    a, v = lax.fori_loop(0, 2, polish, (a, v))
    bad = ~going
    return lax.complex(jnp.where(bad, jnp.nan, a), jnp.where(bad, jnp.nan, v))


@jax.custom_jvp
def _subordinate(form: _Form, x: Array, delta: Array) -> Array:
    return _locate(form, x, delta)


@_subordinate.defjvp
def _subordinate_jvp(primals, tangents):
    form, x, delta = primals
    dform, dx, ddelta = tangents
    u = _subordinate(form, x, delta)
    _, dr = jax.jvp(lambda f, d: _at(f, d, u).r, (form, delta), (dform, ddelta))
    return u, (dx.astype(u.dtype) - dr) / (1 + _at(form, delta, u).dr)


# ---- integrals over mu_delta above eps -------------------------------------------------------------------------


def _sides(form: _Form, u: Array, g: Array) -> tuple[Array, Array]:
    """Whether u is real and left, real and right of every singularity."""
    low, high = form.law._cover(form.factor)
    plain = (jnp.imag(u) == 0) & jnp.all(form.c * jnp.real(g)[..., None] < jnp.sqrt(form.kappa), -1)
    return plain & (jnp.real(u) < jnp.min(low)), plain & (jnp.real(u) > jnp.max(high))


def _contour(form: _Form, delta: Array, u: Array) -> tuple[Array, Array]:
    """Nodes and weights, (..., n), of an arc above the axis from u to a real point right of all singularities.

    A half circle over the chord, graded towards u, whose nearest singularity is at distance d: uniform accuracy in d.
    """
    form, delta = lax.stop_gradient((form, delta))
    low, high = form.law._cover(form.factor)
    ends = jnp.concatenate([low, high])
    p = _at(form, delta, u)
    pole = jnp.abs(jnp.sqrt(form.kappa) - form.c * p.g[..., None]) / jnp.abs(form.c * p.dg[..., None])
    d = jnp.minimum(jnp.min(jnp.abs(u[..., None] - ends), -1), jnp.min(pole, -1, initial=jnp.inf))
    last = jnp.max(high) + jnp.max(form.c / jnp.sqrt(form.kappa), initial=0.0)
    reach = jnp.maximum(last - jnp.real(u), 0.0) + jnp.sqrt(_variance(form, delta))
    stop = jnp.maximum(jnp.real(u), last) + reach
    grade = jnp.log1p(2 * reach / jnp.maximum(d, 1e-14 * reach))[..., None]
    node, weight = (jnp.asarray(w, d.dtype) for w in _gauss_legendre(_NODES))
    t = jnp.expm1(grade * node) / jnp.expm1(grade)
    dt = weight * grade * jnp.exp(grade * node) / jnp.expm1(grade)
    chord, turn = (stop - u)[..., None], 1 / lax.complex(1 - t, t)
    return u[..., None] + 1j * t * turn * chord, 1j * dt * turn * turn * chord


def _moment(form: _Form, delta: Array, eps: Array, u: Array, power: int) -> Array:
    """``int_{x > eps} (x - eps)^k mu_delta(dx) = Im int (z - eps)^(k+1) G_A'(u) du / ((k+1) pi)``, from u = u_e."""
    node, weight = _contour(form, delta, u)
    p = _at(form, delta[..., None], node)
    f = (node + p.r - eps[..., None]) ** (power + 1) * p.dg
    return jnp.sum(jnp.imag(weight * f), -1) / ((power + 1) * jnp.pi)


@jax.jit
def _J(law: BaseLaw, delta: ArrayLike, eps: ArrayLike) -> Array:
    delta, eps = prepare(delta, eps)
    delta = limit(delta)
    form = _form(law)
    u = lax.stop_gradient(_locate(form, eps, delta))
    left, right = _sides(form, u, _at(form, delta, u).g)
    whole = (law.mean - eps) ** 2 + law.variance + delta**2
    # On either side the contour is replaced by a harmless one: its derivatives must be finite.
    inner = jnp.where(left | right, u + 1j * jnp.sqrt(_variance(form, delta)), u)
    j = _moment(form, delta, eps, lax.stop_gradient(inner), 2)
    return jnp.where(left, whole, jnp.where(right, 0.0, j))


def _tail(form: _Form, eps: Array, delta: Array, u: Array) -> Array:
    left, right = (lax.stop_gradient(s) for s in _sides(form, u, _at(form, delta, u).g))
    inner = jnp.where(left | right, u + 1j * jnp.sqrt(_variance(form, delta)), u)
    tail = _moment(form, delta, eps, inner, 0)
    return jnp.where(left, 1.0, jnp.where(right, 0.0, tail))


@jax.custom_jvp
def _mass(form: _Form, eps: Array, delta: Array) -> Array:
    return jnp.clip(1 - _tail(form, eps, delta, _locate(form, eps, delta)), 0, 1)


@_mass.defjvp
def _mass_jvp(primals, tangents):
    # The integrand vanishes at u_e: explicit partials only. Taking them on a contour from the differentiable u_e makes
    # the second and higher derivatives right too.
    u = _subordinate(*primals)
    _, dtail = jax.jvp(lambda f, e, d: _tail(f, e, d, u), primals, tangents)
    return _mass(*primals), -dtail


# ---- bands -----------------------------------------------------------------------------------------------------


def _bisect(rises: Any, low: Array, high: Array) -> Array:
    """Where the sign changes: `rises(mid)` says whether that is right of mid."""

    def halve(_, bracket):
        lo, hi = bracket
        mid = (lo + hi) / 2
        up = rises(mid)
        return jnp.where(up, mid, lo), jnp.where(up, hi, mid)

    low, high = lax.fori_loop(0, 58, halve, (low, high))
    return (low + high) / 2


def _islands(form: _Form) -> tuple[Array, Array]:
    """Ends, ascending, of the pieces of the real axis where N is not analytic: one or more in each band of mu_delta.

    Those of G_A, and the poles ``c_i g = sqrt(kappa_i)`` of R: one right of each piece of G_A (left of it for c_i < 0).
    """
    low, high = form.law._cover(form.factor)
    order = jnp.argsort(low)
    low, high = low[order], high[order]
    reach = (form.c / jnp.sqrt(form.kappa))[:, None]
    left = jnp.where(reach < 0, jnp.concatenate([low[:1], high[:-1]]), high)
    left = left.at[:, 0].add(jnp.minimum(reach[:, 0], 0.0))
    right = jnp.where(reach < 0, low, jnp.concatenate([low[1:], high[-1:]]))
    right = right.at[:, -1].add(jnp.maximum(reach[:, 0], 0.0))

    def rises(a):
        g = jnp.real(form.law._transform(lax.complex(a, jnp.zeros_like(a)), form.factor)[0])
        excess = form.c[:, None] * g - jnp.sqrt(form.kappa)[:, None]
        return jnp.where(reach < 0, excess < 0, excess > 0)

    poles = _bisect(rises, left, right).ravel()
    low, high = jnp.concatenate([low, poles]), jnp.concatenate([high, poles])
    order = jnp.argsort(low)
    return low[order], high[order]


class _Bands(NamedTuple):
    """The curve over the support, cut into panels.

    `ends` a of the panels, (..., P, 2); `edges`, critical points of z where N' = 1, (..., 2 E), those that `exists`.
    """

    ends: Array
    edges: Array
    exists: Array


def _bands(form: _Form, delta: Array) -> _Bands:
    """Panels end at band edges, at singularities of N, and where N' is smallest between two of these without a gap.

    The edge of a gap about to open, or a light pole, is then next to the end of a panel, where nodes cluster.
    """
    fixed, d = lax.stop_gradient((form, delta[..., None]))
    low, high = _islands(fixed)
    tau = jnp.sqrt(_variance(fixed, d)) * (1 + 1e-12)
    stretch = partial(_stretch, fixed, d)
    shape = (*delta.shape, low.size - 1)
    left, right = jnp.broadcast_to(high[:-1], shape), jnp.broadcast_to(low[1:], shape)
    # N' is convex between two singularities: its minimum says whether there is a gap.
    bottom = _bisect(lambda a: jax.jvp(stretch, (a,), (jnp.ones_like(a),))[1] < 0, left, right)
    gap = stretch(bottom) < 1
    # All ends at once: where the stretch falls to 1 (right ends) or climbs above it (left ends).
    low0, high0 = jnp.broadcast_to(low[:1], d.shape), jnp.broadcast_to(high[-1:], d.shape)
    lower, upper = (
        jnp.concatenate([low0 - tau, bottom, left, high0], -1),
        jnp.concatenate([low0, right, bottom, high0 + tau], -1),
    )
    start = np.arange(lower.shape[-1]) < low.size
    ends = _bisect(lambda a: (stretch(a) > 1) != start, lower, upper)
    first, climbs, falls, last = jnp.split(ends, [1, low.size, 2 * low.size - 1], -1)
    yes = jnp.ones((*delta.shape, 1), bool)
    from_, to = jnp.concatenate([yes, gap], -1), jnp.concatenate([gap, yes], -1)
    exists = jnp.concatenate([from_, to], -1)
    a = jnp.concatenate([first, jnp.where(gap, climbs, first), jnp.where(gap, falls, first), last], -1)
    # One Newton step from a constant: no change in value, but it carries the derivative.
    there = lambda a: _stretch(form, delta[..., None], a)  # noqa: E731
    value, slope = jax.jvp(there, (a,), (jnp.ones_like(a),))
    a = a - (value - 1) / jnp.where(slope == 0, 1.0, slope)
    start, stop = jnp.split(a, 2, -1)
    start = jnp.where(from_, start, jnp.concatenate([first, bottom], -1))
    stop = jnp.where(to, stop, jnp.concatenate([bottom, last], -1))
    low, high = jnp.broadcast_to(low, start.shape), jnp.broadcast_to(high, start.shape)
    panels = [jnp.stack([start, low], -1), jnp.stack([high, stop], -1)]
    if form.law._wide:
        panels.append(_within(fixed, lax.stop_gradient(delta)))
    return _Bands(jnp.concatenate(panels, -2), a, exists)


def _within(form: _Form, delta: Array) -> Array:
    """Panels inside the support of A, (..., P, 2), with equal changes of log v: it falls from a bulk to its tail."""
    shape = (*delta.shape, 97)
    t = jnp.broadcast_to(jnp.linspace(0.0, 1.0, shape[-1]), shape)
    d = jnp.broadcast_to(delta[..., None], shape)
    target = np.linspace(0, 1, shape[-1])
    inverse = jnp.vectorize(lambda f, t: jnp.interp(target, f, t), signature="(n),(n)->(n)")

    def spread(_, t):
        a = form.law._inner(t, form.factor)
        change = jnp.abs(jnp.diff(jnp.log(_lift(form, d, a, jnp.sqrt(_variance(form, d)) / 2))))
        total = jnp.maximum(jnp.sum(change, -1, keepdims=True), 1.0)
        fraction = jnp.cumsum(change / total + jnp.diff(t), -1)
        fraction = jnp.concatenate([jnp.zeros_like(fraction[..., :1]), fraction], -1) / fraction[..., -1:]
        return inverse(fraction, t)

    t = lax.fori_loop(0, 3, spread, t)
    a = jnp.sort(form.law._inner(t[..., :: (shape[-1] - 1) // _PANELS], form.factor), -1)
    return jnp.stack([a[..., :-1], a[..., 1:]], -1)


def _curve(form: _Form, delta: Array, a: Array, guess: Array) -> tuple[Array, Array, Array]:
    """``x(a)``, density and ``dx/da`` on the curve; differentiable (two Newton steps carry orders one to three)."""
    v = lax.stop_gradient(_lift(*lax.stop_gradient((form, delta, a, guess))))
    live = v > 0
    v = jnp.where(live, v, 1.0)
    for _ in range(2):
        u = lax.complex(a, v)
        p = _at(form, delta, u)
        slope = 1 + jnp.real(p.dr)
        step = jnp.imag(u + p.r) / jnp.where(slope == 0, 1.0, slope)
        noise = jnp.abs(step) > v / 4
        v = jnp.where(live, v - jnp.where(noise, step - lax.stop_gradient(step), step), 1.0)
    u = lax.complex(a, v)
    p = _at(form, delta, u)
    slope = jnp.real(1 + p.dr)
    rise = (slope**2 + jnp.imag(p.dr) ** 2) / jnp.where(slope > 0, slope, 1.0)
    rise = jnp.where(slope > 0, jnp.minimum(rise, 2.0), 0.0)  # |z'|^2 <= 2 Re z' on the curve (Cauchy-Schwarz)
    return jnp.real(u + p.r), jnp.where(live, -jnp.imag(p.g) / jnp.pi, 0.0), jnp.where(live, rise, 0.0)


@partial(jax.jit, static_argnames="n")
def _band_nodes(law: BaseLaw, delta: ArrayLike, n: int) -> BandNodes:
    (delta,) = prepare(delta)
    delta = limit(delta)
    form = _form(law)
    ends = _bands(form, delta).ends
    node, weight = _gauss_legendre(n)
    sine, drop = (jnp.asarray(f, delta.dtype) for f in (np.sin(np.pi * node), 2 * np.sin(np.pi / 2 * node) ** 2))
    half = ((ends[..., 1] - ends[..., 0]) / 2)[..., None]
    a = ends[..., 0, None] + half * drop
    x, rho, rise = _curve(form, delta[..., None, None], a, half * sine)
    w = rho * rise * half * sine * (np.pi * weight)
    return BandNodes(*(f.reshape(*delta.shape, -1) for f in (x, w, rho)))


@jax.jit
def _edges(law: BaseLaw, delta: ArrayLike) -> Array:
    (delta,) = prepare(delta)
    delta = limit(delta)
    form = _form(law)
    bands = _bands(form, delta)
    x = bands.edges + jnp.real(_at(form, delta[..., None], bands.edges + 0j).r)
    return jnp.sort(jnp.where(bands.exists, x, jnp.nan), -1)


@partial(jax.jit, static_argnames="n")
def _pair_response(law: BaseLaw, delta: ArrayLike, eps: ArrayLike, n: int) -> Array:
    delta, eps = prepare(delta, eps)
    delta = limit(delta)
    form = _form(law)
    ends = _bands(form, delta).ends
    d, e = delta[..., None], eps[..., None]
    a0, a1 = ends[..., 0], ends[..., 1]
    # Off the support u_e is real and in no panel; it is replaced, as its derivative diverges at the edges.
    u = lax.stop_gradient(_locate(form, eps, delta))
    spare = _curve(form, delta, (a0[..., 0] + a1[..., 0]) / 2, a1[..., 0] - a0[..., 0])[0]
    cut = _subordinate(form, jnp.where(jnp.imag(u) > 0, eps, lax.stop_gradient(spare)), delta)
    cut = jnp.clip(jnp.where(jnp.imag(u) > 0, jnp.real(cut), jnp.real(u))[..., None], a0, a1)
    tau, step = np.linspace(-3, 3, n, retstep=True)  # the rule's end weights are 1e-13 there
    slope = step * np.pi * np.cosh(tau) / (2 * np.cosh(np.pi / 2 * np.sinh(tau))) ** 2
    phi, dphi = jnp.asarray([1 / (1 + np.exp(-np.pi * np.sinh(tau))), slope], cut.dtype)

    def side(end: Array) -> tuple[Array, Array]:
        """Distance from eps and weight, (..., B n)."""
        length = (end - cut)[..., None]
        x, rho, rise = _curve(form, d[..., None], cut[..., None] + length * phi, (a1 - a0)[..., None] / 4 + 0 * phi)
        weight = rho * rise * jnp.abs(length) * dphi
        flat = (*delta.shape, -1)
        return jnp.abs(x - e[..., None]).reshape(flat), weight.reshape(flat)

    (r, wr), (s, ws) = side(a1), side(a0)
    total = r[..., :, None] + s[..., None, :]
    share = r[..., :, None] / jnp.where(total > 0, total, 1.0)
    mixed = jnp.einsum("...i,...j,...ij->...", wr, ws, share * share)
    return (1 - _mass(form, eps, delta)) ** 2 + 2 * mixed


# ---- the laws --------------------------------------------------------------------------------------------------


class BaseLaw(eqx.Module):
    """Law of the eigenvalues of a symmetric matrix S; ``mu_delta = law of S + delta * (semicircle of variance 1)``.

    Continuous parameters are leaves. All methods are elementwise in delta >= 0 and x or eps (broadcast); leaves are
    scalars (vectors for atoms): map over laws with `jax.vmap`.
    """

    @property
    @abc.abstractmethod
    def mean(self) -> Array:
        """``Tr S / D``."""

    @property
    @abc.abstractmethod
    def variance(self) -> Array:
        """``Tr S^2 / D - (Tr S / D)^2``."""

    @property
    def second_moment(self) -> Array:
        """``Tr S^2 / D``."""
        return self.variance + self.mean**2

    @abc.abstractmethod
    def stieltjes(self, x: ArrayLike, delta: ArrayLike) -> Array:
        """``g(x + i0) = int mu_delta(dt) / (x + i0 - t)``, complex, ``Im g <= 0``; real off the support."""

    @abc.abstractmethod
    def J(self, delta: ArrayLike, eps: ArrayLike) -> Array:
        """``J(delta, eps) = int_{x > eps} (x - eps)^2 mu_delta(dx)``.

        ``(mean - eps)^2 + variance + delta^2`` left of the support, exactly 0 right of it. Derivatives through the
        third order, in delta, eps and every leaf, are exact and finite everywhere; higher ones would miss terms.
        """

    @abc.abstractmethod
    def mass_below(self, eps: ArrayLike, delta: ArrayLike) -> Array:
        """Spectral mass ``F_delta(eps) = mu_delta((-inf, eps])``, in [0, 1]."""

    @abc.abstractmethod
    def edges(self, delta: ArrayLike) -> Array:
        """Band edges of mu_delta, ascending and nan-padded, (..., 2 B): left, right, left, right, ..."""

    @abc.abstractmethod
    def band_nodes(self, delta: ArrayLike, n: int = 64) -> BandNodes:
        """Nodes x, weights w and density, (..., B n): ``sum w f(x) = int f dmu_delta``, spectrally accurate, f smooth.

        n nodes on B panels (the bands of one Wishart; else two a singularity of N, eight more on the support
        of a power law): 1e-13 at n = 64; where a steep power law turns into its tail, 1e-7. Not in the order of x.
        """

    @abc.abstractmethod
    def pair_response(self, delta: ArrayLike, eps: ArrayLike, n: int = 64) -> Array:
        """``int int ((r(x) - r(y)) / (x - y))^2 mu_delta(dx) mu_delta(dy)``, ``r(x) = ReLU(x - eps)``.

        The spectral factor of the stability (replicon) condition (arXiv:2509.24914): 1 left of the support, 0 right of
        it. n double-exponential nodes a panel and side of eps: about 1e-7 at n = 64. Memory (B n)^2 per setting.
        """

    def density(self, x: ArrayLike, delta: ArrayLike) -> Array:
        """Density ``-Im g(x + i0) / pi`` of mu_delta; exactly 0 off the support, infinite at an atom."""
        return density_of(self.stieltjes(x, delta), delta)


class Wishart(BaseLaw):
    """``W W^T / sqrt(P D)``, entries N(0, 1), of rank ratio ``kappa0 = P / D > 0``; closed forms of `spectrum`."""

    kappa0: Any

    def __init__(self, kappa0):
        require_float64()
        self.kappa0 = real("wishart.kappa0", kappa0, "kappa0 > 0", 0.0, vector=True)

    @property
    def mean(self):
        return jnp.sqrt(self.kappa0)

    @property
    def variance(self):
        return jnp.ones_like(self.kappa0)

    @property
    def second_moment(self):
        return 1.0 + self.kappa0

    def stieltjes(self, x, delta):
        return spectrum.stieltjes(x, delta, self.kappa0)

    def J(self, delta, eps):
        return spectrum.J(delta, eps, self.kappa0)

    def mass_below(self, eps, delta):
        return spectrum.mass_below(eps, delta, self.kappa0)

    def edges(self, delta):
        return spectrum.edges(delta, self.kappa0)

    def band_nodes(self, delta, n=64):
        return spectrum.band_nodes(delta, self.kappa0, n)

    def pair_response(self, delta, eps, n=64):
        return spectrum.pair_response(delta, eps, self.kappa0, n)


class _General(BaseLaw):
    """A law that reduces to a `_Form`."""

    def stieltjes(self, x, delta):
        return _stieltjes(self, x, delta)

    def J(self, delta, eps):
        return _J(self, delta, eps)

    def mass_below(self, eps, delta):
        return _mass_below(self, eps, delta)

    def edges(self, delta):
        return _edges(self, delta)

    def band_nodes(self, delta, n=64):
        return _band_nodes(self, delta, n)

    def pair_response(self, delta, eps, n=64):
        return _pair_response(self, delta, eps, n)


@jax.jit
def _stieltjes(law: BaseLaw, x: ArrayLike, delta: ArrayLike) -> Array:
    x, delta = prepare(x, delta)
    delta = limit(delta)
    form = _form(law)
    u = _subordinate(form, x, delta)
    g = _at(form, delta, u).g
    return jnp.where(jnp.imag(u) == 0, jnp.real(g) + 0j, g)


@jax.jit
def _mass_below(law: BaseLaw, eps: ArrayLike, delta: ArrayLike) -> Array:
    eps, delta = prepare(eps, delta)
    delta = limit(delta)
    return _mass(_form(law), eps, delta)


class Atoms(_General):
    """Eigenvalues `values`, (K,), with `weights`, (K,) > 0, that sum to one.

    The weights are divided by their sum wherever they are used: a derivative in one is along the simplex.
    """

    weights: Any
    values: Any

    def __init__(self, weights, values):
        require_float64()
        self.weights = real("atoms.weights", weights, "weights > 0", 0.0, vector=True)
        self.values = real("atoms.values", values, "real values", -np.inf, vector=True)
        if self.weights.ndim != 1 or self.weights.shape != self.values.shape or not self.weights.size:
            raise SettingError(
                f"atoms.weights and atoms.values have shapes {self.weights.shape} and {self.values.shape}; "
                "allowed: two vectors of one length, at least 1"
            )
        if is_concrete(self.weights) and abs(float(jnp.sum(self.weights)) - 1) > 1e-9:
            raise SettingError(f"atoms.weights sum to {float(jnp.sum(self.weights))!r}; allowed: 1 to within 1e-9")

    def eigenvalues(self, dimension: int) -> np.ndarray:
        """Eigenvalues of one matrix of that size: the quantiles at (k + 1/2) / dimension."""
        places = (np.arange(dimension) + 0.5) / dimension
        order = np.argsort(self.values)
        steps = np.cumsum(np.asarray(self.weights)[order])
        return np.asarray(self.values)[order][np.minimum(np.searchsorted(steps, places), len(steps) - 1)]

    @property
    def _shares(self):
        return self.weights / jnp.sum(self.weights)

    @property
    def mean(self):
        return jnp.sum(self._shares * self.values)

    @property
    def variance(self):
        return jnp.sum(self._shares * (self.values - self.mean) ** 2)

    def _transform(self, u, factor):
        pole = 1 / (u[..., None] - factor * self.values)
        share = self._shares * pole
        return jnp.sum(share, -1), -jnp.sum(share * pole, -1)

    _wide: ClassVar[bool] = False

    def _cover(self, factor):
        x = factor * self.values
        return x, x

    def _covers(self, a, factor):
        return jnp.zeros_like(a, bool)


class PowerLaw(_General):
    """Eigenvalues of density proportional to ``x^-(1 + s)`` on [low, high], 0 < low < high; `exponent` s is any real.

    ``P(eigenvalue > x) ~ x^-s`` up to the cut at high: the k-th largest eigenvalue falls as ``k^-gamma``, gamma = 1 / s
    (`PowerLaw.ranked`). s = 0 is flat in log x, s = -1 flat in x.
    """

    exponent: Any
    low: Any
    high: Any

    _wide: ClassVar[bool] = True

    def __init__(self, exponent, low, high):
        require_float64()
        self.exponent = real("power_law.exponent", exponent, "a real number", -np.inf)
        self.low = real("power_law.low", low, "low > 0", 0.0)
        self.high = real("power_law.high", high, "high > low", 0.0)
        if is_concrete(self.low) and is_concrete(self.high) and not bool(self.low < self.high):
            raise SettingError(
                f"power_law.high = {float(self.high)!r} is not above low = {float(self.low)!r}; allowed: high > low"
            )

    @classmethod
    def ranked(cls, gamma, low, high) -> PowerLaw:
        """Eigenvalues that fall with their rank k as ``k^-gamma``, gamma > 0, from high to low."""
        return cls(1 / real("power_law.gamma", gamma, "gamma > 0", 0.0), low, high)

    def eigenvalues(self, dimension: int) -> np.ndarray:
        """Eigenvalues of one matrix of that size: the quantiles at (k + 1/2) / dimension."""
        places = (np.arange(dimension) + 0.5) / dimension
        s, length = float(self.exponent), float(np.log(self.high / self.low))
        # In t = log(x / low) the density is e^(-s t): its quantiles, also where s is near zero.
        t = places * length if abs(s) < 1e-9 else -np.log1p(places * np.expm1(-s * length)) / s
        return float(self.low) * np.exp(t)

    def _path(self) -> tuple[Array, Array, Array, Array]:
        """Nodes t = log(x / low) and weights on a path below the real axis; log(high / low); norm of the density.

        The integrand is entire in t but for the pole of the transform: the path may be bent away from it.
        """
        length = jnp.log(self.high / self.low)
        node, weight = (jnp.asarray(f, length.dtype) for f in _gauss_legendre(_LOG_NODES))
        depth = lax.stop_gradient(jnp.minimum(length / 2, 1.0))
        t = lax.complex(length * node, -4 * depth * node * (1 - node))
        dt = weight * lax.complex(jnp.broadcast_to(length, node.shape), -4 * depth * (1 - 2 * node))
        norm = jnp.sum(weight * length * jnp.exp(-self.exponent * length * node))
        return t, dt, length, norm

    def _power(self, k: int) -> Array:
        """``Tr S^k / D``."""
        t, dt, _, norm = self._path()
        return self.low**k * jnp.real(jnp.sum(dt * jnp.exp((k - self.exponent) * t))) / norm

    @property
    def mean(self):
        return self._power(1)

    @property
    def variance(self):
        return self._power(2) - self._power(1) ** 2

    def _transform(self, u, factor):
        # Of factor S: conjugation exchanges the half planes for a negative factor.
        negative = factor < 0
        u = u / (factor * self.low)
        u = jnp.where(negative, jnp.conj(u), u)
        g, dg = self._scaled(lax.complex(jnp.real(u), jnp.abs(jnp.imag(u))))
        g, dg = (jnp.where(negative, jnp.conj(f), f) for f in (g, dg))
        return g / (factor * self.low), dg / (factor * self.low) ** 2

    def _scaled(self, u):
        """Transform and its derivative in units of low, Im u >= 0.

        Gauss-Legendre in t, exact but for the pole at t = log u; that one is taken out and its logarithm put back.
        """
        s = self.exponent
        t, dt, length, norm = self._path()
        pole = 1 / (u[..., None] - jnp.exp(t))
        share = dt * jnp.exp(-s * t) * pole
        g, dg = jnp.sum(share, -1), -jnp.sum(share * pole, -1)
        size, angle = jnp.abs(u), jnp.angle(u)
        near = (size > 0.25) & (size < 4 * jnp.exp(length)) & (angle < 2.5)
        u = jnp.where(near, u, 0.5)
        there = jnp.log(u)
        away = 1 / (t - there[..., None])
        end, start = there - length, there
        good = (end != 0) & (start != 0)
        start, end = jnp.where(good, start, 1.0), jnp.where(good, end, 1.0)
        lack = jnp.sum(dt * away, -1) - jnp.log(end) + jnp.log(start)
        dlack = (jnp.sum(dt * away * away, -1) - 1 / end + 1 / start) / u
        p = jnp.exp(-s * there) / u
        g = g + jnp.where(near, p * lack, 0.0)
        dg = dg + jnp.where(near, p * (dlack - (1 + s) * lack / u), 0.0)
        return g / norm, dg / norm

    def _cover(self, factor):
        a, b = factor * self.low, factor * self.high
        return jnp.minimum(a, b)[None], jnp.maximum(a, b)[None]

    def _inner(self, t, factor):
        return factor * self.low * (self.high / self.low) ** t

    def _covers(self, a, factor):
        low, high = self._cover(factor)
        return (a >= low[0]) & (a <= high[0])


class Part(eqx.Module):
    """One term of a free sum: ``factor * S``."""

    factor: Any
    law: BaseLaw


class FreeSum(_General):
    """Law of ``sum_i factor_i S_i`` of independent, rotationally invariant matrices S_i (free in the limit).

    `parts`: pairs (factor, law); a factor is any real number. At most one law may lack an explicit R-transform (a power
    law, or atoms at more than one value). The leaves are `parts[i].factor` and those of `parts[i].law`.
    """

    parts: tuple[Part, ...]

    def __init__(self, parts: Iterable):
        require_float64()
        parts = tuple((p.factor, p.law) if isinstance(p, Part) else tuple(p) for p in parts)
        if not parts:
            raise SettingError("free_sum.parts = () is empty; allowed: at least one (factor, law)")
        for i, p in enumerate(parts):
            if len(p) != 2 or not isinstance(p[1], BaseLaw):
                raise SettingError(f"free_sum.parts[{i}] = {p!r} is not a pair; allowed: (factor, law)")
        self.parts = tuple(
            Part(real(f"free_sum.parts[{i}].factor", c, "a real number", -np.inf), law)
            for i, (c, law) in enumerate(parts)
        )
        for factor, law in _terms(self, 1.0):
            if isinstance(law, Wishart):
                real("wishart.kappa0", law.kappa0, "kappa0 > 0 (a scalar in a free sum)", 0.0)
            elif isinstance(law, PowerLaw) and is_concrete(factor) and not bool(jnp.all(factor != 0)):
                raise SettingError("free_sum.parts has a power law with factor = 0.0; allowed: any other real number")
        _form(self)

    @property
    def mean(self):
        return sum(p.factor * p.law.mean for p in self.parts)

    @property
    def variance(self):
        return sum(p.factor**2 * p.law.variance for p in self.parts)


def _terms(law: BaseLaw, factor: Any) -> list[tuple[Any, BaseLaw]]:
    if isinstance(law, FreeSum):
        return [t for p in law.parts for t in _terms(p.law, factor * p.factor)]
    return [(factor, law)]


def _form(law: BaseLaw) -> _Form:
    one = jnp.asarray(1.0)
    terms = _terms(law, one)
    wisharts = [(f, t.kappa0) for f, t in terms if isinstance(t, Wishart)]
    points = [f * t.mean for f, t in terms if isinstance(t, Atoms) and t.values.shape[0] == 1]
    rest = [
        (f, t) for f, t in terms if not isinstance(t, Wishart) and not (isinstance(t, Atoms) and t.values.shape[0] == 1)
    ]
    if len(rest) > 1:
        names = " and ".join(type(t).__name__ for _, t in rest)
        raise SettingError(f"free_sum.parts has {names}; allowed: at most one law other than Wishart and a single atom")
    factor, explicit = rest[0] if rest else (one, _ORIGIN())
    c = jnp.asarray([f for f, _ in wisharts] or jnp.zeros(0))
    kappa = jnp.asarray([k for _, k in wisharts] or jnp.zeros(0))
    return _Form(factor, explicit, sum(points, jnp.zeros(())), c, kappa)


def _ORIGIN() -> Atoms:
    return Atoms(jnp.ones(1), jnp.zeros(1))
