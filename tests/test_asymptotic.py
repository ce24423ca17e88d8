"""Training on the asymptotic channel: the law of what is drawn, the descents, and worked theory values."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

jax.config.update("jax_enable_x64", True)

from lorastate.errors import Code, SettingError, SolveError  # noqa: E402
from lorastate.evolution.order import from_norm  # noqa: E402
from lorastate.evolution.test_errors import finetuning_error, node_dimension  # noqa: E402
from lorastate.math.lbfgs import minimise  # noqa: E402
from lorastate.math.quadrature import gaussian_nodes  # noqa: E402
from lorastate.model.activation import Custom, Identity, Softmax  # noqa: E402
from lorastate.model.channel.frozen_map import FrozenMap  # noqa: E402
from lorastate.setting.numerics import Numerics  # noqa: E402
from lorastate.setting.paths import get  # noqa: E402
from lorastate.setting.stages import Finetuning, Pretraining, Setting  # noqa: E402
from lorastate.simulation import descents as _descents  # noqa: E402
from lorastate.simulation import losses, on_channel, samples, searches  # noqa: E402
from lorastate.simulation.channel_draws import draw, draw_fields  # noqa: E402
from lorastate.simulation.descents import LoraData, descend  # noqa: E402
from lorastate.simulation.overlap_errors import overlap_error, overlap_matrices  # noqa: E402
from lorastate.simulation.result import SimulationInterrupted  # noqa: E402
from lorastate.simulation.searches import SEARCHES  # noqa: E402
from lorastate.simulation.simulate import simulate  # noqa: E402
from lorastate.solution import solution  # noqa: E402

NUMERICS = Numerics(nodes=4096, finetuning_nodes=8192, replicas=8)
SMOOTH = Pretraining(0.1, 0.01, activation="softmax")
LINEAR = Pretraining(0.1, 0.1, activation="identity")


def trained(pre, fine, dimension=200, runs=6, starts=2, moves=1, **options):
    setting = Setting(pre, fine, NUMERICS)
    return simulate(
        setting, stage="finetuning", dimension=dimension, runs=runs, starts=starts, moves=moves, **options
    )  # fmt: skip


@pytest.fixture(scope="module")
def smooth():
    return trained(SMOOTH, Finetuning(3.0, 0.05), runs=8)


def close(result, name, theory, search="deep", bias=0.005):
    return abs(result.mean(search, name) - theory) < 4 * result.stderr(search, name) + bias * theory


# ---- against the theory ----------------------------------------------------------------------------------------


def test_smooth_setting_agrees_with_theory(smooth):
    assert close(smooth, "m", 0.915) and close(smooth, "q", 0.929) and close(smooth, "test_error", 0.386)
    assert smooth.stderr("deep", "test_error") < 0.004
    assert smooth.samples == 600 and smooth.seeds == tuple((0, run) for run in range(8))
    # One minimum: all searches end in it.
    for search in SEARCHES:
        assert smooth.converged(search).all()
        np.testing.assert_allclose(smooth.searches[search]["train_loss"], smooth.lowest["train_loss"], rtol=1e-5)
    assert smooth.worse_starts["count"] == 0 and smooth.verdict is None


@pytest.mark.parametrize(
    "options, m, q, error",
    [
        ({}, 0.9932, 1.0093, 0.988),
        ({"inputs": "reused"}, 0.9952, 0.9967, 0.944),
    ],
)
def test_identity_agrees_with_theory(options, m, q, error):
    found = trained(LINEAR, Finetuning(3.0, 0.05, **options))
    assert close(found, "m", m) and close(found, "q", q) and close(found, "test_error", error, bias=0.01)


def test_reused_inputs_agree_with_theory():
    found = trained(SMOOTH, Finetuning(3.0, 0.05, inputs="reused"))
    assert close(found, "m", 0.904) and close(found, "q", 0.826) and close(found, "test_error", 0.336)


# ---- what is drawn ---------------------------------------------------------------------------------------------

CHANNELS = [
    {},
    {"inputs": "reused"},
    {"inputs": "reused", "label_noise": "fresh"},
    {"inputs": "mixed", "reused_fraction": 0.3},
    {"alpha": None, "inputs": "selected", "rho": 0.2, "pool": 10.0},
    {"recalibration": "noise"},
    {"inputs": "bayes_optimal"},
]


@pytest.mark.parametrize("options", CHANNELS, ids=lambda o: "-".join(map(str, o.values())) or "fresh")
def test_moments_of_the_drawn_channel(options):
    fine = Setting(LINEAR, Finetuning(**{"alpha": 3.0, "lam": 0.1, **options}), NUMERICS).finetuning_resolved
    frozen, n = solution.pretrain(LINEAR, NUMERICS).frozen(fine), 40_000
    fields = draw_fields(jax.random.key(5), fine, frozen, n)
    assert fields.y0.shape == fields.zw.shape == (3, 3, n)
    unit = np.where(np.eye(3), 2.0, 1.0)
    pairs = {"yy": (fields.y0, fields.y0), "yz": (fields.y0, fields.zw), "zz": (fields.zw, fields.zw)}
    for name, (a, b) in pairs.items():
        np.testing.assert_allclose(np.mean(a * b, -1), float(getattr(fine.moments(frozen), name)) * unit, rtol=0.06)


def test_every_input_of_a_mixture_belongs_to_one_part():
    fine = Setting(LINEAR, Finetuning(3.0, 0.1, inputs="mixed", reused_fraction=0.3)).finetuning_resolved
    frozen, n = solution.pretrain(LINEAR, NUMERICS).frozen(fine), 20_000
    fields = draw_fields(jax.random.key(0), fine, frozen, n)
    gap = np.asarray((fields.y0 - fields.zw)[0, 1] ** 2)
    many = round(0.7 * n)
    kinds = (Finetuning(3.0, 0.1), Finetuning(3.0, 0.1, inputs="reused"))
    for part, kind in zip((gap[:many], gap[many:]), kinds, strict=True):
        expected = Setting(LINEAR, kind).finetuning_resolved.effective_noise(frozen)
        assert np.mean(part) == pytest.approx(float(expected), rel=0.06)


def test_the_problem_that_is_drawn():
    fine = Setting(LINEAR, Finetuning(3.0, 0.1, teacher_rank=2, recalibration=0.5)).finetuning_resolved
    frozen = solution.pretrain(LINEAR, NUMERICS).frozen(fine)
    key, D, n = jax.random.key(1), 50, 150
    teacher, data = draw(key, fine, frozen, D, n)
    np.testing.assert_allclose(teacher.T @ teacher, D * np.eye(2), atol=1e-10)
    assert data.inputs.shape == (3 * n, D) and np.std(data.inputs) == pytest.approx(D**-0.5, rel=0.02)
    fields = draw_fields(samples.stream(key, "channel"), fine, frozen, n)
    np.testing.assert_allclose(data.frozen, 0.5 * fields.zw)
    chi = np.asarray(data.inputs @ teacher).reshape(3, n, 2)  # already over sqrt(D)
    label = fields.y0 + np.einsum("ank,bnk->abn", chi, chi)
    np.testing.assert_allclose(data.target, label / 3, atol=1e-12)


# ---- the descents ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("activation", [Softmax(1.5), Identity(), Custom(jnp.tanh)], ids=lambda a: a.name)
@pytest.mark.parametrize("rank", [1, 2])
def test_descents_are_those_of_the_plain_loss(activation, rank):
    keys = jax.random.split(jax.random.key(1), 4)
    N, T, D, lam = 60, 3, 20, 0.3
    inputs, starts = jax.random.normal(keys[0], (N, T, D)), jax.random.normal(keys[1], (3, D, rank))
    frozen = samples.label_noise(keys[2], 1.0, T, N)
    target = activation(frozen + samples.lora_update(inputs, jax.random.normal(keys[3], (D, rank))))
    rows = jnp.moveaxis(inputs, 1, 0).reshape(T * N, D) / np.sqrt(D)
    found = descend(starts, LoraData(rows, frozen, target, lam, activation), tolerance=1e-8)
    plain = (inputs, frozen, target, lam, activation)
    assert found.codes == (Code.ok,) * 3 and found.w.shape == starts.shape
    for w, loss, start in zip(found.w, found.loss, starts, strict=True):
        assert float(losses.finetuning_loss(w, plain)) == pytest.approx(loss, rel=1e-12)
        slope = jax.grad(losses.finetuning_loss)(w, plain)
        assert (
            np.linalg.norm(slope) * np.linalg.norm(w) <= 1.01e-8 * max(1.0, np.sqrt(w.size) / np.linalg.norm(w)) * loss
        )
        assert loss < float(losses.finetuning_loss(start, plain))
    # From the same start to the same minimum as the other implementation, or below.
    other = minimise(losses.finetuning_loss, starts[0], plain, tolerance=1e-8)
    assert found.loss[0] < other.value * (1 + 1e-3)


def test_descents_that_fail_say_so():
    data = LoraData(jnp.ones((4, 5)), jnp.zeros((2, 2, 2)), jnp.full((2, 2, 2), jnp.nan), 0.1, Identity())
    assert descend(jnp.ones((2, 5, 1)), data).codes == (Code.nonfinite,) * 2
    keys = jax.random.split(jax.random.key(0), 3)
    data = data._replace(inputs=jax.random.normal(keys[0], (4, 5)), target=jax.random.normal(keys[1], (2, 2, 2)))
    assert descend(jax.random.normal(keys[2], (2, 5, 1)), data, max_steps=1).codes == (Code.max_steps,) * 2


# A glass: noisy labels and weak ridges.
GLASS = Pretraining(0.1, 0.01, delta=3.0, activation="softmax")


def test_deep_search_in_a_glass():
    found = trained(GLASS, Finetuning(3.0, 0.05), runs=4, moves=4)
    loss = {search: found.searches[search]["train_loss"] for search in SEARCHES}
    for search in SEARCHES:
        assert (loss["deep"] <= loss[search]).all()
    assert (loss["deep_random"] <= loss["random"]).all()
    np.testing.assert_allclose(loss["random"], found.random_loss.min(1), rtol=1e-12)
    assert found.lowest is found.searches["deep"]
    # Of eight random starts some end elsewhere, and the sentence says how many.
    worse = found.worse_starts
    assert 0 < worse["count"] <= 8 and worse["overlap"] < worse["lowest_overlap"] and worse["excess"] > 1e-3
    assert f"{worse['count']} of 8 random starts" in str(found.verdict)
    for rows in found.searches.values():
        np.testing.assert_allclose(rows["train_loss"] - rows["train_error"], 0.05 * rows["q"], rtol=1e-10)
        np.testing.assert_allclose(rows["overlap"], rows["m"] / np.sqrt(rows["q"]), rtol=1e-10)


# ---- E' from the overlaps --------------------------------------------------------------------------------------


def _drawn_error(fine, frozen, m, q, n=100_000):
    """E' by drawing everything."""
    keys = jax.random.split(jax.random.key(3), 3)
    r, k, t = *m.shape, fine.tokens
    size = frozen.Q0 + fine.delta / 2
    one, two = (samples.label_noise(key, 1.0, t, n) for key in keys[:2])
    y0 = np.sqrt(size) * one
    zw = frozen.overlap / size * y0 + np.sqrt(frozen.norm - frozen.overlap**2 / size) * two
    law = np.block([[np.eye(k), m.T], [m, q]])
    both = np.einsum("ij,jan->ian", np.linalg.cholesky(law), jax.random.normal(keys[2], (k + r, t, n)))
    labels, out = (f + np.einsum("kan,kbn->abn", c, c) for f, c in ((y0, both[:k]), (zw, both[k:])))
    return float(jnp.mean(jnp.sum((fine.activation(out) - fine.activation(labels)) ** 2, (0, 1))))


