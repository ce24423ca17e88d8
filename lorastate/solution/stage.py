"""What both stages share: from a fixed point that was found to predictions with error bars.

A search (no derivatives) finds a fixed point and the inner minimisers there; everything here is differentiable and has
no loops. `MapStage` (`lorastate.solution.pretraining`) and `LoraStage` (`lorastate.solution.finetuning`) are the two.
"""

from __future__ import annotations

import abc
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from ..errors import Code, succeeded
from ..math.fixed_point import FixedPoint
from ..math.implicit import attach
from ..math.linear import UNROLLED, ldl_solve, symmetric_inverse
from ..math.maximum import uphill_step
from ..math.places import row
from ..math.quadrature import Nodes, by_replica, for_parts, mean, over_replicas, when

#: Share of nodes with two wells up to which symmetry counts as unbroken.
FEW = 1e-3


class Stage(eqx.Module):
    """A stage of training as its description sees it. `x` are order parameters in the solver's coordinates."""

    def outer(self, x) -> int:
        """How many of the last coordinates are those of a maximum (see `lorastate.math.fixed_point.Map`)."""
        return 0

    @abc.abstractmethod
    def step(self, x, const):
        """One sweep of state evolution; `const`: nodes and the inner minimisers at x."""

    @abc.abstractmethod
    def part(self, x, nodes: Nodes, inner, gap: Any = True):
        """(averages, E ||d(minimiser - field)/d field||^2 where a `gap` is asked for) over one part of the nodes."""

    @abc.abstractmethod
    def image(self, averages, x):
        """`step` from what `part` gives, averaged."""

    @abc.abstractmethod
    def refreshed(self, x, nodes: Nodes, inner, steps: Any) -> tuple[Nodes, Any]:
        """One part of the nodes and its inner minimisers, found for a point very near this one, brought up to date."""

    @abc.abstractmethod
    def test_errors(self, x, nodes: Any) -> Any:
        """Test errors on one part of their nodes (a tree of `Nodes`, as many parts each); from closed forms without."""

    @abc.abstractmethod
    def predictions(self, x, averages, errors) -> dict[str, Any]:
        """Every prediction of the stage."""

    def judged(self, x):
        """The numbers by which a distance from the solution is judged."""
        return x


class Solved(NamedTuple):
    """A fixed point with what its derivatives and averages need: the Jacobian there, the inner minimisers, and the
    weights of its nodes where they are not their own (see `lorastate.evolution.control`): of all replicas together,
    and of each by itself, (2, R, n)."""

    point: FixedPoint
    jacobian: Any
    inner: Any
    weight: Any = None


def attached(stage: Stage, solved: Solved, const, x=None):
    """The fixed point with its derivative by everything that `stage` is made of."""
    x = solved.point.x if x is None else x
    return attach(_step, stage.outer(x), x, stage, const)


def _step(x, stage: Stage, const):
    return stage.step(x, const)


def test_errors(stage: Stage, x, nodes: Any):
    """`Stage.test_errors`, the mean over replicas."""
    return averaged(lambda n: stage.test_errors(x, n), nodes)


def averaged(f, nodes):
    """Mean over replicas of `f(replica)`, of a tree of `Nodes`; as they are where closed forms need none."""
    return mean(over_replicas(f, nodes)) if _some(nodes) else f(nodes)


def _some(nodes: Any) -> list[Nodes]:
    """The node sets of a tree, without what is None."""
    return [n for n in jax.tree_util.tree_leaves(nodes, lambda n: isinstance(n, Nodes)) if isinstance(n, Nodes)]


