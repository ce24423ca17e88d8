"""The spectral law against routes that share nothing with it: numpy roots, quadrature, matrices."""

import itertools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lorastate.model.spectra.laws import Atoms, Wishart
from lorastate.model.spectra.learned import LearnedSpectrum
from lorastate.model.spectra.wishart import (
    J,
    band_nodes,
    density,
    edges,
    mass_below,
    pair_response,
    stieltjes,
)

jax.config.update("jax_enable_x64", True)


def g_parts(*args):
    """Real and imaginary part of the Stieltjes transform."""
    g = stieltjes(*args)
    return jnp.stack([jnp.real(g), jnp.imag(g)])


GRID = list(itertools.product((0.2, 0.5, 1.0, 1.3, 3.0), (0.02, 0.1, 0.5, 2.0, 10.0)))
SMOOTH = [(0.5, 0.1), (0.2, 0.4), (1.0, 0.7), (3.0, 2.0)]
ALL = (0, 1, 2)
J_1, J_2 = jax.jit(jax.grad(J, ALL)), jax.jit(jax.hessian(J, ALL))
J_3 = jax.jit(jax.jacfwd(jax.hessian(J, ALL), ALL))
F_1, F_2 = jax.jit(jax.grad(mass_below, ALL)), jax.jit(jax.hessian(mass_below, ALL))
g_1 = jax.jit(jax.jacfwd(g_parts, ALL))
g_2 = jax.jit(jax.jacrev(jax.jacfwd(g_parts, ALL), ALL))
pair_1 = jax.jit(jax.grad(pair_response, ALL))
LEGENDRE = np.polynomial.legendre.leggauss(1000)


def cubic_roots(x: np.ndarray, delta: float, kappa0: float) -> np.ndarray:
    """All g with z(g) = x from companion matrices, (..., 3)."""
    s, x = np.sqrt(kappa0), np.asarray(x, float)
    companion = np.zeros((*x.shape, 3, 3))
    companion[..., 0, 0] = (delta**2 * s + x) / delta**2
    companion[..., 0, 1] = -(1 - kappa0 + x * s) / delta**2
    companion[..., 0, 2] = s / delta**2
    companion[..., 1, 0] = companion[..., 2, 1] = 1
    return np.linalg.eigvals(companion)


def ref_density(x: np.ndarray, delta: float, kappa0: float) -> np.ndarray:
    return np.max(-np.imag(cubic_roots(x, delta, kappa0)), -1) / np.pi


def ref_edges(delta: float, kappa0: float) -> np.ndarray:
    """Real critical values of z from the quartic z'(g) = 0."""
    s, g = np.sqrt(kappa0), np.poly1d([1.0, 0.0])
    h2 = np.poly1d([-1.0, s]) ** 2
    roots = (delta**2 * g * g * h2 - h2 + kappa0 * g * g).roots
    r = np.real(roots[np.abs(np.imag(roots)) < 1e-9 * np.abs(roots)])
    return np.sort(1 / r + delta**2 * r + kappa0 / (s - r))


def ref_integral(f: Callable, low: float, delta: float, kappa0: float) -> float:
    """int_{x > low} f dmu: Gauss-Legendre in x = a + (b - a) sin^2(theta), band by band."""
    total, node = 0.0, np.pi / 4 * (LEGENDRE[0] + 1)
    for left, right in ref_edges(delta, kappa0).reshape(-1, 2):
        a = max(left, low)
        if a < right:
            x = a + (right - a) * np.sin(node) ** 2
            w = np.pi / 4 * LEGENDRE[1] * (right - a) * np.sin(2 * node)
            total += np.sum(w * f(x) * ref_density(x, delta, kappa0))
    return total


def ref_J(delta: float, eps: float, kappa0: float) -> float:
    return ref_integral(lambda x: (x - eps) ** 2, eps, delta, kappa0)