@pytest.mark.parametrize("activation", [Softmax(1.0), Identity(), Custom(jnp.tanh)], ids=lambda a: a.name)
@pytest.mark.parametrize("ranks", [(1, 1), (2, 1), (2, 2), (1, 2)])
def test_error_follows_from_the_overlaps(activation, ranks):
    fine = Finetuning(3.0, 0.1, delta=0.5, activation=activation, tokens=3, rank=ranks[0], teacher_rank=ranks[1])
    frozen, rng = FrozenMap(1.3, 1.2, 2.0), np.random.default_rng(0)
    m = rng.normal(size=ranks) / 2
    root = rng.normal(size=(ranks[0], ranks[0])) / 2
    q = m @ m.T + root @ root.T
    d = node_dimension(activation, 3, ranks)
    nodes = jax.tree_util.tree_map(lambda a: a[0], gaussian_nodes(d, 2**15, 1, 0, ())) if d else None
    error = float(overlap_error(fine, frozen, m, q, nodes))
    assert error == pytest.approx(_drawn_error(fine, frozen, m, q), rel=0.015)
    # The theory's own formula where the matrices are as it has them.
    m, q = 0.6 * np.eye(*ranks), 0.8 * np.eye(ranks[0])
    if ranks[0] > ranks[1]:
        order = from_norm(jnp.array([1.0, 1.0]), jnp.array([0.6, 0.0]), jnp.array([0.8, 0.8]), 1.0)
    else:
        order = from_norm(1.0, 0.6, 0.8, 1.0)
    theory = finetuning_error(activation, 3, 2.25, 1.3, 1.2, order, nodes, ranks)
    assert float(overlap_error(fine, frozen, m, q, nodes)) == pytest.approx(float(theory), rel=1e-9)


