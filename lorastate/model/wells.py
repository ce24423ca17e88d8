"""The two lowest wells of the inner problem at every node, and averages of what jumps between them.

The inner problem of a node, min_u of a loss of u plus a quadratic pull to a point x, may have several minima. The
lowest, f(x), is continuous, but its minimiser jumps where two wells are equally deep. First derivatives of averages of
f need no more than the minimiser (the envelope theorem); derivatives of averages of anything else, h, have a term from
the surface where it jumps,

    d E h / d theta = E [dh / d theta] + E [(h_1 - h_2) delta(f_2 - f_1) d(f_2 - f_1) / d theta],

1 and 2 the two lowest wells. `pick` returns h of the lower well and differentiates by this formula, with a
kernel for delta: all derivatives, whatever theta is, then see the jumps.

The same two halves as everywhere: `locate` finds (loops, no derivative), `lowest` differentiates (no loops).
"""

from __future__ import annotations

from math import gamma
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from . import proximal as prox
from .proximal import attach_minimum, depth


class Wells(NamedTuple):
    """The two lowest wells found at every sample: u (2, m, s N), the second equal to the first where there is only one;
    flags `two` and `ok` (s N,), the latter whether any descent converged. No derivative.

    `anchors` (_ANCHORS, m, N): places where descents from many starts have ended at some samples of the node, the
    `loss` (_ANCHORS, N) there, infinite for what is none, and which of them each sample was `tried` from (_TRIED, s N),
    -1 for none. Where no node should have two wells there is room for one alone, u (1, m, N), and `two` says where that
    may be wrong.
    """

    u: Any
    two: Any
    ok: Any
    anchors: Any = None
    loss: Any = None
    tried: Any = None


def nothing(parts: int, unknowns: int, nodes: int, samples: int = 1, alone: bool = False) -> Wells:
    """Placeholder for all parts, to be filled by `locate`, or with `alone` by `locate_alone`."""
    flags = jnp.zeros((parts, samples * nodes), bool)
    found = Wells(jnp.zeros((parts, 1 if alone else 2, unknowns, samples * nodes)), flags, flags)
    if alone:
        return found
    anchors, tried = jnp.zeros((parts, _ANCHORS, unknowns, nodes)), jnp.zeros((parts, _TRIED, samples * nodes), int)
    return found._replace(anchors=anchors, loss=jnp.zeros((parts, _ANCHORS, nodes)), tried=tried)


def lost(wells: Wells):
    """Share of nodes where no descent converged."""
    return 1 - jnp.mean(1.0 * wells.ok)


#: Relative difference of depths that count as equal, and distance of minimisers that count as one.
_LEVEL, _SAME = 1e-9, 1e-4


class _Pair(NamedTuple):
    """The two lowest distinct wells so far, a and b (m, N), with their depths, infinite where there is none."""

    a: Any
    b: Any
    fa: Any
    fb: Any

    def meet(self, u, f):
        # A well that is reached again, only a rounding lower, is not a second one.
        lower, apart = f < (1 - _LEVEL) * self.fa, jnp.max(jnp.abs(u - self.a), 0) > _SAME
        second = ~lower & (f < self.fb) & apart
        b = jnp.where(lower & apart, self.a, jnp.where(second, u, self.b))
        fb = jnp.where(lower & apart, self.fa, jnp.where(second, f, self.fb))
        return _Pair(jnp.where(lower, u, self.a), b, jnp.where(lower, f, self.fa), fb)

    def wells(self) -> Wells:
        two = jnp.isfinite(self.fb)
        return Wells(jnp.stack([self.a, jnp.where(two, self.b, self.a)]), two, jnp.isfinite(self.fa))


def descend(problem, starts, asked, count: Any, last: float = prox.LAST) -> Wells:
    """The two lowest distinct wells that descents from the first `count` of `starts` (S, m, N) reach; `asked` (S, N):
    at which nodes each is made; `last`: see `prox.locate`."""
    problem, starts = jax.lax.stop_gradient((problem, starts))

    def one(k, pair):
        u, f, ok = prox.locate(problem, starts[k], asked=asked[k], last=last)
        return pair.meet(u, jnp.where(ok, f, jnp.inf))

    none = jnp.full(starts.shape[-1:], jnp.inf)
    first = _Pair(starts[0], starts[0], none, none)
    return jax.lax.fori_loop(0, count, one, first).wells()


