"""Rules over the records of a run, as `loss > 3 * median(loss, 200)`: parsed, never evaluated as Python.

A rule is an expression over the fields of a record. Each window looks at the n steps *before* a step, `smooth`
at the n steps that end with it; so a rule at a step needs that step and `lookback` steps before it, no others.
NaNs and infinities are left out of every window, and compare false; `finite(x)` asks for them. The named rules, as that
for a collapse, are in `detectors`.
"""

import ast
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from jaxrnn.types import Series, UserError

LEAST_HISTORY = 16
"""A window with fewer finite steps in it is NaN, so that nothing is judged by two or three values."""

GAUSSIAN_MAD = 1.4826
"""Median absolute deviation -> standard deviation, for normally distributed values."""

STEP, ALL_FINITE = 'step', 'all_finite'
"""Fields every run has: the step's number; whether each number and each `finite_*` flag of its record is good."""

SKIPPED, MOST_SKIPPED = 'skipped_in_a_row', 10
"""Field of runs that have a guard: steps that it has skipped up to this one; and how many may be."""

CHUNK = 8192
"""Windows computed at once, which bounds memory: 8192 windows of 200 are 13 MB."""


def _spread(windows: np.ndarray, axis: int) -> np.ndarray:
    middle = np.nanmedian(windows, axis=axis, keepdims=True)
    return GAUSSIAN_MAD * np.nanmedian(np.abs(windows - middle), axis=axis)


WINDOWS: Mapping[str, Callable[..., np.ndarray]] = {
    'median': np.nanmedian,
    'mean': np.nanmean,
    'max': np.nanmax,
    'min': np.nanmin,
    'std': np.nanstd,
    'spread': _spread,  # standard deviation by the median absolute deviation, which outliers don't move
}
"""name(x, n): over the n steps before."""

FUNCTIONS: Mapping[str, Callable[[np.ndarray], np.ndarray]] = {
    'abs': np.abs,
    'log': np.log,
    'sqrt': np.sqrt,
    'finite': np.isfinite,
}

_COMPARISONS = {
    ast.Lt: np.less,
    ast.LtE: np.less_equal,
    ast.Gt: np.greater,
    ast.GtE: np.greater_equal,
    ast.Eq: np.equal,
    ast.NotEq: np.not_equal,
}
_ARITHMETIC = {
    ast.Add: np.add,
    ast.Sub: np.subtract,
    ast.Mult: np.multiply,
    ast.Div: np.divide,
    ast.Pow: np.power,
}
MOST_CHARACTERS, MOST_LOOKBACK = 1000, 100_000


class Rule(NamedTuple):
    """A parsed expression."""

    text: str
    fields: frozenset[str]  # that it reads from a record
    lookback: int  # steps before a step that it needs
    evaluate: Callable[[Series], np.ndarray]  # columns [S] -> [S], bool where the expression is a question


class _Node(NamedTuple):
    fields: frozenset[str]
    lookback: int
    evaluate: Callable[[Series], Any]
    boolean: bool


def parse(text: str) -> Rule:
    """Reads a rule. Raises UserError that shows what can't be read."""
    if len(text) > MOST_CHARACTERS:
        raise UserError(f'--when: {len(text)} characters found, at most {MOST_CHARACTERS} expected')
    try:
        node = _build(ast.parse(text.strip(), mode='eval').body, text)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        reason = error.msg if isinstance(error, SyntaxError) else 'too deep or malformed'
        raise UserError(
            f"--when: {text!r} can't be read ({reason}); write it as loss > 3 * median(loss, 200)"
        ) from None
    if not node.boolean:
        raise _refuse(text, text, 'is a number; a comparison is expected')
    if node.lookback > MOST_LOOKBACK:
        raise _refuse(text, text, f'looks back {node.lookback} steps; at most {MOST_LOOKBACK} are possible')
    return Rule(text.strip(), node.fields, node.lookback, node.evaluate)


def holds(rule: Rule, columns: Series) -> np.ndarray:
    """Where the rule holds, bool [S]. Raises UserError for a field that the records don't have."""
    columns = {**columns, ALL_FINITE: all_finite(columns)}
    if missing := sorted(rule.fields - columns.keys()):
        raise UserError(
            f'--when: no field {missing[0]!r} in the records; there are {", ".join(sorted(columns))}'
        )
    with np.errstate(all='ignore'):
        return np.broadcast_to(rule.evaluate(columns), columns[STEP].shape).astype(bool)


def all_finite(columns: Series) -> np.ndarray:
    """Whether each number of a step's record is finite and each of its `finite_*` flags set, bool [S]. A step that a
    guard skipped is good, too, since it changed nothing; unless it is one of many in a row."""
    good = np.logical_and.reduce(
        [
            values == 1 if name.startswith('finite_') else np.isfinite(values)
            for name, values in columns.items()
        ]
    )
    skipped = columns.get(SKIPPED, np.zeros(1))
    return good | ((skipped > 0) & (skipped <= MOST_SKIPPED))


