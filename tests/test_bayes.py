"""Bayes-optimal pre-training against independent numbers, sampled matrices, the learned map, and limits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lorastate as ls
from lorastate import theory
from lorastate.bayes import bayes_optimal_pretraining, mmse
from lorastate.order import decode


def pre(**kw):
    return ls.Pretraining(**{"alpha": 0.1, "lam": 0.1, "delta": 0.5, "activation": "identity", **kw})


# An independent implementation, four digits; T = 3, kappa0 = 1.
@pytest.mark.parametrize(
    ("alpha", "delta", "activation", "Q"),
    [
        (0.1, 0.5, "identity", 1.7449),
        (0.05, 0.5, "identity", 1.5001),
        (0.1, 0.5, "softmax", 1.6887),
        (0.3, 2.0, "softmax", 1.7462),
    ],
)
def test_independent_values(alpha, delta, activation, Q):
    found = bayes_optimal_pretraining(pre(alpha=alpha, delta=delta, activation=activation))
    assert int(found.code) == 0
    assert abs(float(found.Q) - Q) < 6e-5


@pytest.mark.parametrize(("kappa0", "s"), [(0.3, 0.05), (1.0, 0.5), (2.0, 3.0)])
def test_mmse_against_sampled_matrices(kappa0, s):
    # The best rotationally invariant estimator of S* from S* + sqrt(s) Z keeps the eigenvectors (which the sample's
    # own overlaps give exactly): its error is the part of S* off the diagonal in that basis.
    rng, d, errors = np.random.default_rng(0), 600, []
    for _ in range(4):
        w = rng.standard_normal((d, round(kappa0 * d)))
        base = w @ w.T / np.sqrt(w.shape[1] * d)
        g = rng.standard_normal((d, d))
        _, v = np.linalg.eigh(base + np.sqrt(s) * (g + g.T) / np.sqrt(2 * d))
        errors.append((np.sum(base**2) - np.sum(np.diag(v.T @ base @ v) ** 2)) / d)
    # The diagonal fluctuates by s/D: 1/D corrections only.
    assert np.mean(errors) == pytest.approx(float(mmse(jnp.asarray(s), jnp.asarray(kappa0))), rel=0.02)


def test_limits_and_noiseless_recovery():
    assert float(bayes_optimal_pretraining(pre(alpha=1e4)).Q) == pytest.approx(2.0, abs=1e-4)
    # Without data the estimate is the mean of the prior, E S* = sqrt(kappa0) 1.
    assert float(bayes_optimal_pretraining(pre(alpha=1e-4, kappa0=0.7)).Q) == pytest.approx(0.7, rel=2e-3)
    exact = bayes_optimal_pretraining(pre(alpha=0.3, delta=0.0, kappa0=0.5))
    assert int(exact.code) == 0 and float(exact.Q) == 1.5
    few = bayes_optimal_pretraining(pre(alpha=0.03, delta=0.0, kappa0=2.0))
    assert int(few.code) == 0 and 0 < float(few.Q) < 3.0
    near = bayes_optimal_pretraining(pre(alpha=0.3, delta=1e-6, kappa0=0.5))
    assert int(near.code) == 0 and float(near.Q) == pytest.approx(1.5, abs=1e-4)


def test_never_below_the_learned_map():
    for delta in (0.1, 1.0):
        best = bayes_optimal_pretraining(pre(delta=delta))
        for lam in (0.003, 0.03, 0.3):
            p = pre(lam=lam, delta=delta)
            order = decode(theory.solve_pretraining(p, ls.Numerics(), None).point.x)
            assert float(order.overlap**2 / order.norm(p.label_size)) <= float(best.Q) + 1e-12


def test_derivative():
    def Q(alpha):
        p = pre()
        return bayes_optimal_pretraining(ls.Pretraining(alpha=alpha, lam=p.lam, delta=p.delta, activation="identity")).Q

    slope = jax.grad(Q)(0.1)
    assert float(slope) == pytest.approx(float(Q(0.1 + 1e-6) - Q(0.1 - 1e-6)) / 2e-6, rel=1e-6)