def response_gap(hess, scale, along: int):
    """|| H^{-1}/scale - 1 ||_F^2 at every node: the derivative of (minimiser - field) with respect to the field.

    Where `along` is less than the number n of unknowns, of the four blocks before and from it on: (2, 2, N).
    """
    n, nodes = hess.shape[0], hess.shape[2]
    scale, eye = jnp.broadcast_to(scale, (n, 1)), np.eye(n)
    if n <= UNROLLED:
        inverse = symmetric_inverse(hess)
        square = [[(inverse[i][j] / scale[j] - eye[i, j]) ** 2 for i in range(n)] for j in range(n)]
        blocks = [range(n)] if along >= n else [range(along), range(along, n)]
        sums = [[sum(square[j][i] for j in a for i in b) for b in blocks] for a in blocks]
        return sums[0][0] if along >= n else jnp.stack([jnp.stack(row) for row in sums])
    columns = jax.vmap(lambda e: ldl_solve(hess, e)[0])(jnp.broadcast_to(eye[:, :, None], (n, n, nodes)))
    square = (columns / scale[:, :, None] - eye[:, :, None]) ** 2  # (column, row, N)
    if along >= n:
        return jnp.sum(square, (0, 1))
    parts = slice(along), slice(along, n)
    return jnp.stack([jnp.stack([jnp.sum(square[a, b], (0, 1)) for a in parts]) for b in parts])


def status_of(point: FixedPoint) -> dict[str, Any]:
    return {name: getattr(point, name) for name in ("code", "residual", "rate", "growth", "steps")}


# ---- description -----------------------------------------------------------------------------------------------


class Described(NamedTuple):
    """Predictions of a stage and their standard errors; how far its solve is off, in those of its order parameters
    (`FixedPoint.offset`; the largest); and the order parameters (R, n) of every replica."""

    values: dict[str, Any]
    errors: dict[str, Any]
    shift: Any
    xs: Any


class _Pass(NamedTuple):
    """An evaluation on all nodes: order parameters (R, n) upstream, the steps that bring inner minimisers up to date,
    whether replicas go to their solutions after it, whether it is `whole`: predictions are made of it, and whether
    replicas have weights by themselves."""

    upstream: tuple
    steps: Any
    moves: Any
    whole: Any
    apart: Any


def described(make, solved: Solved, x, nodes: Nodes, test: Any, replicas: int, upstream: tuple = (), own: tuple = ()):
    """`Described`: predictions at the fixed point `x`, and error bars from the spread over replicas.

    Replica r would solve x = F_r(x). One step with the Jacobian of all replicas takes it there to first order,
    x_r = x + (I - J)^{-1} (F_r(x) - x), and its predictions are evaluated at x_r with its own nodes: no second
    solve. `make(*upstream)` is the stage after the order parameters `upstream`, (n,) each, or those that every replica
    has of its `own`, (R, n), so that what pre-training does to fine-tuning is carried along. The distance of the mean
    over replicas from the prediction is added in quadrature: what the solve has left undone, and the bias of so few
    nodes.

    One compiled evaluation serves all: of x, of what replicas see of their `own` there, and of x_r. `x` and `make` may
    have derivatives; those of the error bars mean nothing.
    """
    each = jax.tree_util.tree_map
    common = each(lambda u: jnp.broadcast_to(u, (replicas, *u.shape)), upstream)
    twice = bool(own) or solved.weight is not None  # what replicas see at x is not what is predicted there
    passes = [
        _Pass(common, 0, not twice, True, 0),
        *([_Pass(own, 1, True, False, 1)] if twice else []),
        _Pass(own, 2, False, True, 1),
    ]

    def one_pass(carry, here: _Pass):
        xs, inner = carry

        def at(n, x, inner, *upstream):
            stage = make(*upstream)
            still, *given = jax.lax.stop_gradient((stage, x, n, inner))
            n, inner = still.refreshed(*given, here.steps)
            return stage.part(x, n, inner, here.whole), inner

        def moved(a, x, *upstream):
            stage = make(*upstream)
            step = uphill_step(solved.jacobian, stage.image(a, x) - x, stage.outer(x), _UPHILL)
            return x + jax.lax.stop_gradient(jnp.where(here.moves, jnp.clip(step, -1.0, 1.0), 0.0))

        there = nodes if solved.weight is None else nodes._replace(weight=row(solved.weight, here.apart))
        found, inner = over_replicas(at, there, for_parts(xs, nodes), inner, *for_parts(here.upstream, nodes))
        found = by_replica(found, replicas)
        tested = when(here.whole, lambda: _errors_of(make, test, replicas, xs, *here.upstream))
        return (jax.vmap(moved)(found, xs, *here.upstream), inner), (xs, found, tested)

    start = jnp.broadcast_to(x, (replicas, *x.shape)), solved.inner
    _, made = jax.lax.scan(one_pass, start, each(lambda *a: jnp.stack(a), *passes))
    # First all replicas together, at x, then each of them.
    first = x, *each(lambda v: v[0].mean(0), made[1:]), *upstream
    rows = each(
        lambda v, of_replicas: jnp.concatenate([v[None], of_replicas]), first, (*each(lambda v: v[-1], made), *own)
    )
    table = jax.vmap(lambda x, a, e, *upstream: make(*upstream).predictions(x, a, e))(*rows)
    values, of_replicas = ({k: v[part] for k, v in table.items()} for part in (0, slice(1, None)))
    return Described(values, *_bars(of_replicas, values, made[0][-1], solved, make(*upstream).judged), made[0][-1])


