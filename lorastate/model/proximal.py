"""The inner minimisation (proximal step) at every quadrature node, and its implicit derivative.

Both stages minimise, node by node, a smooth function of a few unknowns u in R^n:

    pre-training   u = coordinates of Z in Sym_T :  ||sigma(Z) - t||^2 + ||Z - Omega||_F^2 / (4 V)
    fine-tuning    u = chi in R^{T x r}          :  ||sigma(Z_W + chi chi^T) - t||^2 + ||chi - omega||^2 / (2 v)

A problem is a pytree with methods `terms(u) -> (f, g, H)` and `aligned(u)`; arrays are node-last. The search (`locate`)
and the derivative of what it finds (`attach_minimum`) are kept apart: searches need loops, derivatives do not.
"""

from __future__ import annotations

import functools
import itertools
import operator
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Array, Float

from ..math.linear import ldl_solve
from ..math.symmetric import hessian_to_coordinates, to_coordinates, to_matrix
from ..math.turns import nearest_turn
from ..runtime.program import platform
from .activation import Activation


class MapProblem(NamedTuple):
    """Pre-training proximal step: nodes `omega`, `target` (T, T, N), response `V`."""

    activation: Activation
    omega: Float[Array, "T T N"]
    target: Float[Array, "T T N"]
    V: Any

    def at(self, part):
        """The same problem on the nodes that `part` takes of an array (..., N)."""
        return self._replace(omega=part(self.omega), target=part(self.target))

    @property
    def stiffness(self):
        """Curvature of the pull to Omega: no minimum of the whole is much flatter."""
        return 1 / (2 * self.V)

    def aligned(self, u):
        """u itself: nothing leaves the loss as it is."""
        return u

    @jax.jit
    def terms(self, u: Float[Array, "n N"]) -> tuple[Float[Array, " N"], Float[Array, "n N"], Float[Array, "n n N"]]:
        f, g, h = self.activation.loss_terms(to_matrix(u), self.target)
        d = u - to_coordinates(self.omega)
        return f + jnp.sum(d * d, 0) / (4 * self.V), *self._in_coordinates(g, h, d)

    def gauss_newton(self, u: Float[Array, "n N"]) -> tuple[Float[Array, "n N"], Float[Array, "n n N"]]:
        """The gradient, and the Hessian of Gauss and Newton, which is positive definite."""
        g, h = self.activation.gauss_newton(to_matrix(u), self.target)
        return self._in_coordinates(g, h, u - to_coordinates(self.omega))

    def _in_coordinates(self, g, h, d):
        hess = hessian_to_coordinates(h) + jnp.eye(len(d))[:, :, None] / (2 * self.V)
        return to_coordinates(g) + d / (2 * self.V), hess


def columns(u: Float[Array, "rT N"], tokens: int) -> list[Float[Array, "T N"]]:
    """The r columns (T, N) of chi in R^{T x r} from its coordinates u (r T, N), which hold one after the other."""
    return [u[k : k + tokens] for k in range(0, len(u), tokens)]


def gram(u: Float[Array, "rT N"], tokens: int) -> Float[Array, "T T N"]:
    """chi chi^T, (T, T, N)."""
    return functools.reduce(operator.add, (c[:, None] * c[None, :] for c in columns(u, tokens)))


