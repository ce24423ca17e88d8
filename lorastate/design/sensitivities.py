"""How an objective reacts around a setting: elasticities of every field, curvatures over some."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from ..errors import Code, SolveError, require_float64
from ..setting.paths import get
from ..setting.stages import Setting
from ..solution.gradients import check_objective
from ..solution.solution import predict
from .descent import Landscape, check_over


class Sensitivities(NamedTuple):
    """How the objective reacts around a setting.

    `elasticities`: d log|objective| / d log(field) of every continuous field (d log / d field where the field is 0).
    `hessian` (n, n): second derivatives of the objective in the coordinates of the descent, log(field) or the logit of
    a share, of the fields `over`; `curvatures` its eigenvalues, ascending, and `directions` (n, n) its eigenvectors in
    columns: a flat direction is a combination of inputs that does not matter.
    """

    over: tuple[str, ...]
    elasticities: dict[str, float]
    hessian: np.ndarray
    curvatures: np.ndarray
    directions: np.ndarray

    def summary(self) -> dict[str, Any]:
        """Plain numbers for JSON."""
        return {
            "elasticities": self.elasticities,
            "over": list(self.over),
            "hessian": self.hessian.tolist(),
            "curvatures": self.curvatures.tolist(),
        }


def sensitivities(
    setting: Setting, over: Sequence[str] = ("pretraining.lam", "finetuning.lam"), of: str = "test_error"
) -> Sensitivities:
    """Elasticities of an objective and its Hessian: central differences (steps of 0.01) of exact gradients.

    2 n + 1 solves for n fields. Raises `SolveError` where one of them fails.
    """
    require_float64()
    objective, over = check_objective(of), check_over(setting, over)
    with tqdm(disable=True) as bar:
        landscape = Landscape(setting, over, objective, bar)
        center = landscape.at(landscape.start)
        h, steps = 0.01, np.eye(len(over))
        pairs = [(landscape.at(center.u + h * e), landscape.at(center.u - h * e)) for e in steps]
    if not all(trial.good for trial in (center, *(t for pair in pairs for t in pair))):
        predict(setting)
        raise SolveError("sensitivities", Code.nonfinite, f"objective {of}")
    hessian = np.array([(up.slope - down.slope) / (2 * h) for up, down in pairs]).reshape(len(over), len(over))
    hessian = (hessian + hessian.T) / 2
    curvatures, directions = np.linalg.eigh(hessian) if over else (np.zeros(0), np.zeros((0, 0)))
    elasticities = {}
    for path, slope in center.slopes.items():
        x = float(get(setting, path))
        elasticities[path] = slope * (x if x != 0 else 1.0) / center.value
    return Sensitivities(over, elasticities, hessian, curvatures, directions)
