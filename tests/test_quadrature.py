"""Gaussian nodes and the frozen-map channel: exact moments, honest error bars, the law of (Y0, Z_W)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import kstest

jax.config.update("jax_enable_x64", True)

from lorastate.math.quadrature import (  # noqa: E402
    Slots,
    by_replica,
    for_parts,
    gaussian_nodes,
    in_blocks,
    mean,
    over_replicas,
    sweep,
)
from lorastate.model.channel.fields import field_dimension  # noqa: E402
from lorastate.model.channel.frozen_map import FrozenMap  # noqa: E402
from lorastate.model.channel.inputs import Fresh  # noqa: E402

# dimension, nodes, replicas, mirrored coordinates
SETS = [
    (1, 2048, 8, None),
    (3, 4096, 8, None),
    (3, 4096, 8, (1, 3)),
    (2, 4096, 16, (1, 2)),
    (6, 8192, 8, (3, 6)),
]


def direction(dimension):
    return np.linspace(0.3, 1.1, dimension)


# Integrand and its Gaussian expectation in closed form.
SMOOTH = {
    "cosine": (lambda x: np.cos(direction(len(x)) @ x), lambda d: np.exp(-np.sum(direction(d) ** 2) / 2)),
    "bell": (lambda x: np.exp(-0.35 * np.sum(x * x, 0)), lambda d: 1.7 ** (-d / 2)),
    "exponential": (
        lambda x: np.exp(0.5 * direction(len(x)) @ x),
        lambda d: np.exp(np.sum(direction(d) ** 2) / 8),
    ),
}


def estimates(f, nodes):
    """The weighted mean of f in each replica."""
    return np.array([w @ f(x) for x, w in zip(nodes.normal, nodes.weight, strict=True)])


def bar(e):
    """The quadrature error bar: standard error of the mean over replicas."""
    return e.std(ddof=1) / np.sqrt(len(e))


@pytest.mark.parametrize("key", SETS)
def test_moments_up_to_second_are_exact(key):
    dimension, nodes, replicas, mirror = key
    n = gaussian_nodes(dimension, nodes, replicas, 0, mirror)
    per = nodes // replicas
    assert n.normal.shape == (replicas, dimension, per)
    assert n.weight.shape == (replicas, per)
    # Uniform weights miss these moments by far more: the matching is what makes the test below pass.
    assert np.abs(np.einsum("rdn,ren->rde", n.normal, n.normal) / per - np.eye(dimension)).max() > 1e-5
    np.testing.assert_allclose(n.weight.sum(1), 1.0, rtol=0, atol=1e-12)
    np.testing.assert_allclose(np.einsum("rn,rdn->rd", n.weight, n.normal), 0.0, atol=1e-12)
    second = np.einsum("rn,rdn,ren->rde", n.weight, n.normal, n.normal)
    np.testing.assert_allclose(second, np.broadcast_to(np.eye(dimension), second.shape), atol=1e-12)
    assert n.weight.min() > 0


@pytest.mark.parametrize("key", SETS)
def test_halves_are_mirror_images(key):
    dimension, nodes, replicas, mirror = key
    n = gaussian_nodes(dimension, nodes, replicas, 0, mirror)
    first, second = np.split(n.normal, 2, axis=2)
    low, high = mirror or (0, dimension)
    flipped = np.arange(dimension)[low:high]
    kept = np.setdiff1d(np.arange(dimension), flipped)
    np.testing.assert_array_equal(second[:, flipped], -first[:, flipped])
    np.testing.assert_array_equal(second[:, kept], first[:, kept])
    left, right = np.split(n.weight, 2, axis=1)
    np.testing.assert_array_equal(left, right)
    # Odd in the mirrored coordinates, of high order and modulated by the others: zero to rounding.
    odd = estimates(lambda x: np.sum(x[low:high], 0) ** 3 * np.exp(0.3 * np.sum(x[kept], 0)), n)
    np.testing.assert_allclose(odd, 0.0, atol=1e-12)


def test_nodes_without_images():
    n = gaussian_nodes(5, 4096, 4, 0, ())
    assert n.normal.shape == (4, 5, 1024)
    for x in n.normal:
        assert len(np.unique(np.abs(x[0]))) == 1024, "no node is the image of another"
    np.testing.assert_allclose(n.weight.sum(1), 1.0, atol=1e-12)
    np.testing.assert_allclose(np.einsum("rn,rdn->rd", n.weight, n.normal), 0.0, atol=1e-12)
    second = np.einsum("rn,rdn,ren->rde", n.weight, n.normal, n.normal)
    np.testing.assert_allclose(second, np.broadcast_to(np.eye(5), second.shape), atol=1e-12)
    # As many nodes with images are half as many points: this even function is integrated better without.
    f, exact = SMOOTH["bell"]
    spread = [estimates(f, gaussian_nodes(5, 2**15, 32, 0, mirror)).std() for mirror in (None, ())]
    assert spread[1] < 0.8 * spread[0]
    assert abs(estimates(f, n).mean() - exact(5)) < 4 * bar(estimates(f, n))


def test_order_of_the_coordinates():
    order = (2, 0, 3, 1)
    n, plain = gaussian_nodes(4, 1024, 2, 0, (1, 2), order), gaussian_nodes(4, 1024, 2, 0, (1, 2))
    np.testing.assert_array_equal(n.normal[:, :, :256], plain.normal[:, order, :256])
    np.testing.assert_array_equal(n.normal[:, 1, 256:], -n.normal[:, 1, :256])
    np.testing.assert_allclose(np.einsum("rn,rdn,rdn->rd", n.weight, n.normal, n.normal), 1.0, atol=1e-12)


@pytest.mark.parametrize("mirror", [None, (1, 3), ()])
def test_parts_are_the_replicas_cut(mirror):
    whole, n = gaussian_nodes(3, 4096, 4, 5, mirror), gaussian_nodes(3, 4096, 4, 5, mirror, part=256)
    assert n.normal.shape == (16, 3, 256) and n.weight.shape == (16, 256)
    for f, _ in SMOOTH.values():
        np.testing.assert_allclose(by_replica(estimates(f, n), 4), estimates(f, whole), rtol=1e-13)
    # All nodes of a replica are in its own parts, each with its image.
    for r in range(4):
        got = n.normal[4 * r : 4 * r + 4].transpose(1, 0, 2).reshape(3, -1)
        np.testing.assert_array_equal(np.sort(got[0]), np.sort(whole.normal[r, 0]))
    if mirror != ():
        first, second = np.split(n.normal, 2, axis=2)
        flipped = slice(*mirror) if mirror else slice(None)
        np.testing.assert_array_equal(second[:, flipped], -first[:, flipped])
    of_replica = np.arange(4.0)
    np.testing.assert_array_equal(for_parts(of_replica, n), np.repeat(of_replica, 4))
    np.testing.assert_array_equal(by_replica(for_parts(of_replica, n), 4), of_replica)
    # A part as large as a replica, or larger, changes nothing.
    np.testing.assert_array_equal(gaussian_nodes(3, 4096, 4, 5, mirror, part=1024).normal, whole.normal)


def test_replicas_and_seeds():
    n = gaussian_nodes(3, 1024, 4, 7)
    for a in range(4):
        for b in range(a):
            assert np.abs(np.sort(n.normal[a, 0]) - np.sort(n.normal[b, 0])).max() > 1e-3
            assert not np.intersect1d(n.normal[a], n.normal[b]).size
    gaussian_nodes.cache_clear()
    again = gaussian_nodes(3, 1024, 4, 7)
    assert again is not n
    for x, y in zip(n, again, strict=True):
        np.testing.assert_array_equal(x, y)
    assert not np.intersect1d(n.normal, gaussian_nodes(3, 1024, 4, 8).normal).size
    # More replicas of the same seed extend the list: the earlier ones stay.
    np.testing.assert_array_equal(gaussian_nodes(3, 2048, 8, 7).normal[:4], n.normal)


def test_few_nodes_fall_back_to_uniform_weights():
    n = gaussian_nodes(6, 64, 2, 0)  # 22 constraints on 16 pairs
    np.testing.assert_array_equal(n.weight, np.full((2, 32), 1 / 32))


def test_marginals_are_normal():
    """Each marginal against the normal law: a wrong quantile map fails this, but not the moments."""
    n = gaussian_nodes(3, 8192, 4, 0)
    for x in n.normal.reshape(-1, n.normal.shape[-1]):
        assert kstest(x, "norm").statistic < 4 / len(x)  # a random sample of this size has 0.02


@pytest.mark.parametrize("name", SMOOTH)
@pytest.mark.parametrize("key", SETS)
def test_expectations_within_the_error_bar(key, name):
    f, exact = SMOOTH[name]
    e = estimates(f, gaussian_nodes(*key[:3], 0, key[3]))
    assert 0 < bar(e) < 0.03 * exact(key[0]), "the bar itself must be small for the next line to mean something"
    assert abs(e.mean() - exact(key[0])) < 4 * bar(e)


@pytest.mark.parametrize("name", SMOOTH)
@pytest.mark.parametrize("key", SETS)
def test_error_bar_covers(key, name):
    """Over 20 seeds the means scatter as the replica error bar says, and around the exact value."""
    f, exact = SMOOTH[name]
    runs = [estimates(f, gaussian_nodes(*key[:3], seed, key[3])) for seed in range(20)]
    means, bars = np.array([e.mean() for e in runs]), np.array([bar(e) for e in runs])
    assert 0.6 < means.std(ddof=1) / bars.mean() < 1.6
    assert abs(means.mean() - exact(key[0])) < 1.2 * bars.mean()


def test_over_replicas_and_mean():
    nodes = gaussian_nodes(2, 256, 4, 0)
    scale = jnp.arange(1.0, 5.0)
    out = over_replicas(lambda n, s: {"m": s * jnp.sum(n.weight * n.normal[0] ** 4)}, nodes, scale)["m"]
    plain = np.asarray(scale) * estimates(lambda x: x[0] ** 4, nodes)
    np.testing.assert_allclose(out, plain, rtol=1e-13)
    np.testing.assert_allclose(mean({"m": out})["m"], plain.mean(), rtol=1e-13)


def test_blocks_add_up():
    """In blocks or at once: values, forward and reverse derivatives; parts that repeat the nodes are cut alike."""
    nodes = jax.tree_util.tree_map(lambda a: jnp.asarray(a[0]), gaussian_nodes(3, 4096, 2, 1, (1, 2)))
    half = 1024
    inner = {"twice": jnp.concatenate([nodes.normal, 2 * nodes.normal], -1), "flag": jnp.array(3.0)}
    nodes = nodes._replace(found=nodes.normal[:, :half] ** 2)

    def f(n, i, a):
        # Which node is which matters: what was found on one half belongs to both.
        found = jnp.concatenate([n.found, n.found], -1)
        first, second = jnp.split(i["twice"], 2, -1)
        same = jnp.sum(n.weight * jnp.sum((found[0] - n.normal[0] ** 2)[None] ** 2 + (second - 2 * first) ** 2, 0))
        return same + i["flag"] * jnp.sum(n.weight * jnp.sin(a * n.normal[1] + found[2]))

    def at_once(a):
        return f(nodes, inner, a)

    def blocks(a):
        sizes = []

        def g(n, i):
            sizes.append(n.weight.shape[0])
            return f(n, i, a)

        out = in_blocks(g, nodes, inner)
        assert set(sizes) == {1024}  # half of them
        return out

    for d in (lambda g: g, jax.grad, jax.jacfwd):
        np.testing.assert_allclose(jax.jit(d(blocks))(0.7), jax.jit(d(at_once))(0.7), rtol=1e-11)
    assert abs(float(at_once(0.7))) > 1e-3


def test_slots_keep_what_does_not_count():
    nodes = gaussian_nodes(1, 256, 4, 0)
    memory = Slots.of({"m": jnp.zeros(4)})

    def f(n, m):
        return m["m"], {"m": m["m"] + 1 + n.normal[0, 0] * 0}

    def after(memory, count, accept, write=True):
        value, memory = sweep(f, nodes, memory, count, write)
        return float(value), memory.commit(accept)

    value, memory = after(memory, 1, True)  # one replica: the others stay as they were
    assert value == 0.0 and memory.read()["m"].tolist() == [1, 0, 0, 0]
    value, memory = after(memory, 4, False)
    assert value == 0.25 and memory.read()["m"].tolist() == [1, 0, 0, 0]
    value, memory = after(memory, 4, True)
    assert value == 0.25 and memory.read()["m"].tolist() == [2, 1, 1, 1]
    value, memory = after(memory, 4, False, write=False)
    assert value == 1.25 and memory.read()["m"].tolist() == [2, 1, 1, 1]


# ---- the channel

MAPS = [(0.3, 0.4, 0.8, 0.2), (0.9, 1.1, 1.0, 0.0), (-0.2, 0.5, 0.6, 1.5)]  # M, Q, Q0, delta


@pytest.mark.parametrize("tokens", [2, 3])
@pytest.mark.parametrize("case", MAPS)
def test_fresh_channel_covariance(case, tokens):
    """Weighted second moments of all pairs of entries; exact, since the nodes' second moments are."""
    overlap, norm, q0, delta = case
    frozen, inputs = FrozenMap(overlap, norm, q0), Fresh()
    d = inputs.dimension(tokens, False)
    assert d == tokens * (tokens + 1) == field_dimension(tokens, False)
    n = gaussian_nodes(d, 1024, 1, 3)
    y0, zw = inputs.fields(frozen, delta, tokens, False, n.normal[0])
    assert y0.shape == zw.shape == (tokens, tokens, n.normal.shape[2])
    np.testing.assert_array_equal(y0, np.swapaxes(y0, 0, 1))
    np.testing.assert_array_equal(zw, np.swapaxes(zw, 0, 1))
    both = np.stack([y0, zw])
    got = np.einsum("n,iabn,jcdn->ijabcd", n.weight[0], both, both)
    eye = np.eye(tokens)
    pairs = np.einsum("ac,bd->abcd", eye, eye) + np.einsum("ad,bc->abcd", eye, eye)  # 1 + delta_ab on itself
    want = np.array([[q0 + delta / 2, overlap], [overlap, norm]])[:, :, None, None, None, None] * pairs
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-11)
    np.testing.assert_allclose(np.einsum("n,iabn->iab", n.weight[0], both), 0.0, atol=1e-12)
    gap = np.einsum("n,abn->ab", n.weight[0], np.asarray(y0 - zw) ** 2) / (1 + eye)
    np.testing.assert_allclose(gap, inputs.moments(frozen, delta, tokens, False).effective_noise(), rtol=1e-11)