def probes(delta: float, kappa0: float) -> np.ndarray:
    """20 values of eps far left, inside, at the edges, next to them, in the gap, right (the last again and again: one
    program for one band and for two)."""
    e = ref_edges(delta, kappa0)
    near = [e + 1e-6 * delta, e - 1e-6 * delta, (e[1:] + e[:-1]) / 2]
    inner = [0.9 * e[0] + 0.1 * e[1], 0.2 * e[-2] + 0.8 * e[-1]]
    found = np.concatenate([[-20.0, e[0] - 0.1], e, *near, inner, [e[-1] + 1.0]])
    return np.concatenate([found, np.full(20 - len(found), found[-1])])


@pytest.fixture(scope="module")
def sampled() -> tuple[float, float, np.ndarray]:
    """Eigenvalues of one S* + delta Z at D = 1000."""
    delta, kappa0, dim = 0.5, 0.5, 1000
    rng = np.random.default_rng(3)
    w = rng.normal(size=(dim, int(kappa0 * dim)))
    z = rng.normal(size=(dim, dim))
    z = (z + z.T) / np.sqrt(2 * dim)
    return delta, kappa0, np.linalg.eigvalsh(w @ w.T / np.sqrt(kappa0) / dim + delta * z)


@pytest.mark.parametrize(("kappa0", "delta"), GRID)
def test_J_is_the_integral_it_replaces(kappa0, delta):
    eps = probes(delta, kappa0)
    want = np.array([ref_J(delta, e, kappa0) for e in eps])
    got = np.asarray(J(delta, eps, kappa0))
    assert np.max(np.abs(got - want) / np.maximum(1, want)) < 1e-11
    np.testing.assert_allclose(got[0], 400 + 40 * np.sqrt(kappa0) + 1 + kappa0 + delta**2, 1e-13)
    assert got[-1] == 0.0


@pytest.mark.parametrize(("kappa0", "delta"), GRID)
def test_stieltjes_picks_the_physical_root(kappa0, delta):
    x = probes(delta, kappa0)
    g = np.asarray(stieltjes(x, delta, kappa0))
    s, slack = np.sqrt(kappa0), 1e-12 * (1 + np.abs(x) + delta)
    assert np.all(np.abs(1 / g + delta**2 * g + kappa0 / (s - g) - x) < slack)
    assert np.all(np.imag(g) <= 0)
    # Below the axis or on the decreasing real branch, where z'(g) < 0.
    slope = np.real(-1 / g**2 + delta**2 + kappa0 / (s - g) ** 2)
    assert np.all((np.imag(g) < 0) | (slope < 0) | (np.abs(slope) < 1e-5 * delta**2))
    np.testing.assert_allclose(-np.imag(g) / np.pi, ref_density(x, delta, kappa0), atol=1e-6 / delta)
    off = np.array([x[0], x[1], x[-1]])
    assert np.all(np.asarray(density(off, delta, kappa0)) == 0)
    # The transform itself, off the support.
    want = [ref_integral(lambda t, o=o: 1 / (o - t), -np.inf, delta, kappa0) for o in off]
    np.testing.assert_allclose(np.real(stieltjes(off, delta, kappa0)), want, 1e-9)


def difference(f: Callable, args: tuple, i: int, h: float) -> np.ndarray:
    """Sixth-order central difference in argument i."""
    move = lambda k: np.asarray(f(*(a + k * h if j == i else a for j, a in enumerate(args))))  # noqa: E731
    pairs = [move(k) - move(-k) for k in (1, 2, 3)]
    return (45 * pairs[0] - 9 * pairs[1] + pairs[2]) / (60 * h)


def settings_inside() -> list[tuple[float, float, float]]:
    out: list[tuple[float, float, float]] = []
    for kappa0, delta in SMOOTH:
        e = ref_edges(delta, kappa0)
        places = (-3 * delta - 1, (e[0] + e[1]) / 2, (e[-2] + e[-1]) / 2)
        out += [(delta, x, kappa0) for x in places]
        out += [(delta, (e[1] + e[2]) / 2, kappa0)] if len(e) == 4 else []
    return [(float(delta), float(x), float(kappa0)) for delta, x, kappa0 in out]


