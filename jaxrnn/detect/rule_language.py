"""Rules over the records of a run, as `loss > 3 * median(loss, 200)`: parsed, never evaluated as Python.

A rule is an expression over the fields of a record. Each window looks at the n steps *before* a step, `smooth`
at the n steps that end with it; so a rule at a step needs that step and `lookback` steps before it, no others.
NaNs and infinities are left out of every window, and compare false; `finite(x)` asks for them. `first(x)` is what x was
in the run's first record that has it: a number once the rule is bound to a run (`bind`). The named rules, as that for a
collapse, are in `detectors`.
"""

import ast
import difflib
import functools
import reprlib
import sys
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxrnn.record.records import is_missing
from jaxrnn.types import Series, UserError

LEAST_HISTORY = 16
"""A window with fewer finite steps in it is NaN, so that nothing is judged by two or three values."""

GAUSSIAN_MAD = 1.4826
"""Median absolute deviation -> standard deviation, for normally distributed values."""

STEP, ALL_FINITE, SOUND = 'step', 'all_finite', 'sound'
"""Fields every run has: the step's number; whether each number and each `finite_*` flag of its record is good; whether
each flag is, whatever the numbers are."""

SKIPPED, MOST_SKIPPED = 'skipped_in_a_row', 10
"""Field of runs that have a guard: steps that it has skipped up to this one; and how many may be."""

FIRST = 'first'
"""first(x), until the rule is bound."""

CHUNK, MOST_AT_ONCE = 8192, 1 << 21
"""Windows computed at once, and numbers in them, which bounds memory: 8192 windows of 200 are 13 MB."""

BLOCK = 4096
"""Steps at which a rule is evaluated at once, beside those that it looks back to; or as many as those are."""


def median(windows: np.ndarray, axis: int = 1) -> np.ndarray:
    """Of the numbers of each row that aren't NaN, [K, n] -> [K]: np.nanmedian, in a tenth of its time on short rows."""
    ordered = np.sort(windows, axis=axis)  # NaNs last
    count = np.sum(~np.isnan(ordered), axis=axis)
    low, high = np.maximum(count - 1, 0) // 2, np.maximum(count, 1) // 2
    rows = np.arange(len(ordered))
    return (ordered[rows, low] + ordered[rows, np.minimum(high, windows.shape[1] - 1)]) / 2


def _spread(windows: np.ndarray, axis: int) -> np.ndarray:
    return GAUSSIAN_MAD * median(np.abs(windows - median(windows)[:, None]))