def test_error_does_not_depend_on_how_the_update_is_written():
    w, teacher = np.random.default_rng(1).normal(size=(2, 1, 30, 2))
    turned = overlap_matrices(np.concatenate([w, -w[:, :, ::-1]]), teacher[0])
    m, q = turned
    np.testing.assert_allclose(m[0], m[1], atol=1e-12)
    np.testing.assert_allclose(np.abs(q[0]), np.abs(q[1]), atol=1e-12)
    assert (np.diagonal(m[0]) >= 0).all() and abs(m[0][0, 1]) == 0


# ---- interface -------------------------------------------------------------------------------------------------


def test_a_run_depends_on_seed_and_index_alone(smooth, capsys):
    two = trained(SMOOTH, Finetuning(3.0, 0.05), runs=2, progress=True)
    assert "14/14" in capsys.readouterr().err  # 3 informed, 2 random and 2 deep descents in each of two runs
    for name, values in two.lowest.items():
        np.testing.assert_array_equal(values, smooth.lowest[name][:2])
    other = trained(SMOOTH, Finetuning(3.0, 0.05), runs=1, seed=1)
    assert other.lowest["m"][0] not in smooth.lowest["m"]
    assert np.isnan(other.stderr("deep", "m")) and other.summary()["deep"]["m"]["stderr"] is None
    entry = smooth.summary()["random"]["m"]
    assert entry == {"mean": smooth.mean("random", "m"), "stderr": smooth.stderr("random", "m")}


