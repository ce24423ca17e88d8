"""Fine-tuning described: every prediction of it at a fixed point that was found, with error bars."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ..errors import succeeded
from ..evolution import finetuning as ft
from ..evolution.order import SPREAD_FLOOR, Order, directions, from_norm
from ..math.implicit import nan_slope
from ..math.quadrature import in_blocks, when
from ..model import wells
from ..model.channel.frozen_map import FrozenMap
from ..setting.stages import Finetuning
from .adapted import LIVE, STENCIL, AdaptedLayer, errors_at, minimum, near_minimum
from .pretraining import FirstStage
from .problem import Problem
from .stage import Described, Solved, Stage, attached, described, final_status, response_gap, status_of


class LoraStage(Stage):
    """Fine-tuning on a frozen map, with as many steps of symmetry breaking as the coordinates have."""

    fine: Finetuning
    frozen: FrozenMap
    #: For test errors: pre-training, and a c very near the one that is best for E'.
    pre: Any = None
    best_factor: Any = None

    def outer(self, x):
        return ft.order_at(self.fine, x).levels

    def step(self, x, const):
        return ft.step(x, (self.fine, self.frozen), const)

    def part(self, x, nodes, inner, gap=True):
        """Without breaking only; with it, where minimisers jump, the second average has no finite value. (2, 2) where
        some directions are spare."""
        fine, order = self.fine, ft.order_at(self.fine, x)

        def block(nodes, found):
            d = ft.draws(fine, self.frozen, nodes)
            a = ft.averages(fine, order, d, found)
            if order.levels:
                return a, jnp.full((2, 2) if ft.spare(fine) else (), jnp.nan)
            problem = ft.inner_problem(fine, order, d)

            def squares():
                low = wells.lowest(problem, found)
                square = response_gap(problem.terms(low.pick(low.u))[2], problem.v, len(d.teacher))
                return jnp.sum(d.weight * square, -1)

            return a, when(gap, squares)

        return in_blocks(block, nodes, inner)

    def image(self, averages, x):
        return ft.order_parameters(self.fine, ft.order_at(self.fine, x), averages[0]).encode()

    def refreshed(self, x, nodes, inner, steps):
        fine, frozen = self.fine, self.frozen
        nodes = ft.refresh_nodes(fine, frozen, nodes)
        return nodes, ft.refresh_inner(fine, frozen, ft.order_at(fine, x), nodes, inner, steps)

    def test_errors(self, x, nodes):
        layer, (of_lora, of_map) = AdaptedLayer(self.pre, self.fine, self.frozen, ft.order_at(self.fine, x)), nodes
        c = jnp.asarray(self.fine.adapter_factor)
        factors = jnp.stack([c, jnp.zeros(())])  # at w = 0 as well
        # Where there is none, NaN would spoil the derivatives of the others in reverse mode.
        best = jnp.where(jnp.isfinite(self.best_factor), self.best_factor, 1.0) * (1 + STENCIL)
        return {
            "test_error": errors_at(layer, of_lora, jnp.concatenate([factors, best])),
            "forgetting_error": jax.vmap(lambda c: layer.forgetting_error(of_map, c))(factors),
        }

    def predictions(self, x, averages, errors):
        fine, frozen, order = self.fine, self.frozen, ft.order_at(self.fine, x)
        (a, gap), q0 = averages, ft.TEACHER_SIZE
        c, norms = ft.conjugates(fine, order, a), order.norms(q0)
        live = norms[-1] > LIVE
        phi = ft.free_energy(fine, order, a)
        # Of w and -w, which are one solution, the one on the teacher's side.
        side = jnp.where(order.overlap < 0, -1.0, 1.0)
        m, p, q = (jnp.where(live, v, 0.0) for v in (side * order.overlap, norms[0], norms[-1]))
        none, broken = jnp.full((), jnp.nan), jnp.array(False)
        breaking = complexity = none
        if order.levels:
            broken = ~jnp.all(ft.all_one(order)[0])
            breaking = jnp.where(broken, order.breaking[0], none)
            complexity = jnp.where(broken, order.breaking[0] ** 2 * ft.energy_slopes(fine, order, a)[0], none)
        (best, lowest), adapted = minimum(self.best_factor, errors["test_error"][2:]), jnp.max(norms[-1]) > LIVE
        hats = {"qhat": c.qhat, "mhat": side * c.mhat, "lhat": c.lhat}
        return {
            **_by_direction({"v": order.response, "m": m, "p": p, "q": q, **hats}),
            "overlap": lora_overlap(fine, order),
            "train_loss": phi,
            "train_error": train_error(fine, order, phi),
            "test_error": errors["test_error"][0],
            "test_error_frozen": errors["test_error"][1],
            "best_adapter_factor": jnp.where(adapted, best, none),
            "test_error_best_factor": jnp.where(adapted, lowest, errors["test_error"][1]),
            "forgetting_error": errors["forgetting_error"][0],
            "forgetting_error_frozen": errors["forgetting_error"][1],
            "effective_noise": fine.effective_noise(frozen),
            "recalibration": fine.scale(frozen),
            "free_energy": phi,
            "replicon": replicon(fine, gap),
            "double_well_share": a.two_wells,
            "broken": 1.0 * broken,
            "breaking": breaking,
            "complexity": complexity,
        }

    def judged(self, x):
        # How far minima are apart, and y, matter little where they are nearly one: what they do is in the bars.
        order = ft.order_at(self.fine, x)
        norms = order.norms(ft.TEACHER_SIZE)
        return jnp.concatenate([jnp.ravel(v) for v in (jnp.log(order.response), order.overlap, norms[0], norms[-1])])


def lora_overlap(fine: Finetuning, order: Order):
    """o_w = ||m||_F / sqrt(||q||_F ||q0 1||_F), for rank one m / sqrt(q q0); NaN where the update is zero."""
    n, k = directions(fine.rank, fine.teacher_rank), min(fine.rank, fine.teacher_rank)
    size = jnp.sqrt(jnp.sum(n * order.norm(ft.TEACHER_SIZE) ** 2))
    live = size > LIVE
    most = jnp.sqrt(k * jnp.where(live, size, 1.0) * (ft.TEACHER_SIZE * np.sqrt(fine.teacher_rank)))
    return jnp.where(live, jnp.abs(jnp.sum(n * order.overlap)) / most, jnp.nan)


def train_error(fine: Finetuning, order: Order, phi):
    """alpha' E ||sigma(Z_W + chi chi^T) - sigma(Y')||_F^2 = phi - lambda' Tr q: the data part of the training loss, per
    D, in both phases (phi is stationary: d phi/d lambda' = Tr q). With one minimum it is alpha' c - Tr q' v/2."""
    return phi - fine.lam * jnp.sum(directions(fine.rank, fine.teacher_rank) * order.norm(ft.TEACHER_SIZE))


def replicon(fine: Finetuning, gap):
    """Growth of a difference between the norms of two replicas, alike in the directions along the teacher and in the
    spare ones: largest eigenvalue of (alpha' / n_b) E || d(chi - omega)_b / d omega_b' ||_F^2, n_b directions in b."""
    n = directions(fine.rank, fine.teacher_rank)
    if np.ndim(n) == 0:
        return fine.alpha * gap / n
    r = fine.alpha * gap / n[:, None]
    half, off = (r[0, 0] - r[1, 1]) / 2, r[0, 1] * r[1, 0]
    return (r[0, 0] + r[1, 1]) / 2 + jnp.sqrt(half**2 + off + 1e-30)


def _by_direction(values: dict[str, Any]) -> dict[str, Any]:
    """Pairs as two predictions: of the directions along the teacher under their name, of the spare ones as `_spare`."""
    out = {}
    for name, value in values.items():
        if jnp.ndim(value) == 0:
            out[name] = value
        else:
            out[name] = value[0]
            if name not in ("m", "mhat"):
                out[f"{name}_spare"] = value[1]
    return out


def lora_order(values: dict[str, Any]) -> Order:
    """The order parameters of fine-tuning from its predictions."""
    v, m, p, q = (values[name] for name in "vmpq")
    if "q_spare" in values:
        v, p, q = (jnp.stack([a, values[f"{name}_spare"]]) for name, a in (("v", v), ("p", p), ("q", q)))
        m = jnp.stack([m, jnp.zeros_like(m)])
    order = from_norm(v, m, p, ft.TEACHER_SIZE)
    if not values["broken"]:
        return order
    return order._replace(spread=(jnp.sqrt(jnp.maximum(q - p, SPREAD_FLOOR**2)),), breaking=(values["breaking"],))


# ---- description -----------------------------------------------------------------------------------------------


class Branches(NamedTuple):
    """Fine-tuning solutions from the informative [0] and the small [1] start: m and q along the teacher, free energy,
    code; and which of them was taken."""

    overlap: Any
    norm: Any
    free_energy: Any
    code: Any
    chosen: Any


class Starts(NamedTuple):
    """Where a search begins, in the solver's coordinates: `both` (2, n), informative and small; with breaking, what is
    taken `instead` (n,) of one where the equations have no value; whether both are known to be one."""

    both: Any
    instead: Any = None
    same: Any = False


class SecondStage(NamedTuple):
    """Output of a search of fine-tuning: the branch taken, both branches, what the channel searched for, and whether it
    was too `rough`: nothing was solved, wells were found where none should be, the replicon is not below one, or with
    breaking the glass is deep (where `numerics.symmetry` is not "auto": whether another search is asked for).
    `begin`: what one with breaking would begin from after this one, of a symmetric search the point (n,) that few nodes
    led to. `marginal`: solved, with one well everywhere, and the replicon hardly above one."""

    solved: Solved
    branches: Branches
    found: Any
    rough: Any
    begin: Any
    marginal: Any


class Answer(NamedTuple):
    """Predictions, error bars and status, by stage, and the branches of fine-tuning."""

    values: dict[str, dict[str, Any]]
    errors: dict[str, dict[str, Any]]
    status: dict[str, dict[str, Any]]
    branches: Branches


def describe_finetuning(problem: Problem, first: FirstStage, second: SecondStage) -> Described:
    """Predictions of fine-tuning on the branch that was taken, with their derivatives."""
    solved, nodes = second.solved, problem.nodes
    at = jnp.where(jnp.isfinite(solved.point.x), solved.point.x, 0.0)
    layer = AdaptedLayer(*problem.stages, problem.frozen(first.x), ft.order_at(problem.fine, at))
    best = near_minimum(layer, nodes.finetuning_test)

    def make(map_x):
        return LoraStage(problem.fine, problem.frozen(map_x), problem.pre, best)

    prepared = problem.nodes_at(solved.point.x, second.found, solved.weight)
    x = attached(make(first.x), solved, (prepared, solved.inner), at)
    replicas = problem.numerics.replicas
    found = described(make, solved, x, prepared, nodes.tests, replicas, (first.x,), (jax.lax.stop_gradient(first.xs),))
    good = succeeded(solved.point.code)
    return found._replace(values={k: nan_slope(v, good) for k, v in found.values.items()})


def answer(problem: Problem, first: FirstStage, second: SecondStage) -> Answer:
    """Every prediction with its error bar, and the codes that error bars decide."""
    lora = describe_finetuning(problem, first, second)
    status = final_status(status_of(second.solved.point), lora.errors, lora.shift)
    return Answer(
        {"pretraining": first.values, "finetuning": lora.values},
        {"pretraining": first.errors, "finetuning": lora.errors},
        {"pretraining": first.status, "finetuning": status},
        second.branches,
    )
