"""What every prediction means, in a few words."""

from __future__ import annotations

#: By stage and name; see `lorastate.solution.solution.Solution`.
MEANING: dict[str, dict[str, str]] = {
    "pretraining": {
        "V": "response of the learned matrix",
        "M": "Tr(S S*)/D, overlap with the teacher",
        "Q": "Tr(S^2)/D, size of the learned matrix",
        "M_down": "overlap with the base map of fine-tuning (M without a task)",
        "qhat": "conjugate of Q",
        "mhat": "conjugate of M",
        "shat": "conjugate of V",
        "overlap": "O_W = M/sqrt(Q Q0), cosine of student and teacher",
        "train_loss": "loss per D^2, penalty included",
        "train_error": "the same without the penalty",
        "test_error": "E, noisy labels",
        "test_error_noiseless": "the same against clean labels",
        "rank_fraction": "share of nonzero eigenvalues",
        "replicon": "replica symmetry is stable below one",
    },
    "finetuning": {
        "v": "response of the update",
        "m": "w.w*/D, overlap with the teacher",
        "p": "w_a.w_b/D, overlap between two minima (q where there is one)",
        "q": "|w|^2/D, size of the update",
        "v_spare": "response of directions that the teacher has not",
        "p_spare": "overlap between two minima in directions that the teacher has not",
        "q_spare": "size of directions that the teacher has not",
        "overlap": "o_w = m/sqrt(q), cosine of student and teacher",
        "train_loss": "loss per D, penalty included",
        "train_error": "the same without the penalty",
        "test_error": "E', noisy labels",
        "test_error_frozen": "the same without the update",
        "effective_noise": "Delta_eff, label noise that the frozen map leaves",
        "recalibration": "b, factor on the frozen map",
        "free_energy": "decides between branches",
        "replicon": "replica symmetry is stable below one (undefined where minima jump)",
        "double_well_share": "share of nodes with two wells",
        "breaking": "y, breaking parameter (undefined in the replica-symmetric phase)",
        "complexity": "log of the number of minima per D: zero at the right y",
    },
}
