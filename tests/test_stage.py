"""From a fixed point to an answer with error bars: replicas of a linear toy, and codes that the bars decide."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

jax.config.update("jax_enable_x64", True)

from lorastate.errors import Code  # noqa: E402
from lorastate.math.fixed_point import FixedPoint  # noqa: E402
from lorastate.math.quadrature import Nodes  # noqa: E402
from lorastate.solution.stage import Solved, Stage, described, final_status  # noqa: E402

A = jnp.array([[0.5, 0.2], [-0.1, 0.3]])
B = jnp.array([0.5, -1.0])
REPLICAS = 8


class Linear(Stage):
    """x = A x + b E g + shift: every replica has a mean of g, and so a solution, of its own."""

    shift: jax.Array

    def step(self, x, const):
        raise NotImplementedError

    def part(self, x, nodes, inner, gap=True):
        return jnp.sum(nodes.weight * nodes.normal[0]), inner

    def image(self, averages, x):
        return A @ x + B * averages[0] + self.shift

    def refreshed(self, x, nodes, inner, steps):
        return nodes, inner

    def test_errors(self, x, nodes):
        return jnp.sum(nodes.weight * nodes.normal[1]) + x[0]

    def predictions(self, x, averages, errors):
        return {"first": x[0], "second": x[1], "error": errors}


def described_toy(offset: float | np.ndarray = 0.0, shifts=None):
    """Description of the toy whose point is `offset` away from the solution, with the solutions of the replicas."""
    rng = np.random.default_rng(0)
    normal, weight = rng.normal(size=(2 * REPLICAS, 2, 16)), np.full((2 * REPLICAS, 16), 1 / 16)
    nodes = Nodes(jnp.asarray(normal), jnp.asarray(weight))  # two parts of every replica
    solve = np.linalg.inv(np.eye(2) - A)
    means = normal.mean(-1).reshape(REPLICAS, 2, 2).mean(1)
    upstream = np.zeros((REPLICAS, 2)) if shifts is None else shifts
    own = np.array([solve @ (B * mean + shift) for mean, shift in zip(means[:, 0], upstream, strict=True)])
    x = own.mean(0) + offset
    zero = jnp.zeros(())
    point = FixedPoint(jnp.asarray(x), jnp.array(0), zero, zero, zero, zero, jnp.asarray(own.mean(0) - x), zero)
    solved = Solved(point, A, jnp.zeros((2 * REPLICAS, 16)))
    given = (Linear, solved, jnp.asarray(x), nodes, nodes, REPLICAS)
    found = described(*given, (jnp.asarray(upstream.mean(0)),), (jnp.asarray(upstream),))
    return found, {"first": own[:, 0], "second": own[:, 1], "error": means[:, 1] + own[:, 0]}


@pytest.mark.parametrize("upstream", [False, True])
def test_every_replica_is_carried_to_its_own_solution(upstream):
    shifts = 0.1 * np.random.default_rng(1).normal(size=(REPLICAS, 2)) if upstream else None
    found, own = described_toy(shifts=shifts)
    np.testing.assert_allclose(found.xs, np.stack([own["first"], own["second"]], 1), rtol=1e-12)
    for name, values in own.items():
        assert float(found.values[name]) == pytest.approx(values.mean(), rel=1e-12)
        assert float(found.errors[name]) == pytest.approx(np.std(values, ddof=1) / np.sqrt(REPLICAS), rel=1e-9)
    assert float(found.shift) < 1e-9


def test_what_a_solve_has_left_undone_is_part_of_the_bars():
    offset = np.array([0.3, 0.0])
    found, own = described_toy(offset)
    spread = np.std(own["first"], ddof=1) / np.sqrt(REPLICAS)
    assert float(found.errors["first"]) == pytest.approx(np.hypot(spread, 0.3), rel=1e-9)
    assert float(found.shift) == pytest.approx(0.3 / (spread + 5e-4), rel=1e-9)


@pytest.mark.parametrize(
    ("code", "shift", "want"),
    [
        (Code.floor, 1.9, Code.ok),
        (Code.floor, 2.1, Code.stalled),
        (Code.floor, np.nan, Code.stalled),
        (Code.ok, 10.0, Code.ok),
        (Code.stalled, 0.0, Code.stalled),
        (Code.unstable, 0.0, Code.unstable),
        (Code.upstream, np.nan, Code.upstream),
    ],
)
def test_a_stop_at_a_jump_counts_inside_the_error_bars_only(code, shift, want):
    status = {"code": jnp.array(int(code)), "residual": jnp.array(1e-4)}
    for transform in (lambda f: f, jax.jit):
        found = transform(lambda status, shift: final_status(status, {}, shift))(status, jnp.array(shift))
        assert Code(int(found["code"])) is want and float(found["residual"]) == 1e-4
