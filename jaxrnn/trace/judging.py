"""What was born bad while a function is evaluated: in which elements, of what kind, and of which examples."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxrnn.trace.axes import Axes
from jaxrnn.trace.births import MOST_PLACES, born, causes, detail_of, largest
from jaxrnn.trace.devices import Devices
from jaxrnn.trace.equations import name_of
from jaxrnn.trace.findings import MOST_EXAMPLES
from jaxrnn.trace.naming import origin
from jaxrnn.trace.values import Birth, Node, Value, is_key, range_of


class Judge:
    """Looks at each result that is bad, and keeps the nodes of those that were born bad.

    Args:
        devices: at hand in the evaluation.
        examples: names of the axes that run over examples.
    """

    def __init__(self, devices: Devices, examples: set[str]):
        self.devices, self.examples = devices, examples
        self.born: list[Node] = []

    def argument(self, value: Value) -> None:
        """A bad argument is born bad."""
        new = ~np.isfinite(np.asarray(value.array))
        self._note(value.node, 'input', new, value, (), value.node.input)

    def equation(self, equation: Any, operands: Sequence[Value], results: Sequence[Value]) -> None:
        """Of the results of an equation that holds no others, notes what was born bad, and not inherited."""
        for result in results:
            if not result.node.bad:
                continue
            aligned = [self.devices.layout.aligned(operand, np.ndim(result.array)) for operand in operands]
            result.node.causes = causes(equation, aligned, np.asarray(result.array))
            found = born(equation, aligned, result)
            if found is not None:
                new, kind = found
                self._note(result.node, kind, new, result, operands, name_of(equation))
                if result.node.birth is not None:
                    detail = detail_of(equation, aligned, kind)
                    result.node.birth = result.node.birth._replace(detail=detail)

    def unexplained(self, equation: Any, operands: Sequence[Value], results: Sequence[Value]) -> None:
        """Of an equation that holds others, notes what is bad only when it is computed whole: a compiled loop may round
        otherwise than its parts."""
        if any(operand.node.bad for operand in operands):
            return
        for result in results:
            if result.node.bad:
                new = ~np.isfinite(np.asarray(result.array))
                self._note(result.node, 'loop', new, result, operands, name_of(equation))
                return

    def _note(
        self, node: Node, kind: str, new: np.ndarray, result: Value, operands: Sequence[Value], name: str
    ) -> None:
        new = self.devices.layout.seen(new)
        places, along, examples, guessed = self._places(new, result.axes, operands)
        node.birth = Birth(
            kind=kind,
            places=tuple(places),
            along=frozenset(along),
            examples=examples,
            guessed=guessed,
            elements=int(new.sum()),
            operands=tuple(range_of(origin(o.node), o.array) for o in operands if not is_key(o.array)),
            results=tuple(range_of(name, r.array) for r in (result,) if not is_key(r.array)),
            devices=self.devices.layout.devices(new)[:MOST_EXAMPLES],
        )
        self.born.append(node)

    def _places(
        self, new: np.ndarray, meaning: Axes, operands: Sequence[Value]
    ) -> tuple[list[dict[str, int]], set[str], tuple[int, ...], bool]:
        """Where new elements are, the names of the axes along which that is known, and their examples; and whether all
        that is the largest operands' place, for want of axes."""
        places = [dict(meaning.fixed)]
        if new.ndim:
            places = [meaning.places(index) for index in np.argwhere(new)[:MOST_PLACES].tolist()]
        along = meaning.names()
        examples = self._examples(places)
        if not examples and (found := largest(operands, self.examples)):
            examples, along = self._examples(found), along | {name for at in found for name in at}
            places = [{**of_operand, **at} for at in places[:1] for of_operand in found]
            return places, along, examples, True
        return places, along, examples, False

    def _examples(self, places: Sequence[dict[str, int]]) -> tuple[int, ...]:
        found = {int(place) for at in places for name, place in at.items() if name in self.examples}
        found = {place for place in found if place >= 0}  # before the first is what was padded
        return tuple(sorted(found)[:MOST_EXAMPLES])
