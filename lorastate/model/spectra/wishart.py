"""Closed forms of one Wishart teacher: the law ``mu_delta = law of S* + delta * semicircle``.

``S* = W* W*^T / sqrt(P0 D)`` is Wishart of rank ratio ``kappa0 = P0 / D``, the semicircle has
variance 1. R-transforms add, so the Stieltjes transform g solves the cubic ``z(g) = x``,

    z(g) = 1/g + delta^2 g + kappa0 / (sqrt(kappa0) - g),

and what the state evolution needs is elementary in one root of it (arXiv:2509.24914 for the
pre-training potential, arXiv:2606.05899 for the setting). All functions are elementwise in
delta >= 0, eps and kappa0 >= 0, broadcast, and run under jit, vmap and differentiation on any
backend. delta = 0 is the limit delta -> 0+, in which half of an atom at eps is above it, and
kappa0 = 0 that of kappa0 -> 0+, a semicircle and an outlier that keeps Tr S*^2 at one. Use
float64: in float32 the roots near a band edge carry three digits.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.typing import ArrayLike

from .elementwise import density_of, last, limit, prepare
from .rules import BandNodes, double_exponential, pairs_across


def _prepare_law(*args: ArrayLike) -> tuple[Array, ...]:
    """`prepare` of arguments the last two of which are delta and kappa0."""
    *rest, delta, kappa0 = prepare(*args)
    return *rest, limit(delta), jnp.maximum(kappa0, 1e-14)


def _isolated_root(e1: Array, e2: Array, e3: Array) -> Array:
    """The real root farthest from the other two of ``r^3 - e1 r^2 + e2 r - e3``."""
    c = e1 / 3
    m2 = c * c - e2 / 3
    half = c**3 - (c * e2 - e3) / 2
    size, m = jnp.abs(half), jnp.sqrt(jnp.maximum(m2, 0.0))
    disc = size * size - m2**3
    u = jnp.cbrt(size + jnp.sqrt(jnp.maximum(disc, 0.0)))
    one = u + m2 / jnp.where(u > 0, u, 1.0)
    three = 2 * m * jnp.cos(jnp.arccos(jnp.minimum(size / jnp.where(m > 0, m**3, 1.0), 1.0)) / 3)
    r = c + jnp.where(half < 0, -1.0, 1.0) * jnp.where(disc < 0, three, one)

    def newton(_, r):
        slope = (3 * r - 2 * e1) * r + e2
        return r - (((r - e1) * r + e2) * r - e3) / jnp.where(slope == 0, 1.0, slope)

    return lax.fori_loop(0, 2, newton, r)


def _root(x: Array, delta: Array, kappa0: Array) -> tuple[Array, Array]:
    """``(a, y)`` with ``g(x + i0) = a - i y`` and ``y >= 0``, zero (never -0) off the support.

    The root that cannot collide is found first and divided out: the quadratic left keeps full
    accuracy at the band edges, where Newton steps alone would stall.
    """
    x, delta, kappa0 = lax.stop_gradient((x, delta, kappa0))
    s, d2 = jnp.sqrt(kappa0), delta * delta
    e1, e2, e3 = s + x / d2, (1 - kappa0 + x * s) / d2, s / d2
    r = _isolated_root(e1, e2, e3)
    prod = e3 / r
    # Two formulas for the sum of the other two roots; take the one with less cancellation.
    forward = (jnp.abs(e1) + jnp.abs(r)) * jnp.abs(r) < jnp.abs(e2) + jnp.abs(prod)
    mid = jnp.where(forward, e1 - r, (e2 - prod) / r) / 2
    disc = mid * mid - prod
    gap = jnp.sqrt(jnp.abs(disc))
    # Real roots: the physical one has z'(g) < 0. That is the middle one left of the support and
    # inside a gap, and the lowest one, between 0 and sqrt(kappa0), right of the support.
    far = mid + jnp.where(mid < 0, -gap, gap)
    near = prod / jnp.where(far == 0, 1.0, far)
    low, high = jnp.minimum(far, near), jnp.maximum(far, near)
    first = jnp.minimum(r, low)
    second = jnp.maximum(jnp.minimum(r, high), low)
    real = jnp.where((first > 0) & (first < s), first, second)
    inside = disc < 0
    a, y = jnp.where(inside, mid, real), jnp.where(inside, gap, 0.0)

    def newton(_, point):
        a, y = point
        g2, h2, c = a * a + y * y, (s - a) ** 2 + y * y, s - a
        ur, ui, vr, vi = a / g2, y / g2, c / h2, -y / h2
        fr, fi = ur + d2 * a + kappa0 * vr - x, ui - d2 * y + kappa0 * vi
        pr = d2 - (ur - ui) * (ur + ui) + kappa0 * (vr - vi) * (vr + vi)
        pi = 2 * (kappa0 * vr * vi - ur * ui)
        p2 = pr * pr + pi * pi
        p2 = jnp.where(p2 == 0, 1.0, p2)
        da, dy = (fr * pr + fi * pi) / p2, (fr * pi - fi * pr) / p2
        # A step comparable with the distance to the colliding root is rounding noise.
        good = da * da + dy * dy < gap * gap / 16
        return jnp.where(good, a - da, a), jnp.abs(jnp.where(good, y - dy, y))

    return lax.fori_loop(0, 2, newton, (a, y))


@jax.custom_jvp
def _stieltjes(x: Array, delta: Array, kappa0: Array) -> Array:
    a, y = _root(x, delta, kappa0)
    return lax.complex(a, -y)


@_stieltjes.defjvp
def _stieltjes_jvp(primals, tangents):
    g = _stieltjes(*primals)
    _, delta, kappa0, dx, ddelta, dkappa0 = (v.astype(g.dtype) for v in (*primals, *tangents))
    s = jnp.sqrt(kappa0)
    u, v = 1 / g, 1 / (s - g)
    slope = delta * delta - u * u + kappa0 * v * v
    dz = 2 * delta * g * ddelta + v * (1 - s * v / 2) * dkappa0
    return g, (dx - dz) / slope


@jax.jit
def stieltjes(x: ArrayLike, delta: ArrayLike, kappa0: ArrayLike) -> Array:
    """Stieltjes transform ``g(x + i0) = int mu_delta(dt) / (x + i0 - t)``, complex.

    The root of ``1/g + delta^2 g + kappa0/(sqrt(kappa0) - g) = x`` with ``Im g <= 0``; real left
    of, right of and between the bands, where it is the root with ``z'(g) < 0``. Derivatives of any
    order follow the implicit rule ``dg = (dx - z_theta dtheta) / z'(g)``; they diverge at the
    edges, as g has square roots there. Shape: broadcast of the arguments.
    """
    return _stieltjes(*_prepare_law(x, delta, kappa0))


def density(x: ArrayLike, delta: ArrayLike, kappa0: ArrayLike) -> Array:
    """Density ``-Im g(x + i0) / pi`` of mu_delta; exactly 0 outside the support, infinite at an atom."""
    return density_of(stieltjes(x, delta, kappa0), delta)


@jax.jit
def J(delta: ArrayLike, eps: ArrayLike, kappa0: ArrayLike) -> Array:
    """``J(delta, eps) = int_{x > eps} (x - eps)^2 mu_delta(dx)``, without quadrature.

    ``J = -Im G(g_e) / (3 pi)`` where ``g_e = g(eps + i0)`` and ``dG/dg = (z(g) - eps)^3``, rational
    plus logarithms (arXiv:2509.24914, by contour deformation). Shape: broadcast of the arguments.
    Left of the support it equals ``(sqrt(kappa0) - eps)^2 + 1 + delta^2``; right of it, exactly 0.

    G is stationary to third order at g_e, which is therefore held constant under differentiation:
    derivatives **through the third order** are exact and finite everywhere. Fourth and higher
    ones would miss terms: differentiate ``J_eps,eps = 2 (1 - mass_below(eps))`` instead.
    """
    eps, delta, kappa0 = _prepare_law(eps, delta, kappa0)
    a, y = _root(eps, delta, kappa0)
    s, d2 = jnp.sqrt(kappa0), delta * delta
    c = s - a
    ig, ih = 1 / (a * a + y * y), 1 / (c * c + y * y)
    qs = d2 * s - eps
    # log g = ... - i angle_g and log(s - g) = ... + i angle_h: the -i0 prescription off support.
    angle_g, angle_h = jnp.arctan2(y, a), jnp.arctan2(y, c)
    log_g = (s - eps) ** 2 + 1 + d2
    log_h = kappa0 * (1 - kappa0 * d2) + (1 + s * qs) ** 2
    # Im of the rational part, each term with its factor y taken out (exact zero off support).
    poly = eps**3 + 6 * d2 * eps - 3 * kappa0 * d2 * (2 * eps - d2 * s)
    poly += a * (3 * d2 * d2 * (kappa0 - 1) - 3 * d2 * eps**2)
    poly += d2 * d2 * (eps * (3 * a * a - y * y) - d2 * a * (a - y) * (a + y))
    pole_g = ig * (3 * (eps - s) - a * ig)
    pole_h = kappa0 * ih * (3 * (s + kappa0 * qs) + kappa0 * kappa0 * c * ih)
    return (log_g * angle_g + log_h * angle_h - y * (poly + pole_g - pole_h) / 3) / jnp.pi


def _tail_mass(a: Array, y: Array, eps: Array, delta: Array, kappa0: Array) -> Array:
    c = jnp.sqrt(kappa0) - a
    logs = jnp.arctan2(y, a) + kappa0 * jnp.arctan2(y, c)
    return (logs + y * (delta * delta * a - eps)) / jnp.pi


@jax.custom_jvp
def _mass_below(eps: Array, delta: Array, kappa0: Array) -> Array:
    return jnp.clip(1 - _tail_mass(*_root(eps, delta, kappa0), eps, delta, kappa0), 0, 1)


@_mass_below.defjvp
def _mass_below_jvp(primals, tangents):
    # dH/dg = z - eps vanishes at g_e: explicit partials only. Taking them at the differentiable
    # g makes the second and higher derivatives right too.
    g = _stieltjes(*primals)
    a, y = jnp.real(g), -jnp.imag(g)
    _, dtail = jax.jvp(lambda *p: _tail_mass(a, y, *p), primals, tangents)
    return _mass_below(*primals), -dtail


@jax.jit
def mass_below(eps: ArrayLike, delta: ArrayLike, kappa0: ArrayLike) -> Array:
    """Spectral mass ``F_delta(eps) = mu_delta((-inf, eps])``, in [0, 1].

    ``1 - F = -Im H(g_e) / pi`` with ``H = log g - kappa0 log(sqrt(kappa0) - g) + delta^2 g^2 / 2
    - eps g``, ``g_e = g(eps + i0)``: 0 left of the support, 1 - kappa0 in the gap, 1 right of it.
    ``dF/deps`` is the density; second derivatives diverge at the edges. Shape: broadcast.
    """
    return _mass_below(*_prepare_law(eps, delta, kappa0))


def _slope(mu: Array, d2: Array, kappa0: Array) -> Array:
    """``-z'(g)`` at ``g = 1/mu``."""
    return mu * mu - d2 - kappa0 * (mu / (jnp.sqrt(kappa0) * mu - 1)) ** 2


