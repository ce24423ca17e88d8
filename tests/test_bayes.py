"""Bayes-optimal pre-training against independent numbers, sampled matrices, the learned map, and limits."""

import functools
import itertools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lorastate as ls
from lorastate.bayes import finetuning, posterior
from lorastate.bayes.finetuning import bayes_optimal_finetuning, bayes_optimal_threshold
from lorastate.bayes.frozen_map import best_map
from lorastate.bayes.limits import _error, _posterior_error
from lorastate.bayes.pretraining import bayes_optimal_pretraining, mmse
from lorastate.math.quadrature import gaussian_nodes
from lorastate.math.symmetric import complement, to_matrix

NUMERICS = ls.Numerics(512, 1024, 2)


def pre(**kw):
    return ls.Pretraining(**{"alpha": 0.1, "lam": 0.1, "delta": 0.5, "activation": "identity", **kw})


# An independent implementation, four digits; T = 3, kappa0 = 1.
@pytest.mark.parametrize(
    ("alpha", "delta", "activation", "Q"),
    [
        (0.1, 0.5, "identity", 1.7449),
        (0.05, 0.5, "identity", 1.5001),
        (0.1, 0.5, "softmax", 1.6887),
        (0.3, 2.0, "softmax", 1.7462),
    ],
)
def test_independent_values(alpha, delta, activation, Q):
    found = bayes_optimal_pretraining(pre(alpha=alpha, delta=delta, activation=activation))
    assert int(found.code) == 0
    assert abs(float(found.Q) - Q) < 6e-5


class MySoftmax(eqx.Module):
    beta: jax.Array

    def __call__(self, z):
        return jax.nn.softmax(self.beta * z, axis=1)


OWN = {"softmax": MySoftmax(jnp.asarray(1.0)), "identity": lambda z: jnp.tanh(z)}
LOSSY = (jax.nn.relu, jnp.square, lambda z: z - jnp.diag(jnp.diag(z)), lambda z: jax.nn.softmax(jnp.tril(z), axis=1))


@pytest.mark.parametrize("kind", ["softmax", "identity"])
def test_own_activations_reveal_what_they_do(kind):
    built_in, own = (pre(activation=a) for a in (kind, OWN[kind]))
    for of in (lambda p: float(bayes_optimal_pretraining(p).Q), ls.interpolation_threshold):
        assert of(own) == pytest.approx(of(built_in), rel=1e-12)

    def slope(activation):
        # Traced as leaves of the setting, as inside of a compiled prediction.
        return jax.jit(jax.grad(lambda p: best_map(p).norm))(pre(activation=activation))

    mine, theirs = slope(OWN[kind]), slope(kind)
    for field in ("alpha", "delta", "kappa0"):
        assert float(getattr(mine, field)) == pytest.approx(float(getattr(theirs, field)), rel=1e-12)


@pytest.mark.parametrize("activation", LOSSY)
def test_own_activations_that_hide_more_are_refused(activation):
    p = pre(activation=activation)
    after = ls.Setting(p, ls.Finetuning(1.0, 1.0, activation="identity", inputs="bayes_optimal"))
    for do in (
        lambda: bayes_optimal_pretraining(p),
        lambda: ls.interpolation_threshold(p),
        lambda: ls.predict(after),
        lambda: ls.gradient(after),
    ):
        with pytest.raises(ls.SettingError, match="hides more of Z than its common shift"):
            do()


#: E' and slopes of the built-in softmax on the best map, on 131,072 nodes of fine-tuning: two seeds differ by 0.0005
#: and, of slopes, 2 %.
BUILT_IN = 0.3142, {"pretraining.alpha": -0.654, "pretraining.delta": 0.1195, "pretraining.kappa0": -0.0198}


def test_own_softmax_on_the_best_map_is_softmax():
    best = pre(activation=OWN["softmax"], tokens=2), ls.Finetuning(3.0, 1.0, inputs="bayes_optimal")
    numerics = ls.Numerics(nodes=512, finetuning_nodes=8192, replicas=2, symmetry="rs")  # as many as compile fast
    value, slopes = ls.gradient(ls.Setting(*best, numerics))
    assert value == pytest.approx(BUILT_IN[0], rel=0.01)  # on other nodes
    for path, slope in BUILT_IN[1].items():
        assert slopes[path] == pytest.approx(slope, rel=0.06, abs=5e-3)


