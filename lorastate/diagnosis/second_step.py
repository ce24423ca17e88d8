"""What a second step of symmetry breaking changes: how much the first one leaves.

The exact solution has infinitely many steps; phi rises towards it with their number. Two steps are solved at breaking
parameters y_1 < y* < y_2 around the one of the first step, on nodes that both solutions share, so that what few nodes
do to either cancels in the difference.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from ..errors import succeeded
from ..evolution import finetuning as ft
from ..evolution import finetuning_map
from ..evolution.order import Order
from ..math.fixed_point import Method, Rules, iterate
from ..math.quadrature import Nodes, Slots, nested_nodes
from ..model.channel.frozen_map import FrozenMap
from ..runtime.program import Program
from ..setting.stages import Finetuning, Pretraining
from ..solution.adapted import AdaptedLayer, layer_error
from ..solution.finetuning import lora_overlap
from ..solution.nodes import test_nodes
from ..solution.solution import Solution
from .thresholds import frozen_map, order_of

#: Nodes of all replicas together, those of a part, and samples at each of them in the first and the second step.
_NODES, _PART, _SAMPLES = 1024, 64, (16, 16)
#: (y_1, y_2) / y* that are tried. phi is flat in both: of these the pair of highest phi counts.
_PAIRS = ((0.6, 2.5), (0.8, 4.0))


def breaking_error(solution: Solution) -> dict[str, float] | None:
    """What a second step of symmetry breaking changes in a solution: {m, q, overlap, test_error, free_energy} with two
    steps less those with one (along the teacher, where order parameters are pairs). Zero where symmetry is unbroken,
    None where no solution with two was found. Raises `SolveError` where the solution itself had failed.
    """
    solution.require_ok()
    if not solution.finetuning["broken"]:
        return dict.fromkeys(_NAMES, 0.0)
    fine, numerics = solution.setting.finetuning_resolved, solution.setting.numerics
    frozen, test = frozen_map(solution), test_nodes(fine, numerics)
    assert fine.tokens is not None

    def at(levels: int, start: Order):
        nodes = nested_nodes(
            ft.node_dimension(fine), _NODES, 2, numerics.seed, ft.mirrored(fine), ft.node_order(fine), _PART,
            fine.rank * fine.tokens, _SAMPLES[:levels],
        )  # fmt: skip
        values, code = _at_fixed_breaking(solution.setting.pretraining, fine, frozen, nodes, test, start)
        return dict(zip(_NAMES, map(float, values), strict=True)) if bool(succeeded(code)) else None

    order = order_of(solution, "finetuning")
    (y,), (spread,) = order.breaking, order.spread
    one, two = at(1, order), []
    for low, high in _PAIRS:
        two.append(at(2, order._replace(spread=(spread * np.sqrt(0.5),) * 2, breaking=(low * y, high * y))))
    two = [found for found in two if found]
    if not (one and two):
        return None
    best = max(two, key=lambda values: values["free_energy"])
    return {name: best[name] - one[name] for name in one}


_NAMES = ("m", "q", "overlap", "test_error", "free_energy")


@Program
def _at_fixed_breaking(
    pre: Pretraining, fine: Finetuning, frozen: FrozenMap, nodes: Nodes, test: Nodes | None, start: Order
):
    """`_NAMES` of the solution near `start`, with its breaking parameters, and the result code."""
    nodes, levels, x = ft.prepare(fine, frozen, nodes), start.levels, start.encode()
    method = Method(tolerance=1e-4, max_steps=60, burn_in=12, damping=0.5, floor=1e-2)
    rules = Rules.of(method, len(nodes.weight))
    memory = Slots.of(finetuning_map.no_memory(fine, nodes, levels))
    fmap = finetuning_map.state_evolution(fine, frozen, nodes, levels)
    point, _, _, memory = iterate(fmap, rules, True, x, jnp.zeros((len(x), len(x))), memory)
    averages = jax.tree_util.tree_map(lambda a: a.mean(0), memory.read().averages)
    found = ft.order_at(fine, point.x)
    along = found.along
    values = (
        along.overlap,
        along.norm(ft.TEACHER_SIZE),
        lora_overlap(fine, found),
        layer_error(AdaptedLayer(pre, fine, frozen, found), test),
        ft.free_energy(fine, found, averages),
    )
    return values, point.code