def _critical(delta: Array, kappa0: Array) -> tuple[Array, Array, Array, Array]:
    """Real critical points of z, as ``mu = 1/g`` in the order of the edges, shape (..., 4).

    Returns ``(mu, delta^2, kappa0, gap)``; without a gap the two middle entries are a dummy. z' has
    one root on g < 0, one on (0, sqrt(kappa0)), and two or none on g > sqrt(kappa0), where its
    minimum is at ``mu = (1 - kappa0^(1/3)) / sqrt(kappa0)``.
    """
    gap = delta * delta * kappa0 < (1 - jnp.minimum(jnp.cbrt(kappa0), 1.0)) ** 3
    k_in, d_in = jnp.where(gap, kappa0, 0.1), jnp.where(gap, delta, 0.1)
    k = jnp.stack([kappa0, k_in, k_in, kappa0], -1)
    d2 = jnp.stack([delta, d_in, d_in, delta], -1) ** 2
    s, s_in = jnp.sqrt(kappa0), jnp.sqrt(k_in)
    pole, summit = (1 + s) / s, (1 - jnp.cbrt(k_in)) / s_in
    low = jnp.stack([-jnp.hypot(1.0, delta), 0 * delta, summit, pole], -1)
    high = jnp.stack([-jnp.abs(delta), summit, (1 - s_in) / s_in, jnp.hypot(delta, pole)], -1)
    k_, d2_, low, high = lax.stop_gradient((k, d2, low, high))
    sign = last([-1, 1, -1, 1], low)

    def bisect(_, bracket):
        lo, hi = bracket
        mid = (lo + hi) / 2
        up = sign * _slope(mid, d2_, k_) > 0
        return jnp.where(up, lo, mid), jnp.where(up, mid, hi)

    low, high = lax.fori_loop(0, 52, bisect, (low, high))
    mu = (low + high) / 2
    # One Newton step from a constant: no change in value, but it carries the derivative.
    curve = 2 * mu * (1 + k_ / (jnp.sqrt(k_) * mu - 1) ** 3)
    mu = mu - _slope(mu, d2, k) / jnp.where(curve == 0, 1.0, curve)
    return mu, d2, k, gap


