"""Solutions: every prediction of one setting as a documented property, with its quadrature error and status."""

from __future__ import annotations

import functools
import math
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from . import theory, wells
from .bayes import BayesLimits, bayes_optimal
from .channel import LeastError
from .errors import Code, SolveError, is_concrete, require_float64
from .program import Program
from .setting import Finetuning, Numerics, Pretraining, Setting
from .spectrum import LearnedSpectrum

_SUMMARY = {
    "pretraining": ("V", "M", "Q", "M_down", "qhat", "mhat", "shat", "overlap", "train_loss", "test_error",
                    "rank_fraction", "replicon"),
    "finetuning": ("v", "m", "q", "v_spare", "q_spare", "overlap", "train_loss", "test_error", "test_error_frozen",
                   "effective_noise", "recalibration", "free_energy", "replicon", "double_well_share"),
}  # fmt: skip


# Several programs, not one: the compiler's memory grows with the size of a program, and gradients share the searches.
_describe_pretraining = Program(theory.describe_pretraining, quick=True)
_describe_finetuning = Program(theory.describe_finetuning, quick=True)
_quadrature_errors = Program(theory.quadrature_errors, quick=True), Program(theory.quadrature_errors)
_solve_pretraining = Program(theory.solve_pretraining, quick=True), Program(theory.solve_pretraining)
_solve_finetuning = Program(theory.solve_finetuning, quick=True), Program(theory.solve_finetuning)

#: Nodes times solves from which on a slower compilation pays, and the solves that a single one stands for.
_MUCH, _SOLVES = 2**20, 16


def by_work(programs: tuple[Program, Program], nodes: int, solves: int = _SOLVES) -> Program:
    """Which of two programs of a search, the one faster to compile or the one faster to run, for so much work."""
    return programs[nodes * solves > _MUCH]


def solve(pre: Pretraining, fine: Finetuning, numerics: Numerics, nodes: theory.NodeSets):
    """Both stages without derivatives, compiled once per kind of setting: `(FirstStage, SecondStage)`."""
    numerics = numerics.without_seed
    first = by_work(_solve_pretraining, 4 * numerics.nodes)(pre, numerics, nodes.pretraining)
    first = _describe_pretraining(pre, nodes, first)

    def search(split: bool):
        program = by_work(_solve_finetuning, numerics.finetuning_nodes)
        return program(pre, fine, first, numerics, nodes.finetuning, split)

    # The search for smooth nodes is tried first; inside a transformation there is nothing to look at.
    if wells.splits(fine.rank) and all(map(is_concrete, jax.tree_util.tree_leaves((pre, fine, first.status)))):
        second = search(False)
        if not bool(second.rough):
            return first, second
    return first, search(True)


