"""What can go wrong: bad input (`SettingError`) and solves that fail (`Code`, `SolveError`)."""

from __future__ import annotations

import enum

import jax.core
import jax.numpy as jnp


class SettingError(ValueError):
    """Bad input. The message is one sentence: the field, the value, the allowed range."""


class Code(enum.IntEnum):
    """Result of a fixed-point solve. Traced as an integer; `ok` and `floor` are successes (`succeeded`)."""

    ok = 0
    max_steps = 1
    diverged = 2
    nonfinite = 3
    cycle = 4
    stalled = 5
    unstable = 6
    too_narrow = 7
    upstream = 8
    floor = 9
    deep_glass = 10

    @property
    def message(self) -> str:
        return _MESSAGES[self]


_MESSAGES = {
    Code.ok: "the fixed point was found to the tolerance asked for",
    Code.max_steps: "the number of steps ran out before the residual reached the tolerance",
    Code.diverged: "the iterates grew without bound",
    Code.nonfinite: "the map returned NaN or infinity (outside its domain, e.g. a negative response v)",
    Code.cycle: "the iterates alternate between two points",
    Code.stalled: "no step reduces the residual any further, and it is above the tolerance",
    Code.unstable: "a fixed point was found, but it repels the iteration (growth rate above one)",
    Code.too_narrow: "the student is too narrow: kappa is below the rank fraction of its own solution",
    Code.floor: "the discretised map jumps across its fixed point; the residual is below the floor asked for",
    Code.deep_glass: "a glass so deep that it needs more samples than a jitted solve takes: predict it outside of jit",
    Code.upstream: "the pre-training solution that this stage needs had failed",
}


def succeeded(code):
    """Whether a (traced) code is a success."""
    return (code == Code.ok) | (code == Code.floor)


class SolveError(RuntimeError):
    """A solve that failed. Carries the `code`, and the stage and residual in its message."""

    def __init__(self, stage: str, code: Code, detail: str = ""):
        self.stage, self.code = stage, Code(code)
        super().__init__(f"{stage}: {self.code.name} ({self.code.message}){'; ' + detail if detail else ''}")


def require_float64() -> None:
    """Raises `SettingError` unless JAX computes in double precision, which these equations need."""
    if jnp.result_type(float) != jnp.float64:
        raise SettingError(
            "float64 is switched off (jax_enable_x64 = False) and these equations need it: call "
            'jax.config.update("jax_enable_x64", True), or set JAX_ENABLE_X64=1, before the first computation'
        )


def is_concrete(value) -> bool:
    """Whether a value is known now, i.e. is not a tracer of a JAX transformation."""
    return not isinstance(value, jax.core.Tracer)
