"""Solutions: every prediction of one setting as a documented property, with its quadrature error and status."""

from __future__ import annotations

import functools
import math
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from ..bayes.limits import BayesLimits, bayes_optimal
from ..errors import Code, is_concrete, require_float64, succeeded
from ..model.channel.frozen_map import FrozenMap
from ..model.spectra.learned import LearnedSpectrum
from ..predictions import summary_names
from ..runtime.cores import gathered
from ..setting.numerics import Numerics
from ..setting.stages import Finetuning, Pretraining, Setting
from .finetuning import Branches
from .gradients import searches_scale, with_best_scale
from .lanes import Lanes
from .pretraining import symmetry_of
from .problem import Problem, frozen_at
from .solve import answered, failure, or_nan, pretrained, solve_alone, traced_answer, unbroken


class Solution(eqx.Module):
    """Theory of one `setting`. `pretraining` and `finetuning` hold every prediction by name.

    pretraining: V, M, Q, qhat, mhat, shat (order parameters and conjugates); M_down = Tr(S S*)/D with the base map of
    fine-tuning (M, unless pre-training had a task of its own); overlap = M / sqrt(Q Q0); train_loss
    (L / D^2, penalty included) and train_error (its data part); test_error, test_error_noiseless (E);
    rank_fraction (rank of the learned map / D); replicon (of smooth nodes; stable below 1); double_well_share: where it
    is above a thousandth the loss of pre-training has many minima, which this theory takes for one.

    finetuning: v, m, q, qhat, mhat, lhat; overlap = m / sqrt(q q0); train_loss = free_energy (L' / D, penalty included)
    and train_error; test_error (E'), test_error_frozen (E' at w = 0); best_adapter_factor (the c on w w^T that is best
    for E') and test_error_best_factor (E' with it); forgetting_error (the adapted layer on the labels of pre-training,
    whose error before is its test_error) and forgetting_error_frozen; effective_noise (Delta_eff); replicon (of smooth
    nodes); double_well_share (share of nodes whose inner problem has two minima).

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
    branches: Branches

    @property
    def values(self) -> dict[str, dict[str, Any]]:
        """The predictions of both stages, by stage and name."""
        return {"pretraining": self.pretraining, "finetuning": self.finetuning}

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
        return _spectrum(self.setting.pretraining, self.pretraining)

    @property
    def symmetry(self) -> str:
        """Phase of fine-tuning: "replica symmetric" (one minimum, up to w -> -w) or "one-step broken" (many, whose
        overlap is p < q). Decided by the theory: symmetric where all nodes but a few have one well and `replicon` < 1.
        """
        return "one-step broken" if bool(self.finetuning["broken"]) else "replica symmetric"

    @property
    def pretraining_symmetry(self) -> str:
        """Phase of pre-training: "replica symmetric", or "unstable": its loss then has many minima, which this theory
        takes for one, and training ends some per cent away from it (see `benchmarks/README.md`)."""
        return symmetry_of(self.pretraining)

    @functools.cached_property
    def rs(self) -> dict[str, Any]:
        """E', o_w and phi of the replica-symmetric solution, and its code, for comparison where symmetry is broken and
        it is unstable (see `symmetric_solution`)."""
        return symmetric_solution(self.setting)

    @functools.cached_property
    def bayes_optimal(self) -> BayesLimits:
        """The best that any estimator can do with the same data, on fresh inputs: E_BO, E'_BO and the overlaps."""
        return bayes_optimal(self.setting)

    def stderr(self, stage: str, name: str) -> float:
        """Quadrature standard error of a prediction, e.g. `stderr("finetuning", "test_error")`.

        With recalibration "error" the b that was found counts as given (E' does not change with it to first order); its
        own error is not known, NaN.
        """
        return float(self.errors[stage][name])

    def code(self, stage: str) -> Code:
        """Result code of a stage."""
        return Code(int(self.status[stage]["code"]))

    @property
    def ok(self) -> bool:
        """Whether both stages were solved."""
        return all(self.code(s) is Code.ok for s in self.status)

    def require_ok(self) -> None:
        """Raises `SolveError` for the first stage that failed."""
        for stage in ("pretraining", "finetuning"):
            code = self.code(stage)
            if code is not Code.ok:
                residual = self.status[stage]["residual"]
                raise failure(stage, code, residual, self.setting.pretraining, self.pretraining)

    def summary(self) -> dict[str, Any]:
        """Plain numbers for JSON: predictions, their quadrature errors and the status; None where undefined, and of a
        stage that failed."""
        out = _summary(self.values, self.errors, self.status)
        good = self.code("finetuning") is Code.ok
        return out | {"symmetry": self.symmetry if good else None}


def symmetric_solution(setting: Setting) -> dict[str, Any]:
    """E', o_w and phi of the replica-symmetric solution where symmetry is broken, and its code. The numbers are None
    where that solve failed, which is no failure of the theory."""
    if searches_scale(setting):
        setting = with_best_scale(setting)
    found = unbroken(Problem.of(setting)).answer()
    code = Code(int(found.status["finetuning"]["code"]))
    values = {name: found.values["finetuning"][name] for name in ("test_error", "overlap", "free_energy")}
    return {**{name: _plain(v) if code is Code.ok else None for name, v in values.items()}, "code": code.name}


