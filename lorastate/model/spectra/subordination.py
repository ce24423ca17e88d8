"""The subordination map z(u) of free sums, and its solution u(x + i0).

Every law that is no single Wishart is that of ``S = A + sum_i c_i W_i``, free, with W_i Wishart of rank ratio kappa_i
and A a matrix whose Stieltjes transform G_A is explicit (A = 0 for a sum of Wisharts). R-transforms add, so with
``mu_delta = law of S + delta * (semicircle of variance 1)`` and the subordination variable u,

    g = G_A(u),    z(u) = u + R(G_A(u)),    R(g) = delta^2 g + sum_i c_i kappa_i / (sqrt(kappa_i) - c_i g)

(arXiv:2509.24914 has one Wishart; a sum of two makes ``z(u) = x`` a quartic in g = 1/u).

``z(u) = u - N(u)`` with N a Pick function (``Im N >= 0`` where ``Im u >= 0``), so the solution u(x + i0) lies on the
curve ``u = a + i v(a)``, where v(a) = 0 if ``N'(a) <= 1`` and else solves ``Im N / v = 1``; ``x(a) = z(a + i v(a))``
increases with a. Two nested monotone equations: nothing is selected among roots, and band edges are as well
conditioned as they can be.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike

from .elementwise import limit, prepare

# ---- the map z(u) ----------------------------------------------------------------------------------------------


class Form(NamedTuple):
    """``factor * law + shift + sum_i c_i Wishart(kappa_i)``: what all general laws reduce to."""

    factor: Array
    law: Any
    shift: Array
    c: Array
    kappa: Array


class Point(NamedTuple):
    """``g = G_A(u)``, ``dg = G_A'(u)``, ``r = R(g)`` and ``dr = dR(G_A(u))/du``, so that z = u + r and z' = 1 + dr."""

    g: Array
    dg: Array
    r: Array
    dr: Array


def evaluate(form: Form, delta: Array, u: Array) -> Point:
    """What z(u) is made of, at u."""
    g, dg = form.law.transform(u, form.factor)
    v = 1 / (jnp.sqrt(form.kappa) - form.c * g[..., None])
    r = delta**2 * g + form.shift + jnp.sum(form.c * form.kappa * v, -1)
    slope = delta**2 + jnp.sum(form.c**2 * form.kappa * v * v, -1)
    return Point(g, dg, r, slope * dg)


def free_variance(form: Form, delta: Array) -> Array:
    """Mass of the measure of N: the variance of everything but A."""
    return delta**2 + jnp.sum(form.c**2)


def lifted(form: Form, delta: Array, u: Array) -> Array:
    """A constant above the curve, where all is finite: it stands for a u whose answer is not used."""
    form, delta, u = lax.stop_gradient((form, delta, u))
    return u + 1j * jnp.sqrt(free_variance(form, delta))


# ---- the solution u(x + i0) ------------------------------------------------------------------------------------


def stretch(form: Form, delta: Array, a: Array) -> Array:
    """``N'(a)`` at real a off the singularities: mu_delta has density at z(a) unless it is at most 1."""
    slope = -jnp.real(evaluate(form, delta, lax.complex(a, jnp.zeros_like(a))).dr)
    return jnp.where(form.law.covers(a, form.factor), jnp.inf, slope)


def lift(form: Form, delta: Array, a: Array, guess: Array) -> Array:
    """v(a) >= 0 of the curve ``Im z(a + i v) = 0``, from a guess of v.

    With S = Im N / v, 1/S is concave and increasing in y = v^2: Newton steps for 1/S = 1 approach from the left.
    """
    top = free_variance(form, delta)
    inside = ~(stretch(form, delta, a) <= 1)
    y = jnp.clip(guess * guess, 1e-24 * top, top)

    def advance(state):
        y, going, k = state
        v = jnp.sqrt(y)
        p = evaluate(form, delta, lax.complex(a, v))
        s = -jnp.imag(p.r) / v
        slope = jnp.maximum((s + jnp.real(p.dr)) / (2 * y * s * s), 1 / top)  # at least its limit at infinity
        f = 1 / s - 1
        new = jnp.clip(y - f / slope, y / 100, top)
        new = jnp.where(going, new, y)
        noise = 1e-15 * (1 + jnp.abs(p.r) / v) if form.law.wide else 1e-15
        return new, going & (jnp.abs(new - y) > 1e-7 * y) & (jnp.abs(f) > noise), k + 1

    y, _, _ = lax.while_loop(lambda s: jnp.any(s[1]) & (s[2] < 40), advance, (y, inside, 0))
    return jnp.where(inside, jnp.sqrt(y), 0.0)


def locate(form: Form, x: Array, delta: Array) -> Array:
    """u(x + i0): bracketed Newton steps along the curve, then free ones where u is not real."""
    form, x, delta = lax.stop_gradient((form, x, delta))
    tau = jnp.sqrt(free_variance(form, delta))
    middle = x - form.shift - jnp.sum(form.c * jnp.sqrt(form.kappa))  # |N| <= tau sqrt(S) about it, and S <= 1
    low, high = middle - tau, middle + tau

    def advance(state):
        low, high, a, v, width, going, k = state
        v_new = lift(form, delta, a, v)
        u = lax.complex(a, v_new)
        p = evaluate(form, delta, u)
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
        p = evaluate(form, delta, u)
        step = (x - u - p.r) / (1 + p.dr)
        good = (v > 0) & (jnp.abs(step) < v / 4)  # a larger one is rounding noise of two colliding roots
        return jnp.where(good, a + jnp.real(step), a), jnp.where(good, v + jnp.imag(step), v)

    a, v = lax.fori_loop(0, 2, polish, (a, v))
    bad = ~going
    return lax.complex(jnp.where(bad, jnp.nan, a), jnp.where(bad, jnp.nan, v))


@jax.custom_jvp
def moving(form: Form, x: Array, delta: Array, u: Array) -> Array:
    """u = u(x + i0), located already, with its derivative: ``du = (dx - z_theta dtheta) / z'(u)``."""
    return u


@moving.defjvp
def _moving_jvp(primals, tangents):
    form, x, delta, located = primals
    dform, dx, ddelta, _ = tangents
    u = moving(form, x, delta, located)
    _, dr = jax.jvp(lambda f, d: evaluate(f, d, u).r, (form, delta), (dform, ddelta))
    return u, (dx.astype(u.dtype) - dr) / (1 + evaluate(form, delta, u).dr)


def subordinate(form: Form, x: Array, delta: Array) -> Array:
    """u(x + i0), differentiable."""
    return moving(form, x, delta, locate(form, x, delta))


@jax.jit
def stieltjes(law: Any, x: ArrayLike, delta: ArrayLike) -> Array:
    """``g(x + i0) = G_A(u(x + i0))``."""
    x, delta = prepare(x, delta)
    delta = limit(delta)
    form = law.form()
    u = subordinate(form, x, delta)
    g = evaluate(form, delta, u).g
    return jnp.where(jnp.imag(u) == 0, jnp.real(g) + 0j, g)
