"""Which time step a value is of.

Time is the axis of the data that a loop runs over: a `scan`, or a loop that takes one place of it in each iteration. If
no loop runs over any axis, an unrolled loop can still be recognised: the same line of code computes with each place of
the axis.
"""

import functools
import itertools
import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

import jax
from jax.extend import core

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
        self.over_parts: dict[int, tuple[Any, bool]] = {}  # loops, by identity
        self.parted: set[str] = set()  # names of axes over parts of a batch, as micro-batches
        self.among_devices: set[str] = set()  # names of axes of which each device has one place
        self.contracted: set[str] = set()  # names of axes that a product in the forward pass sums over
        self.alike: dict[str, set[str]] = defaultdict(set)  # names that meet, place by place
        self.maps_gradients = False  # whether whole gradients are computed under a vmap

    # While it is evaluated.

    def add_sizes(self, path: str, shape: Sequence[int]) -> None:
        """How long the axes of an argument are."""
        self.sizes |= {f'{path}:{n}': size for n, size in enumerate(shape)}

    def run_over(self, equation: Any, names: set[str], late: bool = True) -> None:
        """Notes that a loop runs over axes of these names. `late`: whether the loop is none of a backward pass."""
        if not late:
            self.over_parts[id(equation)] = equation, False
        if self._is_over_parts(equation):
            self.parted |= names
        self.loops.setdefault(id(equation), (equation, set()))[1].update(names)

    def take(self, place: Place | None, whole: Axes, taken: Axes) -> None:
        """Notes that an equation takes one place of an axis. If it does so in a loop, the loop runs over this axis."""
        loop = next((outer for outer in outwards(place) if outer.iteration is not None), None)
        if loop is None:
            return
        for before, after in zip(whole.axes, taken.axes, strict=True):
            if len(before) == 1 and before[0].name and before[0].size > after[0].size == 1:
                self.run_over(loop.equation, {before[0].name})

    def meet(self, ins: Sequence[Axes], rank: int) -> None:
        """Notes that axes of several operands are one: each element is computed from those at its place."""
        operands = [operand for operand in ins if len(operand.axes) == rank]
        for number in range(rank):
            whole = {o.axes[number] for o in operands if len(o.axes[number]) == 1 and o.axes[number][0].name}
            for (a,), (b,) in itertools.permutations(whole, 2):
                # Two axes of one leaf that meet, as in x + x.T, are two axes.
                if a[1:] == b[1:] and a.name.rpartition(':')[0] != b.name.rpartition(':')[0]:
                    self.alike[a.name].add(b.name)

    def take_in(self, loop: Any, whole: Axes, taken: Axes) -> None:
        """As `take`, of a loop that is followed, not evaluated."""
        for before, after in zip(whole.axes, taken.axes, strict=True):
            size = math.prod(factor.size for factor in after)
            if len(before) == 1 and before[0].name and before[0].size > size == 1:
                self.run_over(loop, {before[0].name})

    def see(self, equation: Any, made: Sequence[Axes]) -> None:
        """Notes the axes of an equation's results."""
        for name, place in (item for axes in made for item in axes.fixed):
            self.places.setdefault(id(equation), (equation, defaultdict(set)))[1][name].add(place)

    # Afterwards.

    def looped(self) -> set[str]:
        """Names of the axes that loops over time run over."""
        loops = (names for equation, names in self.loops.values() if not self._is_over_parts(equation))
        return self._with_alike({name for names in loops for name in names})

    def _with_alike(self, found: set[str]) -> set[str]:
        """Names and those of axes that are one with them: what is added to a sequence place by place is one, too."""
        left = list(found)
        while left:
            more = self.alike.get(left.pop(), set()) - found
            found = found | more
            left += more
        return found

    def _is_over_parts(self, equation: Any) -> bool:
        """Whether a loop runs over parts of a batch."""
        if id(equation) not in self.over_parts:
            self.over_parts[id(equation)] = equation, holds_gradient(equation)
        return self.over_parts[id(equation)][1]

    def over_time(self) -> set[str]:
        """Names of the axes that the iterations of loops are places of, written as loops or one after the other."""
        return self.looped() | self._unrolled()

    def over(self, equation: Any) -> set[str]:
        return self.loops[id(equation)][1] if id(equation) in self.loops else set()

    def of(self, node: Node, examples: set[str]) -> int | None:
        """The first time step of what was born bad at a node; None if it belongs to no time step."""
        assert node.birth is not None
        examples = examples | self.parted  # as they, no time
        around = [
            place
            for place in outwards(node.place)
            # A loop over parts of a batch computes a gradient in each iteration, or takes its examples apart.
            if place.iteration is not None
            and not self._is_over_parts(place.equation)
            and not (self.over(place.equation) and self.over(place.equation) <= examples)
        ]
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
            found |= {name for name, places in at.items() if len(places) == self.sizes.get(name, 0) > 1}
        return self._with_alike(found)

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


def holds_gradient(equation: Any) -> bool:
    """Whether a loop computes a whole gradient in each iteration, forward and backward."""
    if TRANSPOSED in str(equation.source_info.name_stack):
        return False
    scopes = [str(inside.source_info.name_stack) for inside in _inside(equation)]
    backward = [TRANSPOSED in scope for scope in scopes]
    return any(backward) and any('jvp(' in s and not b for s, b in zip(scopes, backward, strict=True))


def _inside(equation: Any) -> Iterator[Any]:
    """The equations that an equation holds."""
    for value in jax.tree.leaves(tuple(equation.params.values()), is_leaf=_is_jaxpr):
        if _is_jaxpr(value):
            for inside in (value.jaxpr if isinstance(value, core.ClosedJaxpr) else value).eqns:
                yield inside
                yield from _inside(inside)


TRANSPOSED = 'transpose('
"""In the scopes of a backward pass."""


def _is_jaxpr(value: Any) -> bool:
    return isinstance(value, core.ClosedJaxpr | core.Jaxpr)


def code_of(equation: Any) -> Any:
    """An equation's primitive, and the Python instruction of every call that led to it. So two squares in one line are
    two codes, and the iterations of a Python loop are one."""
    traceback = equation.source_info.traceback
    if traceback is None:
        return equation.primitive.name, id(equation)
    codes, instructions = traceback.raw_frames()
    return equation.primitive.name, tuple(codes), tuple(instructions)