def _descend_together(problem, starts) -> Wells:
    """`descend` from all starts at once: of a few nodes there are always some that would hold the others."""
    count, m, n = starts.shape
    many = tiled(problem, jnp.tile(problem.omega, (1, count)))
    ends, f, ok = prox.locate(many, jnp.concatenate([*starts], -1))
    each = jnp.moveaxis(ends.reshape(m, count, n), 1, 0), jnp.where(ok, f, jnp.inf).reshape(count, n)
    none = jnp.full(n, jnp.inf)
    first = _Pair(problem.omega, problem.omega, none, none)
    return jax.lax.scan(lambda pair, end: (pair.meet(*end), None), first, each)[0].wells()


def polish(problem, wells: Wells, steps: Any = 3) -> Wells:
    """Both wells after a very small change of the problem: a few Newton steps and no search."""
    u = jax.lax.map(lambda u: prox.polish(problem, u, steps), wells.u)
    return wells._replace(u=u if len(u) == 1 else jnp.stack([u[0], jnp.where(wells.two, u[1], u[0])]))


#: Reach of the descents that start on the axes: a row of softmax is settled by one token, and wells lie there.
_REACH = 2.0


def _many_starts(omega, guess):
    """Starts of a thorough search (S, m, N): the point itself, +- a guess, both sides of every axis."""
    m, n = omega.shape
    axes = [jnp.broadcast_to(side * e[:, None], (m, n)) for e in _REACH * np.eye(m) for side in (1, -1)]
    return jnp.stack([omega, guess, -guess, *axes])


#: Anchors of a node, at how many of its samples (of half of them, if there are fewer) they are looked for, and how many
#: are tried at a sample.
_ANCHORS, _LOOKED_FROM, _TRIED = 16, 8, 3
#: How much deeper than estimated a well may become; length of a last step of its search: solves with breaking are not
#: exact enough for the error of its square to matter.
_FOLLOWS, _LAST = 3.0, 1e-5


def _stiffness(problem):
    """Curvature of the pull to omega in every unknown, (m, 1)."""
    return jnp.broadcast_to(1 / jnp.asarray(problem.v), (len(problem.omega), 1))


