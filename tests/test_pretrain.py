"""Pre-training alone: the numbers of `predict`, derivatives, and what a failed solve leaves."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

jax.config.update("jax_enable_x64", True)

import lorastate as ls  # noqa: E402
from lorastate.errors import Code, SolveError  # noqa: E402

NUMERICS = ls.Numerics(nodes=1024, finetuning_nodes=2048, replicas=4)


def identity(lam=0.1, **more):
    return ls.pretrain(ls.Pretraining(alpha=0.1, lam=lam, activation="identity", **more), NUMERICS)


def test_the_numbers_are_those_of_predict():
    pre = ls.Pretraining(0.1, 0.1, activation="identity", kappa0=0.5, tokens=2)
    both = ls.predict(ls.Setting(pre, ls.Finetuning(2.0, 1.0), NUMERICS), throw=False)
    alone = ls.pretrain(pre, NUMERICS)
    assert alone.ok and alone.code is Code.ok
    assert set(alone.values) == set(alone.errors) == set(both.pretraining)
    for name, value in both.pretraining.items():
        np.testing.assert_allclose(alone.values[name], value, rtol=1e-9)
        assert alone.stderr(name) == 0
    summary, whole = alone.summary(), both.summary()
    for part in ("quadrature_error", "status"):
        assert summary[part]["pretraining"].keys() == whole[part]["pretraining"].keys()
    assert summary["pretraining"] == pytest.approx(whole["pretraining"], rel=1e-9)
    fine = both.setting.finetuning_resolved
    np.testing.assert_allclose(fine.effective_noise(alone.frozen(fine)), both.effective_noise, rtol=1e-9)
    np.testing.assert_allclose(alone.spectrum.eta, both.spectrum.eta, rtol=1e-9)


def test_error_bars_are_the_spread_over_seeds():
    pre = ls.Pretraining(0.2, 0.1, tokens=2)
    found = [ls.pretrain(pre, ls.Numerics(nodes=1024, finetuning_nodes=1024, seed=s)) for s in range(16)]
    for name in ("V", "M", "Q", "train_loss", "test_error"):
        spread = np.std([float(one.values[name]) for one in found], ddof=1)
        bars = np.sqrt(np.mean([one.stderr(name) ** 2 for one in found]))
        assert 0.5 < spread / bars < 1.8, name


def test_derivatives_agree_with_differences():
    slope = float(jax.grad(lambda lam: identity(lam).values["V"])(0.1))
    ends = [float(identity(lam).values["V"]) for lam in (0.0999, 0.1001)]
    assert slope == pytest.approx((ends[1] - ends[0]) / 2e-4, rel=1e-4)


def test_a_failed_solve_has_no_numbers_where_nothing_can_be_raised():
    def response(kappa):
        return identity(kappa=kappa).values["V"]

    with pytest.raises(SolveError, match=r"pretraining: too_narrow .* rank fraction 0.68"):
        response(0.05)
    narrow = ls.pretrain(ls.Pretraining(0.1, 0.1, kappa=0.05, activation="identity"), NUMERICS, throw=False)
    assert not narrow.ok and narrow.summary()["status"]["pretraining"]["code"] == "too_narrow"
    np.testing.assert_array_equal(np.isnan(jax.vmap(response)(jnp.array([0.05, 1.0]))), [True, False])
    assert np.isnan(jax.grad(response)(0.05)) and np.isfinite(jax.grad(response)(1.0))


def test_the_map_is_large_near_the_interpolation_threshold():
    """Noisy labels at a weak ridge: training at D = 60 (2 runs, 3 starts) has M = 7.1(1), Q = 62(7), growing with D;
    Newton steps alone stop at M = 2.8."""
    pre = ls.Pretraining(0.4804, 0.00105, kappa0=0.583, kappa=1.5, delta=2.46, tokens=2)
    found = ls.pretrain(pre, ls.Numerics(nodes=4096, replicas=4))
    assert 7.0 < float(found.values["M"]) < 9.0 and 60 < float(found.values["Q"]) < 110


def test_minimum_is_the_global_one_at_low_temperature():
    """beta = 5: many starts at every node give V, M, Q = 0.741, 0.399, 0.182; two gave 0.762, 0.392, 0.178."""
    found = ls.pretrain(ls.Pretraining(0.1, 0.1, delta=2.0, beta=5.0), ls.Numerics(nodes=8192, replicas=4))
    for name, want in (("V", 0.741), ("M", 0.399), ("Q", 0.182)):
        assert abs(float(found.values[name]) - want) < 3 * found.stderr(name) + 5e-4
