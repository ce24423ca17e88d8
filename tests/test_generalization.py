"""Test errors from one row of the attention map against all entries, and against the closed form of the identity."""

import jax
import numpy as np
import pytest

import lorastate as ls
from lorastate.evolution.order import Order
from lorastate.evolution.test_errors import finetuning_error, node_dimension, pretraining_error, row_error
from lorastate.math.quadrature import gaussian_nodes, over_replicas

LAW = (2.25, 1.33, 1.26)
LORA = Order(0.4, 0.7, 0.5)


class Whole(ls.Softmax):
    """Softmax, with all entries of Y and Z_W drawn."""

    rowwise = False


class Shifted(ls.Softmax):
    """Softmax that is not known to forget the common shift."""

    forgets_shift = False


def errors(activation, tokens, nodes=2**14, replicas=8):
    """(E' with the update, E' without, E) with their standard errors."""
    n = gaussian_nodes(node_dimension(activation, tokens), nodes, replicas, 3)

    def one(n):
        both = [finetuning_error(activation, tokens, *LAW, LORA, n, factor=c) for c in (1.0, 0.0)]
        return (*both, pretraining_error(activation, tokens, *LAW, n))

    found = np.array(jax.jit(lambda n: over_replicas(one, n))(n))
    return found.mean(1), found.std(1, ddof=1) / np.sqrt(replicas)


@pytest.mark.parametrize("tokens", [2, 3, 4])
def test_one_row_is_enough(tokens):
    want, bar = errors(Whole(1.3), tokens)
    for activation in (ls.Softmax(1.3), Shifted(1.3)):
        got, own = errors(activation, tokens)
        assert np.all(bar < 0.02 * want) and np.all(own < 0.02 * want)
        np.testing.assert_array_less(np.abs(got - want), 4 * np.hypot(bar, own))


def test_dimensions():
    assert [node_dimension(a, 3) for a in (ls.Softmax(), Shifted(), Whole(), ls.Identity())] == [6, 8, 16, 0]


def test_one_row_of_the_identity():
    tokens, n = 3, gaussian_nodes(8, 2**14, 8, 0)

    def one(n):
        x, w = n.normal, n.weight
        chi, omega = x[0], LORA.overlap * x[0] + LORA.noise * x[1]
        update = (chi**2, LORA.overlap * chi * omega, LORA.norm(1.0) * omega**2)
        return row_error(ls.Identity(), tokens, LAW, update, (chi**2, omega**2), x[2:], w)

    got = np.asarray(over_replicas(one, n))
    want = finetuning_error(ls.Identity(), tokens, *LAW, LORA, None)
    bar = got.std(ddof=1) / np.sqrt(len(got))
    assert bar < 0.01 * want
    assert got.mean() == pytest.approx(float(want), abs=4 * bar)
