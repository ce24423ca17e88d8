"""Finite-size training of both stages, one after the other (arXiv:2606.05899)."""

from __future__ import annotations

import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from ..errors import Code, SettingError, require_float64
from ..math.lbfgs import Minimum, minimise
from ..setting.stages import Setting
from ..validation import whole
from .data import GAUSSIAN, Data
from .kept import described, trained
from .losses import finetuning_loss, finetuning_penalty, pretraining_loss, pretraining_penalty
from .measures import FACTORS, adapted_errors, best_factor, lora_overlaps, map_errors, overlaps, rank_fraction
from .recalibration import theory_scale
from .result import Simulation, collected
from .samples import Batch, draw_batch, draw_matrix, draw_wishart, lora_update, preactivation, stream
from .sizes import Sizes, check_memory, sizes_at
from .worlds import BATCHES, World

#: Fresh inputs that errors of each stage are measured on, where a call does not say how many.
TEST_SAMPLES = 20_000


class _Trained(NamedTuple):
    """A pre-trained run: its world, how the training ended, and the row of `NAMES`."""

    world: World
    found: Minimum
    row: dict[str, Any]


def _pretrain(key, batch: Batch, pre: Any, sizes: Sizes, starts: int) -> tuple[Minimum, dict[str, Any]]:
    """The lowest of several descents from random W, and what they differ by."""
    data = (batch.inputs, pre.activation(batch.labels), pre.lam, pre.activation)
    shape, first = (sizes.dimension, sizes.width), stream(key, "start")
    keys = [first, *(jax.random.fold_in(first, k) for k in range(1, starts))]
    tried = [minimise(pretraining_loss, jax.random.normal(k, shape), data) for k in keys]
    # One that ended where it should counts before a lower one that did not.
    found = min(tried, key=lambda f: (f.code != Code.ok, f.value if np.isfinite(f.value) else np.inf))
    row = {"train_loss": found.value, "train_error": found.value - pretraining_penalty(found.x, pre.lam)}
    if starts > 1:
        losses = np.array([f.value for f in tried])
        row["map_start_spread"] = (losses.max() - losses.min()) / losses.min()
    return found, row


def _finetune(world: World, teacher, fine: Any, sizes: Sizes, starts: int) -> tuple[Minimum, dict[str, Any]]:
    """The lowest of several descents: from w*, then from random w of |w|^2/D = 0.01, 1, 0.01, ... a column.

    Columns that w has beyond those of w* start at random, those that w* has beyond those of w are left out.
    """
    batch = BATCHES[type(fine.inputs)](world, fine, sizes.lora_samples)
    target = fine.activation(batch.labels + lora_update(batch.inputs, teacher))
    frozen = fine.recalibration.b * preactivation(batch.inputs, world.learned)
    data = (batch.inputs, frozen, target, fine.lam, fine.activation)
    points = jax.random.normal(stream(world.key, "lora_start"), (starts, sizes.dimension, fine.rank))
    both = teacher[:, : fine.rank]
    points = points.at[1::2].multiply(0.1).at[0, :, : both.shape[1]].set(both)
    tried = [minimise(finetuning_loss, x, data) for x in points]
    lowest = min((found.value for found in tried if np.isfinite(found.value)), default=np.nan)
    # Starts that met in one minimum differ by rounding: the one that converged stands for it.
    best = min(tried, key=lambda found: (not found.value <= lowest * (1 + 1e-6), found.code))
    return best, {"train_loss": best.value, "train_error": best.value - finetuning_penalty(best.x, fine.lam)}


def _train_map(pre: Any, sizes: Sizes, key, starts: int, data: Data) -> _Trained:
    """One run of pre-training, measured."""
    D = sizes.dimension
    base = draw_matrix(stream(key, "teacher"), pre.downstream_law, D, sizes.base_rank)
    task = base
    if pre.task is not None:
        task = pre.task.a * base + pre.task.c * draw_wishart(stream(key, "task"), D, sizes.task_rank)
    keys = stream(key, "inputs"), stream(key, "noise")
    batch = draw_batch(*keys, task, pre.delta, pre.tokens, sizes.samples, data)
    found, row = _pretrain(key, batch, pre, sizes, starts)
    # Where the loss left the finite numbers, the last W means nothing: everything downstream becomes NaN.
    W = found.x * (np.nan if found.code == Code.nonfinite else 1.0)
    learned = W @ W.T / np.sqrt(sizes.width * D)
    row["M"], row["Q"], row["overlap"] = overlaps(learned, task, D)
    row["M_down"] = overlaps(learned, base, D)[0]
    row["eigenvalues"] = np.asarray(jnp.linalg.eigvalsh(learned))
    row["rank_fraction"] = rank_fraction(row["eigenvalues"])
    row["test_error"], row["test_error_noiseless"] = map_errors(
        stream(key, "test"), pre, task, learned, pre.tokens, sizes.test_samples, data
    )
    return _Trained(World(key, base, task, learned, batch, data), found, row)


