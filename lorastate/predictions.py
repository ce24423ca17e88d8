"""Every prediction, one row each: what it is called, what it means, and where it is shown.

A new prediction is a row here and a function that computes it. Tables of the command line, attributes of a sweep's
variables, axis labels, and the names of a summary and of what training measures all come from these rows, in their
order.
"""

from __future__ import annotations

from typing import NamedTuple


class Prediction(NamedTuple):
    """One prediction of one stage.

    `symbol` is that of the theory in plain letters, `label` what stands at an axis, `unit` that of an extensive
    quantity: "per D^2" or "per D". `shown` says where it appears: in a "summary" (JSON and tables), and among what
    training has "measured". Sweeps and solutions hold every prediction.
    """

    stage: str
    name: str
    symbol: str
    meaning: str
    unit: str = ""
    label: str = ""
    shown: tuple[str, ...] = ("summary",)


_PRE, _FINE = "pretraining", "finetuning"
_BOTH, _TRAINED, _NOWHERE = ("summary", "measured"), ("measured",), ()

# Names that end in `_spare` are there where the update has directions that the teacher has not.
PREDICTIONS = (
    Prediction(_PRE, "V", "V", "response of the learned matrix"),
    Prediction(_PRE, "M", "M", "Tr(S S*)/D, overlap with the teacher", shown=_BOTH),
    Prediction(_PRE, "Q", "Q", "Tr(S^2)/D, size of the learned matrix", shown=_BOTH),
    Prediction(_PRE, "M_down", "M_down", "overlap with the base map of fine-tuning (M without a task)", shown=_BOTH),
    Prediction(_PRE, "qhat", "q^", "conjugate of Q"),
    Prediction(_PRE, "mhat", "m^", "conjugate of M"),
    Prediction(_PRE, "shat", "s^", "conjugate of V"),
    Prediction(_PRE, "overlap", "O_W", "O_W = M/sqrt(Q Q0), cosine of student and teacher", "", "$O_W$", _BOTH),
    Prediction(_PRE, "train_loss", "L", "loss per D^2, penalty included", "per D^2", shown=_BOTH),
    Prediction(_PRE, "train_error", "L - penalty", "the same without the penalty", "per D^2", shown=_TRAINED),
    Prediction(_PRE, "test_error", "E", "E, noisy labels", "", "$E$", _BOTH),
    Prediction(_PRE, "test_error_noiseless", "E at delta = 0", "the same against clean labels", shown=_TRAINED),
    Prediction(_PRE, "rank_fraction", "rank(S)/D", "share of nonzero eigenvalues", shown=_BOTH),
    Prediction(_PRE, "replicon", "replicon", "replica symmetry is stable below one"),
    Prediction(_PRE, "double_well_share", "share of wells", ""),  # the command line has a sentence about it
    Prediction(_FINE, "v", "v", "response of the update"),
    Prediction(_FINE, "m", "m", "w.w*/D, overlap with the teacher", shown=_BOTH),
    Prediction(_FINE, "p", "p", "w_a.w_b/D, overlap between two minima (q where there is one)"),
    Prediction(_FINE, "q", "q", "|w|^2/D, size of the update", shown=_BOTH),
    Prediction(_FINE, "v_spare", "v_spare", "response of directions that the teacher has not"),
    Prediction(
        _FINE, "p_spare", "p_spare", "overlap between two minima in directions that the teacher has not"
    ),
    Prediction(_FINE, "q_spare", "q_spare", "size of directions that the teacher has not", shown=_BOTH),
    Prediction(_FINE, "qhat", "q^", "conjugate of q", shown=_NOWHERE),
    Prediction(_FINE, "mhat", "m^", "conjugate of m", shown=_NOWHERE),
    Prediction(_FINE, "lhat", "l^", "conjugate of v", shown=_NOWHERE),
    Prediction(_FINE, "qhat_spare", "q^_spare", "conjugate of q_spare", shown=_NOWHERE),
    Prediction(_FINE, "lhat_spare", "l^_spare", "conjugate of v_spare", shown=_NOWHERE),
    Prediction(_FINE, "overlap", "o_w", "o_w = m/sqrt(q), cosine of student and teacher", "", "$o_w$", _BOTH),
    Prediction(_FINE, "train_loss", "L'", "loss per D, penalty included", "per D", shown=_BOTH),
    Prediction(_FINE, "train_error", "L' - penalty", "the same without the penalty", "per D", shown=_TRAINED),
    Prediction(_FINE, "test_error", "E'", "E', noisy labels", "", "$E'$", _BOTH),
    Prediction(_FINE, "test_error_frozen", "E' at w = 0", "the same without the update", shown=_BOTH),
    Prediction(_FINE, "best_adapter_factor", "c", "c, factor on w w^T that is best for E'", "", "$c$", _BOTH),
    Prediction(_FINE, "test_error_best_factor", "E' at c", "E' with that factor", shown=_BOTH),
    Prediction(
        _FINE, "forgetting_error", "E after", "E after fine-tuning: on the labels of pre-training", "",
        "$E$ after fine-tuning", _BOTH,
    ),
    Prediction(_FINE, "forgetting_error_frozen", "E after, at w = 0", "the same without the update", shown=_BOTH),
    Prediction(
        _FINE, "effective_noise", "Delta_eff", "Delta_eff, label noise that the frozen map leaves", "",
        r"$\Delta_{\rm eff}$",
    ),
    Prediction(_FINE, "recalibration", "b", "b, factor on the frozen map"),
    Prediction(_FINE, "free_energy", "phi", "decides between branches", "per D"),
    Prediction(_FINE, "replicon", "replicon", "replica symmetry is stable below one (undefined where minima jump)"),
    Prediction(_FINE, "double_well_share", "share of wells", "share of nodes with two wells"),
    Prediction(_FINE, "broken", "broken", "1 where replica symmetry is broken, else 0", shown=_NOWHERE),
    Prediction(_FINE, "breaking", "y", "y, breaking parameter (undefined in the replica-symmetric phase)"),
    Prediction(_FINE, "complexity", "Sigma", "log of the number of minima per D: zero at the right y", "per D"),
)  # fmt: skip

_BY_NAME = {(row.stage, row.name): row for row in PREDICTIONS}


def prediction(stage: str, name: str) -> Prediction:
    """The row of a prediction; of a name that has none, one that says nothing but that name."""
    return _BY_NAME.get((stage, name), Prediction(stage, name, name, "", shown=()))


def stage_and_name(path: str) -> tuple[str, str]:
    """("pretraining", "test_error") of "pretraining.test_error"; a name without a stage is one of fine-tuning."""
    stage, _, name = path.rpartition(".")
    return stage or _FINE, name


def axis_label(name: str, stage: str = _FINE) -> str:
    """What stands at the axis of a prediction (or of "STAGE.NAME"): LaTeX, or its dotted name where it has none."""
    if "." in name:
        stage, name = stage_and_name(name)
    return prediction(stage, name).label or f"{stage}.{name}"


def summary_names(stage: str) -> tuple[str, ...]:
    """The predictions of a stage that a summary has."""
    return _shown(stage, "summary")


def measured_names(stage: str) -> tuple[str, ...]:
    """The predictions of a stage that training measures as well, under the same names."""
    return _shown(stage, "measured")


def _shown(stage: str, where: str) -> tuple[str, ...]:
    return tuple(row.name for row in PREDICTIONS if row.stage == stage and where in row.shown)