def _summary(values: dict[str, Any], errors: dict[str, Any], status: dict[str, Any]) -> dict[str, Any]:
    """The summary of some stages, from what is known of each."""

    def plain(stage: str, table: dict[str, Any]) -> dict[str, float | None]:
        good = int(status[stage]["code"]) == Code.ok
        return {n: _plain(table[n]) if good else None for n in summary_names(stage) if n in table}

    def end(code, residual, steps, **_) -> dict[str, Any]:
        return {"code": Code(int(code)).name, "residual": _plain(residual), "steps": int(steps)}

    out: dict[str, Any] = {stage: plain(stage, table) for stage, table in values.items()}
    out["quadrature_error"] = {stage: plain(stage, errors[stage]) for stage in values}
    good = int(status["pretraining"]["code"]) == Code.ok
    out["pretraining_symmetry"] = symmetry_of(values["pretraining"]) if good else None
    return out | {"status": {stage: end(**status[stage]) for stage in values}}


def _spectrum(pre: Pretraining, values) -> LearnedSpectrum:
    mhat, lam = values["mhat"], pre.lam * pre.kappa**0.5
    return LearnedSpectrum(mhat / values["shat"], values["qhat"] ** 0.5 / mhat, 2 * lam / mhat, pre.law)


def _plain(value) -> float | None:
    x = float(np.asarray(value))
    return x if math.isfinite(x) else None


def predict(setting: Setting, throw: bool = True) -> Solution:
    """Solves both stages of `setting` and predicts everything.

    Raises `SolveError` when a solve failed, unless `throw` is False (then read `Solution.ok` and `Solution.code`).
    Compiled once per kind of setting (tokens, activations, numerics); under jit, vmap and grad nothing is raised
    and a failed solve gives NaN, values and derivatives.
    """
    require_float64()
    asked = setting
    if searches_scale(setting):
        setting = with_best_scale(setting)
    problem = Problem.of(setting)
    known = problem.known
    values, errors, status, branches = (
        gathered(solve_alone(problem, answered(problem)).answer()) if known else traced_answer(problem)
    )
    if setting is not asked:
        errors["finetuning"]["recalibration"] = jnp.asarray(jnp.nan)  # of the search: not known
    solution = Solution(asked, values["pretraining"], values["finetuning"], errors, status, branches)
    if throw and known:
        solution.require_ok()
    return solution


# ---- pre-training alone ----------------------------------------------------------------------------------------


class PretrainingSolution(eqx.Module):
    """Theory of pre-training alone, for whoever needs the learned map and not what is made of it.

    `values` are the predictions that `Solution.pretraining` has, by the same names, and `errors` their quadrature
    standard errors (zero where closed forms need no nodes); all are differentiable in the fields of `pretraining`. `x`
    are the order parameters in the solver's coordinates, from which `frozen` makes the map that fine-tuning sees.
    Inside a transformation (jit, vmap, grad) the values of a failed solve are NaN; outside they are what was reached,
    and `require_ok` raises.
    """

    pretraining: Pretraining
    values: dict[str, Any]
    errors: dict[str, Any]
    status: dict[str, Any]
    x: Any

    @property
    def spectrum(self) -> LearnedSpectrum:
        """Law of the learned map's eigenvalues, eta ReLU(S* + delta Z - eps) (with a task: of S_pre)."""
        return _spectrum(self.pretraining, self.values)

    def frozen(self, fine: Finetuning) -> FrozenMap:
        """The frozen map that a fine-tuning stage (of `Setting.finetuning_resolved`) is built on."""
        return frozen_at(self.pretraining, fine, self.x)

    def stderr(self, name: str) -> float:
        """Quadrature standard error of a prediction, e.g. `stderr("test_error")`."""
        return float(self.errors[name])

    @property
    def symmetry(self) -> str:
        """Phase: "replica symmetric", or "unstable" (see `Solution.pretraining_symmetry`)."""
        return symmetry_of(self.values)

    @property
    def code(self) -> Code:
        """How the solve ended."""
        return Code(int(self.status["code"]))

    @property
    def ok(self) -> bool:
        """Whether the stage was solved."""
        return bool(succeeded(self.code))

    def require_ok(self) -> None:
        """Raises `SolveError` if the solve failed."""
        if not self.ok:
            raise failure("pretraining", self.code, self.status["residual"], self.pretraining, self.values)

    def summary(self) -> dict[str, Any]:
        """Plain numbers for JSON, as `Solution.summary` has them for this stage."""
        stage = "pretraining"
        return _summary({stage: self.values}, {stage: self.errors}, {stage: self.status})


def pretrain(pretraining: Pretraining, numerics: Numerics | None = None, throw: bool = True) -> PretrainingSolution:
    """Solves pre-training alone and predicts everything about it.

    Raises `SolveError` when the solve failed, unless `throw` is False (then read `ok` and `code`). Under jit, vmap and
    grad nothing is raised: the values of a failed solve are NaN there, and so are their derivatives.
    """
    require_float64()
    problem = Problem.of_pretraining(pretraining, Numerics() if numerics is None else numerics)
    first = gathered(pretrained(Lanes(problem))._replace(solved=None))
    values, x, status = first.values, first.x, first.status
    known = all(map(is_concrete, jax.tree_util.tree_leaves((values, status))))
    if not known:
        values, x = or_nan((values, x), succeeded(status["code"]))
    solution = PretrainingSolution(pretraining, values, first.errors, status, x)
    if throw and known:
        solution.require_ok()
    return solution
