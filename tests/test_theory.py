"""The whole pipeline against published and independent numbers, central differences and its own error bars."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lorastate as ls
from lorastate.evolution.order import decode
from lorastate.runtime import program
from lorastate.setting.fields import continuous_fields
from lorastate.setting.paths import get
from lorastate.solution.finetuning import LoraStage
from lorastate.solution.pretraining import MapStage, search_pretraining
from lorastate.solution.problem import Problem

# The same sizes as in test_cli and test_documents: what is compiled for one serves the others.
SMALL = {"nodes": 2048, "finetuning_nodes": 4096, "replicas": 8}
FEW = {"nodes": 1024, "finetuning_nodes": 2048, "replicas": 4}


def setting(activation="softmax", lam=0.01, fine_lam=0.05, fine_alpha=3.0, seed=0, **pre):
    pre = {"alpha": 0.1, "delta": 0.5, "tokens": 3, **pre}
    return ls.Setting(
        ls.Pretraining(lam=lam, activation=activation, **pre),
        ls.Finetuning(alpha=fine_alpha, lam=fine_lam),
        ls.Numerics(seed=seed, **(FEW if activation == "identity" else SMALL)),
    )


def two_tokens(**numerics):
    """What compiles fastest, for tests of how programs are called."""
    pre = ls.Pretraining(alpha=0.2, lam=0.1, activation="identity", tokens=2)
    return ls.Setting(pre, ls.Finetuning(alpha=6.0, lam=1.0), ls.Numerics(512, 1024, 2, **numerics))


# Independent implementation, all digits shown.
IDENTITY = [
    (0.01, 4.35544578, 1.92532454, 2.22297459),
    (0.1, 1.99194249, 1.41106875, 1.26768678),
    (0.5, 0.39536792, 0.5205856, 0.2788343),
]


@pytest.fixture(scope="module")
def pretrain():
    """Jitted pre-training solve -> (V, M, Q, code)."""

    @jax.jit
    def solve(problem):
        sol = search_pretraining(problem).point
        order = decode(sol.x)
        return jnp.stack([order.response, order.overlap, order.norm(problem.pre.label_size)]), sol.code

    def run(pre, numerics):
        return solve(Problem.of_pretraining(pre, numerics))

    return run


@pytest.mark.parametrize(("lam", "V", "M", "Q"), IDENTITY)
def test_identity_pretraining(pretrain, lam, V, M, Q):
    x, code = pretrain(setting("identity", lam).pretraining, ls.Numerics(**SMALL))
    assert int(code) == 0
    np.testing.assert_allclose(x, [V, M, Q], rtol=1e-7)


# Published solver of arXiv:2509.24914, softmax, T = 2, kappa0 = 0.5, kappa = 1, delta = 0.5, lam = 0.01.
PUBLISHED = [
    (0.0570866, 0.42086, 0.40925, 20.355),
    (0.0854331, 0.56426, 0.57940, 19.811),
    (0.1562992, 0.90666, 0.92101, 14.464),
    (0.2625984, 1.32337, 1.22695, 7.3851),
    (0.5, 1.46207, 1.38039, 2.3066),
]


def test_published_pretraining(pretrain):
    many = ls.Numerics(nodes=32768, finetuning_nodes=4096, replicas=8)
    for alpha, Q, M, V in PUBLISHED:
        pre = setting(alpha=alpha, tokens=2, kappa0=0.5).pretraining
        x, code = pretrain(pre, many)
        assert int(code) == 0
        np.testing.assert_allclose(x, [V, M, Q], rtol=0.01)


def test_identity_closed_form_of_the_test_error():
    s = ls.predict(setting("identity", 0.1))
    f = s.finetuning
    gap = 0.25 + 2 - 2 * s.pretraining["M"] + s.pretraining["Q"]
    np.testing.assert_allclose(f["effective_noise"], gap, rtol=1e-12)
    form = (1 + 1 / 3) * gap + (15 * (1 + f["q"] ** 2) - 6 * f["q"] - 24 * f["m"] ** 2) / 9
    np.testing.assert_allclose(s.test_error, form, rtol=1e-12)
    np.testing.assert_allclose(f["m"], 0.9932, rtol=0.005)
    np.testing.assert_allclose(f["q"], 1.0093, rtol=0.01)
    np.testing.assert_allclose(s.test_error, 0.988, rtol=0.01)


def test_softmax_worked_values():
    s = ls.predict(setting())
    np.testing.assert_allclose([s.pretraining[k] for k in "MQ"], [1.327, 1.248], rtol=0.012)
    np.testing.assert_allclose(s.pretraining["train_loss"], 0.00873, rtol=0.01)
    np.testing.assert_allclose([s.finetuning[k] for k in "mq"], [0.915, 0.929], rtol=0.03)
    np.testing.assert_allclose(s.test_error, 0.385, rtol=0.03)
    assert s.ok and s.summary()["status"]["finetuning"]["code"] == "ok"


@pytest.mark.parametrize("kind", ["softmax", "identity"])
def test_gradient_is_the_central_difference_in_every_field(kind):
    s = setting(kind, 0.02, 0.2)
    value, slopes = ls.gradient(s)
    solution = ls.predict(s)
    assert solution.symmetry == "replica symmetric"
    np.testing.assert_allclose(value, solution.test_error, rtol=1e-10)
    assert tuple(slopes) == continuous_fields(s)
    for path, slope in slopes.items():
        x = float(get(s, path))
        h = 2e-5 * x
        up, down = (ls.gradient(ls.replace(s, path, x + d))[0] for d in (h, -h))
        assert (up - down) / (2 * h) == pytest.approx(slope, rel=2e-5, abs=2e-7), path


def test_gradient_across_wells_is_the_difference_over_per_cents():
    """An eighth of the nodes of pre-training has two wells, and some go from one to the other: what derivatives at
    fixed wells miss is 15 % in delta."""
    s = setting(lam=1e-3, fine_lam=3.0, alpha=0.15, delta=1.5)
    with pytest.warns(ls.SlopeWarning, match=r"pre-training has many minima \(1\d % of its nodes .* more nodes help"):
        value, slopes = ls.gradient(s)
    solution = ls.predict(s)
    assert float(solution.pretraining["double_well_share"]) > 0.1 and solution.pretraining_symmetry == "unstable"
    for path in ("pretraining.lam", "pretraining.delta"):
        x = float(get(s, path))
        up, down = (float(ls.predict(ls.replace(s, path, x * k)).test_error) for k in (1.05, 0.95))
        assert (up - down) / (0.1 * value) == pytest.approx(x * slopes[path] / value, rel=0.05), path


def test_three_tokens_over_three_decades_of_lam():
    slopes = [ls.gradient(setting(lam=lam, fine_lam=0.2))[1]["pretraining.lam"] for lam in (1e-3, 1e-2, 1e-1, 1.0)]
    assert np.all(np.isfinite(slopes))
    assert slopes[0] < 0 < slopes[2] and abs(slopes[3]) < 1e-6


def test_error_bars_are_honest():
    rows = []
    for seed in range(12):
        s = ls.predict(setting(fine_lam=0.3, seed=seed))
        rows.append([(float(s.finetuning[k]), s.stderr("finetuning", k)) for k in ("test_error", "overlap")])
    values, bars = np.moveaxis(np.array(rows), -1, 0)
    ratio = values.std(0, ddof=1) / bars.mean(0)
    assert np.all((ratio > 0.5) & (ratio < 1.7)), ratio


def test_optimum_from_above_and_below_and_on_a_grid():
    ends = []
    for lam, fine_lam in ((0.04, 1.0), (0.003, 0.1)):
        best = ls.optimize(setting(lam=lam, fine_lam=fine_lam))
        assert best.converged and best.gradient_norm < 1e-5, best.message
        ends.append([float(best.setting.pretraining.lam), float(best.setting.finetuning.lam)])
    assert np.all(np.array([0.003, 0.1]) < ends) and np.all(ends < np.array([0.04, 1.0]))
    np.testing.assert_allclose(ends, [ends[0]] * 2, rtol=0.01)
    low = best.path[-1]["value"]
    corners, near = itertools.product((0.5, 2.0), repeat=2), ((0.9, 1.0), (1.1, 1.0), (1.0, 0.9), (1.0, 1.1))
    for a, b in (*corners, *near):
        s = ls.replace(ls.replace(best.setting, "pretraining.lam", a * ends[1][0]), "finetuning.lam", b * ends[1][1])
        assert ls.gradient(s)[0] > low


@pytest.mark.parametrize("kept", [False, True])
def test_one_trace_for_many_settings(kept, monkeypatch, tmp_path):
    # Without a folder of traced programs, and with an empty one.
    monkeypatch.setattr(program, "_folder", lambda: tmp_path if kept else None)
    calls = []
    for stage in (MapStage, LoraStage):
        monkeypatch.setattr(stage, "predictions", lambda *a, f=stage.predictions: (calls.append(1), f(*a))[1])
    jax.clear_caches()
    base = two_tokens()
    ls.predict(base)
    first = len(calls)
    assert first >= 2
    for k in range(1, 12):
        s = ls.replace(base, "pretraining.lam", 0.01 + 0.001 * k)
        ls.predict(ls.replace(s, "numerics.seed", k % 2))
    assert len(calls) == first


# Where symmetry may be broken inside of a transformation: test_breaking.


def test_prediction_of_a_known_setting_under_jit():
    base = two_tokens(symmetry="rs")
    np.testing.assert_allclose(jax.jit(lambda: ls.predict(base).test_error)(), ls.predict(base).test_error, rtol=1e-10)


def test_zero_map_and_failures():
    s = ls.predict(setting("identity", lam=3.0))
    assert float(s.pretraining["Q"]) == 0.0 and s.summary()["pretraining"]["overlap"] is None
    np.testing.assert_allclose(s.effective_noise, 2.25, rtol=1e-10)
    narrow = setting("identity", lam=0.01, kappa=0.3)
    with pytest.raises(ls.SolveError, match="too_narrow"):
        ls.predict(narrow)
    failed = ls.predict(narrow, throw=False)
    assert not failed.ok and failed.summary()["status"]["finetuning"]["code"] == "upstream"
    with pytest.raises(ls.SolveError):
        ls.gradient(narrow)


def test_solution_is_a_dataclass_of_arrays():
    assert {f.name for f in dataclasses.fields(ls.Solution)} >= {"pretraining", "finetuning", "errors"}
