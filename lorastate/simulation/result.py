"""The result of training both stages: `Simulation`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import Code
from ..predictions import measured_names
from ..setting.stages import Setting
from .runs import Runs
from .sizes import Sizes

#: What is measured of each stage, in the order of tables.
NAMES: dict[str, tuple[str, ...]] = {
    "pretraining": (*measured_names("pretraining"), "map_start_spread"),
    "finetuning": measured_names("finetuning"),
}


@dataclass(frozen=True, eq=False)
class Simulation(Runs):
    """Finite-size training runs, measured under the names that the theory's predictions have.

    `pretraining` and `finetuning` map a name to an array of one value per run. With S = W W^T/sqrt(P D): `M` = Tr(S
    S*)/D (with a task, S_pre in the place of S* here and below), `M_down` = Tr(S S*)/D, `Q` = Tr(S^2)/D, `overlap`
    = M/sqrt(Q Tr(S*^2)/D), `train_loss` = L/D^2, `train_error` = the same without the penalty, `test_error` =
    E||sigma(Z_W) - sigma(Y)||_F^2 on fresh inputs with noisy labels, `test_error_noiseless` = against sigma(Z*)
    instead, `rank_fraction` = share of eigenvalues of S above 1e-3 of the largest and, with several starts of W,
    `map_start_spread` = (highest - lowest)/lowest loss that they end at. Fine-tuning: `m` = |w.w*|/D (the
    sign of w is free; without recovery m is of order D^(-1/2), not 0), `q` = |w|^2/D, `overlap` = |w.w*|/(|w||w*|),
    `train_loss` = L'/D, `train_error` without the penalty, `test_error` = E||sigma(Z_W + chi chi^T) -
    sigma(Y')||_F^2 on fresh inputs with c chi chi^T where there is an `adapter_factor` c, `test_error_frozen` = the
    same at w = 0, `best_adapter_factor` and `test_error_best_factor` = the c that is best for it and what it is there,
    `forgetting_error` = E||sigma(Z_W + c chi chi^T) - sigma(Y)||_F^2 of the adapted layer on the inputs that
    `test_error` of pre-training is measured on, `forgetting_error_frozen` = the same at w = 0. For higher ranks `m` is
    the mean singular value of w^T w*/D, `q` the mean size of the columns of w that go with it, `q_spare` that of the
    others (r > r*), `overlap` = ||w^T w*||_F / sqrt(||w^T w||_F ||w*^T w*||_F). With r < r* training prefers the larger
    singular values of w*: a bias of order D^(-1/2) where it is otherwise 1/D. Source of the model:
    arXiv:2606.05899.

    `codes[stage]` says for each run whether its training reached a stationary point. A run that did not stays
    in the arrays (NaN where the loss was not finite) and makes `mean`, `stderr` and `summary` raise
    `SolveError`, unless told to leave it out. `seeds` are (seed, run): the run's key is
    `fold_in(key(seed), run)`. `eigenvalues` of S are (runs, D), ascending; `steps` count those of L-BFGS.
    """

    setting: Setting
    sizes: Sizes
    seeds: tuple[tuple[int, int], ...]
    pretraining: dict[str, np.ndarray]
    finetuning: dict[str, np.ndarray]
    eigenvalues: np.ndarray
    codes: dict[str, tuple[Code, ...]]
    steps: dict[str, np.ndarray]
    seconds: np.ndarray

    @property
    def dimension(self) -> int:
        """D."""
        return self.sizes.dimension

    @property
    def tables(self) -> dict[str, dict[str, np.ndarray]]:
        return {stage: getattr(self, stage) for stage in NAMES}


class SimulationInterrupted(KeyboardInterrupt):
    """Ctrl-C after at least one run of `simulate`: `finished` is what it would have returned for the complete ones."""

    def __init__(self, finished: Any):
        self.finished = finished
        super().__init__(f"{len(finished.seeds)} runs are complete")


def collected(setting: Setting, sizes: Sizes, seed: int, outcomes: Mapping[int, Sequence[dict]]) -> Simulation:
    """The result of some runs, by number, from the rows of both stages of each."""
    rows = {stage: [outcome[i] for outcome in outcomes.values()] for i, stage in enumerate(NAMES)}

    def table(stage: str) -> dict[str, np.ndarray]:
        names = [name for name in NAMES[stage] if name in rows[stage][0]]
        return {name: np.array([float(row[name]) for row in rows[stage]]) for name in names}

    return Simulation(
        setting,
        sizes,
        seeds=tuple((seed, run) for run in outcomes),
        pretraining=table("pretraining"),
        finetuning=table("finetuning"),
        eigenvalues=np.stack([row["eigenvalues"] for row in rows["pretraining"]]),
        codes={stage: tuple(Code(int(row["code"])) for row in rows[stage]) for stage in NAMES},
        steps={stage: np.array([int(row["steps"]) for row in rows[stage]]) for stage in NAMES},
        seconds=np.array([row["seconds"] for row in rows["pretraining"]]),
    )
