"""Bands of mu_delta for free sums: their edges, quadrature nodes on them, and the spectral factor of the replicon."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.typing import ArrayLike

from .contour import mass
from .elementwise import limit, prepare
from .rules import BandNodes, double_exponential, gauss_legendre, pairs_across
from .subordination import Form, evaluate, free_variance, lift, lifted, locate, moving, stretch

_PANELS = 8  # panels of the curve on the support of a power law


def _bisect(rises: Any, low: Array, high: Array) -> Array:
    """Where the sign changes: `rises(mid)` says whether that is right of mid."""

    def halve(_, bracket):
        lo, hi = bracket
        mid = (lo + hi) / 2
        up = rises(mid)
        return jnp.where(up, mid, lo), jnp.where(up, hi, mid)

    low, high = lax.fori_loop(0, 58, halve, (low, high))
    return (low + high) / 2


def _islands(form: Form) -> tuple[Array, Array]:
    """Ends, ascending, of the pieces of the real axis where N is not analytic: one or more in each band of mu_delta.

    Those of G_A, and the poles ``c_i g = sqrt(kappa_i)`` of R: one right of each piece of G_A (left of it for c_i < 0).
    """
    low, high = form.law.cover(form.factor)
    order = jnp.argsort(low)
    low, high = low[order], high[order]
    reach = (form.c / jnp.sqrt(form.kappa))[:, None]
    left = jnp.where(reach < 0, jnp.concatenate([low[:1], high[:-1]]), high)
    left = left.at[:, 0].add(jnp.minimum(reach[:, 0], 0.0))
    right = jnp.where(reach < 0, low, jnp.concatenate([low[1:], high[-1:]]))
    right = right.at[:, -1].add(jnp.maximum(reach[:, 0], 0.0))

    def rises(a):
        g = jnp.real(form.law.transform(lax.complex(a, jnp.zeros_like(a)), form.factor)[0])
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


def _bands(form: Form, delta: Array) -> _Bands:
    """Panels end at band edges, at singularities of N, and where N' is smallest between two of these without a gap.

    The edge of a gap about to open, or a light pole, is then next to the end of a panel, where nodes cluster.
    """
    fixed, d = lax.stop_gradient((form, delta[..., None]))
    low, high = _islands(fixed)
    tau = jnp.sqrt(free_variance(fixed, d)) * (1 + 1e-12)
    climb = partial(stretch, fixed, d)
    shape = (*delta.shape, low.size - 1)
    left, right = jnp.broadcast_to(high[:-1], shape), jnp.broadcast_to(low[1:], shape)
    # N' is convex between two singularities: its minimum says whether there is a gap.
    bottom = _bisect(lambda a: jax.jvp(climb, (a,), (jnp.ones_like(a),))[1] < 0, left, right)
    gap = climb(bottom) < 1
    # All ends at once: where the stretch falls to 1 (right ends) or climbs above it (left ends).
    low0, high0 = jnp.broadcast_to(low[:1], d.shape), jnp.broadcast_to(high[-1:], d.shape)
    lower, upper = (
        jnp.concatenate([low0 - tau, bottom, left, high0], -1),
        jnp.concatenate([low0, right, bottom, high0 + tau], -1),
    )
    start = np.arange(lower.shape[-1]) < low.size
    ends = _bisect(lambda a: (climb(a) > 1) != start, lower, upper)
    first, climbs, falls, last = jnp.split(ends, [1, low.size, 2 * low.size - 1], -1)
    yes = jnp.ones((*delta.shape, 1), bool)
    from_, to = jnp.concatenate([yes, gap], -1), jnp.concatenate([gap, yes], -1)
    exists = jnp.concatenate([from_, to], -1)
    a = jnp.concatenate([first, jnp.where(gap, climbs, first), jnp.where(gap, falls, first), last], -1)
    # One Newton step from a constant: no change in value, but it carries the derivative.
    there = lambda a: stretch(form, delta[..., None], a)  # noqa: E731
    value, slope = jax.jvp(there, (a,), (jnp.ones_like(a),))
    a = a - (value - 1) / jnp.where(slope == 0, 1.0, slope)
    start, stop = jnp.split(a, 2, -1)
    start = jnp.where(from_, start, jnp.concatenate([first, bottom], -1))
    stop = jnp.where(to, stop, jnp.concatenate([bottom, last], -1))
    low, high = jnp.broadcast_to(low, start.shape), jnp.broadcast_to(high, start.shape)
    panels = [jnp.stack([start, low], -1), jnp.stack([high, stop], -1)]
    if form.law.wide:
        panels.append(_within(fixed, lax.stop_gradient(delta)))
    return _Bands(jnp.concatenate(panels, -2), a, exists)


def _resolved(form: Form, delta: Array) -> Array:
    """`limit`; at least what tells the panels of a power law from its own support."""
    return jnp.maximum(limit(delta), 1e-6) if form.law.wide else limit(delta)


def _within(form: Form, delta: Array) -> Array:
    """Panels inside the support of A, (..., P, 2), with equal changes of log v: it falls from a bulk to its tail."""
    shape = (*delta.shape, 97)
    t = jnp.broadcast_to(jnp.linspace(0.0, 1.0, shape[-1]), shape)
    d = jnp.broadcast_to(delta[..., None], shape)
    target = np.linspace(0, 1, shape[-1])
    inverse = jnp.vectorize(lambda f, t: jnp.interp(target, f, t), signature="(n),(n)->(n)")

    def spread(_, t):
        a = form.law.inner(t, form.factor)
        change = jnp.abs(jnp.diff(jnp.log(lift(form, d, a, jnp.sqrt(free_variance(form, d)) / 2))))
        total = jnp.maximum(jnp.sum(change, -1, keepdims=True), 1.0)
        fraction = jnp.cumsum(change / total + jnp.diff(t), -1)
        fraction = jnp.concatenate([jnp.zeros_like(fraction[..., :1]), fraction], -1) / fraction[..., -1:]
        return inverse(fraction, t)

    t = lax.fori_loop(0, 3, spread, t)
    a = jnp.sort(form.law.inner(t[..., :: (shape[-1] - 1) // _PANELS], form.factor), -1)
    return jnp.stack([a[..., :-1], a[..., 1:]], -1)


def curve(form: Form, delta: Array, a: Array, guess: Array) -> tuple[Array, Array, Array]:
    """``x(a)``, density and ``dx/da`` on the curve; differentiable (two Newton steps carry orders one to three)."""
    v = lax.stop_gradient(lift(*lax.stop_gradient((form, delta, a, guess))))
    live = v > 0
    v = jnp.where(live, v, 1.0)
    for _ in range(2):
        u = lax.complex(a, v)
        p = evaluate(form, delta, u)
        slope = 1 + jnp.real(p.dr)
        step = jnp.imag(u + p.r) / jnp.where(slope == 0, 1.0, slope)
        noise = jnp.abs(step) > v / 4
        v = jnp.where(live, v - jnp.where(noise, step - lax.stop_gradient(step), step), 1.0)
    u = lax.complex(a, v)
    p = evaluate(form, delta, u)
    slope = jnp.real(1 + p.dr)
    rise = (slope**2 + jnp.imag(p.dr) ** 2) / jnp.where(slope > 0, slope, 1.0)
    rise = jnp.where(slope > 0, jnp.minimum(rise, 2.0), 0.0)  # |z'|^2 <= 2 Re z' on the curve (Cauchy-Schwarz)
    return jnp.real(u + p.r), jnp.where(live, -jnp.imag(p.g) / jnp.pi, 0.0), jnp.where(live, rise, 0.0)


@partial(jax.jit, static_argnames="n")
def band_nodes(law: Any, delta: ArrayLike, n: int) -> BandNodes:
    """Nodes, weights and density on all panels: a cosine map of each removes the square roots at band edges."""
    (delta,) = prepare(delta)
    form = law.form()
    delta = _resolved(form, delta)
    ends = _bands(form, delta).ends
    node, weight = gauss_legendre(n)
    sine, drop = (jnp.asarray(f, delta.dtype) for f in (np.sin(np.pi * node), 2 * np.sin(np.pi / 2 * node) ** 2))
    half = ((ends[..., 1] - ends[..., 0]) / 2)[..., None]
    a = ends[..., 0, None] + half * drop
    x, rho, rise = curve(form, delta[..., None, None], a, half * sine)
    w = rho * rise * half * sine * (np.pi * weight)
    return BandNodes(*(f.reshape(*delta.shape, -1) for f in (x, w, rho)))


@jax.jit
def edges(law: Any, delta: ArrayLike) -> Array:
    """Band edges, ascending and nan-padded: z at its critical points."""
    (delta,) = prepare(delta)
    form = law.form()
    delta = _resolved(form, delta)
    bands = _bands(form, delta)
    x = bands.edges + jnp.real(evaluate(form, delta[..., None], bands.edges + 0j).r)
    return jnp.sort(jnp.where(bands.exists, x, jnp.nan), -1)


@partial(jax.jit, static_argnames="n")
def pair_response(law: Any, delta: ArrayLike, eps: ArrayLike, n: int) -> Array:
    """The spectral factor of the replicon, ``(1 - F)^2 + 2 int_{x > eps > y} ((x - eps) / (x - y))^2 mu mu``."""
    delta, eps = prepare(delta, eps)
    form = law.form()
    delta = _resolved(form, delta)
    ends = _bands(form, delta).ends
    d, e = delta[..., None], eps[..., None]
    a0, a1 = ends[..., 0], ends[..., 1]
    u = lax.stop_gradient(locate(form, eps, delta))
    # Off the support u_e is real and in no panel: it has no derivative there, which diverges at the edges.
    inside = jnp.imag(u) > 0
    cut = moving(form, eps, delta, jnp.where(inside, u, lifted(form, delta, u)))
    cut = jnp.clip(jnp.where(inside, jnp.real(cut), jnp.real(u))[..., None], a0, a1)
    phi, dphi = jnp.asarray(double_exponential(n), cut.dtype)
    # Distance from eps and weight on both sides of it, (2, ..., B n).
    length = (jnp.stack([a1, a0]) - cut)[..., None]
    x, rho, rise = curve(form, d[..., None], cut[..., None] + length * phi, (a1 - a0)[..., None] / 4 + 0 * length * phi)
    flat = (2, *delta.shape, -1)
    distance = jnp.abs(x - e[..., None]).reshape(flat)
    weight = (rho * rise * jnp.abs(length) * dphi).reshape(flat)
    below = mass(form, eps, delta, u)
    # No pairs across an eps off the support, where the panels of a power law may be too thin to be told apart.
    mixed = jnp.where((below > 0) & (below < 1), pairs_across(*zip(distance, weight, strict=True)), 0.0)
    return (1 - below) ** 2 + 2 * mixed