@pytest.mark.parametrize("tokens", [2, 3])
def test_fresh_channel_without_the_common_shift(tokens):
    """Dropping 11^T: the same fields up to a multiple of 11^T, which softmax forgets."""
    overlap, norm, q0, delta = MAPS[0]
    inputs = Fresh()
    d = inputs.dimension(tokens, True)
    assert d == tokens * (tokens + 1) - 2
    n = gaussian_nodes(d, 1024, 1, 3)
    y0, zw = inputs.fields(FrozenMap(overlap, norm, q0), delta, tokens, True, n.normal[0])
    both = np.stack([y0, zw])
    np.testing.assert_allclose(both.sum((1, 2)), 0.0, atol=1e-12)
    got = np.einsum("n,iabn,jcdn->ijabcd", n.weight[0], both, both)
    eye = np.eye(tokens)
    pairs = np.einsum("ac,bd->abcd", eye, eye) + np.einsum("ad,bc->abcd", eye, eye) - 2 / tokens**2
    want = np.array([[q0 + delta / 2, overlap], [overlap, norm]])[:, :, None, None, None, None] * pairs
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-11)


def test_effective_noise_formula():
    frozen = FrozenMap(0.3, 0.4, 0.8)

    def noise(f, d):
        return Fresh().moments(f, d, 2, False).effective_noise()

    assert float(noise(frozen, 0.2)) == pytest.approx(0.1 + 0.8 - 0.6 + 0.4, abs=1e-15)
    slopes = jax.grad(noise, (0, 1))(FrozenMap(0.3, 0.4, 0.8), 0.2)
    assert tuple(map(float, (*slopes[0][:3], slopes[1]))) == (-2.0, 1.0, 1.0, 0.5)


