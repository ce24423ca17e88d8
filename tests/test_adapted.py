"""The adapted layer: what fine-tuning makes of the error on the labels of pre-training, and the factor on the update
that is best for E'."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from orders import order_for
from scipy.optimize import minimize_scalar

import lorastate as ls
from lorastate.bayes.frozen_map import best_map
from lorastate.evolution.order import from_norm
from lorastate.evolution.test_errors import forgetting_error, node_dimension, pretraining_error
from lorastate.math.quadrature import Nodes, gaussian_nodes
from lorastate.model.channel.frozen_map import FrozenMap
from lorastate.simulation.losses import finetuning_loss
from lorastate.simulation.measures import best_factor
from lorastate.simulation.samples import label_noise
from lorastate.solution.adapted import STENCIL, AdaptedLayer, layer_error, minimum, near_minimum
from lorastate.solution.nodes import node_sets

NUMERICS = ls.Numerics(nodes=1024, finetuning_nodes=4096, replicas=4)
SIZES = (2.3, 1.1, 0.9)


def setting(activation="identity", numerics=NUMERICS, pre=None, activation_of_lora=None, **fine):
    given = {"alpha": 0.2, "lam": 0.1, "activation": activation, "tokens": 2, **(pre or {})}
    return ls.Setting(
        ls.Pretraining(**given),
        ls.Finetuning(**{"alpha": 6.0, "lam": 0.6, "activation": activation_of_lora, **fine}),
        numerics,
    )


@functools.cache
def solved(activation="identity", **fine):
    return ls.predict(setting(activation, **fine))


# ---- the error on the labels of pre-training


@pytest.mark.parametrize(
    "rank, teacher_rank, activation",
    [(1, 1, ls.Identity()), (2, 2, ls.Identity()), (3, 2, ls.Identity()), (1, 1, ls.Softmax(1.5)),
     (3, 2, ls.Softmax(1.5)), (4, 1, ls.Softmax(1.5)), (2, 1, ls.Custom(jnp.tanh))],
)  # fmt: skip
def test_error_on_the_old_labels_against_sampling(rank, teacher_rank, activation):
    """Fields and chi drawn from their law, whole matrices and not rows; the labels have no w* in them."""
    t, n, (size, overlap, norm) = 3, 100_000, SIZES
    rng, order, k = np.random.default_rng(rank), order_for(rank, teacher_rank), min(rank, teacher_rank)
    q = np.atleast_1d(np.asarray(order.norm(1.0)))
    chi = np.sqrt([q[0]] * k + [q[-1]] * (rank - k))[:, None] * rng.standard_normal((n, rank, t))
    update = np.einsum("nka,nkb->abn", chi, chi)
    g, h = (rng.standard_normal((t, t, n)) for _ in range(2))
    y = np.sqrt(size / 2) * (g + g.swapaxes(0, 1))
    zw = overlap / size * y + np.sqrt((norm - overlap**2 / size) / 2) * (h + h.swapaxes(0, 1))
    d = node_dimension(activation, t, (max(rank, 2), 0))
    nodes = None
    if d:
        normal, weight = (jnp.asarray(a[0]) for a in gaussian_nodes(d, 2**16, 2, 0)[:2])
        nodes = Nodes(normal, weight)
    for c in (0.7, 0.0):
        values = np.asarray(activation(jnp.asarray(zw + c * update)) - activation(jnp.asarray(y)))
        values = np.sum(values**2, (0, 1))
        got = forgetting_error(activation, t, *SIZES, order, nodes, (rank, teacher_rank), c)
        bar = np.std(values) / np.sqrt(n)
        assert float(got) == pytest.approx(values.mean(), abs=4 * bar + (2e-3 * values.mean() if d else 0.0))
    assert float(got) == pytest.approx(float(pretraining_error(activation, t, *SIZES, nodes)), rel=1e-12)


def test_identity_of_rank_one():
    """(1 + 1/T) (Delta/2 + Q0 - 2 b M + b^2 Q) + c^2 (T + 2) q^2 / T."""
    s = setting(recalibration=0.8, adapter_factor=1.3)
    found, t = ls.predict(s), 2
    p, q = found.pretraining, found.finetuning["q"]
    frozen = (1 + 1 / t) * (s.pretraining.label_size - 2 * 0.8 * p["M"] + 0.64 * p["Q"])
    assert float(found.finetuning["forgetting_error_frozen"]) == pytest.approx(float(frozen), rel=1e-12)
    after = frozen + 1.3**2 * (t + 2) * q**2 / t
    assert float(found.finetuning["forgetting_error"]) == pytest.approx(float(after), rel=1e-12)


def test_another_task_is_forgotten_with_its_own_overlap():
    """E of pre-training is on S_pre, not on the S* of fine-tuning; and what a Bayes-optimal map knows of S_pre is left
    out."""
    task = {"a": 0.7, "c": 0.6, "kappa_perp": 0.5}
    found = ls.predict(setting(pre={"task": task}))
    p, f = found.pretraining, found.finetuning
    assert abs(float(p["M"] - p["M_down"])) > 0.1
    assert float(f["forgetting_error_frozen"]) == pytest.approx(float(p["test_error"]), rel=1e-12)

    def of_best_map(pre):
        stages = (s := setting(pre=pre, inputs="bayes_optimal")).pretraining, s.finetuning_resolved
        return AdaptedLayer(*stages, best_map(s.pretraining), order_for(1, 1)).forgetting_error(None, 0.0)

    assert np.isnan(of_best_map({"task": task}))
    assert 0 < float(of_best_map({})) < float(solved().pretraining["test_error"])


def test_what_is_not_adapted_is_pretraining():
    """At w = 0 and b = 1 the nodes are those of E, for ranks that need more of them too."""
    found = ls.predict(setting("softmax", rank=3, teacher_rank=3, activation_of_lora="identity"))
    before = float(found.pretraining["test_error"])
    assert float(found.finetuning["forgetting_error_frozen"]) == pytest.approx(before, rel=1e-12)
    assert float(found.finetuning["forgetting_error"]) > before
    bars = [found.stderr("pretraining", "test_error"), found.stderr("finetuning", "forgetting_error_frozen")]
    assert bars[1] == pytest.approx(bars[0], rel=1e-6)


def test_nodes_of_low_ranks_are_the_same():
    stages = [(s.pretraining, s.finetuning_resolved) for s in (setting("softmax", rank=r) for r in (1, 2, 4))]
    one, two, four = (node_sets(*pair, NUMERICS).pretraining_test for pair in stages)
    assert node_sets(stages[0][0], None, NUMERICS).pretraining_test is one
    assert one and four and one is two and four.normal.shape[1] == one.normal.shape[1] + 2


# ---- the factor on the update


def test_factor_of_training_is_a_ridge():
    """A factor s on w w^T in training, PEFT's scaling, is a ridge of lam / s: the same loss at sqrt(s) w."""
    keys, s = jax.random.split(jax.random.key(0), 3), 2.5
    x, w = jax.random.normal(keys[0], (9, 3, 20)), jax.random.normal(keys[1], (20, 2))
    target, frozen = label_noise(keys[2], 1.0, 3, 9), label_noise(keys[0], 0.5, 3, 9)
    data = x, frozen, ls.Softmax(1.0)(target), 0.3 / s, ls.Softmax(1.0)
    chi = np.einsum("nad,dk->nka", x, w) / np.sqrt(20)
    update = s * jnp.einsum("nka,nkb->abn", chi, chi)
    want = (jnp.sum((ls.Softmax(1.0)(frozen + update) - data[2]) ** 2) + 0.3 * jnp.sum(w**2)) / 20
    assert float(finetuning_loss(np.sqrt(s) * w, data)) == pytest.approx(float(want), rel=1e-12)


