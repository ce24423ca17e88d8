"""Fixed points at a maximum: outer coordinates in which something is maximal once all others have followed.

Their slope is known where the others are solved for (`Map.outer`). `climb` solves for the others, makes a step uphill,
and so on: phi of one step of symmetry breaking is so flat in its breaking parameter, and its slope, an average over
samples, so rough that Newton steps in all coordinates together go astray.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ..errors import succeeded
from .fixed_point import FixedPoint, Iterated, Map, Rules, broyden, iterate, newton_step
from .implicit import CURVED
from .linear import small_solve


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


def curvature(jac, outer: int):
    """How the other coordinates answer to the last `outer` ones, (n - outer, outer), and how fast the slope of what is
    maximal in these then falls, (outer,): below zero where there is no maximum."""
    n = len(jac)
    gap, m = jnp.eye(n, dtype=jac.dtype) - jac, n - outer
    answer = small_solve(gap[:m, :m], -gap[:m, m:])
    return answer, jnp.diag(gap[m:, m:] + gap[m:, :m] @ answer)


class _Climb(NamedTuple):
    at: Iterated  # where the last pass that succeeded ended, with the memory of the last one
    trial: Any
    warm: Any
    slope: Any
    length: Any  # of the next step at most, in every outer coordinate
    passes: Any
    steps: Any
    done: Any


#: Longest step of a climb; slope that counts as zero (a map that is averaged over nodes may have no point where it is,
#: on a maximum as flat as that); slopes of either sign between which there is a jump, as at the end of the range of a
#: coordinate, and no maximum.
_STRIDE, _LEVEL, _JUMP = 0.5, 0.01, 0.2


def climb(
    fmap: Map, rules: Rules, require_stable: bool, x0: Float[Array, " n"], jac0: Float[Array, "n n"], memory: Any,
    tries: Any,
) -> tuple[Iterated, Any]:  # fmt: skip
    """`iterate`, then up to `tries` steps of the outer coordinates towards the next maximum uphill, each followed by
    `iterate`; and whether a maximum was reached.

    A step is a Newton step with secant Jacobian, uphill even where the slope grows, and at most half as long as the
    last one once a maximum was passed. Where a pass fails the one before it is made again, and then a shorter step.
    """
    if not fmap.outer:
        return iterate(fmap, rules, require_stable, x0, jac0, memory), jnp.array(False)
    m = len(x0) - fmap.outer

    def one(s: _Climb) -> _Climb:
        softly = rules._replace(burn_in=jnp.where(s.passes == 0, rules.burn_in, 0))
        new = iterate(fmap, softly, require_stable, s.trial, s.at.jacobian, s.at.memory, s.warm)
        good = succeeded(new.point.code)
        move, change = new.point.x - s.at.point.x, new.image - s.at.image
        # Over a short way what the passes leave undone is more than what the map does.
        far = jnp.max(jnp.abs(move[m:])) > 100 * rules.tolerance
        jac = broyden(new.jacobian, move, change, good & s.warm & far)
        # What does not succeed from cold, the first pass or one that was made again, ends the climb.
        last = ~good & ~s.warm
        at = jax.tree_util.tree_map(lambda a, b: jnp.where(good | last, a, b), new._replace(memory=None, jacobian=jac),
                                    s.at._replace(memory=None))._replace(memory=new.memory)  # fmt: skip
        answer, bend = curvature(at.jacobian, fmap.outer)
        slope = (at.image - at.point.x)[m:]
        passed = s.warm & good & (slope * s.slope < 0)
        jumped = passed & (jnp.minimum(jnp.abs(slope), jnp.abs(s.slope)) > _JUMP)
        further = jnp.where(jnp.abs(move[m:]) > 0.9 * s.length, jnp.minimum(2 * s.length, _STRIDE), s.length)
        length = jnp.where(passed, jnp.abs(move[m:]) / 2, jnp.where(good, further, s.length / 4))
        up = jnp.clip(jnp.where(bend > CURVED, slope / bend, jnp.sign(slope) * _STRIDE), -length, length)
        flat = (bend <= CURVED) & (jnp.abs(slope) < _LEVEL) & s.warm
        done = last | jnp.any(jumped) | (good & jnp.all(flat | (jnp.abs(up) < 10 * rules.tolerance)))
        up = jnp.where(good, up, 0.0)
        step = jnp.concatenate([answer @ up, up])
        return _Climb(at, at.point.x + step, good, slope, length, s.passes + 1, s.steps + new.point.steps, done)

    zero, count, no, none = jnp.zeros((), x0.dtype), jnp.array(0), jnp.array(False), jnp.zeros(fmap.outer)
    blank = FixedPoint(x0, count, zero, zero, zero, zero, x0, count)
    begin = _Climb(Iterated(blank, x0, jac0, memory), x0, no, none, none + _STRIDE, count, count, no)
    s = jax.lax.while_loop(lambda s: ~s.done & (s.passes <= tries + jnp.where(s.warm, 0, _BACK)), one, begin)
    g = s.at.image - s.at.point.x
    offset = jnp.abs(uphill_step(s.at.jacobian, g, fmap.outer, _STRIDE))
    point = s.at.point._replace(offset=offset, steps=s.steps)
    return s.at._replace(point=point), jnp.all(jnp.abs(g[m:]) < _LEVEL)


#: Passes more that a climb makes to get back to where it was.
_BACK = 2
