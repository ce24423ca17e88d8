"""Compiled programs: `jit` with the compiler's options that suit each."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax

from .errors import is_concrete

#: On a CPU, less optimisation compiles a fifth faster and runs as fast; without fusion emitters compilation takes half
#: of its time and memory, and what is compiled runs slower by a third.
_USUAL = {"xla_backend_optimization_level": 1}
_QUICK = {**_USUAL, "xla_cpu_use_fusion_emitters": False}


@functools.cache
def _options(backend: str, quick: bool) -> dict:
    """The options, if this version of the compiler has them."""
    options = _QUICK if quick else _USUAL
    if backend != "cpu":
        return {}
    try:
        jax.jit(lambda x: x + 1, compiler_options=options).lower(0.0).compile()
    except jax.errors.JaxRuntimeError:
        return {}
    return options


class Program:
    """`eqx.filter_jit(f)`. With `quick` compilation is faster and what is compiled slower, on a CPU."""

    def __init__(self, f: Callable, quick: bool = False):
        functools.update_wrapper(self, f)
        self._f, self._quick = f, quick
        self._jitted: dict[str, Any] = {}

    def __call__(self, *args):
        # Options belong to the outermost jit: inside another one there is none to be had.
        if not all(map(is_concrete, jax.tree_util.tree_leaves(args))):
            return self._jit("inner", {})(*args)
        backend = jax.default_backend()
        return self._jit(backend, _options(backend, self._quick))(*args)

    def _jit(self, name: str, options: dict):
        if name not in self._jitted:
            jit: Any = eqx.filter_jit
            self._jitted[name] = jit(self._f, compiler_options=options)
        return self._jitted[name]