@pytest.mark.parametrize("rank, teacher_rank", [(1, 1), (2, 2), (1, 2), (3, 1)])
def test_identity_factor(rank, teacher_rank):
    """[(T+1) Tr m m^T + r* Tr q] / [(T+1) Tr q^2 + (Tr q)^2]."""
    t, order = 2, order_for(rank, teacher_rank)
    s = setting(rank=rank, teacher_rank=teacher_rank)
    layer = AdaptedLayer(s.pretraining, s.finetuning_resolved, FrozenMap(1.1, 0.9, 2.0), order)
    c = near_minimum(layer, None)
    c, low = minimum(c, jnp.stack([layer.test_error(None, c * (1 + t)) for t in STENCIL]))
    k, m = min(rank, teacher_rank), np.atleast_1d(np.asarray(order.overlap))[0]
    q = np.atleast_1d(np.asarray(order.norm(1.0)))
    q = np.array([q[0]] * k + [q[-1]] * (rank - k))
    want = ((t + 1) * k * m**2 + teacher_rank * q.sum()) / ((t + 1) * np.sum(q**2) + q.sum() ** 2)
    assert float(c) == pytest.approx(want, rel=1e-10)
    assert float(low) == pytest.approx(float(layer.test_error(None, want)), rel=1e-10)