def test_nothing_is_compiled_anew_for_another_run():
    options = dict(dimension=40, starts=3, moves=2)
    trained(LINEAR, Finetuning(3.0, 0.3), runs=1, **options)
    programs: tuple[Any, ...] = _descents._start, _descents._advance
    before = [program._cache_size() for program in programs]
    trained(LINEAR, Finetuning(3.0, 0.2), runs=3, seed=4, **options)
    assert [program._cache_size() for program in programs] == before


def test_higher_ranks_have_their_spare_directions():
    found = trained(LINEAR, Finetuning(3.0, 0.3, rank=2), dimension=40, runs=2)
    for name in ("m", "q", "q_spare", "overlap", "test_error"):
        assert np.isfinite(found.lowest[name]).all()
    assert (found.lowest["q_spare"] < found.lowest["q"]).all()


def test_interrupt_keeps_the_finished_runs(monkeypatch):
    real, count = on_channel._one_run, []

    def one_run(*args):
        count.append(1)
        if len(count) > 2:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(on_channel, "_one_run", one_run)
    with pytest.raises(SimulationInterrupted) as stop:
        trained(LINEAR, Finetuning(3.0, 0.3), dimension=40, runs=5)
    assert stop.value.finished.random_loss.shape == (2, 2)
    monkeypatch.setattr(on_channel, "_one_run", lambda *_: one_run())
    with pytest.raises(KeyboardInterrupt) as stop:
        trained(LINEAR, Finetuning(3.0, 0.3), dimension=40, runs=5)
    assert type(stop.value) is KeyboardInterrupt


