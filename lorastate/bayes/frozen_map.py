"""The frozen map that fine-tuning inputs see: the learned one, or the Bayes-optimal one of the same data."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp

from ..errors import succeeded
from ..model.channel.frozen_map import FrozenMap, learned_map
from ..model.channel.inputs import Inputs
from ..setting.stages import Pretraining
from .pretraining import bayes_optimal_pretraining


def best_map(pre: Pretraining) -> FrozenMap:
    """The Bayes-optimal map of the data of pre-training, M = Q = Q_BO; NaN where its solve failed. (With a task it is
    the estimate of S*; what that shares with S_pre is left out.)"""
    best = bayes_optimal_pretraining(pre)
    Q = jnp.where(succeeded(best.code), best.Q_down, jnp.nan)
    return FrozenMap(Q, Q, pre.downstream_Q0, label_overlap=Q if pre.task is None else None)


def frozen_map(inputs: Inputs, pre: Pretraining, order: Any, downstream: Any = None) -> FrozenMap:
    """The map that `inputs` see after `pre`, given its order parameters and M_down."""
    return learned_map(pre, order, downstream) if inputs.needs_map else best_map(pre)
