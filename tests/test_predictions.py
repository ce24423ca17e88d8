"""The rows of predictions are those that are predicted, and each says what it is."""

import pytest

import lorastate as ls
from lorastate.predictions import PREDICTIONS, axis_label, measured_names, prediction, summary_names

STAGES = ("pretraining", "finetuning")


@pytest.fixture(scope="module")
def solved():
    """Identity activations, with as many directions as the teacher and with more."""
    numerics = ls.Numerics(nodes=512, finetuning_nodes=1024, replicas=2, symmetry="rs")
    pre = ls.Pretraining(alpha=0.2, lam=0.1, activation="identity", tokens=2)
    return [ls.predict(ls.Setting(pre, ls.Finetuning(alpha=3.0, lam=1.0, rank=r), numerics)) for r in (1, 2)]


@pytest.mark.parametrize("stage", STAGES)
def test_every_prediction_has_one_row_and_every_row_a_prediction(solved, stage):
    names = [row.name for row in PREDICTIONS if row.stage == stage]
    assert len(set(names)) == len(names)
    assert set().union(*(getattr(solution, stage) for solution in solved)) == set(names)


@pytest.mark.parametrize("stage", STAGES)
def test_a_summary_has_what_its_rows_say(solved, stage):
    one, two = (list(solution.summary()[stage]) for solution in solved)
    assert two == list(summary_names(stage))
    assert one == [name for name in two if not name.endswith("_spare")]
    assert set(measured_names(stage)) <= {row.name for row in PREDICTIONS if row.stage == stage}


def test_rows_are_complete():
    for row in PREDICTIONS:
        assert row.stage in STAGES and row.symbol and row.unit in ("", "per D", "per D^2"), row
        assert set(row.shown) <= {"summary", "measured"}, row
    # Loss and free energy are extensive; errors are those of one input.
    assert {row.name for row in PREDICTIONS if row.unit == "per D"} == {
        "train_loss", "train_error", "free_energy", "complexity"
    }  # fmt: skip


def test_labels():
    assert axis_label("test_error") == "$E'$" and axis_label("test_error", "pretraining") == "$E$"
    assert axis_label("m") == "finetuning.m"  # no label of its own
    assert axis_label("code", "pretraining") == "pretraining.code"  # no prediction
    assert prediction("finetuning", "nothing").meaning == ""
