"""A user's layer: estimates against known worlds, the law of pre-activations, files that are no layers."""

import json
from types import SimpleNamespace

import jax
import numpy as np
import pytest

import lorastate as ls
from lorastate.cli import main as cli
from lorastate.errors import SettingError
from lorastate.model.activation import Identity, Softmax
from lorastate.practice import files
from lorastate.practice.forecast import Lora, equivalent
from lorastate.practice.labels import Moments
from lorastate.practice.law import law_of, preactivation
from lorastate.practice.layer import layer_of
from lorastate.practice.tokens import looks_standard, map_size, standard_of

RNG = np.random.default_rng
D, T, N = 60, 3, 400


def drawn(seed=0, strength=1.0, noise=0.5, tilt=0.7, n=N, dimension=D, tokens=T):
    """A world: teacher S*, a map that knows a part of it, tokens, labels of the first half of the inputs."""
    rng = RNG(seed)
    W = rng.standard_normal((2, dimension, dimension))
    base, other = (w @ w.T / dimension for w in W)
    S = tilt * base + 0.2 * other
    x, w = rng.standard_normal((n, tokens, dimension)), np.sqrt(strength) * rng.standard_normal(dimension)
    g = np.sqrt(noise / 2 / 2) * rng.standard_normal((n, tokens, tokens))
    chi = x @ w / np.sqrt(dimension)
    y = preactivation(x, base) + g + g.swapaxes(1, 2) + chi[:, :, None] * chi[:, None]
    size = noise / 2 + np.sum(base**2) / dimension
    truth = Moments(size, np.sum(S * base) / dimension, np.sum(S**2) / dimension, w @ w / dimension)
    return SimpleNamespace(S=S, x=x, y=y, base=base, truth=truth)


# ---- layer, tokens, law --------------------------------------------------------------------------------------------


def test_one_layer_from_three_kinds_of_weights():
    rng = RNG(0)
    W, B = rng.standard_normal((D, 2 * D)), rng.standard_normal((D, D))
    S = W @ W.T / np.sqrt(2 * D * D)
    assert np.allclose(layer_of({"W": W}, D).S, S) and np.allclose(layer_of({"S": S}, D).S, S)
    assert layer_of({"W": W}, D).lost == pytest.approx(0, abs=1e-12) and layer_of({"W": W}, D).negative < 1e-12
    # Logits of queries and keys are those of S and of what is lost.
    query, key = rng.standard_normal((2, D, 4))
    found = layer_of({"W_Q": query, "W_K": key}, D)
    x = rng.standard_normal((5, T, D))
    logits = (x @ query) @ (x @ key).swapaxes(1, 2) / 2
    symmetric = x @ found.S @ x.swapaxes(1, 2) / np.sqrt(D)
    assert np.allclose((logits + logits.swapaxes(1, 2)) / 2, symmetric)
    A = query @ key.T
    assert found.lost == pytest.approx(np.sum((A - A.T) ** 2) / (4 * np.sum(A**2)))
    assert layer_of({"S": B - B.T + 1e-9 * np.eye(D)}, D).lost == pytest.approx(1)


def test_heads_may_share_keys():
    query, key = RNG(1).standard_normal((D, 8)), RNG(2).standard_normal((D, 4))
    for head, (q, k) in enumerate(((0, 0), (2, 0), (4, 2), (6, 2))):
        one = layer_of({"W_Q": query[:, q : q + 2], "W_K": key[:, k : k + 2]}, D)
        assert np.allclose(layer_of({"W_Q": query, "W_K": key}, D, 4, head).S, one.S)
    with pytest.raises(ls.SettingError, match=r"head = 4 of heads = 4 is out of range"):
        layer_of({"W_Q": query, "W_K": key}, D, 4, 4)
    with pytest.raises(ls.SettingError, match=r"W_K has 4 columns and W_Q 1 heads of 8"):
        layer_of({"W_Q": query, "W_K": key}, D)


@pytest.mark.parametrize("kind", ["diagonal", "full"])
def test_standardised_tokens_make_the_same_logits(kind):
    rng = RNG(3)
    root = np.diag(rng.uniform(0.5, 2, D)) + (0.1 * rng.standard_normal((D, D)) if kind == "full" else 0)
    x, S = rng.standard_normal((6 * D, D)) @ root, rng.standard_normal((D, D))
    S = S + S.T
    found = standard_of(x, kind)
    y = found.tokens(x)
    assert np.allclose(y.mean(0), 0) and np.allclose(y.var(0), 1)
    assert kind == "diagonal" or np.allclose(np.cov(y, rowvar=False, bias=True), np.eye(D))
    centred = x - x.mean(0)
    assert np.allclose(y @ found.matrix(S) @ y.T, centred @ S @ centred.T)


