"""The fixed-point solver: what each failure is called, implicit derivatives, small linear algebra."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

jax.config.update("jax_enable_x64", True)

from lorastate.errors import Code, succeeded  # noqa: E402
from lorastate.math.fixed_point import (  # noqa: E402
    ANEW,
    Map,
    Method,
    Rules,
    fixed_point,
    iterate,
    plain_map,
)
from lorastate.math.linear import (  # noqa: E402
    cholesky,
    small_solve,
    solve_lower,
    solve_transposed,
    spectral_bounds,
    symmetric_inverse,
)
from lorastate.math.roots import change_between, root_between  # noqa: E402

PICARD = Method(burn_in=-1)
PLAIN = Method(burn_in=-1, damping=0.0)


class Case(NamedTuple):
    """A map x -> step(x, a) that fails for a = bad and has the stable fixed point `root` for a = good."""

    step: Any
    method: Method
    bad: float
    code: Code
    most_steps: int
    good: float
    root: Any
    slope: float  # d root / d a


def affine(x, a, _):
    return a * x + 1.0


HALF = (0.5, 2.0, 4.0)  # of x = a x + 1: root 1 / (1 - a), slope 1 / (1 - a)^2
CASES = {
    "translation": Case(lambda x, a, _: a * x + 1, Method(), 1.0, Code.stalled, 30, *HALF),
    "translation, Picard": Case(affine, Method(burn_in=-1, bound=50.0), 1.0, Code.diverged, 75, *HALF),
    "repelling, Picard": Case(affine, PICARD, 2.0, Code.diverged, 20, *HALF),
    "repelling, Newton": Case(affine, Method(), 2.0, Code.unstable, 12, *HALF),
    # Overflows within five steps of any start; the image is infinite before the iterate passes the bound.
    "exponential": Case(lambda x, a, _: jnp.exp(a * x), Method(), 1.0, Code.nonfinite, 8, -1.0, None, 0.0),
    "NaN": Case(
        lambda x, a, _: 1 + a * x * jnp.where(a > 1, jnp.nan, 1), PICARD, 2.0, Code.nonfinite, 1, *HALF
    ),
    "NaN later": Case(
        # Picard steps down from 0.3 by 0.7 each: outside the domain at the third.
        lambda x, a, _: jnp.where(a > 0.9, x - a * jnp.sqrt(x + 1.5) / jnp.sqrt(x + 1.5), a * x + 1),
        Method(), 1.0, Code.nonfinite, 5, *HALF,
    ),
    "slow": Case(affine, Method(burn_in=-1, damping=0.0, max_steps=60), 0.9999, Code.max_steps, 60, *HALF),
    "no fixed point": Case(
        lambda x, a, _: jnp.where(a > 0.9, x - a * (0.1 + x * x), a * x + 1),
        Method(), 1.0, Code.stalled, 30, *HALF,
    ),
    "no fixed point, waves": Case(
        lambda x, a, _: jnp.where(a > 0.9, x + a * (1.1 + jnp.sin(x)), a * x + 1),
        Method(), 1.0, Code.stalled, 30, *HALF,
    ),
    "jump": Case(
        lambda x, a, _: jnp.where(a > 0.9, a * (0.5 * x - 1e-4 * jnp.sign(x)), a * x + 1),
        Method(), 1.0, Code.stalled, 40, *HALF,
    ),
}  # fmt: skip
W = 0.5671432904097838  # exp(-w) = w; w(a): w = exp(a w), dw/da = w^2 / (1 - a w)
CASES["exponential"] = CASES["exponential"]._replace(root=W, slope=W**2 / (1 + W))


def expected_failure(case, code, steps):
    assert Code(int(code)) is case.code
    assert 0 <= int(steps) <= case.most_steps


@pytest.mark.parametrize("name", CASES)
def test_failures(name):
    """The code, how soon, and that a healthy lane next to the failed one does not notice."""
    case = CASES[name]
    x0 = jnp.array([0.3])

    def solve(a):
        return fixed_point(case.step, case.method, x0, a)

    def root(a):
        sol = solve(a)
        return sol.x[0], sol

    both = jax.value_and_grad(root, has_aux=True)
    for run in (both, jitted := jax.jit(both)):
        (_, sol), slope = run(case.bad)
        expected_failure(case, sol.code, sol.steps)
        assert np.isnan(slope)
    (_, alone), slope = jitted(case.good)
    assert Code(int(alone.code)) is Code.ok and succeeded(alone.code)
    assert float(alone.x[0]) == pytest.approx(case.root, rel=1e-8)
    assert float(slope) == pytest.approx(case.slope, rel=1e-8)

    (_, lanes), slopes = jax.jit(jax.vmap(both))(jnp.array([case.bad, case.good]))
    expected_failure(case, lanes.code[0], lanes.steps[0])
    assert np.isnan(slopes[0])
    assert int(lanes.code[1]) == Code.ok and int(lanes.steps[1]) == int(alone.steps)
    np.testing.assert_allclose(lanes.x[1], alone.x, rtol=1e-14)
    np.testing.assert_allclose(slopes[1], slope, rtol=1e-13)


def test_failed_lane_inside_a_sum():
    """grad(sum(vmap)): the NaN of a failed lane stays in that lane."""

    def total(a):
        return jnp.sum(jax.vmap(lambda a: fixed_point(affine, PICARD, jnp.array([0.3]), a).x[0])(a))

    slopes = jax.jit(jax.grad(total))(jnp.array([2.0, 0.5]))
    assert np.isnan(slopes[0])
    assert float(slopes[1]) == pytest.approx(4.0, rel=1e-8)


@pytest.mark.parametrize(
    "step", [lambda x, a, _: 1.0 - x, lambda x, a, _: 3.2 * x * (1.0 - x)], ids=["reflection", "logistic"]
)
def test_two_cycle(step):
    sol = fixed_point(step, PLAIN, jnp.array([0.3]), 1.0)
    assert Code(int(sol.code)) is Code.cycle
    assert int(sol.steps) < 60


def test_three_cycle_is_no_two_cycle():
    sol = fixed_point(lambda x, a, _: x[jnp.array([1, 2, 0])], PLAIN, jnp.array([0.1, 0.5, 0.9]), 1.0)
    assert Code(int(sol.code)) is Code.max_steps


def test_not_finite_start():
    sol = fixed_point(affine, Method(), jnp.array([jnp.nan]), 0.5)
    assert Code(int(sol.code)) is Code.nonfinite and int(sol.steps) <= 0


def test_require_stable_off():
    def solve(a):
        return fixed_point(affine, Method(require_stable=False), jnp.array([0.3]), a)

    sol = solve(2.0)
    assert Code(int(sol.code)) is Code.ok
    assert float(sol.x[0]) == pytest.approx(-1.0, abs=1e-10)
    assert float(sol.rate) == pytest.approx(2.0) and float(sol.growth) == pytest.approx(2.0)
    assert float(jax.grad(lambda a: solve(a).x[0])(2.0)) == pytest.approx(1.0)
    # An oscillating repeller (slope -3) repels the plain iteration alone: stable under enough damping.
    sol = fixed_point(affine, Method(), jnp.array([0.3]), -3.0)
    assert Code(int(sol.code)) is Code.ok
    assert float(sol.rate) == pytest.approx(3.0) and float(sol.growth) == pytest.approx(-3.0)


def jumping(x, a, _):
    """Slope a with a jump of 2e-4 down across its would-be fixed point 1."""
    return 1 + a * (x - 1) - 1e-4 * jnp.where(x > 1, 1.0, -1.0)


@pytest.mark.parametrize("transform", [lambda f: f, jax.jit])
def test_floor(transform):
    def solve(a, floor):
        return fixed_point(jumping, Method(floor=floor), jnp.array([0.3]), a)

    sol = transform(lambda a: solve(a, 1e-3))(0.5)
    assert Code(int(sol.code)) is Code.floor and succeeded(sol.code)
    assert 1e-10 < float(sol.residual) < 1e-3 and int(sol.steps) < 40
    assert abs(float(sol.x[0]) - 1) <= float(sol.error) < 2e-3
    # The derivative is that of the branch the point sits on: dx/da = (x - 1) / (1 - a).
    slope = transform(jax.grad(lambda a: solve(a, 1e-3).x[0]))(0.5)
    assert float(slope) == pytest.approx((float(sol.x[0]) - 1) / 0.5, abs=1e-12)
    # A floor below the jump changes nothing, and neither does a floor where a fixed point exists.
    assert int(transform(lambda a: solve(a, 1e-5))(0.5).code) == Code.stalled
    smooth = fixed_point(affine, Method(floor=1e-3), jnp.array([0.3]), 0.5)
    assert int(smooth.code) == Code.ok and float(smooth.residual) <= 1e-10
    # The floor excuses no repelling branch.
    repelling = fixed_point(
        lambda x, a, _: 1 + a * (x - 1) + 1e-4 * jnp.where(x > 1, 1.0, -1.0),
        Method(floor=1e-3, burn_in=0),
        jnp.array([1.3]),
        1.5,
    )
    assert Code(int(repelling.code)) is Code.unstable and 1e-10 < float(repelling.residual) < 1e-3


class Places(NamedTuple):
    """Where something was last searched for, at the point that counts and at the last trial."""

    here: Any
    there: Any


def searched(x, memory, how, _):
    """1 + x/2; more than 0.3 from where it was last searched for something is missed, and 1/2 is added."""
    at = jnp.where(how >= ANEW, x[0], memory.here)
    return 1 + x / 2 + jnp.where(jnp.abs(x[0] - at) > 0.3, 0.5, 0.0), Places(memory.here, at)


def test_points_are_compared_by_what_is_known_at_both():
    def solve(stale):
        fmap = Map(
            searched,
            lambda *_: jnp.array([[0.5]]),
            lambda memory, accept: Places(jnp.where(accept, memory.there, memory.here), memory.there),
            0,
            stale,
        )
        memory = Places(jnp.zeros(()), jnp.zeros(()))
        return iterate(fmap, Rules.of(Method()), True, jnp.array([0.3]), jnp.zeros((1, 1)), memory)

    found = solve(lambda x, memory: jnp.abs(x[0] - memory.here) > 0.3)
    assert int(found.point.code) == Code.ok and float(found.point.x[0]) == pytest.approx(2.0)
    assert int(found.point.steps) < 25 and abs(float(found.memory.here) - 2.0) < 0.3
    assert float(solve(lambda x, memory: jnp.array(False)).point.x[0]) == pytest.approx(3.0)  # else this tests nothing


def test_a_jacobian_that_a_failed_stage_has_left_harms_nothing():
    fmap = plain_map(affine, 0.5)
    found = iterate(fmap, Rules.of(Method(), exact=False), True, jnp.array([0.3]), jnp.full((1, 1), jnp.nan), None)
    assert int(found.point.code) == Code.ok and float(found.point.x[0]) == pytest.approx(2.0)


# ---- derivatives


class Parameters(NamedTuple):
    weight: Any
    shift: Any
    gain: Any


CONST = {"bias": jnp.array([0.2, -0.1, 0.4]), "kind": jnp.array(3)}
P = Parameters(
    jnp.array([[0.3, -0.2, 0.1], [0.25, 0.1, -0.3], [-0.15, 0.35, 0.2]]),
    jnp.array([0.1, 0.7, -0.4]),
    {"g": 1.3},
)
X0 = jnp.zeros(3)


def network(x, p, const):
    return jnp.tanh(p.weight @ x + p.shift) * p.gain["g"] + const["bias"] * jnp.cos(x[::-1] / const["kind"])


def flat(v):
    return Parameters(v[:9].reshape(3, 3), v[9:12], {"g": v[12]})


V0 = jnp.concatenate([P.weight.ravel(), P.shift, jnp.array([P.gain["g"]])])


def implicit(v):
    return fixed_point(network, Method(tolerance=1e-13), X0, flat(v), CONST).x


def unrolled(v):
    return jax.lax.scan(lambda x, _: (network(x, flat(v), CONST), None), X0, None, length=120)[0]


def scalar(v):
    x = implicit(v)
    return x[0] * x[1] + jnp.sin(x[2])


def scalar_unrolled(v):
    x = unrolled(v)
    return x[0] * x[1] + jnp.sin(x[2])


def test_first_derivatives():
    x = jax.jit(implicit)(V0)
    np.testing.assert_allclose(x, unrolled(V0), atol=1e-12)
    forward, reverse = jax.jit(jax.jacfwd(implicit))(V0), jax.jit(jax.jacrev(implicit))(V0)
    np.testing.assert_allclose(forward, reverse, atol=1e-13)
    np.testing.assert_allclose(forward, jax.jit(jax.jacfwd(unrolled))(V0), atol=1e-11)
    # Closed form, by numpy: (I - F_x)^{-1} F_v with the derivatives of tanh and cos written out.
    x, bias = np.asarray(x), np.asarray(CONST["bias"])
    t = np.tanh(np.asarray(P.weight) @ x + np.asarray(P.shift))
    g = P.gain["g"] * (1 - t**2)
    f_x = g[:, None] * np.asarray(P.weight)
    f_x -= (bias * np.sin(x[::-1] / 3) / 3)[:, None] * np.eye(3)[::-1]
    f_v = np.concatenate([np.kron(np.diag(g), x[None]), np.diag(g), t[:, None]], 1)
    np.testing.assert_allclose(forward, np.linalg.solve(np.eye(3) - f_x, f_v), atol=1e-12)
    h, value = 1e-5, jax.jit(jax.vmap(implicit))
    central = (value(V0[None] + h * jnp.eye(13)) - value(V0[None] - h * jnp.eye(13))).T / (2 * h)
    np.testing.assert_allclose(forward, central, atol=1e-8)


def test_second_derivatives():
    hessian = jax.jit(jax.hessian(scalar))(V0)
    np.testing.assert_allclose(hessian, hessian.T, atol=1e-11)
    np.testing.assert_allclose(hessian, jax.jit(jax.hessian(scalar_unrolled))(V0), atol=1e-10)
    h, gradient = 1e-5, jax.jit(jax.vmap(jax.grad(scalar)))
    central = (gradient(V0[None] + h * jnp.eye(13)) - gradient(V0[None] - h * jnp.eye(13))) / (2 * h)
    np.testing.assert_allclose(hessian, central, atol=1e-8)


def test_vmap_and_grad_commute():
    batch = V0[None] + 0.05 * jnp.asarray(np.random.default_rng(0).standard_normal((4, 13)))
    inner = jax.jit(jax.vmap(jax.grad(scalar)))(batch)
    outer = jax.jit(jax.grad(lambda b: jnp.sum(jax.vmap(scalar)(b))))(batch)
    single = jax.jit(jax.vmap(jax.grad(scalar_unrolled)))(batch)
    np.testing.assert_allclose(inner, outer, atol=1e-13)
    np.testing.assert_allclose(inner, single, atol=1e-11)


def test_pytree_parameters_and_what_carries_no_derivative():
    def value(p, x0, bias):
        return jnp.sum(fixed_point(network, Method(), x0, p, {"bias": bias, "kind": 3}).x)

    by_p, by_start, by_const = jax.grad(value, (0, 1, 2))(P, X0, CONST["bias"])
    assert isinstance(by_p, Parameters) and by_p.weight.shape == (3, 3) and set(by_p.gain) == {"g"}
    assert all(np.abs(leaf).min() > 1e-4 for leaf in jax.tree_util.tree_leaves(by_p))
    np.testing.assert_array_equal(by_start, 0.0)
    np.testing.assert_array_equal(by_const, 0.0)

    def others(p):
        sol = fixed_point(network, Method(), X0, p, CONST)
        return sol.residual + sol.rate + sol.growth + sol.error

    for leaf in jax.tree_util.tree_leaves(jax.grad(others)(P)):
        np.testing.assert_array_equal(leaf, 0.0)


def test_report_of_a_solution():
    sol = fixed_point(network, Method(tolerance=1e-6), X0, P, CONST)
    exact = np.asarray(unrolled(V0))
    eigenvalues = np.linalg.eigvals(jax.jacfwd(lambda x: network(x, P, CONST))(sol.x))
    assert float(sol.residual) == pytest.approx(np.abs(network(sol.x, P, CONST) - sol.x).max(), rel=1e-6, abs=1e-15)
    assert float(sol.rate) == pytest.approx(np.abs(eigenvalues).max(), rel=1e-2)
    assert float(sol.growth) == pytest.approx(eigenvalues.real.max(), abs=1e-3)
    loose = fixed_point(network, Method(tolerance=1e-3, burn_in=-1), X0, P, CONST)
    off = np.abs(np.asarray(loose.x) - exact).max()
    assert 1e-6 < off <= 1.05 * float(loose.error)
    assert float(loose.residual) <= 1e-3


def test_one_trace_serves_a_loop():
    traces, evaluations = [], []

    def counted(x, a, _):
        evaluations.append(0)
        return jnp.cos(a * x)

    @jax.jit
    def solve(a):
        traces.append(0)
        return fixed_point(counted, Method(), jnp.array([0.5]), a).x[0]

    values = []
    for a in np.linspace(0.5, 1.2, 100):
        values.append(float(solve(a)))
        if len(values) == 1:
            first = len(evaluations)
    assert len(traces) == 1 and len(evaluations) == first
    assert max(abs(np.cos(a * x) - x) for a, x in zip(np.linspace(0.5, 1.2, 100), values, strict=True)) < 1e-9
    # No compiled function around it: the eager solve traces the map once, not once per step.
    assert first <= 4


# ---- small linear algebra

entries = st.floats(-3, 3, allow_subnormal=False)
solve_jit = jax.jit(small_solve)


def spectral_radius(a) -> float:
    return float(spectral_bounds(a)[0])


def spectral_abscissa(a) -> float:
    return float(spectral_bounds(a)[1])


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.lists(entries, min_size=15, max_size=15))
def test_small_solve_against_numpy(values):
    a, b = np.reshape(values[:9], (3, 3)), np.reshape(values[9:], (3, 2))
    condition = np.linalg.cond(a)
    if condition < 1e8:
        want = np.linalg.solve(a, b)
        scale = 1e-14 * condition * (np.abs(want).max() + 1e-300)
        np.testing.assert_allclose(solve_jit(a, b), want, rtol=0, atol=100 * scale)
        np.testing.assert_allclose(solve_jit(a, b[:, 0]), want[:, 0], rtol=0, atol=100 * scale)


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5])
def test_small_solve_with_row_exchanges(n):
    rng = np.random.default_rng(n)
    for order in (np.arange(n)[::-1], rng.permutation(n), np.roll(np.arange(n), 1)):
        a = np.diag(rng.uniform(1, 2, n))[order]  # zero pivots without exchanges
        b = rng.standard_normal(n)
        np.testing.assert_allclose(small_solve(a, b), np.linalg.solve(a, b), rtol=1e-14)
    tiny = np.eye(n) + 1.0
    tiny[0, 0] = 1e-17  # the naive elimination loses all digits here
    if n > 1:
        np.testing.assert_allclose(small_solve(tiny, np.ones(n)), np.linalg.solve(tiny, np.ones(n)), rtol=1e-12)


@pytest.mark.parametrize("n", [1, 2, 4])
def test_triangular_factors_against_numpy(n):
    rng = np.random.default_rng(n)
    root, b = rng.standard_normal((n, n)), rng.standard_normal((n, 3))
    a = root @ root.T + 0.1 * np.eye(n)
    low = cholesky(a)
    np.testing.assert_allclose(low, np.linalg.cholesky(a), rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(solve_transposed(low, solve_lower(low, b)), np.linalg.solve(a, b), rtol=1e-10)


def test_roots_and_changes_on_the_host():
    asked = []
    assert root_between(lambda x: asked.append(x) or x**3 - 2, 0.0, 2.0) == pytest.approx(2 ** (1 / 3), abs=1e-10)
    assert root_between(lambda x: asked.append(x) or x - 0.25, 0.0, 2.0) in asked  # a point that was looked at
    for holds in (lambda x: x < 0.7, lambda x: x >= 0.7):
        assert change_between(holds, 0.0, 1.0, 1e-6) == pytest.approx(0.7, abs=1e-6)


@settings(max_examples=80, deadline=None, derandomize=True)
@given(st.lists(entries, min_size=9, max_size=9))
def test_spectrum_against_numpy(values):
    a = np.reshape(values, (3, 3))
    eigenvalues = np.linalg.eigvals(a)
    size = 1e-9 + np.linalg.norm(a)
    radius, abscissa = np.abs(eigenvalues).max(), eigenvalues.real.max()
    assume(radius > 1e-2 * size)  # see test_radius_of_a_nilpotent_matrix
    # |a^k|^(1/k) exceeds the radius by at most a factor k^(2/k): 1.3 % at k = 1024, on top of defective ones.
    assert radius * (1 - 1e-9) - 1e-4 * size <= spectral_radius(a) <= 1.03 * radius + 1e-4 * size
    few = 16 * (1 + size) * np.log(3) / 2 / 2**18  # the norm of a unit matrix after 18 squarings
    assert abs(spectral_abscissa(a) - abscissa) < 5e-3 * size + few


@pytest.mark.parametrize("coupling", [1e2, 1e5, 1e8])
def test_spectrum_where_coordinates_differ_by_orders_of_magnitude(coupling):
    """log V and a tiny noise: norms say nothing of such a Jacobian."""
    a = np.array([[0.225, -coupling, -5 * coupling], [-3e-4 / coupling, 0.8, -5e-3], [1e-3 / coupling, -0.06, 0.2]])
    values = np.linalg.eigvals(a)
    assert spectral_abscissa(a) == pytest.approx(values.real.max(), rel=0.01)
    assert spectral_radius(a) == pytest.approx(np.abs(values).max(), rel=0.01)
    nilpotent_beside = np.array([[0.2, coupling], [0.0, 0.5]])
    assert spectral_abscissa(nilpotent_beside) == pytest.approx(0.5, rel=0.01)


def test_spectrum_of_rotations_and_zero():
    turn = np.array([[0.3, -2.0], [2.0, 0.3]])
    assert spectral_radius(turn) == pytest.approx(np.hypot(0.3, 2), rel=2e-3)
    assert spectral_abscissa(turn) == pytest.approx(0.3, abs=1e-3)
    assert spectral_abscissa(np.diag([-2.0, -5.0])) == pytest.approx(-2.0, abs=1e-3)
    assert spectral_radius(np.diag([-2.0, -5.0])) == pytest.approx(5.0, rel=2e-3)
    assert spectral_abscissa(np.zeros((3, 3))) == pytest.approx(0.0, abs=1e-4)


@pytest.mark.parametrize("a", [np.zeros((3, 3)), np.eye(3, k=1)], ids=["zero", "shift"])
def test_radius_of_a_nilpotent_matrix(a):
    assert spectral_radius(a) < 1e-2


@pytest.mark.parametrize("n", [1, 3, 6, 10])
def test_inverse_of_symmetric_matrices(n):
    rng = np.random.default_rng(n)
    a = rng.standard_normal((5, n, n))
    h = a @ np.swapaxes(a, 1, 2) + np.eye(n) * rng.choice([1.0, -20.0 * n], (5, 1, 1))  # of either sign
    found = jax.jit(symmetric_inverse)(jnp.asarray(np.moveaxis(h, 0, -1)))
    np.testing.assert_allclose(np.array(found), np.moveaxis(np.linalg.inv(h), 0, -1), rtol=1e-8, atol=1e-10)
