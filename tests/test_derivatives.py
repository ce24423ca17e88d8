"""Derivatives of the whole pipeline: implicit = unrolled = reverse = central differences; second derivatives.

T = 2 compiles fastest; T = 3 is compared with central differences in test_theory.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lorastate as ls
from lorastate.errors import Code
from lorastate.evolution import finetuning as ft
from lorastate.evolution import pretraining as pt
from lorastate.evolution.order import decode
from lorastate.math.implicit import attach
from lorastate.model.channel.frozen_map import learned_map
from lorastate.runtime.program import Program
from lorastate.solution.finetuning import describe_finetuning
from lorastate.solution.pretraining import describe_pretraining
from lorastate.solution.problem import Problem
from lorastate.solution.solve import solve_alone

NUMERICS = ls.Numerics(nodes=512, finetuning_nodes=1024, replicas=2)


def setting(activation, lam=0.02, fine_lam=0.6, fine_alpha=3.0, **pre):
    pre = {"alpha": 0.2, "lam": lam, "activation": activation, "tokens": 2, **pre}
    return ls.Setting(ls.Pretraining(**pre), ls.Finetuning(alpha=fine_alpha, lam=fine_lam), NUMERICS)


class Case:
    """E' as a function of u = (lam, lam'): searched by compiled programs that all tests share, then described."""

    def __init__(self, activation):
        self.setting = setting(activation)
        self.described = Program(self.error, quick=True)

    def at(self, u):
        return Problem.of(ls.replace(ls.replace(self.setting, "pretraining.lam", u[0]), "finetuning.lam", u[1]))

    def solve(self, u, allowed=(Code.ok,)):
        """What the searches find, without derivatives."""
        _, first, second = solve_alone(self.at(u))
        assert len(second.solved.point.x) == 3  # replica symmetric
        assert int(first.status["code"]) in allowed and int(second.solved.point.code) in allowed
        return first.solved, second

    def error(self, u, found):
        problem, (of_map, second) = self.at(u), found
        first = describe_pretraining(problem, of_map)
        return describe_finetuning(problem, first, second).values["test_error"]

    def value(self, u):
        return float(self.described(u, self.solve(u)))

    @functools.cached_property
    def gradient(self):
        return Program(jax.grad(self.error), quick=True)


@pytest.fixture(scope="module")
def softmax():
    return Case("softmax")


def test_reverse_mode_is_the_central_difference(softmax):
    u = jnp.array([0.02, 0.6])
    slope = softmax.gradient(u, softmax.solve(u))
    for k in range(2):
        h = 1e-5 * u[k]
        up, down = softmax.value(u.at[k].add(h)), softmax.value(u.at[k].add(-h))
        np.testing.assert_allclose((up - down) / (2 * h), slope[k], rtol=2e-6)


def test_hessian_is_the_central_difference_of_values():
    case, u = Case("identity"), jnp.array([0.1, 0.6])
    hessian = Program(jax.jacfwd(jax.jacfwd(case.error)), quick=True)(u, case.solve(u))
    np.testing.assert_allclose(hessian, hessian.T, rtol=1e-8)
    steps = np.diag(2e-3 * u)
    for k, h in enumerate(steps):
        for l, g in enumerate(steps):
            corners = case.value(u + h + g) - case.value(u + h - g) - case.value(u - h + g) + case.value(u - h - g)
            np.testing.assert_allclose(hessian[k, l], corners / (4 * h[k] * g[l]), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("activation", ["softmax", "identity"])
def test_implicit_is_unrolled(activation):
    # Plain iteration that stays at the solution: its derivative converges to that of the fixed point, by no theorem.
    case = Case(activation)

    def iterated(step, x, args, const):
        def once(_, y):
            image = (y + step(y, args, const)) / 2  # damped: the plain iteration may oscillate
            return x + image - jax.lax.stop_gradient(image)

        return jax.lax.fori_loop(0, 150, once, x)

    def both_stages(derivative, u, found):
        problem, (of_map, second) = case.at(u), found
        (p, f), nodes = problem.stages, problem.nodes
        const = None if nodes.pretraining is None else (nodes.pretraining, of_map.inner)
        x = derivative(pt.step, of_map.point.x, p, const)
        given = f, learned_map(p, decode(x))
        return jnp.concatenate(
            [x, derivative(ft.step, second.solved.point.x, given, (nodes.finetuning, second.solved.inner))]
        )

    u = jnp.array([0.1 if activation == "identity" else 0.02, 0.6])
    first, second = (
        Program(jax.jacfwd(functools.partial(both_stages, derivative)), quick=True)(u, case.solve(u))
        for derivative in (lambda step, *given: attach(step, 0, *given), iterated)
    )
    np.testing.assert_allclose(first, second, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize(
    ("tokens", "pre"),
    [(4, {"kappa0": 2.0, "kappa": 1.5, "alpha": 0.06})],
)
def test_other_shapes(tokens, pre):
    """T = 4, kappa, kappa0 and 1 all different (T = 2: test_channel): the gradient is the central difference."""
    s = setting("softmax", fine_lam=0.2, tokens=tokens, **pre)
    _, slopes = ls.gradient(s)
    for path in ("pretraining.kappa0", "pretraining.kappa", "finetuning.alpha"):
        x = float(ls.get(s, path))
        up, down = (ls.gradient(ls.replace(s, path, x * (1 + h)))[0] for h in (1e-5, -1e-5))
        assert (up - down) / (2e-5 * x) == pytest.approx(slopes[path], rel=5e-5, abs=1e-7), path


def test_reverse_mode_of_predict_is_what_gradient_says():
    """Inside a transformation too a symmetric search begins with one well for every node: with two, a spurious branch
    was the lowest here (E' = 0.36, not 0.285). And E' has slopes in reverse mode where the update is zero, and has no
    best factor."""
    numerics = ls.Numerics(nodes=1024, finetuning_nodes=2048, replicas=4, symmetry="rs")

    def at(u):
        base = ls.Setting(ls.Pretraining(alpha=0.2, lam=0.02, tokens=2), ls.Finetuning(alpha=3.0, lam=0.6), numerics)
        return ls.replace(ls.replace(base, "finetuning.alpha", u[0]), "finetuning.lam", u[1])

    both = jax.jit(jax.value_and_grad(lambda u: ls.predict(at(u)).test_error))
    for u in ([3.0, 0.6], [0.02, 3.0]):
        value, slopes = both(jnp.array(u))
        want, by_path = ls.gradient(at(u))
        assert float(value) == pytest.approx(want, rel=1e-9)
        np.testing.assert_allclose(slopes, [by_path["finetuning.alpha"], by_path["finetuning.lam"]], 1e-6, 1e-20)
