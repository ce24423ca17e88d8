"""The theory needs double precision; the library itself never switches it on at import."""

import jax

jax.config.update("jax_enable_x64", True)