def _build(node: ast.expr, text: str) -> _Node:
    match node:
        case ast.Constant(value=bool() | int() | float() as value):
            return _Node(frozenset(), 0, lambda columns: value, isinstance(value, bool))
        case ast.Name(id=name):
            return _Node(
                frozenset({name}), 0, lambda columns: columns[name], name.startswith(('finite_', ALL_FINITE))
            )
        case ast.BoolOp(op=op, values=values):
            parts = [_question(value, text) for value in values]
            combine = np.logical_and if isinstance(op, ast.And) else np.logical_or
            return _join(parts, lambda *args: combine.reduce(np.broadcast_arrays(*args)), boolean=True)
        case ast.UnaryOp(op=ast.Not(), operand=operand):
            return _join([_question(operand, text)], np.logical_not, boolean=True)
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return _join([_build(operand, text)], np.negative)
        case ast.BinOp(op=op, left=left, right=right) if type(op) in _ARITHMETIC:
            return _join([_build(left, text), _build(right, text)], _float(_ARITHMETIC[type(op)]))
        case ast.Compare(left=left, ops=ops, comparators=rights) if all(
            type(op) in _COMPARISONS for op in ops
        ):
            sides = [_build(side, text) for side in (left, *rights)]
            return _join(sides, lambda *args: _compare(ops, args), boolean=True)
        case ast.Call(func=ast.Name(id=name), args=[argument], keywords=[]) if name in FUNCTIONS:
            return _join([_build(argument, text)], FUNCTIONS[name], boolean=name == 'finite')
        case ast.Call(
            func=ast.Name(id=name), args=[argument, ast.Constant(value=int() as n)], keywords=[]
        ) if name in WINDOWS or name in ('smooth', 'prev'):
            return _window(name, _build(argument, text), n, text)
        case ast.Call(func=ast.Name(id=name)):
            if name in WINDOWS or name in ('smooth', 'prev'):
                raise _refuse(
                    text, ast.unparse(node), f'write {name}(field, steps) with a whole number of steps'
                )
            known = ', '.join([*WINDOWS, 'smooth', 'prev', *FUNCTIONS])
            raise _refuse(text, ast.unparse(node), f'the functions are {known}')
    raise _refuse(
        text, ast.unparse(node), 'only fields, numbers, + - * / **, comparisons, and, or, not and functions'
    )


def _question(node: ast.expr, text: str) -> _Node:
    built = _build(node, text)
    if not built.boolean:
        raise _refuse(text, ast.unparse(node), 'a comparison is expected beside and, or, not')
    return built


def _window(name: str, inner: _Node, n: int, text: str) -> _Node:
    if isinstance(n, bool) or n < 1:
        raise _refuse(text, f'{name}(…, {n})', 'a window has at least 1 step')

    def evaluate(columns: Series) -> np.ndarray:
        values = np.broadcast_to(np.asarray(inner.evaluate(columns), np.float64), columns[STEP].shape)
        if name == 'smooth':
            return over_window(values, n, np.nanmean, ends_with_step=True)
        return over_window(values, n, WINDOWS[name]) if name in WINDOWS else _shifted(values, n)

    return _Node(inner.fields | {STEP}, inner.lookback + (n - 1 if name == 'smooth' else n), evaluate, False)


def _shifted(values: np.ndarray, n: int) -> np.ndarray:
    """prev(x, n): x of n steps before; NaN where there was none."""
    return np.concatenate([np.full(min(n, values.size), np.nan), values[:-n]])


def over_window(
    values: np.ndarray, n: int, reduce: Callable[..., np.ndarray], *, ends_with_step: bool = False
) -> np.ndarray:
    """`reduce` over the finite values of the n steps before each (or up to and with it), [S] -> [S].

    NaN where fewer than min(n, LEAST_HISTORY) of them are finite.
    """
    values = np.where(np.isfinite(values), values, np.nan)
    padded = np.concatenate([np.full(n, np.nan), values])
    windows = np.lib.stride_tricks.sliding_window_view(padded, n)
    windows = windows[1:] if ends_with_step else windows[:-1]
    result = np.full(values.shape, np.nan)
    for start in range(0, len(windows), CHUNK):
        chunk = windows[start : start + CHUNK]
        enough = np.isfinite(chunk).sum(axis=1) >= min(n, LEAST_HISTORY)
        if enough.any():
            result[start : start + CHUNK][enough] = reduce(chunk[enough], axis=1)
    return result


def _compare(ops: list[ast.cmpop], sides: tuple[Any, ...]) -> np.ndarray:
    pairs = zip(ops, sides, sides[1:], strict=False)
    return np.logical_and.reduce(np.broadcast_arrays(*(_COMPARISONS[type(op)](a, b) for op, a, b in pairs)))


def _float(function: Callable) -> Callable:
    return lambda *args: function(*(np.asarray(arg, np.float64) for arg in args))


def _join(parts: list[_Node], function: Callable, *, boolean: bool = False) -> _Node:
    return _Node(
        frozenset().union(*(part.fields for part in parts)),
        max(part.lookback for part in parts),
        lambda columns: function(*(part.evaluate(columns) for part in parts)),
        boolean,
    )


def _refuse(text: str, part: str, why: str) -> UserError:
    return UserError(f'--when: {part!r} in {text!r}: {why}')
