"""Fixed points at a maximum: outer coordinates in which something is maximal once all others have followed.

Their slope is known where the others are solved for (`Map.outer`). `climb` solves for the others, makes a step uphill,
and so on: phi of one step of symmetry breaking is so flat in its breaking parameter, and its slope, an average over
samples, so rough that Newton steps in all coordinates together go astray.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from ..errors import Code, succeeded
from .fixed_point import FixedPoint, Iterated, Map, Rules, broyden, iterate, newton_step
from .implicit import CURVED, curvature


def uphill_step(jac: Float[Array, "n n"], residual: Float[Array, " n"], outer: int, longest: Any) -> Float[Array, " n"]:
    """`newton_step`, in the last `outer` coordinates towards their maximum (see `Map`), by `longest` at most."""
    direct = newton_step(jac, residual, outer)
    if not outer:
        return direct
    m = len(jac) - outer
    answer, bend = curvature(jac, outer)
    slope = residual[m:] + jac[m:, :m] @ direct[:m]
    up = jnp.clip(slope / jnp.maximum(bend, CURVED), -longest, longest)
    return direct + jnp.concatenate([answer @ up, up])


_COLD, _WARM, _AWAY = 0, 1, 2


class _Climb(NamedTuple):
    at: Iterated  # where the last pass that succeeded ended, with the memory of the last one
    trial: Any
    known: Any  # whether any pass has succeeded
    way: Any  # how the trial was come to: `_WARM`, `_COLD` or `_AWAY`
    slope: Any
    length: Any  # of the next step at most, in every outer coordinate
    passes: Any
    steps: Any
    done: Any


#: Longest step of a climb, and of one that the Jacobian stays the same for; slopes of either sign between which there
#: is a jump, as at the end of the range of a coordinate, and no maximum.
_STRIDE, _NEAR, _JUMP = 0.5, 0.1, 0.2
#: Passes more that a climb makes to get back to where it was.
_BACK = 2


def _passes(tries, way):
    """After how many passes a climb ends, unless it has to get back to where it was."""
    return tries + jnp.where(way == _WARM, 0, _BACK)


def climb(
    fmap: Map, rules: Rules, require_stable: bool, x0: Float[Array, " n"], jac0: Float[Array, "n n"], memory: Any,
    tries: Any, level: Any = 0.0, away: Callable = lambda x: x, warm: Any = False, most: Any = np.inf,
) -> tuple[Iterated, Any]:  # fmt: skip
    """`iterate`, then up to `tries` steps of the outer coordinates towards the next maximum uphill, each followed by
    `iterate`; and whether a maximum was reached.

    A step is a Newton step with secant Jacobian, uphill even where the slope grows, and at most half as long as the
    last one once a maximum was passed. Where a pass ends at what repels, another one starts `away` from it; where it
    fails, the one before it is made again, and then a shorter step. A slope of at most `level` cannot be told from
    zero: where it is that small and falls no further there is the maximum. If `warm` the memory is that of x0. No pass
    begins after `most` steps in all.
    """
    if not fmap.outer:
        return iterate(fmap, rules, require_stable, x0, jac0, memory, warm), jnp.array(True)
    m = len(x0) - fmap.outer

    def one(s: _Climb) -> _Climb:
        warm, burn_in = s.way == _WARM, jnp.where(s.passes == 0, rules.burn_in, 0)
        softly = rules._replace(burn_in=burn_in, settle=jnp.where(s.way == _AWAY, 0.0, rules.settle))
        near = warm & (jnp.max(jnp.abs(s.trial - s.at.point.x)[m:]) < _NEAR)
        new = iterate(fmap, softly, require_stable, s.trial, s.at.jacobian, s.at.memory, warm, near)
        # Past a slope that cannot be told from zero one that can, of the same sign, leads away from the maximum.
        ahead = (new.image - new.point.x)[m:]
        lost = warm & jnp.any((jnp.abs(s.slope) <= level) & (jnp.abs(ahead) > level) & (ahead * s.slope > 0))
        good = succeeded(new.point.code) & ~lost
        move, change = new.point.x - s.at.point.x, new.image - s.at.image
        # Over a short way what the passes leave undone is more than what the map does.
        far = jnp.max(jnp.abs(move[m:])) > 100 * rules.tolerance
        jac = broyden(new.jacobian, move, change, good & warm & far)
        # What does not succeed from cold, the first pass (but for one that repels) or one made again, ends the climb.
        repelled = (new.point.code == Code.unstable) & (warm | ((s.passes == 0) & (tries > 0)))
        last = ~good & ((s.way == _COLD) | ~s.known) & ~repelled
        at = jax.tree_util.tree_map(lambda a, b: jnp.where(good | last, a, b), new._replace(memory=None, jacobian=jac),
                                    s.at._replace(memory=None))._replace(memory=new.memory)  # fmt: skip
        answer, bend = curvature(at.jacobian, fmap.outer)
        slope = (at.image - at.point.x)[m:]
        passed = warm & good & (slope * s.slope < 0)
        jumped = passed & (jnp.minimum(jnp.abs(slope), jnp.abs(s.slope)) > _JUMP)
        further = jnp.where(jnp.abs(move[m:]) > 0.9 * s.length, jnp.minimum(2 * s.length, _STRIDE), s.length)
        shorter = jnp.where(repelled, 1, 0.25) * s.length
        length = jnp.where(passed, jnp.abs(move[m:]) / 2, jnp.where(good, further, shorter))
        up = jnp.clip(jnp.where(bend > CURVED, slope / bend, jnp.sign(slope) * _STRIDE), -length, length)
        flat = (bend <= CURVED) & (jnp.abs(slope) <= level)
        done = last | jnp.any(jumped) | (good & jnp.all(flat | (jnp.abs(up) < 10 * rules.tolerance)))
        up = jnp.where(good, up, 0.0)
        trial = jnp.where(repelled, away(new.point.x), at.point.x + jnp.concatenate([answer @ up, up]))
        way = jnp.where(good, _WARM, jnp.where(repelled, _AWAY, _COLD))
        return _Climb(at, trial, s.known | good, way, slope, length, s.passes + 1, s.steps + new.point.steps, done)

    zero, count, no, none = jnp.zeros((), x0.dtype), jnp.array(0), jnp.array(False), jnp.zeros(fmap.outer)
    blank = FixedPoint(x0, count, zero, zero, zero, zero, x0, count)
    start = Iterated(blank, x0, jac0, memory)
    begin = _Climb(start, x0, no, jnp.where(warm, _WARM, _COLD), none, none + _STRIDE, count, count, no)
    s = jax.lax.while_loop(lambda s: ~s.done & (s.steps < most) & (s.passes <= _passes(tries, s.way)), one, begin)
    g = s.at.image - s.at.point.x
    offset = jnp.abs(uphill_step(s.at.jacobian, g, fmap.outer, _STRIDE))
    point = s.at.point._replace(offset=offset, steps=s.steps)
    return s.at._replace(point=point), jnp.all(jnp.abs(g[m:]) <= jnp.maximum(level, 10 * rules.tolerance))
