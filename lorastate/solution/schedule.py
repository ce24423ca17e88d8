"""The stages of a search of fine-tuning: what is made of both starts, on which nodes, and in which order."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp

from ..evolution import finetuning as ft
from ..math.quadrature import Nodes
from ..setting.numerics import Numerics
from ..setting.stages import Finetuning
from .pretraining import rules_of, stacked

#: Kinds of stages: what is always made, steps away from what repels, a climb to the maximum of phi in y, all nodes, all
#: of them from the starts, from a cold search, and from where that has ended.
ALWAYS, ESCAPE, CLIMB, LAST, AFRESH, CHECK, AGAIN = range(7)


class Job(NamedTuple):
    """A stage of a search: rules, its kind, the branch that it serves, how many steps y may make, how many parts of the
    nodes the stage before it was made on (0: none that a control variate could go by), and the `level` up to which its
    nodes cannot tell a slope in y from zero."""

    rules: Any
    kind: Any
    branch: Any
    tries: Any
    before: Any
    level: Any


def schedule(fine: Finetuning, numerics: Numerics, nodes: Nodes, levels: int) -> Job:
    """All stages, stacked: both starts on a part of the nodes, there once more from a cold search, both on all of the
    nodes, and away from a solution that repels. With breaking y climbs to the maximum of phi on the first nodes, then
    on all, with a control variate; what that ends in is solved once more from a cold search, which may find wells that
    were lost on the way (it was no solution then), and once from where it is: neighbours lie on smooth curves so. So it
    is without breaking on nodes that are thinned, with the weights that suit the solution."""
    # Where m grows out of almost nothing, Newton steps would lead back to zero, or far off to where wells abound.
    parts, size = nodes.weight.shape
    coarse, refined = rules_of(numerics, parts, 1e-3, settle=0.03)
    few = min(4, parts)
    first, few, some = (min(2, parts), few, max(parts // 4, few)) if levels else (1, 1, 1)
    coarse = coarse._replace(index=first)
    if levels:
        coarse = coarse._replace(settle=0.1, burn_in=8, damping=0.4, max_steps=40)
        refined = refined._replace(tolerance=max(numerics.tolerance, 1e-4), floor=1e-2)
    if ft.spare(fine):
        # The response of spare directions overshoots, and the more so the more samples there are.
        coarse, refined = (rule._replace(damping=0.7) for rule in (coarse, refined))
    again = coarse._replace(burn_in=0, index=few)
    # What is a solution on the first nodes may be out of the domain, or none at all, on all of them.
    afresh = coarse._replace(tolerance=refined.tolerance, floor=refined.floor, index=parts)
    climbing = again._replace(index=some)
    stages = [(coarse, ALWAYS, 0, 0), (again, ALWAYS, 0, first)]
    if levels:
        stages += [(again, ESCAPE, 0, 0), (climbing, CLIMB, _TRIES, few)]
    stages.append((refined, LAST, _TRIES if levels else 0, some))
    if levels:
        stages.append((afresh, AFRESH, _TRIES, 0))
    stages.append((refined._replace(settle=0.0), ESCAPE, _TRIES if levels else 0, 0))
    if levels:
        stages += [(refined, kind, _TRIES, parts) for kind in (CHECK, AGAIN)]
    elif numerics.thinning > 1:
        stages.append((refined, AGAIN, 0, parts))
    both = [(k, stage) for stage in stages for k in ((0,) if stage[1] == ESCAPE else (0, 1))]
    branch, (rules, kind, tries, before) = [k for k, _ in both], zip(*(stage for _, stage in both), strict=True)
    level = _NOISE / jnp.sqrt(jnp.array([1.0 * rule.index * size for rule in rules]))
    kind, branch, tries, before = map(jnp.array, (kind, branch, tries, before))
    return Job(stacked(rules), kind, branch, tries, before, level)


#: Steps in which y has to find its place; relative error of the slope of phi in y, times the root of the nodes.
_TRIES, _NOISE = 14, 2.5
