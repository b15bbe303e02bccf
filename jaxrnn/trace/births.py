"""Which elements of a result were born bad, and of what kind.

An element is born bad if it isn't finite though the operands that it was computed from are. Else it is inherited.
"""

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxrnn.trace.axes import ELEMENTWISE, unfixed
from jaxrnn.trace.equations import inner
from jaxrnn.trace.findings import LEAK, OUT_OF_RANGE, WRITTEN, ZERO_BY_ZERO
from jaxrnn.trace.values import Origin, Value, badness, inherited, is_float

ZERO_IS_A_POLE = ('div', 'log', 'rsqrt', 'pow', 'integer_pow', 'rem', 'lgamma', 'digamma', 'atanh', 'log1p')


def born(equation: Any, operands: Sequence[Value], result: Value) -> tuple[np.ndarray, str] | None:
    """Which elements of a bad result were born bad, and of what kind; None if all were inherited."""
    array = np.asarray(result.array)
    new = new_elements(equation, operands, array)
    if new is None or not new.any():
        written = result.node.bad.nan and any(is_intended(operand) for operand in operands)
        return (np.isnan(array), WRITTEN) if written else None
    kind = kind_of(equation, operands, array, new)
    may_leak = kind in ('infinities', 'invalid argument', ZERO_BY_ZERO) and result.node.is_backward()
    return new, LEAK if may_leak and discarded(equation, operands, new) else kind


def new_elements(equation: Any, operands: Sequence[Value], array: np.ndarray) -> np.ndarray | None:
    """Which elements are bad where no operand is bad, or NaN where operands are only infinite; None if that can't be
    known, as the operands are bad and their elements don't correspond to the result's."""
    bad, nan = ~np.isfinite(array), np.isnan(array)
    suspects = [operand for operand in operands if operand.node.bad or is_intended(operand)]
    if (outside := outside_of(equation, operands, array)).any():
        return bad & outside
    if equation.primitive.name in MOVERS:
        return None if suspects else bad
    if not suspects:
        return bad
    floats = [np.asarray(operand.array) for operand in operands if is_float(operand.array)]
    if elementwise(equation, floats, array):
        was_bad = functools.reduce(np.logical_or, (~np.isfinite(value) for value in floats))
        was_nan = functools.reduce(np.logical_or, (np.isnan(value) for value in floats))
        return (bad & ~was_bad) | (nan & ~was_nan)
    if nan.any() and not any(np.isnan(value).any() for value in floats):
        return nan
    return None


MOVERS = frozenset(
    (
        *(
            'broadcast_in_dim',
            'reshape',
            'transpose',
            'squeeze',
            'expand_dims',
            'rev',
            'copy',
            'copy_p',
            'pad',
        ),
        *(
            'slice',
            'dynamic_slice',
            'dynamic_update_slice',
            'split',
            'concatenate',
            'stack',
            'unstack',
            'gather',
        ),
        *('scatter', 'sort', 'select_n', 'clamp', 'max', 'min', 'reduce_max', 'reduce_min', 'neg', 'abs'),
        *('convert_element_type', 'optimization_barrier', 'stop_gradient', 'device_put', 'reshard'),
        *('pvary', 'pcast', 'pbroadcast', 'ppermute', 'all_to_all', 'pmax', 'pmin'),
        *('all_gather', 'all_gather_invariant'),
    )
)
"""Primitives that only move or choose elements. Nothing goes bad in them, except where their type is narrower."""


def elementwise(equation: Any, operands: Sequence[np.ndarray], result: np.ndarray) -> bool:
    """Whether each element of the result is computed from the operands' elements at the same place alone."""
    if equation.primitive.name not in ELEMENTWISE:
        return False
    try:
        return bool(operands) and all(
            np.broadcast_shapes(o.shape, result.shape) == result.shape for o in operands
        )
    except ValueError:
        return False


def causes(equation: Any, operands: Sequence[Value], array: np.ndarray) -> tuple[Origin, ...]:
    """Which operands made a result bad: as `inherited`, but element by element where it is computed so. Of a select
    only what it selects counts."""
    anyhow = inherited([operand.node for operand in operands], badness(array))
    floats = [operand for operand in operands if is_float(operand.array)]
    values = [np.asarray(operand.array) for operand in floats]
    if not elementwise(equation, values, array):
        return anyhow
    taken: list[Any] = [np.True_] * len(floats)
    if equation.primitive.name == 'select_n':
        taken = [np.asarray(operands[0].array) == n for n in range(len(floats))]
    nans = [np.isnan(value) & at for value, at in zip(values, taken, strict=True)]
    infinities = [np.isinf(value) & at for value, at in zip(values, taken, strict=True)]
    some_nan = functools.reduce(np.logical_or, nans)
    some_infinity = functools.reduce(np.logical_or, infinities)
    nan, infinite = np.isnan(array), np.isinf(array)
    found = []
    for operand, is_nan, is_infinite in zip(floats, nans, infinities, strict=True):
        ways = {
            (True, True): is_nan & nan,
            (True, False): is_infinite & nan & ~some_nan,
            (False, False): is_infinite & infinite,
            (False, True): is_nan & infinite & ~some_infinity,
        }
        found += [Origin(of, operand.node, way) for (of, way), at in ways.items() if at.any()]
    return tuple(found)


