"""Budgets: what a design may spend, as equations and inequalities between the fields of a setting.

    "cost <= 0.4"-like sentences over dotted paths and arithmetic, for example
        pretraining.alpha + 0.05 * finetuning.alpha <= 0.3        a total price of data
        pairs = 0.6                                               labelled token pairs of pre-training per D^2
        label_power <= 2.25                                       variance of a pre-training label
    or an expression alone, which is then held at the value that it has in the initial setting.

Besides the fields there are the names

    pairs        alpha T(T+1)/2 of pre-training, labelled token pairs per D^2; `lora_pairs` those of fine-tuning, per D
    label_power  Q0 + Delta/2 of pre-training, Q0 = Tr S_pre^2/D: variance of a label in units of (1 + delta_ab)
    label_signal Q0 alone

In Python a budget may also be a function of a `Setting` that is written in JAX and must not be positive.
"""

from __future__ import annotations

import ast
import operator
import re
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax.numpy as jnp

from .errors import SettingError
from .setting import Setting
from .setting_file import continuous_fields, get

_OPERATORS: dict[type, Callable[..., Any]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
    ast.Pow: operator.pow, ast.USub: operator.neg, ast.UAdd: operator.pos,
}  # fmt: skip
_EQUALS = re.compile(r"(?<![<>=!])=(?!=)")
_FUNCTIONS = {"log": jnp.log, "exp": jnp.exp, "sqrt": jnp.sqrt}


def _pairs(setting: Setting):
    t = setting.pretraining.tokens
    return setting.pretraining.alpha * (t * (t + 1) / 2)


def _lora_pairs(setting: Setting):
    fine = setting.finetuning_resolved
    assert fine.tokens is not None
    return fine.alpha * (fine.tokens * (fine.tokens + 1) / 2)


#: Quantities that budgets are often about, by name.
QUANTITIES: dict[str, Callable[[Setting], Any]] = {
    "pairs": _pairs,
    "lora_pairs": _lora_pairs,
    "label_power": lambda setting: setting.pretraining.label_size,
    "label_signal": lambda setting: setting.pretraining.Q0,
}


class Budget(NamedTuple):
    """One constraint: `excess(setting)` is zero if `equality`, else not positive."""

    text: str
    excess: Callable[[Setting], Any]
    equality: bool


def budgets(given: Iterable[Any], setting: Setting) -> tuple[Budget, ...]:
    """Budgets from sentences, functions of a setting, or `Budget`s. Raises `SettingError` for one that is not readable."""
    if isinstance(given, str):
        given = (given,)
    return tuple(_budget(one, setting) for one in given)


def _budget(given: Any, setting: Setting) -> Budget:
    if isinstance(given, Budget):
        return given
    if callable(given):
        return Budget(getattr(given, "__name__", "a function"), given, False)
    if not isinstance(given, str):
        raise SettingError(f"budget {given!r} is not readable; allowed: a sentence such as 'pairs = 0.6', or a function")
    tree = _parse(given)
    if not isinstance(tree, ast.Compare):
        quantity = _compiled(tree, given, setting)
        value = float(quantity(setting))
        return Budget(f"{given.strip()} = {value:g}", lambda s: quantity(s) - value, True)
    if len(tree.ops) != 1 or not isinstance(tree.ops[0], ast.LtE | ast.GtE | ast.Eq):
        raise SettingError(f"budget {given!r} is not readable; allowed: one of <=, >= and = between two expressions")
    left, right = (_compiled(side, given, setting) for side in (tree.left, tree.comparators[0]))
    sign = -1.0 if isinstance(tree.ops[0], ast.GtE) else 1.0
    return Budget(given.strip(), lambda s: sign * (left(s) - right(s)), isinstance(tree.ops[0], ast.Eq))


def _parse(text: str) -> ast.expr:
    plain = _EQUALS.sub("==", text.strip())
    try:
        return ast.parse(plain, mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        raise SettingError(
            f"budget {text[:80]!r} is not readable; allowed: for example 'pretraining.alpha + 0.05 * finetuning.alpha <= 0.3'"
        ) from None


def _compiled(node: ast.expr, text: str, setting: Setting) -> Callable[[Setting], Any]:
    """The value of an expression, as a function of the setting."""
    if isinstance(node, ast.Constant) and isinstance(node.value, int | float) and not isinstance(node.value, bool):
        value = float(node.value)
        return lambda s: value
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
        act = _OPERATORS[type(node.op)]
        a, b = (_compiled(side, text, setting) for side in (node.left, node.right))
        return lambda s: act(a(s), b(s))
    if isinstance(node, ast.UnaryOp) and type(node.op) in _OPERATORS:
        act, a = _OPERATORS[type(node.op)], _compiled(node.operand, text, setting)
        return lambda s: act(a(s))
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in _FUNCTIONS and not node.keywords:
        if len(node.args) == 1:
            f, a = _FUNCTIONS[node.func.id], _compiled(node.args[0], text, setting)
            return lambda s: f(a(s))
    if isinstance(node, ast.Name) and node.id in QUANTITIES:
        return QUANTITIES[node.id]
    if isinstance(node, ast.Attribute | ast.Name):
        path = ast.unparse(node)
        known = (*continuous_fields(setting), "pretraining.tokens", "finetuning.tokens", "finetuning.alpha")
        if path in known:
            return lambda s: get(s, path)
        raise SettingError(
            f"budget {text!r} speaks of {path!r}, which is unknown here; allowed: {', '.join((*QUANTITIES, *known[:-1]))}"
        )
    raise SettingError(
        f"budget {text!r} has a part that is not arithmetic ({ast.unparse(node)[:40]!r}); allowed: numbers, fields, "
        f"+ - * / **, {', '.join(_FUNCTIONS)}"
    )
