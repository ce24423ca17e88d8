"""The frozen-map channels: laws, limits, closed forms, derivatives, and what is refused."""

from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest
from scipy.special import gammaincinv
from scipy.stats import chi2

import lorastate as ls
from lorastate.bayes.frozen_map import frozen_map
from lorastate.design import descent
from lorastate.design import optimize as design
from lorastate.diagnosis.explain import noise_decomposition
from lorastate.evolution.order import from_norm
from lorastate.math.quadrature import gaussian_nodes
from lorastate.model.channel.frozen_map import FrozenMap
from lorastate.model.channel.inputs import BayesOptimal, Fresh, Mixed, Reused
from lorastate.model.channel.selected import Selected, attach_quantile, quantile
from lorastate.setting.fields import continuous_fields
from lorastate.setting.files import setting_from_dict, setting_to_dict
from lorastate.setting.paths import get, replace
from lorastate.solution.gradients import Point

SMALL = {"nodes": 512, "finetuning_nodes": 1024, "replicas": 2}
T = 3
FROZEN = FrozenMap(1.3, 1.2, 2.0, 0.8, 2.25, ls.Identity())


def setting(activation="softmax", lam=0.02, fine_lam=0.5, tokens=2, delta=0.5, alpha=3.0, kappa0=1.0, **fine):
    return ls.Setting(
        ls.Pretraining(alpha=0.2, lam=lam, kappa0=kappa0, kappa=1.5, activation=activation, tokens=tokens, delta=delta),
        ls.Finetuning(None if fine.get("inputs") == "selected" else alpha, fine_lam, **fine),
        ls.Numerics(**SMALL),
    )


CHANNELS = [
    Fresh(), Reused("same"), Reused("fresh"), Mixed(0.3), Mixed(0.6, "fresh"), Selected(0.1, 30.0), Selected(1.0, 30.0),
]  # fmt: skip


@pytest.mark.parametrize("inputs", CHANNELS, ids=lambda c: f"{c.name}-{getattr(c, 'label_noise', '')}")
@pytest.mark.parametrize("drop", [False, True])
def test_samples_have_the_moments(inputs, drop):
    nodes = gaussian_nodes(inputs.dimension(T, drop), 2**16, 2, 0)
    x, weight = nodes.normal[0], nodes.weight[0]
    delta = 0.5 if inputs.keeps_noise else 0.8
    y0, zw = inputs.fields(FROZEN, delta, T, drop, x, inputs.search(FROZEN, T, drop, x))
    weight = np.concatenate([share * weight for share in inputs.shares])
    want = inputs.moments(FROZEN, delta, T, drop)
    # Without the common shift a field has lost part of its diagonal: (1 + delta_ab) less 2/T^2.
    scale = 1 + np.eye(T) - (2 / T**2 if drop else 0)
    for a, b, size in ((y0, y0, want.yy), (y0, zw, want.yz), (zw, zw, want.zz)):
        if drop and inputs.name == "selected":
            continue  # the score sees the shift, the label noise does not have it
        np.testing.assert_allclose(np.sum(weight * a * b, -1), scale * size, rtol=0.01)


def test_identity_closed_forms():
    M, Q, Q0, V, L = 1.3, 1.2, 2.0, 0.8, 2.25
    gap, pull = L + Q - 2 * M, 4 * V / T**2

    def of(inputs):
        return float(inputs.moments(FROZEN, 0.5, T, False).effective_noise())

    assert of(Fresh()) == pytest.approx(gap, rel=1e-12)
    assert of(Reused("same")) == pytest.approx(gap / (1 + pull) ** 2, rel=1e-12)
    assert of(Mixed(0.25)) == pytest.approx(0.75 * gap + 0.25 * gap / (1 + pull) ** 2, rel=1e-12)
    assert of(Selected(1.0, 3.0)) == pytest.approx(gap, rel=1e-9)
    assert of(Selected(1e-9, 3.0)) == pytest.approx(L - M**2 / Q, rel=2e-3)
    # Y0 = Z* + Xi' with new noise, by hand: Z_W = (a (Z* + Xi) + Omega)/(1 + a).
    a = pull
    want = 0.25 + Q0 - 2 * (a * Q0 + M) / (1 + a) + (a**2 * L + 2 * a * M + Q) / (1 + a) ** 2
    assert of(Reused("fresh")) == pytest.approx(want, rel=1e-12)
    fresh = Fresh().moments(FROZEN, 0.5, T, False)
    assert fresh.best_scale == pytest.approx(M / Q)
    assert fresh.effective_noise(fresh.best_scale) == pytest.approx(L - M**2 / Q)


