"""Compiled programs: `jit` with the compiler's options that suit what is compiled once and run a few times."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax

#: On a CPU these halve compile time and memory, and slow what is compiled by a third.
_QUICK = {"xla_cpu_use_fusion_emitters": False}


@functools.cache
def _known(options: tuple) -> dict:
    """The options, if this version of the compiler has them."""
    try:
        jax.jit(lambda x: x + 1, compiler_options=dict(options)).lower(0.0).compile()
    except jax.errors.JaxRuntimeError:
        return {}
    return dict(options)


def program(f: Callable, quick: bool = False) -> Callable:
    """`eqx.filter_jit(f)`. With `quick` compilation is faster and what is compiled slower, on a CPU."""
    if not quick:
        return eqx.filter_jit(f)

    @functools.cache
    def compiled(backend: str):
        options = _known(tuple(_QUICK.items())) if backend == "cpu" else {}
        jit: Any = eqx.filter_jit
        return jit(f, compiler_options=options)

    @functools.wraps(f)
    def run(*args, **kwargs):
        return compiled(jax.default_backend())(*args, **kwargs)

    return run
