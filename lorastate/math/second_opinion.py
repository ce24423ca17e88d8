"""Fixed points by another solver: jaxopt's Anderson acceleration, with its own implicit derivative (reverse mode)."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

from jaxtyping import Array, Float

with warnings.catch_warnings():
    # jaxopt announces at import that it is no longer maintained.
    warnings.simplefilter("ignore", DeprecationWarning)
    import jaxopt


def anderson(
    step: Callable, x0: Float[Array, " n"], args: Any, tolerance: float = 1e-10, max_steps: int = 500
) -> tuple[Float[Array, " n"], Float[Array, ""]]:
    """(x, |F(x) - x|) of x = step(x, args), from x0; x is differentiable in `args`."""
    solver = jaxopt.AndersonAcceleration(
        fixed_point_fun=step, history_size=5, tol=tolerance, maxiter=max_steps, ridge=1e-9, implicit_diff=True, jit=True
    )
    x, state = solver.run(x0, args)
    return x, state.error
