"""Lanes: problems of one kind on their way through the same programs, one alone or many on the devices of a mesh."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import equinox as eqx
import jax
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from ..runtime.cores import gathered, mesh_of, sharing
from ..runtime.program import Program
from .problem import Problem

#: Nodes times solves from which on a slower compilation pays; the solves that a problem alone stands for, and a lane on
#: a mesh: not how many are left to do or whose they are, for other programs have other bits.
_MUCH, _ALONE, _ON_MESH = 2**20, 16, 128


@functools.cache
def _programs(f: Callable) -> tuple[Program, Program]:
    """`f` compiled fast, and compiled to be fast."""
    return Program(f, quick=True), Program(f)


def across(f: Callable, mesh: Mesh, problem: Problem, *given):
    """`f(problem, *given)` on every lane, shared out over the devices of the mesh: the stages of the problem and the
    arrays in `given` are stacked, its nodes are those of every lane."""
    stacked, rest = eqx.partition((problem.stages, given), eqx.is_array)

    def many(stacked, nodes):
        def one(lane):
            stages, given = eqx.combine(lane, rest)
            return f(problem._replace(nodes=nodes).at(stages), *given)

        return jax.lax.map(one, stacked) if mesh.devices.flat[0].platform == "cpu" else jax.vmap(one)(stacked)

    lane, every = PartitionSpec("lane"), PartitionSpec()
    shared = jax.shard_map(many, mesh=mesh, in_specs=(lane, every), out_specs=lane, check_vma=False)
    return shared(stacked, problem.nodes)


class Lanes(NamedTuple):
    """A problem alone, or on a `mesh` the first `count` of those whose stages are stacked in `problem` (the others are
    padding)."""

    problem: Problem
    count: int = 1
    mesh: Mesh | None = None

    @staticmethod
    def of(problems: Sequence[Problem], mesh: Mesh, width: int) -> Lanes:
        """Problems of one kind, stacked and padded to `width`."""
        stages = [p.stages for p in problems]
        stages += [stages[-1]] * (width - len(stages))
        return Lanes(problems[0].at(jax.tree_util.tree_map(lambda *a: np.stack(a), *stages)), len(problems), mesh)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of what every lane has one of: (width,), or ()."""
        return () if self.mesh is None else jax.tree_util.tree_leaves(self.problem.stages)[0].shape[:1]

    def run(self, f: Callable, nodes: int, *given):
        """`f(problem, *given)` of every lane, by a program that suits the work at so many nodes."""
        if self.mesh is not None:
            return _programs(across)[nodes * _ON_MESH > _MUCH](f, self.mesh, self.problem, *given)
        program, mesh = self._alone(f, nodes)
        with sharing(mesh):
            return program(self.problem, *(given if mesh else gathered(given)))

    def ahead(self, f: Callable, nodes: int, *given):
        """The shapes of `run(f, nodes, *given)` for a problem alone, whose program is compiled meanwhile."""
        program, mesh = self._alone(f, nodes)
        with sharing(mesh):
            return program.ahead(self.problem, *given)

    def _alone(self, f: Callable, nodes: int) -> tuple[Program, Mesh | None]:
        """The program of a problem alone, and the cores that share its work where a slower compilation pays."""
        much = nodes * _ALONE > _MUCH
        return _programs(f)[much], mesh_of(self.problem.nodes.parts) if much else None

    def where(self, flags) -> list[int]:
        """The lanes whose flag is up."""
        return np.atleast_1d(jax.device_get(flags))[: self.count].nonzero()[0].tolist()

    def take(self, index: Sequence[int], tree: Any) -> tuple[Lanes, Any]:
        """Some of the lanes, padded, and theirs of a tree."""
        if self.mesh is None:
            return self, tree
        (width,) = self.shape
        padded = np.array([*index, *[index[-1]] * (width - len(index))])
        stages, tree = jax.tree_util.tree_map(
            lambda a: np.asarray(a)[padded], jax.device_get((self.problem.stages, tree))
        )
        return self._replace(problem=self.problem.at(stages), count=len(index)), tree

    def with_broken(self, deep: int) -> Lanes:
        return self._replace(problem=self.problem.with_broken(deep))