@pytest.mark.parametrize(("kappa0", "s"), [(0.3, 0.05), (1.0, 0.5), (2.0, 3.0)])
def test_mmse_against_sampled_matrices(kappa0, s):
    # The best rotationally invariant estimator of S* from S* + sqrt(s) Z keeps the eigenvectors (which the sample's
    # own overlaps give exactly): its error is the part of S* off the diagonal in that basis.
    rng, d, errors = np.random.default_rng(0), 600, []
    for _ in range(4):
        w = rng.standard_normal((d, round(kappa0 * d)))
        base = w @ w.T / np.sqrt(w.shape[1] * d)
        g = rng.standard_normal((d, d))
        _, v = np.linalg.eigh(base + np.sqrt(s) * (g + g.T) / np.sqrt(2 * d))
        errors.append((np.sum(base**2) - np.sum(np.diag(v.T @ base @ v) ** 2)) / d)
    # The diagonal fluctuates by s/D: 1/D corrections only.
    assert np.mean(errors) == pytest.approx(float(mmse(jnp.asarray(s), jnp.asarray(kappa0))), rel=0.02)


def test_limits_and_noiseless_recovery():
    assert float(bayes_optimal_pretraining(pre(alpha=1e4)).Q) == pytest.approx(2.0, abs=1e-4)
    # Without data the estimate is the mean of the prior, E S* = sqrt(kappa0) 1.
    assert float(bayes_optimal_pretraining(pre(alpha=1e-4, kappa0=0.7)).Q) == pytest.approx(0.7, rel=2e-3)
    exact = bayes_optimal_pretraining(pre(alpha=0.3, delta=0.0, kappa0=0.5))
    assert int(exact.code) == 0 and float(exact.Q) == 1.5
    few = bayes_optimal_pretraining(pre(alpha=0.03, delta=0.0, kappa0=2.0))
    assert int(few.code) == 0 and 0 < float(few.Q) < 3.0
    for delta in (1e-6, 1e-9, 1e-12):  # log delta^2 may lie 28 below where the search begins
        near = bayes_optimal_pretraining(pre(alpha=0.3, delta=delta, kappa0=0.5))
        assert int(near.code) == 0 and float(near.Q) == pytest.approx(1.5, abs=100 * delta)


def test_a_solve_that_failed_has_no_number():
    lost = bayes_optimal_pretraining(ls.Pretraining(1e-12, 1.0, activation="identity", tokens=2))
    assert int(lost.code) != ls.Code.ok and np.isnan([lost.Q, lost.overlap, lost.Q_down]).all()


def test_never_below_the_learned_map():
    for delta in (0.1, 1.0):
        best = bayes_optimal_pretraining(pre(delta=delta, tokens=2))
        for lam in (0.003, 0.03, 0.3):
            found = ls.pretrain(pre(lam=lam, delta=delta, tokens=2), NUMERICS).values
            assert float(found["M"] ** 2 / found["Q"]) <= float(best.Q) + 1e-12


def test_derivative():
    def Q(alpha):
        p = pre()
        return bayes_optimal_pretraining(ls.Pretraining(alpha=alpha, lam=p.lam, delta=p.delta, activation="identity")).Q

    slope = jax.grad(Q)(0.1)
    assert float(slope) == pytest.approx(float(Q(0.1 + 1e-6) - Q(0.1 - 1e-6)) / 2e-6, rel=1e-6)


# ---------------------------------------------------------------- fine-tuning


SAMPLED = jax.jit(lambda *given: posterior.averages(*given)[:2], static_argnums=(5, 6))


