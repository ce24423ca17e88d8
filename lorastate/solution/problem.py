"""The problem that a setting poses: both stages, how they are evaluated, and the nodes of every expectation."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ..bayes.frozen_map import frozen_map
from ..errors import is_concrete
from ..evolution import finetuning as ft
from ..evolution import pretraining as pt
from ..evolution.order import decode
from ..math.quadrature import Nodes
from ..model.channel.frozen_map import FrozenMap
from ..setting.numerics import Numerics
from ..setting.stages import Finetuning, Pretraining, Setting
from .nodes import NodeSets, node_sets, with_broken


class Problem(NamedTuple):
    """A setting as it is solved: continuous fields are leaves, all else is static.

    `fine` has what it takes over from pre-training (`Setting.finetuning_resolved`), `numerics` no seed: that is in the
    nodes. For `pretraining_alone` there is neither `fine` nor any of its nodes.
    """

    pre: Pretraining
    fine: Finetuning
    numerics: Numerics
    nodes: NodeSets

    @staticmethod
    def of(setting: Setting) -> Problem:
        """The problem of both stages. Raises `SettingError` where they do not go together."""
        pre, fine, numerics = setting.pretraining, setting.finetuning_resolved, setting.numerics
        return Problem(pre, fine, numerics.without_seed, node_sets(pre, fine, numerics))

    @staticmethod
    def of_pretraining(pre: Pretraining, numerics: Numerics) -> Problem:
        """The problem of pre-training alone."""
        none: Any = None
        return Problem(pre, none, numerics.without_seed, node_sets(pre, None, numerics))

    @property
    def pretraining_alone(self) -> Problem:
        """Pre-training alone, whose program is then that of every fine-tuning stage."""
        none: Any = None
        return self.found._replace(fine=none, nodes=self.nodes.pretraining_alone)

    @property
    def found(self) -> Problem:
        """The problem without the phase that was asked for, which plays no part in what is made of a solution."""
        return self._replace(numerics=self.numerics.changed(symmetry="auto"))

    @property
    def stages(self) -> tuple[Pretraining, Finetuning]:
        return self.pre, self.fine

    def at(self, stages: tuple[Pretraining, Finetuning]) -> Problem:
        """The same problem for stages of the same kind."""
        return self._replace(pre=stages[0], fine=stages[1])

    @property
    def known(self) -> bool:
        """Whether all of it has a value now, and none is being traced."""
        # (What is made of nothing inside a transformation is a tracer, even where all fields are known.)
        return all(map(is_concrete, (*jax.tree_util.tree_leaves(self.stages), jnp.zeros(()))))

    def with_broken(self, deep: int = 0) -> Problem:
        """With nodes for one step of symmetry breaking, more samples at each for a `deep` glass (see `with_broken`)."""
        return self._replace(nodes=with_broken(self.nodes, self.fine, self.numerics, deep))

    def frozen(self, x) -> FrozenMap:
        """The frozen map at the solver's coordinates `x` of pre-training."""
        return frozen_at(self.pre, self.fine, x)

    def nodes_at(self, x, found, weight) -> Nodes:
        """The nodes that a solution `x` of fine-tuning was found with, with what the channel has `found` at them and
        the weights of the solution, where it has any."""
        nodes = self.nodes.broken if ft.order_at(self.fine, x).levels else self.nodes.finetuning
        assert nodes is not None
        return weighted(nodes._replace(found=found), weight)


def weighted(nodes: Any, weight) -> Any:
    """The nodes with the weights of a solution (`Solved.weight`, those of all replicas together), if it has any."""
    return nodes if weight is None else nodes._replace(weight=weight[0])


def frozen_at(pre: Pretraining, fine: Finetuning, x) -> FrozenMap:
    """The frozen map that fine-tuning sees after a pre-training with the solver's coordinates `x`."""
    return frozen_map(fine.inputs, pre, decode(x), pt.downstream_overlap(pre, x))
