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
    nodes = nested_nodes(dimension, 128, 1, 0, mirror, None, 128, 3, (8,))
    return ft.draws(FINE, FROZEN, jax.tree_util.tree_map(lambda a: jnp.asarray(a[0]), nodes))


@jax.jit
def located(d, o, previous, cold):
    return wells.locate(ft.inner_problem(FINE, o, d), ft.samples(o, d), d.teacher, previous, cold)


def nothing(samples=8):
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
        depth = problem.terms(found.u[0])[0]
        assert np.mean(depth > lowest_of_many(problem) + 1e-6) <= 0.01
        second = problem.terms(found.u[1])[0]
        two = np.asarray(found.two)
        assert 0.01 < two.mean() < 0.8 and np.all(second[two] >= depth[two] - 1e-9)
        assert np.all(np.max(np.abs(found.u[0] - found.u[1]), 0)[two] > 1e-4)


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
    x = np.random.default_rng(0).normal(size=400_000)
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
        u = jnp.stack([start, -start])
        for _ in range(20):
            u = jnp.stack([w - jnp.clip(stop.terms(w)[1] / stop.terms(w)[2][0], -0.2, 0.2) for w in u])
        f = [stop.terms(w)[0] for w in u]
        other = (f[1] - f[0] < 50.0) & (jnp.abs(u[0] - u[1])[0] > 0.5)
        found = wells.Wells(jax.lax.stop_gradient(u), other, other)
        low = wells.lowest(problem, found)
        return jnp.mean(low.pick(low.u))

    slope = jax.grad(mean)(0.3)
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
