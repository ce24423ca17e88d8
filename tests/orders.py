"""Order parameters that several tests share."""

import jax.numpy as jnp

from lorastate.evolution.order import from_norm


def order_for(rank, teacher_rank):
    """Of rank one, or pairs where some directions are spare."""
    if rank <= teacher_rank:
        return from_norm(jnp.array(0.3), jnp.array(0.6), jnp.array(0.7), 1.0)
    return from_norm(jnp.array([0.3, 0.5]), jnp.array([0.6, 0.0]), jnp.array([0.7, 0.4]), 1.0)
