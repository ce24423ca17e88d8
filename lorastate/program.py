"""Compiled programs: `jit` with the compiler's options that suit each; calls of them on several cores."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
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


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def together(f: Callable, values: Iterable[Any]) -> Iterator[Any]:
    """`f` of every value, in their order, on up to four cores: a solve on a CPU keeps one of them busy.

    The first call is made alone, since it may compile what the others share.
    """
    first, *others = values
    yield f(first)
    with ThreadPoolExecutor(min(cores(), 4)) as pool:
        calls = [pool.submit(f, value) for value in others]
        try:
            for call in calls:
                yield call.result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
