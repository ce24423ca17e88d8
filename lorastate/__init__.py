"""lorastate: differentiable high-dimensional theory of LoRA fine-tuning in a solvable attention model."""

from __future__ import annotations

import importlib
import pkgutil
from typing import Any

from ._version import __version__

# Names are imported on first use, so that the command line can answer before JAX is loaded.
_HOME = {
    "Setting": "setting", "Pretraining": "setting", "Finetuning": "setting", "Numerics": "setting",
    "SettingWarning": "setting", "Task": "task",
    "load_setting": "setting_file", "replace": "setting_file", "setting_to_dict": "setting_file",
    "setting_from_dict": "setting_file", "continuous_fields": "setting_file", "get": "setting_file",
    "BaseLaw": "base_law", "Wishart": "base_law", "Atoms": "base_law", "PowerLaw": "base_law", "FreeSum": "base_law",
    "Activation": "activation", "Softmax": "activation", "Identity": "activation", "Custom": "activation",
    "Inputs": "channel", "Fresh": "channel", "Reused": "channel", "Mixed": "channel", "Selected": "channel",
    "BayesOptimal": "channel", "FrozenMap": "channel",
    "Recalibration": "channel", "FixedScale": "channel", "LeastNoise": "channel", "LeastError": "channel",
    "LearnedSpectrum": "spectrum",
    "bayes_optimal": "bayes", "bayes_optimal_pretraining": "bayes", "bayes_optimal_finetuning": "bayes",
    "BayesPretraining": "bayes", "BayesFinetuning": "bayes", "BayesLimits": "bayes",
    "Method": "fixed_point", "FixedPoint": "fixed_point",
    "Solution": "solution", "predict": "solution", "PretrainingSolution": "solution", "pretrain": "solution",
    "explain": "report", "noise_decomposition": "report",
    "weak_recovery_threshold": "stability", "interpolation_threshold": "stability", "branches": "stability",
    "instability_threshold": "stability", "breaking_error": "second_step",
    "measure_mismatch": "mismatch", "find_mismatch": "mismatch", "Mismatch": "mismatch",
    "sweep": "sweeps", "SweepInterrupted": "sweeps", "SweepIncomplete": "sweeps",
    "gradient": "design", "optimize": "design", "Optimum": "design",
    "sensitivities": "design", "Sensitivities": "design",
    "sample_pretraining": "laws", "sample_finetuning": "laws",
    "Simulation": "simulation", "simulate": "simulation", "SimulationInterrupted": "simulation",
    "ChannelSimulation": "asymptotic",
    "SettingError": "errors", "SolveError": "errors", "Code": "errors",
}  # fmt: skip

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
