"""The mismatch of error and overlap, and the parts of the effective noise."""

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import lorastate as ls
from lorastate.bayes import posterior
from lorastate.design import mismatch
from lorastate.diagnosis import explain as report
from lorastate.diagnosis.explain import noise_decomposition
from lorastate.diagnosis.page import page
from lorastate.errors import SolveError
from lorastate.setting.paths import get, replace

SETTING = ls.Setting(
    ls.Pretraining(alpha=0.2, lam=0.05, activation="identity", tokens=2),
    ls.Finetuning(alpha=3.0, lam=0.3, inputs="reused"),
    ls.Numerics(nodes=512, finetuning_nodes=1024, replicas=2),
)


@pytest.fixture
def toy(monkeypatch):
    """E' = (log lam - log(delta)/2)^2 and o_w = -(log lam + log alpha')^2 - 1."""

    def parts(setting):
        lam, delta, alpha = (
            math.log(float(get(setting, p))) for p in ("pretraining.lam", "pretraining.delta", "finetuning.alpha")
        )
        return lam, lam - delta / 2, lam + alpha

    def gradient(setting, of="test_error"):
        _, error, overlap = parts(setting)
        by = {"test_error": (2 * error, -error, 0.0), "overlap": (-2 * overlap, 0.0, -2 * overlap)}[of]
        paths = ("pretraining.lam", "pretraining.delta", "finetuning.alpha")
        value = error**2 if of == "test_error" else -(overlap**2) - 1
        return value, {p: d / float(get(setting, p)) for p, d in zip(paths, by, strict=True)}

    def optimize(setting, over, minimize, tolerance):
        lam, error, overlap = parts(setting)
        best = lam - (error if minimize == "test_error" else overlap)
        return SimpleNamespace(converged=True, setting=replace(setting, over[0], math.exp(best + 0.3)))

    monkeypatch.setattr(mismatch, "gradient", gradient)
    monkeypatch.setattr(mismatch, "optimize", optimize)


def test_mismatch_and_its_slopes(toy):
    found = ls.measure_mismatch(SETTING, ("pretraining.delta", "finetuning.alpha"))
    assert found.lam_error == pytest.approx(0.5**0.5) and found.lam_overlap == pytest.approx(1 / 3)
    assert found.disagreement == pytest.approx(math.log(found.lam_overlap / found.lam_error))
    assert found.price == pytest.approx(found.disagreement**2)
    assert found.slopes == pytest.approx({"pretraining.delta": -0.5, "finetuning.alpha": -1.0})
    with pytest.raises(ls.SettingError, match="not a continuous field"):
        ls.measure_mismatch(SETTING, ("pretraining.lam",))


def test_search_for_the_mismatch_goes_up(toy):
    best = ls.find_mismatch(SETTING, steps=3)
    sizes = [abs(row["disagreement"]) for row in best.path]
    assert len(sizes) == 4 and np.all(np.diff(sizes) > 0.5)
    assert best.path[-1]["finetuning.alpha"] == pytest.approx(3 * math.exp(1.5))


def test_a_maximum_is_not_taken_for_a_minimum(toy, monkeypatch):
    real = mismatch.gradient
    monkeypatch.setattr(mismatch, "gradient", lambda *a, **k: (0.0, {p: -d for p, d in real(*a, **k)[1].items()}))
    with pytest.raises(SolveError, match="off a minimum"):
        ls.measure_mismatch(SETTING)


def decomposed(M=1.1, Q=0.9, b=1.0, **fine):
    """The parts of the noise on a map that is given, not solved for."""
    solution: Any = SimpleNamespace(
        setting=ls.Setting(SETTING.pretraining, ls.Finetuning(3.0, 0.3, recalibration=b, **fine), SETTING.numerics),
        pretraining={"V": 1.0, "M": M, "M_down": M, "Q": Q},
        finetuning={"recalibration": b},
        status={"pretraining": {"code": 0}},
    )
    return noise_decomposition(solution)


def test_parts_of_the_noise():
    M, Q, b = 1.1, 0.9, 0.8
    parts = decomposed(M, Q, b)
    assert parts["total"] == pytest.approx(0.25 + 2 - 2 * b * M + b**2 * Q)
    assert parts["label_noise"] + parts["unexplained"] + parts["miscalibration"] == pytest.approx(parts["total"])
    assert parts["label_noise"] == 0.25 and parts["best_scale"] == pytest.approx(M / Q)
    assert parts["unexplained"] == pytest.approx(2 - M**2 / Q)
    assert parts["miscalibration"] == pytest.approx(Q * (b - M / Q) ** 2)


def test_fresh_inputs_of_a_mixture_keep_their_label_noise():
    def label_noise(**inputs):
        return decomposed(**inputs)["label_noise"]

    assert label_noise(inputs="mixed", reused_fraction=0.2) == pytest.approx(0.8 * 0.25)
    assert label_noise(inputs="mixed", reused_fraction=0.2, label_noise="fresh") == pytest.approx(0.25)
    assert label_noise(inputs="reused") == 0.0


def test_the_best_ridge_beside_an_update_that_is_zero(monkeypatch):
    # o_w exists between two ridges only, and E' is flat where w is zero: no bracket may be asked of a root finder.
    def predict(s, throw):
        x = math.log(float(s.pretraining.lam) / 0.05)
        o_w = math.nan if abs(x) > width else 1 - x**2
        known = 1.0 if math.isnan(o_w) else 1 - o_w / 2
        return SimpleNamespace(
            ok=True, effective_noise=(x - 0.1) ** 2, overlap=o_w, test_error=known, pretraining={"test_error": math.nan}
        )

    monkeypatch.setattr(report, "predict", predict)
    width = 0.5
    found = report.best_ridges(SETTING)
    assert found["overlap"] == pytest.approx(0.05, rel=1e-3) == found["test_error"]
    assert found["effective_noise"] == pytest.approx(0.05 * math.exp(0.1), rel=1e-3)
    assert found["pretraining_test_error"] is None
    width = -1.0
    assert report.best_ridges(SETTING)["overlap"] is None


def test_below_recovery_the_page_says_so(monkeypatch):
    monkeypatch.setattr(posterior, "_OUTER", 2**11)  # of a limit that the page shows as it is
    # The search for the threshold would come by glasses.
    below = ls.Setting(SETTING.pretraining, ls.Finetuning(0.05, 20.0), ls.Numerics(512, 1024, 2, symmetry="rs"))
    facts = ls.explain(below)
    text = page(facts)
    assert "below recovery" in text and "o_w (largest)" not in text
    assert facts["best_lam"]["overlap"] is None and facts["best_lam"]["effective_noise"] is not None