def _errors_of(make, test: Any, replicas: int, xs, *upstream):
    """Test errors of every replica."""

    def at(n, x, *upstream):
        return make(*upstream).test_errors(x, n)

    if not (sets := _some(test)):
        return jax.vmap(lambda *given: at(test, *given))(xs, *upstream)
    return by_replica(over_replicas(at, test, *for_parts((xs, *upstream), sets[0])), replicas)


#: Longest step of a replica towards the maximum in log y, where that is flat. (The step is cut to that, and to 1 in
#: other coordinates: with these the bars are as wide as the scatter of independent nodes.)
_UPHILL = 0.5


def _bars(of_replicas: dict[str, Any], values: dict[str, Any], xs, solved: Solved, numbers) -> tuple[dict, Any]:
    """(errors, shift) of `Described`; `numbers(x)`: what the distance from the solution is judged by."""

    def error(v):
        return jnp.std(v, axis=0, ddof=1) / np.sqrt(len(v))

    rows = jnp.stack([jnp.asarray(v) for v in of_replicas.values()], 1)
    bias = jnp.mean(rows, 0) - jnp.stack([values[k] for k in of_replicas])
    errors = dict(zip(of_replicas, jnp.hypot(error(rows), bias), strict=True))
    x = solved.point.x
    off = jnp.abs(numbers(x + solved.point.offset) - numbers(x))
    known = jnp.minimum(error(jax.vmap(numbers)(xs)), _COARSE)
    return errors, jnp.max(off / (known + _FINE))


#: Distance from the solution at which a stop at a jump (`Code.floor`) is not good enough, in quadrature errors; those
#: of order parameters below which none has to be, and above which they excuse no more: what is not known at all is
#: within its error of anything.
_FLOOR_SHARE, _FINE, _COARSE = 2.0, 5e-4, 0.1


def final_status(status: dict[str, Any], errors: dict[str, Any], shift: Any) -> dict[str, Any]:
    """The status of a stage once its quadrature errors are known: a solve that stopped at a jump is one if it is inside
    the error of every order parameter. (By how much it is off is part of the bars.) What has no error bar is
    not known."""
    near = shift <= _FLOOR_SHARE
    code = jnp.where(status["code"] == Code.floor, jnp.where(near, int(Code.ok), int(Code.stalled)), status["code"])
    unknown = succeeded(code) & ~jnp.isfinite(errors.get("test_error", 0.0))
    return status | {"code": jnp.where(unknown, int(Code.stalled), code)}
