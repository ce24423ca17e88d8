"""Outer coordinates of a fixed point, in which something is maximal: steps towards a maximum and its derivative."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lorastate.math.fixed_point import curvature, newton_step
from lorastate.math.implicit import CURVED, attach, implicit

N = 3


def linear(bend):
    """A linear map of N coordinates and an outer one, whose slope falls by `bend` when the others follow."""
    rng = np.random.default_rng(0)
    jac, residual = 0.3 * rng.normal(size=(N + 1, N + 1)), 0.1 * rng.normal(size=N + 1)
    answer = np.linalg.solve(np.eye(N) - jac[:N, :N], jac[:N, N])
    jac[N, N] = 1 - (bend + jac[N, :N] @ answer)
    return jac, residual, answer


@pytest.mark.parametrize("bend", [0.8, -0.5])
def test_curvature_with_the_others_following(bend):
    jac, _, answer = linear(bend)
    found, curved = curvature(jnp.asarray(jac), 1)
    np.testing.assert_allclose(found[:, 0], answer, rtol=1e-12)
    np.testing.assert_allclose(curved, bend, rtol=1e-12)


@pytest.mark.parametrize("columns", [None, 2])
def test_steps_towards_a_maximum(columns):
    jac, residual, _ = linear(0.8)
    rhs = residual if columns is None else np.stack([residual, -2 * residual], 1)
    given = jnp.asarray(jac), jnp.asarray(rhs), 1
    np.testing.assert_allclose(newton_step(*given, uphill=10.0), np.linalg.solve(np.eye(N + 1) - jac, rhs), rtol=1e-11)
    held = np.asarray(newton_step(*given, hold=True))
    assert np.all(held[N] == 0)
    np.testing.assert_allclose(held[:N], np.linalg.solve(np.eye(N) - jac[:N, :N], rhs[:N]), rtol=1e-12)


def test_away_from_a_minimum():
    """Where the slope rises Newton's method would go to the minimum: the step is uphill, of the longest length."""
    jac, residual, answer = linear(-0.5)
    direct = np.linalg.solve(np.eye(N) - jac[:N, :N], residual[:N])
    slope = residual[N] + jac[N, :N] @ direct
    step = np.asarray(newton_step(jnp.asarray(jac), jnp.asarray(residual), 1, uphill=0.2))
    assert abs(slope) > 0.01 and step[N] == pytest.approx(0.2 * np.sign(slope))
    np.testing.assert_allclose(step[:N], direct + answer * step[N], rtol=1e-11)


def test_a_flat_maximum_stays_where_it_is():
    for bend in (0.8, CURVED / 2):
        jac, change, _ = linear(bend)
        found = np.asarray(implicit(jnp.asarray(jac), jnp.asarray(change), 1))
        if bend > CURVED:
            np.testing.assert_allclose(found, np.linalg.solve(np.eye(N + 1) - jac, change), rtol=1e-11)
        else:
            assert found[N] == 0
            np.testing.assert_allclose(found[:N], np.linalg.solve(np.eye(N) - jac[:N, :N], change[:N]), rtol=1e-12)


def test_slope_of_a_maximum():
    """x = sin(y) + a, y at the maximum of b x - y^2 / 2: dy/db and dx/db from y = b cos(y)."""

    def step(x, args, _):
        a, b = args
        return jnp.stack([jnp.sin(x[1]) + a, x[1] + b * jnp.cos(x[1]) - x[1]])

    b, y = 0.6, 0.5
    for _ in range(60):
        y -= (y - b * np.cos(y)) / (1 + b * np.sin(y))
    x = jnp.array([np.sin(y) + 0.2, y])
    by_a, by_b = jax.jacfwd(lambda args: attach(step, 1, x, args))((jnp.array(0.2), jnp.array(b)))
    dy = np.cos(y) / (1 + b * np.sin(y))
    np.testing.assert_allclose(by_a, [1, 0], atol=1e-12)
    np.testing.assert_allclose(by_b, [np.cos(y) * dy, dy], rtol=1e-12)
