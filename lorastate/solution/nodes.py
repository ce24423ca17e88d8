"""Quadrature nodes of every expectation of a setting."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from ..evolution import finetuning as ft
from ..evolution import pretraining as pt
from ..evolution.test_errors import node_dimension
from ..math.quadrature import Nodes, gaussian_nodes, nested_nodes
from ..setting.numerics import Numerics
from ..setting.stages import Finetuning, Pretraining

#: Nodes that are averaged over together, and of which the first ones lead a search to the neighbourhood of a solution.
_MAP_PART, _LORA_PART, _TEST_PART = 512, 1024, 1024
#: The same of thinned nodes, of pre-training and of fine-tuning, and of their control variate.
_FEW_OF_MAP, _FEW_OF_LORA, _CONTROL_PART = 256, 512, 256
#: Nodes of a replica from which on it is cut into parts, and those without images (of pre-training and test errors) and
#: coordinates that alternate (of fine-tuning) give smaller errors.
_PLAIN, _LORA = 2048, 4096
#: Where symmetry is broken: nodes of fine-tuning for one that has samples inside, and nodes of a part.
_FEWER, _BROKEN_PART = 4, 256
#: A glass is deep where (q - p)/q is above `DEEP`, or where no solution was found: samples at a node are then so many
#: times more. With few the averages over minima, weighted by exp(-y f), are those of one or two samples. Where y has no
#: place even so they are once more so many more, at as many fewer nodes.
DEEP, _MORE = 0.4, 4


class NodeSets(NamedTuple):
    """Quadrature nodes of each expectation; None where a closed form needs none. `pretraining_test` serves errors on
    the labels of pre-training after an update as well. `broken`: those of fine-tuning with samples inside, for steps of
    symmetry breaking. `map_control`, `lora_control`: with thinning, the many nodes of its control variate. `seed`: of
    all of them, an array."""

    pretraining: Nodes | None
    pretraining_test: Nodes | None
    seed: Any
    finetuning: Any = None
    finetuning_test: Nodes | None = None
    broken: Nodes | None = None
    map_control: Nodes | None = None
    lora_control: Nodes | None = None

    @property
    def parts(self) -> list[int]:
        """How many parts each of them has."""
        return [len(nodes.weight) for nodes in self if isinstance(nodes, Nodes)]

    @property
    def tests(self) -> tuple[Nodes | None, Nodes | None]:
        """Those of errors on the labels of fine-tuning, and of pre-training."""
        return self.finetuning_test, self.pretraining_test

    @property
    def pretraining_alone(self) -> NodeSets:
        """Those of pre-training."""
        return NodeSets(self.pretraining, self.pretraining_test, self.seed, map_control=self.map_control)


def node_sets(pre: Pretraining, fine: Finetuning | None, numerics: Numerics) -> NodeSets:
    """The node sets of a setting (cached: they depend on static fields only), but for `broken`; without `fine` those of
    pre-training."""
    few, dimension = numerics.thinning, pt.node_dimension(pre)
    of_map = _plain(dimension, numerics.nodes // few, numerics, 0, _MAP_PART if few == 1 else _FEW_OF_MAP)
    control = _plain(dimension, numerics.nodes, numerics, 3 * 10**6, _CONTROL_PART) if few > 1 else None
    # With two columns for an update at least: low ranks have the same nodes, and those of pre-training alone.
    d = node_dimension(pre.activation, pre.tokens, (2 if fine is None else max(fine.rank, 2), 0))
    map_test = _plain(d, 2 * numerics.finetuning_nodes, numerics, 10**6, _TEST_PART)
    nodes = NodeSets(of_map, map_test, np.array(numerics.seed), map_control=control)
    if fine is None:
        return nodes
    lora = _lora(fine, numerics.finetuning_nodes // few, numerics, 0, _LORA_PART if few == 1 else _FEW_OF_LORA)
    control = _lora(fine, numerics.finetuning_nodes, numerics, 3 * 10**6, _CONTROL_PART) if few > 1 else None
    return nodes._replace(finetuning=lora, finetuning_test=test_nodes(fine, numerics), lora_control=control)


def _lora(fine: Finetuning, count: int, numerics: Numerics, stream: int, size: int) -> Nodes:
    """Nodes of fine-tuning."""
    r, seed = numerics.replicas, numerics.seed + stream
    order = ft.node_order(fine) if count >= r * _LORA else None
    part = size if order or numerics.thinning > 1 else None
    return gaussian_nodes(ft.node_dimension(fine), count, r, seed, ft.mirrored(fine), order, part)


def test_nodes(fine: Finetuning, numerics: Numerics) -> Nodes | None:
    """Nodes of the test errors of fine-tuning."""
    assert fine.tokens is not None
    d = node_dimension(fine.activation, fine.tokens, (fine.rank, fine.teacher_rank))
    return _plain(d, 2 * numerics.finetuning_nodes, numerics, 2 * 10**6, _TEST_PART)


def _plain(d: int, count: int, numerics: Numerics, stream: int, part: int) -> Nodes | None:
    if not d:
        return None
    large, seed = count >= numerics.replicas * _PLAIN, numerics.seed + stream
    size = part if large or numerics.thinning > 1 else None
    return gaussian_nodes(d, count, numerics.replicas, seed, () if large else None, part=size)


def with_broken(nodes: NodeSets, fine: Finetuning, numerics: Numerics, deep: int = 0) -> NodeSets:
    """The node sets with those for one step of breaking, with more samples for a `deep` glass (1; 2: last resort)."""
    assert fine.tokens is not None
    fewer = _FEWER * (_MORE if deep > 1 else 1)
    count, r = max(numerics.finetuning_nodes // fewer, 64 * numerics.replicas), numerics.replicas
    order = ft.node_order(fine) if count >= r * _LORA // _FEWER else None
    broken = nested_nodes(
        ft.node_dimension(fine), count, r, int(nodes.seed), ft.mirrored(fine), order, _BROKEN_PART,
        fine.rank * fine.tokens, (numerics.samples * _MORE**deep,),
    )  # fmt: skip
    return nodes._replace(broken=broken)
