"""Pre-training on another task: its limits, its derivatives, sampled matrices, and training with two teachers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lorastate as ls
from lorastate.bayes.frozen_map import frozen_map
from lorastate.bayes.pretraining import bayes_optimal_pretraining
from lorastate.model.spectra.laws import Atoms, FreeSum, PowerLaw, Wishart
from lorastate.setting.fields import continuous_fields
from lorastate.setting.files import load_setting, setting_to_dict
from lorastate.setting.paths import get, replace

NUMERICS = ls.Numerics(512, 1024, 2)
RELATED = {"a": 0.9, "c": 0.5, "kappa_perp": 0.7}


def setting(activation="identity", task=None, alpha=0.1, **fine):
    pre = ls.Pretraining(alpha, 0.1, activation=activation, tokens=2, task=task)
    return ls.Setting(pre, ls.Finetuning(4.0, 0.3, **fine), NUMERICS)


def test_the_published_setting_is_a_task():
    plain, task = ls.predict(setting()), ls.predict(setting(task={"a": 1.0, "c": 0.0, "kappa_perp": 0.7}))
    for stage in ("pretraining", "finetuning"):
        for name, value in getattr(plain, stage).items():
            np.testing.assert_allclose(getattr(task, stage)[name], value, rtol=1e-12, atol=1e-12, err_msg=name)
            bars = (solution.errors[stage][name] for solution in (plain, task))
            np.testing.assert_allclose(*bars, rtol=1e-9, atol=1e-12, err_msg=name)
    assert float(plain.pretraining["M_down"]) == float(plain.pretraining["M"])


def test_gradient_is_the_central_difference():
    s = setting("softmax", RELATED, 0.3)
    _, slopes = ls.gradient(s)
    assert tuple(slopes) == continuous_fields(s)
    for path in ("pretraining.task.a", "pretraining.task.c", "pretraining.task.kappa_perp", "pretraining.kappa0"):
        h = 1e-4 * float(get(s, path))
        up, down = (ls.gradient(replace(s, path, float(get(s, path)) + d))[0] for d in (h, -h))
        assert (up - down) / (2 * h) == pytest.approx(slopes[path], rel=1e-5, abs=1e-9), path


def test_an_unrelated_task_leaves_only_the_trace():
    # With a = 0 the learned map is free of S*: Tr(S S*)/D = (Tr S/D)(Tr S*/D), and sqrt(kappa0) is the latter.
    s = ls.predict(setting("identity", {"a": 0.0, "c": 1.0, "kappa_perp": 0.7}))
    trace = float(s.spectrum.moment1)
    assert float(s.pretraining["M_down"]) == pytest.approx(trace * 1.0**0.5, rel=1e-10)
    # What is learned does not depend on how S* is called: S_perp in its place with the same rank.
    same = ls.predict(ls.replace(setting("identity"), "pretraining.kappa0", 0.7))
    for name in ("V", "M", "Q", "train_loss", "test_error"):
        assert float(s.pretraining[name]) == pytest.approx(float(same.pretraining[name]), rel=1e-10)


def test_two_identical_halves_are_the_whole():
    # Scaling labels by a: (Q0, Delta, lam) -> (a^2 Q0, a^2 Delta, a lam) gives the same map times a (identity).
    a = 0.6
    plain = ls.predict(setting()).pretraining
    s = setting("identity", {"a": a, "c": 0.0, "kappa_perp": 1.0})
    for path in ("pretraining.delta", "pretraining.lam"):
        s = replace(s, path, float(get(s, path)) * (a**2 if path.endswith("delta") else a))
    scaled = ls.predict(s).pretraining
    assert float(scaled["M_down"]) == pytest.approx(a * float(plain["M"]), rel=1e-10)
    assert float(scaled["Q"]) == pytest.approx(a**2 * float(plain["Q"]), rel=1e-10)
    assert float(scaled["V"]) == pytest.approx(float(plain["V"]), rel=1e-10)


def wishart(rng, dimension, kappa):
    w = rng.normal(size=(dimension, round(kappa * dimension)))
    return w @ w.T / np.sqrt(w.shape[1] * dimension)


def test_overlaps_of_sampled_matrices():
    # Any eigenvalue-wise function of A = S_pre + delta Z: what it shares with S*, and the best one.
    rng, dimension, delta = np.random.default_rng(0), 600, 0.6
    pre = ls.Pretraining(0.1, 0.1, activation="identity", task=RELATED)
    base, other = wishart(rng, dimension, 1.0), wishart(rng, dimension, RELATED["kappa_perp"])
    z = rng.normal(size=(dimension, dimension)) / np.sqrt(2 * dimension)
    values, vectors = np.linalg.eigh(RELATED["a"] * base + RELATED["c"] * other + delta * (z + z.T))
    inside = np.einsum("ik,ij,jk->k", vectors, base, vectors)
    eps = 0.8
    shared = np.mean(np.maximum(values - eps, 0) * inside)

    def J(a):
        return ls.Pretraining(0.1, 0.1, activation="identity", task=RELATED | {"a": a}).law.J(delta, eps)

    assert float(jax.grad(J)(RELATED["a"])) / 2 == pytest.approx(shared, rel=0.01)
    best = float(pre.task.best_overlap(pre.downstream_law, jnp.asarray(delta)))
    smooth = np.polynomial.Polynomial.fit(values, inside, 12)(values)
    assert best == pytest.approx(np.mean(smooth**2), rel=0.01)


def test_bayes_optimal_limits_with_a_task():
    plain, one = (bayes_optimal_pretraining(setting(task=t).pretraining) for t in (None, {"a": 1.0, "c": 0.0}))
    assert float(one.Q_down) == pytest.approx(float(plain.Q), rel=1e-8) and float(one.Q) == pytest.approx(
        float(plain.Q)
    )
    s = ls.predict(setting("identity", RELATED))
    limits = s.bayes_optimal
    for lam in (0.01, 0.1, 0.5):
        trained = ls.predict(replace(s.setting, "pretraining.lam", lam))
        p, f = trained.pretraining, trained.finetuning
        assert p["test_error"] > limits.pretraining["test_error"]
        assert f["effective_noise"] > limits.finetuning["effective_noise"]
        assert f["test_error"] > limits.finetuning["test_error"]
        assert p["M_down"] ** 2 / p["Q"] < bayes_optimal_pretraining(s.setting.pretraining).Q_down
    # The channel of the Bayes-optimal map carries the same number.
    frozen = frozen_map(ls.BayesOptimal(), s.setting.pretraining, None)
    assert float(frozen.overlap) == float(bayes_optimal_pretraining(s.setting.pretraining).Q_down)


def frozen_on(s):
    return ls.pretrain(s.pretraining, NUMERICS).frozen(s.finetuning_resolved)


@pytest.mark.parametrize("noise", ["same", "fresh"])
def test_reused_inputs_after_a_task(noise):
    # Samples of the channel have the moments that the closed forms say (identity).
    s = setting("identity", RELATED, inputs="reused", label_noise=noise)
    fine, frozen = s.finetuning_resolved, frozen_on(s)
    x = np.random.default_rng(1).normal(size=(fine.inputs.dimension(2, False), 400_000))
    y0, zw = (np.asarray(v)[0, 1] for v in fine.inputs.fields(frozen, fine.delta, 2, False, x))
    for got, want in zip((y0 * y0, y0 * zw, zw * zw), fine.moments(frozen), strict=True):
        assert got.mean() == pytest.approx(float(want), abs=5 * got.std() / 400_000**0.5)
    # Without anything unrelated in it the task is the published setting.
    plain, task = (setting("identity", t, inputs="reused", label_noise=noise) for t in (None, {"a": 1.0, "c": 0.0}))
    moments = (s.finetuning_resolved.moments(frozen_on(s)) for s in (plain, task))
    np.testing.assert_allclose(*moments, rtol=1e-11)


def test_predictions_on_reused_inputs_after_a_task():
    plain, task = (ls.predict(setting("identity", t, inputs="reused")) for t in (None, {"a": 1.0, "c": 0.0}))
    assert float(task.effective_noise) == pytest.approx(float(plain.effective_noise), rel=1e-11)
    bar = np.hypot(*(v.stderr("finetuning", "test_error") for v in (task, plain)))  # other nodes
    assert abs(float(task.test_error - plain.test_error)) < 5 * bar


def trains_to_theory(s, runs):
    theory, found = ls.predict(s), ls.simulate(s, dimension=60, runs=runs, starts=1, test_samples=5000)
    for stage, name in (("pretraining", "M"), ("pretraining", "M_down"), ("pretraining", "Q"),
                        ("finetuning", "overlap"), ("finetuning", "test_error")):  # fmt: skip
        value, mean = float(getattr(theory, stage)[name]), found.mean(stage, name)
        assert abs(mean - value) < 4 * found.stderr(stage, name) + 0.05 * value, name


def test_training_with_two_teachers():
    s = replace(setting("identity", {"a": 0.8, "c": 0.6, "kappa_perp": 0.5}, 0.3), "pretraining.kappa0", 0.7)
    trains_to_theory(s, runs=6)


def test_files_and_overrides(tmp_path):
    path = tmp_path / "task.toml"
    task = "[pretraining.task]\na = 0.9\nc = 0.5\n"
    path.write_text(f"[pretraining]\nalpha = 0.1\nlam = 0.1\n{task}[finetuning]\nalpha = 3\nlam = 1\n")
    s = load_setting(path, ["pretraining.task.kappa_perp=2"])
    assert setting_to_dict(s)["pretraining"]["task"] == {"a": 0.9, "c": 0.5, "kappa_perp": 2.0}
    assert float(get(replace(s, "pretraining.task.c", 0.25), "pretraining.task.c")) == 0.25
    assert get(setting(), "pretraining.kappa0") == 1.0 and setting().pretraining.task is None
    assert float(get(replace(setting(), "pretraining.task.c", 0.3), "pretraining.task.a")) == 1.0
    # label power: a^2 (1 + kappa0) + c^2 (1 + kappa_perp) + 2 a c sqrt(kappa0 kappa_perp) + delta / 2
    want = 0.81 * 2 + 0.25 * 3 + 2 * 0.9 * 0.5 * 2**0.5 + 0.25
    assert float(s.pretraining.label_size) == pytest.approx(want)


@pytest.mark.parametrize(
    "task, words",
    [
        ({"a": -1.0}, "pretraining.task.a = -1.0 is out of range; allowed: a >= 0"),
        ({"c": float("nan")}, "pretraining.task.c = nan"),
        ({"kappa_perp": 0.0}, "pretraining.task.kappa_perp = 0.0 is out of range; allowed: kappa_perp > 0"),
        ({"a": 0.0, "c": 0.0}, "leave nothing to learn"),
        ({"b": 1.0}, "pretraining.task.b is unknown; allowed: a, c, kappa_perp"),
        ("other", "pretraining.task = 'other' is not a task"),
    ],
)
def test_bad_tasks(task, words):
    with pytest.raises(ls.SettingError) as error:
        ls.Pretraining(0.1, 0.1, task=task)
    assert words in str(error.value)


def test_a_field_of_a_task_that_is_not_there():
    with pytest.raises(ls.SettingError, match="has no meaning without a task"):
        get(setting(), "pretraining.task.a")


# ---- base maps of any law --------------------------------------------------------------------------------------

POWER = {"law": "power_law", "exponent": 0.5, "low": 0.1, "high": 4.0}


def of_law(base, task=None, **pre):
    pre = {"alpha": 0.1, "lam": 0.1, "activation": "identity", "tokens": 2, **pre}
    return ls.Setting(ls.Pretraining(**pre, base=base, task=task), ls.Finetuning(4.0, 0.3), NUMERICS)


def test_atoms_and_a_wishart_part_are_the_wishart_setting():
    # 0 * atoms + Wishart goes through the general law; the published setting through the closed forms.
    general = FreeSum([(0.0, Atoms([0.5, 0.5], [0.0, 2.0])), (1.0, Wishart(0.8))])
    want, got = ls.predict(of_law(None, kappa0=0.8)), ls.predict(of_law(general))
    for name, value in want.pretraining.items():
        np.testing.assert_allclose(got.pretraining[name], value, rtol=1e-9, atol=1e-9, err_msg=name)
    np.testing.assert_allclose(got.test_error, want.test_error, rtol=1e-9)


def test_gradient_in_a_power_law():
    s = of_law(POWER)
    value, slopes = ls.gradient(s)
    assert tuple(slopes) == continuous_fields(s) and "pretraining.kappa0" not in slopes
    for path in ("pretraining.base.exponent", "pretraining.base.low", "pretraining.base.high"):
        h = 1e-4 * float(get(s, path))
        up, down = (ls.gradient(replace(s, path, float(get(s, path)) + d))[0] for d in (h, -h))
        assert (up - down) / (2 * h) == pytest.approx(slopes[path], rel=1e-5, abs=1e-9 * value), path


def test_training_with_two_eigenvalues():
    base = {"law": "atoms", "weights": [0.7, 0.3], "values": [0.2, 2.5]}
    s = of_law(base, {"a": 0.9, "c": 0.4, "kappa_perp": 1.0}, alpha=0.25)
    trains_to_theory(s, runs=4)


def test_files_of_laws(tmp_path):
    path = tmp_path / "base.toml"
    law = '[pretraining.base]\nlaw = "atoms"\nweights = [0.5, 0.5]\nvalues = [0, 2]\n'
    path.write_text(f"[pretraining]\nalpha = 0.1\nlam = 0.1\n{law}[finetuning]\nalpha = 3\nlam = 1\n")
    s = load_setting(path)
    shown = setting_to_dict(s)["pretraining"]
    assert shown["base"] == {"law": "atoms", "weights": [0.5, 0.5], "values": [0.0, 2.0]} and "kappa0" not in shown
    assert float(s.pretraining.Q0) == pytest.approx(2.0)
    np.testing.assert_allclose(Atoms([0.25, 0.75], [3.0, 1.0]).eigenvalues(8), [1] * 6 + [3] * 2)
    law = PowerLaw(1.5, 0.2, 3.0)
    np.testing.assert_allclose(law.eigenvalues(100_000).mean(), law.mean, rtol=1e-6)
    assert float(get(replace(of_law(POWER), "pretraining.base.low", 0.3), "pretraining.base.low")) == 0.3


@pytest.mark.parametrize(
    "given, words",
    [
        ({"base": {"law": "cauchy"}}, 'pretraining.base.law = \'cauchy\' is unknown; allowed: "atoms", "power_law"'),
        ({"base": {"law": "atoms", "values": [1.0]}}, "pretraining.base.weights is missing"),
        ({"base": {**POWER, "weights": [1.0]}}, 'pretraining.base.weights has no meaning for "power_law"'),
        ({"base": 3}, "pretraining.base = 3 is not a law"),
        ({"base": POWER, "kappa0": 1.0}, "has no meaning beside pretraining.base"),
        ({"base": {"law": "atoms", "weights": [0.5, 0.6], "values": [0.0, 1.0]}}, "weights sum to 1.1"),
        ({"base": POWER | {"low": 5.0}}, "allowed: high > low"),
    ],
)
def test_bad_laws(given, words):
    with pytest.raises(ls.SettingError) as error:
        ls.Pretraining(0.1, 0.1, **given)
    assert words in str(error.value)


def test_a_field_of_a_law_that_is_not_there():
    with pytest.raises(ls.SettingError, match="has no meaning here"):
        get(setting(), "pretraining.base.low")
