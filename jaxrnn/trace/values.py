"""Values and where they came from: what is kept of each while a function is evaluated or traced."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core

from jaxrnn.trace import axes
from jaxrnn.trace.axes import Axes
from jaxrnn.trace.findings import Range


class Bad(NamedTuple):
    """What an array holds that isn't finite. False if it holds nothing of it."""

    nan: bool = False
    infinite: bool = False

    def __bool__(self) -> bool:
        return self.nan or self.infinite

    def also(self, other: 'Bad') -> bool:
        """Whether `other` has a NaN or an infinity where this has none."""
        return (other.nan and not self.nan) or (other.infinite and not self.infinite)


class Place(NamedTuple):
    """Where in the program an equation is: the call or the loop that holds it, and where that is."""

    equation: Any
    iteration: int | None
    outer: 'Place | None'


class Node:
    """How a value was made. Holds no array."""

    __slots__ = (
        'bad',
        'birth',
        'causes',
        'equation',
        'input',
        'is_model',
        'order',
        'parents',
        'place',
        'shape',
    )

    def __init__(self, order: int, equation: Any, place: Place | None, parents: 'tuple[Node, ...]', bad: Bad):
        self.order = order
        self.equation = equation
        self.place = place
        self.parents = parents
        self.bad = bad
        self.causes = inherited(parents, bad)
        self.birth: Birth | None = None
        self.input = ''  # path of an argument, or a literal's text
        self.is_model = False  # whether it is an argument, and not data
        self.shape: tuple[int, ...] = ()  # of an array of the model's weights; () for a count of steps

    def is_backward(self) -> bool:
        return self.equation is not None and is_backward(self.equation, self.place)


class Origin(NamedTuple):
    """One reason why a value is bad. NaNs and infinities have reasons of their own: a mask of -inf makes no NaN."""

    of_nan: bool  # whether it is a reason for the value's NaNs, or for its infinities
    node: Node  # the operand that is to blame
    is_nan: bool  # whether with its NaNs, or with its infinities


def inherited(parents: Sequence[Node], bad: Bad) -> tuple[Origin, ...]:
    """Origins where nothing is known but that parents are bad: NaNs come from NaNs, and infinities from infinities. If
    there are none of the same sort, they come from the other."""
    nans = [parent for parent in parents if parent.bad.nan]
    infinite = [parent for parent in parents if parent.bad.infinite]
    causes = []
    if bad.nan:
        causes += [Origin(True, parent, bool(nans)) for parent in nans or infinite]
    if bad.infinite:
        causes += [Origin(False, parent, not infinite) for parent in infinite or nans]
    return tuple(causes)


class Birth(NamedTuple):
    """The bad elements of a result whose operands were not bad there."""

    kind: str
    places: tuple[dict[str, int], ...]  # axis name -> place, of the first elements
    along: frozenset[str]  # names of the axes that the array has; not of those of which it is one place
    examples: tuple[int, ...]
    elements: int
    operands: tuple[Range, ...]
    results: tuple[Range, ...]
    devices: tuple[dict[str, int], ...] = ()
    detail: str = ''
    guessed: bool = False  # whether places and examples are those of the largest operands, for want of axes


class Value(NamedTuple):
    """An array, what its axes mean, and how it was made."""

    array: Any
    axes: Axes
    node: Node


class Tape:
    """The nodes of all equations, in the order of evaluation."""

    def __init__(self) -> None:
        self.nodes: list[Node] = []
        self.equations = 0  # evaluated so far; the order of the nodes

    def add(self, equation: Any, place: Place | None, parents: tuple[Node, ...], bad: Bad) -> Node:
        """The node of a result of the equation at hand."""
        self.nodes.append(Node(self.equations, equation, place, parents, bad))
        return self.nodes[-1]


def read(values: dict[Any, Value], variable: Any) -> Value:
    """The value of an equation's operand, which may be a literal. A literal is never bad: its author intended it."""
    if not isinstance(variable, core.Literal):
        return values[variable]
    node = Node(0, None, None, (), Bad())
    node.input = f'{variable.val}'
    return Value(variable.val, axes.unknown(np.shape(variable.val)), node)


def constant(array: Any) -> Value:
    """The value of a jaxpr's constant, which is never bad, as a literal."""
    return Value(array, axes.unknown(np.shape(array)), Node(0, None, None, (), Bad()))


def badness(array: Any) -> Bad:
    """What it holds that isn't finite; nothing for integers and keys."""
    if not is_float(array):
        return Bad()
    host = np.asarray(array)
    if np.isfinite(host).all():
        return Bad()
    return Bad(bool(np.isnan(host).any()), bool(np.isinf(host).any()))


def is_float(array: Any) -> bool:
    return jnp.issubdtype(getattr(array, 'dtype', np.result_type(type(array))), jnp.inexact)


def range_of(name: str, array: Any) -> Range:
    host = np.asarray(array)
    dtype = str(host.dtype)
    if not host.size or not (is_float(host) or host.dtype.kind in 'iub'):
        return Range(name, host.shape, dtype, None, None, 0, 0)
    if is_float(host):
        finite = host[np.isfinite(host)]
        nans, infinities = int(np.isnan(host).sum()), int(np.isinf(host).sum())
    else:
        finite, nans, infinities = host, 0, 0
    if np.iscomplexobj(finite):
        finite = np.abs(finite)
    low, high = (float(finite.min()), float(finite.max())) if finite.size else (None, None)
    return Range(name, host.shape, dtype, low, high, nans, infinities)


def is_key(array: Any) -> bool:
    return jnp.issubdtype(getattr(array, 'dtype', np.float32), jax.dtypes.prng_key)


def outwards(place: Place | None) -> Iterator[Place]:
    while place is not None:
        yield place
        place = place.outer


def ancestors(nodes: Sequence[Node], wanted: Callable[[Node], bool]) -> set[Node]:
    found, left = set(nodes), list(nodes)
    while left:
        for parent in left.pop().parents:
            if parent not in found and wanted(parent):
                found.add(parent)
                left.append(parent)
    return found


def caused(nodes: Sequence[Node]) -> set[Node]:
    """What made the nodes bad, and the nodes."""
    left = [(node, is_nan) for node in nodes for is_nan in (True, False)]
    found = set(left)
    while left:
        node, nan = left.pop()
        for cause in node.causes:
            at = cause.node, cause.is_nan
            if cause.of_nan == nan and at not in found:
                found.add(at)
                left.append(at)
    return {node for node, _ in found}


def stack(equation: Any, place: Place | None) -> str:
    """The named scopes around an equation, the outermost first, as JAX writes them."""
    stacks = [equation] if equation is not None else []
    stacks += [outer.equation for outer in outwards(place)]
    return '/'.join(filter(None, (str(e.source_info.name_stack) for e in reversed(stacks))))


def is_backward(equation: Any, place: Place | None) -> bool:
    return 'transpose(' in stack(equation, place)