def test_without_response_reused_is_fresh():
    still = FROZEN._replace(response=0.0)
    for noise in ("same", "fresh"):
        m = Reused(noise).moments(still, 0.5, T, False)
        np.testing.assert_allclose(m, Fresh().moments(still, 0.5, T, False), rtol=1e-12)


def test_general_code_gives_the_identity_closed_form_on_reused_inputs():
    # The identity as a callable goes through the inner minimisation.
    general = FROZEN._replace(activation=ls.Custom(lambda z: z / T))
    x = gaussian_nodes(Reused().dimension(T, False), 512, 2, 0).normal[0]
    for inputs in (Reused("same"), Reused("fresh")):
        x = gaussian_nodes(inputs.dimension(T, False), 512, 2, 0).normal[0]
        found = inputs.search(general, T, False, x)
        direct = inputs.fields(FROZEN, 0.5, T, False, x)
        np.testing.assert_allclose(inputs.fields(general, 0.5, T, False, x, found), direct, atol=1e-9)
        again = inputs.search(general._replace(response=0.81), T, False, x, found)
        direct = inputs.fields(FROZEN._replace(response=0.81), 0.5, T, False, x)
        np.testing.assert_allclose(
            inputs.fields(general._replace(response=0.81), 0.5, T, False, x, again), direct, atol=1e-9
        )


@pytest.mark.parametrize("score", ["frobenius", "without_shift"])
def test_selected_radius_is_the_truncated_law(score):
    inputs, x = Selected(0.07, 30.0, score), gaussian_nodes(12, 2**14, 2, 0).normal[0]
    x = x[: inputs.dimension(T, False)]
    _, zw = inputs.fields(FROZEN, 0.5, T, False, x, inputs.search(FROZEN, T, False, x))
    radius = np.sum(np.square(zw), (0, 1)) / (2 * FROZEN.norm)
    degrees = 6 if score == "frobenius" else 5
    assert radius.max() <= chi2.ppf(0.07, degrees)
    for p in (0.1, 0.5, 0.9):
        assert np.quantile(radius, p) == pytest.approx(chi2.ppf(0.07 * p, degrees), rel=0.02)
    if score == "without_shift":
        np.testing.assert_allclose(np.sum(zw, (0, 1)), 0.0, atol=1e-12)


def test_quantile():
    p = np.concatenate([np.geomspace(1e-12, 0.5, 40), 1 - np.geomspace(1e-9, 0.5, 40)])
    for a in (1.5, 3.0, 10.0):
        y = quantile(a, p)
        np.testing.assert_allclose(y, gammaincinv(a, p), rtol=1e-8)
        slope = jax.vmap(jax.grad(attach_quantile, 1), (None, 0, 0))(a, p, y)
        h = 1e-3 * np.minimum(p, 1 - p)
        central = (gammaincinv(a, p + h) - gammaincinv(a, p - h)) / (2 * h)
        exact = p < 1 - 1e-6  # differences lose their digits at the end
        np.testing.assert_allclose(slope[exact], central[exact], rtol=1e-5)


