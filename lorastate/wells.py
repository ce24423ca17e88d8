"""Fine-tuning's inner minimisers, and nodes split where they jump.

The inner problem of a node, min_chi ||sigma(Z_W + chi chi^T) - t||^2 + ||chi - omega||^2 / (2 v), has a loss that is
even in chi. Where it has two wells the minimiser jumps as omega crosses a surface through the origin. Plain nodes
see the jump only by chance: expectations converge slowly and their derivatives miss the term of the surface.

Nodes that can have two wells are therefore split in two, one on each side of the surface. Let e be the softest
direction of the loss at chi = 0 (the wells open along it). The component t = e . g of the node's noise is standard
normal given all else, and x = Phi(t) uniform. At the switching point t* of this line, where both wells are equally
deep, p = Phi(t*):

    E f = E [ p f(Phi^-1(p x)) + (1 - p) f(Phi^-1(p + (1 - p) x)) ]

whose integrand is smooth where f jumps only at t* (pre-integration in the sense of Griewank, Kuo, Leovey and
Sloan, 2018, with one sampled point a side). Any e and p keep the equation true. A node comes to its split smoothly,

    E f = E [ (1 - s) f(t) + s (split form) ],   s from 0 to 1 as the smallest eigenvalue of the Hessian at rest falls.

Updates of rank r > 1 are not split. Their wells come in orbits, chi O with O in O(r), on which omega chooses a point
without a jump wherever O can be reached by turning: only where it has to reflect, and where the loss has further wells,
does the minimiser jump. Several starts find it, a reflection of the lowest well among them; the share of nodes with two
wells says how far derivatives may be off.

The same two halves as everywhere: `locate` finds (loops, no derivative), `samples` differentiates (no loops).

Where no node can have two wells all this is idle, and most of what is remembered and compiled is for it. A search with
`Smooth` memory knows the plain samples only; if it meets a node that ought to be split it says so, and another one with
`Inner` memory has to be made.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import ndtr, ndtri

from . import prox
from .fixed_point import CHECK, COLD, WARM
from .prox import VectorProblem, attach_minimum, ldl_solve


class Student(NamedTuple):
    """omega = base + scale g at every node: `base` (T, N), scalar `scale`, standard normal `g` (T, N).

    For an update of rank r there are r T rows, and `scale` is one number or one per row, (r T, 1).

    `side` (N,) is +1 on a node and -1 on its mirror image g -> -g; `guess` (T, N) a start for descents.
    """

    base: Any
    scale: Any
    g: Any
    side: Any
    guess: Any

    def at(self, g):
        return self.base + self.scale * g


class Inner(NamedTuple):
    """What `locate` finds for one replica, without derivatives.

    `split`: whether any node is split. `chi` (3, T, N): minimisers at the plain, the left and the right samples (only
    the first where a node is not split) and `other`, the next lowest wells found there, with the flags `two_wells`,
    `ok` (3, N). `e` (T, N) softest direction, `switch` (N,) t* with the `wells` (2, T, N) there, `rooted` (N,) whether
    it was found. `needed`: whether the last thorough search, from many starts, found wells that the usual starts miss
    or may lose (true before the first one): checks are thorough then, with `thorough` the first evaluation as well.
    """

    split: Any
    chi: Any
    other: Any
    two_wells: Any
    ok: Any
    e: Any
    switch: Any
    rooted: Any
    wells: Any
    thorough: Any
    needed: Any


class Smooth(NamedTuple):
    """What `locate` finds where no node is split: the fields of `Inner` that are left, for the plain samples alone.

    A fifth of the memory, and a smaller program. `split`: whether a node ought to be split: then this will not do.
    """

    split: Any
    chi: Any
    other: Any
    two_wells: Any
    ok: Any
    thorough: Any
    needed: Any


def nothing(replicas: int, unknowns: int, nodes: int, split: bool = True) -> Inner | Smooth:
    """Placeholder for all replicas, to be filled by `locate`; `unknowns` = r T."""

    def no(*shape, kind: Any = float):
        return jnp.zeros((replicas, *shape), kind)

    if not split:
        rows, flags = no(1, unknowns, nodes), no(1, nodes, kind=bool)
        return Smooth(no(kind=bool), rows, rows, flags, flags, no(kind=bool), ~no(kind=bool))
    return Inner(
        no(kind=bool), no(3, unknowns, nodes), no(3, unknowns, nodes), no(3, nodes, kind=bool), no(3, nodes, kind=bool),
        no(unknowns, nodes), no(nodes), no(nodes, kind=bool), no(2, unknowns, nodes), no(kind=bool), ~no(kind=bool),
    )  # fmt: skip


def lost(inner: Inner | Smooth):
    """Share of descents of all replicas that did not converge."""
    missed = 1.0 - inner.ok  # (R, 3, N), or (R, 1, N)
    return jnp.mean(jnp.where(inner.split, missed.mean((1, 2)), missed[:, 0].mean(1)))


class _Line(NamedTuple):
    """The line g = across + e t through a node: its direction, the node's own t, and where omega . e = 0."""

    e: Any
    across: Any
    own: Any
    plane: Any


