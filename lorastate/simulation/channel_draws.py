"""Fine-tuning problems drawn from the law of (Y0, Z_W) that the theory assumes."""

from __future__ import annotations

from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from ..model.channel.frozen_map import FrozenMap
from ..setting.stages import Finetuning
from .descents import LoraData
from .samples import lora_update, stream


class Sample(NamedTuple):
    """A drawn fine-tuning problem: w* (D, r*) and the loss that is made of it."""

    teacher: Any
    data: LoraData


def draw_fields(key, fine: Finetuning, frozen: FrozenMap, samples: int):
    """(Y0, Z_W) of `samples` inputs, before recalibration: exactly the channel's law.

    Where the channel is a mixture every input belongs to one part, as many of them to each as its share says.
    """
    tokens, drop = fine.tokens, fine.activation.forgets_shift
    normal = jax.random.normal(key, (fine.inputs.dimension(tokens, drop), samples))
    found = fine.inputs.search(frozen, tokens, drop, normal)
    fields = fine.inputs.fields(frozen, fine.delta, tokens, drop, normal, found)
    ends = jnp.round(jnp.cumsum(jnp.asarray(fine.inputs.shares)) * samples)
    index = jnp.arange(samples)
    part = jnp.sum(index[:, None] >= ends[:-1], 1)
    return jax.tree_util.tree_map(lambda a: a[..., part * samples + index], fields)


def draw_teacher(key, dimension: int, rank: int):
    """w* (D, r*): orthogonal columns in random directions with |w*_k|^2 = D exactly."""
    frame, triangle = jnp.linalg.qr(jax.random.normal(key, (dimension, rank)))
    return np.sqrt(dimension) * frame * jnp.sign(jnp.diag(triangle))


@eqx.filter_jit
def draw(key, fine: Finetuning, frozen: FrozenMap, dimension: int, samples: int) -> Sample:
    """w*, X and the loss of one run."""
    fields = draw_fields(stream(key, "channel"), fine, frozen, samples)
    teacher = draw_teacher(stream(key, "lora_teacher"), dimension, fine.teacher_rank)
    inputs = jax.random.normal(stream(key, "lora_inputs"), (samples, fine.tokens, dimension))
    target = fine.activation(fields.y0 + lora_update(inputs, teacher))
    rows = jnp.moveaxis(inputs, 1, 0).reshape(-1, dimension) / np.sqrt(dimension)
    return Sample(teacher, LoraData(rows, fine.scale(frozen) * fields.zw, target, fine.lam, fine.activation))
