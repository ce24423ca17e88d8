"""The factor b on the frozen map that the theory recommends to a practitioner."""

from __future__ import annotations

from typing import Any

from ..model.channel.recalibration import FixedScale, LeastError
from ..setting.paths import replace
from ..setting.stages import Setting
from ..solution import solution


def theory_scale(setting: Setting) -> Setting:
    """The setting with the b that the theory recommends, as a practitioner would take it, for its recalibration.

    The b of least Delta_eff needs pre-training alone, that of least E' all of the theory.
    """
    fine = setting.finetuning_resolved
    if isinstance(fine.recalibration, FixedScale):
        return setting
    if isinstance(fine.recalibration, LeastError):
        b: Any = solution.predict(setting).finetuning["recalibration"]
    else:
        b = fine.scale(solution.pretrain(setting.pretraining, setting.numerics).frozen(fine))
    return replace(setting, "finetuning.recalibration", float(b))
