"""Compiled programs: `jit` with the compiler's options that suit each; calls of them on several cores."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import equinox as eqx
import jax
import numpy as np

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


def _strong(tree):
    """The same numbers, none of a weak type: what one program hands to the next must not depend on how it was made."""
    return jax.tree_util.tree_map(lambda a: jax.lax.convert_element_type(a, a.dtype) if eqx.is_array(a) else a, tree)


class Program:
    """`eqx.filter_jit(f)`. With `quick` compilation is faster and what is compiled slower, on a CPU."""

    def __init__(self, f: Callable, quick: bool = False):
        functools.update_wrapper(self, f)
        self._f, self._quick = functools.wraps(f)(lambda *args: _strong(f(*args))), quick
        self._jitted: dict[str, Any] = {}

    def __call__(self, *args):
        # Options belong to the outermost jit: inside another one there is none to be had.
        if not all(map(is_concrete, jax.tree_util.tree_leaves(args))):
            return self._jit("inner", {})(*args)
        backend = jax.default_backend()
        return self._jit(backend, _options(backend, self._quick))(*args)

    def shapes(self, *args) -> Any:
        """The output with NaN (or zero) in place of every number: traced, but neither compiled nor computed."""

        def blank(s):
            if not isinstance(s, jax.ShapeDtypeStruct):
                return s
            return np.full(s.shape, np.nan if np.issubdtype(s.dtype, np.floating) else 0, s.dtype)

        out = eqx.filter_eval_shape(self._f, *args)
        return jax.tree_util.tree_map(blank, out, is_leaf=lambda s: isinstance(s, jax.ShapeDtypeStruct))

    def _jit(self, name: str, options: dict):
        if name not in self._jitted:
            jit: Any = eqx.filter_jit
            self._jitted[name] = jit(self._f, compiler_options=options)
        return self._jitted[name]


class Compiling:
    """First calls of several programs at once, for the sake of their compilation, which needs one core each.

    Arguments may be NaN: every search ends at once then.
    """

    def __init__(self):
        self._pool = ThreadPoolExecutor(min(cores(), 4))
        self._calls: list[Any] = []

    def add(self, program: Callable, *args) -> None:
        self._calls.append(self._pool.submit(lambda: jax.block_until_ready(program(*args))))

    def wait(self) -> None:
        """Until all are compiled. What goes wrong here goes wrong, and is said, in the call that counts."""
        for call in self._calls:
            call.exception()
        self._pool.shutdown()


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