@pytest.mark.parametrize("args", settings_inside())
def test_J_derivatives_through_third_order(args):
    g, h, third = np.array(J_1(*args)), np.array(J_2(*args)), np.array(J_3(*args))
    for i in range(3):
        for got, f, order in (
            (g[i], ref_J, 1),
            (h[..., i], lambda *a: np.array(J_1(*a)), 2),
            (third[..., i], lambda *a: np.array(J_2(*a)), 3),
        ):
            want = difference(f, args, i, 2e-3 * args[0])
            scale = np.maximum(1.0, np.abs(want))
            assert np.max(np.abs(got - want) / scale) < 1e-7, (i, order)


def test_J_derivatives_agree_in_every_mode():
    args = (0.3, 0.4, 0.5)
    want = np.array(jax.grad(J, (0, 1, 2))(*args))
    np.testing.assert_allclose(np.array(jax.jacfwd(J, (0, 1, 2))(*args)), want, 1e-12)
    np.testing.assert_allclose(np.array(jax.jacrev(J, (0, 1, 2))(*args)), want, 1e-12)
    np.testing.assert_allclose(want[1], -2 * ref_integral(lambda x: x - 0.4, 0.4, 0.3, 0.5), 1e-10)


@pytest.mark.parametrize(("kappa0", "delta"), GRID)
def test_derivatives_are_finite_everywhere_and_zero_right_of_the_support(kappa0, delta):
    eps = probes(delta, kappa0)
    ones = np.ones_like(eps)
    batch = (delta * ones, eps, kappa0 * ones)
    g, h = np.array(jax.vmap(J_1)(*batch)), np.array(jax.vmap(J_2)(*batch))
    f = np.array(jax.vmap(F_1)(eps, delta * ones, kappa0 * ones))
    assert np.all(np.isfinite(g)) and np.all(np.isfinite(h)) and np.all(np.isfinite(f))
    assert np.all(g[:, -1] == 0) and np.all(h[..., -1] == 0) and np.all(f[:, -1] == 0)
    np.testing.assert_allclose(f[0], np.asarray(density(eps, delta, kappa0)), atol=1e-7 / delta)
    tail = 1 - np.asarray(mass_below(eps, delta, kappa0))
    np.testing.assert_allclose(h[1, 1] / 2, tail, atol=1e-9)


@pytest.mark.parametrize("args", settings_inside())
def test_mass_below_and_stieltjes_derivatives(args):
    delta, eps, kappa0 = args
    mass = ref_integral(np.ones_like, eps, delta, kappa0)
    np.testing.assert_allclose(1 - mass_below(eps, delta, kappa0), mass, atol=1e-12)
    order = (eps, delta, kappa0)
    for i in range(3):
        for f, df in ((mass_below, F_1), (F_1, F_2), (g_parts, g_1), (g_1, g_2)):
            # Outputs of a derivative of a derivative are nested [output argument][argument i].
            got = df(*order)
            got = np.array([row[i] for row in got] if f in (F_1, g_1) else got[i])
            want = difference(lambda *a, f=f: np.array(f(*a)), order, i, 1e-3 * delta)
            assert np.max(np.abs(got - want) / np.maximum(1, np.abs(want))) < 1e-7


def test_jit_eager_vmap_broadcast():
    delta = np.array([[0.1], [0.6], [2.0]])
    eps = np.array([-30.0, -0.1, 0.3, 1.0, 50.0])
    for f, args in ((J, (delta, eps, 0.5)), (mass_below, (eps, delta, 0.5))):
        got = f(*args)
        assert got.shape == (3, 5) and got.dtype == jnp.float64
        with jax.disable_jit():
            np.testing.assert_allclose(f(*args), got, rtol=1e-12, atol=1e-13)
        full = [np.broadcast_to(a, (3, 5)) for a in args]
        lanes = jax.jit(jax.vmap(f))(*full)
        np.testing.assert_allclose(lanes, got, rtol=1e-12, atol=1e-13)
        one = [[f(*(a[i, j] for a in full)) for j in range(5)] for i in range(3)]
        np.testing.assert_allclose(np.array(one), got, rtol=1e-12, atol=1e-13)
    assert stieltjes(eps, delta, 0.5).dtype == jnp.complex128
    assert np.isnan(J(np.nan, 0.3, 0.5)) and np.isnan(J(0.3, np.nan, 0.5))


