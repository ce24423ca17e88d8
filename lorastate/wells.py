"""Fine-tuning's inner minimisers, and nodes split where they jump.

The inner problem of a node, min_chi ||sigma(Z_W + chi chi^T) - t||^2 + ||chi - omega||^2 / (2 v), has a loss that is
even in chi. Where it has two wells the minimiser jumps as omega crosses a surface through the origin. Plain nodes
see the jump only by chance: expectations converge slowly and their derivatives miss the term of the surface.

Every node is therefore split in two, one on each side of the surface. At omega = 0 the wells are +-chi_0 and the
surface has the normal chi_0. With e = chi_0 / |chi_0| the component t = e . g of the node's noise is standard normal given
all else, and x = Phi(t) uniform. At the switching point t* of this line, where both wells are equally deep, p = Phi(t*):

    E f = E [ p f(Phi^-1(p x)) + (1 - p) f(Phi^-1(p + (1 - p) x)) ]

whose integrand is smooth where f jumps only at t* (pre-integration in the sense of Griewank, Kuo, Leovey and
Sloan, 2018, with one sampled point a side). Any p keeps the equation true; where there is no second well it tends
smoothly to 1, which is the plain node. The same two functions as everywhere: `locate` finds (loops, no derivative),
`samples` gives what was found its derivative (no loops).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import ndtr, ndtri

from . import prox
from .prox import VectorProblem, attach_minimum, ldl_solve


class Student(NamedTuple):
    """omega = base + scale g at every node: `base` (T, N), scalar `scale`, standard normal `g` (T, N).

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

    `split`: whether any node can have two wells. If not, only chi[0] (T, N) means anything: the minimisers at the
    plain nodes. Else `chi` (2, T, N) are those at the left and right samples, `central` (T, N) is chi_0, `switch` (N,)
    is t* with the `wells` (2, T, N) there, `rooted` (N,) whether it exists. `two_wells`, `ok` (2, N) are flags of samples.
    """

    split: Any
    chi: Any
    two_wells: Any
    ok: Any
    central: Any
    switch: Any
    rooted: Any
    wells: Any


def nothing(replicas: int, tokens: int, nodes: int) -> Inner:
    """Placeholder for all replicas, to be filled by `locate`."""

    def no(*shape, kind: Any = float):
        return jnp.zeros((replicas, *shape), kind)

    pair, one = (2, tokens, nodes), (tokens, nodes)
    return Inner(
        no(kind=bool), no(*pair), no(2, nodes, kind=bool), no(2, nodes, kind=bool),
        no(*one), no(nodes), no(nodes, kind=bool), no(*pair),
    )  # fmt: skip


class _Line(NamedTuple):
    """The line g = across + e t through a node: its direction, the node's own t, and the plane's switching point."""

    e: Any
    across: Any
    own: Any
    plane: Any
    depth: Any  # 0 where there is one well, 1 where there are two, smooth between: |chi_0| from 0.1 to 0.3


_FAR = 7.5


def _line(s: Student, central) -> _Line:
    # Mirrored nodes look the other way, so that g -> -g stays an exact symmetry of the split set.
    chi0 = central * s.side
    square = jnp.sum(chi0 * chi0, 0)
    x = jnp.clip((square - 0.01) / 0.08, 0.0, 1.0)
    e = jnp.where(square > 1e-4, chi0, 0.0) / jnp.sqrt(jnp.where(square > 1e-4, square, 1.0))
    own = jnp.sum(e * s.g, 0)
    plane = jnp.clip(-jnp.sum(e * s.base, 0) / s.scale, -_FAR, _FAR)
    return _Line(e, s.g - e * own, own, plane, x * x * (3 - 2 * x))


def _points(line: _Line, switch):
    """(p, t left, t right) for the switching point t*."""
    p = 1 - line.depth * ndtr(-switch)
    x = jnp.clip(ndtr(line.own), 1e-15, 1 - 1e-15)
    return p, ndtri(p * x), -ndtri(jnp.clip((1 - p) * (1 - x), 1e-16, 1.0))


def _hessian_at_rest(problem: VectorProblem):
    """Hessian (T, T, N) of the inner loss at chi = 0: where it is indefinite there are two wells at omega = 0."""
    g = problem.activation.loss_terms(problem.zw, problem.target)[1]
    return g + jnp.swapaxes(g, 0, 1) + jnp.eye(g.shape[0])[:, :, None] / problem.v


def _softest(h, guess):
    """Rough eigenvector of the smallest eigenvalue of H (T, T, N), by power steps; only a start of a descent."""
    n = h.shape[0]
    bound = jnp.sqrt(jnp.sum(h * h, (0, 1)))
    a = jnp.eye(n)[:, :, None] * bound - h
    for _ in range(4):
        a = jnp.sum(a[:, :, None] * a[None], 1)
        a = a / jnp.sqrt(jnp.sum(a * a, (0, 1)))
    v = jnp.sum(a * guess[None], 1)
    return v / jnp.sqrt(jnp.sum(v * v, 0) + 1e-30)


# Descents of `locate` in their order, (point, start): at the origin from two starts; at the switching point in both
# wells, in a few Newton rounds on t; at the left and the right sample in both wells and from omega.
_ORIGIN, _SWITCH, _LEFT = 0, 1, 2
_ROUNDS = 5
_JOBS = np.array(
    [(_ORIGIN, 0), (_ORIGIN, 1)]
    + _ROUNDS * [(_SWITCH, 0), (_SWITCH, 1)]
    + [(_LEFT + k, s) for k in (0, 1) for s in (0, 1, 2)]
)
_PLAIN = len(_JOBS) - 4  # (left, from omega): the only descent where no node has two wells


class _Work(NamedTuple):
    inner: Inner
    line: _Line
    f: Any  # minima of the descents at the present point, (3, N)
    u: Any  # and their minimisers, (3, T, N)
    ok: Any  # and which converged, (3, N)


def locate(problem: VectorProblem, s: Student, previous: Inner, cold: Any = True) -> Inner:
    """Finds the inner minimisers of one replica; `problem` at omega = 0. Warm (not `cold`) from the `previous` ones."""
    problem, s, previous = jax.lax.stop_gradient((problem, s, previous))
    t, n = problem.omega.shape
    saddle = jnp.any(ldl_solve(_hessian_at_rest(problem), problem.omega)[1] <= 0)
    fresh = cold | (previous.split != saddle)
    inner = previous._replace(
        split=saddle,
        chi=jnp.where(fresh, s.at(s.g), previous.chi),
        central=jnp.where(saddle, previous.central, 0.0),
    )
    known = ~fresh & (jnp.sum(previous.central**2, 0) > 1e-3)
    kept = ~fresh & previous.rooted

    def job(j, w: _Work) -> _Work:
        point, k = jnp.asarray(_JOBS)[j]
        inner, line = w.inner, w.line
        side = jnp.clip(point - _LEFT, 0, 1)

        def origin():
            downhill = _softest(_hessian_at_rest(problem), s.guess)
            return problem.omega, jnp.where(known, inner.central, jnp.where(k == 0, downhill, s.guess))

        def switch():
            return s.at(line.across + line.e * inner.switch), inner.wells[k & 1]

        def sample():
            _, left, right = _points(line, inner.switch)
            omega = s.at(line.across + line.e * jnp.where(side == 0, left, right))
            return omega, jnp.where(k == 2, jnp.where(fresh, omega, inner.chi[side]), inner.wells[side ^ (k & 1)])

        def plain():
            return s.at(s.g), inner.chi[0]

        omega, start = jax.lax.switch(jnp.where(saddle, jnp.minimum(point, _LEFT), 3), [origin, switch, sample, plain])
        u, f, ok = prox.locate(problem._replace(omega=omega), start)
        w = w._replace(f=w.f.at[k].set(f), u=w.u.at[k].set(u), ok=w.ok.at[k].set(ok))

        def at_origin():
            central = jnp.where(w.f[0] < w.f[1], w.u[0], w.u[1])
            line = _line(s, central)
            chi0 = central * s.side
            return w._replace(
                line=line,
                inner=inner._replace(
                    central=central,
                    switch=jnp.where(kept, inner.switch, line.plane),
                    wells=jnp.where(kept, inner.wells, jnp.stack([-chi0, chi0])),
                ),
            )

        def at_switch():
            a, b = w.u[0], w.u[1]
            distinct = jnp.max(jnp.abs(a - b), 0) > 1e-3
            slope = s.scale / problem.v * jnp.sum(line.e * (b - a), 0)
            move = jnp.where(distinct & (slope > 0), (w.f[1] - w.f[0]) / jnp.where(slope > 0, slope, 1.0), 0.0)
            found = distinct & (slope > 0) & (jnp.abs(move) < 1e-5) & (jnp.abs(inner.switch) < _FAR)
            switch = jnp.clip(inner.switch + jnp.clip(move, -2.0, 2.0), -_FAR, _FAR)
            last = j == _PLAIN - 2 - 1
            # Without a root of its own a node is split on the plane.
            switch = jnp.where(last & ~found, line.plane, switch)
            return w._replace(inner=inner._replace(switch=switch, rooted=found, wells=jnp.stack([a, b])))

        def at_sample():
            lowest = jnp.where(w.f[0] < w.f[1], w.u[0], w.u[1])
            best = jnp.where(saddle & (jnp.minimum(w.f[0], w.f[1]) < f), lowest, u)
            two = saddle & (jnp.max(jnp.abs(w.u[0] - w.u[1]), 0) > 1e-4)
            return w._replace(
                inner=inner._replace(
                    chi=inner.chi.at[side].set(best),
                    two_wells=inner.two_wells.at[side].set(two),
                    ok=inner.ok.at[side].set(jnp.where(saddle, jnp.any(w.ok, 0), ok)),
                )
            )

        conclude = jnp.where(point < _LEFT, k == 1, k == 2)
        return jax.lax.switch(
            jnp.where(conclude, jnp.minimum(point, _LEFT) + 1, 0), [lambda: w, at_origin, at_switch, at_sample]
        )

    line = _Line(inner.central, s.g, *jnp.zeros((3, n)))
    work = _Work(inner, line, jnp.zeros((3, n)), jnp.zeros((3, t, n)), jnp.zeros((3, n), bool))
    first = jnp.where(saddle, 0, _PLAIN)
    last = jnp.where(saddle, len(_JOBS), _PLAIN + 1)
    return jax.lax.fori_loop(first, last, job, work).inner


@jax.custom_jvp
def _attach_switch(problem: VectorProblem, along, wells, t):
    """Returns t*, where both wells of `problem` at omega + along t are equally deep, and gives it its derivative."""
    return t


@_attach_switch.defjvp
def _attach_switch_jvp(primals, tangents):
    problem, along, wells, t = primals
    t = _attach_switch(problem, along, wells, t)
    here = problem._replace(omega=problem.omega + along * t)
    a, b = (attach_minimum(here, u) for u in wells)

    # The wells are minimisers, so their own motion does not enter the first derivative of the depths.
    def gap(problem, along):
        p = problem._replace(omega=problem.omega + along * t)
        return p.terms(a)[0] - p.terms(b)[0]

    change = jax.jvp(gap, (problem, along), (tangents[0], tangents[1]))[1]
    slope = jnp.sum(along * (b - a), 0) / problem.v
    good = slope > 1e-9
    return t, jnp.where(good, -change / jnp.where(good, slope, 1.0), 0.0)


def samples(problem: VectorProblem, s: Student, inner: Inner):
    """The split nodes of one replica, with derivatives: `(weight factor, g, chi)` of left and right, stacked on axis 0.

    `problem` at omega = 0; g and chi are (2, T, N).
    """
    line = _line(s, attach_minimum(problem, inner.central))
    on_line = problem._replace(omega=s.at(line.across))
    root = _attach_switch(on_line, s.scale * line.e, inner.wells, jax.lax.stop_gradient(inner.switch))
    p, left, right = _points(line, jnp.where(inner.rooted, root, line.plane))
    g = jnp.stack([line.across + line.e * left, line.across + line.e * right])
    chi = jnp.stack([attach_minimum(problem._replace(omega=s.at(g[k])), inner.chi[k]) for k in range(2)])
    return jnp.stack([p, 1 - p]), g, chi


def plain(problem: VectorProblem, s: Student, inner: Inner):
    """The minimisers (T, N) at the plain nodes, with their derivative."""
    return attach_minimum(problem._replace(omega=s.at(s.g)), inner.chi[0])
