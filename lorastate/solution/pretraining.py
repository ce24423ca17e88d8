"""Pre-training solved: the search of its fixed point, and every prediction of it."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ..errors import Code, succeeded
from ..evolution import control
from ..evolution import pretraining as pt
from ..evolution.order import RESPONSE_FLOOR, Order, decode
from ..evolution.test_errors import pretraining_error
from ..math.fixed_point import FixedPoint, Method, Rules, iterate, plain_map
from ..math.implicit import nan_slope
from ..math.places import row
from ..math.quadrature import Slots, in_blocks, when
from ..math.symmetric import dimension
from ..model import wells
from ..setting.numerics import Numerics
from ..setting.stages import Pretraining
from .problem import Problem, weighted
from .stage import FEW, Described, Solved, Stage, attached, described, final_status, response_gap, status_of


class MapStage(Stage):
    """Pre-training of the frozen map."""

    pre: Pretraining

    def step(self, x, const):
        return pt.step(x, self.pre, const)

    def part(self, x, nodes, inner, gap=True):
        pre, order = self.pre, decode(x)

        def block(nodes, found):
            problem = pt.inner_problem(pre, order, nodes)

            def squares():
                low = wells.lowest(problem, found)
                u = low.pick(low.u)
                return jnp.sum(nodes.weight * response_gap(problem.terms(u)[2], 2 * order.response, len(u)))

            return pt.averages(pre, order, nodes, found), when(gap, squares)

        return in_blocks(block, nodes, inner)

    def closed_form(self, x):
        """`part` for the identity, without nodes."""
        pre, order = self.pre, decode(x)
        t = pre.tokens
        gap = dimension(t) * (4 * order.response / (t * t + 4 * order.response)) ** 2
        return pt.averages(pre, order, None, None), gap

    def image(self, averages, x):
        return pt.image_of(self.pre, pt.conjugates(self.pre, decode(x), averages[0]))

    def refreshed(self, x, nodes, inner, steps):
        return nodes, pt.refresh_inner(self.pre, decode(x), nodes, inner, steps)

    def test_errors(self, x, nodes):
        pre, order = self.pre, decode(x)

        def one(size):
            norm = order.norm(pre.label_size)
            return pretraining_error(pre.activation, pre.tokens, size, order.overlap, norm, nodes)

        # The noiseless law has smaller labels but the same map: (Q0, M, Q).
        return one(pre.label_size), one(pre.Q0)

    def predictions(self, x, averages, errors):
        pre, (a, gap), order = self.pre, averages, decode(x)
        c = pt.conjugates(pre, order, a)
        live = order.response > 2 * RESPONSE_FLOOR
        V, M, Q = (jnp.where(live, v, 0.0) for v in (order.response, order.overlap, order.norm(pre.label_size)))
        delta, eps, _ = pt.thresholds(pre, c)
        return {
            "V": V,
            "M": M,
            "Q": Q,
            "M_down": jnp.where(live, pt.downstream_overlap(pre, x), 0.0),
            **c._asdict(),
            "overlap": jnp.where(live, M / jnp.sqrt(jnp.where(live, Q, 1.0) * pre.Q0), jnp.nan),
            "train_loss": pt.free_energy(pre, order, a),
            "train_error": train_error(pre, order, c, a),
            "test_error": errors[0],
            "test_error_noiseless": errors[1],
            "rank_fraction": 1 - pre.law.mass_below(eps, delta),
            "replicon": jnp.where(live, replicon(pre, order, c, gap), jnp.nan),
            "double_well_share": a.two_wells + jnp.zeros(()),
        }


def train_error(pre: Pretraining, order: Order, c: pt.Conjugates, a: pt.Averages):
    """alpha E ||sigma(Z) - sigma(Y)||_F^2 = alpha C - q^ V/4: the data part of the training loss, per D^2. What C has
    beyond it is the proximal term, E ||Z - Omega||_F^2/(4 V) = q^ V/(4 alpha)."""
    return pre.alpha * a.potential - c.qhat * order.response / 4


def replicon(pre: Pretraining, order: Order, c: pt.Conjugates, gap):
    """(2 alpha / V^2) E ||D(Z - Omega)/D Omega||_HS^2 / s^^2 E ((f(x) - f(y))/(x - y))^2, f = ReLU(. - 2 lam~), x and y
    from the law of m^ S* + sqrt(q^) Z: replica symmetry of pre-training is stable below one (arXiv:2509.24914)."""
    delta, eps, _ = pt.thresholds(pre, c)
    return 2 * pre.alpha / order.response**2 * gap / c.shat**2 * pre.law.pair_response(delta, eps)


def symmetry_of(values: dict[str, Any]) -> str:
    """Phase of pre-training from its predictions: "replica symmetric", or "unstable" where its loss has many minima,
    which this theory takes for one: the replicon is not below one, or more than a few nodes have two wells (where a
    minimiser jumps its response is infinite; the replicon is that of the smooth nodes)."""
    broken = (values["replicon"] >= 1) | (values["double_well_share"] > FEW)
    return "unstable" if bool(broken) else "replica symmetric"


# ---- the search ------------------------------------------------------------------------------------------------


def rules_of(numerics: Numerics, parts: int, rough: float, settle: float = np.inf, floor: float = 5e-3) -> list[Rules]:
    """One part of the nodes finds the neighbourhood with Newton steps; all of them finish with Broyden's cheaper ones.

    In both stages inner minimisers may jump from well to well, hence the floors (see `Method`).
    """
    steps = numerics.max_steps
    coarse = Method(tolerance=rough, max_steps=steps, floor=10 * floor, settle=settle)
    fine = Method(tolerance=numerics.tolerance, max_steps=steps, burn_in=0, floor=floor)
    return [Rules.of(coarse, 1), Rules.of(fine, parts, exact=False)]


def search_pretraining(problem: Problem) -> Solved:
    """Fixed point of pre-training (no derivative), from the usual start or, where that fails, that of weak ridges."""
    pre, numerics, nodes = jax.lax.stop_gradient(problem.pre), problem.numerics, problem.nodes.pretraining
    many = problem.nodes.map_control
    if nodes is None:
        memory = Slots.of(None)
        rules = [Rules.of(Method(tolerance=numerics.tolerance, max_steps=numerics.max_steps))] * 2
    else:
        memory = Slots.of(pt.no_inner(pre, nodes))
        rules = rules_of(numerics, len(nodes.weight), 1e-4)
    usual, jobs = pt.start(pre), _jobs(pre, numerics, nodes, rules, many is not None)
    table, count = stacked(jobs), len(jobs)
    needed = max(k for k, (_, when, _) in enumerate(jobs) if when in (_ALWAYS, _WELLS, _THINNED)) + 1

    def weights(x):
        assert nodes is not None and many is not None
        return control.map_weights(pre, decode(x), nodes, many, numerics.replicas)

    def stage(state: _Progress) -> _Progress:
        rules, when, start = row(table, state.stage)
        two = jnp.array(True) if nodes is None else jnp.any(state.memory.read().two)
        skip = ((when == _FAILED) & state.solved) | ((when == _WELLS) & ~two) | ((when == _AFTER) & ~state.made)
        thin = (when == _THINNED) & state.solved
        skip, weight = skip | ((when == _THINNED) & ~state.solved), state.weight
        if many is not None:
            weight = jax.lax.cond(thin, lambda: weights(state.point.x), lambda: weight)
        here = weighted(nodes, weight)
        fmap = plain_map(pt.step, pre) if nodes is None else pt.state_evolution(pre, here)
        # NaN stops at once.
        x0 = jnp.where(skip, jnp.nan, jnp.where(jnp.isnan(start), state.point.x, start))
        point, _, jacobian, remembered = iterate(fmap, rules, True, x0, state.jacobian, state.memory, thin)
        if nodes is not None:
            point = _ended_at_jump(point, jnp.any(remembered.read().two), rules.tolerance)
        skip = skip | ((when == _FAILED) & ~(succeeded(point.code) | (point.code == Code.max_steps)))
        point = point._replace(steps=state.point.steps + jnp.where(skip, 0, point.steps))
        old = state.point._replace(steps=point.steps), state.jacobian, state.memory
        new = point, jacobian, remembered
        point, jacobian, memory = jax.tree_util.tree_map(lambda a, b: jnp.where(skip, a, b), old, new)
        solved = jnp.where(skip, state.solved, succeeded(point.code))
        return _Progress(state.stage + 1, point, jacobian, memory, solved, ~skip, weight)

    def unfinished(state: _Progress):
        # What only follows a failure is not looked at once all is solved.
        when = row(table[1], jnp.minimum(state.stage, count - 1))
        wanted = ~state.solved | (state.stage < needed) | (state.made & (when == _AFTER))
        return (state.stage < count) & wanted

    jacobian, no = jnp.zeros((len(usual), len(usual))), jnp.array(False)
    weight = None if nodes is None or many is None else control.own(nodes)
    begin = _Progress(jnp.array(0), FixedPoint.nowhere(len(usual)), jacobian, memory, no, no, weight)
    end = jax.lax.while_loop(unfinished, stage, begin)
    return Solved(end.point, end.jacobian, end.memory.read(), end.weight)


def _jobs(pre: Pretraining, numerics: Numerics, nodes: Any, rules: list[Rules], thinned: bool) -> list[tuple]:
    """The stages of a search: rules, when it is made, and from where."""
    usual = pt.start(pre)
    last = jnp.full_like(usual, jnp.nan)  # goes on where the stage before ended
    jobs = [(rules[0], _ALWAYS, usual), (rules[0], _FAILED, pt.start(pre, "weak ridge"))]
    # With few samples plain steps overshoot by far, and lead away from a solution that is near.
    few = rules[0]._replace(burn_in=0)
    jobs += [(few, _FAILED, pt.start(pre, kind)) for kind in ("few samples", "hardly any")]
    if nodes is not None:
        # The last stage twice: it begins with a cold search, which may find what following wells has missed.
        jobs += [(rules[1], _ALWAYS, last), (rules[1], _WELLS, last)]
    # Near the interpolation threshold noisy labels make the map large along a direction that is almost flat; with
    # noiseless ones above it the noise of the map falls by orders of magnitude. Only plain steps find their way there.
    plain = rules[1]._replace(burn_in=-1, tolerance=max(numerics.tolerance, 1e-8))
    plain = plain if nodes is None else plain._replace(damping=0.0)
    jobs += [(plain, _FAILED, usual), (rules[1], _AFTER, last)]
    if thinned:
        jobs.append((rules[1], _THINNED, last))
    return jobs


class _Progress(NamedTuple):
    """A search of pre-training between two stages: the point it has come to, with the steps of all stages, whether that
    is solved, whether the last stage was made, and with thinning the weights of the nodes."""

    stage: Any
    point: Any
    jacobian: Any
    memory: Any
    solved: Any
    made: Any
    weight: Any = None


#: How far a map that does not jump may stop from its fixed point, in log V and in shares of the noise: mere rounding.
_ROUNDED = 1e-3


def _ended_at_jump(point, jumps, tolerance):
    """The point, `stalled` where it stopped short of its fixed point although no node `jumps`, and no longer `unstable`
    where it did so at a jump, next to which a map is as steep as one likes."""
    noise = jnp.abs(point.x[2])
    off = jnp.maximum(point.offset[0], point.offset[2] / jnp.where(noise > 0, noise, 1.0))
    false = (point.code == Code.floor) & ~jumps & ~(off < _ROUNDED)
    steep = (point.code == Code.unstable) & jumps & (point.residual > tolerance)
    code = jnp.where(steep, int(Code.floor), point.code)
    return point._replace(code=jnp.where(false, int(Code.stalled), code))


#: When a stage of the search of pre-training is made: always, if what came before it has failed, if there are two
#: wells, if the stage before it was made, on nodes with the weights that suit what was found.
_ALWAYS, _FAILED, _WELLS, _AFTER, _THINNED = range(5)


def stacked(trees):
    return jax.tree_util.tree_map(lambda *a: jnp.stack([jnp.asarray(v) for v in a]), *trees)


# ---- description -----------------------------------------------------------------------------------------------


class FirstStage(NamedTuple):
    """Output of `describe_pretraining`: every prediction and its quadrature error."""

    values: dict[str, Any]
    errors: dict[str, Any]
    x: Any  # order parameters in the solver's coordinates, with their derivative
    xs: Any  # those of every replica, (R, n)
    status: dict[str, Any]
    solved: Solved


#: Rounding of E (S_hat - S*)^2, in units of Q0, in which Q and M^2 cancel.
_ROUNDING = 2e-15


def drowned(pre: Pretraining, x, values):
    """Whether a fit of noiseless labels is so good that its error drowns in rounding, and the ridge is so weak that it
    matters: then nobody can tell which of the eigenvalues that S* does not have are cut."""
    size, order = pre.label_size, decode(x)
    misfit, least = (size - order.overlap) ** 2 / size + order.noise**2, _ROUNDING * size
    # eps < 2 delta, the edge of the eigenvalues that S* does not have, with the noise at its largest.
    inside = pre.kappa * pre.lam**2 < values["qhat"] * (1 + least / misfit)
    return (values["V"] > 0) & (misfit < least) & (values["rank_fraction"] < 1) & inside


def describe_pretraining(problem: Problem, solved: Solved) -> FirstStage:
    """Predictions of pre-training, and its order parameters with their derivative, at the fixed point found."""
    pre, nodes, replicas = problem.pre, problem.nodes, problem.numerics.replicas
    stage, of_map, found = MapStage(pre), weighted(nodes.pretraining, solved.weight), solved.inner
    const = None if of_map is None else (of_map, found)
    lost = 0.0 if of_map is None else wells.lost(found)
    code = jnp.where(lost > 1e-3, int(Code.stalled), solved.point.code)
    x = nan_slope(attached(stage, solved, const), succeeded(solved.point.code))
    if of_map is None:
        values = stage.predictions(x, stage.closed_form(x), stage.test_errors(x, nodes.pretraining_test))
        exact = {k: 0.0 * jax.lax.stop_gradient(v) for k, v in values.items()}
        made = Described(values, exact, jnp.zeros(()), jnp.broadcast_to(x, (replicas, len(x))))
    else:
        made = described(lambda: stage, solved, x, of_map, nodes.pretraining_test, replicas)
    values = made.values
    rank = values["rank_fraction"]
    # A student that is zero has no rank: a solve that ended on the floor of V with one has been misled.
    misled = (values["V"] == 0) & (rank > 0)
    code = jnp.where(succeeded(code) & (misled | drowned(pre, x, values)), int(Code.stalled), code)
    narrow = rank > pre.kappa * (1 + 1e-9)
    code = jnp.where(succeeded(code) & narrow, int(Code.too_narrow), code)
    status = final_status(status_of(solved.point._replace(code=code)), made.errors, made.shift)
    return FirstStage(values, made.errors, x, made.xs, status, solved)


def solve_pretraining(problem: Problem) -> FirstStage:
    """The first stage of a problem, with the derivatives of its predictions."""
    return describe_pretraining(problem, search_pretraining(problem))
