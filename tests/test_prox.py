"""The proximal step: losses against autodiff, modified L D L^T, minima against scipy, implicit slopes."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize

jax.config.update("jax_enable_x64", True)

from lorastate.math.linear import ldl_solve  # noqa: E402
from lorastate.math.symmetric import (  # noqa: E402
    basis,
    complement,
    dimension,
    hessian_to_coordinates,
    to_coordinates,
    to_matrix,
)
from lorastate.model.activation import Custom, Identity, Softmax  # noqa: E402
from lorastate.model.proximal import MapProblem, VectorProblem, gram, minimise, reflected, softest  # noqa: E402


def rows(z):
    return jax.nn.softmax(z, axis=1)


def mixing(z):
    """Smooth, and no row-wise map: every entry depends on all of Z."""
    return jnp.tanh(z @ z.T / 3) + 0.3 * z.T


ACTIVATIONS = {
    "softmax 0.5": Softmax(0.5),
    "softmax 1": Softmax(1.0),
    "softmax 2": Softmax(2.0),
    "identity": Identity(),
    "custom": Custom(mixing),
}


def field(rng, tokens, nodes):
    """Symmetric, of entry variance 1 + delta_ab."""
    a = rng.standard_normal((tokens, tokens, nodes))
    return jnp.asarray((a + a.swapaxes(0, 1)) / np.sqrt(2))


def close(a, b, tol=1e-11):
    np.testing.assert_allclose(a, b, rtol=tol, atol=tol)


# ---- coordinates


@pytest.mark.parametrize("tokens", [1, 2, 3, 4, 5, 8])
def test_coordinates(tokens):
    rng = np.random.default_rng(tokens)
    n = dimension(tokens)
    assert n == tokens * (tokens + 1) // 2
    b = basis(tokens)
    close(np.einsum("kab,lab->kl", b, b), np.eye(n), 1e-15)
    c, z = rng.standard_normal((n, 5)), rng.standard_normal((tokens, tokens, 5))
    close(to_matrix(c), np.einsum("kab,kn->abn", b, c), 1e-14)
    close(np.sum(np.asarray(to_matrix(c)) ** 2), np.sum(c**2), 1e-13)  # isometry
    close(np.sum(np.asarray(to_matrix(c)) * z), np.sum(c * np.asarray(to_coordinates(z))), 1e-13)  # adjoint
    close(to_coordinates(to_matrix(c)), c, 1e-14)
    close(to_matrix(to_coordinates(z)), (z + z.swapaxes(0, 1)) / 2, 1e-14)
    h = rng.standard_normal((tokens,) * 4 + (5,))
    h = h + h.transpose(2, 3, 0, 1, 4)
    close(hessian_to_coordinates(h), np.einsum("kab,abcdn,lcd->kln", b, h, b), 1e-12)
    rows = rng.standard_normal((tokens,) * 3 + (5,))
    rows = rows + rows.transpose(0, 2, 1, 3)
    close(hessian_to_coordinates(rows), np.einsum("kab,abdn,lad->kln", b, rows, b), 1e-12)


@pytest.mark.parametrize("tokens", [2, 3, 4])
def test_complement(tokens):
    e, n = complement(tokens, True), dimension(tokens)
    assert e.shape == (n - 1, n)
    close(e @ e.T, np.eye(n - 1), 1e-14)
    close(e @ np.asarray(to_coordinates(np.ones((tokens, tokens)))), np.zeros(n - 1), 1e-14)
    np.testing.assert_array_equal(complement(tokens, False), np.eye(n))


# ---- losses

# Compiled: the eager derivatives of a custom activation are slow.
terms = jax.jit(lambda problem, u: problem.terms(u))
loss_terms = jax.jit(lambda act, z, t: act.loss_terms(z, t))
descend = jax.jit(minimise)


@pytest.mark.parametrize("tokens", [2, 3, 4])
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_loss_terms_against_autodiff(name, tokens):
    act, rng = ACTIVATIONS[name], np.random.default_rng(0)
    z, t = field(rng, tokens, 6), jnp.asarray(rng.uniform(-1, 1, (tokens, tokens, 6)))
    beta = {"softmax 0.5": 0.5, "softmax 1": 1.0, "softmax 2": 2.0}.get(name)

    def loss(z, t):
        s = mixing(z) if beta is None else jnp.exp(beta * z) / jnp.sum(jnp.exp(beta * z), 1, keepdims=True)
        return jnp.sum(((z / tokens if name == "identity" else s) - t) ** 2)

    def every(f):
        return jax.jit(jax.vmap(f, in_axes=-1, out_axes=-1))(z, t)

    f, g, h = loss_terms(act, z, t)
    close(f, every(loss))
    close(g, every(jax.grad(loss)))
    full = every(jax.hessian(loss))
    if name == "custom":
        assert h.shape == (tokens,) * 4 + (6,)
        close(h, full)
    else:
        assert h.shape == (tokens,) * 3 + (6,)
        close(h, jnp.stack([full[a, :, a] for a in range(tokens)]))
        off = np.array(full)
        off[np.arange(tokens), :, np.arange(tokens)] = 0
        close(off, np.zeros_like(off))  # rows do not interact: the row Hessian is all there is


@pytest.mark.parametrize("tokens", [2])
def test_custom_softmax_is_softmax(tokens):
    rng = np.random.default_rng(1)
    z, zw, om = (field(rng, tokens, 5) for _ in range(3))
    t, custom, built_in = rows(om), Custom(rows), Softmax(1.0)
    close(custom(z), built_in(z), 1e-14)
    close(custom(z[..., 0]), built_in(z[..., 0]), 1e-14)
    for a, b in zip(loss_terms(custom, z, t)[:2], loss_terms(built_in, z, t)[:2], strict=True):
        close(a, b)
    chi = jnp.asarray(rng.standard_normal((tokens, 5)))
    for make, u in [
        (lambda act: MapProblem(act, om, t, 2.0), to_coordinates(z)),
        (lambda act: VectorProblem(act, zw, chi, t, 2.0), chi + 0.3),
    ]:
        for a, b in zip(terms(make(custom), u), terms(make(built_in), u), strict=True):
            close(a, b)
        found = [descend(make(act), u) for act in (custom, built_in)]
        assert found[0][2].all() and found[1][2].all()
        close(found[0][0], found[1][0], 1e-9)


@pytest.mark.parametrize("tokens", [2, 3])
@pytest.mark.parametrize("name", ["softmax 2", "identity", "custom"])
@pytest.mark.parametrize("stage", ["map", "vector"])
def test_terms_against_autodiff(stage, name, tokens):
    act, rng = ACTIVATIONS[name], np.random.default_rng(2)
    b, nodes = jnp.asarray(basis(tokens)), 4
    zw, om, t = field(rng, tokens, nodes), field(rng, tokens, nodes), field(rng, tokens, nodes) / 2
    v = 0.7
    if stage == "map":
        problem = MapProblem(act, om, t, v)
        u = jnp.asarray(rng.standard_normal((dimension(tokens), nodes)))

        def energy(u, zw, om, t):
            z = jnp.einsum("k,kab->ab", u, b)
            return jnp.sum((act(z) - t) ** 2) + jnp.sum((z - om) ** 2) / (4 * v)

    else:
        om = om[0]
        problem = VectorProblem(act, zw, om, t, v)
        u = jnp.asarray(rng.standard_normal((tokens, nodes)))

        def energy(u, zw, om, t):
            return jnp.sum((act(zw + jnp.outer(u, u)) - t) ** 2) + jnp.sum((u - om) ** 2) / (2 * v)

    f, g, h = terms(problem, u)
    for got, derivative in [(f, energy), (g, jax.grad(energy)), (h, jax.hessian(energy))]:
        close(got, jax.jit(jax.vmap(derivative, in_axes=-1, out_axes=-1))(u, zw, om, t))
    part = terms(problem.at(lambda a: a[..., jnp.array([2, 0])]), u[:, jnp.array([2, 0])])
    close(part[0], f[jnp.array([2, 0])], 1e-14)
    close(part[1], g[:, jnp.array([2, 0])], 1e-14)


# ---- linear algebra

ldl = jax.jit(ldl_solve)
numbers = st.floats(-3, 3, allow_subnormal=False)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.lists(numbers, min_size=19, max_size=19))
def test_ldl_solve(values):
    """Positive definite: as numpy. Indefinite: still a descent direction."""
    a, g = np.reshape(values[:16], (4, 4)), np.array([*values[16:], 1.0])
    definite, indefinite = a @ a.T + 0.1 * np.eye(4), (a + a.T) / 2
    x, pivot = ldl(definite[:, :, None], g[:, None])
    np.testing.assert_allclose(x[:, 0], np.linalg.solve(definite, g), rtol=1e-9, atol=1e-9)
    assert pivot[0] > 0
    shifted, _ = ldl(definite[:, :, None], g[:, None], 0.5)
    np.testing.assert_allclose(shifted[:, 0], np.linalg.solve(definite + 0.5 * np.eye(4), g), rtol=1e-9, atol=1e-9)
    x, pivot = ldl(indefinite[:, :, None], g[:, None], 0.0, 1e-3)
    assert np.isfinite(x).all()
    assert g @ np.asarray(x[:, 0]) > 0  # -x descends, whatever the signature


def test_ldl_solve_indefinite():
    rng = np.random.default_rng(0)
    a = rng.standard_normal((200, 3, 3))
    a, g = a + a.transpose(0, 2, 1), rng.standard_normal((200, 3))
    x, pivot = ldl(np.moveaxis(a, 0, -1), g.T)
    want = np.linalg.solve(a, g[..., None])[..., 0]
    wild = np.abs(np.asarray(x).T - want).max(1) > 1e-6 * (1 + np.abs(want).max(1))
    # Without a floor pivots become |d|: the plain solution exactly where all are positive (Sylvester's law).
    definite = np.linalg.eigvalsh(a)[:, 0] > 0
    np.testing.assert_array_equal(np.asarray(pivot) > 0, definite)
    np.testing.assert_array_equal(wild, ~definite)
    assert 0 < definite.sum() < 100


# ---- minima

NODES = 24


def map_problem(act, tokens, response, seed=0):
    rng = np.random.default_rng(seed)
    y = field(rng, tokens, NODES)
    omega = 0.6 * y + 0.5 * field(rng, tokens, NODES)
    return MapProblem(act, omega, act(y), response), to_coordinates(omega), to_coordinates(y)


@pytest.mark.parametrize("response", [0.1, 15.0, 1000.0, 1e6])
@pytest.mark.parametrize("tokens", [2, 3])
def test_minimise_against_scipy_and_random_starts(tokens, response):
    """scipy and ten random starts find nothing below the lower of the minima from Omega and Y."""
    problem, omega, y = map_problem(Softmax(2.0), tokens, response)
    (_, f_omega, ok_omega), (_, f_y, ok_y) = descend(problem, omega), descend(problem, y)
    assert ok_omega.all() and ok_y.all()
    best = np.minimum(f_omega, f_y)
    rng = np.random.default_rng(1)
    for k in range(10):
        _, f, ok = descend(problem, (1 + k % 3) * jnp.asarray(rng.standard_normal(omega.shape)))
        assert ok.all()
        assert (np.asarray(f) > best - 1e-10).all(), "a lower minimum than from Omega and Y"

    @jax.jit
    def value(u, j):
        f, g, _ = problem.at(lambda a: a[..., j[None]]).terms(u[:, None])
        return f[0], g[:, 0]

    for j in range(0, NODES, 4):
        reference = minimize(
            lambda u, j=j: tuple(np.asarray(v, dtype=float) for v in value(u, jnp.asarray(j))),
            np.asarray(omega[:, j]), jac=True, method="BFGS", options={"gtol": 1e-10},
        )  # fmt: skip
        assert abs(reference.fun - best[j]) < 1e-9 * (1 + best[j])


@pytest.mark.parametrize("response", [0.1, 15.0, 1000.0, 1e6])
def test_result_is_a_minimum(response):
    """Stationary, with a positive definite Hessian, and never above the start; both stages."""
    problem, omega, y = map_problem(Softmax(1.0), 2, response)
    rng = np.random.default_rng(3)
    chi = jnp.asarray(rng.standard_normal((2, NODES)))
    t = problem.activation(0.5 * problem.omega + chi[:, None] * chi[None])
    vector = VectorProblem(problem.activation, 0.5 * problem.omega, 0.5 * chi, t, response)
    for p, start in [(problem, omega), (problem, y), (vector, 0.5 * chi), (vector, -chi)]:
        u, f, ok = descend(p, start)
        value, g, h = terms(p, u)
        assert ok.all()
        close(value, f, 1e-12)
        assert np.abs(g).max() < 1e-9 * (1 + np.abs(terms(p, start)[1]).max())
        assert np.linalg.eigvalsh(np.moveaxis(np.asarray(h), -1, 0)).min() > 0
        assert (np.asarray(f) <= np.asarray(terms(p, start)[0]) + 1e-12).all()


def test_steps_run_out():
    problem, omega, _ = map_problem(Softmax(2.0), 2, 1000.0)
    assert not jax.jit(minimise, static_argnums=2)(problem, omega + 1.0, 1)[2].any()


@pytest.mark.parametrize("tokens", [2, 3])
def test_identity_closed_form(tokens):
    """min ||Z / T - t||^2 + ||Z - Omega||^2 / (4 V): Z = (4 V T t + T^2 Omega) / (4 V + T^2)."""
    problem, omega, _ = map_problem(Identity(), tokens, 0.9)
    u, f, ok = descend(problem, jnp.zeros_like(omega))
    assert ok.all()
    t, om = np.asarray(problem.target), np.asarray(problem.omega)
    close(to_matrix(u), (3.6 * tokens * t + tokens**2 * om) / (3.6 + tokens**2), 1e-12)
    close(f, np.sum((tokens * t - om) ** 2, (0, 1)) / (tokens**2 + 3.6), 1e-12)


# ---- derivatives of the minimiser

CHI = jnp.asarray(np.random.default_rng(5).standard_normal((2, 6)))
FIELD = field(np.random.default_rng(6), 2, 6)


def minimum_map(theta):
    """(response, correlation, target shift, beta) of the pre-training problem -> minimiser and minimum."""
    act = Softmax(theta[3])
    y = FIELD + theta[2]
    problem = MapProblem(act, theta[1] * FIELD + jnp.flip(FIELD, 2) / 2, act(y * FIELD), jnp.exp(theta[0]))
    u, f, _ = minimise(problem, to_coordinates(FIELD))
    return jnp.concatenate([u, f[None]])


def minimum_vector(theta):
    act = Softmax(theta[3])
    problem = VectorProblem(
        act, theta[1] * FIELD, 0.6 * CHI + theta[2], act(FIELD + CHI[:, None] * CHI[None]), jnp.exp(theta[0])
    )
    u, f, _ = minimise(problem, CHI)
    return jnp.concatenate([u, f[None]])


THETA = jnp.array([-0.3, 0.5, 0.2, 1.1])


@pytest.mark.parametrize("minimum", [minimum_map, minimum_vector])
def test_derivatives_of_the_minimiser(minimum):
    def scalar(theta):
        return jnp.sum(jnp.sin(minimum(theta)))

    many = jax.jit(jax.vmap(minimum))
    h, eye = 1e-5, jnp.eye(4)
    forward, reverse = jax.jit(jax.jacfwd(minimum))(THETA), jax.jit(jax.jacrev(minimum))(THETA)
    close(forward, reverse, 1e-12)
    central = jnp.moveaxis(many(THETA[None] + h * eye) - many(THETA[None] - h * eye), 0, -1) / (2 * h)
    close(forward, central, 1e-8)
    assert np.abs(forward).max(axis=(0, 1)).min() > 1e-2  # every parameter matters
    gradients = jax.jit(jax.vmap(jax.grad(scalar)))
    hessian = jax.jit(jax.hessian(scalar))(THETA)
    close(hessian, hessian.T, 1e-11)
    close(hessian, (gradients(THETA[None] + h * eye) - gradients(THETA[None] - h * eye)) / (2 * h), 1e-7)
    batch = THETA[None] + 0.1 * eye
    if minimum is minimum_vector:  # the other one is slow to compile
        outer = jax.jit(jax.grad(lambda b: jnp.sum(jax.vmap(scalar)(b))))(batch)
        close(gradients(batch), outer, 1e-12)


def test_start_carries_no_derivative():
    problem, omega, _ = map_problem(Softmax(1.0), 2, 1.0)
    np.testing.assert_array_equal(jax.jit(jax.grad(lambda s: jnp.sum(minimise(problem, s)[0])))(omega), 0.0)


class Gate(eqx.Module):
    weight: jax.Array

    def __call__(self, z):
        return jnp.tanh(self.weight * z)


def test_parameters_of_a_custom_activation():
    """Array leaves of a module are differentiable inputs of the minimum (envelope theorem and its slope)."""

    def value(w):
        problem = MapProblem(Custom(Gate(w)), FIELD, jnp.tanh(FIELD[..., ::-1]), 0.8)
        return jnp.sum(minimise(problem, to_coordinates(FIELD))[0] ** 2)

    w, h = jnp.asarray(0.9), 1e-5
    f = jax.jit(value)
    slope = float(jax.jit(jax.grad(value))(w))
    assert abs(slope) > 1e-2
    assert slope == pytest.approx(float(f(w + h) - f(w - h)) / (2 * h), rel=1e-7)


@pytest.mark.parametrize("n", [2, 3, 5])
def test_softest_direction_against_numpy(n):
    h = np.random.default_rng(n).normal(size=(n, n, 40))
    h = h + np.swapaxes(h, 0, 1)
    v = np.asarray(softest(jnp.asarray(h)))
    want = np.linalg.eigh(np.moveaxis(h, -1, 0))[1][:, :, 0].T
    np.testing.assert_allclose(np.abs(np.sum(v * want, 0)), 1.0, rtol=1e-9)


def test_the_mirror_image_of_a_well_is_the_one_next_to_omega():
    """chi (1 - 2 c c^T) has the same chi chi^T; no c takes it nearer to omega."""
    rng, t, r, n = np.random.default_rng(3), 3, 2, 50
    zw, target, u, omega = (jnp.asarray(rng.normal(size=s)) for s in ((t, t, n), (t, t, n), (r * t, n), (r * t, n)))
    problem = VectorProblem(Identity(), zw, omega, target, 0.7)
    image = reflected(problem, u)
    close(gram(image, t), gram(u, t), 1e-12)

    def distance(chi):
        return np.sum((np.asarray(chi) - np.asarray(omega)) ** 2, 0)

    chi, found = np.asarray(u).reshape(r, t, n), []
    for angle in np.linspace(0, np.pi, 400):
        c = np.array([np.cos(angle), np.sin(angle)])
        found.append(distance((chi - 2 * c[:, None, None] * np.einsum("k,ktn->tn", c, chi)).reshape(r * t, n)))
    np.testing.assert_allclose(distance(image), np.min(found, 0), rtol=1e-3)
    one = problem._replace(omega=omega[:t])
    close(reflected(one, u[:t]), -u[:t], 0)
