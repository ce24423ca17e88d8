"""Optima under budgets: against dense grids, prices against finite differences, exact invariances, sensitivities."""

import itertools
import json

import numpy as np
import pytest

import lorastate as ls
from lorastate.design import descent
from lorastate.design import optimize as design
from lorastate.design.budgets import budgets
from lorastate.design.optimize import optimize
from lorastate.design.sensitivities import sensitivities
from lorastate.setting.paths import get, replace
from lorastate.solution import gradients
from lorastate.solution.gradients import Point

NUMERICS = ls.Numerics(512, 1024, 2)
DATA = ("pretraining.alpha", "finetuning.alpha", "pretraining.lam", "finetuning.lam")


def setting(**task):
    pre = ls.Pretraining(0.1, 0.1, activation="identity", tokens=2, task=task or None)
    return ls.Setting(pre, ls.Finetuning(3.0, 0.3, tokens=2), NUMERICS)


def value(s, **fields):
    for path, x in fields.items():
        s = replace(s, path.replace("__", "."), x)
    return ls.gradient(s)[0]


@pytest.fixture(scope="module")
def bought():
    """The best way to spend 0.25 on pre-training (1 a unit) and fine-tuning data (0.05 a unit)."""
    return optimize(setting(), DATA, budgets=["pretraining.alpha + 0.05 * finetuning.alpha <= 0.25"])


def test_best_under_a_total_price_on_a_dense_grid(bought):
    assert bought.converged and bought.gradient_norm < 1e-6
    (report,) = bought.budgets
    assert report["binds"] and abs(report["excess"]) < 1e-9
    best = bought.path[-1]
    # No other division of the same money, with any ridges, does better.
    divided = itertools.product((0.3, 0.5, 0.6, 0.66, 0.69, 0.75, 0.9), (1.0,), (1.0,))
    for share, a, b in (*divided, *itertools.product((0.6, 0.66, 0.69), (0.7, 1.4), (0.6, 1.7))):
        other = value(
            bought.setting, pretraining__alpha=0.25 * share, finetuning__alpha=0.25 * (1 - share) / 0.05,
            pretraining__lam=a * best["pretraining.lam"], finetuning__lam=b * best["finetuning.lam"],
        )  # fmt: skip
        assert other > best["value"]
    nearby = 0.25 * 0.99 * best["pretraining.alpha"] / 0.25
    assert value(bought.setting, pretraining__alpha=nearby, finetuning__alpha=(0.25 - nearby) / 0.05) > best["value"]


def test_price_is_the_derivative_of_the_best_value(bought):
    h = 1e-3
    low, high = (
        optimize(bought.setting, DATA, budgets=[f"pretraining.alpha + 0.05 * finetuning.alpha <= {0.25 + d}"])
        for d in (-h, h)
    )
    slope = (high.path[-1]["value"] - low.path[-1]["value"]) / (2 * h)
    assert bought.budgets[0]["price"] == pytest.approx(-slope, rel=1e-4)


def test_a_flat_field_does_not_keep_the_descent_from_its_end():
    # The ridge of fine-tuning hardly matters there: SLSQP ends early, and a Newton step leaves a curved budget.
    pre = ls.Pretraining(0.27256, 0.11781, 0.5, activation="identity", tokens=2)
    start = ls.Setting(pre, ls.Finetuning(9.14698, 0.39319, tokens=2), NUMERICS)
    best = optimize(start, DATA, budgets=["pretraining.alpha + 0.003 * finetuning.alpha <= 0.3"])
    assert best.converged and best.budgets[0]["binds"] and abs(best.budgets[0]["excess"]) < 1e-9
    assert best.slopes["finetuning.alpha"] == pytest.approx(0.003 * best.slopes["pretraining.alpha"], rel=1e-4)