@jax.jit
def edges(delta: ArrayLike, kappa0: ArrayLike) -> Array:
    """Band edges of mu_delta, ascending, shape (..., 4): ``z(g)`` at the real roots of ``z'(g)``.

    One band: ``[left, right, nan, nan]``. Two bands, when ``kappa0 < 1`` and
    ``delta^2 < (1 - kappa0^(1/3))^3 / kappa0``: ``[left, right, left, right]``, the first of mass
    ``1 - kappa0``, the second of mass ``kappa0``. Derivatives are exact through the third order.
    """
    delta, kappa0 = _prepare_law(delta, kappa0)
    mu, d2, k, gap = _critical(delta, kappa0)
    x = mu + d2 / mu + k * mu / (jnp.sqrt(k) * mu - 1)
    one = jnp.where(last(range(4), x) < 2, x[..., np.array([0, 3, 0, 3])], jnp.nan)
    return jnp.where(gap[..., None], x, one)


def _band_ends(delta: Array, kappa0: Array) -> tuple[Array, Array, Array]:
    """``t`` at the lower and upper ends of the bands, (..., 2) each, and whether there are two.

    Inside the support the cubic has one real root r > sqrt(kappa0) beside g and conj g. x = z(r)
    and (Im g)^2 are rational in r, so the bands are swept in ``t = log(r - sqrt(kappa0))`` with no
    root finding, and gaps about to open or close are resolved: dx/dt is small there.
    """
    mu, d2, k, gap = _critical(delta, kappa0)
    s = jnp.sqrt(k)
    t = jnp.log(s * k * (mu / (s * mu - 1)) ** 2 / d2)
    two = gap[..., None]
    return jnp.where(two, t[..., 0::2], t[..., :1]), jnp.where(two, t[..., 1::2], t[..., 3:]), gap