#: Largest |t*|; width of the range of v * (smallest eigenvalue) over which nodes come to be split; jump in chi from
#: which on a node is split exactly at t* (smaller ones lie between t* and the plane).
_FAR, _ZONE, _JUMP = 7.0, 0.15, 0.3


def _line(s: Student, e) -> _Line:
    own = jnp.sum(e * s.g, 0)
    plane = jnp.clip(-jnp.sum(e * s.base, 0) / s.scale, -_FAR, _FAR)
    return _Line(e, s.g - e * own, own, plane)


def _points(own, switch):
    """(p, t left, t right) for the switching point t*."""
    p = ndtr(switch)
    x = jnp.clip(ndtr(own), 1e-15, 1 - 1e-15)
    return p, ndtri(jnp.maximum(p * x, 1e-300)), -ndtri(jnp.maximum(ndtr(-switch) * (1 - x), 1e-300))


def _split_point(line: _Line, root, rooted, wells):
    """Where the line is split: at the root t* if chi jumps there by `_JUMP` or more; smoothly to the plane below."""
    gap = jnp.sum((wells[1] - wells[0]) ** 2, 0)
    return line.plane + jnp.where(rooted, _smooth(gap / _JUMP**2) * (root - line.plane), 0.0)


def _smooth(x):
    x = jnp.clip(x, 0.0, 1.0)
    return x * x * (3 - 2 * x)


def _hessian_at_rest(problem: VectorProblem):
    """v x Hessian (T, T, N) of the inner loss at chi = 0: where it is indefinite there are two wells at omega = 0."""
    g = problem.activation.loss_terms(problem.zw, problem.target)[1]
    return problem.v * (g + jnp.swapaxes(g, 0, 1)) + jnp.eye(g.shape[0])[:, :, None]


def _share(h, e):
    """s of every node: 1 where the smallest eigenvalue of `h` is negative, 0 from `_ZONE` on."""
    return _smooth(1 - jnp.einsum("an,abn,bn->n", e, h, e) / _ZONE)


def _softest(h):
    """Eigenvector (T, N) of the smallest eigenvalue of every H (T, T, N), by repeated squaring of (bound - H)."""
    n = h.shape[0]
    eye = jnp.eye(n)[:, :, None]
    a = eye * jnp.sqrt(jnp.sum(h * h, (0, 1))) - h

    def square(_, a):
        a = jnp.einsum("abn,bcn->acn", a, a)
        return a / jnp.sqrt(jnp.sum(a * a, (0, 1)))

    a = jax.lax.fori_loop(0, 20, square, a)
    # All columns are multiples of the eigenvector now: take the longest.
    size = jnp.sum(a * a, 0)
    v = jnp.take_along_axis(a, jnp.argmax(size, 0)[None, None], 1)[:, 0]
    return v / jnp.sqrt(jnp.sum(v * v, 0))


