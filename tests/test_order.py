"""Parts of both stages: the law of a student field, starts of a search, averages over samples that are weighted."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from orders import order_for

import lorastate as ls
from lorastate.evolution import breaking, starts
from lorastate.evolution import finetuning as ft
from lorastate.evolution.order import Order, decode, from_norm, student_field
from lorastate.model.channel.frozen_map import FrozenMap


@pytest.mark.parametrize(("rank", "teacher_rank"), [(1, 1), (2, 2), (1, 3), (3, 1)])
def test_the_student_field_has_its_law(rank, teacher_rank):
    """E omega . chi* and E omega^2 of every column, and nothing between columns that are not each other's."""
    tokens, size, n = 2, 1.7, 200_000
    order = order_for(rank, teacher_rank)
    one, two = jax.random.split(jax.random.key(0))
    teacher = jnp.sqrt(size) * jax.random.normal(one, (teacher_rank * tokens, n))
    base, scale = student_field(order, teacher, rank * tokens, size)
    omega = base + scale * jax.random.normal(two, (rank * tokens, n))
    m, square = (np.atleast_1d(np.asarray(v)) for v in (order.overlap, order.norm(size)))
    k = min(rank, teacher_rank) * tokens
    overlap = np.zeros((rank * tokens, teacher_rank * tokens))
    overlap[np.arange(k), np.arange(k)] = m[0]
    norm = np.diag([square[0]] * k + [square[-1]] * (rank * tokens - k))
    np.testing.assert_allclose(np.asarray(omega @ teacher.T) / n, overlap, atol=0.02)
    np.testing.assert_allclose(np.asarray(omega @ omega.T) / n, norm, atol=0.02)


def test_what_is_below_a_floor_is_lifted():
    low = from_norm(jnp.array(-1.0), jnp.array(0.5), jnp.array(0.2), 1.0)  # overlap^2 > norm
    assert 0 < float(low.response) < 1e-8 and 0 < float(low.noise) < 1e-6
    assert np.isnan(from_norm(jnp.array(np.nan), jnp.array(0.5), jnp.array(0.2), 1.0).response)


def test_an_update_that_fits_noise_starts_as_large():
    """No label without bounds but a noisy one changes a start."""
    quiet, noisy = (FrozenMap(jnp.array(1.0), jnp.array(size), jnp.array(1.0)) for size in (2.0, 400.0))
    identity, softmax = (ls.Finetuning(3.0, 0.3, 1.0, name, 2) for name in ("identity", "softmax"))
    assert float(starts.fitted(identity, quiet)) == float(starts.fitted(softmax, noisy)) == 1.0
    size = float(starts.fitted(identity, noisy))
    assert size == pytest.approx(np.sqrt(float(identity.effective_noise(noisy))) / 4) and size > 4
    small, large = (ft.order_at(identity, starts.start(identity, True, by)) for by in (1.0, size))
    np.testing.assert_allclose(large.response * large.norm(1.0), small.response * small.norm(1.0), rtol=1e-12)


@pytest.mark.parametrize("ranks", [(1, 1), (3, 1)], ids=["rank one", "spare directions"])
def test_starts_keep_what_they_should(ranks):
    fine = ls.Finetuning(3.0, 0.3, 1.0, "softmax", 2, rank=ranks[0], teacher_rank=ranks[1])
    order = order_for(*ranks)
    x, (q,) = order.encode(), order.norms(ft.TEACHER_SIZE)
    broken = ft.order_at(fine, starts.broken_start(fine, x))
    p, whole = broken.norms(ft.TEACHER_SIZE)
    np.testing.assert_allclose(broken.response, order.response, rtol=1e-12)
    np.testing.assert_allclose(whole, np.maximum(q, 0.1), rtol=1e-12)
    np.testing.assert_allclose(p, 0.9 * whole, rtol=1e-12)
    blind = ft.order_at(fine, starts.broken_start(fine, x, informative=False))
    assert float(broken.along.overlap) > 5 * float(blind.along.overlap) > 0
    lost = ft.order_at(fine, starts.broken_start(fine, jnp.full_like(x, jnp.nan)))
    assert all(np.all(np.isfinite(v)) for v in jax.tree_util.tree_leaves(lost))
    pushed = ft.order_at(fine, starts.pushed(fine, x))
    np.testing.assert_allclose(pushed.norm(ft.TEACHER_SIZE), q, rtol=1e-12)
    m = float(pushed.along.overlap)
    assert m == pytest.approx(np.sqrt(np.atleast_1d(q)[0]) / 2, rel=1e-12)
    gap = abs(m - float(order.along.overlap))
    np.testing.assert_allclose(starts.apart(fine, x, pushed.encode()), [gap, 0.0], atol=1e-12)


