"""Lanes: problems of one kind on their way through the same programs, one alone or many on the devices of a mesh."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import equinox as eqx
import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ..math.quadrature import when
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


def across(f: Callable, mesh: Mesh, wanted, problem: Problem, *given):
    """`f(problem, *given)` on every lane, shared out over the devices of the mesh: the stages of the problem and the
    arrays in `given` are stacked, its nodes are those of every lane. On a CPU, where a device takes its lanes one after
    the other, nothing is done for those that are not `wanted`: zeros are what comes of them."""
    stacked, rest = eqx.partition((problem.stages, given), eqx.is_array)

    def many(wanted, stacked, nodes):
        def one(lane):
            stages, given = eqx.combine(lane, rest)
            return f(problem._replace(nodes=nodes).at(stages), *given)

        if mesh.devices.flat[0].platform == "cpu":
            return jax.lax.map(lambda given: when(given[0], lambda: one(given[1])), (wanted, stacked))
        return jax.vmap(one)(stacked)

    lane, every = PartitionSpec("lane"), PartitionSpec()
    shared = jax.shard_map(many, mesh=mesh, in_specs=(lane, lane, every), out_specs=lane, check_vma=False)
    return shared(wanted, stacked, problem.nodes)


class Lanes(NamedTuple):
    """A problem alone, or on a `mesh` `count` of those whose stages are stacked in `problem`, at `places`; the others
    are padding."""

    problem: Problem
    count: int = 1
    mesh: Mesh | None = None

    @staticmethod
    def of(problems: Sequence[Problem], mesh: Mesh, width: int) -> Lanes:
        """Problems of one kind, stacked and padded to `width`."""
        stages = jax.tree_util.tree_map(lambda *a: np.stack(a), *(p.stages for p in problems))
        lanes = Lanes(problems[0], len(problems), mesh)
        return lanes._replace(problem=problems[0].at(lanes._spread(range(len(problems)), width, stages)))

    @property
    def shape(self) -> tuple[int, ...]:
        """Of what every lane has one of: (width,), or ()."""
        return () if self.mesh is None else jax.tree_util.tree_leaves(self.problem.stages)[0].shape[:1]

    @property
    def places(self) -> list[int]:
        """Where each lane is in arrays that have one row for every lane."""
        return [0] if self.mesh is None else self._places(self.shape[0])

    def _places(self, width: int) -> list[int]:
        """Devices have equal shares of the rows: one lane is given to each of them in turn."""
        devices = np.size(self.mesh.devices)  # type: ignore[union-attr]
        return [k % devices * (width // devices) + k // devices for k in range(self.count)]

    def _spread(self, rows: Sequence[int], width: int, tree: Any) -> Any:
        """These rows of a tree, each in the place of its lane, padded to `width`."""
        order = np.full(width, rows[-1])
        order[self._places(width)] = rows
        return jax.tree_util.tree_map(lambda a: np.asarray(a)[order], tree)

    def run(self, f: Callable, nodes: int, *given):
        """`f(problem, *given)` of every lane, by a program that suits the work at so many nodes."""
        if self.mesh is not None:
            program, *given = self._on_mesh(f, nodes, *given)
            return program(*given)
        program, mesh = self._alone(f, nodes)
        with sharing(mesh):
            return program(self.problem, *(given if mesh else gathered(given)))

    def ahead(self, f: Callable, nodes: int, *given):
        """The shapes of `run(f, nodes, *given)`, whose program is compiled meanwhile."""
        if self.mesh is not None:
            program, *given = self._on_mesh(f, nodes, *given)
            here = NamedSharding(self.mesh, PartitionSpec("lane"))
            return jax.tree_util.tree_map(
                lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=here), program.ahead(*given)
            )
        program, mesh = self._alone(f, nodes)
        with sharing(mesh):
            return program.ahead(self.problem, *given)

    def _on_mesh(self, f: Callable, nodes: int, *given) -> tuple:
        """The program of lanes on a mesh, and what it is given."""
        wanted = np.isin(np.arange(self.shape[0]), self.places)
        return _programs(across)[nodes * _ON_MESH > _MUCH], f, self.mesh, wanted, self.problem, *given

    def _alone(self, f: Callable, nodes: int) -> tuple[Program, Mesh | None]:
        """The program of a problem alone, and the cores that share its work where a slower compilation pays."""
        much = nodes * _ALONE > _MUCH
        return _programs(f)[much], mesh_of(self.problem.nodes.parts) if much else None

    def where(self, flags) -> list[int]:
        """The lanes whose flag is up."""
        return np.atleast_1d(jax.device_get(flags))[self.places].nonzero()[0].tolist()

    def take(self, index: Sequence[int], tree: Any) -> tuple[Lanes, Any]:
        """Some of the lanes, padded, and theirs of a tree."""
        if self.mesh is None:
            return self, tree
        given = jax.device_get((self.problem.stages, tree))
        some, places = self._replace(count=len(index)), self.places
        stages, tree = some._spread([places[k] for k in index], self.shape[0], given)
        return some._replace(problem=self.problem.at(stages)), tree

    def with_broken(self, deep: int) -> Lanes:
        return self._replace(problem=self.problem.with_broken(deep))