def test_strict_dtypes():
    with jax.numpy_dtype_promotion("strict"):
        args = (jnp.float64(0.3), jnp.float64(0.2), jnp.float64(0.5))
        for f in (J, mass_below, pair_response, lambda d, e, k: edges(d, k)[0]):
            jax.eval_shape(jax.hessian(f, ALL), *args)
        jax.eval_shape(jax.grad(lambda d, e, k: jnp.sum(band_nodes(d, k, 8).w)), *args)
        jax.eval_shape(lambda s: (s.edges, s.atom, s.moment1), LearnedSpectrum(1, 1, 0, 1))


@pytest.mark.parametrize(("kappa0", "delta"), [*GRID, (0.05, 1e-3), (0.5, 0.13), (0.5, 0.134)])
def test_edges_and_quadrature(kappa0, delta):
    e = np.asarray(edges(delta, kappa0))
    want = ref_edges(delta, kappa0)
    assert np.array_equal(np.isnan(e), np.arange(4) >= len(want))
    e = e[: len(want)]
    np.testing.assert_allclose(e, want, rtol=1e-11, atol=1e-13)
    # The density vanishes outside each edge and not inside.
    side, step = np.where(np.arange(len(e)) % 2 == 0, 1.0, -1.0), 1e-6 * delta
    assert np.all(np.asarray(density(e - side * step, delta, kappa0)) == 0)
    assert np.all(np.asarray(density(e + side * step, delta, kappa0)) > 0)
    close = abs(delta - 0.1325) < 0.01  # next to the closing of the gap at kappa0 = 0.5
    nodes = band_nodes(delta, kappa0, n=64)
    x, w = nodes.x, nodes.w
    assert x.shape == w.shape == (128,) and bool(jnp.all(w >= 0))
    moments = [float(jnp.sum(w * x**k)) for k in range(3)]
    exact = [1.0, np.sqrt(kappa0), 1 + kappa0 + delta**2]
    np.testing.assert_allclose(moments, exact, rtol=1e-8 if close else 1e-11)
    rho = ref_density(np.asarray(x), delta, kappa0)
    np.testing.assert_allclose(nodes.density, rho, atol=1e-7 / delta)
    f = lambda t: ref_density(t, delta, kappa0) ** 2  # noqa: E731
    cubed = ref_integral(f, -np.inf, delta, kappa0)
    np.testing.assert_allclose(jnp.sum(w * nodes.density**2), cubed, rtol=1e-4 if close else 1e-9)
    _, w2, rho2 = band_nodes(delta, kappa0, n=256)
    np.testing.assert_allclose(jnp.sum(w * nodes.density**2), jnp.sum(w2 * rho2**2), rtol=1e-9)


@pytest.mark.parametrize(("kappa0", "delta"), SMOOTH)
def test_edges_derivatives(kappa0, delta):
    f = lambda d, k: jnp.nan_to_num(edges(d, k))  # noqa: E731
    first, second = jax.jacrev(f, (0, 1)), jax.jacfwd(jax.jacrev(f, (0, 1)), (0, 1))
    for i in range(2):
        want = difference(f, (delta, kappa0), i, 1e-3 * delta)
        np.testing.assert_allclose(first(delta, kappa0)[i], want, rtol=1e-8, atol=1e-8)
        want = difference(lambda *a: np.array(first(*a)), (delta, kappa0), i, 1e-3 * delta)
        got = np.array([row[i] for row in second(delta, kappa0)])
        np.testing.assert_allclose(got, want, rtol=1e-7, atol=1e-7)