def test_minima_that_are_none_are_marked(monkeypatch):
    monkeypatch.setattr(searches, "descend", lambda *a: descend(*a, max_steps=2))
    found = trained(LINEAR, Finetuning(3.0, 0.3), dimension=40, runs=2)
    assert set(found.codes["random"]) == {Code.max_steps}
    with pytest.raises(SolveError, match=r"finetuning: max_steps .* random search, in runs \[0, 1\] of 2"):
        found.mean("random", "m")
    assert found.summary(only_converged=True)["random"]["m"]["mean"] is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(dimension=9), "dimension = 9 is out of range; allowed: 10 to 10000"),
        (dict(runs=0), "runs = 0"),
        (dict(starts=0), "starts = 0"),
        (dict(moves=-1), "moves = -1 is out of range; allowed: 0 to 1000"),
        (dict(dimension=10_000, starts=9), "dimension = 10000 needs .* GiB .*; allowed: .* dimension <= "),
        (dict(test_samples=5), "test_samples has no meaning for stage = 'finetuning'; allowed: for 'both' only"),
        (dict(map_starts=2), "map_starts has no meaning"),
        (dict(memory={}), "memory has no meaning"),
    ],
)
def test_bad_options_are_refused_by_name(options, message):
    with pytest.raises(SettingError, match=message):
        trained(LINEAR, Finetuning(3.0, 0.1), **options)


def test_bad_settings_are_refused_by_name():
    with pytest.raises(SettingError, match=r"finetuning.alpha = 0.001 rounds to none at all; allowed: .* >= 0.025"):
        trained(LINEAR, Finetuning(0.001, 0.1), dimension=20)
    with pytest.raises(SettingError, match=r"finetuning.lam has shape .*not one number"):
        trained(LINEAR, Finetuning(3.0, jnp.array([0.1, 0.2])))
    with pytest.raises(SettingError, match="search = 'lowest' is unknown; allowed: informed, random"):
        trained(LINEAR, Finetuning(3.0, 0.1), dimension=40, runs=1).mean("lowest", "m")
    with pytest.raises(SettingError, match="stage = 'second' is unknown; allowed: both, finetuning"):
        simulate(Setting(LINEAR, Finetuning(3.0, 0.1)), stage="second")  # pyright: ignore
    with pytest.raises(SettingError, match="moves has no meaning for stage = 'both'"):
        simulate(Setting(LINEAR, Finetuning(3.0, 0.1)), moves=2)  # pyright: ignore
    with pytest.raises(SolveError, match="too_narrow"):
        trained(Pretraining(0.1, 0.1, kappa=0.05, activation="identity"), Finetuning(3.0, 0.1))


# ---- both stages, whatever the theory says ---------------------------------------------------------------------


def test_training_of_both_stages_does_not_need_the_theory(monkeypatch):
    def fail(*_, **__):
        raise SolveError("finetuning", Code.stalled)

    monkeypatch.setattr(solution, "predict", fail)
    setting = Setting(LINEAR, Finetuning(3.0, 0.1, recalibration="noise"), NUMERICS)
    frozen = solution.pretrain(LINEAR, NUMERICS)
    result = simulate(setting, dimension=20, runs=1, test_samples=100)
    b = float(frozen.values["M"] / frozen.values["Q"])
    assert float(get(result.setting, "finetuning.recalibration")) == pytest.approx(b)
    found = trained(LINEAR, Finetuning(3.0, 0.1, recalibration="noise"), dimension=40, runs=1)
    assert found.converged("deep").all()
    with pytest.raises(SolveError):  # the b of least E' does need it
        simulate(Setting(LINEAR, Finetuning(3.0, 0.1, recalibration="error"), NUMERICS), dimension=20)


def test_several_starts_of_the_map():
    setting = Setting(Pretraining(0.1, 0.003, activation="softmax", delta=4.0), Finetuning(2.0, 0.1))
    memory: dict = {}
    one, three = (
        simulate(setting, dimension=16, runs=2, starts=1, map_starts=k, test_samples=100, memory=memory) for k in (1, 3)
    )
    assert len(memory) == 4 and "map_start_spread" not in one.pretraining
    spread = three.pretraining["map_start_spread"]
    assert (spread >= 0).all() and spread.max() > 1e-3
    loss = three.pretraining["train_loss"]
    assert (loss <= one.pretraining["train_loss"]).all()
    assert (one.pretraining["train_loss"] <= loss * (1 + spread) * (1 + 1e-12)).all()
    assert three.summary(only_converged=True)["pretraining"]["map_start_spread"]["mean"] == pytest.approx(spread.mean())