def _adapted_errors(world: World, pre: Any, fine: Any, w, teacher, samples: int) -> dict[str, float]:
    """Errors of the adapted layer on fresh inputs of both tasks, those of pre-training the ones that E is measured on,
    and the factor on the update that is best for E'."""
    c, size = float(fine.adapter_factor), float(jnp.max(jnp.sum(w**2, 0))) / len(w)
    frozen, tried = fine.recalibration.b * world.learned, FACTORS / (size if size > 1e-12 else 1.0)
    given = fine, world.base, frozen, w, teacher, jnp.array([c, 0.0, *tried])
    applied, alone, *errors = np.asarray(
        adapted_errors(stream(world.key, "lora_test"), *given, tokens=fine.tokens, samples=samples, data=world.data)
    )
    best, lowest = best_factor(tried, np.array(errors)) if size > 1e-12 else (np.nan, alone)
    given = pre, world.task, frozen, w, None, jnp.array([c, 0.0])
    old = adapted_errors(stream(world.key, "test"), *given, tokens=pre.tokens, samples=samples, data=world.data)
    return {
        "test_error": applied, "test_error_frozen": alone, "best_adapter_factor": best,
        "test_error_best_factor": lowest, "forgetting_error": float(old[0]), "forgetting_error_frozen": float(old[1]),
    }  # fmt: skip


def _fingerprint(pre, sizes: Sizes, key, starts: int, data: Data) -> tuple:
    """Everything that a pre-trained run depends on, as a key of a dictionary."""
    leaves, kind = jax.tree_util.tree_flatten(pre)
    same = sizes._replace(lora_samples=0)
    return (
        str(kind),
        tuple(np.asarray(v).tobytes() for v in leaves),
        same,
        jax.random.key_data(key).tobytes(),
        starts,
        data,
    )


def _one_run(
    setting: Setting, sizes: Sizes, key, starts: int, map_starts: int, data: Data, bar, memory: dict
) -> tuple[dict, dict]:
    """The rows of both stages: what `NAMES` lists, and how the training went."""
    pre, D = setting.pretraining, sizes.dimension
    fine: Any = setting.finetuning_resolved
    began = time.perf_counter()
    bar.set_postfix_str("pre-training")
    name = _fingerprint(pre, sizes, key, map_starts, data)
    if name not in memory:
        memory[name] = _train_map(pre, sizes, key, map_starts, data)
    world, found, row = memory[name]
    row = dict(row)
    teacher = jax.random.normal(stream(key, "lora_teacher"), (D, fine.teacher_rank))
    bar.update()

    bar.set_postfix_str("fine-tuning")
    best, lora_row = _finetune(world, teacher, fine, sizes, starts)
    w = best.x * (np.nan if best.code == Code.nonfinite else 1.0)
    bar.update()

    bar.set_postfix_str("measuring")
    lora_row |= lora_overlaps(w, teacher) | _adapted_errors(world, pre, fine, w, teacher, sizes.test_samples)
    bar.update()
    row |= {"code": found.code, "steps": found.steps, "seconds": time.perf_counter() - began}
    lora_row |= {"code": best.code if found.code == Code.ok else Code.upstream, "steps": best.steps}
    return row, lora_row


def train_both(
    setting: Setting, *, dimension: int = 150, runs: int = 4, seed: int = 0, first: int = 0, starts: int = 3,
    map_starts: int = 1, test_samples: int | None = None, progress: bool = False, memory: dict | None = None,
    data: Data | None = None, out: Any = None,
) -> Simulation:  # fmt: skip
    """Trains both stages, as `simulate` says."""
    require_float64()
    pre, fine = setting.pretraining, setting.finetuning_resolved
    if type(fine.inputs) not in BATCHES:
        known = ", ".join(kind.__name__ for kind in BATCHES)
        raise SettingError(f"finetuning.inputs = {fine.inputs!r} cannot be simulated; allowed: {known}")
    dimension, runs = whole("dimension", dimension, 10, 10_000), whole("runs", runs, 1, 10_000)
    seed, starts = whole("seed", seed, 0, 2**32 - 1), whole("starts", starts, 1, 100)
    first = whole("first", first, 0, 2**31)
    test_samples = whole("test_samples", TEST_SAMPLES if test_samples is None else test_samples, 1, 10**8)
    sizes = sizes_at(pre, fine, dimension, test_samples)
    map_starts = whole("map_starts", map_starts, 1, 100)
    keys = [jax.random.fold_in(jax.random.key(seed), run) for run in range(first, first + runs)]
    if memory is not None:
        new = sum(_fingerprint(pre, sizes, key, map_starts, data or GAUSSIAN) not in memory for key in keys)
        known = sum(getattr(leaf, "nbytes", 0) for leaf in jax.tree_util.tree_leaves(list(memory.values())))
        check_memory(pre, fine, dimension, max(new - 1, 0), known)
    setting = theory_scale(setting)
    same = {"dimension": dimension, "test_samples": test_samples, "starts": starts, "map_starts": map_starts}
    folder, manifest = described(setting, out, data, stage="both", seed=seed, **same)

    def one(run: int, bar: Any) -> tuple[dict, dict]:
        kept = {} if memory is None else memory
        return _one_run(setting, sizes, keys[run - first], starts, map_starts, data or GAUSSIAN, bar, kept)

    bar = tqdm(total=3 * runs, disable=not progress, desc="simulate", unit="stage")
    return trained(
        one, range(first, first + runs), bar, folder, manifest, lambda done: collected(setting, sizes, seed, done)
    )