def test_sampled_matrix(sampled):
    delta, kappa0, x = sampled
    law = LearnedSpectrum(1.3, delta, 0.4, kappa0)
    learned = 1.3 * np.maximum(x - 0.4, 0)
    assert abs(float(law.atom) - np.mean(learned == 0)) < 3e-3
    np.testing.assert_allclose(law.moment1, learned.mean(), rtol=0.01)
    np.testing.assert_allclose(law.moment2, np.mean(learned**2), rtol=0.01)
    np.testing.assert_allclose(law.edges[1], learned.max(), rtol=0.02)
    gaps = x[:, None] - x[None, :]
    np.fill_diagonal(gaps, 1.0)
    for eps in (-0.5, 0.4, 1.5, 3.0):
        r = np.maximum(x - eps, 0)
        ratio = ((r[:, None] - r[None, :]) / gaps) ** 2
        np.fill_diagonal(ratio, x > eps)
        np.testing.assert_allclose(pair_response(delta, eps, kappa0), ratio.mean(), rtol=0.012)


def pair_brute(delta: float, eps: float, kappa0: float) -> float:
    """Duffy triangles over the corner x = y = eps inside a single band."""
    left, right = ref_edges(delta, kappa0)
    t, w = np.polynomial.legendre.leggauss(80)
    p, q = np.meshgrid((t + 1) / 2, (t + 1) / 2)
    total, weight = 0.0, np.outer(w, w) / 4 * p
    for a, b in ((p, p * q), (p * q, p)):
        u, v = (right - eps) * a * (2 - a), (eps - left) * b * (2 - b)
        jac = 4 * (right - eps) * (1 - a) * (eps - left) * (1 - b)
        rho = ref_density(eps + u, delta, kappa0) * ref_density(eps - v, delta, kappa0)
        total += np.sum(weight * jac * rho * (u / (u + v)) ** 2)
    return float(1 - mass_below(eps, delta, kappa0)) ** 2 + 2 * total


BULK = [(0.7, 0.3, 1.0), (0.7, -0.9, 1.0), (3.0, 2.0, 0.3), (0.4, 1.0, 3.0)]


@pytest.mark.parametrize("args", BULK)
def test_pair_response_against_brute_quadrature(args):
    np.testing.assert_allclose(pair_response(*args), pair_brute(*args), rtol=0, atol=1e-7)
    got = pair_1(*args)
    for i in range(3):
        want = difference(pair_response, args, i, 1e-2)
        np.testing.assert_allclose(got[i], want, rtol=1e-5, atol=1e-5)


def test_pair_response_in_the_gap_at_edges_and_outside():
    delta, kappa0 = 0.05, 0.4
    e = ref_edges(delta, kappa0)
    middle = (e[1] + e[2]) / 2
    x, w, _ = map(np.asarray, band_nodes(delta, kappa0, n=48))
    low, high = x < middle, x > middle
    apart = np.where(high, x - x[low][:, None], 1.0)
    ratio = np.where(high, (x - middle) / apart, 0.0) ** 2
    want = kappa0**2 + 2 * np.sum(w[low][:, None] * w * ratio)
    grid = np.linspace(e[0], e[-1], 20)
    points = np.concatenate([[middle, e[0] - 1, e[-1] + 1], e - 1e-8, e, e + 1e-8, grid])
    got = np.asarray(pair_response(delta, points, kappa0))
    np.testing.assert_allclose(got[:3], [float(want), 1, 0], atol=1e-10)
    # Continuous across every edge, no matter on which side rounding puts it.
    around = got[3:15].reshape(3, 4)
    np.testing.assert_allclose(around, np.tile(around[1], (3, 1)), atol=1e-6)
    np.testing.assert_allclose(got, pair_response(delta, points, kappa0, n=128), atol=1e-7)


