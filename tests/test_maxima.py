"""Outer coordinates of a fixed point, in which something is maximal: steps towards a maximum and its derivative."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lorastate.errors import Code
from lorastate.math.fixed_point import COLD, WARM, Map, Method, Rules, newton_step
from lorastate.math.implicit import CURVED, attach, implicit
from lorastate.math.maximum import climb, curvature, uphill_step

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


def test_steps_towards_a_maximum():
    jac, residual, _ = linear(0.8)
    given = jnp.asarray(jac), jnp.asarray(residual), 1
    np.testing.assert_allclose(uphill_step(*given, 10.0), np.linalg.solve(np.eye(N + 1) - jac, residual), rtol=1e-11)
    held = np.asarray(newton_step(*given))
    assert held[N] == 0
    np.testing.assert_allclose(held[:N], np.linalg.solve(np.eye(N) - jac[:N, :N], residual[:N]), rtol=1e-12)


def test_away_from_a_minimum():
    """Where the slope rises Newton's method would go to the minimum: the step is uphill, of the longest length."""
    jac, residual, answer = linear(-0.5)
    direct = np.linalg.solve(np.eye(N) - jac[:N, :N], residual[:N])
    slope = residual[N] + jac[N, :N] @ direct
    step = np.asarray(uphill_step(jnp.asarray(jac), jnp.asarray(residual), 1, 0.2))
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


def climbed(slope, start, tries=30, edge=np.inf, level=0.0):
    """A climb in y of something with this slope, where x = cos(x)/2 + y follows; beyond the `edge` x has no value."""

    def image(z, memory, how, _):
        x, y = z
        out = jnp.stack([jnp.where(y < edge, 0.5 * jnp.cos(x) + y, jnp.nan), y + slope(x, y)])
        return out, memory.at[0].add(1).at[1].add(jnp.where(how == COLD, 1, 0))

    def jacobian(z, *_):
        return jax.jacfwd(lambda z: image(z, jnp.zeros(2, int), WARM, 0)[0])(z)

    rules = Rules.of(Method(tolerance=1e-6, max_steps=60), exact=False)
    fmap, begin = Map(image, jacobian, outer=1), jnp.array([0.0, start])
    found, placed = climb(fmap, rules, True, begin, jnp.zeros((2, 2)), jnp.zeros(2, int), tries, level)
    return found, bool(placed)


@pytest.mark.parametrize("start", [-1.9, 0.3, 1.4])
def test_a_climb_ends_at_the_next_maximum(start):
    """The slope sin(2 pi y)/10 + (x_y - x)/10 has maxima at y = 0.5 + n where x is x_y: that uphill counts."""
    found, placed = climbed(lambda x, y: 0.1 * jnp.sin(2 * np.pi * y) + 0.1 * (0.5 * jnp.cos(x) + y - x), start)
    assert placed and int(found.point.code) == Code.ok
    x, y = np.asarray(found.point.x)
    assert y == pytest.approx(np.floor(start) + 0.5, abs=1e-5)
    assert x == pytest.approx(0.5 * np.cos(x) + y, abs=2e-6)


def test_a_climb_of_no_steps_stays():
    found, placed = climbed(lambda x, y: 0.3 - y, 1.0, tries=0)
    assert not placed and found.point.x[1] == 1.0
    assert found.point.x[0] == pytest.approx(0.5 * np.cos(float(found.point.x[0])) + 1.0, abs=2e-6)


def test_only_the_first_pass_of_a_climb_is_cold():
    found, placed = climbed(lambda x, y: jnp.tanh(0.3 - y), -1.5)
    assert placed and found.point.x[1] == pytest.approx(0.3, abs=1e-5)
    assert found.memory[1] == 1 < found.memory[0] - 5


def test_a_jump_of_the_slope_is_no_maximum():
    found, placed = climbed(lambda x, y: jnp.where(y < 1.234, 0.4, -0.4), 0.0)
    assert not placed and int(found.point.code) == Code.ok
    assert abs(found.point.x[1] - 1.234) <= 0.5


def test_a_slope_that_cannot_be_told_from_zero():
    """0.02 + (y - 1)^2 / 10 is never zero: with a level of 0.03 the climb ends near y = 1, without it goes on."""
    found, placed = climbed(lambda x, y: 0.02 + 0.1 * (y - 1) ** 2, 0.0, level=0.03)
    assert placed and found.point.x[1] == pytest.approx(1.0, abs=0.4)
    found, placed = climbed(lambda x, y: 0.02 + 0.1 * (y - 1) ** 2, 0.0)
    assert not placed and found.point.x[1] > 2


def test_a_climb_comes_back_from_where_nothing_is_found():
    """Short of the maximum at 2 there is nothing more: the climb stays on the side where there is."""
    found, placed = climbed(lambda x, y: 0.1 * (2 - y), 0.0, edge=1.3)
    assert not placed and int(found.point.code) == Code.ok
    assert 0.9 < found.point.x[1] < 1.3
    x, y = np.asarray(found.point.x)
    assert x == pytest.approx(0.5 * np.cos(x) + y, abs=2e-6)


def test_a_climb_leaves_what_repels():
    """x = 0 solves x = tanh(2 y x) for all y, and repels where y > 1/2; the slope is that of the maximum at x^2."""

    def image(z, memory, how, _):
        x, y = z
        return jnp.stack([jnp.tanh(2 * y * x), y + 0.3 * (0.4 + x**2 - y)]), memory

    fmap = Map(image, lambda z, *_: jax.jacfwd(lambda z: image(z, None, WARM, 0)[0])(z), outer=1)
    rules = Rules.of(Method(tolerance=1e-8, max_steps=60), exact=False)

    def found(low, away, fmap=fmap):
        return climb(fmap, rules, True, jnp.array([0.0, low]), jnp.zeros((2, 2)), None, 40, 0.0, away)

    (there, *_), placed = found(-0.4, lambda z: z)
    assert bool(placed) and there.x[1] == pytest.approx(0.4, abs=1e-5) and there.x[0] == 0
    further = fmap._replace(image=lambda z, memory, *_: (image(z, memory, False, 0)[0].at[1].add(0.12), memory))
    (there, *_), placed = found(-0.4, lambda z: z, further)
    assert not bool(placed) and there.x[1] < 0.65
    (there, *_), placed = found(-0.4, lambda z: z.at[0].set(0.5), further)
    x, y = np.asarray(there.x)
    assert bool(placed) and abs(x) > 0.3 and x == pytest.approx(np.tanh(2 * y * x), abs=1e-6)
    assert y == pytest.approx(0.8 + x**2, abs=1e-5)