def is_intended(operand: Value) -> bool:
    """Whether it is an infinity or a NaN that was put in on purpose: a literal, a constant or an argument."""
    return not operand.node.parents and bool(
        badness(np.asarray(operand.array)) if is_float(operand.array) else False
    )


def kind_of(equation: Any, operands: Sequence[Value], array: np.ndarray, new: np.ndarray) -> str:
    """One of KINDS, by the operands where new elements went bad."""
    name = equation.primitive.name
    if outside_of(equation, operands, array).any():
        return OUT_OF_RANGE
    floats = [np.asarray(operand.array) for operand in operands if is_float(operand.array)]
    alike = elementwise(equation, floats, array)
    at = [np.broadcast_to(value, array.shape)[new] if alike else value for value in floats]
    if any(np.isinf(value).any() for value in at):
        return 'infinities'
    if name in ZERO_IS_A_POLE and alike and at:
        divisor = at[1] if name in ('div', 'rem') else at[0]
        if (divisor == 0).any() or (name in ('atanh', 'log1p') and (np.abs(divisor) == 1).any()):
            is_zero = name in ('div', 'rem') and (at[0][divisor == 0] == 0).all()
            return ZERO_BY_ZERO if is_zero else 'division by zero'
    return 'invalid argument' if np.isnan(array[new]).any() else 'overflow'


def outside_of(equation: Any, operands: Sequence[Value], array: np.ndarray) -> np.ndarray:
    """Which elements of a gather's result were filled in, as their index is out of range."""
    nowhere = np.zeros((), bool)
    if equation.primitive.name != 'gather' or 'FILL' not in str(equation.params['mode']):
        return nowhere
    numbers = equation.params['dimension_numbers']
    outside, _ = _beyond(equation, operands)
    if not outside.any():
        return nowhere
    lead = array.ndim - len(equation.outvars[0].aval.shape)  # axes of devices
    at = [n + lead for n in numbers.offset_dims]
    return np.broadcast_to(np.expand_dims(outside.any(-1), at), array.shape)


def _beyond(equation: Any, operands: Sequence[Value]) -> tuple[np.ndarray, np.ndarray]:
    """Which of a gather's indices are out of range, and the size of the axis of each."""
    params = equation.params
    over, sizes = params['dimension_numbers'].start_index_map, params['slice_sizes']
    shape = equation.invars[0].aval.shape
    indices = np.asarray(operands[1].array).astype(np.int64)
    last = np.array([shape[n] - sizes[n] for n in over], np.int64)
    return (indices < 0) | (indices > last), np.array([shape[n] for n in over])


def detail_of(equation: Any, operands: Sequence[Value], kind: str) -> str:
    """What the kind alone doesn't say."""
    if kind != OUT_OF_RANGE:
        return ''
    outside, sizes = _beyond(equation, operands)
    indices = np.asarray(operands[1].array)
    first = np.argwhere(outside)[0]
    index, size = int(indices[tuple(first)]), int(sizes[first[-1]])
    if index < 0 and _selects(_before(operands[1].node)):  # -1 was made size - 1
        index -= size
    return f'index {index}, where there are {size}: 0 to {size - 1}'


def _before(node: Any) -> Any:
    """The equation that computed a value, before it was moved into another shape."""
    while node.equation is not None and node.equation.primitive.name in SHAPERS and node.parents:
        node = node.parents[0]
    return node.equation


SHAPERS = ('broadcast_in_dim', 'reshape', 'squeeze', 'expand_dims', 'convert_element_type', 'concatenate')


def discarded(equation: Any, operands: Sequence[Value], new: np.ndarray) -> bool:
    """Whether a cotangent is zero at the new elements, and a `where` a few equations before may have made it zero."""
    for operand in operands:
        if not operand.node.is_backward():
            continue
        array = np.asarray(operand.array)
        if not elementwise(equation, [array], new) or not (np.broadcast_to(array, new.shape)[new] == 0).any():
            continue
        nodes, depth = [operand.node], 0
        while nodes and depth < 6:
            if any(_selects(node.equation) for node in nodes):
                return True
            nodes = [parent for node in nodes for parent in node.parents][:32]
            depth += 1
    return False


def _selects(equation: Any) -> bool:
    if equation is None:
        return False
    if equation.primitive.name == 'select_n':
        return True
    held = inner(equation)
    return held is not None and any(e.primitive.name == 'select_n' for e in held[0].eqns)


def largest(values: Sequence[Value], examples: set[str]) -> list[dict[str, int]]:
    """Places of the operands' largest elements, for a result that has no examples any more. These are all that are at
    least half as large as the largest: of two that are nearly equal, neither alone is the cause."""
    axes = [unfixed(value.axes, dict(value.axes.fixed).keys() - examples) for value in values]
    with_examples = [
        (value, meaning)
        for value, meaning in zip(values, axes, strict=True)
        if (meaning.names() | dict(meaning.fixed).keys()) & examples and is_float(value.array)
    ]
    sizes = [np.abs(np.asarray(value.array, np.float64)) for value, _ in with_examples]
    for size in sizes:
        size[np.isnan(size)] = np.inf
    best = max((size.max() for size in sizes if size.size), default=0.0)
    return [
        meaning.places([int(n) for n in index])
        for (_, meaning), size in zip(with_examples, sizes, strict=True)
        for index in np.argwhere(size >= best / 2)[:MOST_PLACES]
    ]


MOST_PLACES = 4096
"""Elements that are looked at one by one."""
