"""Thresholds against direct solves on both sides, closed forms and the response V."""

import numpy as np
import pytest

import lorastate as ls
from lorastate.diagnosis import thresholds as stability
from lorastate.setting.paths import replace


def setting(**fine):
    return ls.Setting(
        ls.Pretraining(alpha=0.1, lam=0.1, activation="identity", tokens=2),
        ls.Finetuning(**{"alpha": 1.0, "lam": 6.0, **fine}),
        ls.Numerics(nodes=512, finetuning_nodes=1024, replicas=2),
    )


def test_weak_recovery_threshold_separates_direct_solves():
    s = setting()
    threshold = stability.weak_recovery_threshold(s)
    below, above = (ls.predict(replace(s, "finetuning.alpha", f * threshold), throw=False) for f in (0.7, 1.4))
    assert abs(float(below.overlap)) < 0.1 < abs(float(above.overlap))
    pair = stability.branches(above)
    assert pair.free_energy[0] <= pair.free_energy[1] + 1e-9  # the small start may stay at m = 0, which is unstable


@pytest.mark.parametrize("kappa0", [0.5, 1.0])
def test_interpolation_threshold_is_where_the_loss_lifts(kappa0):
    def loss(factor, lam):
        pre = ls.Pretraining(factor * threshold, lam, kappa0, activation="identity", tokens=2)
        found = ls.predict(ls.Setting(pre, ls.Finetuning(1.0, 1.0), numerics), throw=False)
        return float(found.pretraining["train_error"]), float(found.pretraining["V"])

    numerics = ls.Numerics(nodes=512, finetuning_nodes=1024, replicas=2)
    threshold = stability.interpolation_threshold(ls.Pretraining(1.0, 1.0, kappa0, activation="identity", tokens=2))
    (low, v), (smaller, larger) = loss(0.8, 1e-5), loss(0.8, 1e-6)
    assert smaller < 0.02 * low and larger > 5 * v  # interpolates: the loss falls as lam^2, V grows as 1/lam
    (high, v), (same, bounded) = loss(1.25, 1e-5), loss(1.25, 1e-6)
    assert same == pytest.approx(high, rel=0.1) and bounded < 1.5 * v
    softmax = stability.interpolation_threshold(ls.Pretraining(1.0, 1.0, kappa0, tokens=2))
    assert softmax == pytest.approx(threshold * 6 / 4)  # T (T+1) against T (T+1) - 2


def test_no_threshold_in_reach():
    with pytest.raises(ls.SettingError, match="no weak-recovery threshold"):
        stability.weak_recovery_threshold(setting(lam=1e4))
    assert np.isfinite(stability.interpolation_threshold(setting().pretraining))


def test_interpolation_threshold_far_out():
    """Much noise, or little rank: every number is as good as another, 2 n_eff alpha -> 1. A law without noise in reach
    of rounding: the limit of none."""
    for options in ({"delta": 1e6}, {"delta": 1e100}, {"kappa0": 1e-12}):
        pre = ls.Pretraining(1.0, 1.0, activation="identity", tokens=2, **options)
        assert stability.interpolation_threshold(pre) == pytest.approx(1 / 12, rel=2e-3), options
    wide = ls.Pretraining(1.0, 1.0, kappa0=1e12, activation="identity", tokens=2)
    assert stability.interpolation_threshold(wide) == pytest.approx(1 / 6, rel=1e-3)


def test_interpolation_threshold_without_noise_is_the_limit_of_little():
    # arXiv:2509.24914: alpha_bar = alpha (T^2 + T - 2)/2 for softmax.
    for kappa0, published in (
        (0.3, (1 + 2 * 0.3 - 0.3**2) / 4),
        (0.9, (1 + 2 * 0.9 - 0.9**2) / 4),
        (1.0, 0.5),
        (2.5, 0.5),
    ):
        clean, noisy, noisier = (
            stability.interpolation_threshold(ls.Pretraining(1.0, 1.0, kappa0, delta=d)) * 10 / 2
            for d in (0.0, 1e-13, 1e-9)
        )
        assert clean == pytest.approx(published, rel=1e-6)
        assert noisy == pytest.approx(clean, rel=1e-3) and noisier == pytest.approx(clean, rel=2e-2)
    atoms = {"law": "atoms", "weights": [0.25, 0.75], "values": [0.0, 1.0]}
    found = stability.interpolation_threshold(ls.Pretraining(1.0, 1.0, delta=0.0, activation="identity", base=atoms))
    assert found == pytest.approx((2 - 0.25**2) / (2 * 12), rel=1e-6)