def _band_point(w: Array, delta: Array, kappa0: Array) -> tuple[Array, Array, Array]:
    """``x``, density and ``dx/dt`` at ``w = exp(t) = r - sqrt(kappa0)``."""
    s, d2 = jnp.sqrt(kappa0), delta * delta
    r = s + w
    prod = s / (d2 * r)
    mid = (s + ((1 - kappa0) * w - kappa0 * s) / (d2 * r * w)) / 2
    y2 = (jnp.sqrt(prod) - mid) * (jnp.sqrt(prod) + mid)
    y = jnp.where(y2 > 0, jnp.sqrt(jnp.where(y2 > 0, y2, 1.0)), 0.0)
    x = 1 / r + d2 * r - kappa0 / w
    return x, y / jnp.pi, w * (d2 - 1 / (r * r)) + kappa0 / w


@partial(jax.jit, static_argnames="n")
def band_nodes(delta: ArrayLike, kappa0: ArrayLike, n: int = 64) -> BandNodes:
    """Nodes x, weights w and density, (..., 2n): ``sum w f(x) = int f dmu_delta``, ``int rho^3 dx = sum w density^2``.

    n nodes a band under a cosine map that removes the square-root edges: spectral accuracy for
    smooth f (1e-6 at n = 64 where a gap is about to close). With one band the last n weights are 0.
    """
    delta, kappa0 = _prepare_law(delta, kappa0)
    t0, t1, gap = _band_ends(delta, kappa0)
    theta = np.pi * np.arange(n, 0, -1) / (n + 1)
    half = ((t1 - t0) / 2)[..., None]
    t = ((t1 + t0) / 2)[..., None] + half * last(np.cos(theta), half)
    d, k = delta[..., None, None], kappa0[..., None, None]
    x, rho, dxdt = _band_point(jnp.exp(t), d, k)
    w = rho * dxdt * half * last(np.pi / (n + 1) * np.sin(theta), half)
    both = (gap[..., None] | (last([0, 1], t0) == 0))[..., None]
    parts = (x, jnp.where(both, w, 0.0), rho)
    return BandNodes(*(v.reshape(*delta.shape, 2 * n) for v in parts))


