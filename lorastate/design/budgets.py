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
import math
import operator
import re
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from scipy.optimize import lsq_linear, minimize

from ..errors import SettingError
from ..setting.fields import continuous_fields
from ..setting.paths import get
from ..setting.stages import Setting

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
    """Budgets from sentences, functions of a setting, or `Budget`s; `SettingError` for one that is not readable."""
    if isinstance(given, str):
        given = (given,)
    return tuple(_budget(one, setting) for one in given)


def _budget(given: Any, setting: Setting) -> Budget:
    if isinstance(given, Budget):
        return given
    if callable(given):
        return Budget(getattr(given, "__name__", "a function"), given, False)
    if not isinstance(given, str):
        raise SettingError(f"budget {given!r} is not readable; allowed: a sentence as 'pairs = 0.6', or a function")
    tree = _parse(given)
    if not isinstance(tree, ast.Compare):
        quantity = _compiled(tree, given, setting)
        value = _known(quantity, given, setting)
        return Budget(f"{given.strip()} = {value:g}", lambda s: quantity(s) - value, True)
    if len(tree.ops) != 1 or not isinstance(tree.ops[0], ast.LtE | ast.GtE | ast.Eq):
        raise SettingError(f"budget {given!r} is not readable; allowed: one of <=, >= and = between two expressions")
    left, right = (_compiled(side, given, setting) for side in (tree.left, tree.comparators[0]))
    for side in (left, right):
        _known(side, given, setting)
    sign = -1.0 if isinstance(tree.ops[0], ast.GtE) else 1.0
    return Budget(given.strip(), lambda s: sign * (left(s) - right(s)), isinstance(tree.ops[0], ast.Eq))


def _known(quantity: Callable[[Setting], Any], text: str, setting: Setting) -> float:
    """The value of an expression at the setting, if it has one."""
    value = float(quantity(setting))
    if not math.isfinite(value):
        raise SettingError(
            f"budget {text!r} has no value at this setting ({value}); allowed: expressions that are finite there"
        )
    return value


