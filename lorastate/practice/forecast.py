"""Expected E' of a LoRA on a layer of which only the moments of labels and frozen map are known.

Fine-tuning on fresh or selected inputs sees pre-training through L = Q0 + delta'/2, M and Q alone. Any world with the
same three has the same E'. The one taken here: the base map is that part of the frozen map that agrees with the labels,
of size R = M^2/Q, pre-training has learned it perfectly, all else in the labels is noise, delta' = 2 (L - R), and the
factor b Q/M gives the frozen map its size. The theory's update has strength one: of another, s, all pre-activations are
divided by it, and beta s, lam' s (identity: lam'/s, E' s^2) give the same outputs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from ..errors import Code, SettingError, SolveError
from ..model.activation import Activation, Softmax
from ..setting.numerics import Numerics
from ..setting.stages import Finetuning, Pretraining, Setting
from ..solution.solution import Solution, predict
from .labels import Measured, Moments

#: Pre-training that recovers a map of size one to 1e-7: much data, hardly any noise and ridge.
_ALPHA, _NOISE, _RIDGE = 1e4, 1e-6, 1e-3
#: Resamples of the examples that are carried through the theory.
DRAWS = 24


class Lora(NamedTuple):
    """A LoRA: `examples` N' for D = `dimension`, `ridge` lam' on w in the sum of losses, ranks of w and its teacher."""

    dimension: int
    examples: int
    ridge: float
    rank: int
    teacher_rank: int


class Forecast(NamedTuple):
    """E' of one way to fine-tune: its `name`, factor `b`, kind of `inputs`; standard errors from the `sampling` of the
    examples and from the `quadrature` of the theory; E' at w = 0 (`frozen`); overlap o_w; phase."""

    name: str
    b: float
    inputs: str
    test_error: float
    sampling: float
    quadrature: float
    frozen: float
    overlap: float
    symmetry: str

    @property
    def stderr(self) -> float:
        """Standard error of E', of both kinds together."""
        return math.hypot(self.sampling, self.quadrature)


def equivalent(
    moments: Moments, lora: Lora, activation: Activation, tokens: int, inputs: dict[str, Any], b: Any,
    numerics: Numerics,
) -> Setting:  # fmt: skip
    """The setting whose fine-tuning has these moments; `b` a number, or "error" for the best one (then in units of
    M/Q). Raises `SettingError` where the frozen map does not go with the labels, or they show no update."""
    s = moments.strength
    if not s > 0:
        raise SettingError(
            "the examples do not show the update that their labels ask for: what one half says of it, the other does "
            "not; allowed: more examples, or give update_size"
        )
    if not moments.overlap > 0:
        raise SettingError(
            f"the frozen map does not go with the labels (M = {moments.overlap:.3g}); allowed: M > 0, a map that has "
            "learned something of them"
        )
    R = moments.overlap * moments.best_scale / s**2
    noise = 2 * (moments.label_size / s**2 - R)
    scale = b if isinstance(b, str) else b / moments.best_scale
    soft = isinstance(activation, Softmax)
    own: Activation = Softmax(activation.beta * s) if isinstance(activation, Softmax) else activation
    law = {"law": "atoms", "weights": [1.0], "values": [math.sqrt(R)]}
    return Setting(
        Pretraining(_ALPHA, _RIDGE * math.sqrt(R), delta=_NOISE * R, activation="identity", tokens=tokens, base=law),
        Finetuning(
            None if "rho" in inputs else lora.examples / lora.dimension, lora.ridge * s if soft else lora.ridge / s,
            delta=max(noise, 0.0), activation=own, tokens=tokens, recalibration=scale, rank=lora.rank,
            teacher_rank=lora.teacher_rank, **inputs,
        ),
        numerics,
    )  # fmt: skip


def forecast(
    name: str, measured: Measured, lora: Lora, activation: Activation, tokens: int, inputs: dict[str, Any],
    b: float | str, numerics: Numerics, draws: int = DRAWS,
) -> Forecast:  # fmt: skip
    """E' with its error. `b` "noise" is M/Q and "error" the b of least E', both of the examples at hand: what is then
    carried through the resamples is the number, as whoever applies it has but that.

    Raises `SolveError` where the theory has no solution at the moments themselves; a resample without one is left out,
    unless more than a quarter are.
    """
    moments = measured.moments

    def solve(m: Moments, b: float | str) -> Solution:
        found = predict(equivalent(m, lora, activation, tokens, inputs, b, numerics))
        M, Q = (float(found.pretraining[k]) for k in "MQ")
        if not (abs(M / Q - 1) < 1e-3 and abs(Q - float(found.setting.pretraining.Q0)) < 1e-3 * Q):
            raise SolveError("pretraining", Code.stalled, "the equivalent map was not recovered")
        return found

    factor = moments.best_scale if b == "noise" else b
    centre = solve(moments, factor)
    if isinstance(factor, str):
        factor = float(centre.finetuning["recalibration"]) * moments.best_scale
    # Outputs of the identity are in units of the strength.
    unit = 1.0 if isinstance(activation, Softmax) else moments.strength**2
    values = [_resampled(solve, m, factor, activation) for m in _some(measured.resampled, draws)]
    good = [v for v in values if v is not None]
    if len(good) < 0.75 * len(values):
        raise SolveError("finetuning", Code.stalled, f"{len(values) - len(good)} of {len(values)} resamples failed")
    return Forecast(
        name, float(factor), str(inputs["inputs"]), unit * float(centre.test_error), float(np.std(good, ddof=1)),
        unit * centre.stderr("finetuning", "test_error"), unit * float(centre.finetuning["test_error_frozen"]),
        float(centre.overlap), centre.symmetry,
    )  # fmt: skip


def _resampled(solve, moments: Moments, b: float, activation: Activation) -> float | None:
    try:
        value = float(solve(moments, b).test_error)
    except (SettingError, SolveError):
        return None
    return value if isinstance(activation, Softmax) else value * moments.strength**2


def _some(resampled: Sequence[Moments], many: int) -> Sequence[Moments]:
    return resampled[: max(2, many)]
