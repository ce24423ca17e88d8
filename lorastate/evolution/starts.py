"""Where the search of fine-tuning starts, and how far two of its solutions are apart."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp

from ..model.activation import Softmax
from ..model.channel.frozen_map import FrozenMap
from ..setting.stages import Finetuning
from .finetuning import TEACHER_SIZE, order_at
from .order import Order, directions, from_norm

#: Standard deviation of a label's entries, beside what the update is to learn, above which it is mostly that which an
#: update fits.
_NOISY = 4.0


def fitted(fine: Finetuning, frozen: FrozenMap):
    """By how much larger than the teacher an update is that fits the noise of its labels, where they have no bounds:
    u in place of chi, with the curvature of the loss as large, and v as small."""
    if isinstance(fine.activation, Softmax):
        return 1.0
    return jnp.maximum(1.0, jnp.sqrt(fine.effective_noise(frozen)) / _NOISY)


def start(fine: Finetuning, informative: bool = True, size: Any = 1.0):
    """(v, m, q) = (0.3, 0.9, 0.9), or a start with almost no overlap; q is `size` times larger, v smaller."""
    m, q = (0.9, 0.9) if informative else (0.05, 0.5)
    like = jnp.ones_like(jnp.asarray(directions(fine.rank, fine.teacher_rank), float))
    return from_norm(0.3 / size * like, m * _along(like), q * size * like, TEACHER_SIZE).encode()


def broken_start(fine: Finetuning, x, informative: bool = True, size: Any = 1.0):
    """A start with one step of breaking, of the response and norm of the replica-symmetric point `x` where that is
    anything like a solution: most or almost none of w known, minima that differ by a tenth of it, and y where that
    begins to matter."""
    like = jnp.ones_like(jnp.asarray(directions(fine.rank, fine.teacher_rank), float))
    order = order_at(fine, jnp.where(jnp.all(jnp.isfinite(x)), x, start(fine, True, size)))
    # Without samples v is 1/(2 lambda'); each takes its T directions away.
    most = jnp.maximum(2.0, (1 - fine.alpha * fine.tokens) / (4 * fine.lam))
    v, q = jnp.clip(order.response, 0.1 / size, most) * like, jnp.clip(order.norm(TEACHER_SIZE), 0.1, 2.0 * size) * like
    m = _along((0.85 if informative else 0.1) * jnp.sqrt(q))
    spread = jnp.sqrt(0.1 * q)
    return Order(v, m, jnp.sqrt(0.9 * q - m**2), (spread,), (_first_breaking(fine, v, q, spread),)).encode()


def _first_breaking(fine: Finetuning, v, q, spread):
    """The y where it begins to matter that minima differ: |g|^2 is about q / (v^2 alpha')."""
    return 0.25 / jnp.sqrt(jnp.sum(spread**2 * q / v**2) / fine.alpha)


def beside(fine: Finetuning, x):
    """A start with one step of breaking next to the replica-symmetric point `x`: minima differ by a tenth of what they
    have beside the teacher, and y as in `broken_start`. There the equations have values where they have them at x."""
    order = order_at(fine, x)
    spread, noise = jnp.sqrt(0.1) * order.noise, jnp.sqrt(0.9) * order.noise
    y = _first_breaking(fine, order.response, order.norm(TEACHER_SIZE), spread)
    return order._replace(noise=noise, spread=(spread,), breaking=(y,)).encode()


def pushed(fine: Finetuning, x):
    """Away from a solution x that repels, at the same response and norms. Where it knows little of the teacher: half of
    the largest overlap, and with one step of breaking minima that share half of their norm at least. Where it knows
    more, minima part: by a third of what they share beside the teacher."""
    order = order_at(fine, x)
    p, q = order.norms(TEACHER_SIZE)[0], order.norm(TEACHER_SIZE)
    p = jnp.maximum(p, q / 2)
    m = 0.5 * jnp.sqrt(_along(p) * TEACHER_SIZE)
    spread = tuple(jnp.sqrt(jnp.maximum(q - p, 0.0)) for _ in order.spread)
    away = order._replace(overlap=m, noise=jnp.sqrt(p - m**2 / TEACHER_SIZE), spread=spread).encode()
    if not order.spread:
        return away
    step = order.noise**2 / 3
    parted = order._replace(noise=jnp.sqrt(2 * step), spread=tuple(jnp.sqrt(s**2 + step) for s in order.spread))
    knows = jnp.max(jnp.abs(order.overlap)) > _KNOWS * jnp.sqrt(jnp.max(_along(q)) * TEACHER_SIZE)
    return jnp.where(knows, parted.encode(), away)


#: o_w from which on a solution knows the teacher.
_KNOWS = 0.3


def apart(fine: Finetuning, x, other):
    """How far two solutions are apart in |m| and q."""
    a, b = (order_at(fine, v) for v in (x, other))
    gaps = abs(a.overlap) - abs(b.overlap), a.norm(TEACHER_SIZE) - b.norm(TEACHER_SIZE)
    return jnp.stack([jnp.max(jnp.abs(gap)) for gap in gaps])


def _along(value):
    """A number as it is; a pair without its second entry, that of the spare directions."""
    return value if jnp.ndim(value) == 0 else value * jnp.array([1.0, 0.0])