def _parse(text: str) -> ast.expr:
    plain = _EQUALS.sub("==", text.strip())
    try:
        return ast.parse(plain, mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        raise SettingError(
            f"budget {text[:80]!r} is not readable; allowed: for example "
            "'pretraining.alpha + 0.05 * finetuning.alpha <= 0.3'"
        ) from None


def _compiled(node: ast.expr, text: str, setting: Setting) -> Callable[[Setting], Any]:
    """The value of an expression, as a function of the setting."""
    if isinstance(node, ast.Constant) and isinstance(node.value, int | float) and not isinstance(node.value, bool):
        # An array: what is divided by zero, or too large, is then no exception but not finite.
        value = jnp.asarray(node.value if abs(node.value) < 1e308 else math.inf, float)
        return lambda s: value
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
        act = _OPERATORS[type(node.op)]
        a, b = (_compiled(side, text, setting) for side in (node.left, node.right))
        return lambda s: act(a(s), b(s))
    if isinstance(node, ast.UnaryOp) and type(node.op) in _OPERATORS:
        act, a = _OPERATORS[type(node.op)], _compiled(node.operand, text, setting)
        return lambda s: act(a(s))
    if isinstance(node, ast.Call) and len(node.args) == 1 and not node.keywords:
        f = _FUNCTIONS.get(ast.unparse(node.func))
        if f is not None:
            a = _compiled(node.args[0], text, setting)
            return lambda s: f(a(s))
    if isinstance(node, ast.Name) and node.id in QUANTITIES:
        return QUANTITIES[node.id]
    if isinstance(node, ast.Attribute | ast.Name):
        path = ast.unparse(node)
        known = (*continuous_fields(setting), "pretraining.tokens", "finetuning.tokens", "finetuning.alpha")
        if path in known:
            return lambda s: jnp.asarray(get(s, path), float)
        allowed = ", ".join((*QUANTITIES, *known[:-1]))
        raise SettingError(f"budget {text!r} speaks of {path!r}, which is unknown here; allowed: {allowed}")
    raise SettingError(
        f"budget {text!r} has a part that is not arithmetic ({ast.unparse(node)[:40]!r}); allowed: numbers, fields, "
        f"+ - * / **, {', '.join(_FUNCTIONS)}"
    )


#: A move of a coordinate (a logarithm of a positive field) that is as good as infinite.
_LIMIT = 15.0


class Within:
    """Budgets as constraints on the coordinates u of a descent; `replaced(u)` is the setting at u."""

    def __init__(self, replaced: Callable[[Any], Setting], limits: tuple[Budget, ...]):
        self.limits = limits
        self.excess = jax.jit(lambda u: jnp.stack([jnp.asarray(b.excess(replaced(u)), float) for b in limits]))
        self.slopes = jax.jit(jax.jacfwd(self.excess))
        self.curves = jax.jit(jax.jacfwd(jax.jacfwd(self.excess)))
        # scipy wants inequalities that are not negative.
        self.constraints = [
            {
                "type": "eq" if b.equality else "ineq",
                "fun": lambda u, k=k, sign=1.0 if b.equality else -1.0: sign * float(self.excess(jnp.asarray(u))[k]),
                "jac": lambda u, k=k, sign=1.0 if b.equality else -1.0: (
                    sign * np.asarray(self.slopes(jnp.asarray(u))[k])
                ),
            }
            for k, b in enumerate(limits)
        ]
        self._equal = np.array([b.equality for b in limits])

    def _violations(self, u) -> np.ndarray:
        excess = np.asarray(self.excess(jnp.asarray(u)))
        return np.where(self._equal, np.abs(excess), np.maximum(excess, 0.0))

    def met(self, u) -> bool:
        """Whether every budget is kept, to rounding."""
        return bool(np.all(self._violations(u) < 1e-9))

    def nearest(self, u: np.ndarray) -> np.ndarray:
        """The point nearest to u at which every budget is kept. Raises `SettingError` where there is none."""
        if self.met(u):
            return u
        usual, first = u, int(np.argmax(self._violations(u)))
        found: Any = minimize(
            lambda v: float(np.sum((v - u) ** 2)), u, jac=lambda v: 2 * (v - u), method="SLSQP",
            constraints=self.constraints, bounds=[(x - 20, x + 20) for x in u], options={"ftol": 1e-14, "maxiter": 500},
        )  # fmt: skip
        u = found.x
        for _ in range(5):  # SLSQP keeps constraints to about 1e-7; Newton steps onto them give the remaining digits
            broken = self._violations(u) > 0
            if not np.any(broken) or not np.all(np.isfinite(u)):
                break
            excess, jac = (np.asarray(f(jnp.asarray(u)))[broken] for f in (self.excess, self.slopes))
            u = u - np.linalg.lstsq(jac, excess, rcond=None)[0]
        wrong = self._violations(u)
        if not np.all(np.isfinite(wrong)) or np.any(wrong > 1e-9):
            k = int(np.argmax(np.where(np.isfinite(wrong), wrong, np.inf)))
            raise SettingError(
                f"budget {self.limits[k].text!r} cannot be kept (it is missed by {wrong[k]:.3g} at the nearest point); "
                "allowed: budgets that some values of the descended fields satisfy together"
            )
        if np.max(np.abs(u - usual)) > _LIMIT:
            raise SettingError(
                f"budget {self.limits[first].text!r} is kept only in the limit of a descended field at the end of its "
                "range (such as 0); allowed: budgets that some values of the descended fields satisfy together"
            )
        return u

    def _multipliers(self, u, slope) -> tuple[np.ndarray, np.ndarray]:
        """(mu, slope + sum mu d excess), the least that is left; mu >= 0 for inequalities that bind, else 0."""
        excess, jac = (np.asarray(f(jnp.asarray(u))) for f in (self.excess, self.slopes))
        active = self._equal | (excess > -1e-6)
        mu = np.zeros(len(excess))
        if np.any(active):
            low = np.where(self._equal[active], -np.inf, 0.0)
            found: Any = lsq_linear(jac[active].T, -slope, (low, np.full(len(low), np.inf)), tol=1e-14)
            mu[active] = found.x
        return mu, slope + mu @ jac

    def newton_step(self, u, slope, hessian) -> np.ndarray | None:
        """Step towards d objective + sum mu d excess = 0 and excess = 0 where budgets bind; None if singular."""
        mu, _ = self._multipliers(u, slope)
        active = self._equal | (mu > 0)
        u = jnp.asarray(u)
        jac, curves = np.asarray(self.slopes(u))[active], np.asarray(self.curves(u))
        k, n = len(jac), len(u)
        matrix = np.zeros((n + k, n + k))
        matrix[:n, :n] = hessian + np.tensordot(mu, curves, 1)
        matrix[:n, n:], matrix[n:, :n] = jac.T, jac
        try:
            step = np.linalg.solve(matrix, -np.concatenate([slope, np.asarray(self.excess(u))[active]]))[:n]
        except np.linalg.LinAlgError:
            return None
        return step if np.all(np.isfinite(step)) else None

    def rest(self, u, slope) -> float:
        """Norm of the gradient that the binding budgets leave."""
        return float(np.linalg.norm(self._multipliers(u, slope)[1]))

    def report(self, u, slope) -> list[dict[str, Any]]:
        """For each budget: text, excess, whether it binds, and its price."""
        mu, _ = self._multipliers(u, slope)
        excess = np.asarray(self.excess(jnp.asarray(u)))
        return [
            {
                "budget": b.text,
                "excess": float(e),
                "binds": bool(b.equality or m > 1e-9),
                "price": float(m),
            }
            for b, e, m in zip(self.limits, excess, mu, strict=True)
        ]