def test_training_knows_nothing_of_the_factor():
    """With rank one c = (q + (T+1) m^2) / ((T+2) q^2); where it is applied E' is what was predicted for it."""
    found, t = solved(), 2
    f = found.finetuning
    c = float(f["best_adapter_factor"])
    assert c == pytest.approx(float((f["q"] + (t + 1) * f["m"] ** 2) / ((t + 2) * f["q"] ** 2)), rel=1e-9)
    applied = ls.predict(setting(adapter_factor=c)).finetuning
    assert float(applied["test_error"]) == pytest.approx(float(f["test_error_best_factor"]), rel=1e-9)
    for name in ("q", "train_loss", "best_adapter_factor", "test_error_frozen"):
        assert float(applied[name]) == pytest.approx(float(f[name]), rel=1e-12)


def curve(s, solution):
    """E'(c) of a solution of rank one, on the nodes of the setting."""
    fine, p, f = s.finetuning_resolved, solution.pretraining, solution.finetuning
    nodes = node_sets(s.pretraining, fine, s.numerics).finetuning_test
    order, frozen = from_norm(f["v"], f["m"], f["q"], 1.0), FrozenMap(p["M"], p["Q"], s.pretraining.Q0)
    return jax.jit(lambda c: layer_error(AdaptedLayer(s.pretraining, fine, frozen, order), nodes, c))


@pytest.mark.parametrize("lam, recalibration", [(0.3, 1.0), (3.0, 0.7)])
def test_factor_is_the_minimum(lam, recalibration):
    s = setting("softmax", lam=lam, recalibration=recalibration)
    found = ls.predict(s)
    error = curve(s, found)
    assert float(error(1.0)) == pytest.approx(float(found.test_error), rel=1e-10)
    c = float(found.finetuning["best_adapter_factor"])
    lowest = minimize_scalar(
        lambda c: float(error(c)), bounds=(0.3 * c, 3 * c), method="bounded", options={"xatol": 1e-9}
    )
    assert c == pytest.approx(lowest.x, rel=1e-4)
    assert float(found.finetuning["test_error_best_factor"]) == pytest.approx(lowest.fun, rel=1e-6)
    assert lowest.fun <= float(found.test_error)
    grid = [float(error(x)) for x in np.linspace(0.0, 8.0 / float(found.finetuning["q"]), 60)]
    assert min(grid) >= lowest.fun - 1e-9


def test_no_update_has_no_factor():
    found = ls.predict(setting("softmax", alpha=0.5, lam=100.0))
    assert float(found.finetuning["q"]) < 1e-9 or found.summary()["finetuning"]["best_adapter_factor"] is not None
    assert np.isfinite(float(found.finetuning["test_error_best_factor"]))


def test_glass_has_the_numbers_of_its_lowest_minima():
    """Identity with many minima: the closed forms with the q and m of the one-step solution."""
    s = ls.Setting(
        ls.Pretraining(alpha=0.1, lam=0.01, delta=2.0, activation="identity", tokens=2),
        ls.Finetuning(alpha=1.0, lam=0.05),
        ls.Numerics(nodes=4096, finetuning_nodes=8192, replicas=4),  # those of test_breaking
    )
    found, t = ls.predict(s), 2
    f, p = found.finetuning, found.pretraining
    assert found.symmetry == "one-step broken" and float(f["p"]) < 0.99 * float(f["q"])
    frozen = (1 + 1 / t) * (s.pretraining.label_size - 2 * p["M"] + p["Q"])
    assert float(f["forgetting_error"]) == pytest.approx(float(frozen + (t + 2) * f["q"] ** 2 / t), rel=1e-9)
    want = (f["q"] + (t + 1) * f["m"] ** 2) / ((t + 2) * f["q"] ** 2)
    assert float(f["best_adapter_factor"]) == pytest.approx(float(want), rel=1e-9)


# ---- derivatives and bars

