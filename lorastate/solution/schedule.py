"""The stages of a search of fine-tuning: what is made of both starts, on which nodes, and in which order."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp

from ..evolution import finetuning as ft
from ..math.quadrature import Nodes
from ..setting.numerics import Numerics
from ..setting.stages import Finetuning
from .pretraining import rules_of, stacked

#: Kinds of stages: the first nodes, some more, steps away from what repels, a climb to the maximum of phi in y, all
#: nodes, all of them from the starts, from a cold search, and from where that has ended.
FIRST, SECOND, ESCAPE, CLIMB, LAST, AFRESH, CHECK, AGAIN = range(8)


class Job(NamedTuple):
    """A stage of a search: rules, its kind, the branch that it serves, how many steps y may make, whether its nodes
    have weights that suit what was found so far, and the `level` up to which they cannot tell a slope from zero."""

    rules: Any
    kind: Any
    branch: Any
    tries: Any
    weighted: Any
    level: Any


def schedule(fine: Finetuning, numerics: Numerics, nodes: Nodes, levels: int) -> Job:
    """All stages, stacked: both starts on a part of the nodes, there once more from a cold search, both on all of the
    nodes, and away from a solution that repels. With breaking y climbs to the maximum of phi on the first nodes, then
    on all, with weights that suit the solution; what that ends in is solved once more from a cold search, which may
    find wells that were lost on the way (it was no solution then), and once from where it is: neighbours lie on smooth
    curves so. So it is without breaking on nodes that are thinned."""
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
    tries = _TRIES if levels else 0
    stages = [(coarse, FIRST, 0, False), (again, SECOND, 0, False)]
    if levels:
        stages += [(again, ESCAPE, 0, False), (climbing, CLIMB, tries, False)]
    stages.append((refined, LAST, tries, levels > 0))
    if levels:
        stages.append((afresh, AFRESH, tries, False))
    stages.append((refined._replace(settle=0.0), ESCAPE, tries, False))
    if levels:
        stages.append((refined, CHECK, tries, True))
    if levels or numerics.thinning > 1:
        stages.append((refined, AGAIN, tries, True))
    both = [(k, stage) for stage in stages for k in ((0,) if stage[1] == ESCAPE else (0, 1))]
    branch, (rules, kind, tries, weighted) = [k for k, _ in both], zip(*(stage for _, stage in both), strict=True)
    level = _NOISE / jnp.sqrt(jnp.array([1.0 * rule.index * size for rule in rules]))
    kind, branch, tries, weighted = map(jnp.array, (kind, branch, tries, weighted))
    return Job(stacked(rules), kind, branch, tries, weighted, level)


#: Steps in which y has to find its place; relative error of the slope of phi in y, times the root of the nodes.
_TRIES, _NOISE = 14, 2.5
