"""Both stages, one after the other: on the host, which looks at what was found, and inside of transformations."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ..errors import Code, SolveError, succeeded
from ..math.implicit import nan_slope
from ..runtime.cores import cores
from ..setting.stages import Pretraining
from .finetuning import Answer, SecondStage, answer
from .lanes import Lanes
from .pretraining import FirstStage, solve_pretraining
from .problem import Problem
from .search import solve_broken, solve_symmetric


class Solves(NamedTuple):
    """Lanes with the fixed points of both stages."""

    lanes: Lanes
    first: FirstStage
    second: SecondStage

    @property
    def problem(self) -> Problem:
        return self.lanes.problem

    def answer(self) -> Answer:
        """Every prediction (see `lorastate.solution.finetuning.answer`)."""
        return self.run(*answered(self.problem))

    def run(self, f: Callable, nodes: int, *more):
        """`f(problem, first, second, *more)` of every lane (see `Lanes.run`)."""
        return self.lanes._replace(problem=self.problem.found).run(f, nodes, self.first, self.second, *more)


def answered(problem: Problem) -> tuple:
    """What `Solves.answer` runs, as `solve_alone` is told of it."""
    return answer, problem.numerics.finetuning_nodes


# Several programs, not one: the compiler's time and memory grow faster than the size of a program, and gradients share
# the searches.


def pretrained(lanes: Lanes) -> FirstStage:
    """Pre-training alone, which is the same program for every fine-tuning stage."""
    alone = lanes._replace(problem=lanes.problem.pretraining_alone)
    return alone.run(*_pretraining(alone))


def _pretraining(alone: Lanes) -> tuple:
    return solve_pretraining, 4 * alone.problem.numerics.nodes


def _symmetric(lanes: Lanes, first: FirstStage, alone: bool) -> SecondStage:
    return lanes.run(solve_symmetric, lanes.problem.numerics.finetuning_nodes, first, alone)


#: Whether programs are compiled side by side, and the kinds of problems whose programs were.
_AHEAD, _COMPILED = cores() > 1, set()


def _needed(lanes: Lanes, then: tuple) -> bool:
    """Whether programs of this kind are still to be compiled, side by side, with what comes `then`."""
    kind = jax.tree_util.tree_structure(lanes.problem), lanes.shape, lanes.mesh, then
    if not _AHEAD or kind in _COMPILED:
        return False
    _COMPILED.add(kind)
    return True


def _compile_ahead(lanes: Lanes, then: tuple) -> None:
    """The programs that a symmetric solution needs, compiled side by side: each is handed the shapes of what the one
    before it will return."""
    if not _needed(lanes, then):
        return
    alone = lanes._replace(problem=lanes.problem.pretraining_alone)
    first = alone.ahead(*_pretraining(alone))
    second = lanes.ahead(solve_symmetric, lanes.problem.numerics.finetuning_nodes, first, True)
    if lanes.problem.numerics.symmetry == "auto":
        _ahead(lanes, then, first, second)


def _ahead(lanes: Lanes, then: tuple, first: FirstStage, second: SecondStage) -> None:
    found = lanes._replace(problem=lanes.problem.found)
    for f, nodes, *more in then:
        found.ahead(f, nodes, first, second, *more)


def _breaking(lanes: Lanes) -> tuple:
    n = lanes.problem.numerics
    return solve_broken, n.finetuning_nodes * n.samples // 4


def _broken(lanes: Lanes, first: FirstStage, begin, then: tuple = (), held: bool = False) -> SecondStage:
    given = *_breaking(lanes), first, begin, jnp.full(lanes.shape, held)
    if then and _needed(lanes, then):
        _ahead(lanes, then, first, lanes.ahead(*given))
    return lanes.run(*given)


def solve(lanes: Lanes, *then: tuple) -> Iterator[tuple[dict[int, int], Solves]]:
    """Both stages of every lane, without derivatives, as soon as they are found: {number of a lane: its place in the
    arrays of `Solves`}. `then`: what will be run next, each with its `nodes` and what it is given beside both stages
    (see `Lanes.run`).

    The replica-symmetric search, on nodes that have one well each, is made first. Where that will not do it is made
    with one step of symmetry breaking, once more with more samples in a deep glass and where samples jump, and where
    that fails with more yet; or, if `numerics.symmetry` asks for it, with nodes that have two wells. Where breaking
    fails, and the symmetric solution is unstable by a little only, that is taken. Outside of transformations only:
    there is nothing to look at inside.
    """
    index, near, rs = list(range(lanes.count)), [], lanes.problem.numerics.symmetry == "rs"
    _compile_ahead(lanes, then)
    first = pretrained(lanes)
    second = _symmetric(lanes, first, True)
    symmetric, usual = Solves(lanes, first, second), second.begin
    for deep in (0,) if rs else (0, 1, 2):
        again = lanes.where(second.rough if deep < 2 else ~succeeded(second.solved.point.code))
        done = {index[k]: place for k, place in enumerate(lanes.places) if k not in again}
        if deep == 2:
            marginal = symmetric.lanes.where(symmetric.second.marginal)
            near = [index[k] for k in again if index[k] in marginal]
            again = [k for k in again if index[k] not in marginal]
        if done:
            yield done, Solves(lanes, first, second)
        if not again:
            break
        index = [index[k] for k in again]
        # What fails from where fewer samples led is tried from the usual start.
        begin = second.begin if deep < 2 else usual
        lanes, (first, begin, usual) = lanes.take(again, (first, begin, usual))
        if rs:
            second = _symmetric(lanes, first, False)
        else:
            lanes = lanes.with_broken(deep)
            second = _broken(lanes, first, begin, then)
    else:
        yield dict(zip(index, lanes.places, strict=True)), Solves(lanes, first, second)
    if near:
        lanes, (first, second) = symmetric.lanes.take(near, (symmetric.first, symmetric.second))
        yield dict(zip(near, lanes.places, strict=True)), Solves(lanes, first, second)


def solve_alone(problem: Problem, *then: tuple) -> Solves:
    """`solve` for a lane of one."""
    ((_, found),) = solve(Lanes(problem), *then)
    return found


def unbroken(problem: Problem) -> Solves:
    """The replica-symmetric solution where symmetry is broken, by the programs that found the broken one: all minima
    are held together."""
    lanes = Lanes(problem)
    first = pretrained(lanes)
    begin = _symmetric(lanes, first, True).begin
    lanes = lanes.with_broken(0)
    return Solves(lanes, first, _broken(lanes, first, begin, held=True))


def traced_answer(problem: Problem) -> Answer:
    """The answer inside a transformation, where both searches have to be there: NaN where the solve failed, since
    nobody can look at the code."""
    lane, symmetry = Lanes(problem.with_broken()), problem.numerics.symmetry
    first = pretrained(lane)
    second = _symmetric(lane, first, True)

    def symmetric() -> Answer:
        return Solves(lane, first, second).answer()

    def again() -> Answer:
        if symmetry == "rs":
            return Solves(lane, first, _symmetric(lane, first, False)).answer()
        found = _broken(lane, first, second.begin)
        point = found.solved.point
        code = jnp.where(found.rough & succeeded(point.code), int(Code.deep_glass), point.code)
        found = found._replace(solved=found.solved._replace(point=point._replace(code=code)))
        return Solves(lane, first, found).answer()

    out = again() if symmetry == "1rsb" else jax.lax.cond(second.rough, again, symmetric)
    good = {stage: succeeded(out.status[stage]["code"]) for stage in out.status}
    return out._replace(values={stage: or_nan(v, good[stage]) for stage, v in out.values.items()})


#: Test error below which a fit of noiseless labels is perfect: squares of differences that small drown in rounding.
_PERFECT = 1e-8


def failure(stage: str, code: Code, residual: Any, pre: Pretraining, values: dict[str, Any]) -> SolveError:
    """The error that a solve of a stage with this code is; `values` are those of pre-training."""
    detail = f"residual {float(residual):.2e}"
    if code is Code.too_narrow:
        rank = float(values["rank_fraction"])
        detail = f"kappa = {float(pre.kappa):g}, allowed: at least the rank fraction {rank:.6g}"
    elif stage == "pretraining" and float(pre.delta) == 0 and float(values["test_error"]) < _PERFECT:
        detail += "; labels without noise are fitted perfectly here, up to rounding, and a larger lam would do as well"
    return SolveError(stage, code, detail)


def or_nan(values, good):
    """The values, NaN with NaN slopes where a solve has failed."""
    # Added: a choice between two values would have no slope on the other.
    return jax.tree_util.tree_map(lambda v: nan_slope(v, good) + jnp.where(good, 0.0, jnp.nan), values)
