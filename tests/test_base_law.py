"""General base laws against the Wishart closed form, polynomial roots, plain quadrature, matrices."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lorastate.errors import SettingError
from lorastate.model.spectra import wishart as spectrum
from lorastate.model.spectra.laws import Atoms, BaseLaw, FreeSum, Part, PowerLaw, Wishart

LEGENDRE = np.polynomial.legendre.leggauss(400)
GRID = [*itertools.product((0.2, 0.5, 1.0, 3.0), (0.02, 0.1, 0.5, 10.0)), (1.3, 0.1), (0.05, 1e-3), (0.5, 0.134)]


def two_wisharts(a, c, kappa, other) -> BaseLaw:
    return FreeSum([(a, Wishart(kappa)), (c, Wishart(other))])


def powers(s, low, high, f, c, kappa) -> BaseLaw:
    return FreeSum([(f, PowerLaw(s, low, high)), (c, Wishart(kappa))])


def atoms(w, x, y, c, kappa) -> BaseLaw:
    return FreeSum([(1.0, Atoms(jnp.stack([w, 1 - w]), jnp.stack([x, y]))), (c, Wishart(kappa))])


# Families of laws with settings: each argument is a leaf.
WW = (two_wisharts, (1.0, 0.6, 0.5, 0.2))
POWER = (powers, (1.2, 0.2, 3.0, 0.7, -0.3, 0.4))
ATOMS = (atoms, (0.3, 0.2, 1.4, 0.5, 0.3))
LAWS = [
    two_wisharts(1.0, 0.6, 0.5, 0.2),
    two_wisharts(0.4, -0.3, 0.3, 2.0),
    FreeSum([(0.5, two_wisharts(1.0, 0.6, 0.5, 0.2)), (1.0, Atoms([1.0], [0.4])), (0.5, Wishart(0.5))]),
    FreeSum([(-0.5, Atoms([0.25] * 4, [1.0, 1.0, 3.0, 7.0])), (0.3, Wishart(0.3))]),
]
WIDE = [PowerLaw(1.2, 0.2, 3.0), powers(3.0, 0.01, 5.0, -1.0, 0.3, 0.4)]


def probes(edges) -> np.ndarray:
    """eps left, in bulks, on edges, next to them, in gaps, right."""
    e = np.asarray(edges)
    e = e[~np.isnan(e)]
    near = 1e-6 * (e[1] - e[0])
    inner = [0.9 * e[0] + 0.1 * e[1], 0.2 * e[-2] + 0.8 * e[-1]]
    return np.concatenate([[-20.0, e[0] - 0.1], e, e + near, e - near, (e[1:] + e[:-1]) / 2, inner, [e[-1] + 1.0]])


def filled(values, count) -> np.ndarray:
    """The values up to `count` of them, the last one again and again: one compiled program for any number."""
    values = np.asarray(values)
    assert len(values) <= count
    return np.concatenate([values, np.full(count - len(values), values[-1])])


def close(got, want, atol, scale=1.0):
    got, want = np.asarray(got), np.asarray(want)
    assert got.shape == want.shape and np.all(np.isfinite(got))
    assert np.max(np.abs(got - want) / np.maximum(scale, np.abs(want))) < atol


def difference(f, args, i, h=1e-3) -> np.ndarray:
    """Sixth-order central difference in argument i."""
    move = lambda k: np.asarray(f(*(a + k * h if j == i else a for j, a in enumerate(args))))  # noqa: E731
    pairs = [move(k) - move(-k) for k in (1, 2, 3)]
    return (45 * pairs[0] - 9 * pairs[1] + pairs[2]) / (60 * h)


def jet(f):
    """Value, gradient and Hessian of f(delta, eps, kappa), mapped over eps."""
    parts = (f, jax.grad(f, (0, 1, 2)), jax.hessian(f, (0, 1, 2)))
    return jax.jit(jax.vmap(lambda *x: [jnp.array(p(*x)) for p in parts], (None, 0, None)))


PLAIN = jet(spectrum.J)
SUM = jet(lambda d, e, k: two_wisharts(1.0, 0.0, k, 0.7).J(d, e))


@pytest.mark.parametrize(("kappa0", "delta"), GRID)
def test_a_sum_with_one_wishart_is_its_closed_form(kappa0, delta):
    law, eps = two_wisharts(1.0, 0.0, kappa0, 0.7), filled(probes(spectrum.edges(delta, kappa0)), 20)
    plain = Wishart(kappa0)
    # Absolute errors count in units of the square of the spectrum's width.
    for got, want in zip(SUM(delta, eps, kappa0), PLAIN(delta, eps, kappa0), strict=True):
        close(got, want, 1e-12 if delta > 0.01 else 1e-11, 1 + delta**2)
    mass = law.mass_below(eps, delta)
    close(mass, plain.mass_below(eps, delta), 1e-13)
    close(law.density(eps, delta), plain.density(eps, delta), 1e-7 / delta)
    e, want = np.asarray(law.edges(delta)), np.asarray(plain.edges(delta))
    assert np.all(np.isnan(e[4:])) and np.array_equal(np.isnan(e[:4]), np.isnan(want))
    close(np.nan_to_num(e[:4]), np.nan_to_num(want), 1e-13)
    assert law.J(delta, eps)[-1] == 0 and mass[-1] == 1
    x, w, rho = law.band_nodes(delta, 64)
    exact = spectrum.band_nodes(delta, kappa0, 256)
    close([jnp.sum(w * x**k) for k in range(3)], [1.0, np.sqrt(kappa0), 1 + kappa0 + delta**2], 1e-13)
    close(jnp.sum(w * rho**2), jnp.sum(exact.w * exact.density**2), 1e-7 if kappa0 == 0.5 else 1e-12)
    close(law.pair_response(delta, eps, 32), plain.pair_response(delta, eps, 128), 2e-6)


def test_wishart_is_the_closed_form_itself():
    law, d, e = Wishart(0.3), 0.05, np.linspace(-1, 4, 9)
    assert np.array_equal(law.J(d, e), spectrum.J(d, e, 0.3)) and np.array_equal(law.edges(d), spectrum.edges(d, 0.3))
    assert np.array_equal(law.stieltjes(e, d), spectrum.stieltjes(e, d, 0.3))
    assert np.array_equal(law.density(e, d), spectrum.density(e, d, 0.3))
    assert np.array_equal(law.mass_below(e, d), spectrum.mass_below(e, d, 0.3))
    assert np.array_equal(law.band_nodes(d, 8).w, spectrum.band_nodes(d, 0.3, 8).w)
    assert np.array_equal(law.pair_response(d, e, 8), spectrum.pair_response(d, e, 0.3, 8))
    np.testing.assert_allclose([law.mean, law.second_moment], [np.sqrt(0.3), 1.3], rtol=1e-15)


def quartic_density(x, delta, a, c, kappa, other) -> np.ndarray:
    """-Im g / pi from numpy roots of z(g) = x."""
    g, s, t = np.poly1d([1.0, 0.0]), np.poly1d([-a, np.sqrt(kappa)]), np.poly1d([-c, np.sqrt(other)])
    fixed = s * t + delta**2 * g * g * s * t + a * kappa * g * t + c * other * g * s
    return np.array([np.max(-(fixed - g * s * t * float(v)).roots.imag) for v in x]) / np.pi


QUARTIC = [
    (0.03, (1.0, 0.6, 0.5, 0.2)),
    (0.03, (1.0, 1.0, 0.3, 0.3)),
    (0.03, (1.0, 1e-4, 0.5, 2.0)),
    (0.4, (1.0, 0.6, 0.5, 0.2)),
    (0.4, (0.4, -0.3, 0.3, 2.0)),
]


@pytest.mark.parametrize(("delta", "args"), QUARTIC)
def test_two_wisharts_are_the_quartic(delta, args):
    law = two_wisharts(*args)
    edges = np.asarray(law.edges(delta))
    edges = edges[~np.isnan(edges)]
    x = np.linspace(edges[0] - 0.1, edges[-1] + 0.1, 61)
    close(law.density(x, delta), quartic_density(x, delta, *args), 1e-7)
    node = np.pi / 4 * (LEGENDRE[0] + 1)
    eps = np.array([edges[0] - 1, 0.7 * edges[0] + 0.3 * edges[1], 0.5 * edges[-2] + 0.5 * edges[-1]])
    want = np.zeros((2, 3))
    for (left, right), (i, e) in itertools.product(edges.reshape(-1, 2), enumerate(eps)):
        if e < right:
            low = max(left, e)
            t = low + (right - low) * np.sin(node) ** 2
            w = np.pi / 4 * LEGENDRE[1] * (right - low) * np.sin(2 * node) * quartic_density(t, delta, *args)
            want[:, i] += np.sum(w * (t - e) ** 2), np.sum(w)
    close(law.J(delta, eps), want[0], 1e-9)
    close(1 - law.mass_below(eps, delta), want[1], 1e-9)


@pytest.mark.parametrize(("law", "delta"), [*itertools.product(LAWS, (0.05, 0.5, 3.0)), *((w, 0.5) for w in WIDE)])
def test_moments_mass_and_edges(law, delta):
    x, w, rho = (np.asarray(f) for f in law.band_nodes(delta))
    moments = [1.0, law.mean, law.second_moment + delta**2]
    close([np.sum(w * x**k) for k in range(3)], moments, 1e-6 if law is WIDE[1] else 1e-10)
    edges = np.asarray(law.edges(delta))
    room, edges = len(edges), edges[~np.isnan(edges)]
    assert np.all(np.diff(edges) > 0) and len(edges) % 2 == 0
    side, step = np.where(np.arange(len(edges)) % 2 == 0, 1.0, -1.0), 1e-6 * np.min(np.diff(edges))
    places = [x[5::9], filled(edges - side * step, room), filled(edges + side * step, room)]
    density = law.density(np.concatenate(places), delta)
    inside, off, on = np.split(np.asarray(density), [len(places[0]), len(places[0]) + room])
    close(inside, rho[5::9], 1e-6)
    assert np.all(off == 0) and np.all(on > 0)
    # In gaps, where the kink of ReLU is between the bands, the bands' quadrature is a reference for everything.
    eps = filled([edges[0] - 2, *((edges[1:-1:2] + edges[2::2]) / 2), edges[-1] + 2], room // 2 + 1)
    above = x > eps[:, None]
    rise = np.maximum(x - eps[:, None], 0)
    tight = 1e-6 if law is WIDE[1] else 1e-10
    potential, mass = law.J(delta, eps), law.mass_below(eps, delta)
    close(potential, rise**2 @ w, tight)
    close(1 - mass, above @ w, tight)
    assert potential[-1] == 0 and mass[0] == 0
    if not (law is LAWS[0] or law is LAWS[3]) or delta > 1:
        return
    want = []
    for e, up in zip(eps, above, strict=True):
        cross = up & ~up[:, None]
        share = np.where(cross, x - e, 0.0) / np.where(cross, x - x[:, None], 1.0)
        want.append((w @ up) ** 2 + 2 * w @ share**2 @ w)
    close(law.pair_response(delta, eps, 48), want, 1e-6)


FAMILIES = [
    (WW, 0.05, 0.5),
    (WW, 0.4, 1.0),
    (POWER, 0.05, 0.5),
    (POWER, 0.6, 0.2),
    (ATOMS, 0.05, 0.3),
    (ATOMS, 0.6, 1.2),
]
J_OF = {make: lambda d, e, *leaves, make=make: make(*leaves).J(d, e) for make in (two_wisharts, powers, atoms)}
MASS_OF = {make: lambda d, e, *p, make=make: make(*p).mass_below(e, d) for make in J_OF}
ORDER = (0, 1, 2, 3, 4)  # arguments of every family that second derivatives are taken in
MANY = 48


def many(f):
    """`f` of scalars at up to MANY points: each argument is a number or one per point. One compiled program."""
    mapped = jax.jit(jax.vmap(f))

    def at(*args):
        count = max(np.size(a) for a in args)
        assert count <= MANY
        rows = [np.broadcast_to(np.asarray(a, float), (count,)) for a in args]
        rows = [np.concatenate([r, np.full(MANY - count, r[-1])]) for r in rows]
        return jax.tree.map(lambda v: np.asarray(v)[:count], mapped(*rows))

    return at


J_AT = {make: many(f) for make, f in J_OF.items()}
MASS_AT = {make: many(f) for make, f in MASS_OF.items()}
GRAD = {make: many(lambda *a, f=f: jnp.stack(jax.grad(f, tuple(range(len(a))))(*a))) for make, f in J_OF.items()}
HESS = {make: many(lambda *a, f=f: jnp.array(jax.jacfwd(jax.grad(f, ORDER), ORDER)(*a))) for make, f in J_OF.items()}
MASS_GRAD = {make: many(lambda *a, f=f: jnp.stack(jax.grad(f, ORDER)(*a))) for make, f in MASS_OF.items()}


def differences(f, args, h, count=5) -> np.ndarray:
    """Sixth-order central differences of a mapped f in its first `count` arguments, the last axis."""
    steps, weights = np.array([1, 2, 3, -1, -2, -3]), np.array([45, -9, 1, -45, 9, -1]) / 60
    points = np.tile(np.array(args, float), (count, len(steps), 1))
    for i in range(count):
        points[i, :, i] += steps * h
    values = f(*points.reshape(-1, len(args)).T)
    return np.einsum("k,ik...->...i", weights / h, values.reshape(count, len(steps), *values.shape[1:]))


@pytest.mark.parametrize(("family", "delta", "eps"), FAMILIES)
def test_derivatives_in_every_leaf(family, delta, eps):
    make, leaves = family
    args = (delta, eps, *leaves)
    h = 2e-3 * min(delta, 0.3)
    first, second, mass = (f[make](*args)[0] for f in (GRAD, HESS, MASS_GRAD))
    close(first, differences(J_AT[make], args, h, len(args)), 1e-8)
    close(second, differences(GRAD[make], args, h)[: len(ORDER)], 1e-7)
    close(mass, differences(MASS_AT[make], args, h), 1e-7)
    np.testing.assert_allclose(second, second.T, atol=1e-9 * np.max(np.abs(second)))
    if make is not atoms:
        return
    # Leaves that are no argument (a factor, single weights), by the linear response of the whole law object.
    law = make(*leaves)
    grads = jax.grad(lambda law: law.J(delta, eps))(law)
    assert jax.tree.structure(grads) == jax.tree.structure(law)
    ahead, back = (jax.tree.map(lambda v, s=s: v * (1 + s * 1e-4), law) for s in (1, -1))
    want = (ahead.J(delta, eps) - back.J(delta, eps)) / 2e-4
    got = sum(jnp.sum(g * v) for g, v in zip(jax.tree.leaves(grads), jax.tree.leaves(law), strict=True))
    close(got, want, 1e-6)


def test_third_derivatives_and_modes():
    f, args = J_OF[two_wisharts], (0.3, 0.4, 1.0, 0.6, 0.5, 0.2)
    third = np.array(jax.jit(jax.jacfwd(jax.jacfwd(jax.grad(f, (0, 1, 2)), (0, 1, 2)), (0, 1, 2)))(*args))
    close(third, differences(HESS[two_wisharts], args, 1e-3)[:3, :3, :3], 1e-7)
    close(jnp.array(jax.jacfwd(f, tuple(range(len(args))))(*args)), GRAD[two_wisharts](*args)[0], 1e-13)
    mass = jax.jit(jax.jacfwd(jax.grad(MASS_OF[two_wisharts], ORDER), (0, 1)))
    want = differences(MASS_GRAD[two_wisharts], args, 1e-3)
    for i in (0, 1):
        close(np.array([row[i] for row in mass(*args)]), want[:, i], 1e-7)
    # J_eps,eps = 2 (1 - F), F_eps = density.
    close(HESS[two_wisharts](*args)[0, 1, 1], 2 * (1 - MASS_AT[two_wisharts](*args)[0]), 1e-12)
    close(MASS_GRAD[two_wisharts](*args)[0, 1], two_wisharts(*args[2:]).density(args[1], args[0]), 1e-12)


@pytest.mark.parametrize("family", [WW, POWER, ATOMS])
def test_finite_everywhere_and_mapped(family):
    make, leaves = family
    edges = make(*leaves).edges(0.05)
    eps = probes(edges)
    first, second = GRAD[make](0.05, eps, *leaves), HESS[make](0.05, eps, *leaves)
    assert np.all(np.isfinite(first)) and np.all(np.isfinite(second))
    assert np.all(first[-1] == 0) and np.all(second[-1] == 0)
    assert np.all(np.isfinite(MASS_GRAD[make](0.05, eps, *leaves)))
    mapped = J_AT[make](0.05, eps, *leaves)
    close(make(*leaves).J(0.05, eps), mapped, 1e-12)
    if make is two_wisharts:  # and alone: what is elementwise does not depend on the law
        close(mapped, np.array([jax.jit(J_OF[make])(0.05, e, *leaves) for e in eps]), 1e-12)
    assert np.all(np.isnan(J_AT[make]([np.nan, 0.1], [0.1, np.nan], *leaves)))


def test_bands_are_differentiable():
    def cube(d, a, c):
        nodes = two_wisharts(a, c, 0.5, 0.2).band_nodes(d, 24)
        return jnp.sum(nodes.w * nodes.density**2)

    pair = lambda d, a, c: two_wisharts(a, c, 0.5, 0.2).pair_response(d, 0.3, 24)  # noqa: E731
    ends = lambda d, a, c: two_wisharts(a, c, 0.5, 0.2).edges(d)[:2]  # noqa: E731
    args = (0.4, 1.0, 0.6)
    for f, accuracy in ((cube, 1e-7), (pair, 1e-5), (ends, 1e-8)):
        got = jax.jit(jax.jacrev(f, (0, 1, 2)))(*args)
        for i in range(3):
            close(got[i], difference(jax.jit(f), args, i, 1e-2), accuracy)


def test_power_law_transform_and_moments():
    nodes, weights = np.polynomial.legendre.leggauss(100)  # the weights of 400 nodes are rounded at 1e-13
    for s, low, high in ((1.2, 0.2, 3.0), (0.0, 0.5, 0.6), (-1.0, 1e-3, 2.0)):
        law = PowerLaw(s, low, high)
        t = np.log(low) + np.log(high / low) * (nodes + 1) / 2
        w = weights * np.exp(-s * t)
        w, x = w / w.sum(), np.exp(t)
        close([law.mean, law.second_moment], [w @ x, w @ x**2], 1e-13)
        # At small delta z = u, so g off the support and far from it is the transform of the law alone.
        for z in (-1.0, low / 2, 2 * high):
            close(law.stieltjes(z, 1e-8).real, w @ (1 / (z - x)), 1e-12)
        inner = np.sqrt(low * high)
        norm = np.log(high / low) if s == 0 else (low**-s - high**-s) / s
        close(law.density(inner, 1e-5), inner ** (-1 - s) / norm, 1e-5)
    ranked = PowerLaw.ranked(0.5, 0.1, 1.0)
    assert float(ranked.exponent) == 2.0
    # Rank k = D P(eigenvalue > x): x ~ k^-gamma well below the cut at high.
    above = 1 - np.asarray(ranked.mass_below(np.array([0.2, 0.4]), 1e-4))
    np.testing.assert_allclose((above[0] + 1 / 99) / (above[1] + 1 / 99), 4.0, rtol=1e-4)


def sample(law, delta, dim, rng) -> np.ndarray:
    """Eigenvalues of one matrix of dimension dim."""

    def matrix(law):
        if isinstance(law, FreeSum):
            return sum(float(p.factor) * matrix(p.law) for p in law.parts)
        if isinstance(law, Wishart):
            w = rng.normal(size=(dim, round(float(law.kappa0) * dim)))
            return w @ w.T / np.sqrt(w.shape[1] * dim)
        q = (np.arange(dim) + 0.5) / dim
        if isinstance(law, Atoms):
            return np.diag(np.asarray(law.values)[np.searchsorted(np.cumsum(law.weights), q)])
        s, low, high = float(law.exponent), float(law.low), float(law.high)
        return np.diag((low**-s - q * (low**-s - high**-s)) ** (-1 / s))

    z = rng.normal(size=(dim, dim))
    return np.linalg.eigvalsh(matrix(law) + delta * (z + z.T) / np.sqrt(2 * dim))


@pytest.mark.parametrize(
    ("law", "delta", "dim"),
    # Where few eigenvalues lie near the top of a power law its sampled edge needs a larger matrix.
    [
        (LAWS[0], 0.2, 1500),
        (LAWS[3], 0.3, 800),
        (WIDE[0], 0.2, 800),
        (powers(1.2, 0.2, 3.0, 0.7, -0.3, 0.5), 0.1, 2000),
    ],
)
def test_sampled_matrices(law, delta, dim):
    x = sample(law, delta, dim, np.random.default_rng(5))
    np.testing.assert_allclose(
        [x.mean(), np.mean(x**2)], [law.mean, law.second_moment + delta**2], rtol=0.02, atol=0.01
    )
    q = np.quantile(x, np.linspace(0.02, 0.98, 25))
    assert np.max(np.abs(np.asarray(law.mass_below(q, delta)) - np.linspace(0.02, 0.98, 25))) < 5 / dim
    edges = np.asarray(law.edges(delta))
    np.testing.assert_allclose([np.nanmin(edges), np.nanmax(edges)], [x[0], x[-1]], atol=0.05)
    eps = np.quantile(x, [0.1, 0.6])
    want = [np.mean(np.maximum(x - e, 0) ** 2) for e in eps]
    np.testing.assert_allclose(law.J(delta, eps), want, rtol=0.02)


BAD = [
    (lambda: Wishart(0.0), "wishart.kappa0 = 0.0 is out of range"),
    (lambda: Wishart("wide"), "wishart.kappa0 = 'wide' is not a number"),
    (lambda: Atoms([1.2, -0.2], [0.0, 1.0]), "atoms.weights = -0.2 is out of range"),
    (lambda: Atoms([0.5, 0.4], [0.0, 1.0]), "atoms.weights sum to 0.9; allowed: 1"),
    (lambda: Atoms([0.5, 0.5], [0.0, np.inf]), "atoms.values = inf is out of range"),
    (lambda: Atoms([1.0], [0.0, 1.0]), r"shapes \(1,\) and \(2,\); allowed: two vectors"),
    (lambda: Atoms([], []), "allowed: two vectors of one length, at least 1"),
    (lambda: PowerLaw(1.0, 0.0, 1.0), "power_law.low = 0.0 is out of range; allowed: low > 0"),
    (lambda: PowerLaw(1.0, 2.0, 1.0), "power_law.high = 1.0 is not above low = 2.0"),
    (lambda: PowerLaw(np.nan, 1.0, 2.0), "power_law.exponent = nan is out of range"),
    (lambda: PowerLaw([1.0, 2.0], 1.0, 2.0), r"power_law.exponent has shape \(2,\)"),
    (lambda: PowerLaw.ranked(0.0, 1.0, 2.0), "power_law.gamma = 0.0 is out of range"),
    (lambda: FreeSum([]), r"free_sum.parts = \(\) is empty"),
    (lambda: FreeSum([(np.inf, Wishart(1.0))]), r"free_sum.parts\[0\].factor = inf is out of range"),
    (lambda: FreeSum([(1.0, 0.5)]), r"free_sum.parts\[0\] = \(1.0, 0.5\) is not a pair"),
    (lambda: FreeSum([(0.0, PowerLaw(1.0, 1.0, 2.0))]), "power law with factor = 0.0"),
    (lambda: FreeSum([(1.0, Wishart([1.0, 2.0]))]), r"wishart.kappa0 has shape \(2,\)"),
    (lambda: FreeSum([(1.0, WIDE[0]), (1.0, LAWS[3])]), "has PowerLaw and Atoms; allowed: at most one"),
]


@pytest.mark.parametrize(("make", "message"), BAD)
def test_bad_input_is_refused_in_one_sentence(make, message):
    with pytest.raises(SettingError, match=message) as error:
        make()
    assert "allowed" in str(error.value) and "\n" not in str(error.value)


def test_parts_are_leaves_by_name():
    law = FreeSum([(1.0, Wishart(0.5)), Part(jnp.asarray(0.6), Wishart(0.2))])
    assert len(jax.tree.leaves(law)) == 4 and law.parts[1].factor == 0.6 and law.parts[1].law == Wishart(0.2)
    np.testing.assert_allclose(law.second_moment, 1.5 + 0.36 * 1.2 + 2 * 0.6 * np.sqrt(0.1), rtol=1e-14)