PATHS = (
    "pretraining.lam",
    "finetuning.lam",
    "finetuning.adapter_factor",
    "pretraining.delta",
    "finetuning.recalibration",
)


@pytest.mark.parametrize(
    "of, activation",
    [("forgetting_error", "identity"), ("test_error_best_factor", "identity"), ("pretraining.test_error", "identity"),
     ("forgetting_error", "softmax"), ("test_error_best_factor", "softmax")],
)  # fmt: skip
def test_gradients_against_central_differences(of, activation):
    base = setting(activation, adapter_factor=0.8, recalibration=0.9)
    stage, name = of.split(".") if "." in of else ("finetuning", of)

    def at(s):
        return float(getattr(ls.predict(s), stage)[name])

    value, slopes = ls.gradient(base, of=of)
    assert value == pytest.approx(at(base), rel=1e-6)
    # The stencil around the best factor moves in steps, of which E' knows its eighth digit.
    step, rel = (1e-2, 1e-3) if of == "test_error_best_factor" else (1e-4, 2e-4)
    for path in PATHS:
        x = float(ls.get(base, path))
        h = step * x
        want = (at(ls.replace(base, path, x + h)) - at(ls.replace(base, path, x - h))) / (2 * h)
        assert slopes[path] == pytest.approx(want, rel=rel, abs=2e-7), path
    if of == "test_error_best_factor":
        assert slopes["finetuning.adapter_factor"] == 0


def test_derivative_of_the_factor():
    base = setting("softmax", numerics=ls.Numerics(nodes=512, finetuning_nodes=1024, replicas=2, symmetry="rs"))

    def factor(t):
        """Along a line through both ridges."""
        here = ls.replace(base, "finetuning.lam", 0.6 + t)
        return ls.predict(ls.replace(here, "pretraining.lam", 0.1 + t / 2)).finetuning["best_adapter_factor"]

    both = jax.jit(lambda t: jax.jvp(factor, (t,), (1.0,)))
    _, slope = both(0.0)
    up, down = (float(both(t)[0]) for t in (1e-4, -1e-4))
    assert float(slope) == pytest.approx((up - down) / 2e-4, rel=1e-3)


def test_bars_cover_what_more_nodes_change():
    names = ("best_adapter_factor", "test_error_best_factor", "forgetting_error")
    some = [ls.predict(setting("softmax", numerics=NUMERICS.changed(seed=seed))) for seed in range(5)]
    for name in names:
        values = np.array([float(s.finetuning[name]) for s in some])
        bars = np.array([s.stderr("finetuning", name) for s in some])
        assert 0.3 < values.std(ddof=1) / np.sqrt(np.mean(bars**2)) < 2.5, name


# ---- training


def test_lowest_of_measured_errors():
    factors = np.geomspace(1e-2, 10, 45)
    errors = 1.0 + (np.log(factors) - 0.3) ** 2 * (1 + 0.1 * np.log(factors))
    c, low = best_factor(factors, errors)
    assert np.log(c) == pytest.approx(0.3, abs=1e-8) and low == pytest.approx(1.0, abs=1e-12)
    assert np.isnan(best_factor(factors, factors)[0]) and np.isnan(best_factor(factors, np.nan * factors)[1])


@pytest.mark.parametrize("activation, task", [("identity", True), ("softmax", False)])
def test_training_agrees(activation, task):
    pre = {"task": {"a": 0.8, "c": 0.5, "kappa_perp": 0.5}} if task else {}
    s = setting(activation, pre=pre, recalibration=0.9, adapter_factor=0.8, lam=1.5)
    theory = ls.predict(s)
    found = ls.simulate(s, dimension=60, runs=6, test_samples=3000)
    for name in ("best_adapter_factor", "test_error_best_factor", "forgetting_error", "forgetting_error_frozen"):
        want = float(theory.finetuning[name])
        assert found.mean("finetuning", name) == pytest.approx(
            want, abs=3 * found.stderr("finetuning", name) + 0.04 * want
        ), name
    # The same inputs as E before: with b = 1 and without the update the same number.
    plain = ls.replace(ls.replace(s, "finetuning.recalibration", 1.0), "finetuning.adapter_factor", 0.0)
    one = ls.simulate(plain, dimension=30, runs=1, test_samples=500)
    for name in ("forgetting_error", "forgetting_error_frozen"):
        np.testing.assert_allclose(one.finetuning[name], one.pretraining["test_error"], rtol=1e-12)
