"""Settings: the physical inputs of both stages, validated, as pytrees whose continuous fields are leaves."""

from __future__ import annotations

import warnings
from typing import Any

import equinox as eqx

from ..errors import SettingError, is_concrete, require_float64
from ..model.activation import Activation, Softmax
from ..model.channel.fields import Moments
from ..model.channel.inputs import Fresh, Inputs
from ..model.channel.recalibration import FixedScale, Recalibration
from ..model.spectra.laws import BaseLaw, Wishart
from ..model.task import Task
from ..validation import real, whole
from .named import as_activation, as_base, as_inputs, as_recalibration, as_task
from .numerics import Numerics

_WHY_LAM = (
    "lam > 0; zero is not allowed because below the interpolation threshold the response V grows without bound "
    "as lam -> 0 (take a small positive value instead)"
)


class Pretraining(eqx.Module):
    """Pre-training of the attention layer, S = W W^T / sqrt(P D) with L(W) of arXiv:2606.05899.

    `alpha` = N / D^2 (samples), `kappa0` = P0 / D (teacher rank), `kappa` = P / D (student width), `delta` = variance
    of the label noise, `lam` = ridge on W. `activation` is "softmax" (with `beta`), "identity", an `Activation` or
    a callable; `tokens` T is static. `task` is another base map to pre-train on than the one that fine-tuning needs (a
    `Task`, or a mapping of its fields). `base` is the law of the eigenvalues of S* where that is not Wishart: a
    `lorastate.model.spectra.laws.BaseLaw`, or a mapping {"law": "atoms", "weights", "values"} or {"law": "power_law",
    "exponent", "low", "high"}; kappa0 then plays no part. Raises `SettingError` on anything out of range.
    """

    alpha: Any
    lam: Any
    kappa0: Any = 1.0
    kappa: Any = 1.0
    delta: Any = 0.5
    activation: Any = "softmax"
    tokens: int = eqx.field(static=True, default=3)
    task: Task | None = None
    base: BaseLaw | None = None

    def __init__(
        self, alpha, lam, kappa0=None, kappa=1.0, delta=0.5, activation: Any = "softmax", tokens=3, beta=None,
        task=None, base=None,
    ):  # fmt: skip
        require_float64()
        self.alpha = real("pretraining.alpha", alpha, "alpha > 0", 0.0)
        self.lam = real("pretraining.lam", lam, _WHY_LAM, 0.0)
        self.base = as_base(base)
        if self.base is not None and kappa0 is not None:
            raise SettingError(
                f"pretraining.kappa0 = {kappa0!r} has no meaning beside pretraining.base; allowed: one of them"
            )
        self.kappa0 = real("pretraining.kappa0", 1.0 if kappa0 is None else kappa0, "kappa0 > 0", 0.0)
        self.kappa = real("pretraining.kappa", kappa, "kappa > 0", 0.0)
        self.delta = real("pretraining.delta", delta, "delta >= 0", 0.0, closed=True)
        self.activation = as_activation("pretraining", activation, beta)
        self.tokens = whole("pretraining.tokens", tokens, 2, 8)
        self.task = as_task(task)

    @property
    def downstream_law(self) -> BaseLaw:
        """Law of S*, the base map that the labels of fine-tuning are made of."""
        return Wishart(self.kappa0) if self.base is None else self.base

    @property
    def law(self) -> BaseLaw:
        """Law of the base map that pre-training learns: S*, or S_pre = a S* + c S_perp with a `task`."""
        return self.downstream_law if self.task is None else self.task.law(self.downstream_law)

    @property
    def Q0(self):
        """Tr(S^2)/D of the base map that pre-training learns; without a task 1 + kappa0."""
        return self.law.second_moment

    @property
    def downstream_Q0(self):
        """Tr(S*^2)/D, the size of the base map that fine-tuning needs: 1 + kappa0 unless it has another law."""
        return self.downstream_law.second_moment

    @property
    def common(self):
        """Tr(S* S_pre)/D; without a task Tr(S*^2)/D."""
        return self.downstream_Q0 if self.task is None else self.task.common(self.downstream_law)

    @property
    def label_size(self):
        """Q0 + delta/2: entry variance of the noisy label pre-activation Y, in units of (1 + delta_ab)."""
        return self.Q0 + self.delta / 2


#: Largest rank of a LoRA update and of its teacher: the inner problem has r T unknowns.
MAX_RANK = 4


class SettingWarning(UserWarning):
    """A setting that is accepted, with something in it replaced."""


