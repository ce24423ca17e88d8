"""Verification: the law in D, its error bars, what is judged, and runs that are made once."""

import json
import math

import numpy as np
import pytest

import lorastate as ls
from lorastate.cli import main as cli
from lorastate.errors import Code
from lorastate.simulation import two_stages
from lorastate.verification import verify as module
from lorastate.verification.extrapolation import extrapolate, rate, scatter
from lorastate.verification.result import Row, judged

DIMENSIONS, RUNS = (50, 100, 200), (16, 8, 4)


def made(rng, law, noise=1.0, power=1.0):
    """Runs at every D that follow a law, with a scatter noise / D^power."""
    return {d: law(d) + noise * d**-power * rng.standard_normal(n) for d, n in zip(DIMENSIONS, RUNS, strict=True)}


# ---- the law ---------------------------------------------------------------------------------------------------


def test_exact_law():
    samples = {d: np.array([2 - 3 / d + s * 1e-9 for s in (-1, 1)]) for d in DIMENSIONS}
    law = extrapolate(samples)
    assert law is not None
    assert law.limit == pytest.approx(2, abs=1e-8) and law.slope == pytest.approx(-3, abs=1e-6)
    assert law.freedom == 1 and law.smallest == 50
    half = {d: np.array([2 - 3 / d**0.5 + s * 1e-9 for s in (-1, 1)]) for d in DIMENSIONS}
    law = extrapolate(half, power=0.5)
    assert law is not None and law.limit == pytest.approx(2, abs=1e-8)


def test_the_same_in_every_run():
    law = extrapolate({d: np.full(4, 0.7) for d in DIMENSIONS})
    assert law is not None and law.limit == pytest.approx(0.7) and law.limit_error < 1e-9


def test_two_runs_at_two_dimensions_are_needed():
    assert extrapolate({50: np.ones(4)}) is None
    assert extrapolate({50: np.ones(4), 100: np.ones(1)}) is None
    assert rate({50: np.ones(4)}, 1.0) == pytest.approx((math.nan, math.nan), nan_ok=True)


def test_error_bars_of_the_limit_are_honest():
    rng = np.random.default_rng(0)
    gaps, likely = [], []
    for _ in range(400):
        law = extrapolate(made(rng, lambda d: 1 + 2 / d))
        assert law is not None
        gaps.append((law.limit - 1) / law.limit_error)
        likely.append(law.likelihood)
    assert abs(np.mean(gaps)) < 0.2 and 0.9 < np.std(gaps) < 1.25
    assert np.mean(np.array(gaps) ** 2 > 16) < 0.02  # what is off by four standard errors is off
    assert 0.35 < np.mean(np.array(likely) < 0.5) < 0.65


def test_scatter_falls_as_the_runs_do():
    rng = np.random.default_rng(1)
    samples = {d: d**-0.5 * rng.standard_normal(400) for d in DIMENSIONS}
    np.testing.assert_allclose(scatter(samples), np.array(DIMENSIONS) ** -0.5, rtol=0.08)


def test_small_dimensions_that_bend_the_law_are_left_out():
    rng = np.random.default_rng(2)
    dimensions = (25, 50, 100, 200, 400)
    law = extrapolate({d: 1 + 2 / d + 400 / d**2 + 0.05 / d * rng.standard_normal(20) for d in dimensions})
    assert law is not None and law.smallest > 25


def test_rate():
    rng = np.random.default_rng(3)
    found, error = rate(made(rng, lambda d: 1 + 30 / d, noise=0.5), 1.0)
    assert found == pytest.approx(1, abs=4 * error) and error < 0.2
    assert math.isnan(rate(made(rng, lambda d: 1.0), 1.0)[0])


# ---- judging ---------------------------------------------------------------------------------------------------


def row(limit, error=0.001, theory=1.0, spread=0.0, why_not=""):
    law = extrapolate({d: np.array([limit - error, limit + error]) for d in (100, 200)})
    assert law is not None
    return judged(
        Row("alone", "finetuning", "q", theory, 0.0, law._replace(limit_error=error), 1, 0, spread, ""), why_not
    )


def test_what_differs():
    assert row(1.015).verdict == "agrees"  # 15 standard errors, but 1.5 per cent
    assert row(1.05, error=0.02).verdict == "agrees"  # 5 per cent, but 2.5 standard errors
    assert row(1.05).verdict == "differs" and row(0.95).verdict == "differs"
    assert row(1.05, spread=0.04).verdict == "agrees" and row(1.07, spread=0.04).verdict == "differs"
    assert row(1.05, why_not="zero in the theory").verdict == "zero in the theory"


# ---- for real --------------------------------------------------------------------------------------------------


NUMERICS = ls.Numerics(nodes=1024, finetuning_nodes=2048, replicas=4)
SETTING = ls.Setting(ls.Pretraining(0.2, 0.1, activation="identity", tokens=2), ls.Finetuning(3.0, 0.4), NUMERICS)
SMALL = {"dimensions": (16, 32), "alone": (32, 64), "runs": 3}