@jax.custom_jvp
def _attach_eigenvector(h, e):
    """Returns the unit eigenvector `e` (T, N) of `h` (T, T, N) and gives it its derivative."""
    return e


@_attach_eigenvector.defjvp
def _attach_eigenvector_jvp(primals, tangents):
    h, e = primals
    e = _attach_eigenvector(h, e)
    value = jnp.einsum("an,abn,bn->n", e, h, e)
    force = jnp.einsum("abn,bn->an", tangents[0], e)
    force = force - e * jnp.sum(e * force, 0)
    # (H - value) is singular along e only; there the force has no component.
    n = h.shape[0]
    bordered = h - jnp.eye(n)[:, :, None] * value + e[:, None] * e[None]
    return e, -ldl_solve(bordered, force)[0]


class _Pair(NamedTuple):
    """Minimisers (2, T, N) that descents have found at one place, with their depths (2, N), and whether any converged.

    Where they are collected by `meet`: the two lowest distinct ones, the second at infinite depth if there is none.
    """

    u: Any
    f: Any
    ok: Any

    @staticmethod
    def empty(u):
        return _Pair(jnp.stack([u, u]), jnp.full((2, u.shape[1]), jnp.inf), jnp.zeros((u.shape[1],), bool))

    def meet(self, u, f, ok):
        f = jnp.where(ok, f, jnp.inf)
        lower = f < self.f[0] - 1e-9
        new = jnp.max(jnp.abs(u - self.u[0]), 0) > 1e-4
        second = ~lower & new & (f < self.f[1])
        u = [jnp.where(lower, u, self.u[0]), jnp.where(lower, self.u[0], jnp.where(second, u, self.u[1]))]
        f = [jnp.where(lower, f, self.f[0]), jnp.where(lower, self.f[0], jnp.where(second, f, self.f[1]))]
        return _Pair(jnp.stack(u), jnp.stack(f), self.ok | ok), lower

    @property
    def two(self):
        return jnp.isfinite(self.f[1])

    @property
    def other(self):
        return jnp.where(self.two, self.u[1], self.u[0])


# Descents at a sample start at its last two wells. A cold search takes omega and the teacher instead, and both wells on
# the softest line (of updates of higher rank, reflections of the lowest well so far); a thorough one +-2 along every
# axis as well: a row of softmax is settled by one token, and the wells that are not on the softest line lie there.
_USUAL, _REACH = 4, 2.0


