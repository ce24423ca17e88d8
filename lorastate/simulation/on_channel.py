"""Training of the second stage alone, on its asymptotic channel (arXiv:2606.05899).

The theory says that fine-tuning sees pre-training through the law of (Y0, Z_W) alone. Here that law is drawn and not
trained: (Y0, Z_W) for N' = alpha' D inputs from the channel of the setting, X Gaussian (N' x T x D), w* with
orthogonal columns of |w*_k|^2 = D, and

    L'(w)/D = (sum_mu ||sigma(b Z_W + chi chi^T) - sigma(Y0 + chi* chi*^T)||_F^2 + lambda' ||w||^2) / D

is minimised. What is left of finite D are the corrections of the second stage itself, at a D that a run of both
stages could not reach. E' is not measured on a sample but follows from m = w^T w*/D and q = w^T w/D.

Where labels are noisy and ridges weak the loss has many minima. Four searches are reported apart (`SEARCHES`).
"""

from __future__ import annotations

import time
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from ..model.channel.frozen_map import FrozenMap
from ..model.channel.recalibration import LeastError
from ..setting.stages import Setting
from ..solution.nodes import test_nodes
from ..solution.solution import pretrain
from ..validation import whole
from .channel_draws import Sample, draw
from .channel_result import ChannelSimulation, collected
from .descents import Minima
from .kept import described, trained
from .losses import finetuning_penalty
from .measures import lora_overlaps
from .overlap_errors import errors, overlap_matrices
from .recalibration import theory_scale
from .searches import INFORMED, TOGETHER, searched
from .sizes import fits_memory, known_number, rounded


def _measured(fine: Any, sample: Sample, minima: Minima) -> list[dict[str, float]]:
    """Everything about each minimum but E'."""
    rows = []
    for w, loss in zip(minima.w, minima.loss, strict=True):
        row = {"train_loss": loss, "train_error": loss - finetuning_penalty(w, float(fine.lam))}
        rows.append({key: float(x) for key, x in (row | lora_overlaps(w, np.asarray(sample.teacher))).items()})
    return rows


def _one_run(fine: Any, frozen: FrozenMap, nodes, dimension: int, samples: int, key, starts: int, moves: int, bar):
    """What is kept of one run."""
    began = time.perf_counter()
    sample = draw(key, fine, frozen, dimension, samples)
    best, scattered = searched(key, sample, fine.rank, starts, moves, bar)
    rows = _measured(fine, sample, best)
    m, q = overlap_matrices(best.w, np.asarray(sample.teacher))
    for row, error in zip(rows, np.asarray(errors(fine, frozen, m, q, nodes)), strict=True):
        row["test_error"] = float(error)
    all_rows = _measured(fine, sample, scattered)
    return {
        "searches": rows,
        "codes": best.codes,
        "steps": best.steps,
        "random": {name: [row[name] for row in all_rows] for name in ("train_loss", "overlap")},
        "seconds": time.perf_counter() - began,
    }


def channel_samples(fine: Any, dimension: int, starts: int = 6) -> int:
    """N' = round(alpha' D), if there is at least one and the memory is enough; else a `SettingError`."""
    for name in ("alpha", "lam", "delta"):
        known_number(f"finetuning.{name}", getattr(fine, name))
    alpha, tokens = float(fine.alpha), fine.tokens
    samples = rounded("finetuning.alpha", alpha, dimension, dimension)

    def memory(d: int) -> float:
        # The inputs, drawn and rearranged; what each descent keeps of every input, and its history.
        many = min(INFORMED + starts, TOGETHER)
        return 8 * (3 * alpha * tokens * d**2 + many * d * (4 * alpha * tokens * fine.rank + 60 * fine.rank))

    fits_memory(memory, dimension)
    return samples


def train_on_channel(
    setting: Setting, *, dimension: int = 600, runs: int = 4, seed: int = 0, first: int = 0, starts: int = 6,
    moves: int = 10, progress: bool = False, out: Any = None,
) -> ChannelSimulation:  # fmt: skip
    """Trains fine-tuning alone, on the law that the theory assumes; `ChannelSimulation` says what is measured.

    `starts` random starts a run (beside w* and two points near it), then `moves` times from the lowest random minimum
    and from the lowest of all: perturb, descend, keep what is lower. The runs are `first`, `first` + 1, ...; run r
    depends on (seed, r) and on the sizes alone. Needs the first stage only: raises `SolveError` where that cannot be
    solved, `SettingError` on bad input. Ctrl-C after at least one run raises `SimulationInterrupted`, which carries the
    finished runs.
    """
    fine: Any = setting.finetuning_resolved
    dimension, runs = whole("dimension", dimension, 10, 10_000), whole("runs", runs, 1, 10_000)
    seed, starts = whole("seed", seed, 0, 2**32 - 1), whole("starts", starts, 1, 100)
    moves, first = whole("moves", moves, 0, 1000), whole("first", first, 0, 2**31)
    samples = channel_samples(fine, dimension, starts)
    solved = pretrain(setting.pretraining, setting.numerics, throw=fine.inputs.needs_map)
    if isinstance(fine.recalibration, LeastError):  # the only b that needs all of the theory
        fine = theory_scale(setting).finetuning_resolved
    frozen = solved.frozen(fine)
    nodes = test_nodes(fine, setting.numerics)
    options = {"setting": setting, "map": solved, "dimension": dimension, "samples": samples, "starts": starts}
    options["moves"] = moves
    same = {"dimension": dimension, "starts": starts, "moves": moves}
    folder, manifest = described(setting, out, stage="finetuning", seed=seed, **same)

    def one(run: int, bar: Any) -> dict[str, Any]:
        key = jax.random.fold_in(jax.random.key(seed), run)
        return _one_run(fine, frozen, nodes, dimension, samples, key, starts, moves, bar)

    total = runs * (INFORMED + starts + 2 * moves)
    bar = tqdm(total=total, disable=not progress, desc="simulate", unit="descent")
    return trained(one, range(first, first + runs), bar, folder, manifest, lambda done: collected(options, seed, done))