def _anchored(problem, x, guess):
    """Where descents from many starts, or mirror images of these, end at some of the samples x (m, s N) of every node:
    distinct places (_ANCHORS, m, N), those first that are nearest to the deepest of a sample, and the loss there
    (_ANCHORS, N), infinite where there are fewer.

    At samples, not at omega: what is a well at one may be none nearer to omega, where the pull is another.
    """
    m, n = problem.omega.shape
    looked_at = max(min(_LOOKED_FROM, x.shape[1] // (2 * n)), 1)
    points = x[:, : looked_at * n]
    many, stiff = tiled(problem, points), _stiffness(problem)

    def one(start):
        u, f, ok = prox.locate(many, start)
        return u, jnp.where(ok, f - jnp.sum(stiff * (u - points) ** 2, 0) / 2, jnp.inf)

    places, loss = jax.lax.map(one, _many_starts(points, jnp.tile(guess, (1, looked_at))))
    places = jnp.concatenate([places, jax.lax.map(lambda a: prox.reflected(many, a), places)])
    places = jnp.moveaxis(places.reshape(-1, m, looked_at, n), 1, 2).reshape(-1, m, n)
    loss = jnp.concatenate([loss, loss]).reshape(-1, n)

    def nearer(behind, point):
        cost = loss + jnp.sum(stiff[None] * (places - point[None]) ** 2, 1) / 2
        more = cost - jnp.min(cost, 0, keepdims=True)
        return jnp.minimum(behind, jnp.where(jnp.isfinite(cost), more, jnp.inf)), None

    behind = jax.lax.scan(nearer, jnp.full_like(loss, jnp.inf), jnp.moveaxis(points.reshape(m, looked_at, n), 1, 0))[0]

    def nearest(behind, _):
        index = jnp.argmin(behind, 0)
        place = jnp.take_along_axis(places, index[None, None], 0)[0]
        there = jnp.where(jnp.isfinite(jnp.min(behind, 0)), jnp.take_along_axis(loss, index[None], 0)[0], jnp.inf)
        return jnp.where(jnp.max(jnp.abs(places - place[None]), 1) > 100 * _SAME, behind, jnp.inf), (place, there)

    return jax.lax.scan(nearest, behind, length=_ANCHORS)[1]


def _promising(problem, x, anchors, loss):
    """Which anchors promise to be deepest at the samples x (m, s N), (_TRIED, s N), -1 where no other does; and those
    anchors, (_TRIED, m, s N).

    Its loss with its pull to x is an upper bound of the depth of the well of an anchor. The well follows x, which makes
    it deeper by about |x - omega|^2/(2 v) at most: where it could not become the lowest by several times that, it
    promises nothing.
    """
    m, n = problem.omega.shape
    stiff = _stiffness(problem)[..., None]
    points = x.reshape(m, -1, n)

    def cost(a_loss):
        a, loss = a_loss
        return loss[None] + jnp.sum(stiff * (a[:, None] - points) ** 2, 0) / 2

    costs = jax.lax.map(cost, (anchors, loss))
    follows = jnp.sum(stiff * (points - problem.omega[:, None]) ** 2, 0) / 2
    enough = jnp.min(costs, 0) + _FOLLOWS * follows + _LEVEL
    costs = jnp.where(costs < enough[None], costs, jnp.inf)

    def best(costs, _):
        index = jnp.argmin(costs, 0)  # (s, N)
        place = jnp.moveaxis(jnp.take_along_axis(anchors, index[:, None], 0), 0, 1)
        known = jnp.where(jnp.isfinite(jnp.min(costs, 0)), index, -1)
        costs = jnp.where(jnp.arange(_ANCHORS)[:, None, None] == index[None], jnp.inf, costs)
        return costs, (known.reshape(-1), place.reshape(m, -1))

    return jax.lax.scan(best, costs, length=_TRIED)[1]


def locate(problem, x, guess, previous: Wells, cold, look: Any = True, anew: Any = False) -> Wells:
    """The two lowest wells at the points x (m, s N), s samples of every node of `problem` (samples first).

    A `cold` search looks for the anchors of every node. At a sample it descends from x and from the anchors, or mirror
    images of some, that promise to be lowest there. Otherwise both wells are followed from where they were, and, if
    asked to `look`, anchors are tried where others promise most than did before. Far from where they were looked for
    there are other anchors, which are looked for `anew`, and all tried that promise anything.
    """
    problem, x, guess = jax.lax.stop_gradient((problem, x, guess))
    cold, anew = jnp.asarray(cold), cold | jnp.asarray(anew)
    known = previous.anchors, previous.loss
    anchors, loss = jax.lax.cond(anew, lambda: _anchored(problem, x, guess), lambda: known)

    def looked():
        tried, places = _promising(problem, x, anchors, loss)
        new = (tried >= 0) & (anew | ~jnp.any(tried[:, None] == previous.tried[None], 1))
        return tried, places, new

    def followed():
        return previous.tried, jnp.zeros((_TRIED, *x.shape)), jnp.zeros(previous.tried.shape, bool)

    look = anew | look
    tried, places, new = jax.lax.cond(look, looked, followed)
    starts = jnp.concatenate([jnp.stack([jnp.where(cold, x, previous.u[0]), previous.u[1]]), places])
    asked = jnp.stack([jnp.ones_like(previous.two), ~cold & previous.two, *new])
    found = descend(tiled(problem, x), starts, asked, jnp.where(look, len(starts), 2), _LAST)
    return found._replace(anchors=anchors, loss=loss, tried=tried)


#: Of so many nodes `locate_alone` searches one thoroughly.
_LOOKED_AT = 16


def locate_alone(problem, guess, previous: Wells, cold, anew: Any = False) -> Wells:
    """One well at every node of `problem`, from its omega or, unless `cold`, from where it was. If `cold`, and if asked
    to look `anew`, a second one is looked for at a few nodes, from many starts."""
    problem, guess = jax.lax.stop_gradient((problem, guess))
    u, _, ok = prox.locate(problem, jnp.where(cold, problem.omega, previous.u[0]))
    some = max(len(ok) // _LOOKED_AT, 1)

    def look():
        few = problem.at(lambda a: a[..., :some])
        found = _descend_together(few, _many_starts(few.omega, guess[:, :some]))
        return jnp.concatenate([found.two, previous.two[some:]])

    return Wells(u[None], jax.lax.cond(cold | jnp.asarray(anew), look, lambda: previous.two), ok)


def share(wells: Wells):
    """For every node of one part, what it adds to the share of nodes with two wells."""
    looked_at = _LOOKED_AT if len(wells.u) == 1 and wells.two.shape[-1] >= _LOOKED_AT else 1
    return wells.two.astype(float) * looked_at


def tiled(problem, x):
    """The problem on every sample x (m, s N) of its nodes."""
    count = x.shape[-1] // problem.omega.shape[-1]

    def repeat(a):
        return jnp.tile(a, (1,) * (a.ndim - 1) + (count,))

    return problem._replace(zw=repeat(problem.zw), target=repeat(problem.target), omega=x)


#: Width of the kernel that stands for delta, in mean distances between the depths of two wells.
_WIDTH = 0.5
#: The powers of the distance for which it is exact. Where two wells part, at a cusp u^4/4 - s u^2/2 - t u, they are 2
#: sqrt(s) apart and differ in depth by 3 s^2/4 at most: pairs with a distance of depths g have s > sqrt(4 g/3), and
#: averages of their jumps over s fall as g^(3/4) from g = 0 on.
_POWERS = np.array([0.0, 0.75, 2.0])


def _exact() -> np.ndarray:
    """c_k of the kernel sum_k c_k |x|^p_k exp(-x^2/2) with moments of |x|^p that are 1 for p = 0, else 0."""
    moments = [[2 ** ((p + 1) / 2) * gamma((p + 1) / 2) for p in row] for row in np.add.outer(_POWERS, _POWERS)]
    return np.linalg.solve(moments, _POWERS == 0)


_FACTORS = _exact()


class Lowest(NamedTuple):
    """Minimisers of the wells (2, m, N) with their derivatives, depths f (2, N), and which nodes have two; (1, m, N)
    and (1, N) where each has one."""

    u: Any
    f: Any
    two: Any

    @property
    def depth(self):
        """f of the lower well."""
        return self.f[0] if len(self.f) == 1 else jnp.where(self.f[0] <= self.f[1], *self.f)

    def pick(self, h):
        """h of the lower well, from `h` of all, (2, ..., N); see the module for its derivative."""
        if len(h) == 1:
            return h[0]
        gap = self.f[1] - self.f[0]
        known = jax.lax.stop_gradient(jnp.where(self.two, jnp.abs(gap), 0.0))
        width = _WIDTH * jnp.sum(known) / jnp.maximum(jnp.sum(self.two, dtype=known.dtype), 1) + 1e-12
        return _pick(jnp.where(self.two, gap, jnp.inf), width, *h)


def lowest(problem, wells: Wells) -> Lowest:
    """The wells with derivatives."""
    u = jax.vmap(lambda u: attach_minimum(problem, u))(wells.u)
    return Lowest(u, jax.vmap(lambda u: depth(problem, u))(u), wells.two)


@jax.custom_jvp
def _pick(gap, width, a, b):
    return jnp.where(jnp.broadcast_to(gap >= 0, a.shape), a, b)


@_pick.defjvp
def _pick_jvp(primals, tangents):
    gap, width, a, b = primals
    two = jnp.isfinite(gap)
    near = jnp.where(two, jnp.abs(gap), width) / width
    a0, a1, a2 = _FACTORS
    shape = (a0 + a1 * jnp.sqrt(near * jnp.sqrt(near)) + a2 * near**2) * jnp.exp(-(near**2) / 2)
    kernel = jnp.where(two, shape / width, 0.0)
    change = jnp.where(two, tangents[0], 0.0)
    jumps = jnp.broadcast_to(kernel * change, a.shape)
    return _pick(gap, width, a, b), _pick(gap, width, *tangents[2:]) + (a - b) * jumps


def debiased(average, halves):
    """2 f(all samples) - the mean of f(each half): free of what falls as 1 / samples in a nonlinear f."""
    return 2 * average - halves.mean(0)
