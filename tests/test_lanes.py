"""Both stages of many lanes: which searches are made for which lanes, and which of them count."""

from types import SimpleNamespace
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

import lorastate as ls
from lorastate.solution import solve
from lorastate.solution.finetuning import Starts
from lorastate.solution.lanes import Lanes
from lorastate.solution.problem import Problem
from lorastate.solution.search import _begin_again


class Toy(Lanes):
    """Lanes that know their numbers: what is too rough without breaking, with it, and in a deep glass."""

    @property
    def places(self):
        return list(range(self.count))

    def take(self, index, tree):
        problem: Any = self.problem
        lanes = [problem.lanes[k] for k in index]
        kept: Any = SimpleNamespace(numerics=problem.numerics, lanes=lanes)
        return Toy(kept, len(lanes)), tree

    def with_broken(self, deep):
        return self


@pytest.fixture
def groups(monkeypatch):
    def found(handed, rough, failed=(), marginal=()):
        def search(lanes, first, before, *_):
            handed.append(before)
            rough_, failed_, marginal_ = (np.isin(lanes.problem.lanes, which) for which in (rough, failed, marginal))
            code = np.where(failed_, ls.Code.nonfinite, ls.Code.ok)
            solved = SimpleNamespace(point=SimpleNamespace(code=code))
            return SimpleNamespace(rough=rough_, begin=len(handed), solved=solved, marginal=marginal_)

        return search

    def run(symmetry, symmetric, broken=(), failed=(), marginal=()):
        handed: list[Any] = []
        made = iter([*(found(handed, rough, failed) for rough in broken)])
        monkeypatch.setattr(solve, "pretrained", lambda lanes: None)
        monkeypatch.setattr(solve, "_symmetric", found(handed, symmetric, (), marginal))
        monkeypatch.setattr(solve, "_broken", lambda *given: next(made)(*given))
        problem: Any = SimpleNamespace(numerics=SimpleNamespace(symmetry=symmetry), lanes=[0, 1, 2, 3])
        groups: Any = solve.solve(Toy(problem, 4))
        made_of = [(list(where), [group.problem.lanes[k] for k in where.values()]) for where, group in groups]
        assert all(numbers == lanes for numbers, lanes in made_of)  # what is found is that of the lane
        # One with breaking begins where the one before it says; a symmetric one is told whether nodes have one well.
        # The last one, of what failed, begins as the first one did.
        assert handed == ([True, False] if symmetry == "rs" else [True, 1, 2, 1][: len(handed)])
        return [numbers for numbers, _ in made_of]

    return run


def test_a_lane_is_solved_again_until_it_will_do(groups):
    every = [0, 1, 2, 3]
    assert groups("auto", []) == [every]
    assert groups("auto", [1, 3], [[]]) == [[0, 2], [1, 3]]
    # 2 is a deep glass, and stays one.
    assert groups("auto", [1, 2], [[2], [2]]) == [[0, 3], [1], [2]]
    # 1 fails with breaking, whatever the samples, 3 too, but that is symmetric all but a little.
    assert groups("auto", [1, 2, 3], [[1, 3], [1, 3], [1]], failed=[1, 3], marginal=[2, 3]) == [[0], [2], [1], [3]]
    assert groups("auto", [3], [[3], [3]], failed=[3], marginal=[3]) == [[0, 1, 2], [3]]
    # Where no lane is finished nothing is yielded: nobody describes what does not count.
    assert groups("1rsb", every, [every, [0]]) == [every]
    # Replica symmetry that was asked for: the second search is the last.
    assert groups("rs", [0, 2]) == [[1, 3], [0, 2]]


@pytest.mark.parametrize("same", [False, True])
def test_a_search_begins_where_the_last_one_found_solutions(same):
    """A branch that was not solved, or whose y has not found its place, begins where it did before."""
    before = Starts(np.array([[1.0, 2.0], [3.0, 4.0]]), np.zeros(2), np.array(False))
    ends, good, bad = np.array([[5.0, 6.0], [7.0, 8.0]]), int(ls.Code.ok), int(ls.Code.stalled)

    def begin(codes, placed):
        found: Any = SimpleNamespace(x=jnp.array(ends), code=jnp.array(codes), placed=jnp.array(placed))
        return _begin_again(before, found, jnp.array(same))

    again = begin([good, good], [True, True])
    assert (again.both == (ends[[0, 0]] if same else ends)).all() and bool(again.same) == same
    for codes, placed in (([bad, good], [True, True]), ([good, good], [False, True])):
        again = begin(codes, placed)
        assert (again.both == np.array([before.both[0], ends[1]])).all() and not again.same


def test_lanes_are_stacked_padded_and_taken():
    def problem(lam):
        pre = ls.Pretraining(0.1, lam, activation="identity", tokens=2)
        return Problem.of(ls.Setting(pre, ls.Finetuning(3.0, 0.6), ls.Numerics(512, 1024, 2, seed=3)))

    # Of six places on two devices each has three, and the lanes are given to the devices in turn.
    mesh: Any = SimpleNamespace(devices=np.arange(2))
    lanes = Lanes.of([problem(lam) for lam in (0.1, 0.2, 0.3)], mesh, width=6)
    np.testing.assert_array_equal(lanes.problem.pre.lam, [0.1, 0.3, 0.3, 0.2, 0.3, 0.3])
    assert lanes.places == [0, 3, 1]
    assert lanes.where(np.array([True, True, True, False, True, True])) == [0, 2]
    some, tree = lanes.take([1, 2], {"x": np.arange(6)})
    assert some.count == 2
    np.testing.assert_array_equal(some.problem.pre.lam, [0.2, 0.3, 0.3, 0.3, 0.3, 0.3])
    np.testing.assert_array_equal(tree["x"], [3, 1, 1, 1, 1, 1])
    # Alone there is nothing to take, and the seed is in the nodes only.
    alone = Lanes(problem(0.1))
    assert alone.take([0], tree) == (alone, tree)
    assert alone.where(np.array(True)) == [0] and alone.where(np.array(False)) == []
    assert alone.problem.numerics.seed == 0 and int(alone.problem.nodes.seed) == 3
