"""Inner minimisers: the global one among many wells, wells that are followed, derivatives across jumps."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lorastate as ls
from lorastate.evolution import finetuning as ft
from lorastate.evolution.order import Order
from lorastate.math.quadrature import nested_nodes
from lorastate.model import proximal as prox
from lorastate.model import wells
from lorastate.model.channel.frozen_map import FrozenMap

# Noisy labels and a weak ridge: many nodes have several wells.
FINE = ls.Setting(ls.Pretraining(0.1, 0.003, delta=2.0), ls.Finetuning(3.0, 0.05)).finetuning_resolved
FROZEN = FrozenMap(jnp.array(1.6), jnp.array(2.6), jnp.array(2.0))


def order(v, spread=0.5):
    return Order(jnp.asarray(v), jnp.array(0.9), jnp.array(0.7), (jnp.asarray(spread),), (jnp.array(2.0),))


@pytest.fixture(scope="module")
def draws():
    dimension, mirror = ft.node_dimension(FINE), ft.mirrored(FINE)
    nodes = nested_nodes(dimension, 128, 1, 0, mirror, None, 128, 3, (16,))
    return ft.draws(FINE, FROZEN, jax.tree_util.tree_map(lambda a: jnp.asarray(a[0]), nodes))


@jax.jit
def located(d, o, previous, cold):
    return wells.locate(ft.inner_problem(FINE, o, d), ft.samples(o, d), d.teacher, previous, cold)


def nothing(samples=16):
    return jax.tree_util.tree_map(lambda a: a[0], wells.nothing(1, 3, 128, samples))


def lowest_of_many(problem, count=40):
    descend = jax.jit(lambda u: prox.locate(problem, u)[1])
    starts = 2 * jax.random.normal(jax.random.key(1), (count, *problem.omega.shape))
    return np.min([descend(u) for u in starts], 0)


def test_the_global_minimum_is_found_and_followed(draws):
    """Cold, and after changes of the order parameters that make some minimisers jump."""
    found = located(draws, order(0.8), nothing(), True)
    for v, spread in ((0.8, 0.5), (0.9, 0.45), (1.0, 0.4)):
        found = located(draws, order(v, spread), found, False)
        problem = ft.sampled_problem(FINE, order(v, spread), draws)
        assert np.all(found.ok)
        depth, best = problem.terms(found.u[0])[0], lowest_of_many(problem) + 1e-6
        cold = problem.terms(located(draws, order(v, spread), nothing(), True).u[0])[0]
        # Three times as many are missed where anchors are looked for at omega, not at samples.
        assert np.mean(depth > best) <= 0.005 and np.mean(cold > best) <= 0.001
        second = problem.terms(found.u[1])[0]
        two = np.asarray(found.two)
        assert 0.01 < two.mean() < 0.8 and np.all(second[two] >= depth[two] - 1e-9)
        assert np.all(np.max(np.abs(found.u[0] - found.u[1]), 0)[two] > 1e-4)


def test_wells_that_come_up_far_away_are_found_anew(draws):
    """From an update that is nearly nothing, where every sample has one well, to one that is hardly held: following
    misses the lowest wells, looking for anchors anew does not."""
    small = Order(jnp.array(0.2), jnp.array(0.0), jnp.array(0.05), (jnp.array(0.01),), (jnp.array(2.0),))
    far = Order(jnp.array(3.0), jnp.array(0.0), jnp.array(0.3), (jnp.array(0.1),), (jnp.array(2.0),))
    near = located(draws, small, nothing(), True)
    problem = ft.sampled_problem(FINE, far, draws)

    def missed(anew):
        found = jax.jit(wells.locate)(
            ft.inner_problem(FINE, far, draws), ft.samples(far, draws), draws.teacher, near, False, True, anew
        )
        return np.mean(problem.terms(found.u[0])[0] > best + 1e-6)

    best = lowest_of_many(problem)
    assert missed(True) <= 0.01 < 0.1 < missed(False)


def test_one_well_alone_says_where_there_may_be_two(draws):
    problem = ft.inner_problem(FINE, order(0.8), draws)
    previous = jax.tree_util.tree_map(lambda a: a[0], wells.nothing(1, 3, 128, alone=True))
    found = jax.jit(wells.locate_alone)(problem, draws.teacher, previous, True)
    assert found.u.shape == (1, 3, 128) and np.all(found.ok)
    assert not np.any(found.two[128 // 16 :])  # looked at in a few nodes
    assert float(np.sum(wells.share(found))) == 16 * int(np.sum(found.two))


def test_derivatives_see_jumps():
    """E of the minimiser of a double well in one dimension, (u^2 - 1)^2 + (u - x)^2 / (2 v), x ~ N(a, 1): in a it moves
    by the jump at x = 0 times the density there, which differentiation node by node leaves out."""
    x = np.random.default_rng(0).normal(size=100_000)
    grid = np.linspace(-4, 4, 4001)
    v = 0.5
    best = np.array([grid[np.argmin((grid**2 - 1) ** 2 + (grid - y) ** 2 / (2 * v))] for y in np.linspace(-5, 5, 2001)])

    class Double:
        def __init__(self, omega):
            self.omega = omega

        def terms(self, u):
            f = (u**2 - 1) ** 2 + (u - self.omega) ** 2 / (2 * v)
            return f[0], 4 * u * (u**2 - 1) + (u - self.omega) / v, (12 * u**2 - 4 + 1 / v)[:, None]

    jax.tree_util.register_pytree_node(Double, lambda p: ((p.omega,), None), lambda _, c: Double(*c))

    def mean(a):
        problem = Double((jnp.asarray(x) + a)[None])
        start = jnp.interp(problem.omega, np.linspace(-5, 5, 2001), best)
        stop = jax.lax.stop_gradient(problem)

        def down(_, u):
            _, slope, curvature = jax.vmap(stop.terms)(u)
            return u - jnp.clip(slope / jnp.maximum(curvature[:, 0], 0.3), -0.2, 0.2)

        u = jax.lax.stop_gradient(jax.lax.fori_loop(0, 60, down, jnp.stack([start, -start])))
        _, slope, curvature = stop.terms(u[1])
        other = (jnp.abs(slope)[0] < 1e-8) & (curvature[0, 0] > 0) & (jnp.abs(u[0] - u[1])[0] > 0.5)
        found = wells.Wells(jax.lax.stop_gradient(u), other, other)
        low = wells.lowest(problem, found)
        return jnp.mean(low.pick(low.u))

    slope, mean = jax.jit(jax.grad(mean))(0.3), jax.jit(mean)
    h = 0.05
    differences = (mean(0.3 + h) - mean(0.3 - h)) / (2 * h)
    assert float(slope) == pytest.approx(float(differences), rel=0.02)
    density = np.exp(-(0.3**2) / 2) / np.sqrt(2 * np.pi)
    jump = 2 * abs(float(np.interp(1e-3, np.linspace(-5, 5, 2001), best)))
    assert float(slope) > 0.8 * jump * density  # most of it


def test_bias_is_taken_away():
    """2 f(all) - mean f(halves) of a square, over many draws."""
    x = np.random.default_rng(0).normal(1.0, 1.0, (200_000, 2, 4))
    halves = x.mean(2)
    found = wells.debiased(halves.mean(1) ** 2, np.moveaxis(halves, 1, 0) ** 2)
    assert found.mean() == pytest.approx(1.0, abs=5e-3)
    assert np.mean(halves.mean(1) ** 2) > 1.1


@pytest.mark.parametrize("seed", range(3))
def test_derivatives_see_wells_that_part(seed):
    """E of the minimiser of u^4/4 - s u^2/2 - (t + a) u, s and t Gaussian: two wells part at s = 0. Its derivative in a
    is E t u, for t is standard; a kernel that takes the jumps for smooth in the distance of depths, as exact as that
    (1.5 - x^2/2 times a Gaussian of a tenth of the mean distance), is off by 4 % of their part."""
    rng = np.random.default_rng(seed)
    s, t = jnp.asarray(rng.normal(0.3, 1.0, 400_000)), jnp.asarray(rng.normal(size=400_000))

    class Cusp:
        def __init__(self, omega):
            self.omega = omega

        def terms(self, u):
            f = u**4 / 4 - s[None] * u**2 / 2 - self.omega * u
            return f[0], u**3 - s[None] * u - self.omega, (3 * u**2 - s[None])[:, None]

    jax.tree_util.register_pytree_node(Cusp, lambda p: ((p.omega,), None), lambda _, c: Cusp(*c))
    far = jnp.sqrt(jnp.maximum(1.44 * s, 0)) + 1.2 * jnp.cbrt(jnp.abs(t)) + 1.0

    def settled(u):  # from outside, Newton's method ends at the outermost stationary point, or turns round
        for _ in range(60):
            u = u - (u**3 - s * u - t) / jnp.maximum(3 * u**2 - s, 1e-9)
        good = (jnp.abs(u**3 - s * u - t) < 1e-8) & (3 * u**2 > s)
        return u, jnp.where(good, u**4 / 4 - s * u**2 / 2 - t * u, jnp.inf)

    (right, above), (left, below) = settled(far), settled(-far)
    low, other = jnp.where(above <= below, right, left), jnp.where(above <= below, left, right)
    two = jnp.isfinite(above + below) & (jnp.abs(low - other) > 1e-4)
    found = wells.Wells(jnp.stack([low, jnp.where(two, other, low)])[:, None], two, two)

    def mean(a):
        best = wells.lowest(Cusp((t + a)[None]), found)
        return jnp.mean(best.pick(best.u))

    slope, smooth = float(jax.grad(mean)(0.0)), float(jnp.mean(1.0 / (3 * low**2 - s)))
    assert bool(jnp.all(jnp.isfinite(jnp.minimum(above, below)))) and 0.1 < float(jnp.mean(two, dtype=float)) < 0.3
    assert slope - smooth == pytest.approx(float(jnp.mean(t * low)) - smooth, rel=0.03)
