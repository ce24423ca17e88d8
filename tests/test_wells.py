"""The inner minimiser of fine-tuning is the global one, also among many wells."""

import jax
import jax.numpy as jnp
import numpy as np

import lorastate as ls
from lorastate import finetuning as ft
from lorastate import prox, solution, theory, wells
from lorastate.channel import FrozenMap
from lorastate.fixed_point import CHECK
from lorastate.order import from_norm
from lorastate.quadrature import gaussian_nodes


def test_a_thorough_search_finds_the_global_minimum():
    # Noisy labels and a weak ridge: a tenth of the nodes have several wells.
    setting = ls.Setting(ls.Pretraining(alpha=0.1, lam=0.003, delta=2.0), ls.Finetuning(alpha=3.0, lam=0.05))
    fine = setting.finetuning_resolved
    frozen, order = FrozenMap(1.6, 2.6, 2.0), from_norm(*map(jnp.asarray, (1.4, 1.0, 1.4)), 1.0)
    nodes = gaussian_nodes(ft.node_dimension(fine), 1024, 2, 0, (3, 6))
    one = jax.tree_util.tree_map(lambda a: a[0], nodes)
    draws = ft.draws(fine, frozen, one)
    problem, law = ft.inner_problem(fine, order, draws), ft.student_law(order, draws)
    rest = problem._replace(omega=jnp.zeros_like(problem.omega))
    nothing = jax.tree_util.tree_map(lambda a: a[0], wells.nothing(1, 3, 512))
    locate = jax.jit(wells.locate)
    thorough, usual = (locate(rest, law, nothing._replace(needed=jnp.array(n)), CHECK) for n in (True, False))

    descend = jax.jit(lambda u: prox.locate(problem, u)[1])
    starts = 2 * jax.random.normal(jax.random.key(1), (40, 3, 512))
    best = np.min([descend(u) for u in starts], 0)

    def missed(inner):
        assert np.all(inner.ok[0])
        return np.mean(problem.terms(inner.chi[0])[0] > best + 1e-6)

    assert missed(thorough) < 0.005
    assert missed(usual) > 0.02  # else this setting tests nothing
    assert bool(thorough.needed)
    # Both wells of a node with two are known, and they are distinct.
    two = np.asarray(thorough.two_wells[0])
    gap = np.max(np.abs(thorough.chi[0] - thorough.other[0]), 0)
    assert 0.05 < two.mean() < 0.5 and np.all(gap[two] > 1e-4)


# ---- searches for smooth nodes ---------------------------------------------------------------------------------


def both_searches(fine_alpha, fine_lam):
    """The solution with and without split nodes of one setting; the same programs as `test_sweeps` needs."""
    pre = ls.Pretraining(alpha=0.2, lam=0.1, activation="identity", tokens=2)
    setting = ls.Setting(pre, ls.Finetuning(alpha=fine_alpha, lam=fine_lam), ls.Numerics(512, 1024, 2))
    fine, numerics = setting.finetuning_resolved, setting.numerics.without_seed
    nodes = theory.node_sets(pre, fine, setting.numerics)
    first, chosen = solution.solve(pre, fine, setting.numerics, nodes)
    search = solution.by_work(solution._solve_finetuning, numerics.finetuning_nodes)
    return chosen, *(search(pre, fine, first, numerics, nodes.finetuning, split) for split in (False, True))


def test_a_search_for_smooth_nodes_finds_what_the_other_finds():
    chosen, smooth, split = both_searches(6.0, 1.0)
    assert not smooth.rough and not split.rough
    assert isinstance(chosen.solved.inner, wells.Smooth) and isinstance(split.solved.inner, wells.Inner)
    np.testing.assert_allclose(smooth.solved.point.x, split.solved.point.x, rtol=1e-9)
    np.testing.assert_allclose(smooth.branches.free_energy, split.branches.free_energy, rtol=1e-9)
    np.testing.assert_allclose(smooth.solved.inner.chi[:, 0], split.solved.inner.chi[:, 0], atol=1e-8)
    assert not np.any(split.solved.inner.split)


def test_a_search_for_smooth_nodes_gives_up_where_there_are_wells():
    chosen, smooth, split = both_searches(0.5, 0.6)
    assert smooth.rough and not split.rough
    assert isinstance(chosen.solved.inner, wells.Inner) and np.any(split.solved.inner.split)
    np.testing.assert_array_equal(chosen.solved.point.x, split.solved.point.x)
