"""A channel of one's own: fine-tuning labels whose base part is flipped, Y0 -> -Y0, with probability f.

    python examples/flipped_labels.py

All that a channel needs: how standard normal nodes become (Y0, Z_W), its second moments, and, to train the whole model
on it, how a batch is drawn. Nothing else in lorastate knows of it. See docs/add_a_channel.md.
"""

from typing import Any

import jax
import jax.numpy as jnp

jax.config.update("jax_enable_x64", True)

import lorastate as ls  # noqa: E402
from lorastate.model.channel.fields import Fields, Moments  # noqa: E402
from lorastate.simulation.samples import Batch  # noqa: E402
from lorastate.simulation.worlds import BATCHES  # noqa: E402


class Flipped(ls.Fresh):
    """Fresh inputs; with probability `f` the label of the base map has the wrong sign."""

    f: Any

    @property
    def shares(self):
        return 1 - self.f, self.f

    def fields(self, frozen, delta, tokens, drop_shift, normal, found=None):
        right = super().fields(frozen, delta, tokens, drop_shift, normal)
        y0 = jnp.concatenate([right.y0, -right.y0], -1)  # the nodes once for each part
        return Fields(y0, jnp.concatenate([right.zw, right.zw], -1))

    def moments(self, frozen, delta, tokens, drop_shift):
        fresh = super().moments(frozen, delta, tokens, drop_shift)
        return Moments(fresh.yy, (1 - 2 * self.f) * fresh.yz, fresh.zz)


def flipped_batch(world, fine, samples: int) -> Batch:
    """What training of the whole model draws: the first f of the labels with the wrong sign."""
    batch = BATCHES[ls.Fresh](world, fine, samples)
    sign = jnp.where(jnp.arange(samples) < float(fine.inputs.f) * samples, -1.0, 1.0)
    return Batch(batch.inputs, sign * batch.labels)


BATCHES[Flipped] = flipped_batch


def setting(f: float) -> ls.Setting:
    pre = ls.Pretraining(alpha=0.2, lam=0.1, delta=0.2, activation="identity")
    return ls.Setting(pre, ls.Finetuning(alpha=4.0, lam=0.5, inputs=Flipped(jnp.asarray(f))), ls.Numerics(2048))


def test_theory_agrees_with_training():
    """On the channel's law, where fine-tuning is trained alone; the whole model has a bias of finite D beside."""
    theory = ls.predict(setting(0.2))
    training = ls.simulate(setting(0.2), stage="finetuning", dimension=300, runs=6, starts=2, moves=0)
    gap = training.mean("deep", "overlap") - float(theory.overlap)
    assert abs(gap) < 4 * training.stderr("deep", "overlap") + 0.003


if __name__ == "__main__":
    for f in (0.0, 0.1, 0.2):
        theory, training = ls.predict(setting(f)), ls.simulate(setting(f), dimension=100, runs=4)
        print(f"f = {f}: o_w {theory.overlap:.3f}, trained {training.mean('finetuning', 'overlap'):.3f}"
              f"({training.stderr('finetuning', 'overlap'):.3f})")  # fmt: skip