class Finetuning(eqx.Module):
    """LoRA update w w^T of rank r on the frozen map, with labels from a teacher w* w*^T of rank r*.

    `rank` r and `teacher_rank` r* (static, 1 to 4) are independent: w in R^{D x r}, w* in R^{D x r*} with entries
    N(0, 1), so that the teacher's update has r* directions of the same size whatever r* is.

    `alpha` = N' / D (samples: a sample ratio, not LoRA's `lora_alpha`), `lam` = ridge on w, `delta` = variance of the
    label noise. `delta`, `activation` and `tokens` left at None follow the pre-training ones
    (`Setting.finetuning_resolved`), and so does the beta of a softmax that is given by name alone.

    `inputs` = where the fine-tuning inputs come from: an `Inputs` object, or its name with its options beside it:
    "fresh"; "reused" (`label_noise` "same" or "fresh"); "mixed" (`reused_fraction`, `label_noise`); "selected" (`rho`,
    `pool`, `score` "frobenius" or "without_shift"; alpha is then rho pool); "bayes_optimal". `recalibration` = the
    factor b on the frozen map, or "noise" (the b that minimises Delta_eff) or "error" (the b that minimises E').
    `adapter_factor` = the factor c on w w^T once it is trained: training knows nothing of it, test errors do. (A factor
    s in training is none of this model's fields, because it is a ridge: of lam / s, and w of sqrt(s) w.)
    """

    alpha: Any
    lam: Any
    delta: Any = None
    activation: Any = None
    tokens: Any = eqx.field(static=True, default=None)
    inputs: Inputs = Fresh()
    recalibration: Recalibration = FixedScale(1.0)
    adapter_factor: Any = 1.0
    rank: int = eqx.field(static=True, default=1)
    teacher_rank: int = eqx.field(static=True, default=1)

    def __init__(
        self, alpha=None, lam=None, delta=None, activation=None, tokens=None, inputs: Any = "fresh", beta=None,
        recalibration: Any = 1.0, rank: Any = 1, teacher_rank: Any = 1, adapter_factor: Any = 1.0, **options,
    ):  # fmt: skip
        require_float64()
        self.inputs = as_inputs(inputs, options)
        follows = getattr(self.inputs, "alpha", None)
        if follows is not None:
            if alpha is not None and _differ(alpha, follows):
                warnings.warn(
                    f"finetuning.alpha = {float(alpha):g} is replaced by rho * pool = {float(follows):g}, "
                    "which it is on selected inputs",
                    SettingWarning,
                    stacklevel=2,
                )
            alpha = follows
        self.alpha = real("finetuning.alpha", alpha, "alpha > 0", 0.0)
        self.lam = real("finetuning.lam", lam, _WHY_LAM.split(";")[0] + "; zero is not allowed because "
                        "the response v = 1/(l' + 2 lam') then has no bound", 0.0)  # fmt: skip
        self.delta = None if delta is None else real("finetuning.delta", delta, "delta >= 0", 0.0, closed=True)
        if activation is None and beta is not None:
            raise SettingError(f"finetuning.beta = {beta!r} needs an activation; allowed: with softmax only")
        self.activation = None if activation is None else as_activation("finetuning", activation, beta, unsaid=None)
        self.tokens = None if tokens is None else whole("finetuning.tokens", tokens, 2, 8)
        self.recalibration = as_recalibration(recalibration)
        where = "finetuning.adapter_factor"
        self.adapter_factor = real(where, adapter_factor, "adapter_factor >= 0", 0.0, closed=True)
        self.rank = whole("finetuning.rank", rank, 1, MAX_RANK)
        self.teacher_rank = whole("finetuning.teacher_rank", teacher_rank, 1, MAX_RANK)

    @property
    def follows_beta(self) -> bool:
        """Whether the beta of a softmax is that of pre-training."""
        return self.activation is None or (isinstance(self.activation, Softmax) and self.activation.beta is None)

    def require(self, *names: str) -> None:
        """Raises `SettingError` if one of these fields follows pre-training, of which a stage alone knows nothing."""
        for name in names:
            if getattr(self, name) is None:
                raise SettingError(
                    f"finetuning.{name} = None follows pre-training, which is not known here; allowed: a value, or the "
                    "stage that setting.finetuning_resolved gives"
                )

    def moments(self, frozen) -> Moments:
        """Second moments of (Y0, Z_W) on the fine-tuning inputs, before recalibration.

        Raises `SettingError` as `require` does.
        """
        self.require("delta", "activation", "tokens")
        return self.inputs.moments(frozen, self.delta, self.tokens, self.activation.forgets_shift)

    def scale(self, frozen):
        """b, the factor on the frozen map."""
        return self.recalibration.factor(self.moments(frozen))

    def effective_noise(self, frozen):
        """Delta_eff, the variance of Y0 - b Z_W on the fine-tuning inputs."""
        return self.moments(frozen).effective_noise(self.scale(frozen))


def _differ(given, follows) -> bool:
    try:
        known = is_concrete(given) and is_concrete(follows)
        return known and abs(float(given) - float(follows)) > 1e-9 * abs(float(follows))
    except (TypeError, ValueError):
        return False


class Setting(eqx.Module):
    """Everything that one prediction needs: both stages and the numerics."""

    pretraining: Pretraining
    finetuning: Finetuning
    numerics: Numerics = Numerics()

    @property
    def finetuning_activation(self) -> Activation:
        """The activation of fine-tuning, with what it takes over from pre-training."""
        first, own = self.pretraining.activation, self.finetuning.activation
        if own is not None and not self.finetuning.follows_beta:
            return own
        return first if own is None or isinstance(first, Softmax) else Softmax()

    @property
    def finetuning_resolved(self) -> Finetuning:
        """The fine-tuning stage with `delta`, `activation` and `tokens` filled in from pre-training."""
        pre, fine = self.pretraining, self.finetuning
        resolved = Finetuning(
            fine.alpha,
            fine.lam,
            delta=pre.delta if fine.delta is None else fine.delta,
            activation=self.finetuning_activation,
            tokens=pre.tokens if fine.tokens is None else fine.tokens,
            inputs=fine.inputs.after(pre),
            recalibration=fine.recalibration,
            adapter_factor=fine.adapter_factor,
            rank=fine.rank,
            teacher_rank=fine.teacher_rank,
        )
        resolved.inputs.check(pre, resolved)
        return resolved