@pytest.mark.parametrize("shift", [False, True])
@pytest.mark.parametrize("q", [1e-2, 0.6, 0.98])
def test_posterior_averages_against_a_grid(q, shift):
    # The samples are drawn 2000 times over: a bias of any of them would be seen at a tenth of one's error.
    t, noise, s, draws = 2, 0.4, 1 - q, 2000
    e = complement(t, shift)
    x = np.random.default_rng(0).normal(size=(2 * t + len(e), 12))
    key, weight = jax.random.key(1), np.full(draws, 1 / draws)
    got = [[float(v) for v in SAMPLED(s, noise, np.repeat(x[:, [k]], draws, 1), weight, key, t, shift)]
           for k in range(12)]  # fmt: skip
    axis = np.linspace(-6, 6, 301)  # the posterior is never narrower than two steps
    grid = np.stack(np.meshgrid(axis, axis, indexing="ij"))  # of chi
    project = np.eye(4) - (np.full((4, 4), 0.25) if shift else 0)
    want = []
    for k in range(12):
        omega = np.sqrt(q) * x[:t, k]
        star = omega + np.sqrt(s) * x[t : 2 * t, k]
        n = np.asarray(to_matrix(e.T @ x[2 * t :, k]))
        gap = np.outer(star, star)[:, :, None, None] - grid[:, None] * grid[None]
        R = project @ (gap.reshape(4, -1) + np.sqrt(2 * noise) * n.reshape(4, 1))
        base = -np.sum((np.sqrt(2 * noise) * (project @ n.reshape(4))) ** 2)
        log = -(np.sum(R**2, 0) + base) / (4 * noise)
        prior = -np.sum((grid - omega[:, None, None]) ** 2, 0).ravel() / (2 * s)
        w = np.exp(log + prior)
        mean = (grid.reshape(2, -1) @ w) / w.sum()
        want.append([np.sum((mean - omega) ** 2) / s**2, np.log(w.sum() * 0.04**2 / (2 * np.pi * s))])
    got, want = np.array(got), np.array(want)
    np.testing.assert_allclose(got[:, 0], want[:, 0], rtol=0.05, atol=2e-3 * want[:, 0].max())
    assert got[:, 0].mean() == pytest.approx(want[:, 0].mean(), rel=0.01)
    np.testing.assert_allclose(got[:, 1], want[:, 1], atol=0.02)


@pytest.mark.parametrize(
    "kind, alphas, lams", [("identity", (0.1, 2.0), (0.003, 0.15)), ("softmax", (0.3, 6.0), (0.01, 0.1))]
)
def test_bayes_optimal_bounds_on_a_grid(kind, alphas, lams):
    limits = None
    for lam, lora_lam, b in itertools.product(lams, (0.05, 1.0), (0.7, 1.3)):
        pre = ls.Pretraining(alphas[0], lam, activation=kind, tokens=2)
        fine = ls.Finetuning(alphas[1], lora_lam, recalibration=b)
        s = ls.predict(ls.Setting(pre, fine, NUMERICS))
        limits = limits or s.bayes_optimal  # they know nothing of lam, lam' and b
        first, second = limits.pretraining, limits.finetuning
        assert s.pretraining["M"] ** 2 / s.pretraining["Q"] < first["Q"]
        assert s.pretraining["test_error"] > first["test_error"]
        assert s.finetuning["overlap"] ** 2 < second["q"]
        assert s.finetuning["effective_noise"] > second["effective_noise"]
        assert s.finetuning["test_error"] > second["test_error"]


def test_bayes_optimal_identity_error():
    # Two draws from the posterior differ by what the closed form says.
    sigma, noise, q, norm = ls.Identity(), 0.4, 0.7, 1.3
    nodes = gaussian_nodes(18, 2**15, 8, 2)
    got = np.asarray(_posterior_error(sigma, norm, noise, q, nodes, 3, True, 8))
    want, _ = _error(sigma, 3, norm, noise, q)
    assert np.mean(got) == pytest.approx(want, abs=5 * float(np.std(got)) / 8**0.5)
    assert want == pytest.approx(4 / 3 * (noise + 1 - q**2))


@pytest.fixture
def few_nodes(monkeypatch):
    """A quarter of the nodes, for limits and for what is more than what: neither asks for digits."""
    monkeypatch.setattr(posterior, "_OUTER", 2**11)


def test_bayes_optimal_limits_of_much_and_no_data(few_nodes):
    fine = ls.Finetuning(5.0, 1.0, delta=0.5, activation="identity", tokens=2)
    assert bayes_optimal_finetuning(fine, 0.0).q == pytest.approx(1.0, abs=1e-11)
    assert bayes_optimal_finetuning(fine, 1e-4).q > 0.9999
    few = ls.Finetuning(0.01, 1.0, delta=0.5, activation="identity", tokens=2)
    assert bayes_optimal_finetuning(few, 0.5).q == 0.0


