"""Samples of the pre-activations reproduce what is predicted without them, and what training measures."""

import numpy as np
import pytest
from scipy import stats

import lorastate as ls
from lorastate.diagnosis import preactivations as laws

NUMERICS = ls.Numerics(nodes=512, finetuning_nodes=1024, replicas=2)


@pytest.fixture(scope="module")
def solution():
    return ls.predict(
        ls.Setting(
            ls.Pretraining(0.2, 0.1, activation="identity", tokens=2),
            ls.Finetuning(3.0, 0.3, inputs="reused"),
            NUMERICS,
        )
    )


def test_pretraining(solution):
    sigma, p = solution.setting.pretraining.activation, solution.pretraining
    test, train = (laws.sample_pretraining(solution, kind, 60_000) for kind in ("test", "train"))
    for size, a, b in ((p["Q"], "Z_W", "Z_W"), (p["M"], "Z_W", "Z_star"), (p["M"], "Z_W", "Y"), (2.25, "Y", "Y")):
        got = np.mean(test[a] * test[b], -1)
        np.testing.assert_allclose(got, float(size) * np.array([[2, 1], [1, 2]]), rtol=0.05)

    def loss(s):
        return float(np.mean(np.sum((sigma(s["Z_W"]) - sigma(s["Y"])) ** 2, (0, 1))))

    assert loss(test) == pytest.approx(float(p["test_error"]), rel=0.02)
    assert loss(train) == pytest.approx(float(p["train_error"]) / 0.2, rel=0.03)
    x = np.array([0.0, 1.0])
    kernel = stats.gaussian_kde(np.asarray(test["Z_W"][0, 1]))(x)
    np.testing.assert_allclose(kernel, stats.norm.pdf(x, scale=float(p["Q"]) ** 0.5), rtol=0.05)


def test_finetuning(solution):
    sigma, f = solution.setting.finetuning_resolved.activation, solution.finetuning
    test, train = (laws.sample_finetuning(solution, kind, 60_000) for kind in ("test", "train"))
    np.testing.assert_allclose(np.mean(test["chi"] ** 2), f["q"], rtol=0.03)
    np.testing.assert_allclose(np.mean(test["chi"] * test["chi_star"]), f["m"], rtol=0.03)

    def loss(s):
        out, label = (s[z] + s[c][:, None] * s[c][None] for z, c in (("Z_W", "chi"), ("Y0", "chi_star")))
        return float(np.mean(np.sum((sigma(out) - sigma(label)) ** 2, (0, 1))))

    bar = float(solution.errors["finetuning"]["test_error"])
    assert loss(test) == pytest.approx(float(f["test_error"]), rel=0.02, abs=3 * bar)
    assert loss(train) == pytest.approx(float(f["train_error"]) / 3, rel=0.05)


def test_training_agrees(solution):
    found = ls.simulate(solution.setting, dimension=60, runs=4, starts=1, test_samples=100)
    for stage, alpha in (("pretraining", 0.2), ("finetuning", 3.0)):
        gap = abs(found.mean(stage, "train_error") - float(getattr(solution, stage)["train_error"])) / alpha
        assert gap < (4 * found.stderr(stage, "train_error") + 0.06 * found.mean(stage, "train_error")) / alpha
    with pytest.raises(ls.SettingError, match="test, train"):
        laws.sample_pretraining(solution, "old")
