"""Settings files, single fields by their path, and which fields follow which."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lorastate.errors import SettingError
from lorastate.model.activation import Identity, Softmax
from lorastate.model.channel.frozen_map import FrozenMap
from lorastate.model.channel.inputs import Mixed, Reused
from lorastate.setting.fields import KEYS, continuous_fields
from lorastate.setting.files import load_setting, setting_from_dict, setting_to_dict
from lorastate.setting.numerics import Numerics
from lorastate.setting.paths import get, replace
from lorastate.setting.stages import Finetuning, Pretraining, Setting
from lorastate.solution.gradients import gradient

jax.config.update("jax_enable_x64", True)

MINIMAL = """
[pretraining]
alpha = 0.1
lam = 0.01
[finetuning]
alpha = 3.0
lam = 0.05
"""
PLAIN = {"pretraining": {"alpha": 0.1, "lam": 0.01}, "finetuning": {"alpha": 3.0, "lam": 0.05}}


def write(tmp_path, text):
    path = tmp_path / "setting.toml"
    path.write_text(text)
    return path


def to_toml(data):
    def word(value):
        return f'"{value}"' if isinstance(value, str) else repr(value)

    sections = (
        f"[{name}]\n" + "".join(f"{k} = {word(v)}\n" for k, v in section.items()) for name, section in data.items()
    )
    return "\n".join(sections)


@pytest.fixture
def softmax():
    return Setting(Pretraining(0.1, 0.01), Finetuning(3.0, 0.05))


@pytest.fixture
def identity():
    return Setting(Pretraining(0.1, 0.01, activation="identity"), Finetuning(3.0, 0.05))


# Loading.


def test_defaults(tmp_path):
    setting = load_setting(write(tmp_path, MINIMAL))
    assert setting.finetuning.delta is None and setting.finetuning.activation is None
    assert setting_to_dict(setting) == {
        "pretraining": {"activation": "softmax", "beta": 1.0, "tokens": 3, "alpha": 0.1, "kappa0": 1.0,
                        "kappa": 1.0, "delta": 0.5, "lam": 0.01},
        "finetuning": {"activation": "softmax", "beta": 1.0, "alpha": 3.0, "lam": 0.05, "rank": 1, "teacher_rank": 1,
                       "delta": 0.5, "tokens": 3, "inputs": "fresh", "recalibration": 1.0, "adapter_factor": 1.0},
        "numerics": {"nodes": 16384, "finetuning_nodes": 65536, "replicas": 8, "seed": 0, "tolerance": 1e-10,
                     "max_steps": 200, "samples": 16, "symmetry": "auto", "thinning": 1},
    }  # fmt: skip


@pytest.mark.parametrize("name", ["softmax", "identity"])
def test_examples_load(name, request):
    setting = load_setting(request.config.rootpath / "examples" / f"{name}.toml")
    assert setting.pretraining.activation.name == setting.finetuning_resolved.activation.name == name
    assert float(setting.pretraining.lam) == 0.01 and float(setting.finetuning.lam) == 0.05
    assert setting_to_dict(setting)["numerics"] == setting_to_dict(setting_from_dict(PLAIN))["numerics"]


def test_windows_text_loads(tmp_path):
    path = tmp_path / "setting.toml"
    path.write_bytes(b"\xef\xbb\xbf" + MINIMAL.replace("\n", "\r\n").encode())
    assert float(load_setting(path).finetuning.alpha) == 3.0


@pytest.mark.parametrize(
    "line, section, words",
    [
        ("lamda = 1", "pretraining", ["pretraining.lamda", "did you mean lam?", "kappa0"]),
        ("lora_alpha = 1", "finetuning", ["finetuning.lora_alpha", "did you mean alpha?"]),
        ("xyzzy = 1", "finetuning", ["finetuning.xyzzy", "allowed in [finetuning]", "inputs"]),
        ('kappa = "one"', "pretraining", ["pretraining.kappa", "'one'", "not a number"]),
        ("kappa = nan", "pretraining", ["pretraining.kappa", "nan", "finite"]),
        ("delta = inf", "pretraining", ["pretraining.delta", "inf", "finite"]),
        ("kappa = 1e400", "pretraining", ["pretraining.kappa", "inf", "finite"]),
        ("kappa = 1" + 400 * "0", "pretraining", ["pretraining.kappa", "out of range"]),
        ("kappa = [1.0, 2.0]", "pretraining", ["pretraining.kappa", "not a single value"]),
        ("kappa = 1979-05-27", "pretraining", ["pretraining.kappa", "not a number"]),
        ("kappa = true", "pretraining", ["pretraining.kappa", "True", "not a number"]),
        ("kappa = 0", "pretraining", ["pretraining.kappa", "kappa > 0"]),
        ("kappa0 = 0", "pretraining", ["pretraining.kappa0 = 0.0", "kappa0 > 0"]),
        ("delta = -0.1", "pretraining", ["pretraining.delta = -0.1", "delta >= 0"]),
        ("delta = -0.1", "finetuning", ["finetuning.delta = -0.1", "delta >= 0"]),
        ("beta = 0", "pretraining", ["pretraining.beta = 0.0", "beta > 0"]),
        ("beta = -1", "finetuning", ["finetuning.beta = -1.0", "beta > 0"]),
        ("tokens = 1", "pretraining", ["pretraining.tokens = 1", "2 to"]),
        ("tokens = 2.5", "pretraining", ["pretraining.tokens = 2.5", "whole number"]),
        ("tokens = true", "pretraining", ["pretraining.tokens = True", "whole number"]),
        ('activation = "relu"', "pretraining", ["pretraining.activation", "'relu'", "softmax", "identity"]),
        ("activation = 3", "finetuning", ["finetuning.activation", "softmax", "identity"]),
        ('inputs = "stale"', "finetuning", ["finetuning.inputs", "'stale'", "fresh"]),
        ("nodes = -1", "numerics", ["numerics.nodes = -1", "256"]),
        ("nodes = 1000", "numerics", ["numerics.nodes = 1000", "power of two"]),
        ("nodes = 1e4", "numerics", ["numerics.nodes = 10000.0", "whole number"]),
        ("replicas = 1", "numerics", ["numerics.replicas = 1", "2 to"]),
        ("seed = -1", "numerics", ["numerics.seed = -1"]),
        ("tolerance = nan", "numerics", ["numerics.tolerance = nan", "1e-13"]),
        ('tolerance = "tight"', "numerics", ["numerics.tolerance", "not a number"]),
        ("max_steps = 0", "numerics", ["numerics.max_steps = 0"]),
    ],
)
def test_bad_line(tmp_path, line, section, words):
    text = MINIMAL + "[numerics]\n"
    path = write(tmp_path, text.replace(f"[{section}]\n", f"[{section}]\n{line}\n"))
    with pytest.raises(SettingError) as error:
        load_setting(path)
    message = str(error.value)
    assert all(word in message for word in words), message
    assert "\n" not in message and len(message) < 300


@pytest.mark.parametrize(
    "text, words",
    [
        ("[pretraining]\nalpha = 0.1\nlam = \n", ["not a TOML file", "line 3"]),
        ("just words\n", ["not a TOML file", "line 1"]),
        ("[pretraining]\nalpha = 1\nalpha = 2\n", ["not a TOML file", "line 3"]),
        (f"x = {5000 * '1'}", ["not a TOML file"]),
        (f"x = {20000 * '['}", ["setting.toml"]),
        ("[pre-training]\n", ["unknown section 'pre-training'", "did you mean pretraining?"]),
        ("[zzz]\n", ["unknown section 'zzz'", "pretraining, finetuning, numerics"]),
        ("kappa0 = 1\n", ["unknown section 'kappa0'", "did you mean pretraining.kappa0?"]),
        ("pretraining = 3\n", ["pretraining = 3 is not a section"]),
        ("", ["pretraining.alpha is missing"]),
        ("[pretraining]\nalpha = 1\n", ["pretraining.lam is missing"]),
        ("[pretraining]\nalpha = 1\nlam = 1\n", ["finetuning.alpha is missing"]),
        ("[pretraining]\nalpha = 1\nlam = 1\n[finetuning]\nalpha = 1\n", ["finetuning.lam is missing"]),
    ],
)
def test_bad_file(tmp_path, text, words):
    with pytest.raises(SettingError) as error:
        load_setting(write(tmp_path, text))
    assert all(word in str(error.value) for word in words), str(error.value)


def test_unreadable_paths(tmp_path):
    with pytest.raises(SettingError, match=r"no settings file '.*nowhere\.toml'"):
        load_setting(tmp_path / "nowhere.toml")
    with pytest.raises(SettingError, match="is a directory"):
        load_setting(tmp_path)
    path = tmp_path / "binary.toml"
    path.write_bytes(b"# \xff\xfe")
    with pytest.raises(SettingError, match=r"byte 2 is not UTF-8"):
        load_setting(path)
    with open(path, "wb") as file:
        file.truncate(2**36)  # as long as a device without end, and as empty
    with pytest.raises(SettingError, match=r"has more than 1,000,000 bytes; allowed"):
        load_setting(path)


@pytest.mark.parametrize("section", ["pretraining", "finetuning"])
def test_zero_ridge_says_why(tmp_path, section):
    with pytest.raises(SettingError, match=rf"{section}\.lam = 0\.0.*lam > 0; zero is not allowed because"):
        load_setting(write(tmp_path, MINIMAL), [f"{section}.lam=0"])


# Overrides.


def test_overrides(tmp_path):
    path = write(tmp_path, MINIMAL)
    texts = [
        "pretraining.lam=0.02",
        "finetuning.lam = 1",
        "pretraining.activation=identity",
        "numerics.nodes=1024",
    ]
    setting = load_setting(path, [*texts, 'finetuning.inputs="fresh"', "pretraining.lam=0.03"])
    assert float(setting.pretraining.lam) == 0.03 and float(setting.finetuning.lam) == 1.0
    assert isinstance(setting.pretraining.activation, Identity) and setting.numerics.nodes == 1024


@pytest.mark.parametrize(
    "text, words",
    [
        ("pretraining.lam", ["'pretraining.lam'", "no '='", "section.key=value"]),
        ("lam=0.02", ["'lam'", "did you mean pretraining.lam or finetuning.lam?"]),
        ("=1", ["''", "not a section.key path"]),
        ("pretraining.=1", ["not a section.key path"]),
        ("pretraining.lamb=1", ["unknown key pretraining.lamb", "did you mean lam?"]),
        ("training.lam=1", ["unknown section 'training'", "did you mean pretraining?"]),
        ("pretraining.lam.x=1", ["unknown key pretraining.lam.x"]),
        ("pretraining.lam=", ["pretraining.lam=", "no readable value"]),
        ("pretraining.lam=.02", ["pretraining.lam=.02", "no readable value"]),
        ("pretraining.lam=1\nalpha = 2", ["no readable value"]),
        ("pretraining.lam=[1", ["no readable value"]),
        ("pretraining.lam=[1, 2]", ["pretraining.lam", "not a single value"]),
        ("pretraining.lam=small", ["pretraining.lam = 'small'", "not a number"]),
        ("pretraining.lam=nan", ["pretraining.lam = nan", "finite"]),
        ("pretraining.lam=true", ["pretraining.lam = True", "not a number"]),
    ],
)
def test_bad_override(tmp_path, text, words):
    with pytest.raises(SettingError) as error:
        load_setting(write(tmp_path, MINIMAL), [text])
    assert all(word in str(error.value) for word in words), str(error.value)


def test_switching_to_the_identity_drops_the_beta_of_the_file(tmp_path):
    path = write(tmp_path, MINIMAL.replace("[pretraining]\n", "[pretraining]\nbeta = 2.0\n"))
    setting = load_setting(path, ["pretraining.activation=identity"])
    assert isinstance(setting.finetuning_resolved.activation, Identity)
    with pytest.raises(SettingError, match=r"pretraining\.beta = 3 has no meaning"):
        load_setting(path, ["pretraining.activation=identity", "pretraining.beta=3"])
    # A stage with its own softmax keeps it.
    path = write(tmp_path, MINIMAL + 'activation = "softmax"\nbeta = 2.0\n')
    setting = load_setting(path, ["pretraining.activation=identity"])
    assert float(get(setting, "finetuning.beta")) == 2.0


# Fields that follow pre-training.


def test_untied_fields_follow_pretraining(tmp_path):
    path = write(tmp_path, MINIMAL)
    setting = load_setting(path, ["pretraining.beta=2", "pretraining.delta=0.1", "pretraining.tokens=4"])
    assert float(get(setting, "finetuning.beta")) == 2.0
    assert float(get(setting, "finetuning.delta")) == 0.1 and get(setting, "finetuning.tokens") == 4
    setting = load_setting(path, ["pretraining.beta=2", "finetuning.activation=softmax"])
    assert float(get(setting, "finetuning.beta")) == 2.0


def test_own_fields_stay(tmp_path):
    path = write(tmp_path, MINIMAL + "beta = 3.0\ndelta = 0.2\ntokens = 2\n")
    setting = load_setting(path, ["pretraining.beta=2", "pretraining.delta=0.1", "pretraining.tokens=4"])
    assert isinstance(setting.finetuning.activation, Softmax)
    assert [float(get(setting, f"finetuning.{key}")) for key in ("beta", "delta", "tokens")] == [3.0, 0.2, 2]


def test_own_beta_needs_a_softmax(tmp_path):
    with pytest.raises(SettingError, match=r"finetuning\.beta = 2 has no meaning for the identity"):
        load_setting(write(tmp_path, MINIMAL), ["pretraining.activation=identity", "finetuning.beta=2"])
    overrides = ["pretraining.activation=identity", "finetuning.activation=softmax"]
    setting = load_setting(write(tmp_path, MINIMAL), overrides)
    assert float(get(setting, "finetuning.beta")) == 1.0


def test_replace_moves_what_follows(softmax):
    moved = replace(softmax, "pretraining.delta", 0.3)
    assert float(get(moved, "finetuning.delta")) == 0.3
    cut = replace(softmax, "finetuning.delta", 0.2)
    assert float(get(replace(cut, "pretraining.delta", 0.3), "finetuning.delta")) == 0.2
    tied = replace(cut, "finetuning.delta", None)
    assert float(get(replace(tied, "pretraining.delta", 0.3), "finetuning.delta")) == 0.3
    cut = replace(replace(softmax, "finetuning.beta", 2.0), "pretraining.beta", 3.0)
    assert float(get(cut, "finetuning.beta")) == 2.0 and float(get(cut, "pretraining.beta")) == 3.0


# Single fields.


def test_continuous_fields(softmax, identity):
    without = (
        *(f"pretraining.{key}" for key in ("alpha", "kappa0", "kappa", "delta", "lam")),
        *(f"finetuning.{key}" for key in ("alpha", "lam", "delta", "recalibration", "adapter_factor")),
    )
    assert continuous_fields(identity) == without
    assert set(continuous_fields(softmax)) == {*without, "pretraining.beta", "finetuning.beta"}
    mixed = replace(softmax, "finetuning.activation", "identity")
    assert "pretraining.beta" in continuous_fields(mixed) and "finetuning.beta" not in continuous_fields(mixed)


@pytest.mark.parametrize("index", range(12))
def test_replace_changes_one_field(softmax, index):
    path = continuous_fields(softmax)[index]
    resolved = Setting(softmax.pretraining, softmax.finetuning_resolved, softmax.numerics)
    changed = replace(resolved, path, 0.37)
    before, after = setting_to_dict(resolved), setting_to_dict(changed)
    name, key = path.split(".")
    assert after[name].pop(key) == 0.37 == float(get(changed, path))
    del before[name][key]
    assert before == after


def test_replace_keeps_one_trace(softmax):
    traces = []

    @jax.jit
    def total(setting):
        traces.append(1)
        return sum(jnp.sum(leaf) for leaf in jax.tree.leaves(setting))

    resolved = Setting(softmax.pretraining, softmax.finetuning_resolved, softmax.numerics)
    total(resolved)
    for path in continuous_fields(resolved):
        for value in (1, 2.0, np.float32(0.5), np.float64(0.25), jnp.asarray(0.125)):
            total(changed := replace(resolved, path, value))
            assert all(leaf.dtype == jnp.float64 and not leaf.weak_type for leaf in jax.tree.leaves(changed))
    assert len(traces) == 1


def test_replace_is_differentiable(softmax):
    def square(value):
        return get(replace(softmax, "pretraining.beta", value), "finetuning.beta") ** 2

    assert float(jax.grad(square)(3.0)) == 6.0


@pytest.mark.parametrize(
    "path, value, message",
    [
        ("pretraining.lam", 0.0, r"pretraining\.lam = 0\.0 .*zero is not allowed"),
        ("pretraining.lam", "x", r"pretraining\.lam = 'x' is not a number"),
        ("pretraining.beta", -1.0, r"pretraining\.beta = -1\.0"),
        ("pretraining.beta", None, r"pretraining\.beta = None"),
        ("finetuning.beta", float("nan"), r"finetuning\.beta = nan"),
        ("finetuning.alpha", True, r"finetuning\.alpha = True"),
        ("numerics.nodes", 100, r"numerics\.nodes = 100"),
        ("pretraining.gamma", 1.0, r"unknown key pretraining\.gamma"),
        ("lam", 1.0, r"did you mean pretraining\.lam or finetuning\.lam"),
    ],
)
def test_replace_validates(softmax, path, value, message):
    with pytest.raises(SettingError, match=message):
        replace(softmax, path, value)


def test_beta_of_the_identity(identity):
    for path in ("pretraining.beta", "finetuning.beta"):
        with pytest.raises(SettingError, match="no meaning for the identity"):
            get(identity, path)
        with pytest.raises(SettingError, match="no meaning for the identity"):
            replace(identity, path, 1.0)


def test_static_fields(softmax):
    assert get(replace(softmax, "numerics.nodes", 1024), "numerics.nodes") == 1024
    assert get(replace(softmax, "pretraining.tokens", 4), "finetuning.tokens") == 4


# Round trip.

positive = st.floats(1e-12, 1e12)
nonnegative = st.one_of(st.just(0.0), positive)


@st.composite
def files(draw):
    def some(**choices):
        return {key: draw(value) for key, value in choices.items() if draw(st.booleans())}

    pre = {"alpha": draw(positive), "lam": draw(positive)}
    pre |= some(kappa0=positive, kappa=positive, delta=nonnegative, tokens=st.integers(2, 8))
    kind = draw(st.sampled_from(["softmax", "identity", None]))
    pre |= {} if kind is None else {"activation": kind}
    pre |= some(beta=positive) if kind != "identity" else {}
    fine = {
        "alpha": draw(positive),
        "lam": draw(positive),
        **some(delta=nonnegative, tokens=st.integers(2, 8)),
    }
    own = draw(st.sampled_from(["softmax", "identity", None]))
    fine |= {} if own is None else {"activation": own}
    fine |= some(beta=positive) if (own or kind) != "identity" else {}
    replicas = draw(st.integers(2, 64))
    numerics = some(seed=st.integers(0, 2**31 - 1), tolerance=st.floats(1e-13, 1e-3))
    numerics |= {"replicas": replicas, "nodes": replicas * 2 ** draw(st.integers(7, 12))}
    return {"pretraining": pre, "finetuning": fine, "numerics": numerics}


@settings(max_examples=60, deadline=None)
@given(data=files())
def test_round_trip(tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "round_trip.toml"
    path.write_text(to_toml(data))
    setting = load_setting(path)
    resolved = setting_to_dict(setting)
    for name, section in data.items():
        assert section.items() <= resolved[name].items()
        channel = {"label_noise", "reused_fraction", "rho", "pool", "score"}  # of other inputs than fresh ones
        assert set(resolved[name]) | {"beta"} == (set(KEYS[name]) | {"beta"}) - channel
    path.write_text(to_toml(resolved))
    again = load_setting(path)
    assert setting_to_dict(again) == resolved
    for field in continuous_fields(setting):
        assert float(get(setting, field)) == float(get(again, field))
    overrides = [f"{name}.{key}={value}" for name in resolved for key, value in resolved[name].items()]
    assert setting_to_dict(load_setting(path, overrides)) == resolved


def test_inputs_by_name_keep_the_options_of_both(softmax):
    mixed = replace(softmax, "finetuning.inputs", Mixed(0.3, "fresh"))
    assert float(get(replace(mixed, "finetuning.inputs", "mixed"), "finetuning.reused_fraction")) == 0.3
    assert get(replace(mixed, "finetuning.inputs", "reused"), "finetuning.label_noise") == "fresh"
    with pytest.raises(SettingError, match=r"finetuning\.rho is missing"):
        replace(mixed, "finetuning.inputs", "selected")


@pytest.mark.parametrize(
    "make",
    [
        lambda many: Pretraining(alpha=many, lam=0.1),
        lambda many: Pretraining(0.1, 0.1, beta=many),
        lambda many: Pretraining(0.1, 0.1, activation=Softmax(many)),
        lambda many: Pretraining(0.1, 0.1, task={"a": many}),
        lambda many: Finetuning(1.0, lam=many),
        lambda many: Finetuning(1.0, 0.1, recalibration=many),
        lambda many: Finetuning(1.0, 0.1, adapter_factor=many),
        lambda many: Finetuning(None, 0.1, inputs="selected", rho=many, pool=3.0),
    ],
)
def test_a_field_is_one_number(make):
    for many in ([0.1, 0.2], np.array([0.1]), []):
        with pytest.raises(SettingError, match=r"has shape \(\d,\), not one number .*allowed"):
            make(many)
    assert jax.vmap(lambda x: jax.tree.leaves(make(x))[0])(jnp.array([0.1, 0.2])).shape == (2,)


# Activations: a name changes no number, and nothing is said twice.


def both(pre, fine):
    """The beta of both stages, None for the identity, in Python and from a file."""
    python = Setting(Pretraining(0.1, 0.01, **pre), Finetuning(3.0, 0.05, **fine))
    file = setting_from_dict({"pretraining": {**PLAIN["pretraining"], **pre}, "finetuning": PLAIN["finetuning"] | fine})
    assert setting_to_dict(python) == setting_to_dict(file)
    return tuple(setting_to_dict(file)[stage].get("beta") for stage in ("pretraining", "finetuning"))


def test_a_softmax_by_name_takes_the_beta_that_is_there():
    softmax, identity = {"activation": "softmax"}, {"activation": "identity"}
    assert both({}, softmax) == (1.0, 1.0)
    assert both({"beta": 2.0}, softmax) == (2.0, 2.0)
    assert both({"beta": 2.0}, {}) == (2.0, 2.0)
    assert both({"beta": 2.0}, softmax | {"beta": 3.0}) == (2.0, 3.0)
    assert both({"beta": 2.0}, identity) == (2.0, None)
    assert both(identity, softmax) == (None, 1.0)
    assert both(identity, softmax | {"beta": 3.0}) == (None, 3.0)


def test_a_softmax_alone_has_beta_1():
    z = jnp.arange(8.0).reshape(2, 2, 2)
    alone = Finetuning(3.0, 0.05, activation="softmax").activation
    np.testing.assert_array_equal(alone(z), Softmax(1.0)(z))
    for one, other in zip(alone.loss_terms(z, z), Softmax(1.0).loss_terms(z, z), strict=True):
        np.testing.assert_array_equal(one, other)


def test_replacing_an_activation_keeps_its_beta():
    setting = Setting(Pretraining(0.1, 0.01, beta=2.0), Finetuning(3.0, 0.05))
    for path in ("pretraining.activation", "finetuning.activation"):
        again = replace(setting, path, "softmax")
        assert [float(get(again, f"{stage}.beta")) for stage in ("pretraining", "finetuning")] == [2.0, 2.0]
        # What is named stays; its beta follows until it has one.
        assert float(get(replace(again, "pretraining.beta", 4.0), "finetuning.beta")) == 4.0
    own = replace(setting, "finetuning.beta", 3.0)
    assert float(get(replace(own, "finetuning.activation", "softmax"), "finetuning.beta")) == 3.0
    named = replace(setting, "finetuning.activation", "softmax")
    mixed = replace(named, "pretraining.activation", "identity")
    assert float(get(mixed, "finetuning.beta")) == 1.0
    assert get(replace(setting, "pretraining.activation", "identity"), "finetuning.activation").name == "identity"
    assert len(jax.tree.leaves(named.finetuning_resolved)) == len(jax.tree.leaves(setting.finetuning_resolved))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Pretraining(0.1, 0.01, activation=Softmax(2.0), beta=3.0), ["pretraining.beta = 3.0", "one of them"]),
        (lambda: Finetuning(3.0, 0.05, activation=Softmax(2.0), beta=3.0), ["finetuning.beta = 3.0", "one of them"]),
        (lambda: Pretraining(0.1, 0.01, activation=Identity(), beta=3.0), ["pretraining.beta = 3.0", "one of them"]),
        (lambda: Pretraining(0.1, 0.01, activation=jnp.tanh, beta=3.0), ["pretraining.beta = 3.0", "one of them"]),
        (lambda: Pretraining(0.1, 0.01, activation="relu", beta=3.0), ["relu", "leave it out"]),
        (lambda: Pretraining(0.1, 0.01, activation=Softmax(None)), ["pretraining.beta = None", "not a number"]),
        (lambda: Pretraining(0.1, 0.01, activation=Softmax(-1.0)), ["pretraining.beta = -1.0", "beta > 0"]),
        (lambda: Finetuning(3.0, 0.05, beta=3.0), ["finetuning.beta = 3.0", "needs an activation"]),
        (
            lambda: Finetuning(3.0, 0.05, inputs=Reused("fresh"), label_noise="same"),
            ["finetuning.label_noise = 'same'", "one of them"],
        ),
    ],
)
def test_contradictions(make, words):
    with pytest.raises(SettingError) as error:
        make()
    assert all(word in str(error.value) for word in [*words, "allowed"]), error.value


@pytest.mark.solve
def test_a_beta_that_follows_counts_in_the_slope():
    stages = Pretraining(0.3, 0.1, tokens=2, beta=2.0), Numerics(512, 1024, 2)
    unsaid, named = (Setting(stages[0], Finetuning(6.0, 2.0, activation=a), stages[1]) for a in (None, "softmax"))
    (value, slopes), (other, slopes_of_other) = gradient(unsaid), gradient(named)
    assert (value, slopes) == (other, slopes_of_other)


def test_a_stage_alone_does_not_know_what_it_follows():
    frozen, stage = FrozenMap(0.9, 1.2, 1.0), Finetuning(3.0, 0.1)
    for of in (stage.moments, stage.scale, stage.effective_noise):
        with pytest.raises(SettingError, match=r"finetuning.delta = None follows pre-training.*finetuning_resolved"):
            of(frozen)
    resolved = Setting(Pretraining(0.1, 0.1, tokens=2, delta=0.4), stage).finetuning_resolved
    assert float(resolved.effective_noise(frozen)) == pytest.approx(1.0 - 2 * 0.9 + 1.2 + 0.4 / 2)
