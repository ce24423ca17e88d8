"""Both fixed points and all gradients once more, by jaxopt's Anderson acceleration and its own implicit derivative."""

import pytest

import lorastate as ls


@pytest.mark.parametrize("activation, channel", [("identity", {}), ("identity", {"inputs": "reused"}), ("softmax", {})])
def test_another_solver_agrees(activation, channel):
    pre = ls.Pretraining(alpha=0.1, lam=0.1, activation=activation, tokens=2)
    setting = ls.Setting(pre, ls.Finetuning(alpha=3.0, lam=0.5, **channel), ls.Numerics(512, 1024, 2))
    found = ls.cross_check(setting)
    assert max(found["residual"].values()) < 1e-9
    assert abs(found["value"]["difference"]) < 1e-8
    for path, slope in found["gradient"].items():
        assert abs(slope["difference"]) < 1e-6 * (1 + abs(slope["ours"])), path
    assert len(found["gradient"]) > 6


def test_not_in_a_glass():
    pre = ls.Pretraining(alpha=0.06, lam=0.002, delta=2.2, tokens=2)
    setting = ls.Setting(pre, ls.Finetuning(alpha=5.6, lam=0.07), ls.Numerics(4096, 8192, 4))  # of test_breaking
    with pytest.raises(ls.SettingError, match="symmetry is broken here"):
        ls.cross_check(setting)
