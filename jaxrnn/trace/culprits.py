"""Which examples of the batch a bad value is due to, found out by putting others in their place.

What the axes of a value mean says which examples an element belongs to, but not through every operation: a sort, a
solver or a minimum over the batch mixes them, and a value of one may go bad because of another. So what the axes say is
tried: the same equations are computed again, up to the one that went bad, with other examples in place of those named.
If it is finite then, and bad with each of them alone, they are it. Where nothing is named, halves of the batch are
tried in the same way. What can't be found out so is unknown.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.extend import core

from jaxrnn.trace.devices import Devices
from jaxrnn.trace.equations import holds, inner, scan_counts
from jaxrnn.trace.values import Node, Place, is_float, outwards

TRIALS = 64
"""At most so many times the step is computed again."""

DONORS = 8
"""At most so many examples are tried, one after the other, in place of all others."""

Bad = Callable[[np.ndarray], bool]
"""Whether the value is bad if the batch has, at each place, the example of the place that is given."""


class _ExhaustedError(Exception):
    """So many trials were too few."""


def search(is_bad: Bad, count: int, claimed: Sequence[int]) -> tuple[int, ...] | None:
    """The examples that a value is bad by.

    Args:
        is_bad: asked with [count] places.
        count: of examples.
        claimed: what is thought, all of them.

    Returns:
        Their places, in order; none if it is not known which. None if nothing can be said: the value is not bad as it
        is computed here.
    """
    left = [TRIALS]

    def bad(kept: Sequence[int], pool: Sequence[int]) -> bool:
        """With the examples of `kept` and `pool` at their places, and elsewhere those of the pool again."""
        left[0] -= 1
        if left[0] < 0:
            raise _ExhaustedError
        rows = np.resize(np.asarray(pool, int), count)
        stay = [*kept, *pool]
        rows[stay] = stay
        return is_bad(rows)

    everyone = list(range(count))
    try:
        if not bad(everyone, everyone):
            return None
        others = [n for n in everyone if n not in set(claimed)]
        validated = bool(claimed and others and not bad((), others))
        if validated:
            suspects, pool = list(claimed), others
        else:
            donor = next((n for n in _spread(others or everyone) if not bad((), [n])), None)
            if donor is None:  # each by itself is bad
                return tuple(everyone) if not others else ()
            suspects, pool = [n for n in everyone if n != donor], [donor]
        found = _find(suspects, lambda kept: bad(kept, pool))
        if not found:  # they are bad only together
            return tuple(claimed) if validated else ()
        rest = [n for n in everyone if n not in set(found)]
        if bad((), rest):
            return ()
        if 2 * len(found) >= count and not all(bad((), [n]) for n in _spread(found)):
            # Each is bad only beside the rest, as in products of examples: then it is the rest, if that is less.
            found = _find(rest, lambda kept: bad(kept, found)) if 2 * len(rest) < count else []
        return tuple(found)
    except _ExhaustedError:
        return ()


def _spread(places: Sequence[int]) -> list[int]:
    """Some of them, from all over."""
    chosen = np.linspace(0, len(places) - 1, min(DONORS, len(places))).astype(int)
    return [places[n] for n in chosen]


def _find(group: list[int], bad: Callable[[Sequence[int]], bool]) -> list[int]:
    """Those of a group that are bad alone."""
    if len(group) == 1:
        return group if bad(group) else []
    half = len(group) // 2
    return [n for part in (group[:half], group[half:]) if bad(part) for n in _find_in(part, bad)]


def _find_in(group: list[int], bad: Callable[[Sequence[int]], bool]) -> list[int]:
    """As `_find`, of a group that is known to be bad."""
    return group if len(group) == 1 else _find(group, bad)


class Recomputation:
    """The equations of a function up to one that went bad, computed again for other arguments.

    Args:
        devices: of the evaluation, whose compiled equations are at hand.
        closed: the function's jaxpr.
        node: of the bad value.
    """

    def __init__(self, devices: Devices, closed: Any, node: Node):
        self.devices, self.closed, self.node = devices, closed, node
        self.way = tuple(outwards(node.place))[::-1]

    @property
    def is_possible(self) -> bool:
        """Not for an argument, and not inside of a shard_map."""
        around = [place.equation for place in self.way]
        return self.node.equation is not None and not any(holds(e) == 'shard_map' for e in around)

    def bad_elements(self, arguments: Sequence[Any]) -> int:
        """How many elements of the equation's results aren't finite; none if it isn't computed for these arguments."""
        nans = self.node.bad.nan
        return sum(int((np.isnan(x) if nans else ~np.isfinite(x)).sum()) for x in self._floats(arguments))

    def is_faithful(self, arguments: Sequence[Any]) -> bool:
        """Whether no NaN comes out for the function's own arguments, where none did: the loops around an equation are
        compiled here, and XLA may make a NaN of what overflows only when it is multiplied in another order."""
        return self.node.bad.nan or not any(np.isnan(x).any() for x in self._floats(arguments))

    def _floats(self, arguments: Sequence[Any]) -> list[np.ndarray]:
        results = self._at(self.closed.jaxpr, self.closed.consts, arguments, 0)
        return [np.asarray(x) for x in results if is_float(x)]

    def _at(self, jaxpr: Any, consts: Sequence[Any], arguments: Sequence[Any], depth: int) -> Sequence[Any]:
        """The results of the equation that went bad."""
        values: dict[Any, Any] = dict(zip(jaxpr.constvars, consts, strict=True))
        values |= zip(jaxpr.invars, arguments, strict=True)
        around = self.way[depth] if depth < len(self.way) else None
        target = self.node.equation if around is None else around.equation
        for equation in jaxpr.eqns:
            operands = [v.val if isinstance(v, core.Literal) else values[v] for v in equation.invars]
            if equation is target and around is not None:
                return self._inside(equation, operands, around, depth + 1)
            given = [
                x for x, v in zip(operands, equation.invars, strict=True) if not isinstance(v, core.Literal)
            ]
            results = self.devices.function_of(equation)(*given)
            if equation is target:
                return results
            values |= zip(equation.outvars, results, strict=True)
        return ()

    def _inside(self, equation: Any, operands: Sequence[Any], place: Place, depth: int) -> Sequence[Any]:
        params = equation.params
        match holds(equation):
            case 'call':
                held = inner(equation)
                assert held is not None
                return self._at(held[0], held[1], operands, depth)
            case 'scan':
                return self._in_scan(params, operands, place.iteration, depth)
            case 'while':
                return self._in_while(params, operands, place.iteration or 0, depth)
            case 'cond':
                branches = params['branches']
                index = int(np.clip(np.asarray(operands[0], int), 0, len(branches) - 1))
                return self._closed(branches[index], operands[1:], depth)
        return ()

    def _closed(self, closed: Any, arguments: Sequence[Any], depth: int) -> Sequence[Any]:
        return self._at(closed.jaxpr, closed.consts, arguments, depth)

    def _in_scan(
        self, params: dict[str, Any], operands: Sequence[Any], iteration: int | None, depth: int
    ) -> Sequence[Any]:
        (consts, carried), length = scan_counts(params), params['length']
        fixed, carry, xs = (
            operands[:consts],
            operands[consts : consts + carried],
            operands[consts + carried :],
        )
        for i in range(length)[::-1] if params['reverse'] else range(length):
            arguments = [*fixed, *carry, *(x[i] for x in xs)]
            if i == iteration:
                return self._closed(params['jaxpr'], arguments, depth)
            carry = self.devices.compiled(params['jaxpr'])(*arguments)[:carried]
        return ()

    def _in_while(
        self, params: dict[str, Any], operands: Sequence[Any], iteration: int, depth: int
    ) -> Sequence[Any]:
        of_condition, of_both = params['cond_nconsts'], params['cond_nconsts'] + params['body_nconsts']
        asked, fixed = operands[:of_condition], operands[of_condition:of_both]
        carry = list(operands[of_both:])
        for i in range(iteration + 1):
            if not bool(self.devices.compiled(params['cond_jaxpr'])(*asked, *carry)[0]):
                return ()
            if i == iteration:
                return self._closed(params['body_jaxpr'], [*fixed, *carry], depth)
            carry = self.devices.compiled(params['body_jaxpr'])(*fixed, *carry)
        return ()


def found_out(
    again: Recomputation, arguments: Sequence[Any], axes: Sequence[int | None], claimed: Sequence[int]
) -> tuple[int, ...] | None:
    """The examples that a value is bad by, as `search`.

    Args:
        again: of its node.
        arguments: of the function, arrays.
        axes: which axis of each runs over the examples.
        claimed: the examples that the axes of the value name.
    """
    counts = {np.shape(x)[axis] for x, axis in zip(arguments, axes, strict=True) if axis is not None}
    if len(counts) != 1 or not again.is_possible or again.node.birth is None:
        return None
    (count,) = counts
    if not again.is_faithful(arguments):
        return None
    # What was bad before this equation, as a mask of -inf, is bad whatever the examples.
    usual = max(0, again.bad_elements(arguments) - again.node.birth.elements)

    def is_bad(rows: np.ndarray) -> bool:
        pairs = zip(arguments, axes, strict=True)
        given = [x if axis is None else jnp.take(x, rows, axis, mode='clip') for x, axis in pairs]
        return again.bad_elements(given) > usual

    within = [place for place in claimed if 0 <= place < count]
    return search(is_bad, count, within) if count > 1 else None