@pytest.mark.parametrize("drop_shift", [False, True])
def test_zero_map(drop_shift):
    """M = Q = 0: a frozen map that learned nothing. Z_W vanishes, and neither value nor gradient is NaN."""
    n = gaussian_nodes(Fresh().dimension(2, drop_shift), 512, 1, 0)

    def energy(overlap, norm, q0, delta):
        y0, zw = Fresh().fields(FrozenMap(overlap, norm, q0), delta, 2, drop_shift, n.normal[0])
        return jnp.einsum("n,abn->", n.weight[0], y0**2), jnp.einsum("n,abn->", n.weight[0], y0 * zw), y0, zw

    y2, cross, y0, zw = energy(0.0, 0.0, 0.8, 0.2)
    assert np.abs(zw).max() < 1e-8 and np.isfinite(y0).all()
    total = 4.0 if drop_shift else 6.0  # sum of 1 + delta_ab over entries, less the shift's 2
    assert float(y2) == pytest.approx(0.9 * total, rel=1e-12)
    assert abs(float(cross)) < 1e-8
    for output in (0, 1):
        # The noise term has weight sqrt(Q - M^2 / size): its slope in Q is cut off at zero, not infinite.
        slopes = jax.grad(lambda *a, k=output: energy(*a)[k], (0, 1, 2, 3))(0.0, 0.0, 0.8, 0.2)
        assert np.isfinite(slopes).all()
        want = (0.0, 0.0, total, total / 2) if output == 0 else (total, None, 0.0, 0.0)
        for got, expected in zip(slopes, want, strict=True):
            if expected is not None:
                assert float(got) == pytest.approx(expected, abs=1e-7)
