"""Numerics: how the theory is evaluated, validated."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import equinox as eqx

from ..errors import SettingError
from ..validation import whole

#: What may be assumed of the minima of fine-tuning (see `Numerics`).
SYMMETRIES = ("auto", "rs", "1rsb")
#: Nodes of a replica that thinning leaves at least: their weights meet half a dozen conditions.
_LEAST = 128


class Numerics(eqx.Module):
    """How the theory is evaluated (static).

    `nodes`: quadrature nodes of pre-training, split over `replicas` independent scrambles (a power of two each), whose
    spread is the error bar: it is known to 1 / sqrt(2 replicas - 2) of itself, and large replicas have small errors;
    `finetuning_nodes`: the same for fine-tuning (default 4 x `nodes`); `seed` of the scrambles; `tolerance` on the true
    residual; `max_steps` of the fixed-point solver. `symmetry` of fine-tuning: "auto" (replica symmetric where that is
    stable, one step of breaking elsewhere), "rs" or "1rsb" throughout; with one step a quarter of the nodes has
    `samples` each inside (a power of two), and weights that suit all (see `lorastate.evolution.control`).

    `thinning`, a power of two: inner problems are solved at one node in so many only; at all of them two Gauss-Newton
    steps stand for the solution, as a control variate (see `lorastate.evolution.control`). Error bars hardly grow, and
    large node sets take a fraction of the time. Test errors are averages over all nodes, and so is what a glass needs.
    """

    nodes: int = eqx.field(static=True, default=16384)
    finetuning_nodes: int = eqx.field(static=True, default=65536)
    replicas: int = eqx.field(static=True, default=8)
    seed: int = eqx.field(static=True, default=0)
    tolerance: float = eqx.field(static=True, default=1e-10)
    max_steps: int = eqx.field(static=True, default=200)
    samples: int = eqx.field(static=True, default=16)
    symmetry: str = eqx.field(static=True, default="auto")
    thinning: int = eqx.field(static=True, default=1)

    def __init__(
        self, nodes=16384, finetuning_nodes=None, replicas=8, seed=0, tolerance=1e-10, max_steps=200, samples=16,
        symmetry="auto", thinning=1,
    ):  # fmt: skip
        self.nodes = whole("numerics.nodes", nodes, 256, 2**22)
        finetuning_nodes = 4 * nodes if finetuning_nodes is None else finetuning_nodes
        self.finetuning_nodes = whole("numerics.finetuning_nodes", finetuning_nodes, 256, 2**22)
        self.replicas = whole("numerics.replicas", replicas, 2, 64)
        self.seed = whole("numerics.seed", seed, 0, 2**31 - 1)
        if isinstance(tolerance, bool) or not isinstance(tolerance, int | float):
            raise SettingError(f"numerics.tolerance = {tolerance!r} is not a number; allowed: 1e-13 to 1e-3")
        if not 1e-13 <= tolerance <= 1e-3:
            raise SettingError(f"numerics.tolerance = {tolerance!r} is out of range; allowed: 1e-13 to 1e-3")
        self.tolerance = float(tolerance)
        self.max_steps = whole("numerics.max_steps", max_steps, 1, 10**6)
        self.samples = whole("numerics.samples", samples, 4, 1024)
        if self.samples & (self.samples - 1):
            raise SettingError(f"numerics.samples = {samples} is out of range; allowed: a power of two, 4 to 1024")
        if symmetry not in SYMMETRIES:
            allowed = ", ".join(f'"{name}"' for name in SYMMETRIES)
            raise SettingError(f"numerics.symmetry = {symmetry!r} is unknown; allowed: {allowed}")
        self.symmetry = symmetry
        self.thinning = whole("numerics.thinning", thinning, 1, 64)
        if self.thinning & (self.thinning - 1):
            raise SettingError(f"numerics.thinning = {thinning} is out of range; allowed: a power of two, 1 to 64")
        for name in ("nodes", "finetuning_nodes"):
            per = getattr(self, name) / self.replicas
            if per < 32 or math.log2(per) % 1:
                raise SettingError(
                    f"numerics.{name} = {getattr(self, name)} is out of range; allowed: numerics.replicas "
                    f"(= {self.replicas}) times a power of two >= 32"
                )
            if self.thinning > 1 and per < _LEAST * self.thinning:
                raise SettingError(
                    f"numerics.thinning = {thinning} leaves {per / self.thinning:g} of the {per:g} nodes of a replica "
                    f"(numerics.{name} / replicas); allowed: as many as leave {_LEAST}"
                )

    @property
    def without_seed(self) -> Numerics:
        """The same with seed 0: once the nodes are drawn, the seed must not cause another compilation."""
        return self.changed(seed=0)

    def changed(self, **fields: Any) -> Numerics:
        """The same with some fields changed."""
        given: dict[str, Any] = {name: getattr(self, name) for name in NAMES} | fields
        return Numerics(**given)


#: Names of the fields.
NAMES = tuple(field.name for field in dataclasses.fields(Numerics))
