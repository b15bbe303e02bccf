"""Which time step a value is of.

Time is the axis of the data that a loop runs over: a `scan`, or a loop that takes one place of it in each iteration. If
no loop runs over any axis, an unrolled loop can still be recognised: the same line of code computes with each place of
the axis.
"""

import functools
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from jaxrnn.trace.axes import Axes
from jaxrnn.trace.births import MOVERS
from jaxrnn.trace.values import Node, Place, outwards


class Times:
    """Which axes the loops of a function run over, and from that the time steps of values."""

    def __init__(self) -> None:
        self.loops: dict[int, tuple[Any, set[str]]] = {}  # by the identity of the equation, which is kept
        self.places: dict[
            int, tuple[Any, dict[str, set[int]]]
        ] = {}  # of the results of equations that aren't loops
        self.sizes: dict[str, int] = {}

    # While it is evaluated.

    def add_sizes(self, path: str, shape: Sequence[int]) -> None:
        """How long the axes of an argument are."""
        self.sizes |= {f'{path}:{n}': size for n, size in enumerate(shape)}

    def run_over(self, equation: Any, names: set[str]) -> None:
        """Notes that a loop runs over axes of these names."""
        self.loops.setdefault(id(equation), (equation, set()))[1].update(names)

    def take(self, place: Place | None, whole: Axes, taken: Axes) -> None:
        """Notes that an equation takes one place of an axis. If it does so in a loop, the loop runs over this axis."""
        loop = next((outer for outer in outwards(place) if outer.iteration is not None), None)
        if loop is None:
            return
        for before, after in zip(whole.axes, taken.axes, strict=True):
            if len(before) == 1 and before[0].name and before[0].size > after[0].size == 1:
                self.run_over(loop.equation, {before[0].name})

    def see(self, equation: Any, made: Sequence[Axes]) -> None:
        """Notes the axes of an equation's results."""
        for name, place in (item for axes in made for item in axes.fixed):
            self.places.setdefault(id(equation), (equation, defaultdict(set)))[1][name].add(place)

    # Afterwards.

    def looped(self) -> set[str]:
        """Names of the axes that loops run over."""
        return {name for _, names in self.loops.values() for name in names}

    def over(self, equation: Any) -> set[str]:
        return self.loops[id(equation)][1] if id(equation) in self.loops else set()

    def of(self, node: Node, examples: set[str]) -> int | None:
        """The first time step of what was born bad at a node; None if it belongs to no time step."""
        assert node.birth is not None
        around = [place for place in outwards(node.place) if place.iteration is not None]
        for place in around:  # the innermost loop over time
            if names := self.over(place.equation) - examples:
                return self._first(node, names) if self._first(node, names) is not None else place.iteration
        if names := self.looped() - examples:
            return self._first(node, names & node.birth.along)
        if names := self._unrolled() - examples:
            return self._first(
                node, {name for name in names if name in node.birth.along or self._is_repeated(node, name)}
            )
        return around[-1].iteration if around else None

    def _first(self, node: Node, names: set[str]) -> int | None:
        assert node.birth is not None
        return min((at[name] for at in node.birth.places for name in names & at.keys()), default=None)

    def _unrolled(self) -> set[str]:
        """Names of axes of which the same code computes with every place."""
        found = set()
        for (primitive, *_), at in self.by_code.items():
            if primitive in MOVERS:  # which may only take an array apart
                continue
            found |= {name for name, places in at.items() if len(places) == self.sizes[name] > 1}
        return found

    def _is_repeated(self, node: Node, name: str) -> bool:
        """Whether code is repeated over an axis: it and each call around it compute with several places of the axis."""
        around = [node.equation, *(place.equation for place in outwards(node.place))]
        codes = [code_of(equation) for equation in around if equation is not None]
        met = [self.by_code[code].get(name, set()) for code in codes if code in self.by_code]
        return all(len(places) != 1 for places in met) and any(met)

    @functools.cached_property
    def by_code(self) -> dict[Any, dict[str, set[int]]]:
        found: dict[Any, dict[str, set[int]]] = defaultdict(lambda: defaultdict(set))
        for equation, at in self.places.values():
            for name, places in at.items():
                found[code_of(equation)][name] |= places
        return found


def code_of(equation: Any) -> Any:
    """An equation's primitive, and the Python instruction of every call that led to it. So two squares in one line are
    two codes, and the iterations of a Python loop are one."""
    traceback = equation.source_info.traceback
    if traceback is None:
        return equation.primitive.name, id(equation)
    codes, instructions = traceback.raw_frames()
    return equation.primitive.name, tuple(codes), tuple(instructions)
