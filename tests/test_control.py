"""The control variate by weights: its Gauss-Newton steps, and what it does to predictions on thinned nodes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lorastate as ls
from lorastate.evolution import control
from lorastate.evolution import finetuning as ft
from lorastate.evolution import pretraining as pt
from lorastate.evolution.finetuning_map import locate_inner, no_memory
from lorastate.evolution.order import from_norm
from lorastate.math.quadrature import Nodes, by_replica, gaussian_nodes, reweighted
from lorastate.math.symmetric import to_coordinates, to_matrix
from lorastate.model import wells
from lorastate.model.channel.frozen_map import FrozenMap
from lorastate.model.proximal import MapProblem, VectorProblem

ACTIVATIONS = {"softmax": ls.Softmax(1.3), "identity": ls.Identity(), "custom": ls.Custom(jnp.tanh)}


def test_weights_have_the_averages_wanted():
    """In every replica, parts of one replica together; a value that says nothing, or the same, does no harm."""
    nodes = gaussian_nodes(3, 1024, 2, 0, (), part=128)
    x = nodes.normal
    values = jnp.stack([jnp.exp(x[:, 0]), x[:, 1] ** 4, jnp.zeros_like(x[:, 0]), 2 * jnp.exp(x[:, 0])], 1)
    wanted = jnp.array([[np.exp(0.5), 3.0, 0.0, 2 * np.exp(0.5)]] * 2)
    weight = reweighted(nodes, values, wanted, 2)
    assert weight.shape == nodes.weight.shape
    found = by_replica(jnp.einsum("pn,pkn->pk", weight, values), 2)
    np.testing.assert_allclose(found, wanted, atol=1e-7)
    np.testing.assert_allclose(by_replica(weight.sum(1), 2), 1.0, atol=1e-9)
    # They are the nearest ones: changed by a combination of the values.
    change = np.asarray(weight / nodes.weight - 1)[:4].ravel()
    basis = np.concatenate([np.ones((1, 512)), np.moveaxis(np.asarray(values[:4, :2]), 1, 0).reshape(2, -1)])
    fit = np.linalg.lstsq(basis.T, change, rcond=None)[0]
    np.testing.assert_allclose(fit @ basis, change, atol=1e-8)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_gauss_newton_is_the_square_of_the_jacobian(name):
    """2 J^T J and the pull, J the derivative of sigma in the unknowns; the gradient is that of the whole."""
    activation, rng = ACTIVATIONS[name], np.random.default_rng(0)
    square = lambda a: jnp.asarray(a + np.swapaxes(a, 0, 1))  # noqa: E731
    z, omega, target = (square(rng.normal(size=(3, 3, 1))) for _ in range(3))
    of_map = MapProblem(activation, omega, activation(target), 0.7)
    vector = VectorProblem(activation, z, jnp.asarray(rng.normal(size=(6, 1))), activation(target),
                           jnp.array([[0.4]] * 3 + [[0.9]] * 3))  # fmt: skip

    def gram(u):
        chi = u.reshape(2, 3)
        return sum(jnp.outer(c, c) for c in chi)

    cases = (
        (of_map, to_coordinates(z), lambda u: activation(to_matrix(u[:, None]))[..., 0], 1 / 1.4 * np.eye(6)),
        (vector, jnp.asarray(rng.normal(size=(6, 1))), lambda u: activation((z[..., 0] + gram(u))[..., None])[..., 0],
         np.diag([1 / 0.4] * 3 + [1 / 0.9] * 3)),
    )  # fmt: skip
    for problem, u, sigma, pull in cases:
        jacobian = jax.jacfwd(sigma)(u[:, 0]).reshape(9, -1)
        g, hess = problem.gauss_newton(u)
        np.testing.assert_allclose(hess[..., 0], 2 * jacobian.T @ jacobian + pull, rtol=1e-10, atol=1e-12)
        np.testing.assert_allclose(g, problem.terms(u)[1], rtol=1e-12, atol=1e-14)


def left(h, exact):
    """What a regression on h leaves of the variance of each average over nodes."""
    h, exact = (a - a.mean(1, keepdims=True) for a in (h, exact))
    fit = np.linalg.lstsq(h.T, exact.T, rcond=None)[0]
    return np.var(exact - fit.T @ h, axis=1) / np.var(exact, axis=1)


@pytest.mark.parametrize("V", [0.3, 8.0])
def test_little_is_left_in_pretraining(V):
    """Two Gauss-Newton steps, beside minimisers that were searched for."""
    pre = ls.Pretraining(0.1, 0.02, tokens=3)
    nodes = gaussian_nodes(pt.node_dimension(pre), 2048, 1, 0, ())
    one = Nodes(nodes.normal[0], nodes.weight[0])
    order = from_norm(jnp.array(V), jnp.array(1.1), jnp.array(0.9), pre.label_size)
    nothing = jax.tree_util.tree_map(lambda a: a[0], pt.no_inner(pre, nodes))
    found = jax.jit(lambda n: pt.locate_inner(pre, order, n, nothing))(one)
    problem = pt.inner_problem(pre, order, one)
    low = wells.lowest(problem, found)
    omega = to_coordinates(problem.omega)
    force = (omega - low.pick(low.u)) / (2 * V)
    y, _ = (to_coordinates(z) for z in pt.fields(pre, order, one.normal))
    free = (omega - order.overlap / pre.label_size * y) / order.noise
    exact = np.stack([low.depth, jnp.sum(force * y, 0), jnp.sum(force * free, 0), jnp.sum(force**2, 0)])
    assert (left(np.asarray(control.of_map(pre, order, one)), exact) < 0.03).all()


@pytest.mark.parametrize("ranks", [(1, 1), (2, 1)])
def test_little_is_left_in_finetuning(ranks):
    fine = ls.Finetuning(3.0, 0.3, 0.5, "softmax", 3, rank=ranks[0], teacher_rank=ranks[1])
    M, Q, Q0, V, size, common = map(jnp.array, (1.1, 0.93, 2.0, 8.3, 2.25, 2.0))
    frozen = FrozenMap(M, Q, Q0, V, size, ls.Softmax(), M, common)
    nodes = gaussian_nodes(ft.node_dimension(fine), 2048, 1, 0, ft.mirrored(fine))
    one = Nodes(nodes.normal[0], nodes.weight[0])
    pair = (lambda a, b: jnp.array([a, b])) if ft.spare(fine) else (lambda a, b: jnp.array(a))
    order = from_norm(pair(0.35, 0.3), pair(0.75, 0.0), pair(0.64, 0.2), 1.0)
    nothing = jax.tree_util.tree_map(lambda a: a[0], no_memory(fine, nodes, alone=True).found)
    found = jax.jit(lambda n: locate_inner(fine, frozen, order, n, nothing))(one)
    d = ft.draws(fine, frozen, one)
    problem = ft.inner_problem(fine, order, d)
    low = wells.lowest(problem, found)
    g = (problem.omega - low.pick(low.u)) / problem.v
    rows = [low.depth, jnp.sum(g[:3] * d.teacher, 0)]
    for kind in np.split(np.arange(len(g)), ranks[0]):
        rows += [jnp.sum((g * d.noise)[kind], 0), jnp.sum(g[kind] ** 2, 0)]
    h = np.asarray(control.of_lora(fine, frozen, order, one))
    assert len(h) == (7 if ft.spare(fine) else 4)
    assert (left(h[np.abs(h).max(1) > 0], np.stack(rows)) < 0.12).all()


@pytest.mark.solve
def test_thinned_predictions_are_those_of_all_nodes():
    """Within the error bars, which are a third of those that so few nodes have without it (given after the values)."""
    thin = ls.predict(
        ls.Setting(ls.Pretraining(0.1, 0.02), ls.Finetuning(3.0, 0.3), ls.Numerics(8192, 32768, 8, thinning=8))
    )
    # All of 131,072 and 524,288 nodes, 8 replicas, whose errors are a quarter of those here; errors of 1024 and 4096.
    known = {
        "pretraining": {"V": (8.3190, 0.11), "M": (1.12143, 0.0066), "Q": (0.92721, 0.0075),
                        "test_error": (0.37656, 0.0035)},
        "finetuning": {"v": (0.34461, 0.0078), "m": (0.75845, 0.0055), "q": (0.64316, 0.008),
                       "test_error": (0.38618, 0.0048), "free_energy": (1.13151, 0.015)},
    }  # fmt: skip
    better = []
    for stage, values in known.items():
        for name, (value, few) in values.items():
            bar = thin.stderr(stage, name)
            assert abs(thin.values[stage][name] - value) < 4 * bar < 0.05 * value, name
            better.append(few / bar)
    assert np.median(better) > 3


def test_thinning_that_leaves_too_few():
    with pytest.raises(ls.SettingError, match=r"numerics\.thinning = 3 .* a power of two, 1 to 64"):
        ls.Numerics(thinning=3)
    with pytest.raises(ls.SettingError, match=r"numerics\.thinning = 16 leaves 64 of the 1024 nodes"):
        ls.Numerics(8192, 32768, 8, thinning=16)