def test_label_power_binds_or_not():
    s, over = setting(a=0.9, c=0.5, kappa_perp=0.7), ("pretraining.task.a", "pretraining.lam")
    tight, loose = (optimize(s, over, budgets=[f"label_power <= {power}"]) for power in (2.5, 9.0))
    assert (
        tight.converged
        and tight.budgets[0]["binds"]
        and float(tight.setting.pretraining.label_size) == (pytest.approx(2.5))
    )
    assert loose.converged and not loose.budgets[0]["binds"] and loose.budgets[0]["price"] == 0
    # With the budget that does not bind the optimum is the free one; a grid confirms the other.
    free = optimize(s, over)
    assert loose.path[-1]["value"] == pytest.approx(free.path[-1]["value"], rel=1e-9)
    a, lam = (tight.path[-1][p] for p in over)
    along = ((0.8, 1.0), (0.9, 1.0), (0.97, 1.0), (1.0, 0.6), (1.0, 0.8), (1.0, 1.25), (1.0, 1.7))
    for x, y in (*along, *itertools.product((0.8, 0.97), (0.8, 1.25))):
        assert value(tight.setting, pretraining__task__a=x * a, pretraining__lam=y * lam) > tight.path[-1]["value"]
    h = 1e-3
    ends = [optimize(s, over, budgets=[f"label_power <= {2.5 + d}"]).path[-1]["value"] for d in (-h, h)]
    assert tight.budgets[0]["price"] == pytest.approx(-(ends[1] - ends[0]) / (2 * h), rel=1e-3)


def test_two_budgets_and_a_function_of_ones_own():
    def little_noise(s):
        return 0.2 - s.pretraining.delta

    s, over = setting(a=0.9, c=0.5, kappa_perp=0.7), ("pretraining.task.a", "pretraining.delta", "pretraining.lam")
    best = optimize(s, over, budgets=["label_power = 2.5", little_noise])
    assert best.converged and [b["binds"] for b in best.budgets] == [True, True]
    assert best.budgets[1]["budget"] == "little_noise"
    assert float(best.setting.pretraining.delta) == pytest.approx(0.2, abs=1e-8)
    written = optimize(s, over, budgets=["label_power = 2.5", "pretraining.delta >= 0.2"])
    assert written.path[-1]["value"] == pytest.approx(best.path[-1]["value"], rel=1e-10)
    assert written.budgets[1]["price"] == pytest.approx(best.budgets[1]["price"], rel=1e-5)


def test_identity_knows_no_length_at_equal_pairs():
    # delta^2 = Delta_0/(alpha n) and everything below it see T only through alpha T (T+1): an exact invariance.
    best = optimize(
        setting(),
        ("pretraining.alpha", "pretraining.lam"),
        budgets=["pairs = 0.5"],
        scan={"pretraining.tokens": [2, 3]},
    )
    two, three = best.scanned
    assert two["converged"] and three["converged"]
    assert (two["pretraining.tokens"], three["pretraining.tokens"]) == (2, 3)
    assert two["pretraining.alpha"] == pytest.approx(0.5 / 3) and three["pretraining.alpha"] == pytest.approx(0.5 / 6)
    assert two["value"] == pytest.approx(three["value"], rel=1e-8)
    assert json.dumps(best.summary())


def test_a_quantity_alone_is_held():
    best = optimize(setting(), ("pretraining.alpha", "pretraining.lam"), budgets="pairs")
    assert best.budgets[0]["budget"] == "pairs = 0.3" and best.path[-1]["pretraining.alpha"] == pytest.approx(0.1)


def test_an_optimum_at_the_boundary_is_not_called_one():
    s, over = setting(a=0.9, c=0.5, kappa_perp=0.7), ("pretraining.task.a", "pretraining.task.c")
    best = optimize(s, over, budgets=["label_signal = 2.0"])
    assert not best.converged and "pretraining.task.c runs off" in best.message


