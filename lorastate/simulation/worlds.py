"""What pre-training leaves behind, and the fine-tuning inputs drawn from it: fresh, reused, mixed, selected."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp

from ..model.channel.inputs import Fresh, Mixed, Reused
from ..model.channel.selected import Selected
from ..setting.stages import Finetuning
from .data import GAUSSIAN, Data
from .samples import Batch, draw_batch, label_noise, preactivation, stream


class World(NamedTuple):
    """What pre-training leaves behind: the key of the run, S*, S_pre (S* without a task), the frozen S and the data;
    and what more of them are made of."""

    key: Any
    base: Any
    task: Any
    learned: Any
    pretraining: Batch
    data: Data = GAUSSIAN


def _fresh(world: World, fine: Finetuning, samples: int) -> Batch:
    keys = stream(world.key, "lora_inputs"), stream(world.key, "lora_noise")
    return draw_batch(*keys, world.base, fine.delta, fine.tokens, samples, world.data)


def _reused(world: World, fine: Finetuning, samples: int, kind: Reused | None = None) -> Batch:
    inputs, labels = world.pretraining.inputs[:samples], world.pretraining.labels[..., :samples]
    if not (kind or fine.inputs).keeps_noise:
        noise = label_noise(stream(world.key, "lora_noise"), fine.delta / 2, inputs.shape[1], samples, world.data)
        labels = preactivation(inputs, world.base) + noise
    elif world.task is not world.base:  # the same noise on another clean label
        labels = labels + preactivation(inputs, world.base - world.task)
    return Batch(inputs, labels)


def _mixed(world: World, fine: Finetuning, samples: int) -> Batch:
    assert isinstance(fine.inputs, Mixed)
    many = round(float(fine.inputs.reused_fraction) * samples)
    old, new = _reused(world, fine, many, fine.inputs.reused), _fresh(world, fine, samples)
    inputs = jnp.concatenate([old.inputs, new.inputs[many:]])
    return Batch(inputs, jnp.concatenate([old.labels, new.labels[..., many:]], -1))


def _selected(world: World, fine: Finetuning, samples: int) -> Batch:
    assert isinstance(fine.inputs, Selected)
    size = max(round(float(fine.inputs.pool) * world.base.shape[0]), samples)
    pool = _fresh(world, fine, size)
    zw = preactivation(pool.inputs, world.learned)
    score = jnp.sum(zw**2, (0, 1))
    if fine.inputs.score == "without_shift":
        score = score - jnp.sum(zw, (0, 1)) ** 2 / zw.shape[0] ** 2
    chosen = jnp.argsort(score)[:samples]
    return Batch(pool.inputs[chosen], pool.labels[..., chosen])


#: For each kind of fine-tuning inputs, what draws them and their labels Y0.
BATCHES: dict[type, Callable[[World, Finetuning, int], Batch]] = {
    Fresh: _fresh, Reused: _reused, Mixed: _mixed, Selected: _selected,
}  # fmt: skip