def _axis(k, t: int, n: int):
    """+-2 along every axis, k = _USUAL, ..., _USUAL + 2 t - 1."""
    along = jax.nn.one_hot(jnp.clip(k - _USUAL, 0) // 2, t)[:, None] * jnp.where(k % 2 == 0, _REACH, -_REACH)
    return jnp.broadcast_to(along, (t, n))


def _search_plain(problem: VectorProblem, usual, count):
    """`(pair, improved)` at the plain samples from the first `count` starts: the `usual` ones, (1 to _USUAL, r T, N),
    made up to _USUAL by reflections of what has been found, and the axes."""
    t, n = problem.omega.shape
    given = len(usual)

    def one(carry):
        k, pair, improved = carry
        u = usual[jnp.minimum(k, given - 1)]
        if given < _USUAL:
            u = jnp.where(k < given, u, _reflected(problem, pair.u[0]))
        u = jnp.where(k < _USUAL, u, _axis(k, t, n))
        pair, lower = pair.meet(*prox.locate(problem, u))
        return k + 1, pair, improved | (lower & (k > 0))

    carry = (jnp.array(0), _Pair.empty(problem.omega), jnp.zeros((n,), bool))
    return jax.lax.while_loop(lambda c: c[0] < count, one, carry)[1:]


def _reflected(problem: VectorProblem, u):
    """chi (1 - 2 c c^T), as deep a well of the loss as chi: c the direction in which chi and omega agree least."""
    chi, omega = (jnp.stack(prox.columns(a, len(problem.zw))) for a in (u, problem.omega / problem.v))
    agree = jnp.einsum("ktn,ltn->kln", chi, omega)
    c = _softest(agree + jnp.swapaxes(agree, 0, 1))
    return (chi - 2 * c[:, None] * jnp.einsum("kn,ktn->tn", c, chi)).reshape(u.shape)


# Descents for a node that is split, in their order, (point, start): at the origin from two starts; at the switching
# point in both wells, in a few rounds on t; at the plain, the left and the right sample. Nodes that are not split have
# the plain sample only.
_ORIGIN, _SWITCH, _SAMPLE = 0, 1, 2
_ROUNDS = 8
_FIRST_SAMPLE = 2 + 2 * _ROUNDS
#: Index of the descent by which a node with one well has been given four rounds.
_ENOUGH = 1 + 2 * 4
#: Nodes that are searched together.
_TOGETHER = 32


def _jobs(tokens: int):
    """(point, start) of every descent, and how many there are at most at a sample."""
    block = _USUAL + 2 * tokens
    samples = [(_SAMPLE + side, start) for side in range(3) for start in range(block)]
    return np.array([(_ORIGIN, 0), (_ORIGIN, 1)] + _ROUNDS * [(_SWITCH, 0), (_SWITCH, 1)] + samples), block


def locate(problem: VectorProblem, s: Student, previous: Inner | Smooth, cold: Any = COLD) -> Inner | Smooth:
    """Finds the inner minimisers of one replica; `problem` at omega = 0. `cold` as in `fixed_point.Map`."""
    problem, s, previous = jax.lax.stop_gradient((problem, s, previous))
    cold = jnp.asarray(cold)
    search = ((cold == COLD) & previous.thorough) | ((cold == CHECK) & previous.needed)
    cold = cold > WARM
    t, n = problem.omega.shape
    omega = s.at(s.g)
    plain, start = problem._replace(omega=omega), jnp.where(cold, omega, previous.chi[0])
    # Both wells of a node that is known to have two are followed.
    second = jnp.where(cold, s.side * s.guess, previous.other[0])
    few = jnp.where(cold, 1 if splits(problem.rank) else _USUAL, jnp.where(jnp.any(previous.two_wells[0]), 2, 1))
    if splits(problem.rank):
        h = _hessian_at_rest(problem)
        # No eigenvalue in the zone: no node is split, and no eigenvectors are needed.
        eye = jnp.eye(h.shape[0])[:, :, None]
        near = ldl_solve(h - _ZONE * eye, problem.omega)[1] <= 0
        e = jax.lax.cond(search, lambda: _REACH * _softest(h), lambda: jnp.zeros_like(start))
        usual = jnp.stack([start, second, -e, e])
        if isinstance(previous, Inner):  # which follows them node by node
            few = 1
    else:
        h, near = None, jnp.zeros((n,), bool)
        usual = jnp.stack([start, second])
    pair, improved = _search_plain(plain, usual, jnp.where(search, _USUAL + 2 * t, few))
    found = Smooth(
        split=jnp.any(near),
        chi=jnp.where(pair.ok, pair.u[0], start)[None],
        other=jnp.where(cold, pair.other, previous.other[0])[None],
        two_wells=jnp.where(cold, pair.two, previous.two_wells[0])[None],
        ok=pair.ok[None],
        thorough=previous.thorough,
        needed=jnp.where(search, jnp.any(improved | (pair.two & ~near)), previous.needed),
    )
    if isinstance(previous, Smooth):
        return found
    inner = previous._replace(
        split=found.split,
        chi=previous.chi.at[0].set(found.chi[0]),
        other=previous.other.at[0].set(found.other[0]),
        ok=jnp.stack([pair.ok, ~near, ~near]),
        two_wells=jnp.zeros((3, n), bool).at[0].set(found.two_wells[0]),
        rooted=previous.rooted & near & ~cold,
        e=jnp.zeros_like(start),
        needed=found.needed,
    )
    if h is None:
        return inner
    more = ~cold & inner.two_wells[0] & ~near
    size = min(n, _TOGETHER)

    def per_node(inner):
        return inner._replace(split=None, thorough=None, needed=None)

    def group(carry):
        inner, near, more = carry
        whole = jnp.any(near)
        index = jnp.nonzero(jnp.where(whole, near, more), size=size, fill_value=n - 1)[0]
        part = jax.tree_util.tree_map(lambda a: a[..., index], per_node(inner))
        some = s._replace(base=s.base[:, index], g=s.g[:, index], side=s.side[index], guess=s.guess[:, index])
        found = _locate_group(problem.take(index), some, part, h[..., index], cold, search, whole)
        # A node that only fills up the group may be of the other kind: it is left alone.
        mine = jnp.where(whole, near, more)[index]
        put = jax.tree_util.tree_map(
            lambda a, v: a.at[..., index].set(jnp.where(mine, v, a[..., index])),
            per_node(inner),
            found,
        )
        put = put._replace(split=inner.split, thorough=inner.thorough, needed=inner.needed)
        return put, near.at[index].set(near[index] & ~whole), more.at[index].set(more[index] & whole)

    return jax.lax.while_loop(lambda c: jnp.any(c[1] | c[2]), group, (inner, near, more))[0]


class _Work(NamedTuple):
    inner: Inner
    pair: _Pair


def _locate_group(problem: VectorProblem, s: Student, inner: Inner, h, cold, search, whole) -> Inner:
    """A group of nodes: both wells, the switching point and the minimisers at all samples if they are to be split
    (`whole`), otherwise the minimisers at the plain sample."""
    t, n = problem.omega.shape
    jobs, block = _jobs(t)
    e = _softest(h)
    # Mirrored nodes look the other way, so that g -> -g stays an exact symmetry of the split set; otherwise the
    # direction keeps its sense from one evaluation to the next.
    e = e * jnp.where(jnp.sum(e * s.guess, 0) < 0, -1.0, 1.0) * s.side
    line = _line(s, e)
    kept = inner.rooted & ~cold
    inner = inner._replace(switch=jnp.where(kept, inner.switch, line.plane))

    def starts_at(point):
        """How many descents there are."""
        outer = jnp.where(search, block, jnp.where(cold, _USUAL, 2))
        return jnp.where(point <= _SAMPLE, 2, outer)

    def job(j, w: _Work) -> _Work:
        point, k = jnp.asarray(jobs)[j]
        inner = w.inner
        side = jnp.clip(point - _SAMPLE, 0, 2)

        def origin():
            return problem.omega, jnp.where(k == 0, e, s.guess)

        def switch():
            return s.at(line.across + e * inner.switch), inner.wells[k & 1]

        def sample():
            split = _split_point(line, inner.switch, inner.rooted, inner.wells)
            omega = s.at(_three(s, line, split)[1][side])
            last = ~cold | (side == 0)
            starts = [jnp.where(last, inner.chi[side], omega), jnp.where(last, inner.other[side], s.side * s.guess)]
            return omega, jnp.stack([*starts, *inner.wells, _axis(k, t, n)])[jnp.minimum(k, _USUAL)]

        omega, start = jax.lax.switch(jnp.minimum(point, _SAMPLE), [origin, switch, sample])
        u, f, ok = prox.locate(problem._replace(omega=omega), start)

        def both():
            pair = w.pair
            return pair._replace(u=pair.u.at[k].set(u), f=pair.f.at[k].set(f))

        def lowest():
            fresh = _Pair.empty(u)
            before = jax.tree_util.tree_map(lambda a, b: jnp.where(k == 0, a, b), fresh, w.pair)
            return before.meet(u, f, ok)[0]

        w = w._replace(pair=jax.lax.cond(point < _SAMPLE, both, lowest))
        pair = w.pair

        def at_origin():
            c = jnp.where(pair.f[0] < pair.f[1], pair.u[0], pair.u[1])
            c = c * jnp.where(jnp.sum(c * e, 0) < 0, -1.0, 1.0)
            c = jnp.where(jnp.sum(c * c, 0) > 0.01, c, 0.1 * e)
            return inner._replace(wells=jnp.where(kept, inner.wells, jnp.stack([-c, c])))

        def at_switch():
            a, b = pair.u
            distinct = jnp.max(jnp.abs(a - b), 0) > 1e-3
            slope = s.scale / problem.v * jnp.sum(e * (b - a), 0)
            good = distinct & (slope > 0)
            newton = (pair.f[1] - pair.f[0]) / jnp.where(good, slope, 1.0)
            # With one well only, the interval with two lies where this one's side is less favoured.
            seek = -0.4 * jnp.sign(jnp.sum(e * a, 0))
            move = jnp.where(good, jnp.clip(newton, -1.0, 1.0), seek)
            found = good & (jnp.abs(newton) < 1e-6) & (jnp.abs(inner.switch) < _FAR)
            switch = jnp.clip(inner.switch + move, -_FAR, _FAR)
            # The next step of a root that is found is below rounding: the wells stay those at `switch`.
            switch = jnp.where(found, inner.switch, switch)
            reach = jnp.sqrt(jnp.sum(a * a, 0)) + 0.1
            wells = jnp.where(good, jnp.stack([a, b]), jnp.stack([-reach * e, reach * e]))
            return inner._replace(switch=switch, rooted=found, wells=wells)

        def at_sample():
            return inner._replace(
                chi=inner.chi.at[side].set(pair.u[0]),
                other=inner.other.at[side].set(pair.other),
                two_wells=inner.two_wells.at[side].set(pair.two),
                ok=inner.ok.at[side].set(pair.ok),
            )

        branch = jnp.where(k == starts_at(point) - 1, jnp.minimum(point, _SAMPLE) + 1, 0)
        return w._replace(inner=jax.lax.switch(branch, [lambda: inner, at_origin, at_switch, at_sample]))

    # The rounds end when every root is found, or nodes that seem to have one well only have been given some of them.
    def one(carry):
        j, w = carry
        w = job(j, w)
        single = jnp.max(jnp.abs(w.pair.u[0] - w.pair.u[1]), 0) <= 1e-3
        over = jnp.all(w.inner.rooted | (single & (j >= _ENOUGH))) & (j % 2 == 1) & (j > 1)
        k = (j - _FIRST_SAMPLE) % block
        after = jnp.where(k == starts_at(jnp.asarray(jobs)[j, 0]) - 1, j + block - k, j + 1)
        return jnp.where(j < _FIRST_SAMPLE, jnp.where(over, _FIRST_SAMPLE, j + 1), after), w

    last = jnp.where(whole, len(jobs), _FIRST_SAMPLE + block)
    start = jnp.where(whole, jnp.where(jnp.all(kept), 2, 0), _FIRST_SAMPLE)
    work = _Work(inner, _Pair.empty(problem.omega))
    w = jax.lax.while_loop(lambda c: c[0] < last, one, (start, work))[1]
    return w.inner._replace(e=jnp.where(whole, e, 0.0))


@jax.custom_jvp
def _attach_switch(problem: VectorProblem, along, wells, t):
    """Returns t*, where both wells of `problem` at omega + along t are equally deep, and gives it its derivative."""
    return t


@_attach_switch.defjvp
def _attach_switch_jvp(primals, tangents):
    problem, along, wells, t = primals
    t = _attach_switch(problem, along, wells, t)

    def twice(problem, along):
        return _repeat(problem, jnp.stack([problem.omega + along * t] * 2))

    both = attach_minimum(twice(problem, along), flat(wells))
    a, b = jnp.split(both, 2, -1)

    # The wells are minimisers, so their own motion does not enter the first derivative of the depths.
    def gap(problem, along):
        f = twice(problem, along).terms(both)[0]
        return f[: len(t)] - f[len(t) :]

    change = jax.jvp(gap, (problem, along), (tangents[0], tangents[1]))[1]
    slope = jnp.sum(along * (b - a), 0) / problem.v
    good = slope > 1e-9
    return t, jnp.where(good, -change / jnp.where(good, slope, 1.0), 0.0)


def flat(a):
    """(k, ..., N) -> (..., k N): k samples of the nodes side by side, as one set of nodes."""
    return jnp.concatenate(list(a), -1)


def _repeat(problem: VectorProblem, omega) -> VectorProblem:
    """The problem on k copies of its nodes, at omega (k, T, N)."""
    zw, target = (flat([a] * len(omega)) for a in (problem.zw, problem.target))
    return problem._replace(zw=zw, target=target, omega=flat(omega))


def _three(s: Student, line: _Line, switch):
    """p, and g (3, T, N) at the plain, the left and the right sample of a line that is split at `switch`."""
    p, left, right = _points(line.own, switch)
    return p, jnp.stack([s.g, line.across + line.e * left, line.across + line.e * right])


def refresh(problem: VectorProblem, s: Student, inner: Inner | Smooth, steps: Any = 3) -> Inner | Smooth:
    """`inner` moved to a problem that is very near the one it was found for: a few Newton steps and no search.

    Nodes stay split where they were: the equation of the split holds for any point.
    """

    def alone():
        chi = prox.polish(problem._replace(omega=s.at(s.g)), inner.chi[0], steps)
        return inner._replace(chi=inner.chi.at[0].set(chi))

    def split(inner: Inner):
        line = _line(s, inner.e)
        _, g = _three(s, line, _split_point(line, inner.switch, inner.rooted, inner.wells))
        chi = prox.polish(_repeat(problem, s.at(g)), flat(inner.chi), steps)
        return inner._replace(chi=jnp.stack(jnp.split(chi, 3, -1)))

    return either(problem, inner, split, alone)


def splits(rank: int) -> bool:
    """Whether nodes are split where the minimiser jumps: those of updates of rank one."""
    return rank == 1


def either(problem: VectorProblem, inner: Inner | Smooth, split: Callable[[Inner], Any], alone: Callable[[], Any]):
    """`split(inner)` where any node of the replica is split, otherwise `alone()`."""
    if not splits(problem.rank) or isinstance(inner, Smooth):
        return alone()
    return jax.lax.cond(inner.split, lambda _: split(inner), lambda _: alone(), 0.0)


def samples(problem: VectorProblem, s: Student, inner: Inner):
    """The split nodes of one replica with derivatives: `(weight factor (3 N,), g (T, 3 N), chi (T, 3 N))`.

    `problem` at omega = 0. The three parts are the plain, the left and the right samples.
    """
    h = _hessian_at_rest(problem)
    unit = jnp.sum(inner.e * inner.e, 0) > 0.5
    e = jnp.where(unit, _attach_eigenvector(h, inner.e), 0.0)
    line = _line(s, e)
    share = jnp.where(unit, _share(h, e), 0.0)
    on_line = problem._replace(omega=s.at(line.across))
    root = _attach_switch(on_line, s.scale * e, inner.wells, inner.switch)
    pair = attach_minimum(_repeat(problem, jnp.stack([s.at(line.across + e * root)] * 2)), flat(inner.wells))
    p, g = _three(s, line, _split_point(line, root, inner.rooted, jnp.split(pair, 2, -1)))
    chi = attach_minimum(_repeat(problem, s.at(g)), flat(inner.chi))
    return flat([1 - share, share * p, share * (1 - p)]), flat(g), chi


def plain(problem: VectorProblem, s: Student, inner: Inner | Smooth):
    """The minimisers (T, N) at the plain nodes, with their derivative."""
    return attach_minimum(problem._replace(omega=s.at(s.g)), inner.chi[0])