@pytest.mark.parametrize(
    "given, words",
    [
        (["pairs <= -1"], "budget 'pairs <= -1' cannot be kept"),
        (["pairs <= 0.1", "pairs >= 0.2"], "cannot be kept"),
        (["label_power = 1e9"], "cannot be kept"),
        (["pretraining.alpha <= 0"], "budget 'pretraining.alpha <= 0' is kept only in the limit"),
        (["profit <= 1"], "speaks of 'profit', which is unknown here; allowed: pairs"),
        (["pretraining.lamb <= 1"], "speaks of 'pretraining.lamb'"),
        (["pairs < 1"], "allowed: one of <=, >= and ="),
        (["0.1 <= pairs <= 1"], "allowed: one of <=, >= and ="),
        (["pairs <= "], "is not readable"),
        (["__import__('os') = 1"], "not arithmetic"),
        ([3.0], "budget 3.0 is not readable"),
        (["1 / 0 * pairs <= 1"], "budget '1 / 0 * pairs <= 1' has no value at this setting (inf)"),
        (["pairs / (pretraining.tokens - 2) <= 1"], "has no value at this setting (inf)"),
        (["(-1) ** 0.5 <= pairs"], "has no value at this setting (nan)"),
        (["log(0 * pairs)"], "has no value at this setting (-inf)"),
        (["10 ** 400 >= pairs"], "has no value at this setting (inf)"),
        ([f"pairs <= 1{'0' * 400}"], "has no value at this setting (inf)"),
    ],
)
def test_bad_budgets(given, words):
    with pytest.raises(ls.SettingError) as error:
        optimize(setting(), ("pretraining.alpha", "pretraining.lam"), budgets=given)
    assert words in str(error.value)


@pytest.mark.parametrize(
    "scan, words",
    [
        ({"pretraining.tokens": []}, "has no values"),
        ({"pretraining.tokens": [2, 9]}, "pretraining.tokens = 9"),
        ({"pretraining.lam": [0.1]}, "this field is continuous"),
        ({"pretraining.depth": [1]}, "unknown key pretraining.depth"),
    ],
)
def test_bad_scans(scan, words):
    with pytest.raises(ls.SettingError) as error:
        optimize(setting(), ("pretraining.alpha",), scan=scan)
    assert words in str(error.value)


def test_arithmetic_of_budgets():
    s = setting(a=0.9, c=0.5, kappa_perp=0.7)
    cases = {
        "2 * pretraining.alpha - finetuning.alpha / 3 <= -1": 2 * 0.1 - 1 + 1,
        "sqrt(pretraining.alpha) ** 2 = exp(log(0.1))": 0.0,
        "pairs >= 1": 1 - 0.3,
        "lora_pairs <= 9": 0.0,
        "label_signal = 0": 0.81 * 2 + 0.25 * 1.7 + 0.9 * 0.7**0.5,
        "label_power - label_signal <= 0": 0.25,
    }
    for text, want in cases.items():
        (budget,) = budgets(text, s)
        assert float(budget.excess(s)) == pytest.approx(want, abs=1e-12), text
        assert budget.equality == (" = " in text)


def test_sensitivities():
    s, over = setting(), ("pretraining.lam", "finetuning.lam")
    found = sensitivities(s, over)
    e = ls.gradient(s)[0]
    for path in ("pretraining.alpha", "finetuning.delta", "pretraining.kappa0"):
        x, h = float(get(s, path)), 1e-4
        up, down = (value(s, **{path.replace(".", "__"): x * np.exp(d)}) for d in (h, -h))
        assert found.elasticities[path] == pytest.approx((up - down) / (2 * h) / e, rel=1e-5)

    def at(a, b):
        return value(s, pretraining__lam=0.1 * np.exp(a), finetuning__lam=0.3 * np.exp(b))

    h = 0.02
    want = [
        [
            (at(*(h * (u + w))) - at(*(h * (u - w))) - at(*(h * (w - u))) + at(*(-h * (u + w)))) / (4 * h * h)
            for w in np.eye(2)
        ]
        for u in np.eye(2)
    ]
    np.testing.assert_allclose(found.hessian, want, rtol=0.02, atol=1e-4)
    np.testing.assert_allclose(found.directions @ np.diag(found.curvatures) @ found.directions.T, found.hessian)


def test_an_optimum_at_the_boundary_is_none():
    # Without label noise Delta_eff falls as lambda^2, and its gradient with it: small is what is small for its size.
    pre = ls.Pretraining(0.3, 0.1, 0.5, delta=0.0, activation="identity", tokens=2)
    over = {"over": ("pretraining.lam",), "minimize": "effective_noise"}
    clean = optimize(ls.Setting(pre, ls.Finetuning(3.0, 0.3), NUMERICS), **over)
    assert not clean.converged and clean.message.startswith("pretraining.lam runs off")
    inside = optimize(ls.Setting(pre, ls.Finetuning(3.0, 0.3), NUMERICS), budgets=["pretraining.lam <= 1"], **over)
    assert not inside.converged
    noisy = optimize(setting(), **over)
    assert noisy.converged and noisy.gradient_norm < 1e-6