class VectorProblem(NamedTuple):
    """Fine-tuning proximal step: frozen `zw`, `target` (T, T, N), `omega` (r T, N) as `columns` reads it, and the
    response `v`, one number or one per coordinate, (r T, 1)."""

    activation: Activation
    zw: Float[Array, "T T N"]
    omega: Float[Array, "rT N"]
    target: Float[Array, "T T N"]
    v: Any

    def at(self, part):
        """The same problem on the nodes that `part` takes of an array (..., N)."""
        return self._replace(zw=part(self.zw), omega=part(self.omega), target=part(self.target))

    @property
    def stiffness(self):
        """Smallest curvature of the pull to omega."""
        return 1 / jnp.max(jnp.asarray(self.v))

    @property
    def rank(self) -> int:
        """r, the number of columns of chi."""
        return len(self.omega) // len(self.zw)

    def aligned(self, u: Float[Array, "n N"]) -> Float[Array, "n N"]:
        """chi R, with a rotation R that brings its columns nearer to omega, pair by pair.

        The loss of chi R is that of chi: where the pull to omega is weak these are valleys, in which Newton steps are
        short. A minimum is aligned.
        """
        t = len(self.zw)
        chi, omega = columns(u, t), columns(self.omega, t)
        pull = jnp.broadcast_to(jnp.reshape(1 / jnp.asarray(self.v), (-1, 1)), (len(u), 1))[::t]
        for k, l in itertools.combinations(range(self.rank), 2):
            alike = jnp.ndim(self.v) == 0
            c, s = nearest_turn(chi[k], chi[l], omega[k], omega[l], pull[k], pull[l], alike)
            chi[k], chi[l] = c * chi[k] + s * chi[l], c * chi[l] - s * chi[k]
        return jnp.concatenate(chi)

    @jax.jit
    def terms(self, u: Float[Array, "n N"]) -> tuple[Float[Array, " N"], Float[Array, "n N"], Float[Array, "n n N"]]:
        f, g, h = self.activation.loss_terms(self.zw + gram(u, len(self.zw)), self.target)
        s, d = g + jnp.swapaxes(g, 0, 1), u - self.omega
        return f + jnp.sum(d * d / self.v, 0) / 2, *self._in_coordinates(s, h, s, u)

    def gauss_newton(self, u: Float[Array, "n N"]) -> tuple[Float[Array, "n N"], Float[Array, "n n N"]]:
        """The gradient, and the Hessian of Gauss and Newton, which is positive definite."""
        g, h = self.activation.gauss_newton(self.zw + gram(u, len(self.zw)), self.target)
        return self._in_coordinates(g + jnp.swapaxes(g, 0, 1), h, 0.0, u)

    def _in_coordinates(self, s, h, bent, u):
        """The gradient from s = G + G^T, and the Hessian from H and from the curvature of chi chi^T itself, `bent`."""
        chi = columns(u, len(self.zw))
        grad = jnp.concatenate([jnp.sum(s * c[None], 1) for c in chi]) + (u - self.omega) / self.v
        rows = [[_curvature(h, a, b) + bent if a is b else _curvature(h, a, b) for b in chi[: k + 1]]
                for k, a in enumerate(chi)]  # fmt: skip
        upper = [[jnp.swapaxes(rows[l][k], 0, 1) for l in range(k + 1, len(chi))] for k in range(len(chi))]
        hess = jnp.concatenate([jnp.concatenate(a + b, 1) for a, b in zip(rows, upper, strict=True)])
        hess = hess + jnp.eye(len(u))[:, :, None] / jnp.reshape(self.v, (-1, 1, 1))
        return grad, hess


def _curvature(h, a, b):
    """d^2 f / da db (T, T, N) through Z + a a^T + b b^T, from the Hessian `h` of f in Z; the columns may be the same.

    dZ_ij = da_i a_j + a_i da_j, so a row Hessian H_i enters as a^T H_i b, b_i H_i a and a_i b_i H_i.
    """
    if h.ndim == 5:
        ha, hb = (jnp.sum(h * u[None, None, None, :], 3) for u in (a, b))
        cross = jnp.einsum("ijkn,in->jkn", hb, a) + jnp.einsum("klin,kn->iln", ha, b)
        return jnp.einsum("ijkn,jn->ikn", hb, a) + cross + jnp.einsum("ijkln,in,kn->jln", h, a, b)
    ha, hb = (jnp.sum(h * u[None, None], 2) for u in (a, b))
    eye = jnp.eye(len(a))[:, :, None]
    cross = jnp.swapaxes(a[:, None] * hb, 0, 1) + b[:, None] * ha
    return jnp.sum(h * (a * b)[:, None, None], 0) + eye * jnp.sum(hb * a[None], 1)[None] + cross


class _State(NamedTuple):
    u: Any
    f: Any
    x: Any  # the Newton step from u
    cut: Any  # how much of it is tried next: 1, 1/4, 1/16, ...
    done: Any
    step: Any


#: Relative length of a pure Newton step after which a node has converged: the error is of the order of its square.
LAST = 1e-7


def _newton(problem, start, limit, over, last_step):
    """Newton's method at all nodes at once; a node that has converged, or is `over` from the start, is left alone.

    Directions of negative curvature are turned downhill, and a step that does not descend is cut to a quarter. Where an
    activation saturates, curvatures differ by many orders of magnitude: such a step keeps its direction, whereas a
    shift of the Hessian would leave the flat ones as they are. Every pass evaluates at the trial points and makes the
    next step. The last step of a node is so short that there is nothing to gain from an evaluation after it.
    """

    def cond(s):
        return (s.step < limit) & ~jnp.all(s.done)

    def body(s):
        move = s.cut[None] * s.x
        trial = problem.aligned(s.u - move)
        f, g, h = problem.terms(trial)
        good = ((f <= s.f + _rounding(f)) | (_length(move, s.u) < 1e-10)) & ~s.done
        scale = jnp.max(jnp.abs(jnp.stack([h[i, i] for i in range(len(trial))])), 0)
        new = ldl_solve(h, g, floor=jnp.minimum(1e-3 * scale, problem.stiffness / 2))[0]
        u, f, x = (jnp.where(good, a, b) for a, b in zip((trial, f, new), (s.u, s.f, s.x), strict=True))
        last = good & (_length(x, u) < last_step)
        return _State(jnp.where(last, u - x, u), f, x, jnp.where(good, 1.0, s.cut / 4), s.done | last, s.step + 1)

    far = jnp.full(start.shape[1:], jnp.inf, start.dtype)
    first = _State(start, far, jnp.zeros_like(start), jnp.ones_like(far), over, 0)
    out = jax.lax.while_loop(cond, body, first)
    return out.u, out.f, out.done


