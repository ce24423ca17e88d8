"""Both fixed points and all gradients once more, by jaxopt's Anderson acceleration and its own implicit derivative."""

from types import SimpleNamespace

import numpy as np
import pytest

import lorastate as ls
from lorastate.diagnosis import cross_check as module


@pytest.mark.parametrize("activation, channel", [("identity", {"inputs": "reused"}), ("softmax", {})])
def test_another_solver_agrees(activation, channel):
    pre = ls.Pretraining(alpha=0.1, lam=0.1, activation=activation, tokens=2)
    setting = ls.Setting(pre, ls.Finetuning(alpha=3.0, lam=0.5, **channel), ls.Numerics(512, 1024, 2))
    found = ls.cross_check(setting)
    assert max(found["residual"].values()) < 1e-9
    assert abs(found["value"]["difference"]) < 1e-8
    for path, slope in found["gradient"].items():
        assert abs(slope["difference"]) < 1e-6 * (1 + abs(slope["ours"])), path
    assert len(found["gradient"]) > 6


def test_not_in_a_glass(monkeypatch):
    """A solution with a level of breaking is refused; test_breaking has such solutions and their gradients."""

    def broken(problem):
        second = SimpleNamespace(solved=SimpleNamespace(point=SimpleNamespace(x=np.zeros(7))))
        return SimpleNamespace(problem=problem.with_broken(0), first=None, second=second)

    monkeypatch.setattr(module, "solve_alone", broken)
    monkeypatch.setattr(module, "evaluated", lambda *_: SimpleNamespace(failure=None))
    setting = ls.Setting(ls.Pretraining(0.1, 0.1, tokens=2), ls.Finetuning(3.0, 0.5), ls.Numerics(512, 1024, 2))
    with pytest.raises(ls.SettingError, match="symmetry is broken here"):
        ls.cross_check(setting)
