"""Pre-training alone: the numbers of `predict`, derivatives, and what a failed solve leaves."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import brentq

jax.config.update("jax_enable_x64", True)

import lorastate as ls  # noqa: E402
from lorastate.errors import Code, SolveError  # noqa: E402
from lorastate.evolution import pretraining as pt  # noqa: E402
from lorastate.evolution.order import from_norm  # noqa: E402
from lorastate.math.quadrature import gaussian_nodes  # noqa: E402
from lorastate.math.symmetric import hessian_to_coordinates, to_coordinates  # noqa: E402
from lorastate.model import proximal, wells  # noqa: E402
from lorastate.runtime import program  # noqa: E402
from lorastate.solution import lanes  # noqa: E402

NUMERICS = ls.Numerics(nodes=1024, finetuning_nodes=2048, replicas=4)


def identity(lam=0.1, **more):
    return ls.pretrain(ls.Pretraining(alpha=0.1, lam=lam, activation="identity", **more), NUMERICS)


def test_the_numbers_are_those_of_predict():
    pre = ls.Pretraining(0.1, 0.1, activation="identity", kappa0=0.5, tokens=2)
    both = ls.predict(ls.Setting(pre, ls.Finetuning(2.0, 1.0), NUMERICS), throw=False)
    alone = ls.pretrain(pre, NUMERICS)
    assert alone.ok and alone.code is Code.ok
    assert set(alone.values) == set(alone.errors) == set(both.pretraining)
    for name, value in both.pretraining.items():
        np.testing.assert_allclose(alone.values[name], value, rtol=1e-9)
        assert alone.stderr(name) == 0
    summary, whole = alone.summary(), both.summary()
    for part in ("quadrature_error", "status"):
        assert summary[part]["pretraining"].keys() == whole[part]["pretraining"].keys()
    assert summary["pretraining"] == pytest.approx(whole["pretraining"], rel=1e-9)
    fine = both.setting.finetuning_resolved
    np.testing.assert_allclose(fine.effective_noise(alone.frozen(fine)), both.effective_noise, rtol=1e-9)
    np.testing.assert_allclose(alone.spectrum.eta, both.spectrum.eta, rtol=1e-9)


def test_error_bars_are_the_spread_over_seeds():
    pre = ls.Pretraining(0.2, 0.1, tokens=2)
    found = [ls.pretrain(pre, ls.Numerics(nodes=1024, finetuning_nodes=1024, seed=s)) for s in range(16)]
    for name in ("V", "M", "Q", "train_loss", "test_error"):
        spread = np.std([float(one.values[name]) for one in found], ddof=1)
        bars = np.sqrt(np.mean([one.stderr(name) ** 2 for one in found]))
        assert 0.5 < spread / bars < 1.8, name


def test_derivatives_agree_with_differences():
    slope = float(jax.grad(lambda lam: identity(lam).values["V"])(0.1))
    ends = [float(identity(lam).values["V"]) for lam in (0.0999, 0.1001)]
    assert slope == pytest.approx((ends[1] - ends[0]) / 2e-4, rel=1e-4)


def test_a_failed_solve_has_no_numbers_where_nothing_can_be_raised():
    def response(kappa):
        return identity(kappa=kappa).values["V"]

    with pytest.raises(SolveError, match=r"pretraining: too_narrow .* rank fraction 0.68"):
        response(0.05)
    narrow = ls.pretrain(ls.Pretraining(0.1, 0.1, kappa=0.05, activation="identity"), NUMERICS, throw=False)
    assert not narrow.ok and narrow.summary()["status"]["pretraining"]["code"] == "too_narrow"
    np.testing.assert_array_equal(np.isnan(jax.vmap(response)(jnp.array([0.05, 1.0]))), [True, False])
    assert np.isnan(jax.grad(response)(0.05)) and np.isfinite(jax.grad(response)(1.0))


def test_the_map_is_large_near_the_interpolation_threshold():
    """Noisy labels at a weak ridge: training at D = 60 (2 runs, 3 starts) has M = 7.1(1), Q = 62(7), growing with D;
    Newton steps alone stop at M = 2.8."""
    pre = ls.Pretraining(0.4804, 0.00105, kappa0=0.583, kappa=1.5, delta=2.46, tokens=2)
    found = ls.pretrain(pre, ls.Numerics(nodes=4096, replicas=4))
    assert 7.0 < float(found.values["M"]) < 9.0 and 60 < float(found.values["Q"]) < 110


def test_minimum_is_the_global_one_at_low_temperature():
    """beta = 5: many starts at every node give V, M, Q = 0.741, 0.399, 0.182; two gave 0.762, 0.392, 0.178."""
    found = ls.pretrain(ls.Pretraining(0.1, 0.1, delta=2.0, beta=5.0), ls.Numerics(nodes=8192, replicas=4))
    for name, want in (("V", 0.741), ("M", 0.399), ("Q", 0.182)):
        assert abs(float(found.values[name]) - want) < 3 * found.stderr(name) + 5e-4


@pytest.mark.parametrize(
    ("pre", "point", "some"),
    [
        (ls.Pretraining(0.1, 0.1, delta=2.0, beta=5.0), (0.741, 0.399, 0.182), 5e-3),
        (ls.Pretraining(0.2201, 1e-5, kappa0=0.5, tokens=2), (162.8, 2.218, 6.349), 0.0),
    ],
    ids=["low temperature", "weak ridge"],
)
def test_no_lower_minimum_at_any_node(pre, point, some):
    """At the solution, on 2048 nodes, of which some per cent have two wells: 24 descents from elsewhere find nothing
    lower. From Omega and Y alone `some` end too high, from Omega alone some per cent: so much this test can see."""
    v, m, q = map(jnp.asarray, point)
    order = from_norm(v, m, q, pre.label_size)
    whole = gaussian_nodes(pt.node_dimension(pre), 4096, 2, 1)
    nodes, nothing = (jax.tree_util.tree_map(lambda a: jnp.asarray(a[0]), v) for v in (whole, pt.no_inner(pre, whole)))
    problem = pt.inner_problem(pre, order, nodes)
    found = jax.jit(pt.locate_inner)(pre, order, nodes, nothing)
    depth = jax.jit(lambda u: problem.terms(u)[0])(found.u[0])
    y, omega = (to_coordinates(z) for z in pt.fields(pre, order, nodes.normal))
    descend = jax.jit(lambda u: proximal.locate(problem, u)[1])
    best = np.inf
    for k, key in enumerate(jax.random.split(jax.random.key(1), 24)):
        start = (omega, y)[k % 2] + (1 + k % 3) * jnp.std(y) * jax.random.normal(key, omega.shape)
        best = np.minimum(best, descend(start))

    def missed(depth):
        return np.mean(depth > best + 1e-7 * (1 + np.abs(best)))

    assert np.all(found.ok) and float(wells.lost(found)) == 0 and np.mean(found.two) > 0.02
    assert missed(depth) <= 1e-3
    best = np.minimum(best, depth)
    assert missed(descend(omega)) > 0.02 and missed(np.minimum(descend(omega), descend(y))) >= some


def test_temperature_is_a_unit_of_length():
    """sigma_beta(Z) = sigma_1(beta Z): beta = 2 on S* is beta = 1 on 2 S* with four times the noise and half the
    ridge. Then V, M, Q are four times as large, and errors, losses and spectra are the same."""
    beta, numerics = 2.0, ls.Numerics(nodes=2048, finetuning_nodes=2048, replicas=4)

    def found(scale, **more):
        base = {"law": "atoms", "weights": [0.5, 0.3, 0.2], "values": [0.0, 0.8 * scale, 2.0 * scale]}
        given = {"delta": 0.4 * scale**2, "tokens": 2, "base": base, **more}
        return ls.pretrain(ls.Pretraining(0.15, 0.02 / scale, **given), numerics)

    cold, long = found(1.0, beta=beta), found(beta)
    powers = dict.fromkeys(("V", "M", "M_down", "Q"), 2) | dict.fromkeys(("qhat", "mhat", "shat"), -2)
    for name, value in cold.values.items():
        np.testing.assert_allclose(long.values[name], beta ** powers.get(name, 0) * value, rtol=1e-9, err_msg=name)
        np.testing.assert_allclose(long.errors[name], beta ** powers.get(name, 0) * cold.errors[name], rtol=1e-5)
    assert float(cold.values["test_error"]) != pytest.approx(float(found(1.0).values["test_error"]), rel=0.1)


# ---- weak ridges -----------------------------------------------------------------------------------------------


@jax.jit
def derivatives(law, d, eps):
    return law.J(d, eps), *jax.grad(law.J, (0, 1))(d, eps)


def J(law, d, eps=0.0):
    """J, dJ/d delta and dJ/d eps."""
    return map(float, derivatives(law, jnp.asarray(d), jnp.asarray(eps)))


def zero_of(f, low, high) -> float:
    return float(brentq(f, low, high))  # pyright: ignore[reportArgumentType]


def interpolating(pre, n_eff, low=0.3, high=30.0):
    """lam V, M, Q as lam -> 0 below the interpolation threshold, where all labels are met: eta = 1,

    J_1(d, eps) = 2 alpha n d,  alpha n d^2 = Q0 + Delta/2 - 2 M + Q,  M = J - (d J_1 + eps J_eps)/2,  Q = J,
    lam~ V = eps alpha n / 2."""
    law, an = pre.law, float(pre.alpha) * n_eff

    def at(d):
        eps = zero_of(lambda e: list(J(law, d, e))[1] - 2 * an * d, -5.0 * d, 5.0 * d)
        value, slope, along = J(law, d, eps)
        return eps, value - (d * slope + eps * along) / 2, value

    def excess(d):
        _, M, Q = at(d)
        return an * d**2 - float(pre.label_size) + 2 * M - Q

    eps, M, Q = at(zero_of(excess, low, high))
    return eps * an / 2 / float(pre.kappa) ** 0.5, M, Q


def regular(pre):
    """V, M, Q of the identity as lam -> 0 above the threshold: eps = 0 and eta = 1,

    alpha n d^2 = Q0 + Delta/2 - 2 M + Q = Q0 + Delta/2 - J + d J_1,  V = T^2 J_1 / (8 alpha n d - 4 J_1)."""
    n, law = pre.tokens * (pre.tokens + 1), pre.law
    an = float(pre.alpha) * n

    def excess(d):
        value, slope, _ = J(law, d)
        return an * d**2 - float(pre.label_size) + value - d * slope

    d = zero_of(excess, 1e-3, 10.0)
    value, slope, _ = J(law, d)
    return pre.tokens**2 * slope / (8 * an * d - 4 * slope), value - d * slope / 2, value


@pytest.mark.parametrize(("activation", "n_eff"), [("softmax", 4), ("identity", 6)])
def test_below_the_interpolation_threshold_weak_ridges_have_a_limit(activation, n_eff):
    """Softmax too: labels that are met exactly do not know through which map. Few nodes are not met at lam = 1e-8, and
    fewer at 1e-10."""
    gaps = []
    for lam in (1e-8, 1e-10):
        pre = ls.Pretraining(0.0571, lam, kappa0=0.5, activation=activation, tokens=2)
        found = ls.pretrain(pre, ls.Numerics(nodes=8192))
        assert float(found.values["double_well_share"]) == 0
        got = np.array([lam * float(found.values["V"]), float(found.values["M"]), float(found.values["Q"])])
        gaps.append(np.max(np.abs(got / interpolating(pre, n_eff) - 1)))
    assert gaps[0] < 0.01 and gaps[1] < max(0.3 * gaps[0], 1e-5)


@pytest.mark.parametrize("alpha", [1e-3, 3e-3])
def test_few_samples_and_weak_ridges(alpha):
    """The same limit from samples that tell next to nothing, where plain steps lead away from it."""
    pre = ls.Pretraining(alpha, 1e-6, kappa0=0.14, kappa=1.14, delta=0.07, tokens=2)
    found = ls.pretrain(pre, ls.Numerics(nodes=8192))
    got = np.array([1e-6 * float(found.values["V"]), float(found.values["M"]), float(found.values["Q"])])
    np.testing.assert_allclose(got, interpolating(pre, 4, 5.0, 100.0), rtol=0.02)


def test_a_student_that_hardly_is_there():
    """There s^ is the mean curvature of the loss at zero, and no noise of the nodes."""
    nothing = ls.pretrain(ls.Pretraining(0.05, 1.0, tokens=2), ls.Numerics(nodes=2048, replicas=4))
    assert float(nothing.values["Q"]) == 0
    pre, rng = nothing.pretraining, np.random.default_rng(0)
    z = rng.normal(size=(2, 2, 4000)) * np.sqrt(float(pre.label_size) / 2)
    target = pre.activation(jnp.asarray(z + np.swapaxes(z, 0, 1)))
    hess = hessian_to_coordinates(pre.activation.loss_terms(jnp.zeros_like(target), target)[2])
    curvature = 2 * float(jnp.mean(jnp.einsum("iin->n", hess)))  # coordinates of Sym_T have a variance of two
    assert float(nothing.values["shat"]) == pytest.approx(2 * float(pre.alpha) * curvature, rel=0.02)
    # W grows from where the upper edge of m^ S* + sqrt(q^) Z is twice the ridge.
    c = nothing.values
    edge = c["mhat"] * jnp.nanmax(pre.law.edges(jnp.sqrt(c["qhat"]) / c["mhat"]))
    grows = float(edge / (2 * jnp.sqrt(pre.kappa)))
    for lam, some in ((1.001, False), (0.98, True)):
        found = ls.pretrain(ls.Pretraining(0.05, lam * grows, tokens=2), ls.Numerics(nodes=2048, replicas=4))
        assert (float(found.values["Q"]) > 0) == some and 0 <= float(found.values["Q"]) < 1e-4


def test_softmax_without_noise_finds_the_teacher():
    """Above the interpolation threshold: M = Q = Q0 and E = 0 as lam -> 0."""
    gaps = []
    for lam in (1e-3, 1e-4):
        found = ls.pretrain(ls.Pretraining(0.3, lam, kappa0=0.5, delta=0.0, tokens=2), ls.Numerics(nodes=8192))
        assert float(found.values["test_error"]) < lam
        gaps.append(max(abs(float(found.values[name]) - 1.5) for name in "MQ"))
    assert gaps[0] < 0.1 and gaps[1] < 0.2 * gaps[0]


def full_rank(pre):
    """V, M, Q, E of the identity without noise while no eigenvalue is cut: S_hat = S* + d Z - eps, V = dJ/d(d^2)/s^,

    V = T^2/(4 (alpha n - 1)),  eps = 2 lam~ V,  d^2 + eps^2 = Q0 - 2 M + Q = alpha n d^2,  M = Q0 - eps Tr S*."""
    an = float(pre.alpha) * pre.tokens * (pre.tokens + 1)
    V = pre.tokens**2 / (4 * (an - 1))
    eps = 2 * float(pre.kappa) ** 0.5 * float(pre.lam) * V
    gap, Q0, mean = eps**2 * an / (an - 1), float(pre.Q0), float(pre.law.mean)
    return V, Q0 - eps * mean, Q0 - 2 * eps * mean + gap, (1 + 1 / pre.tokens) * gap


BASES = [
    {"base": {"law": "atoms", "weights": [1.0], "values": [0.7**0.5]}},
    {"kappa0": 2.5, "kappa": 2.0},
]


@pytest.mark.parametrize("base", BASES, ids=["atom", "Wishart"])
def test_a_fit_of_noiseless_labels_is_never_taken_for_a_student_that_is_zero(base):
    for alpha, lam in [(0.3, 1e-4), (10.0, 1e-4), (10.0, 1e-6), (300.0, 1e-6)]:
        pre = ls.Pretraining(alpha, lam, delta=0.0, activation="identity", **base)
        found = ls.pretrain(pre)
        *order, error = full_rank(pre)
        np.testing.assert_allclose([found.values[name] for name in "VMQ"], order, rtol=1e-8)
        np.testing.assert_allclose(found.values["test_error"], error, rtol=1e-3, atol=1e-15)


@pytest.mark.parametrize("base", [{"kappa0": 0.3}, {"base": {"law": "atoms", "weights": [0.7, 0.3], "values": [0, 1]}}])
@pytest.mark.parametrize(("alpha", "lam"), [(0.3, 1e-5), (10.0, 1e-3), (10.0, 1e-4)])
def test_a_perfect_fit_below_full_rank(base, alpha, lam):
    """A share 1 - r of zeros: the pairs of eigenvalues that are not both cut are r (2 - r), and V follows as above."""
    found = ls.pretrain(ls.Pretraining(alpha, lam, delta=0.0, activation="identity", **base))
    pairs, Q0 = 0.3 * 1.7, float(found.pretraining.Q0)
    V = 9 * pairs / (4 * (12 * alpha - pairs))
    expected = [V, Q0, Q0, 0.3]
    values = [found.values[name] for name in ("V", "M", "Q", "rank_fraction")]
    np.testing.assert_allclose(values, expected, rtol=3 * lam, atol=1e-9)


@pytest.mark.parametrize(("alpha", "kappa0"), [(0.5, 0.5), (2.0, 1.0)])
def test_softmax_without_noise_scales_with_the_ridge(alpha, kappa0):
    """S_hat - S* is linear in lam, V constant, where lam is small: E falls as lam^2, by eight orders of magnitude."""
    found = [
        ls.pretrain(
            ls.Pretraining(alpha, lam, kappa0=kappa0, kappa=2.0, delta=0.0, tokens=2), ls.Numerics(nodes=8192)
        ).values
        for lam in (1e-4, 1e-5, 1e-6)
    ]
    for a, b in itertools.pairwise(found):
        assert float(b["test_error"] / a["test_error"]) == pytest.approx(1e-2, rel=0.06)
        assert float(b["V"] / a["V"]) == pytest.approx(1, rel=0.02)
        assert float((1 + kappa0 - b["M"]) / (1 + kappa0 - a["M"])) == pytest.approx(0.1, rel=0.05)


def test_a_fit_that_is_perfect_to_rounding_says_so():
    pre = ls.Pretraining(10.0, 1e-9, kappa0=0.5, delta=0.0, activation="identity")
    with pytest.raises(SolveError, match="labels without noise are fitted perfectly here"):
        ls.pretrain(pre)


def test_above_the_interpolation_threshold_the_response_is_finite():
    pre = ls.Pretraining(0.5, 1e-8, kappa0=0.5, activation="identity", tokens=2)
    found = ls.pretrain(pre)
    np.testing.assert_allclose([found.values[name] for name in "VMQ"], regular(pre), rtol=1e-5)


@pytest.mark.parametrize("fields", [{"lam": 0.05, "delta": 1.0}, {"lam": 0.1, "delta": 5.0, "beta": 2.0}])
def test_second_wells_looked_for_at_some_nodes_first(fields, monkeypatch):
    """Without any (first) there is one well to be found from anywhere; where there are some (second; 0.8 % of the
    nodes) the search begins once more."""
    numerics = ls.Numerics(nodes=2048, replicas=4)
    pre = ls.Pretraining(alpha=0.1, **fields)
    found = ls.pretrain(pre, numerics)
    assert float(found.values["V"]) * float(pre.activation.beta) ** 2 < pt._STIFF
    monkeypatch.setattr(pt, "_STIFF", 0.0)
    monkeypatch.setattr(lanes, "_programs", lanes._programs.__wrapped__)  # traced anew
    monkeypatch.setattr(program, "_folder", lambda: None)
    everywhere = ls.pretrain(pre, numerics)
    share, known = (float(found.values["double_well_share"]) for found in (everywhere, found))
    assert share == pytest.approx(known, rel=0.1) and (share > 0) == ("beta" in fields)
    for name in ("V", "M", "Q", "test_error"):
        near = 0.05 * found.stderr(name) if "beta" in fields else 1e-9
        assert float(everywhere.values[name]) == pytest.approx(float(found.values[name]), rel=1e-9, abs=near)