@partial(jax.jit, static_argnames="n")
def pair_response(delta: ArrayLike, eps: ArrayLike, kappa0: ArrayLike, n: int = 64) -> Array:
    """``int int ((r(x) - r(y)) / (x - y))^2 mu_delta(dx) mu_delta(dy)``, ``r(x) = ReLU(x - eps)``.

    ``(1 - F)^2 + 2 int_{x > eps > y} ((x - eps) / (x - y))^2 mu mu`` with F = mass_below(eps): the
    spectral factor of the stability (replicon) condition (arXiv:2509.24914). 1 left of the support,
    0 right of it. n double-exponential nodes per band and side of eps resolve the corner
    x = y = eps: error below 1e-7 at n = 64, 1e-5 within 1 % (in delta) of the closing of a gap.
    Memory 4 n^2 per setting. Shape: broadcast of the arguments.
    """
    eps, delta, kappa0 = _prepare_law(eps, delta, kappa0)
    t0, t1, gap = _band_ends(delta, kappa0)
    d, k, e = (jnp.broadcast_to(v[..., None], t0.shape) for v in (delta, kappa0, eps))
    s, d2 = jnp.sqrt(k), d * d
    x0, x1 = _band_point(jnp.exp(t0), d, k)[0], _band_point(jnp.exp(t1), d, k)[0]
    inside = (x0 < e) & (e < x1)
    # Each band is cut at t_c; w_c |sqrt(kappa0) - g|^2 = kappa0^(3/2) / delta^2 gives the cut.
    g = _stieltjes(jnp.where(inside, e, (x0 + x1) / 2), d, k)
    t_in = jnp.log(s * k / (d2 * ((s - jnp.real(g)) ** 2 + jnp.imag(g) ** 2)))
    t_c = jnp.where(inside, t_in, jnp.where(e <= x0, t0, t1))
    offset = jnp.clip(e, x0, x1) - e
    phi, dphi = (last(v, t_c[..., None]) for v in double_exponential(n))
    exists = gap[..., None] | (last([0, 1], t_c) == 0)

    def side(t_end: Array) -> tuple[Array, Array]:
        """Distance from eps (no cancellation at the corner) and weight, (..., 2n)."""
        w_c, length = jnp.exp(t_c)[..., None], (t_end - t_c)[..., None]
        dt = length * phi
        w = w_c * jnp.exp(dt)
        _, rho, dxdt = _band_point(w, d[..., None], k[..., None])
        root_product = (s[..., None] + w) * (s[..., None] + w_c)
        chord = d2[..., None] - 1 / root_product + k[..., None] / (w * w_c)
        dist = jnp.abs(offset[..., None] + w_c * jnp.expm1(dt) * chord)
        weight = jnp.where(exists[..., None], rho * dxdt * jnp.abs(length) * dphi, 0.0)
        flat = (*delta.shape, 2 * n)
        return dist.reshape(flat), weight.reshape(flat)

    mixed = pairs_across(side(t1), side(t0))
    return (1 - _mass_below(eps, delta, kappa0)) ** 2 + 2 * mixed