def test_a_floor_below_a_vanishing_slope_is_no_optimum(monkeypatch):
    # E' = 1 + lam^2 has no slope left at lam = 1e-4, and still no optimum there; 1 + (log lam)^2 has one.
    def evaluate(of):
        def at(s, objective):
            lam = float(s.pretraining.lam)
            value, slope = of(lam)
            return Point(value, {"pretraining.lam": slope})

        monkeypatch.setattr(descent, "evaluate", at)
        monkeypatch.setattr(design, "predict", lambda s: None)
        return optimize(setting(), ("pretraining.lam",))

    away = evaluate(lambda lam: (1 + lam**2, 2 * lam))
    assert not away.converged and "runs off" in away.message
    inside = evaluate(lambda lam: (1 + np.log(lam) ** 2, 2 * np.log(lam) / lam))
    assert inside.converged and float(inside.setting.pretraining.lam) == pytest.approx(1.0, abs=1e-5)
    small = evaluate(lambda lam: (1e-7 * (1 + np.log(lam) ** 2), 2e-7 * np.log(lam) / lam))
    assert small.converged and float(small.setting.pretraining.lam) == pytest.approx(1.0, abs=1e-5)


def best_scale(monkeypatch, of, solved=lambda b: True):
    """b of the toy E' `of(log b) -> value, slope by log b`, and how many solves that took."""
    made = []

    def evaluate(s, objective):
        b = float(s.finetuning.recalibration.b)
        made.append(b)
        value, slope = of(np.log(b))
        lost = None if solved(b) else ls.SolveError("finetuning", ls.Code.max_steps)
        return Point(value, {"finetuning.recalibration": slope / b}, lost)

    monkeypatch.setattr(gradients, "evaluate", evaluate)
    found = gradients.with_best_scale(replace(setting(), "finetuning.recalibration", "error"))
    return float(get(found, "finetuning.recalibration")), len(made)


@pytest.mark.parametrize("best", [0.05, 0.7, 1.0, 1.2, 40.0])
def test_the_best_scale_is_the_root_of_one_derivative(monkeypatch, best):
    u = np.log(best)
    b, solves = best_scale(monkeypatch, lambda x: (2 + np.cosh(x - u), np.sinh(x - u)))
    assert b == pytest.approx(best, rel=1e-6) and solves <= 16


def test_a_scale_that_runs_off_or_jumps_is_none(monkeypatch):
    with pytest.raises(ls.SolveError, match=r"recalibration: stalled .* all the way to b = zero"):
        best_scale(monkeypatch, lambda x: (1 + np.exp(x), np.exp(x)))
    with pytest.raises(ls.SolveError, match=r"recalibration: stalled .* all the way to b = infinity"):
        best_scale(monkeypatch, lambda x: (1 + np.exp(-x), -np.exp(-x)))
    with pytest.raises(ls.SolveError, match=r"recalibration: stalled .* at b = 1.65 it stops falling"):
        best_scale(monkeypatch, lambda x: (2 - x, -1.0) if x < 0.5 else (2 + x, 1.0))


def test_solves_that_fail_beside_the_best_scale(monkeypatch):
    def toy(x):
        return 2 + np.cosh(x - 0.2), np.sinh(x - 0.2)

    b, _ = best_scale(monkeypatch, toy, lambda b: b < 1.28)
    assert b == pytest.approx(np.exp(0.2), rel=1e-6)
    with pytest.raises(ls.SolveError, match=r"recalibration: max_steps .* was not solved \(finetuning: max_steps"):
        best_scale(monkeypatch, toy, lambda b: b == 1)
    with pytest.raises(ls.SolveError, match=r"^finetuning: max_steps"):
        best_scale(monkeypatch, toy, lambda b: False)