CASES: dict[str, dict[str, Any]] = {
    "mixed": dict(kappa0=0.5, inputs="mixed", reused_fraction=0.4, label_noise="fresh", recalibration=0.9),
    "selected and recalibrated": dict(
        activation="identity", lam=0.1, inputs="selected", rho=0.1, pool=30.0, recalibration="noise"
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_gradient_is_the_central_difference(name):
    # A seed at which no minimiser of the few nodes jumps within the steps below.
    s = replace(setting(**CASES[name]), "numerics.seed", 1)
    value, slopes = ls.gradient(s)
    assert value == pytest.approx(float(ls.predict(s).test_error), rel=1e-9)
    assert tuple(slopes) == continuous_fields(s)
    # What is special to a channel, and one field that reaches it through each part of the theory.
    special = tuple(f"finetuning.{key}" for key in (*s.finetuning.inputs.numbers, "recalibration"))
    for path in ("pretraining.lam", "pretraining.kappa0", *special):
        if path not in slopes:
            continue
        x, slope = float(get(s, path)), slopes[path]
        h = 1e-3 * x
        up, down = (ls.gradient(replace(s, path, x + d))[0] for d in (h, -h))
        assert (up - down) / (2 * h) == pytest.approx(slope, rel=4e-4, abs=1e-6), path


def test_limits_of_the_solutions():
    fresh = ls.predict(setting("identity", 0.1))
    none = ls.predict(setting("identity", 0.1, inputs="mixed", reused_fraction=0.0))
    for name in ("m", "q", "test_error", "effective_noise"):
        np.testing.assert_allclose(none.finetuning[name], fresh.finetuning[name], rtol=1e-9)
    reused_wholly: tuple[dict[str, Any], ...] = {"inputs": "reused"}, {"inputs": "mixed", "reused_fraction": 1.0}
    reused, mixed = (ls.predict(setting("identity", 0.1, **k)) for k in reused_wholly)
    for name in ("m", "q", "test_error", "effective_noise"):
        np.testing.assert_allclose(mixed.finetuning[name], reused.finetuning[name], rtol=1e-9)
    # The mismatch: reused inputs are less noisy to LoRA than the test inputs.
    assert float(reused.effective_noise) < float(fresh.effective_noise)
    assert float(reused.overlap) > float(fresh.overlap)
    frozen = ls.predict(setting("identity", 0.1, fine_lam=1e4))
    np.testing.assert_allclose(frozen.test_error, frozen.finetuning["test_error_frozen"], rtol=1e-6)


def test_recalibrations():
    plain = setting("identity", 0.3)
    error = ls.predict(replace(plain, "finetuning.recalibration", "error"))
    assert np.isnan(error.stderr("finetuning", "recalibration"))  # of a search: not known, which is not zero
    p = error.pretraining
    fine = replace(plain, "finetuning.recalibration", "noise").finetuning_resolved
    frozen = FrozenMap(p["M"], p["Q"], 2.0)
    np.testing.assert_allclose(float(fine.scale(frozen)), p["M"] / p["Q"], rtol=1e-9)
    np.testing.assert_allclose(fine.effective_noise(frozen), 2.25 - p["M"] ** 2 / p["Q"], rtol=1e-9)
    # For the identity E' depends on b through Delta_eff alone, so that both prescriptions are one (up to quadrature).
    np.testing.assert_allclose(error.finetuning["recalibration"], p["M"] / p["Q"], rtol=0.01)
    assert float(error.test_error) < float(ls.predict(plain).test_error)
    _, slopes = ls.gradient(replace(plain, "finetuning.recalibration", "error"))
    h = 1e-3
    up, down = (
        float(
            ls.predict(
                replace(replace(plain, "finetuning.recalibration", "error"), "pretraining.lam", 0.3 + d)
            ).test_error
        )
        for d in (h, -h)
    )
    assert slopes["pretraining.lam"] == pytest.approx((up - down) / (2 * h), rel=1e-4)
    assert "finetuning.recalibration" not in slopes
    with pytest.raises(ls.SettingError, match="test_error only"):
        ls.gradient(replace(plain, "finetuning.recalibration", "error"), of="overlap")


def test_bayes_optimal_map():
    pre = setting("identity", 0.1).pretraining
    best = ls.bayes_optimal_pretraining(pre)
    frozen = frozen_map(BayesOptimal(), pre, from_norm(1.0, 0.5, 0.6, pre.label_size))
    assert frozen.overlap == frozen.norm == best.Q
    noise = BayesOptimal().moments(frozen, 0.5, 2, False).effective_noise()
    np.testing.assert_allclose(noise, 2.25 - best.Q, rtol=1e-12)


def test_the_best_map_does_not_need_the_learned_one():
    s = setting("identity", 0.1, inputs="bayes_optimal")
    narrow = replace(s, "pretraining.kappa", 1e-3)
    known, found = ls.predict(s), ls.predict(narrow, throw=False)
    assert found.code("pretraining") is ls.Code.too_narrow and found.code("finetuning") is ls.Code.ok
    assert float(found.test_error) == pytest.approx(float(known.test_error), rel=1e-9)
    slopes, want = (ls.gradient(a)[1]["pretraining.alpha"] for a in (narrow, s))
    assert slopes == pytest.approx(want, rel=1e-6)
    assert noise_decomposition(found) == pytest.approx(noise_decomposition(known))


def test_mixture_is_optimised_inside_its_range(monkeypatch):
    # (r - 0.9)^2 from 0.5: a step in r itself would leave [0, 1].
    def evaluate(s, objective):
        r = float(s.finetuning.inputs.reused_fraction)
        assert 0 < r < 1
        return Point((r - 0.9) ** 2, {"finetuning.reused_fraction": 2 * (r - 0.9)})

    solution = SimpleNamespace()
    monkeypatch.setattr(descent, "evaluate", evaluate)
    monkeypatch.setattr(design, "predict", lambda s: solution)
    s = setting("identity", 0.1, inputs="mixed", reused_fraction=0.5)
    best = ls.optimize(s, over=("finetuning.reused_fraction",))
    assert best.converged and float(best.setting.finetuning.inputs.reused_fraction) == pytest.approx(0.9, rel=1e-5)
    with pytest.raises(ls.SettingError, match="below 1 when it is descended"):
        ls.optimize(replace(s, "finetuning.reused_fraction", 1.0), over=("finetuning.reused_fraction",))


BASE = {"pretraining": {"alpha": 0.1, "lam": 0.1}, "finetuning": {"alpha": 3.0, "lam": 0.1}}


@pytest.mark.parametrize(
    ("fine", "words"),
    [
        ({"inputs": "old"}, ["finetuning.inputs = 'old'", '"reused"']),
        ({"rho": 0.1}, ["finetuning.rho = 0.1", "no meaning"]),
        ({"inputs": "selected", "rho": 0.1}, ["finetuning.pool is missing"]),
        ({"inputs": "selected", "pool": 10}, ["finetuning.rho is missing"]),
        ({"inputs": "selected", "rho": 0, "pool": 10}, ["finetuning.rho = 0.0", "0 < rho <= 1"]),
        ({"inputs": "selected", "rho": 1.2, "pool": 10}, ["finetuning.rho = 1.2", "0 < rho <= 1"]),
        ({"inputs": "selected", "rho": 0.1, "pool": -1}, ["finetuning.pool = -1.0", "pool > 0"]),
        ({"inputs": "selected", "rho": 0.1, "pool": 10, "score": "x"}, ["finetuning.score = 'x'"]),
        ({"inputs": "mixed"}, ["finetuning.reused_fraction is missing"]),
        ({"inputs": "mixed", "reused_fraction": 1.5}, ["finetuning.reused_fraction = 1.5", "0 to 1"]),
        ({"inputs": "mixed", "reused_fraction": float("nan")}, ["finetuning.reused_fraction = nan"]),
        ({"inputs": "reused", "label_noise": "none"}, ["finetuning.label_noise = 'none'"]),
        ({"inputs": "reused", "delta": 0.7}, ["finetuning.delta = 0.7", 'label_noise = "fresh"']),
        ({"inputs": "reused", "tokens": 2}, ["finetuning.tokens = 2", "reused"]),
        ({"recalibration": -1.0}, ["finetuning.recalibration = -1.0"]),
        ({"recalibration": "best"}, ["finetuning.recalibration = 'best'", '"noise"']),
        (
            {"inputs": "selected", "rho": 0.1, "pool": 10, "score": "without_shift", "activation": "identity"},
            ["finetuning.score", "identity"],
        ),
    ],
)
def test_bad_input(fine, words):
    with pytest.raises(ls.SettingError) as error:
        data = {**BASE, "finetuning": {**BASE["finetuning"], **fine}}
        if fine.get("inputs") == "selected":
            del data["finetuning"]["alpha"]
        setting_from_dict(data).finetuning_resolved  # noqa: B018
    assert all(word in str(error.value) for word in words), error.value


@pytest.mark.parametrize(
    "fine",
    [
        {},
        *CASES.values(),
        {"inputs": "reused"},
        {"inputs": "reused", "label_noise": "fresh"},
        {"recalibration": "error"},
    ],
)
def test_settings_go_round(fine):
    fine = {**BASE["finetuning"], **{k: v for k, v in fine.items() if k not in ("activation", "lam", "kappa0")}}
    if fine.get("inputs") == "selected":
        del fine["alpha"]
    s = setting_from_dict({**BASE, "finetuning": fine})
    plain = setting_to_dict(s)
    assert {k: plain["finetuning"][k] for k in fine} == fine
    if s.finetuning.inputs.keeps_noise:
        del plain["finetuning"]["delta"]
    assert setting_to_dict(setting_from_dict(plain)) == setting_to_dict(s)


def test_alpha_of_selected_inputs_is_rho_times_pool():
    data = {**BASE, "finetuning": {"lam": 0.1, "inputs": "selected", "rho": 0.02, "pool": 100}}
    s = setting_from_dict(data)
    assert float(s.finetuning.alpha) == pytest.approx(2.0)
    assert float(replace(s, "finetuning.rho", 0.04).finetuning.alpha) == pytest.approx(4.0)
    with pytest.raises(ls.SettingError, match="rho \\* pool"):
        replace(s, "finetuning.alpha", 1.0)
    data["finetuning"]["alpha"] = 3.0
    with pytest.warns(UserWarning, match="replaced by rho"):
        assert float(setting_from_dict(data).finetuning.alpha) == pytest.approx(2.0)