@pytest.mark.parametrize("ranks", [(1, 1), (3, 1)], ids=["rank one", "spare directions"])
def test_minima_that_are_one_are_pushed_apart(ranks):
    """Where the teacher is known what repels is that minima part, and m stays; where it is not, m does not."""
    fine, order = ls.Finetuning(3.0, 0.3, 1.0, "softmax", 2, rank=ranks[0], teacher_rank=ranks[1]), order_for(*ranks)
    spread = 1e-4 * jnp.ones_like(order.response)
    for known, share in ((0.8, 1.0), (0.01, None)):
        m = known * jnp.sqrt(jnp.atleast_1d(order.norms(ft.TEACHER_SIZE)[0])[0])
        overlap = m * (jnp.array([1.0, 0.0]) if ft.spare(fine) else 1.0)
        one = order._replace(overlap=overlap, spread=(spread,), breaking=(jnp.array(1.0),))
        apart = ft.order_at(fine, starts.pushed(fine, one.encode()))
        (p, q), was = apart.norms(ft.TEACHER_SIZE), one.norm(ft.TEACHER_SIZE)
        np.testing.assert_allclose(q, was, rtol=1e-3)
        if share:
            assert float(apart.along.overlap) == pytest.approx(float(m), rel=1e-12)
            np.testing.assert_allclose(q - p, one.noise**2 / 3, rtol=1e-3)
        else:
            assert float(apart.along.overlap) > 10 * float(m)


def test_weighted_averages_of_few_samples():
    """f = s z: -(1/y) log E exp(-y f) = -y s^2/2, and under that weight E z = -y s. Most of what few samples do to
    nonlinear functions of averages has been taken away."""
    y, s, samples = 1.2, 0.6, 64
    z = jax.random.normal(jax.random.key(2), (1, samples, 100_000))
    free, (mean,), square = (
        jax.tree_util.tree_map(np.asarray, v) for v in breaking.level(y, np.ones((1, 1)), s * z[0], [z])
    )
    weight = np.exp(-y * s * np.asarray(z))
    biased = np.sum(weight * z, 1) / np.sum(weight, 1)
    low = -np.log(weight[0].mean(0)) / y
    cases = (free, low, -y * s**2 / 2), (mean, biased, -y * s), (square, biased**2, (y * s) ** 2)
    for got, plain, want in cases:
        assert abs(plain.mean() - want) > 3e-3  # else this tests nothing
        assert abs(got.mean() - want) < abs(plain.mean() - want) / 3


def quadratic(a, noise, spreads, ys):
    """E |g_i|^2 and E g_i . z_i of f = a x^2 / 2 at x = noise z_0 + s_1 z_1 + ..., z_i weighted by exp(-y_i f_i): each
    f_i is a square again, of what the levels up to i add up to."""
    bends = [a]
    for s, y in zip(spreads[::-1], ys[::-1], strict=True):
        bends.insert(0, bends[0] / (1 + y * bends[0] * s**2))
    square = noise**2
    squares, pulls = [bends[0] ** 2 * square], [bends[0] * noise]
    for bend, s, y in zip(bends[1:], spreads, ys, strict=True):
        shrinks = 1 + y * bend * s**2
        both, square = square / shrinks, square / shrinks**2 + s**2 / shrinks
        squares.append(bend**2 * square)
        pulls.append(bend * (square - both) / s)
    return squares, pulls


@pytest.mark.parametrize(("spreads", "ys"), [((), ()), ((0.7,), (1.3,)), ((0.7, 0.4), (0.8, 2.1))])
def test_divergence_from_integration_by_parts(spreads, ys):
    """div g = a at every level of a quadratic f."""
    squares, pulls = quadratic(1.9, 0.5, spreads, ys)
    order = Order(jnp.array(0.4), jnp.array(0.3), jnp.array(0.5), tuple(map(jnp.asarray, spreads)), ys)
    found = breaking.divergence_of(order, squares, [jnp.atleast_1d(jnp.asarray(v)) for v in pulls])
    np.testing.assert_allclose(found, 1.9, rtol=1e-12)


def test_coordinates_of_two_steps():
    """Every number comes back from its coordinates (one step: with the other tests of breaking)."""
    v, m, noise, one, two, y, z = map(jnp.asarray, (0.3, 0.5, 0.1, 0.2, 0.4, 1.0, 3.0))
    order = Order(v, m, noise, (one, two), (y, z))
    for a, b in zip(jax.tree_util.tree_leaves(decode(order.encode())), jax.tree_util.tree_leaves(order), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-13)