def test_standard_tokens_are_left_alone():
    rng = RNG(4)
    for n in (D // 2, 2 * D, 20 * D):
        assert all(looks_standard(rng.standard_normal((n, D))) for _ in range(5))
        assert not looks_standard(1.3 * rng.standard_normal((n, D)))
        assert not looks_standard(rng.standard_normal((n, D)) + 1.0)
    many = rng.standard_normal((20 * D, D))
    many[:, 0] *= 3
    assert not looks_standard(many)
    assert standard_of(rng.standard_normal((3 * D, D))).kind == "none"
    assert standard_of(2 * rng.standard_normal((3 * D, D))).kind == "full"
    assert standard_of(2 * rng.standard_normal((D, D))).kind == "diagonal"


def test_size_of_the_map_without_the_noise_of_the_covariance():
    """Q of the map moved along with an estimated covariance has a bias of Tr(S)^2/(n D), which is taken off."""
    rng = RNG(5)
    W = rng.standard_normal((D, D))
    S, n = W @ W.T / D, 5 * D
    sizes = [map_size(S, standard_of(rng.standard_normal((n, D)), "full"), n) for _ in range(40)]
    Q = np.sum(S**2) / D
    assert np.mean(sizes) == pytest.approx(Q, rel=0.01)
    assert np.trace(S) ** 2 / (n * D) > 0.08 * Q  # it would have been seen


def test_law_of_gaussian_tokens_is_accepted():
    """Ten layers of Gaussian tokens, large samples at a small D: the finite layer's own law is no offence."""
    verdicts = []
    for seed in range(10):
        world = drawn(seed, n=1000, dimension=30)
        Q = world.truth.norm
        verdicts.append(law_of(world.x, world.S, standard_of(world.x[:, 0], "none"), Q, seed % 2 == 0, seed).verdict)
    assert verdicts.count("Gaussian") >= 9


@pytest.mark.parametrize("case", ["heavy tails", "alike tokens", "few directions"])
def test_law_of_other_tokens_is_refused(case):
    world, rng = drawn(), RNG(7)
    x = world.x
    if case == "heavy tails":  # sequences of different loudness
        x = x * np.sqrt(rng.exponential(size=(N, 1, 1)))
    elif case == "alike tokens":  # tokens of one sequence have something in common
        x = (x + rng.standard_normal((N, 1, D))) / np.sqrt(2)
    else:  # one of a dozen clusters each
        x = rng.standard_normal((12, D))[rng.integers(12, size=(N, T))] + 0.1 * x
    standard = standard_of(x.reshape(-1, D), "diagonal")
    found = law_of(standard.tokens(x), standard.matrix(world.S), standard, map_size(world.S, standard, N * T), False)
    assert found.verdict == "not Gaussian" and found.p_value <= 0.02


# ---- forecast ------------------------------------------------------------------------------------------------------

NUMERICS = ls.Numerics(512, 1024, 2)


@pytest.mark.parametrize("activation", ["identity", "softmax"])
def test_equivalent_world(activation):
    """E' of a setting from L, M and Q of its frozen map alone, whatever the unit of the pre-activations."""
    # Of one kind with the equivalent ones, and one program: an atom, learned by the identity, badly here.
    base = {"law": "atoms", "weights": [1.0], "values": [1.3]}
    pre = ls.Pretraining(0.1, 0.05, delta=0.4, activation="identity", tokens=2, base=base)
    fine, b, lam = ls.Finetuning(6.0, 1.2, recalibration=1.2, activation=activation), 1.2, 1.2
    direct = ls.predict(ls.Setting(pre, fine, NUMERICS))
    assert direct.symmetry == "replica symmetric"
    L, M, Q = float(pre.Q0) + 0.2, float(direct.pretraining["M"]), float(direct.pretraining["Q"])
    for s in (1.0, 0.5):
        kind = Identity() if activation == "identity" else Softmax(1 / s)
        ridge, unit = (lam * s, s**2) if activation == "identity" else (lam / s, 1.0)
        moments = Moments(L * s**2, M * s**2, Q * s**2, s)
        other = equivalent(moments, Lora(100, 600, ridge, 1, 1), kind, 2, {"inputs": "fresh"}, b, NUMERICS)
        found = ls.predict(other)
        assert unit * float(found.test_error) == pytest.approx(unit * float(direct.test_error), rel=2e-5)
        assert float(found.effective_noise) == pytest.approx(float(direct.effective_noise), rel=1e-5)
        assert float(found.overlap) == pytest.approx(float(direct.overlap), abs=2e-5)


def test_no_forecast_without_ground():
    lora, fresh = Lora(100, 300, 0.1, 1, 1), {"inputs": "fresh"}
    for moments, words in (
        (Moments(2, -0.1, 1, 1), "does not go with"),
        (Moments(2, 1, 1, np.nan), "do not show the update"),
    ):
        with pytest.raises(ls.SettingError, match=words):
            equivalent(moments, lora, Softmax(), 3, fresh, 1.0, NUMERICS)


# ---- all of it -----------------------------------------------------------------------------------------------------


@pytest.mark.solve
def test_a_layer_of_a_simulated_world():
    """A trained layer, the labels that its LoRA sees: estimates cover the truth."""
    world = drawn(2, n=900, tokens=2)
    arrays = {"S": world.S, "X": world.x, "labels": world.y[:300]}
    found = ls.assess(arrays, activation="identity", ridge=0.2, numerics=NUMERICS, draws=12)
    assert found.law.verdict == "Gaussian" and found.standard.kind == "none"
    assert pytest.approx(world.truth.norm) == found.Q
    for (value, bar), true in (
        (found.effective_noise, world.truth.effective_noise()),
        (found.least_noise, world.truth.effective_noise(world.truth.best_scale)),
        (found.best_scale, world.truth.best_scale),
        (found.strength, world.truth.strength),
    ):
        assert bar > 0 and abs(value - true) < 4 * bar
    plain, noise, best, chosen = found.forecasts
    setting = equivalent(world.truth, found.lora, Identity(), 2, {"inputs": "fresh"}, 1.0, NUMERICS)
    true = world.truth.strength**2 * float(ls.predict(setting).test_error)
    assert abs(plain.test_error - true) < 4 * plain.stderr and plain.stderr < 0.2 * plain.test_error
    assert best.test_error <= min(plain.test_error, noise.test_error) + 1e-4 and chosen.inputs == "selected"
    assert noise.b == pytest.approx(found.best_scale[0])
    # The frozen error is measured on the examples and not fitted.
    assert abs(found.frozen_error[0] - plain.frozen) < 4 * found.frozen_error[1]
    # Selection: the smallest outputs among inputs without labels, no input twice.
    sizes = np.sum(preactivation(world.x, world.S) ** 2, (1, 2))
    assert len(set(found.selected)) == len(found.selected) == 300 and found.selected.min() >= 300
    assert np.all(np.diff(sizes[found.selected]) >= 0)
    json.dumps(found.summary(), allow_nan=False)


def test_without_labels_and_with_a_list_of_tokens(tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("JAX_ENABLE_X64", raising=False)
    world = drawn(3, n=100)
    rng = RNG(0)
    W = rng.standard_normal((D, D))
    path, other = tmp_path / "layer.npz", tmp_path / "tokens.npz"
    np.savez(path, W=W)
    np.savez(other, X=world.x.reshape(-1, D))
    assert cli.main(["practice", str(path), str(other), "--tokens", "3", "--examples", "7", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    S = W @ W.T / D
    sizes = np.sum(preactivation(world.x, S) ** 2, (1, 2))
    assert facts["selected"] == np.argsort(sizes)[:7].tolist()
    assert facts["Q"] == pytest.approx(np.sum(S**2) / D) and facts["labelled"] is None and facts["forecasts"] == []
    assert cli.main(["practice", str(path), str(other), "--tokens", "3", "--examples", "7"]) == 0
    page = capsys.readouterr().out
    assert "Gaussian, as the theory assumes" in page and "No labels" in page and "7 inputs of X" in page


# ---- files ---------------------------------------------------------------------------------------------------------


def saved(tmp_path, name="layer.npz", **arrays):
    path = tmp_path / name
    np.savez(path, **arrays)
    return path


GOOD = {"S": np.eye(4), "X": np.ones((30, 2, 4))}
BAD = {
    "no weights": ({"X": GOOD["X"]}, "the weights are none of them"),
    "two kinds": ({**GOOD, "W": np.ones((4, 4))}, "the weights are W, S; allowed"),
    "half": ({"X": GOOD["X"], "W_Q": np.ones((4, 2))}, "the weights are W_Q; allowed"),
    "no tokens": ({"S": np.eye(4)}, "the token embeddings X are missing"),
    "other width": ({**GOOD, "S": np.eye(5)}, r"S has shape \(5, 5\); allowed: \(4, 4\)"),
    "zero": ({**GOOD, "S": np.zeros((4, 4))}, "the map of S is zero"),
    "huge": ({**GOOD, "S": 1e200 * np.eye(4)}, r"S has an entry of size 1e\+200; allowed: up to 1e\+12"),
    "not finite": ({**GOOD, "S": np.diag([1, np.nan, 1, np.inf])}, "S has 2 entries that are not finite"),
    "words": ({**GOOD, "S": np.array([["a"]])}, "S is not an array of real numbers"),
    "complex": ({**GOOD, "S": 1j * np.eye(4)}, "S is not an array of real numbers"),
    "long inputs": ({**GOOD, "X": np.ones((30, 9, 4))}, r"shape \(30, 9, 4\); allowed: .* T from 2 to 8"),
    "few inputs": ({**GOOD, "X": np.ones((3, 2, 4))}, r"shape \(3, 2, 4\); allowed: .* N >= 20"),
    "no inputs": ({**GOOD, "X": np.ones((60, 4))}, "tokens without inputs; allowed"),
    "no motion": (GOOD, "do not move at all"),
    "labels": ({**GOOD, "labels": np.ones((30, 2))}, r"labels have shape \(30, 2\)"),
    "many labels": ({**GOOD, "labels": np.ones((40, 2, 2))}, "there are 40 labels for 30 inputs"),
    "other labels": ({**GOOD, "labels": np.ones((30, 3, 3))}, "inputs of 2 tokens, labels .* say 3"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_arrays(tmp_path, case):
    arrays, words = BAD[case]
    with pytest.raises(ls.SettingError, match=words) as caught:
        ls.assess(saved(tmp_path, **arrays))
    assert "\n" not in str(caught.value)


def test_bad_files(tmp_path):
    good = saved(tmp_path, **GOOD)
    broken, text, none = tmp_path / "broken.npz", tmp_path / "layer.txt", tmp_path / "none.npz"
    broken.write_bytes(good.read_bytes()[:100])
    text.write_text("S")
    np.savez(none, weights=np.eye(3))
    objects = saved(tmp_path, "objects.npz", S=np.array([{}], dtype=object))
    for path, words in (
        (tmp_path / "absent.npz", "is not there"), (text, "is no file of arrays"), (broken, "cannot be read"),
        (none, "has none of W, S, W_Q, W_K, X, labels; there are weights"), (objects, "cannot be read"),
        ([good, good], "an earlier file has too"),
    ):  # fmt: skip
        with pytest.raises(ls.SettingError, match=words) as caught:
            ls.assess(path)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "options, words",
    [
        ({"standardise": "white"}, "standardise = 'white' is unknown"),
        ({"standardise": "full"}, "needs 120 tokens of 60 entries and X has 60"),
        ({"rank": 5}, "rank = 5 is out of range"),
        ({"ridge": 0.0}, "ridge = 0.0 is out of range"),
        ({"activation": "relu"}, "practice.activation = 'relu' is unknown"),
        ({"score": "loss"}, "score = 'loss' is unknown"),
        ({"activation": "identity", "score": "without_shift"}, "score = 'without_shift' is unknown here"),
        ({"examples": 0}, "examples = 0 is out of range"),
        ({"update_size": -1.0}, "update_size = -1.0 is out of range"),
    ],
)
def test_bad_options(options, words):
    x = RNG(0).standard_normal((20, 3, D))
    with pytest.raises(ls.SettingError, match=words):
        ls.assess({"S": np.eye(D), "X": x}, **options)
    with pytest.raises(ls.SettingError, match="array 'weights' is unknown"):
        ls.assess({"weights": np.eye(D), "X": x})


def test_safetensors(tmp_path):
    """Names of a checkpoint, transposed as PyTorch keeps them, bfloat16 included."""
    jax_format = pytest.importorskip("safetensors.flax")
    rng, path = RNG(0), tmp_path / "model.safetensors"
    one, two = ({f"layers.{k}.attn.{n}_proj.weight": rng.standard_normal((4, 8)) for n in "qk"} for k in range(2))
    stored = {name: jax.numpy.asarray(value, jax.numpy.bfloat16) for name, value in (one | two).items()}
    jax_format.save_file(stored, path)
    with pytest.raises(ls.SettingError, match="has 2 arrays for W_Q"):
        files.read([path])
    found = files.read([path], "layers.1.")
    assert sorted(found) == ["W_K", "W_Q"]
    assert np.allclose(found["W_Q"], two["layers.1.attn.q_proj.weight"].T, rtol=1e-2)
    with pytest.raises(ls.SettingError, match="has none of"):
        files.read([path], "layers.9")
    bad = tmp_path / "bad.safetensors"
    bad.write_bytes(b"not a file of tensors")
    with pytest.raises(ls.SettingError, match="cannot be read"):
        files.read([bad])


def test_safetensors_missing(tmp_path, monkeypatch):
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"")

    def absent(name):
        raise ImportError(name)

    monkeypatch.setattr(files.importlib, "import_module", absent)
    with pytest.raises(SettingError, match=r"needs the package safetensors.*pip install 'lorastate\[practice\]'"):
        files.read([path])


def test_numbers_are_doubles():
    assert files.numbers("S", jax.numpy.ones((2, 2), jax.numpy.bfloat16)).dtype == np.float64
