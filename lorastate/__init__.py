"""lorastate: differentiable high-dimensional theory of LoRA fine-tuning in a solvable attention model."""

from __future__ import annotations

import importlib
import pkgutil
from typing import Any

from ._version import __version__

# The public names of each module. They are imported on first use, so that the command line can answer before JAX is
# loaded.
_NAMES = {
    "setting.stages": "Setting Pretraining Finetuning SettingWarning",
    "setting.numerics": "Numerics",
    "model.task": "Task",
    "setting.fields": "continuous_fields",
    "setting.paths": "get replace",
    "setting.files": "load_setting setting_to_dict setting_from_dict",
    "model.spectra.base": "BaseLaw",
    "model.spectra.laws": "Wishart Atoms PowerLaw FreeSum",
    "model.activation": "Activation Softmax Identity Custom",
    "model.channel.frozen_map": "FrozenMap",
    "model.channel.inputs": "Inputs Fresh Reused Mixed BayesOptimal",
    "model.channel.selected": "Selected",
    "model.channel.recalibration": "Recalibration FixedScale LeastNoise LeastError",
    "model.spectra.learned": "LearnedSpectrum",
    "bayes.pretraining": "bayes_optimal_pretraining BayesPretraining",
    "bayes.finetuning": "bayes_optimal_finetuning BayesFinetuning",
    "bayes.limits": "bayes_optimal BayesLimits",
    "math.fixed_point": "Method FixedPoint",
    "solution.solution": "Solution predict PretrainingSolution pretrain",
    "diagnosis.explain": "explain noise_decomposition",
    "diagnosis.thresholds": "weak_recovery_threshold interpolation_threshold branches instability_threshold",
    "diagnosis.second_step": "breaking_error",
    "diagnosis.cross_check": "cross_check",
    "design.mismatch": "measure_mismatch find_mismatch Mismatch",
    "sweeps.sweep": "sweep SweepInterrupted SweepIncomplete",
    "solution.gradients": "gradient SlopeWarning",
    "design.optimize": "optimize",
    "design.optimum": "Optimum",
    "design.sensitivities": "sensitivities Sensitivities",
    "diagnosis.preactivations": "sample_pretraining sample_finetuning",
    "practice.assess": "assess Assessment",
    "simulation.simulate": "simulate",
    "simulation.data": "Data",
    "simulation.result": "Simulation SimulationInterrupted",
    "simulation.channel_result": "ChannelSimulation",
    "verification.verify": "verify VerificationInterrupted",
    "verification.result": "Verification",
    "errors": "SettingError SolveError Code",
}
_HOME = {name: module for module, names in _NAMES.items() for name in names.split()}

__all__ = [*sorted(_HOME), "__version__"]  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        # Looked up each time: a cached name could hide a submodule.
        return getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)
    if name in _modules():
        return importlib.import_module(f".{name}", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _modules() -> list[str]:
    return [module.name for module in pkgutil.iter_modules(__path__) if not module.name.startswith("_")]


def __dir__() -> list[str]:
    return [*__all__, *_modules()]
