"""Compiled programs: what one hands to the next, compiling several at once."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lorastate.program import Compiling, Program


def test_every_program_is_compiled_once():
    """Traced for the shapes, compiled with blanks in a thread, then called with another program's (weak) output."""
    traces = []

    def count(n):
        traces.append("count")
        weak = jax.lax.fori_loop(0, 3, lambda k, x: x + 1, 0.0)
        return {"x": weak, "n": jnp.sum(n), "k": jnp.array(2), "kind": "a"}

    def double(found):
        traces.append("double")
        return 2 * found["x"] * found["k"]

    first, second, n = Program(count), Program(double, quick=True), np.ones(4)
    assert jax.jit(lambda: jax.lax.fori_loop(0, 3, lambda k, x: x + 1, 0.0))().weak_type
    blank = first.shapes(n)
    assert np.isnan(blank["x"]) and np.isnan(blank["n"]) and blank["k"] == 0 and blank["kind"] == "a"
    work = Compiling()
    work.add(first, n)
    work.add(second, blank)
    work.wait()
    found = first(n)
    assert not found["x"].weak_type
    assert float(second(found)) == 12.0
    assert sorted(traces) == ["count", "count", "double"]


def test_what_fails_to_compile_fails_in_the_call_that_counts():
    def bad(x):
        raise ValueError("no such thing")

    work, program = Compiling(), Program(bad)
    work.add(program, np.ones(2))
    work.wait()
    with pytest.raises(ValueError, match="no such thing"):
        program(np.ones(2))
