"""Fine-tuning as the solver sees it: a map that finds the inner minimisers and remembers them from step to step."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ..math.fixed_point import ANEW, COLD, Map
from ..math.places import row
from ..math.quadrature import Nodes, Slots, over_replicas, sweep
from ..model import wells
from ..model.channel.frozen_map import FrozenMap
from ..model.wells import Wells
from ..setting.stages import Finetuning
from . import finetuning as ft
from .order import SPREAD_FLOOR, Order, matched


class Memory(NamedTuple):
    """What the solver carries from step to step, of every part: inner minimisers, the averages there, `at` which x
    other wells were last looked for, and `anchored` at which all of them were."""

    found: Wells
    averages: ft.Averages
    at: Any
    anchored: Any


#: How far the order parameters move until wells are looked for again that were not among the lowest two, until there
#: may be others than those that are known, and until that must be known before a point is judged.
_LOOK, _ANEW, _AFAR = 0.001, 0.3, 1.0
#: Size of an update, in sqrt(q), whose moves matter no more.
_SMALL = 1e-2


def no_memory(fine: Finetuning, nodes: Nodes, levels: int = 0, alone: bool = False) -> Memory:
    """Placeholder for all parts, to be filled by the first evaluation; with `alone` for one well at every node."""
    r, _, n = nodes.normal.shape
    assert fine.tokens is not None
    n, samples = n * len(fine.inputs.shares), 1
    for z in nodes.inner[:levels]:
        samples = samples * z.shape[2]
    kind = jnp.zeros((r, 2) if ft.spare(fine) else (r,))
    number = jnp.zeros(r)
    nothing = ft.Averages(number, kind, kind, (kind,) * (levels + 1), (number,) * levels, number)
    at = jnp.zeros((r, 5 + 3 * levels if ft.spare(fine) else 3 + 2 * levels))
    return Memory(wells.nothing(r, fine.rank * fine.tokens, n, samples, alone), nothing, at, at)


def locate_inner(
    fine, frozen, order: Order, nodes: Nodes, previous: Wells, cold: Any = True, look: Any = True, anew: Any = False
) -> Wells:
    """Inner minimisers of one part; unless `cold` the descents start at the previous ones, and, if asked to `look`,
    where others may lie, `anew` once these have moved (see `wells.locate`)."""
    d = ft.draws(fine, frozen, nodes)
    problem, guess = ft.inner_problem(fine, order, d), matched(d.teacher, len(d.noise))
    if len(previous.u) == 1:
        return wells.locate_alone(problem, guess, previous, cold, anew)
    return wells.locate(problem, ft.samples(order, d), guess, previous, cold, look, anew)


def _moved(fine: Finetuning, since, order: Order):
    """How far samples move between two orders, the first in coordinates: of log v, and of all else in units of sqrt(q).
    (y moves no minimiser.)"""
    before, size = ft.order_at(fine, since), jnp.sqrt(order.norm(ft.TEACHER_SIZE)) + _SMALL
    parts = ((o.overlap, o.noise, *o.spread) for o in (before, order))
    moves = [jnp.max(jnp.abs(b - a) / size) for a, b in zip(*parts, strict=True)]
    return functools.reduce(jnp.maximum, moves, jnp.max(jnp.abs(jnp.log(order.response / before.response))))


def locate_all(fine, frozen, order: Order, nodes: Nodes, previous: Wells) -> Wells:
    """Inner minimisers of all parts, looked for anew."""
    return over_replicas(lambda *part: locate_inner(fine, frozen, order, *part), nodes, previous)


def state_evolution(fine: Finetuning, frozen: FrozenMap, nodes: Nodes, levels: int = 0, held: Any = False) -> Map:
    """`finetuning.step` for the solver. The index of a `Rules` is the number of parts. Where `held` (may be traced, and
    like `finetuning.all_one`) minima are one whether they want to part or not."""

    together = jnp.broadcast_to(held, (levels, 2) if ft.spare(fine) else (levels,))

    def image_of(order: Order, a: ft.Averages):
        new = ft.order_parameters(fine, order, a)
        spread = tuple(jnp.where(h, SPREAD_FLOOR, s) for h, s in zip(together, new.spread, strict=True))
        return new._replace(spread=spread).encode()

    def image(x, memory, how, count):
        order, cold = ft.order_at(fine, x), how == COLD

        def one(n, previous):
            anew = (how >= ANEW) | (_moved(fine, previous.anchored, order) > _AFAR)
            look = anew | (_moved(fine, previous.at, order) > _LOOK)
            found = locate_inner(fine, frozen, order, n, previous.found, cold, look, anew)
            a = ft.averages_of(fine, frozen, order, n, found)
            at, anchored = jnp.where(look, x, previous.at), jnp.where(anew, x, previous.anchored)
            return a, Memory(found, a, at, anchored)

        a, memory = sweep(one, nodes, memory, count)
        return image_of(order, a), memory

    def jacobian(x, memory, count):
        def plain(x):
            order = ft.order_at(fine, x)

            def at(n, m):
                return ft.averages_of(fine, frozen, order, n, m.found), m

            a, _ = sweep(at, nodes, memory, count, write=False)
            return image_of(order, a)

        return jax.jacfwd(plain)(x)

    def stale(x, memory):
        return _moved(fine, row(memory.data.anchored, memory.here, 0), ft.order_at(fine, x)) > _ANEW

    return Map(image, jacobian, Slots.commit, levels, stale)