@pytest.fixture(scope="module", autouse=True)
def few_test_samples():
    """2000 inputs of E' in a run: 20 000 take longer than training at these D."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(two_stages, "TEST_SAMPLES", 2000)
        yield


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    out = tmp_path_factory.mktemp("verify")
    return out, ls.verify(SETTING, out=out, **SMALL)


def test_theory_stands(kept):
    found = kept[1]
    assert found.stands and found.verdict.startswith("The theory stands"), found.verdict
    assert {row.way for row in found.rows} == {"whole", "alone"}
    assert {"M", "Q", "test_error", "q"} <= {row.name for row in found.rows}
    assert found.runs == {"whole": {16: 6, 32: 3}, "alone": {32: 6, 64: 3}}
    # A row is the mean of runs that `simulate` makes as well.
    alone = ls.simulate(SETTING, stage="finetuning", dimension=64, runs=3)
    np.testing.assert_allclose(found.samples["alone"]["deep.q"][64], alone.lowest["q"], rtol=1e-6)
    json.dumps(found.summary()["verdict"])


def test_a_wrong_theory_is_found_out(kept, monkeypatch):
    out = kept[0]
    wrong = ls.predict(ls.replace(SETTING, "finetuning.lam", 2.0))
    monkeypatch.setattr(module, "predict", lambda setting: wrong)
    again = ls.verify(SETTING, out=out, **SMALL)
    assert not again.stands and again.verdict.startswith("The theory does not stand"), again.verdict
    assert "differs" in {row.verdict for row in again.rows if row.way == "alone"}


def test_runs_are_made_once(kept, monkeypatch):
    out, before = kept
    made, real = [], module.simulate

    def counted(*args, **options):
        made.append((options["dimension"], options["first"]))
        return real(*args, **options)

    monkeypatch.setattr(module, "simulate", counted)
    again = ls.verify(SETTING, out=out, **SMALL)
    assert made == [] and again.summary() == before.summary()
    more = ls.verify(SETTING, out=out, **SMALL | {"runs": 4, "alone": ()})
    assert made == [(16, 6), (16, 7), (32, 3)] and more.runs["alone"] == {}


def test_interrupted(kept, tmp_path, monkeypatch):
    left, real = [2], module.simulate

    def stopping(*args, **options):
        if not left[0]:
            raise KeyboardInterrupt
        left[0] -= 1
        return real(*args, **options)

    monkeypatch.setattr(module, "simulate", stopping)
    with pytest.raises(ls.VerificationInterrupted, match=r"2 of 18 runs are complete and kept in .*goes on"):
        ls.verify(SETTING, out=tmp_path, **SMALL)
    monkeypatch.setattr(module, "simulate", real)
    np.testing.assert_equal(ls.verify(SETTING, out=tmp_path, **SMALL).summary(), kept[1].summary())


def test_failed_runs_are_left_out_and_counted():
    columns = ["whole.q", "code"]
    rows = {100 * 10_000 + k: np.array([float(k), Code.ok if k != 1 else Code.max_steps]) for k in range(3)}
    samples, failed = module._by_dimension(columns, rows)
    assert failed == 1 and samples["whole.q"][100].tolist() == [0.0, 2.0]


def test_bad_input(tmp_path):
    for given, words in (
        ({"dimensions": (50,)}, "cannot be extrapolated"),
        ({"dimensions": (), "alone": ()}, "both empty"),
        ({"runs": 1}, "runs = 1 is out of range"),
        ({"alone": (5, 100)}, "alone = 5 is out of range"),
        ({"starts": 0}, "starts = 0 is out of range"),
        ({"moves": -1}, "moves = -1 is out of range"),
    ):
        with pytest.raises(ls.SettingError, match=words):
            ls.verify(SETTING, **given)


def test_command(kept, tmp_path, capsys):
    out = kept[0]
    file = tmp_path / "setting.toml"
    file.write_text(
        '[pretraining]\nalpha = 0.2\nlam = 0.1\nactivation = "identity"\ntokens = 2\n'
        "[finetuning]\nalpha = 3.0\nlam = 0.4\n"
        "[numerics]\nnodes = 1024\nfinetuning_nodes = 2048\nreplicas = 4\n"
    )
    words = ["verify", str(file), "--out", str(out), "--runs", "3", "--dimensions", "16,32", "--alone", "32,64"]
    assert cli.main(words) == 0
    text = capsys.readouterr().out
    assert "The theory stands" in text and "Fine-tuning alone" in text and "D -> infinity" in text
    assert json.loads((out / "verify.json").read_text())["stands"] and (out / "verify.png").stat().st_size > 10_000
    assert cli.main([*words[:-1], "many"]) == 2
    assert "--alone 'many' is no list of dimensions" in capsys.readouterr().err
