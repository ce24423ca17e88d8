"""Order parameters that several tests share."""

import jax.numpy as jnp

from lorastate.evolution.order import from_norm


def order_for(rank, teacher_rank):
    """Of rank one, or pairs where some directions are spare."""
    if rank <= teacher_rank:
        return from_norm(*map(jnp.asarray, (0.3, 0.6, 0.7)), 1.0)
    return from_norm(*map(jnp.asarray, ([0.3, 0.5], [0.6, 0.0], [0.7, 0.4])), 1.0)
