"""Derivatives of the whole pipeline: implicit = unrolled = reverse = central differences; second derivatives.

T = 2 compiles fastest; T = 3 is compared with central differences in test_theory.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lorastate as ls
from lorastate import finetuning as ft
from lorastate import pretraining as pt
from lorastate import theory
from lorastate.fixed_point import attach
from lorastate.order import decode
from lorastate.program import Program

NUMERICS = ls.Numerics(nodes=512, finetuning_nodes=1024, replicas=2)


def stages(activation, tokens=2, lam=0.02, fine_lam=0.6, fine_alpha=3.0, **pre):
    s = ls.Setting(
        ls.Pretraining(**{"alpha": 0.2, "lam": lam, "activation": activation, "tokens": tokens, **pre}),
        ls.Finetuning(alpha=fine_alpha, lam=fine_lam),
        NUMERICS,
    )
    return s.pretraining, s.finetuning_resolved


def with_lams(pre, fine, u):
    pre = ls.Pretraining(
        alpha=pre.alpha, lam=u[0], kappa0=pre.kappa0, kappa=pre.kappa, delta=pre.delta,
        activation=pre.activation, tokens=pre.tokens,
    )  # fmt: skip
    fine = ls.Finetuning(alpha=fine.alpha, lam=u[1], delta=fine.delta, activation=fine.activation, tokens=fine.tokens)
    return pre, fine


@pytest.fixture(scope="module")
def softmax():
    """(u, E'(u), gradient(u)) for u = (lam, lam'), compiled once."""
    pre, fine = stages("softmax")
    nodes = theory.node_sets(pre, fine, NUMERICS)

    def error(u):
        return theory.evaluate(*with_lams(pre, fine, u), NUMERICS, nodes).finetuning["test_error"]

    return jnp.array([0.02, 0.6]), Program(error, quick=True), Program(jax.grad(error), quick=True), error


def test_reverse_mode_is_the_central_difference(softmax):
    u, error, gradient, _ = softmax
    slope = gradient(u)
    for k in range(2):
        h = 1e-5 * u[k]
        up, down = error(u.at[k].add(h)), error(u.at[k].add(-h))
        np.testing.assert_allclose((up - down) / (2 * h), slope[k], rtol=2e-6)


def test_hessian_is_the_central_difference_of_values():
    pre, fine = stages("identity")
    nodes = theory.node_sets(pre, fine, NUMERICS)

    def error(u):
        return theory.evaluate(*with_lams(pre, fine, u), NUMERICS, nodes).finetuning["test_error"]

    u, value = jnp.array([0.1, 0.6]), Program(error, quick=True)
    hessian = Program(jax.jacfwd(jax.jacfwd(error)), quick=True)(u)
    np.testing.assert_allclose(hessian, hessian.T, rtol=1e-8)
    steps = np.diag(2e-3 * u)
    for k, h in enumerate(steps):
        for l, g in enumerate(steps):
            corners = value(u + h + g) - value(u + h - g) - value(u - h + g) + value(u - h - g)
            np.testing.assert_allclose(hessian[k, l], corners / (4 * h[k] * g[l]), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("activation", ["softmax", "identity"])
def test_implicit_is_unrolled(activation):
    # Plain iteration that stays at the solution: its derivative converges to that of the fixed point, by no theorem.
    pre, fine = stages(activation)
    nodes = theory.node_sets(pre, fine, NUMERICS)

    def iterated(step, x):
        def once(_, y):
            image = (y + step(y)) / 2  # damped: the plain iteration may oscillate
            return x + image - jax.lax.stop_gradient(image)

        return jax.lax.fori_loop(0, 150, once, x)

    def implicit(u):
        p, f = with_lams(pre, fine, u)
        sol = theory.solve_pretraining(p, NUMERICS, nodes.pretraining)
        const = None if nodes.pretraining is None else (nodes.pretraining, sol.inner)
        x = attach(pt.step, sol.point.x, p, const)
        frozen = f.inputs.freeze(p, decode(x))
        solved, _ = theory.search_finetuning(f, frozen, NUMERICS, nodes.finetuning)
        c = nodes.finetuning, jax.tree_util.tree_map(lambda a: a[0], solved.inner.inner)
        return jnp.concatenate([x, attach(ft.step, solved.point.x[0], (f, frozen), c)])

    def unrolled(u):
        p, f = with_lams(pre, fine, u)
        sol = theory.solve_pretraining(p, NUMERICS, nodes.pretraining)
        const = None if nodes.pretraining is None else (nodes.pretraining, sol.inner)
        x = iterated(lambda x: pt.step(x, p, const), sol.point.x)
        frozen = f.inputs.freeze(p, decode(x))
        solved, _ = theory.search_finetuning(f, frozen, NUMERICS, nodes.finetuning)
        c = nodes.finetuning, jax.tree_util.tree_map(lambda a: a[0], solved.inner.inner)
        y = iterated(lambda y: ft.step(y, (f, frozen), c), solved.point.x[0])
        return jnp.concatenate([x, y])

    u = jnp.array([0.1 if activation == "identity" else 0.02, 0.6])
    first, second = (Program(jax.jacfwd(f), quick=True)(u) for f in (implicit, unrolled))
    np.testing.assert_allclose(first, second, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize(
    ("tokens", "pre"),
    [(4, {"kappa0": 2.0, "kappa": 1.5, "alpha": 0.06})],
)
def test_other_shapes(tokens, pre):
    """T = 4, kappa, kappa0 and 1 all different (T = 2: test_channel): the gradient is the central difference."""
    p, _ = stages("softmax", tokens, **pre)
    s = ls.Setting(p, ls.Finetuning(alpha=3.0, lam=0.2), NUMERICS)
    _, slopes = ls.gradient(s)
    for path in ("pretraining.kappa0", "pretraining.kappa", "finetuning.alpha"):
        x = float(ls.setting_file.get(s, path))
        up, down = (ls.gradient(ls.replace(s, path, x * (1 + h)))[0] for h in (1e-5, -1e-5))
        assert (up - down) / (2e-5 * x) == pytest.approx(slopes[path], rel=5e-5, abs=1e-7), path


def test_softmax_over_three_decades_of_lam(softmax):
    _, error, gradient, _ = softmax
    lams = (1e-3, 1e-2, 1e-1, 1.0)
    values = [float(error(jnp.array([lam, 0.6]))) for lam in lams]
    slopes = [float(gradient(jnp.array([lam, 0.6]))[0]) for lam in lams]
    assert np.all(np.isfinite(values))
    # E' falls towards an optimum between 1e-3 and 0.1 and is flat where the map is zero.
    assert slopes[0] < 0 < slopes[2] and abs(slopes[3]) < 1e-6