def _rounding(f):
    """What a sum of squares of numbers of the order of one is uncertain by, and some more."""
    return 1e-12 * f + 1e-15 * jnp.sqrt(f)


def _length(x, u):
    """Largest entry of a step `x` from `u`, in units of 1 + the largest of `u`."""
    return jnp.max(jnp.abs(x), 0) / (1.0 + jnp.max(jnp.abs(u), 0))


#: Newton steps of a group of nodes on its first visit; nodes that need more are visited a second time.
_FIRST = 5


def _group(u) -> int:
    """How many of the nodes of u (n, N) descend together: on a CPU few, so that their matrices stay in the first-level
    cache."""
    unknowns, nodes = u.shape
    return min(nodes, 256 if unknowns < 3 else 128) if platform() == "cpu" else nodes


class _Work(NamedTuple):
    rows: Any  # u, f, and two flags: done, and closed (had all the steps that it may have); one array, written at once
    round: Any

    @property
    def over(self):
        return (self.rows[-2] > 0) | (self.rows[-1] > 0)


def locate(problem, start, max_steps: int = 150, asked: Any = None, last: float = LAST):
    """Local minimiser reached from `start` (n, N) by a monotone damped Newton descent; carries no derivative.

    Returns `(u, f, converged)`: u (n, N), the minimum f (N,) and a flag per node. Nodes that are not `asked` (N,) for
    are passed over: they stay where they are, at infinite f.
    """
    problem, start = jax.lax.stop_gradient((problem, start))
    nodes = start.shape[1]
    group = _group(start)
    if asked is None:
        order, visits, over = jnp.arange(nodes), -(-nodes // group), jnp.zeros((nodes,), bool)
    else:
        order, over = jnp.nonzero(asked, size=nodes, fill_value=0)[0], ~asked
        visits = -(-jnp.sum(asked) // group)

    # A few per cent of the nodes need many more steps than the rest: they are left over from the first visits and
    # gathered into groups of their own, so that they do not hold the others. One compiled loop serves both visits.
    def cond(s):
        return (s.round < 2 * visits) & ((s.round < visits) | ~jnp.all(s.over))

    def body(s):
        first = s.round < visits
        index = jax.lax.cond(
            first,
            lambda: order[jnp.minimum(s.round * group + jnp.arange(group), nodes - 1)],
            lambda: jnp.nonzero(~s.over, size=group, fill_value=nodes - 1)[0],
        ).astype(jnp.uint32)  # no place is negative
        limit = jnp.where(first, min(_FIRST, max_steps), max_steps)
        here = s.rows[:, index]
        already = here[-2] > 0
        u, f, done = _newton(problem.at(lambda a: a[..., index]), here[:-3], limit, already, last)
        flags = jnp.stack([done, jnp.broadcast_to(~first, done.shape)]).astype(u.dtype)
        new = jnp.concatenate([u, jnp.where(already, here[-3], f)[None], flags])
        return _Work(s.rows.at[:, index].set(new), s.round + 1)

    far = jnp.full((nodes,), jnp.inf, start.dtype)
    begin = jnp.concatenate([start, jnp.stack([far, over.astype(start.dtype), jnp.zeros_like(far)])])
    rows = jax.lax.while_loop(cond, body, _Work(begin, 0)).rows
    done = rows[-2] > 0
    return rows[:-3], rows[-3], done if asked is None else done & asked


def reflected(problem, u):
    """chi (1 - 2 c c^T), as deep a well of the loss as chi: c the direction in which chi and omega agree least.

    -chi for rank one. `problem` is a `VectorProblem`.
    """
    if problem.rank == 1:
        return -u
    chi, omega = (jnp.stack(columns(a, len(problem.zw))) for a in (u, problem.omega / problem.v))
    agree = jnp.einsum("ktn,ltn->kln", chi, omega)
    c = softest(agree + jnp.swapaxes(agree, 0, 1))
    return (chi - 2 * c[:, None] * jnp.einsum("kn,ktn->tn", c, chi)[None]).reshape(u.shape)


def softest(h):
    """Eigenvector (n, N) of the smallest eigenvalue of every H (n, n, N), by repeated squaring of (bound - H)."""
    n = h.shape[0]
    eye = jnp.eye(n)[:, :, None]
    a = eye * jnp.sqrt(jnp.sum(h * h, (0, 1), keepdims=True) + 1e-300) - h

    def square(_, a):
        a = jnp.einsum("abn,bcn->acn", a, a)
        return a / jnp.sqrt(jnp.sum(a * a, (0, 1), keepdims=True))

    a = jax.lax.fori_loop(0, 20, square, a)
    # All columns are multiples of the eigenvector now: take the longest.
    size = jnp.sum(a * a, 0)
    v = jnp.take_along_axis(a, jnp.argmax(size, 0)[None, None], 1)[:, 0]
    return v / jnp.sqrt(jnp.sum(v * v, 0, keepdims=True))


def locate_lowest(problem, starts):
    """The lowest (n, N) of the local minimisers that `locate` reaches from several starts; carries no derivative."""
    # lax.map, not many calls: the descent is compiled once.
    u, f, _ = jax.lax.map(lambda start: locate(problem, start), jax.lax.stop_gradient(jnp.stack(starts)))
    return jnp.take_along_axis(u, jnp.nanargmin(f, 0)[None, None], 0)[0]


@jax.custom_jvp
def attach_minimum(problem, u):
    """Returns the minimiser `u` (n, N) of `problem` and gives it its derivative, du = -H^{-1} d(grad).

    The implicit function theorem; differentiable to any order in every leaf of `problem`.
    """
    return u


def _attach_minimum_jvp(primals, tangents):
    problem, u = primals
    u = attach_minimum(problem, u)
    _, dg = _moved(problem, tangents[0], u, 1)
    if not isinstance(dg, jax.Array):
        return u, jnp.zeros_like(u)
    return u, -ldl_solve(problem.terms(u)[2], dg)[0]


def _moved(problem, tangent, u, which: int):
    """`terms(u)[which]` and how it changes with the problem, at fixed u. Only what has a tangent is differentiated:
    omega and the response alone, where order parameters move."""
    moves = jax.tree_util.tree_map(lambda t: not _is_zero(t), tangent, is_leaf=_is_zero)
    moving, still = eqx.partition(problem, moves)
    velocity = eqx.filter(tangent, moves, is_leaf=_is_zero)
    if not jax.tree_util.tree_leaves(velocity):
        return problem.terms(u)[which], 0.0
    return jax.jvp(lambda p: eqx.combine(p, still).terms(u)[which], (moving,), (velocity,))


def _is_zero(t) -> bool:
    return isinstance(t, SymbolicZero)


attach_minimum.defjvp(_attach_minimum_jvp, symbolic_zeros=True)


def minimise(problem, start, max_steps: int = 150):
    """`locate` and `attach_minimum`: `(u, f, converged)`, differentiable in every leaf of `problem`, not in `start`."""
    u, _, done = locate(problem, start, max_steps)
    u = attach_minimum(problem, u)
    return u, problem.terms(u)[0], done


@jax.custom_jvp
def depth(problem, u):
    """f of `problem` at u, (N,). Its derivative in u takes the gradient that `terms` knows: at a minimiser that is next
    to nothing, and nothing else needs to be differentiated."""
    return problem.terms(u)[0]


def _depth_jvp(primals, tangents):
    problem, u = primals
    f, df = _moved(problem, tangents[0], u, 0)
    if not _is_zero(tangents[1]):
        df = df + jnp.sum(problem.terms(u)[1] * tangents[1], 0)
    return f, df


depth.defjvp(_depth_jvp, symbolic_zeros=True)


def polish(problem, u, steps: Any = 3):
    """A few Newton steps, each cut to 0.3, towards a minimiser that is near `u` already; carries no derivative."""

    problem, u = jax.lax.stop_gradient((problem, u))
    nodes = u.shape[1]
    group = _group(u)

    def block(k, out):
        # The last block of a number that groups do not divide begins in the one before it.
        def part(a):
            return jax.lax.dynamic_slice_in_dim(a, k * group, group, -1)

        here = problem.at(part)

        def body(_, u):
            _, g, h = here.terms(u)
            return u - jnp.clip(ldl_solve(h, g)[0], -0.3, 0.3)

        new = jax.lax.fori_loop(0, steps, body, part(u))
        return jax.lax.dynamic_update_slice_in_dim(out, new, k * group, 1)

    return jax.lax.fori_loop(0, -(-nodes // group), block, u)
