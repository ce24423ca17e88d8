"""What the two stages share: a student field correlated with a teacher field, and potentials of its law.

In both stages the theory is the expectation, over a Gaussian pair (teacher, student), of an inner minimum:

    pre-training   teacher Y (size Q0 + delta/2),  student Omega,  response V, overlap M, norm Q
    fine-tuning    teacher chi* (size q0),         student omega,  response v, overlap m, norm q

The pair is written as  student = (overlap / size) teacher + noise * g  with g an independent standard field and
noise^2 = norm - overlap^2 / size >= 0. The solver works with (log response, overlap, noise): the teacher's
nodes never move, and the trivial solution (a student that is exactly zero) is an ordinary point.

All three are numbers or, for an update of higher rank than its teacher, pairs (2,): of its directions along the
teacher's and of the spare ones, whose overlap is zero.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

#: Floors of response and noise; a solution that sits on them is the zero student and is reported as such.
RESPONSE_FLOOR, NOISE_FLOOR = 1e-9, 1e-7


class Order(NamedTuple):
    """Order parameters of a stage: `response` (V or v), `overlap` (M or m), `noise` (see the module)."""

    response: Any
    overlap: Any
    noise: Any

    def norm(self, size):
        """Q (or q) = overlap^2 / size + noise^2."""
        return self.overlap**2 / size + self.noise**2

    @property
    def along(self) -> Order:
        """The numbers of the directions along the teacher's."""
        return self if jnp.ndim(self.response) == 0 else Order(*(v[0] for v in self))

    def encode(self):
        """The solver's coordinates, (3,), or (5,) for pairs: the overlap of spare directions is none of them."""
        response, overlap, noise = (jnp.atleast_1d(v) for v in (jnp.log(self.response), self.overlap, self.noise))
        return jnp.concatenate([response, overlap[:1], noise])


def decode(x) -> Order:
    """`Order` from the solver's coordinates: pairs from (5,); else from the first three."""
    if len(x) < 5:
        return Order(jnp.exp(x[0]), x[1], x[2])
    return Order(jnp.exp(x[:2]), jnp.stack([x[2], jnp.zeros_like(x[2])]), x[3:])


def from_norm(response, overlap, norm, size) -> Order:
    """`Order` from (V, M, Q); values at or below zero are lifted to the floors, NaN stays NaN."""
    square = norm - overlap**2 / size
    noise = jnp.sqrt(jnp.where(square <= NOISE_FLOOR**2, NOISE_FLOOR**2, square))
    return Order(jnp.where(response <= RESPONSE_FLOOR, RESPONSE_FLOOR, response), overlap, noise)


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


class Slopes(NamedTuple):
    """Partial derivatives of a potential C(V, M, Q): what the conjugates are made of."""

    response: Any
    overlap: Any
    norm: Any


def slopes(potential, order: Order, size) -> Slopes:
    """dC/dV, dC/dM, dC/dQ of `potential(order)`, by the chain rule through (V, M, noise)."""
    d = jax.grad(potential)(order)
    by_norm = d.noise / (2 * order.noise)
    return Slopes(d.response, d.overlap - 2 * order.overlap / size * by_norm, by_norm)