def test_bayes_optimal_threshold():
    few = ls.Finetuning(0.01, 1.0, delta=0.5, activation="identity", tokens=2)
    threshold = bayes_optimal_threshold(few, 0.5)
    below, above = (
        bayes_optimal_finetuning(ls.Finetuning(f * threshold, 1.0, delta=0.5, activation="identity", tokens=2), 0.5)
        for f in (0.9, 1.3)
    )
    assert below.q == 0.0 < above.q - 5 * above.q_stderr
    with pytest.raises(ls.SettingError, match="activation of your own"):
        bayes_optimal_finetuning(ls.Finetuning(1.0, 1.0, delta=0.5, activation=jnp.tanh, tokens=2), 0.5)


def known(alpha, noise, tokens=3, activation="identity"):
    fine = ls.Finetuning(alpha, 1.0, delta=0.5, activation=activation, tokens=tokens)
    return bayes_optimal_finetuning(fine, noise)


@pytest.mark.parametrize(
    ("tokens", "activation", "alphas"),
    [(2, "softmax", (1e3, 1e5)), (3, "identity", (1e3, 1e5)), (8, "identity", (1e5,))],
)
def test_much_data_leaves_the_fisher_information(tokens, activation, alphas):
    # 1 - q = Delta_eff / (alpha' tr), tr = T (T+1), for softmax without what the shift would tell: 2 E (1.chi)^2 / T.
    trace = tokens * (tokens + 1) - 2 * (activation == "softmax")
    for alpha in alphas:
        found = known(alpha, 0.5, tokens, activation)
        want = 0.5 / (alpha * trace)
        assert 0 < found.q_stderr < 0.02 * want
        assert 1 - found.q == pytest.approx(want, abs=5 * found.q_stderr + 0.5 * want / np.sqrt(alpha))


@pytest.fixture(scope="module")
def q_known():
    """q of three tokens by alpha' and noise: two tests ask for some of the same."""
    return functools.cache(lambda alpha, noise: known(alpha, noise).q)


def test_more_data_and_less_noise_are_never_worse(few_nodes, q_known):
    by_alpha = [q_known(alpha, 0.5) for alpha in (0.05, 0.12, 0.5)]
    assert by_alpha[0] == 0.0 and np.all(np.diff(by_alpha) >= 0) and by_alpha[2] > 0.5
    by_noise = [q_known(0.5, noise) for noise in (1.0, 0.5, 1e-6, 0.0)]
    assert np.all(np.diff(by_noise) >= 0) and by_noise[-1] == pytest.approx(1.0, abs=1e-11)


def test_without_noise_too_few_numbers_settle_nothing(few_nodes, q_known):
    # Every sample settles chi* up to its sign: alpha' T numbers for one unknown.
    for noise in (0.0, 2e-9, 1e-6):
        assert q_known(0.05, noise) == 0.0
        assert q_known(0.5, noise) > 1 - 2 * noise - 1e-11


def test_stages_and_noises_that_are_none_are_refused():
    known = ls.Finetuning(3.0, 1.0, activation="softmax", tokens=2)
    for limit in (bayes_optimal_finetuning, bayes_optimal_threshold):
        with pytest.raises(ls.SettingError, match=r"finetuning.activation = None follows pre-training"):
            limit(ls.Finetuning(3.0, 1.0, tokens=2), 0.5)
        for noise in (-0.1, np.nan, np.inf):
            with pytest.raises(ls.SettingError, match=rf"effective_noise = {noise} is out of range"):
                limit(known, noise)


def test_without_solution_there_is_an_error(monkeypatch):
    # Averages that hide the recovery at small s: nothing is bracketed, and that is no q = 0.
    def lost(log_s, noise, nodes, tokens, shift, count):
        return np.full(32, 1e9 if float(log_s) > -1 else 1e9 * 2), np.zeros(32), np.zeros(32)

    monkeypatch.setattr(finetuning, "response", lost)
    with pytest.raises(ls.SolveError, match="no q solves"):
        known(1.0, 0.5)
