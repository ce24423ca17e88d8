"""Training on tokens and noise that are not Gaussian: every draw follows, and what their fourth moment does."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lorastate as ls
from lorastate.simulation.samples import draw_batch, draw_wishart, label_noise, preactivation

SIZES = {"dimension": 20, "runs": 1, "starts": 1, "test_samples": 200}
SETTING = ls.Setting(
    ls.Pretraining(0.5, 0.1, tokens=2, activation="identity"), ls.Finetuning(4.0, 0.6), ls.Numerics(512, 1024, 2)
)


def signs(key, shape):
    return jax.random.rademacher(key, shape, dtype=float)


def nothing(key, shape):
    return jnp.zeros(shape)


def test_every_draw_is_of_that_law():
    """Where tokens and noise are zero all samples are one: errors on fresh inputs are those of training."""
    found = ls.simulate(SETTING, **SIZES, data=ls.Data(nothing, nothing))
    for stage in ("pretraining", "finetuning"):
        alpha = float(ls.get(SETTING, f"{stage}.alpha"))
        per_sample = found.mean(stage, "train_error") / alpha
        assert found.mean(stage, "test_error") == pytest.approx(per_sample, rel=1e-9) and per_sample > 0
    assert found.mean("finetuning", "q") < 1e-12  # w sees no token
    # With noise they are not: it is drawn anew.
    noisy = ls.simulate(SETTING, **SIZES, data=ls.Data(nothing, signs))
    per_sample = noisy.mean("finetuning", "train_error") / 4.0
    assert noisy.mean("finetuning", "test_error") != pytest.approx(per_sample, rel=1e-3)


def test_reused_inputs_and_their_fresh_noise_are_of_that_law():
    other = ls.replace(SETTING, "finetuning.inputs", ls.Reused("fresh"))
    found = ls.simulate(other, **SIZES, data=ls.Data(noise=nothing))
    again = ls.simulate(ls.replace(other, "finetuning.delta", 7.0), **SIZES, data=ls.Data(noise=nothing))
    assert found.mean("finetuning", "train_loss") == again.mean("finetuning", "train_loss")


def test_gaussian_is_the_default_and_memory_tells_laws_apart():
    memory: dict = {}
    plain, same, other = (
        ls.simulate(SETTING, **SIZES, memory=memory, data=data) for data in (None, ls.Data(), ls.Data(inputs=signs))
    )
    assert len(memory) == 2
    assert plain.mean("finetuning", "test_error") == same.mean("finetuning", "test_error")
    assert plain.mean("pretraining", "M") != other.mean("pretraining", "M")


def test_fourth_moments_move_the_diagonal():
    """Var Z_aa = 2 |S|_F^2/D + k sum_i S_ii^2/D with k = E x^4 - 3, which is -2 for signs; Var Z_ab = |S|_F^2/D."""
    d, n = 60, 40_000
    S = draw_wishart(jax.random.key(0), d, d)
    keys = jax.random.split(jax.random.key(1))
    z = np.asarray(preactivation(draw_batch(*keys, S, 0.0, 2, n, ls.Data(inputs=signs)).inputs, S))
    size, diagonal = float(jnp.sum(S**2)) / d, float(jnp.sum(jnp.diag(S) ** 2)) / d
    assert np.var(z[0, 1]) == pytest.approx(size, rel=0.05)
    assert np.var(z[0, 0]) == pytest.approx(2 * size - 2 * diagonal, rel=0.05)
    assert 2 * size - 2 * diagonal < 1.3 * size  # Gaussian tokens have 2 size


def test_noise_has_its_variance_and_symmetry():
    xi = np.asarray(label_noise(jax.random.key(2), 0.3, 2, 50_000, ls.Data(noise=signs)))
    np.testing.assert_array_equal(xi[0, 1], xi[1, 0])
    assert np.var(xi[0, 1]) == pytest.approx(0.3, rel=0.03) and np.var(xi[0, 0]) == pytest.approx(0.6, rel=0.03)


def test_the_asymptotic_channel_has_no_such_data():
    with pytest.raises(ls.SettingError, match="data has no meaning for stage = 'finetuning'; allowed: for 'both' only"):
        ls.simulate(SETTING, stage="finetuning", data=ls.Data())
