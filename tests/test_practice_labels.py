"""What labelled examples say of a user's layer: moments against known worlds, logits from attention."""

from types import SimpleNamespace

import numpy as np
import pytest
from test_practice import RNG, D, T, drawn

import lorastate as ls
from lorastate.model.activation import Identity, Softmax
from lorastate.practice.labels import label_preactivations, measure
from lorastate.practice.law import coordinates, preactivation


def moments_of(world, z, drop_shift, seed):
    Q, trace = world.truth.norm, np.trace(world.S) / len(world.S)
    return measure(world.x, world.y, z, Q, trace, drop_shift, 1, None, seed)


@pytest.mark.parametrize("drop_shift", [False, True])
def test_moments_of_labels(drop_shift):
    """Means over twelve worlds are the truth, and their spread is what one world's resamples say."""
    pulls = []
    for seed in range(12):
        world = drawn(seed, strength=0.8)
        z = preactivation(world.x, world.S)
        found, true = moments_of(world, z, drop_shift, seed), world.truth
        for f in (lambda m: m.effective_noise(), lambda m: m.best_scale, lambda m: m.strength):
            pulls.append((f(found.moments) - f(true)) / found.stderr(f))
    pulls = np.reshape(pulls, (12, 3))
    assert np.all(np.abs(pulls.mean(0)) < 3.5 / np.sqrt(12))
    assert 0.6 < np.sqrt(np.mean(pulls**2)) < 1.5


def test_what_fits_miss_of_the_update_is_no_frozen_map(monkeypatch):
    """Two tokens and few examples: the fits miss a part of the update, and b has no bias from it. (It was a third of a
    standard error.)"""
    monkeypatch.setattr("lorastate.practice.labels.RESAMPLES", 50)
    pulls = []
    for seed in range(120):
        world = drawn(seed, n=160, dimension=40, tokens=2)
        found = moments_of(world, preactivation(world.x, world.S), True, seed)
        pulls.append((found.moments.best_scale - world.truth.best_scale) / found.stderr(lambda m: m.best_scale))
    assert abs(np.mean(pulls)) < 2.5 / np.sqrt(len(pulls)) and 0.75 < np.std(pulls) < 1.3


def test_noise_is_not_too_small_where_the_map_was_learned(monkeypatch):
    """Maps as pre-training leaves them, the teacher with noise and its small eigenvalues cut off: what they miss is
    shaped like them. (Delta_eff was too small by half a standard error.)"""
    monkeypatch.setattr("lorastate.practice.labels.RESAMPLES", 50)
    pulls = []
    for seed in range(40):
        world, rng = drawn(seed, n=300, dimension=100, tokens=2), RNG(seed)
        g = rng.standard_normal((100, 100)) / np.sqrt(200)
        values, vectors = np.linalg.eigh(world.base + 0.8 * (g + g.T))
        S = 1.2 * (vectors * np.maximum(values - 0.6, 0)) @ vectors.T
        truth = world.truth._replace(overlap=np.sum(S * world.base) / 100, norm=np.sum(S**2) / 100)
        learned = SimpleNamespace(S=S, x=world.x, y=world.y, truth=truth)
        found = moments_of(learned, preactivation(world.x, S), False, seed)
        noise = found.moments.effective_noise() - truth.effective_noise()
        pulls.append(noise / found.stderr(lambda m: m.effective_noise()))
    pulls = np.array(pulls)[np.isfinite(pulls)]  # where the update is seen
    assert len(pulls) > 35 and abs(np.mean(pulls)) < 2 / np.sqrt(len(pulls)) and 0.75 < np.std(pulls) < 1.3


def test_strength_may_be_given():
    world = drawn(1)
    z, s = preactivation(world.x, world.S), world.truth.strength
    y = world.y + 5 * np.eye(T)  # centred or not: no matter
    found = measure(world.x, y, z, world.truth.norm, np.trace(world.S) / D, False, 1, s)
    assert found.moments.strength == pytest.approx(s) and found.stderr(lambda m: m.strength) < 1e-12
    noise = found.moments.effective_noise()
    assert abs(noise - world.truth.effective_noise()) < 4 * found.stderr(lambda m: m.effective_noise())


@pytest.mark.parametrize("beta", [1.0, 0.5])
def test_logits_from_attention(beta):
    """Attention says what its logits are, but for their common shift."""
    y = RNG(0).standard_normal((50, T, T))
    y = y + y.swapaxes(1, 2)
    rows = np.exp(beta * y)
    found, lost = label_preactivations(rows / rows.sum(2, keepdims=True), Softmax(beta))
    assert np.allclose(coordinates(found, True), coordinates(y, True)) and lost < 1e-20
    rows = np.exp(RNG(1).standard_normal((50, T, T)))
    assert 0.05 < label_preactivations(rows / rows.sum(2, keepdims=True), Softmax(1.0))[1] < 0.5
    again, lost = label_preactivations(y, Softmax(beta))
    assert again is not y and np.allclose(again, y) and lost == 0


def test_labels_that_are_not_what_they_should_be():
    rows = np.full((30, T, T), 1 / T)
    with pytest.raises(ls.SettingError, match=r"labels are attention.*softmax only"):
        label_preactivations(rows, Identity())
    with pytest.raises(ls.SettingError, match="causal mask"):
        label_preactivations(np.tile(np.array([[1.0, 0, 0], [0.5, 0.5, 0], [0.3, 0.3, 0.4]]), (30, 1, 1)), Softmax())
    with pytest.raises(ls.SettingError, match="labels are not attention"):
        label_preactivations(rows * 2, Softmax(), "attention")