def _line(windows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A robust straight line through each window [K, n]: its value at the step after the last [K], and what is left of
    the window beside it [K, n].

    The slope is the median of those of all pairs half a window apart, as Theil's and Sen's is of all pairs at all (Sen
    1968, section 2): one number in four may be anything. A quarter of a window apart where it isn't full.
    """
    n = windows.shape[1]
    at = np.arange(n)
    slopes = np.full(len(windows), np.nan)
    for apart in (n // 2, n // 4):
        if apart == 0:
            continue
        pairs = (windows[:, apart:] - windows[:, :-apart]) / apart
        enough = np.isnan(slopes) & (np.isfinite(pairs).sum(axis=1) >= LEAST_PAIRS)
        if enough.any():
            slopes[enough] = median(pairs[enough])
    slopes = np.where(np.isnan(slopes), 0, slopes)
    beside = windows - slopes[:, None] * at
    start = median(beside)
    return start + slopes * n, beside - start[:, None]


LEAST_PAIRS = 8


def _extreme(function: np.ufunc, windows: np.ndarray, axis: int) -> np.ndarray:
    return function.reduce(windows, axis=axis)


def _trend(windows: np.ndarray, axis: int) -> np.ndarray:
    return _line(windows)[0]


def _scatter(windows: np.ndarray, axis: int) -> np.ndarray:
    return GAUSSIAN_MAD * median(np.abs(_line(windows)[1]))


WINDOWS: Mapping[str, Callable[..., np.ndarray]] = {
    'median': median,
    'mean': np.nanmean,
    'max': functools.partial(_extreme, np.fmax),
    'min': functools.partial(_extreme, np.fmin),
    'std': np.nanstd,
    'spread': _spread,  # standard deviation by the median absolute deviation, which outliers don't move
    'trend': _trend,  # where a straight line through them comes out at the step itself
    'scatter': _scatter,  # their spread about that line
}
"""name(x, n): over the n steps before."""


def _finite(values: np.ndarray) -> np.ndarray:
    """What a record lacks isn't infinite, nor a NaN."""
    values = np.asarray(values, np.float64)
    return np.isfinite(values) | is_missing(values)


FUNCTIONS: Mapping[str, Callable[[np.ndarray], np.ndarray]] = {
    'abs': np.abs,
    'log': np.log,
    'sqrt': np.sqrt,
    'finite': _finite,
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
MOST_CHARACTERS, MOST_LOOKBACK, MOST_DEPTH = 1000, 100_000, 50
LARGEST = sys.float_info.max


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
        with warnings.catch_warnings():
            warnings.simplefilter('ignore', SyntaxWarning)  # of `1 is 2`, which is refused below
            tree = ast.parse(text.strip(), mode='eval').body
        if _depth(tree) > MOST_DEPTH:
            raise RecursionError
        node = _build(tree, text)
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


def _depth(tree: ast.AST) -> int:
    """Levels of an expression; found without descending into them by a call of a function each."""
    level, deepest = [tree], 0
    while level:
        level = [child for node in level for child in ast.iter_child_nodes(node)]
        deepest += 1
    return deepest


def bind(rule: Rule, names: Mapping[str, str], columns: Series) -> Rule:
    """A rule for one run: fields under the names that the run has them by, and `first(x)` as the number that it was.

    Args:
        rule: as `parse` gives it.
        names: field of the rule -> field of the run; those that aren't named stay.
        columns: of the run, from its first record on. Where none of them has x, `first(x)` stays.
    """
    tree = _Bound(names, columns).visit(ast.parse(rule.text, mode='eval'))
    return parse(ast.unparse(tree)) if ast.dump(tree) != ast.dump(ast.parse(rule.text, mode='eval')) else rule


class _Bound(ast.NodeTransformer):
    def __init__(self, names: Mapping[str, str], columns: Series):
        self._names, self._columns = names, columns

    def visit_Name(self, node: ast.Name) -> ast.Name:
        return ast.Name(self._names.get(node.id, node.id), node.ctx)

    def visit_Call(self, node: ast.Call) -> ast.expr:
        bound = ast.Call(node.func, [self.visit(argument) for argument in node.args], [])
        match bound:
            case ast.Call(func=ast.Name(id='first'), args=[ast.Name(id=field)]) if field in self._columns:
                values = self._columns[field]
                finite = values[np.isfinite(values)]
                return ast.Constant(float(f'{finite[0]:.6g}')) if finite.size else bound
        return bound


def unknown_field(field: str, known: Iterable[str]) -> UserError:
    """A rule asks for what the records don't have."""
    known = sorted(known)
    near = difflib.get_close_matches(field, known, n=1)
    meant = f'did you mean {near[0]}? ' if near else ''
    return UserError(f'--when: no field {field!r} in the records; {meant}there are {", ".join(known)}')


def holds(rule: Rule, columns: Series, start: int = 0) -> np.ndarray:
    """Where the rule holds, bool [S]; before place `start` it isn't asked.

    Raises UserError for a field that the records don't have.
    """
    if missing := sorted(rule.fields - columns.keys() - _MADE.keys()):
        raise unknown_field(missing[0], {**columns, **_MADE})
    size = columns[STEP].size
    found = np.zeros(size, bool)
    with np.errstate(all='ignore'):
        block = max(BLOCK, rule.lookback)
        for first in range(start, size, block):
            low, stop = max(first - rule.lookback, 0), min(first + block, size)
            rows = _read_by(rule, columns, low, stop, stop - first)
            found[first:stop] = _broadcast(rule.evaluate, rows)[first - low :]
    return found


def threshold(rule: Rule, columns: Series) -> np.ndarray | None:
    """What the smoothed field of a rule is held against at each step, float [S], in the field's own unit.

    None for a rule of another form than `smooth(x, n) > …`, `smooth(log(x), n) > …`, or with `<`.
    """
    match ast.parse(rule.text, mode='eval').body:
        case ast.Compare(
            left=ast.Call(func=ast.Name(id='smooth'), args=[of, _]),
            ops=[ast.Gt() | ast.Lt()],
            comparators=[right],
        ):
            built = _build(right, rule.text)
        case _:
            return None
    match of:
        case ast.Name():
            back: Callable[[np.ndarray], np.ndarray] = np.asarray
        case ast.Call(func=ast.Name(id='log'), args=[ast.Name()]):
            back = np.exp
        case _:
            return None
    with np.errstate(all='ignore'):
        found = np.asarray(built.evaluate(columns), np.float64)
        return np.broadcast_to(back(found), columns[STEP].shape)


def _read_by(rule: Rule, columns: Series, low: int, stop: int, asked: int) -> Series:
    """What a rule reads, of the rows low … stop - 1, of which the last are asked for."""
    part = _Rows(((name, columns[name][low:stop]) for name in {STEP, *rule.fields} & columns.keys()), asked)
    made = rule.fields & _MADE.keys()
    if made:
        whole = {name: values[low:stop] for name, values in columns.items()}
        part.update((name, _MADE[name](whole)) for name in made)
    return part


def all_finite(columns: Series) -> np.ndarray:
    """Whether each number of a step's record is finite and each of its `finite_*` flags set, bool [S]. A step that a
    guard skipped is good, too, since it changed nothing; unless it is one of many in a row."""
    good = [_finite(values) for name, values in columns.items() if not name.startswith('finite_')]
    return np.logical_and.reduce([*good, *_flags(columns)]) | _skipped(columns)


def sound(columns: Series) -> np.ndarray:
    """Whether each of a step's `finite_*` flags is set, or a guard skipped it, bool [S]. What a user logs beside them
    may be a NaN now and then without harm, as a precision of 0/0."""
    return np.logical_and.reduce([np.ones(columns[STEP].shape, bool), *_flags(columns)]) | _skipped(columns)


def _flags(columns: Series) -> list[np.ndarray]:
    flags = (values for name, values in columns.items() if name.startswith('finite_'))
    return [(values == 1) | is_missing(values) for values in flags]


def _skipped(columns: Series) -> np.ndarray:
    skipped = columns.get(SKIPPED, np.zeros(1))
    return (skipped > 0) & (skipped <= MOST_SKIPPED)


_MADE: Mapping[str, Callable[[Series], np.ndarray]] = {ALL_FINITE: all_finite, SOUND: sound}
"""Fields that are made of all others."""


def _broadcast(evaluate: Callable[[Series], Any], columns: Series) -> np.ndarray:
    """A rule, or a part of one, as a question: bool [S]."""
    return np.broadcast_to(evaluate(columns), columns[STEP].shape).astype(bool)


def _all_of(parts: Sequence[_Node], holds: bool) -> Callable[[Series], np.ndarray]:
    """Whether all parts are true, where `holds`; else whether any is: `not all` of what isn't. What comes later, as a
    window of many steps, is only computed between the first and the last step at which it still matters."""

    def evaluate(columns: Series) -> np.ndarray:
        found = np.full(columns[STEP].shape, holds)
        found[: found.size - _asked(columns)] = not holds
        for part in parts:
            open_places = np.flatnonzero(found == holds)
            if not open_places.size:
                break
            first, stop = open_places[0], open_places[-1] + 1
            low = max(first - part.lookback, 0)
            near = _Rows(((name, columns[name][low:stop]) for name in {STEP, *part.fields}), stop - first)
            answers = _broadcast(part.evaluate, near)[first - low :]
            found[first:stop] = (
                np.logical_and(found[first:stop], answers)
                if holds
                else np.logical_or(found[first:stop], answers)
            )
        return found

    return evaluate


def _build(node: ast.expr, text: str) -> _Node:
    match node:
        case ast.Constant(value=bool() | int() | float() as value):
            if abs(value) > LARGEST:
                raise _refuse(text, reprlib.repr(value), f'numbers up to {LARGEST:g} are expected')
            return _Node(frozenset(), 0, lambda columns: value, isinstance(value, bool))
        case ast.Name(id=name):
            return _Node(
                frozenset({name}),
                0,
                lambda columns: columns[name],
                name.startswith(('finite_', ALL_FINITE, SOUND)),
            )
        case ast.BoolOp(op=op, values=values):
            parts = [_question(value, text) for value in values]
            return _Node(*_needs(parts), _all_of(parts, isinstance(op, ast.And)), True)
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
            return _window(name, _build(argument, text), n, text, ast.unparse(node))
        case ast.Call(func=ast.Name(id='first'), args=[ast.Name(id=field)], keywords=[]):
            return _Node(
                frozenset({field, _first_of(field)}), 0, lambda columns: columns[_first_of(field)], False
            )
        case ast.Call(func=ast.Name(id=name)):
            if name in WINDOWS or name in ('smooth', 'prev'):
                raise _refuse(
                    text, ast.unparse(node), f'write {name}(field, steps) with a whole number of steps'
                )
            if name == FIRST:
                raise _refuse(text, ast.unparse(node), 'write first(field)')
            known = ', '.join([*WINDOWS, 'smooth', 'prev', FIRST, *FUNCTIONS])
            raise _refuse(text, ast.unparse(node), f'the functions are {known}')
    raise _refuse(
        text, ast.unparse(node), 'only fields, numbers, + - * / **, comparisons, and, or, not and functions'
    )


def _first_of(field: str) -> str:
    """What a rule with first(field) asks for beside it, which only `bind` can give: until then it can't be asked."""
    return f'{FIRST}({field})'


def _question(node: ast.expr, text: str) -> _Node:
    built = _build(node, text)
    if not built.boolean:
        raise _refuse(text, ast.unparse(node), 'a comparison is expected beside and, or, not')
    return built


class _Rows(dict[str, np.ndarray]):
    """Columns of some rows, how many of the last are asked for, and the windows over these that are known already, each
    with how many it is known for. What is computed of other rows may be anything."""

    def __init__(self, columns: Iterable[tuple[str, np.ndarray]], asked: int):
        super().__init__(columns)
        self.asked = asked
        self.known: dict[str, tuple[int, np.ndarray]] = {}

    def asking(self, more: int) -> '_Rows':
        """The same with `more` rows asked for."""
        made = _Rows(self.items(), min(self.asked + more, self[STEP].size))
        made.known = self.known
        return made


def _asked(columns: Series) -> int:
    return columns.asked if isinstance(columns, _Rows) else columns[STEP].size


def _window(name: str, inner: _Node, n: int, text: str, written: str) -> _Node:
    if isinstance(n, bool) or n < 1:
        raise _refuse(text, f'{name}(…, {n})', 'a window has at least 1 step')

    def evaluate(columns: Series) -> np.ndarray:
        rows = columns if isinstance(columns, _Rows) else _Rows(columns.items(), _asked(columns))
        known, found = rows.known.get(written, (-1, np.zeros(0)))
        if known < rows.asked:
            found = computed(rows)
            rows.known[written] = rows.asked, found
        return found

    def computed(rows: _Rows) -> np.ndarray:
        values = np.broadcast_to(np.asarray(inner.evaluate(rows.asking(n)), np.float64), rows[STEP].shape)
        if name == 'smooth':
            return over_window(values, n, np.nanmean, ends_with_step=True, last=rows.asked)
        if name in WINDOWS:
            return over_window(values, n, WINDOWS[name], last=rows.asked)
        return _shifted(values, n)

    return _Node(inner.fields | {STEP}, inner.lookback + (n - 1 if name == 'smooth' else n), evaluate, False)


def _shifted(values: np.ndarray, n: int) -> np.ndarray:
    """prev(x, n): x of n steps before; NaN where there was none."""
    return np.concatenate([np.full(min(n, values.size), np.nan), values[:-n]])


def over_window(
    values: np.ndarray,
    n: int,
    reduce: Callable[..., np.ndarray],
    *,
    ends_with_step: bool = False,
    last: int | None = None,
) -> np.ndarray:
    """`reduce` over the finite values of the n steps before each (or up to and with it), [S] -> [S]; of the `last` ones
    alone, if that is given.

    NaN where fewer than min(n, LEAST_HISTORY) of them are finite.
    """
    finite = np.isfinite(values)
    padded = np.concatenate([np.full(n, np.nan), np.where(finite, values, np.nan)])
    windows = np.lib.stride_tricks.sliding_window_view(padded, n)
    windows = windows[1:] if ends_with_step else windows[:-1]
    counts = np.concatenate([np.zeros(n + 1, np.int64), np.cumsum(finite)])
    counts = (counts[n:] - counts[:-n])[int(ends_with_step) :][: len(windows)]
    result = np.full(values.shape, np.nan)
    at_once = max(1, min(CHUNK, MOST_AT_ONCE // n))
    for start in range(0 if last is None else len(windows) - last, len(windows), at_once):
        chunk, count = windows[start : start + at_once], counts[start : start + at_once]
        enough = count >= min(n, LEAST_HISTORY)
        if enough.all():
            result[start : start + at_once] = reduce(chunk, axis=1)
        elif enough.any():
            result[start : start + at_once][enough] = reduce(chunk[enough], axis=1)
    return result


def _compare(ops: list[ast.cmpop], sides: tuple[Any, ...]) -> np.ndarray:
    pairs = zip(ops, sides, sides[1:], strict=False)
    return np.logical_and.reduce(np.broadcast_arrays(*(_COMPARISONS[type(op)](a, b) for op, a, b in pairs)))


def _float(function: Callable) -> Callable:
    return lambda *args: function(*(np.asarray(arg, np.float64) for arg in args))


def _join(parts: list[_Node], function: Callable, *, boolean: bool = False) -> _Node:
    return _Node(
        *_needs(parts), lambda columns: function(*(part.evaluate(columns) for part in parts)), boolean
    )


def _needs(parts: list[_Node]) -> tuple[frozenset[str], int]:
    """Fields and steps back that one of them needs."""
    return frozenset().union(*(part.fields for part in parts)), max(part.lookback for part in parts)


def _refuse(text: str, part: str, why: str) -> UserError:
    return UserError(f'--when: {part!r} in {text!r}: {why}')
