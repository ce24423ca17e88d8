"""What the two stages share: a student field correlated with a teacher field, and potentials of its law.

In both stages the theory is the expectation, over a Gaussian pair (teacher, student), of an inner minimum:

    pre-training   teacher Y (size Q0 + delta/2),  student Omega,  response V, overlap M, norm Q
    fine-tuning    teacher chi* (size q0),         student omega,  response v, overlap m, norm q

The pair is written as  student = (overlap / size) teacher + noise * g  with g an independent standard field and
noise^2 = norm - overlap^2 / size >= 0. The solver works with (log response, overlap, noise): the teacher's
nodes never move, and the trivial solution (a student that is exactly zero) is an ordinary point.

Where replica symmetry is broken in k steps the student has k further independent parts, spread_i * z_i with
spread_i^2 = p_i - p_{i-1}: how two of its minima differ, level by level; `breaking` has the parameters y_1 < ... < y_k.
Then noise^2 = p_0 - overlap^2 / size, and the norm is that of all parts together.

Response, overlap, noise and spreads are numbers or, for an update of higher rank than its teacher, pairs (2,): of its
directions along the teacher's and of the spare ones, whose overlap is zero.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

#: Floors of response and noise; a solution that sits on them is the zero student and is reported as such.
RESPONSE_FLOOR, NOISE_FLOOR = 1e-9, 1e-9
#: Floor of a spread, and spread below which its coordinate levels off: minima that differ by so little are one, and the
#: solver comes to rest there instead of following a logarithm to minus infinity.
SPREAD_FLOOR, SPREAD_LEVEL = 1e-4, 1e-2


class Order(NamedTuple):
    """Order parameters of a stage: `response` (V or v), `overlap` (M or m), `noise`, and `spread` (k,) or (k, 2) and
    `breaking` (k,) of the k steps of symmetry breaking, if any (see the module)."""

    response: Any
    overlap: Any
    noise: Any
    spread: Any = ()
    breaking: Any = ()

    @property
    def levels(self) -> int:
        """k, the steps of symmetry breaking."""
        return len(self.breaking)

    def norms(self, size) -> list:
        """[p_0, ..., p_k = Q (or q)]: overlap^2 / size + noise^2, and one spread^2 more at each level."""
        out = [self.overlap**2 / size + self.noise**2]
        for s in self.spread:
            out.append(out[-1] + s**2)
        return out

    def norm(self, size):
        """Q (or q)."""
        return self.norms(size)[-1]

    @property
    def along(self) -> Order:
        """The numbers of the directions along the teacher's."""
        if jnp.ndim(self.response) == 0:
            return self
        v, m, noise = (a[0] for a in (self.response, self.overlap, self.noise))
        return Order(v, m, noise, tuple(s[0] for s in self.spread), self.breaking)

    @property
    def merged(self) -> Order:
        """The law of one minimum among all of them: all independent parts as one noise."""
        square = self.noise**2
        for s in self.spread:
            square = square + s**2
        return Order(self.response, self.overlap, jnp.sqrt(square))

    def encode(self):
        """The solver's coordinates: logarithms of response, spreads (log sqrt(s^2 + SPREAD_LEVEL^2)) and breaking; the
        overlap of spare directions is none of them. With breaking the noise, of which samples give the square, by its
        square. (3 + 2 k,), or (5 + 3 k,) for pairs."""
        noise = jnp.asarray(self.noise) ** 2 if self.breaking else self.noise
        response, overlap, noise = (jnp.atleast_1d(v) for v in (jnp.log(self.response), self.overlap, noise))
        parts = [response, overlap[:1], noise, *(jnp.atleast_1d(_levelled(s)) for s in self.spread)]
        return jnp.concatenate([*parts, *(jnp.log(y)[None] for y in self.breaking)])


def decode(x, spare: bool = False) -> Order:
    """`Order` from the solver's coordinates; with `spare` its numbers are pairs. One coordinate more is not read."""
    d = 1 + spare
    k = (len(x) - (2 * d + 1)) // (d + 1)
    begin = 2 * d + 1
    end = begin + d * k
    response, noise = jnp.exp(x[:d]), x[d + 1 : begin]
    if k:
        # Twice the floor: rounding must not take what lies on it for something that moves.
        noise = jnp.sqrt(lifted(noise, 2 * NOISE_FLOOR**2))
    else:  # either sign will do, but averages are divided by it
        noise = jnp.where(jnp.abs(noise) < NOISE_FLOOR, NOISE_FLOOR, noise)
    spreads = jnp.sqrt(lifted(jnp.exp(2 * x[begin:end]) - SPREAD_LEVEL**2, SPREAD_FLOOR**2)).reshape(k, d)
    breaking = tuple(jnp.exp(x[end : end + k]))
    if spare:
        return Order(response, jnp.stack([x[d], jnp.zeros_like(x[d])]), noise, tuple(spreads), breaking)
    return Order(response[0], x[d], noise[0], tuple(spreads[:, 0]), breaking)


def _levelled(spread):
    return jnp.log(jnp.asarray(spread) ** 2 + SPREAD_LEVEL**2) / 2


def from_norm(response, overlap, norm, size) -> Order:
    """`Order` from (V, M, Q); values at or below zero are lifted to the floors, NaN stays NaN."""
    square = norm - overlap**2 / size
    return Order(lifted(response, RESPONSE_FLOOR), overlap, jnp.sqrt(lifted(square, NOISE_FLOOR**2)))


def lifted(value, floor):
    """The value, or the floor where it is below; NaN stays NaN."""
    return jnp.where(value <= floor, floor, value)


def directions(rank: int, teacher_rank: int) -> Any:
    """How many columns of an update each number of its `Order` stands for: r, or the pair (r*, r - r*)."""
    return rank if rank <= teacher_rank else np.array([teacher_rank, rank - teacher_rank])


def student_field(order: Order, teacher, rows: int, size):
    """(base, scale) of omega = base + scale g, (rows, N), along a `teacher` (r* T, N): columns one after the other."""
    along = len(teacher)
    base = per_row(order.overlap, along, rows) / size * matched(teacher, rows)
    return base, per_row(order.noise, along, rows)


def matched(teacher, rows: int):
    """The column of the teacher that each column of the student follows, (rows, N); zero where there is none."""
    missing = rows - len(teacher)
    return teacher[:rows] if missing <= 0 else jnp.pad(teacher, ((0, missing), (0, 0)))


def per_row(value, along: int, rows: int):
    """A number as it is; a pair as one number for each of the first `along` rows and one for the others, (rows, 1)."""
    return value if jnp.ndim(value) == 0 else jnp.where(jnp.arange(rows)[:, None] < along, value[0], value[1])
