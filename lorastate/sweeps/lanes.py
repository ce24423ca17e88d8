"""Lanes: settings of one kind that go through one compiled program together, shared out over devices."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from ..errors import SettingError, SolveError, succeeded
from ..runtime.program import Program
from ..setting.paths import replace
from ..setting.stages import Setting
from ..solution import gradients
from ..solution.finetuning import describe_finetuning, quadrature_errors
from ..solution.pretraining import describe_pretraining, search_pretraining
from ..solution.problem import Problem
from ..solution.search import solve_broken, solve_symmetric
from ..solution.solve import by_work
from ..solution.stage import final_status

#: Lanes that a device takes at once: a CPU runs them one by one, and few of them share out the work evenly.
_LANES = {"cpu": 4}
_LANES_ELSEWHERE = 32
#: Solves that a sweep stands for where a program is chosen by its work: not how many are left to do or whose they are,
#: for other programs have other bits.
_SOLVES = 128
#: How the names of derivatives begin in a row, and the stages that the other names begin with.
GRADIENT = "gradient."
STAGES = ("pretraining", "finetuning")


def chosen_devices(devices: Any) -> list[Any]:
    """JAX devices from a number, "all", a list of them, or None for the default one."""
    config: Any = jax.config
    default = config.jax_default_device
    local = jax.local_devices(backend=getattr(default, "platform", default))
    if devices is None:
        return [default if isinstance(default, jax.Device) else local[0]]
    if devices == "all":
        return local
    if isinstance(devices, int) and not isinstance(devices, bool):
        if not 1 <= devices <= len(local):
            raise SettingError(f"devices = {devices} is out of range; allowed: 1 to {len(local)}, or 'all'")
        return local[:devices]
    if isinstance(devices, Sequence) and not isinstance(devices, str) and devices:
        return list(devices)
    raise SettingError(f"devices = {devices!r} is unknown; allowed: a number, 'all', or a list of JAX devices")


def lanes_on(devices: Sequence[Any], chunk: int | None) -> int:
    """Settings that go through a program at once, `chunk` or the usual number on each device."""
    return len(devices) * (chunk or _LANES.get(devices[0].platform, _LANES_ELSEWHERE))


def kind(setting: Setting) -> Any:
    """What settings that go through the same program have in common: all that is static."""
    return jax.tree_util.tree_structure((setting.pretraining, setting.finetuning_resolved, setting.numerics))


# ---- programs --------------------------------------------------------------------------------------------------


def across(f, mesh: Mesh, problem: Problem, *given):
    """`f(problem, *given)` on every lane, shared out over the devices of the mesh: the stages of the problem and the
    arrays in `given` are stacked, its nodes are those of every lane."""
    stacked, rest = eqx.partition((problem.stages, given), eqx.is_array)

    def many(lanes, nodes):
        def one(lane):
            stages, given = eqx.combine(lane, rest)
            return f(problem._replace(nodes=nodes).at(stages), *given)

        return jax.lax.map(one, lanes) if mesh.devices.flat[0].platform == "cpu" else jax.vmap(one)(lanes)

    lane, every = PartitionSpec("lane"), PartitionSpec()
    shared = jax.shard_map(many, mesh=mesh, in_specs=(lane, every), out_specs=lane, check_vma=False)
    return shared(stacked, problem.nodes)


_across = Program(across, quick=True), Program(across)


# Several programs, as in `solution`: the compiler's time and memory grow faster than a program's size.


def _pretrain(problem: Problem):
    return describe_pretraining(problem, search_pretraining(problem))


def _row(problem: Problem, first, second) -> dict[str, Any]:
    """Every prediction with its error bar, and the status, by column."""
    out = describe_finetuning(problem, first, second)
    bars, row = quadrature_errors(problem, out), {}
    for stage, values, bar in zip(STAGES, (out.pretraining, out.finetuning), bars, strict=True):
        status = final_status(out.status[stage], bar)
        good = succeeded(status["code"])
        for name, value in values.items():
            row[f"{stage}.{name}"] = jnp.where(good, value, jnp.nan)
            row[f"{stage}.{name}_stderr"] = jnp.where(good, bar.errors[name], jnp.nan)
        row |= {f"{stage}.{k}": 1.0 * status[k] for k in ("code", "residual", "rate", "steps")}
    return row


def _slopes(problem: Problem, first, second, objective: str):
    return gradients.value_and_slopes(objective, problem, first.solved, second)[1]


# ---- chunks ----------------------------------------------------------------------------------------------------


def run(settings: Sequence[Setting], objective: str | None, mesh: Mesh, lanes: int) -> list[dict[str, float]]:
    """Rows of a chunk of settings of one kind, padded to the number of lanes that the program was compiled for.

    As `solution.solve` does: the replica-symmetric search first, and another where that will not do.
    """
    plain, lost = [], {}
    for k, s in enumerate(settings):
        try:
            plain.append(gradients.with_best_scale(s) if gradients.searches_scale(s) else s)
        except SolveError as error:  # what does not depend on b is there all the same
            plain.append(replace(s, "finetuning.recalibration", 1.0))
            lost[k] = error.code
    chunk = Chunk(plain, mesh, lanes)
    symmetry = chunk.numerics.symmetry
    first = chunk.first()
    second = chunk.symmetric(first, True)
    here = {"rs": chunk.wells, "1rsb": lambda _: list(range(len(plain))), "auto": chunk.rough}[symmetry](second)
    rows = [{} for _ in plain] if len(here) == len(plain) else chunk.rows(first, second, objective)
    index, coarse = here, second.coarse
    for deep in (False, True):
        if not index:
            break
        chunk = Chunk([plain[k] for k in index], mesh, lanes, None if symmetry == "rs" else deep)
        first, coarse = chunk.take(here, (first, coarse))
        found = chunk.symmetric(first, False) if symmetry == "rs" else chunk.broken(first, coarse)
        here = [] if symmetry == "rs" or deep else chunk.rough(found)
        if len(here) < len(index):
            for k, row in zip(index, chunk.rows(first, found, objective), strict=True):
                rows[k] = row
        index = [index[k] for k in here]
    for s, row in zip(settings, rows, strict=True):
        if gradients.searches_scale(s):
            row["finetuning.recalibration_stderr"] = math.nan  # of the search: not known
    for k, code in lost.items():
        if succeeded(int(rows[k]["pretraining.code"])):
            rows[k] |= dict.fromkeys((name for name in rows[k] if not name.startswith("pretraining.")), math.nan)
            rows[k]["finetuning.code"] = float(code)
    return rows


class Chunk:
    """Settings of one kind, stacked, and the programs that they go through together."""

    def __init__(self, settings: Sequence[Setting], mesh: Mesh, lanes: int, deep: bool | None = None):
        """`deep`: whether for deep glasses, where symmetry is broken."""
        self.settings, self.mesh, self.lanes = settings, mesh, lanes
        problem = Problem.of(settings[0])
        stages = [problem.stages, *((s.pretraining, s.finetuning_resolved) for s in settings[1:])]
        stages += [stages[-1]] * (lanes - len(stages))
        self.problem = problem.at(jax.tree_util.tree_map(lambda *a: np.stack(a), *stages))
        if deep is not None:
            self.problem = self.problem.with_broken(deep)
        self.numerics = problem.numerics

    def take(self, index: Sequence[int], tree):
        """Lanes of what another chunk has found, padded."""
        padded = np.array([*index, *[index[-1]] * (self.lanes - len(index))])
        return jax.tree_util.tree_map(lambda a: np.asarray(a)[padded], jax.device_get(tree))

    def run(self, work: int, f, *given):
        """`f(problem, *given)` of every lane; `work`: nodes of a lane."""
        return by_work(_across, work, _SOLVES)(f, self.mesh, self.problem, *given)

    def first(self):
        return self.run(4 * self.numerics.nodes, _pretrain)

    def symmetric(self, first, alone: bool):
        return self.run(self.numerics.finetuning_nodes, solve_symmetric, first, alone)

    def broken(self, first, coarse):
        return self.run(self.numerics.finetuning_nodes * self.numerics.samples // 4, solve_broken, first, coarse)

    def rough(self, second) -> list[int]:
        """Lanes whose search was too rough."""
        return jax.device_get(second.rough)[: len(self.settings)].nonzero()[0].tolist()

    def wells(self, second) -> list[int]:
        """Lanes that have nodes with two wells, or are not solved."""
        two = jnp.any(second.solved.inner.two, (1, 2)) | ~succeeded(second.solved.point.code)
        return jax.device_get(two)[: len(self.settings)].nonzero()[0].tolist()

    def rows(self, first, second, objective: str | None) -> list[dict[str, float]]:
        """Every prediction of every setting, and the slopes of the objective."""
        table = jax.device_get(self.run(self.numerics.finetuning_nodes, _row, first, second))
        rows = [{name: float(column[k]) for name, column in table.items()} for k in range(len(self.settings))]
        if objective is None:
            return rows
        slopes = jax.device_get(_across[0](_slopes, self.mesh, self.problem, first, second, objective))
        for k, row in enumerate(rows):
            lane = jax.tree_util.tree_map(lambda a, k=k: a[k], slopes)
            failed = not all(succeeded(int(row[f"{s}.code"])) for s in STAGES)
            sign = -1.0 if objective == "overlap" else 1.0
            for path, slope in gradients.total_slopes(self.settings[k], lane).items():
                row[GRADIENT + path] = math.nan if failed else sign * slope
        return rows
