"""Runs of a training are in a directory as soon as they are made, and the same call goes on from there."""

import numpy as np
import pytest

import lorastate as ls
from lorastate.simulation import kept, on_channel, two_stages

SETTING = ls.Setting(
    ls.Pretraining(0.3, 0.1, tokens=2, activation="identity"), ls.Finetuning(3.0, 0.5), ls.Numerics(512, 1024, 2)
)
BOTH = {"dimension": 16, "starts": 1, "test_samples": 100}
ALONE = {"stage": "finetuning", "dimension": 20, "starts": 1, "moves": 1}


def same(a, b):
    assert a.seeds == b.seeds and a.codes == b.codes
    for part, table in a.tables.items():
        for name, column in table.items():
            np.testing.assert_array_equal(column, b.tables[part][name], err_msg=name)
    for name in ("eigenvalues", "random_loss", "random_overlap"):
        if hasattr(a, name):
            np.testing.assert_array_equal(getattr(a, name), getattr(b, name))
    for part, steps in a.steps.items():
        np.testing.assert_array_equal(steps, b.steps[part])


@pytest.mark.parametrize(("module", "options"), [(two_stages, BOTH), (on_channel, ALONE)], ids=["both", "alone"])
def test_what_was_interrupted_goes_on(module, options, tmp_path, monkeypatch):
    want, one, made = ls.simulate(SETTING, runs=4, **options), module._one_run, []

    def counted(*args):
        if len(made) == 2:
            raise KeyboardInterrupt
        made.append(1)
        return one(*args)

    monkeypatch.setattr(module, "_one_run", counted)
    with pytest.raises(ls.SimulationInterrupted) as stopped:
        ls.simulate(SETTING, runs=4, **options, out=tmp_path)
    assert stopped.value.finished.seeds == ((0, 0), (0, 1))
    made[:] = [1] * 10  # no limit any more
    same(ls.simulate(SETTING, runs=4, **options, out=tmp_path), want)
    assert len(made) == 12  # two of four
    # More runs, or other ones of the same, are more of the same.
    assert ls.simulate(SETTING, runs=5, **options, out=tmp_path).seeds[4] == (0, 4) and len(made) == 13
    assert ls.simulate(SETTING, runs=2, first=3, **options, out=tmp_path).seeds == ((0, 3), (0, 4)) and len(made) == 13


def test_another_training_needs_another_directory(tmp_path):
    ls.simulate(SETTING, runs=1, **BOTH, out=tmp_path)
    for other, options, words in (
        (ls.replace(SETTING, "finetuning.lam", 0.6), BOTH, "finetuning.lam = 0.5"),
        (SETTING, BOTH | {"dimension": 17}, "dimension = 16, not dimension = 17"),
        (SETTING, BOTH | {"seed": 1}, "seed = 0, not seed = 1"),
        (SETTING, ALONE, "stage = both, not stage = finetuning"),
    ):
        with pytest.raises(ls.SettingError, match="holds a simulation with") as error:
            ls.simulate(other, runs=1, **options, out=tmp_path)
        assert words in str(error.value)
    with pytest.raises(ls.SettingError, match="cannot keep runs on data of one's own; allowed: one of out and data"):
        ls.simulate(SETTING, runs=1, **BOTH, out=tmp_path / "other", data=ls.Data())


def test_numbers_come_back_as_they_were():
    tree = {"a": [{"x": 0.1, "y": np.array([1.5, np.nan])}, {"x": -0.0, "y": np.array([3.0, 4.0])}], "codes": (0, 3)}
    flat = dict(kept._flat(tree))
    back = kept._nested(list(flat), list(flat.values()))
    assert back["a"][1] == {"x": 0.0, "y": [3.0, 4.0]} and back["codes"] == [0.0, 3.0]
    assert back["a"][0]["x"] == 0.1 and np.isnan(back["a"][0]["y"][1])