class Solution(eqx.Module):
    """Theory of one `setting`. `pretraining` and `finetuning` hold every prediction by name.

    pretraining: V, M, Q, qhat, mhat, shat (order parameters and conjugates); M_down = Tr(S S*)/D with the base map of
    fine-tuning (M, unless pre-training had a task of its own); overlap = M / sqrt(Q Q0); train_loss
    (L / D^2, penalty included) and train_error (its data part); test_error, test_error_noiseless (E);
    rank_fraction (rank of the learned map / D); replicon (stable below 1); double_well_share.

    finetuning: v, m, q, qhat, mhat, lhat; overlap = m / sqrt(q q0); train_loss = free_energy (L' / D, penalty included)
    and train_error; test_error (E'), test_error_frozen (E' at w = 0); effective_noise (Delta_eff); replicon (of
    smooth nodes); double_well_share (share of nodes whose inner problem has two minima).

    For higher ranks v, m, q, ... are the entries of the matrices (`lora_matrices`) in the directions along the
    teacher's and, for r > r*, v_spare, q_spare, qhat_spare, lhat_spare those in the others; overlap = ||m||_F /
    sqrt(||q||_F ||q0||_F). Where two or more directions have no overlap (spare ones, or all at m = 0) `replicon` is
    never below one: they are free to turn among themselves.

    All are scalars and differentiable in the setting's fields. `NaN` means undefined (the overlap of a zero map).
    """

    setting: Setting
    pretraining: dict[str, Any]
    finetuning: dict[str, Any]
    errors: dict[str, dict[str, Any]]
    status: dict[str, dict[str, Any]]
    branches: theory.Branches

    @property
    def test_error(self):
        """E' = E || sigma(Z_W + omega omega^T) - sigma(Y0 + chi* chi*^T) ||_F^2 on fresh inputs, noisy labels."""
        return self.finetuning["test_error"]

    @property
    def effective_noise(self):
        """Delta_eff = Var(Y0 - b Z_W) on the fine-tuning inputs: all that LoRA sees of pre-training for the identity.

        Fresh inputs: delta'/2 + Q0 - 2 b M + b^2 Q. For softmax on reused inputs, the formula of the identity.
        """
        return self.finetuning["effective_noise"]

    @property
    def overlap(self):
        """o_w = m / sqrt(q q0), the cosine of w and w*.

        For higher ranks ||m||_F / sqrt(||q||_F ||q0||_F), the root of the cosine of w w^T and w* w*^T: with r < r* at
        most (r / r*)^(1/4).
        """
        return self.finetuning["overlap"]

    @property
    def lora_matrices(self) -> dict[str, Any]:
        """m = w^T w*/D (r, r*), q = w^T w/D (r, r) and v (r, r), with w and w* turned so that they are diagonal."""
        fine, p = self.setting.finetuning, self.finetuning
        k = min(fine.rank, fine.teacher_rank)

        def diagonal(name):
            return jnp.diag(jnp.stack([p[name]] * k + [p.get(f"{name}_spare")] * (fine.rank - k)))

        return {"m": p["m"] * jnp.eye(fine.rank, fine.teacher_rank), "q": diagonal("q"), "v": diagonal("v")}

    @property
    def map_overlap(self):
        """O_W = M / sqrt(Q Q0), the cosine of the learned and the teacher map."""
        return self.pretraining["overlap"]

    @property
    def free_energy(self):
        """phi at the fixed point: training loss of fine-tuning per D, penalty included."""
        return self.finetuning["free_energy"]

    @property
    def spectrum(self) -> LearnedSpectrum:
        """Law of the learned map's eigenvalues, eta ReLU(S* + delta Z - eps) (with a task: of S_pre): atom, density."""
        c, pre = self.pretraining, self.setting.pretraining
        lam = pre.lam * pre.kappa**0.5
        return LearnedSpectrum(c["mhat"] / c["shat"], c["qhat"] ** 0.5 / c["mhat"], 2 * lam / c["mhat"], pre.law)

    @functools.cached_property
    def bayes_optimal(self) -> BayesLimits:
        """The best that any estimator can do with the same data, on fresh inputs: E_BO, E'_BO and the overlaps."""
        return bayes_optimal(self.setting)

    def stderr(self, stage: str, name: str) -> float:
        """Quadrature standard error of a prediction, e.g. `stderr("finetuning", "test_error")`."""
        return float(self.errors[stage][name])

    def code(self, stage: str) -> Code:
        """Result code of a stage; a solve that stopped at a jump must be well inside its quadrature error."""
        return Code(int(theory.final_code(stage, self.status[stage], self.errors[stage])))

    @property
    def ok(self) -> bool:
        """Whether both stages were solved."""
        return all(self.code(s) in (Code.ok, Code.floor) for s in self.status)

    def require_ok(self) -> None:
        """Raises `SolveError` for the first stage that failed."""
        for stage in ("pretraining", "finetuning"):
            code = self.code(stage)
            if code not in (Code.ok, Code.floor):
                detail = f"residual {float(self.status[stage]['residual']):.2e}"
                if code is Code.too_narrow:
                    rank = float(self.pretraining["rank_fraction"])
                    kappa = float(self.setting.pretraining.kappa)
                    detail = f"kappa = {kappa:g}, allowed: at least the rank fraction {rank:.6g}"
                raise SolveError(stage, code, detail)

    def summary(self) -> dict[str, Any]:
        """Plain numbers for JSON: predictions, their quadrature errors and the status; None where undefined."""
        values = {"pretraining": self.pretraining, "finetuning": self.finetuning}
        names = {s: [n for n in some if n in values[s]] for s, some in _SUMMARY.items()}
        out: dict[str, Any] = {s: {n: _plain(values[s][n]) for n in some} for s, some in names.items()}
        out["quadrature_error"] = {
            s: {n: _plain(self.errors[s].get(n, 0.0)) for n in some} for s, some in names.items()
        }
        out["status"] = {
            s: {
                "code": self.code(s).name,
                "residual": _plain(self.status[s]["residual"]),
                "steps": int(self.status[s]["steps"]),
            }
            for s in ("pretraining", "finetuning")
        }
        return out


def _plain(value) -> float | None:
    x = float(np.asarray(value))
    return x if math.isfinite(x) else None


def predict(setting: Setting, throw: bool = True) -> Solution:
    """Solves both stages of `setting` and predicts everything.

    Raises `SolveError` when a solve failed, unless `throw` is False (then read `Solution.ok` and `Solution.code`).
    Compiled once per kind of setting (tokens, activations, numerics); under jit, vmap and grad nothing is raised
    and the derivative of a failed solve is NaN.
    """
    require_float64()
    asked = setting
    if isinstance(setting.finetuning.recalibration, LeastError):
        from .design import with_best_scale  # which predicts at every step of its search

        setting = with_best_scale(setting)
    pre, fine = setting.pretraining, setting.finetuning_resolved
    nodes = theory.node_sets(pre, fine, setting.numerics)
    out = _describe_finetuning(pre, fine, nodes, *solve(pre, fine, setting.numerics, nodes))
    bars = by_work(_quadrature_errors, setting.numerics.finetuning_nodes)
    map_errors, errors = bars(pre, fine, setting.numerics.without_seed, nodes, out.solved)
    solution = Solution(
        asked,
        out.pretraining,
        out.finetuning,
        {"pretraining": map_errors, "finetuning": errors},
        out.status,
        out.branches,
    )
    if throw and is_concrete(out.status["pretraining"]["code"]):
        solution.require_ok()
    return solution