@pytest.mark.parametrize("eps", [-3.0, 0.0, 0.5, 1.0])
def test_learned_spectrum_integrates_to_its_moments(eps):
    eta, delta, kappa0 = 1.3, 0.1, 0.3
    law = LearnedSpectrum(eta, delta, eps, kappa0)
    bands = np.asarray(law.edges)
    bands = bands[~np.isnan(bands)].reshape(-1, 2)
    moments, node = np.zeros(3), np.pi / 4 * (LEGENDRE[0] + 1)
    for a, b in bands:
        s = a + (b - a) * np.sin(node) ** 2
        w = np.pi / 4 * LEGENDRE[1] * (b - a) * np.sin(2 * node) * np.asarray(law.density(s))
        moments += [np.sum(w * s**k) for k in range(3)]
    want = [law.rank_fraction, law.moment1, law.moment2]
    np.testing.assert_allclose(moments, np.array(want), atol=1e-10)
    np.testing.assert_allclose(law.atom + law.rank_fraction, 1.0)
    assert np.all(np.asarray(law.density(np.array([-1.0, 0.0, bands[-1, 1] + 1e-6]))) == 0)


def test_learned_spectrum_is_a_differentiable_pytree():
    eps = jnp.array([-3.0, 0.3, 9.0])
    law = LearnedSpectrum(1.3, 0.1, eps, 0.3)
    assert law.edges.shape == (3, 4) and bool(jnp.all(jnp.isnan(law.edges[2])))
    assert law.edges[1, 0] > 0 and bool(jnp.all(jnp.isnan(law.edges[1, 2:])))

    def loss(law):
        support = jnp.where(jnp.isnan(law.edges), 0.0, law.edges)
        return jnp.sum(law.moment1 + law.moment2 + law.atom) + jnp.sum(support)

    grads = jax.jit(jax.grad(loss))(law)
    assert all(bool(jnp.all(jnp.isfinite(v))) for v in jax.tree.leaves(grads))
    assert grads.eps[2] == 0
    lanes = jax.vmap(lambda e: LearnedSpectrum(1.3, 0.1, e, 0.3).moment2)(eps)
    np.testing.assert_allclose(lanes, law.moment2, rtol=1e-13)


@pytest.mark.parametrize(
    "law", [*map(Wishart, (0.5, 1.0, 2.0)), pytest.param(Atoms([0.25, 0.75], [0.0, 1.0]), marks=pytest.mark.promotes)]
)
@pytest.mark.parametrize("eps", [-0.5, 0.0, 0.3, 1.0, 2.5])
def test_without_noise_all_is_the_limit_of_little(law, eps):
    def of(d):
        slopes = jax.jacfwd(law.J, argnums=(0, 1))(d, eps)
        return [law.J(d, eps), law.mass_below(eps, d), law.pair_response(d, eps), *slopes]

    np.testing.assert_allclose(of(0.0), of(1e-6), atol=1e-4)
    np.testing.assert_allclose(law.edges(0.0), law.edges(1e-6), atol=2e-6)
    x, w, _ = law.band_nodes(0.0)
    assert float(w @ x**2) == pytest.approx(float(law.second_moment), rel=1e-6)
    density, near = float(law.density(eps, 0.0)), float(law.density(eps, 1e-6))
    assert density == (np.inf if near > 1e3 else pytest.approx(near, rel=1e-5))


def test_without_rank_it_is_a_semicircle_with_an_outlier():
    assert float(mass_below(0, 0, 0.5)) == pytest.approx(0.25, abs=1e-7)
    for eps, below in (
        (-3.0, 0.0),
        (0.0, 0.5),
        (1.0, 0.5 + np.sqrt(3) / 4 / np.pi + np.arcsin(0.5) / np.pi),
        (3.0, 1.0),
    ):
        assert float(mass_below(eps, 1.0, 0.0)) == pytest.approx(below, abs=1e-9)
    assert float(J(1.0, 0.0, 0.0)) == pytest.approx(1.5) and float(J(1.0, 3.0, 0.0)) == pytest.approx(1.0, abs=1e-5)
