"""Solving: the programs that a prediction is made of, one after the other; outside of transformations and inside."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from ..errors import Code, SolveError, succeeded
from ..math.implicit import nan_slope
from ..runtime.program import Program
from ..setting.stages import Pretraining
from .finetuning import describe_finetuning, quadrature_errors
from .pretraining import FirstStage, describe_pretraining, search_pretraining
from .problem import Problem
from .search import solve_broken, solve_symmetric
from .stage import final_status

# Several programs, not one: the compiler's memory grows with the size of a program, and gradients share the searches.
_describe_pretraining = Program(describe_pretraining, quick=True)
_describe_finetuning = Program(describe_finetuning, quick=True)
_quadrature_errors = Program(quadrature_errors, quick=True), Program(quadrature_errors)
_search_pretraining = Program(search_pretraining, quick=True), Program(search_pretraining)
_solve_symmetric = Program(solve_symmetric, quick=True), Program(solve_symmetric)
_solve_broken = Program(solve_broken, quick=True), Program(solve_broken)

#: Nodes times solves from which on a slower compilation pays, and the solves that a single one stands for.
_MUCH, _SOLVES = 2**20, 16


def by_work(programs: tuple[Program, Program], nodes: int, solves: int = _SOLVES) -> Program:
    """Which of two programs of a search, the one faster to compile or the one faster to run, for so much work."""
    return programs[nodes * solves > _MUCH]


def solve_pretraining(problem: Problem) -> FirstStage:
    """The first stage of a problem."""
    problem = problem.pretraining_alone
    solved = by_work(_search_pretraining, 4 * problem.numerics.nodes)(problem)
    return _describe_pretraining(problem, solved)


def solve(problem: Problem):
    """Both stages without derivatives, compiled once per kind of setting: `(Problem, FirstStage, SecondStage)`.

    The replica-symmetric search, on nodes that have one well each, is made first. Where that will not do it is made
    with one step of symmetry breaking, in a deep glass once more with more samples, or, if `numerics.symmetry` asks for
    it, with nodes that have two wells. Outside of transformations only: there is nothing to look at inside.
    """
    numerics, first = problem.numerics, solve_pretraining(problem)
    second = by_work(_solve_symmetric, numerics.finetuning_nodes)(problem, first, True)
    if numerics.symmetry == "rs":
        if bool(jnp.any(second.solved.inner.two)) or not succeeded(int(second.solved.point.code)):
            second = by_work(_solve_symmetric, numerics.finetuning_nodes)(problem, first, False)
    elif bool(second.rough) or numerics.symmetry == "1rsb":
        coarse, work = second.coarse, numerics.finetuning_nodes * numerics.samples // 4
        for deep in (False, True):
            problem = problem.with_broken(deep)
            second = by_work(_solve_broken, work)(problem, first, coarse)
            if not bool(second.rough):
                break
    return problem, first, second


def answer(problem, first, second):
    """(values, errors, status) of both stages and the branches, with the codes that quadrature errors decide."""
    out = _describe_finetuning(problem, first, second)
    bars = by_work(_quadrature_errors, problem.numerics.finetuning_nodes)(problem, out)
    bars = dict(zip(("pretraining", "finetuning"), bars, strict=True))
    values = {"pretraining": out.pretraining, "finetuning": out.finetuning}
    status = {stage: final_status(out.status[stage], bars[stage]) for stage in bars}
    return values, {stage: b.errors for stage, b in bars.items()}, status, out.branches


def traced_answer(problem: Problem):
    """`answer` inside a transformation, where both searches have to be there: NaN where the solve failed, since
    nobody can look at the code."""
    problem, symmetry = problem.with_broken(), problem.numerics.symmetry
    first = solve_pretraining(problem)
    second = _solve_symmetric[0](problem, first, symmetry != "rs")

    def symmetric():
        return answer(problem, first, second)

    def broken():
        found = _solve_broken[0](problem, first, second.coarse)
        point = found.solved.point
        code = jnp.where(found.rough & succeeded(point.code), int(Code.deep_glass), point.code)
        found = found._replace(solved=found.solved._replace(point=point._replace(code=code)))
        return answer(problem, first, found)

    if symmetry == "auto":
        values, errors, status, branches = jax.lax.cond(second.rough, broken, symmetric)
    else:
        values, errors, status, branches = symmetric() if symmetry == "rs" else broken()
    good = {stage: succeeded(status[stage]["code"]) for stage in status}
    values = {stage: lost(v, good[stage]) for stage, v in values.items()}
    return values, errors, status, branches


def failure(stage: str, code: Code, residual: Any, pre: Pretraining, values: dict[str, Any]) -> SolveError:
    """The error that a solve of a stage with this code is; `values` are those of pre-training."""
    detail = f"residual {float(residual):.2e}"
    if code is Code.too_narrow:
        rank = float(values["rank_fraction"])
        detail = f"kappa = {float(pre.kappa):g}, allowed: at least the rank fraction {rank:.6g}"
    return SolveError(stage, code, detail)


def lost(values, good):
    """The values, NaN with NaN slopes where a solve has failed."""
    # Added: a choice between two values would have no slope on the other.
    return jax.tree_util.tree_map(lambda v: nan_slope(v, good) + jnp.where(good, 0.0, jnp.nan), values)
