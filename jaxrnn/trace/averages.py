"""What a step averages, and with which constants: read from its jaxpr, where they are written.

An optimiser's state holds averages, but not the constants by which they decay: those are in the program alone.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from jax.extend import core

from jaxrnn.trace.equations import holds, inner

SAME_NUMBER = ('convert_element_type', 'copy', 'reshape', 'broadcast_in_dim', 'optimization_barrier')
"""Primitives that hand a number on."""

DIGITS = 6
"""Of a constant that was rounded to float32: .9 is written as 0.8999999761581421."""


class _Place(NamedTuple):
    """A variable, and the jaxpr that it is of, with the call that holds that, if any."""

    variable: Any
    producers: dict[Any, Any]  # variable -> equation
    jaxpr: Any
    call: 'tuple[Any, _Place] | None'  # the equation, and any place of the jaxpr that it is in


def decay(closed: Any, argument: int, result: int) -> float | None:
    """b, where a result is the average b x + (1 - b) y of an argument x, or x + (1 - b) (y - x), in every call.

    Args:
        closed: jaxpr of the function.
        argument: which of its arguments x is.
        result: which of its results the average is.

    Returns:
        b; None where the result isn't such an average, or b isn't written in the program.

    >>> import jax
    >>> decay(jax.make_jaxpr(lambda mean, x: 0.9 * mean + 0.1 * x)(1.0, 2.0), 0, 0)
    0.9
    """
    source = closed.jaxpr.invars[argument]
    average = _followed(_Place(closed.jaxpr.outvars[result], _producers(closed.jaxpr), closed.jaxpr, None))
    for one, other in _terms(average, 'add'):
        for factor, value in _terms(one, 'mul'):
            if (found := _number(factor)) is not None and _is(value, source):
                return _rounded(found)
        if _is(one, source):
            for factor, value in _terms(other, 'mul'):
                found = _number(factor)
                if found is not None and any(_is(b, source) for _, b in _terms(value, 'sub', ordered=True)):
                    return _rounded(1 - found)
    return None


def added_to_roots(closed: Any, shapes: Sequence[tuple[int, ...]]) -> float | None:
    """The number that is added to square roots of tensors of such shapes, if it is one for all: Adam's epsilon."""
    wanted, found = set(shapes), set()
    for jaxpr in _all(closed.jaxpr):
        made_by = _producers(jaxpr)
        for equation in jaxpr.eqns:
            if equation.primitive.name != 'add' or equation.outvars[0].aval.shape not in wanted:
                continue
            places = [_Place(variable, made_by, jaxpr, None) for variable in equation.invars]
            for root, number in (places, places[::-1]):
                maker = made_by.get(root.variable) if not isinstance(root.variable, core.Literal) else None
                if maker is not None and maker.primitive.name == 'sqrt':
                    found.add(_number(number))
    (only,) = found if len(found) == 1 else (None,)
    return None if only is None else _rounded(only)


def _all(jaxpr: Any) -> Iterator[Any]:
    """A jaxpr, and those of the calls in it."""
    yield jaxpr
    for equation in jaxpr.eqns:
        if holds(equation) == 'call' and (held := inner(equation)) is not None:
            yield from _all(held[0])


def _producers(jaxpr: Any) -> dict[Any, Any]:
    return {variable: equation for equation in jaxpr.eqns for variable in equation.outvars}


def _made(place: _Place) -> Any:
    """The equation whose result it is, if any."""
    return None if isinstance(place.variable, core.Literal) else place.producers.get(place.variable)


def _followed(place: _Place) -> _Place:
    """The place where its number comes from: through calls, and operations that hand it on."""
    while True:
        equation = _made(place)
        if equation is None:
            if isinstance(place.variable, core.Literal) or place.call is None:
                return place
            if place.variable not in place.jaxpr.invars:
                return place
            call, outside = place.call
            place = outside._replace(variable=call.invars[place.jaxpr.invars.index(place.variable)])
        elif holds(equation) == 'call' and (held := inner(equation)) is not None:
            number = equation.outvars.index(place.variable)
            place = _Place(held[0].outvars[number], _producers(held[0]), held[0], (equation, place))
        elif equation.primitive.name in SAME_NUMBER:
            number = equation.outvars.index(place.variable)
            place = place._replace(variable=equation.invars[number])
        else:
            return place


def _terms(place: _Place, name: str, *, ordered: bool = False) -> Iterator[tuple[_Place, _Place]]:
    """The two operands of an operation, in both orders, if that is what made it."""
    equation = _made(place)
    if equation is None or equation.primitive.name != name:
        return
    one, other = (_followed(place._replace(variable=variable)) for variable in equation.invars)
    yield one, other
    if not ordered:
        yield other, one


def _is(place: _Place, source: Any) -> bool:
    return place.call is None and place.variable is source


def _number(place: _Place) -> float | None:
    """What is written there, if it is a number."""
    variable = _followed(place).variable
    if not isinstance(variable, core.Literal) or np.size(variable.val) != 1:
        return None
    return float(variable.val)


def _rounded(number: float) -> float:
    return float(f'{number:.{DIGITS}g}')
