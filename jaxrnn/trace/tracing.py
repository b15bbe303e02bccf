"""A function as a jaxpr whose equations know their lines of code, and what its arguments are.

In a stack of Python's frames the user's part ends at this file, which calls `make_jaxpr`: `naming` knows its name.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxrnn.trace import axes
from jaxrnn.trace.axes import Axes
from jaxrnn.trace.devices import Devices
from jaxrnn.trace.meaning import AxisMeaning
from jaxrnn.trace.naming import marked
from jaxrnn.trace.times import Times
from jaxrnn.trace.values import Bad, Node
from jaxrnn.types import Tree


class Argument(NamedTuple):
    """A leaf of a function's arguments."""

    path: str  # as `state/params/kernel`
    leaf: Any
    is_data: bool  # whether it is of the batch; the others are the model's

    @property
    def axes(self) -> Axes:
        """Those of data have names."""
        shape = np.shape(self.leaf)
        return axes.named(self.path, shape) if self.is_data else axes.unknown(shape)

    def example_axis(self, examples: set[str]) -> int | None:
        """Which of its axes runs over examples. `examples` are the names of the axes that do."""
        numbers = range(np.ndim(self.leaf))
        return next((n for n in numbers if f'{self.path}:{n}' in examples), None)

    def node(self, bad: Bad) -> Node:
        """How a value began that is this argument."""
        node = Node(0, None, None, (), bad)
        node.input, node.is_model = self.path, not self.is_data
        return node


class TracedFunction(NamedTuple):
    """What is known of a function before it is evaluated."""

    closed: Any  # jaxpr
    outputs: Tree  # of shapes and types
    arguments: list[Argument]
    examples: set[str]  # names of the axes that run over examples


def traced(
    function: Callable[..., Tree], arguments: Sequence[Tree], names: Sequence[str], example_axes: Tree
) -> TracedFunction:
    """Traces `function(*arguments)`. Arguments as in `first_bad`."""
    closed, outputs = as_jaxpr(function, arguments)
    data = names[len(arguments) - 1]
    leaves = [
        Argument(path, leaf, path.split('/')[0] == data) for path, leaf in named_leaves(arguments, names)
    ]
    given = [leaf for leaf in leaves if leaf.is_data]
    shown = None if example_axes is not None else evidence(closed, leaves)
    examples = example_names(given, example_axes, shown)
    return TracedFunction(closed, outputs, leaves, examples)


def as_jaxpr(function: Callable[..., Tree], arguments: Sequence[Tree]) -> tuple[Any, Tree]:
    """A function's jaxpr, and the shapes and types of its results."""
    with marked():
        return jax.make_jaxpr(function, return_shape=True)(*arguments)


def named_leaves(trees: Sequence[Tree], names: Sequence[str]) -> list[tuple[str, Any]]:
    """Path and leaf of all leaves of several trees."""
    found = []
    for name, tree in zip(names, trees, strict=False):
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
            within = jax.tree_util.keystr(path, simple=True, separator='/')
            found.append((f'{name}/{within}' if within else name, leaf))
    return found


def evidence(closed: Any, leaves: Sequence[Argument]) -> Times:
    """What the equations show of the axes of a function's arguments."""
    meaning = AxisMeaning(Devices())
    for leaf in leaves:
        meaning.devices.add_mesh_of(leaf.leaf)
        meaning.times.add_sizes(leaf.path, np.shape(leaf.leaf))
    meaning.through(closed.jaxpr, [leaf.axes for leaf in leaves], late=True)
    return meaning.times


def example_names(data: Sequence[Argument], example_axes: Tree, shown: Times | None = None) -> set[str]:
    """The names of the axes that run over examples: of each leaf of the data, the one that `example_axes` says, or that
    whose length all leaves share. No axis of time is one, and none of which it isn't known which of two it is."""
    if example_axes is not None:
        chosen = jax.tree.leaves(example_axes)
        return {f'{leaf.path}:{n}' for leaf, n in zip(data, chosen, strict=True) if n >= 0}
    over_time = shown.over_time() if shown is not None else set()
    shapes = {leaf.path: np.shape(leaf.leaf) for leaf in data}
    # Of each leaf the axes that may run over examples; a leaf that has none has no say.
    may = {p: [n for n in range(len(s)) if f'{p}:{n}' not in over_time] for p, s in shapes.items()}
    sizes = [{shapes[path][n] for n in numbers} for path, numbers in may.items() if numbers]
    shared = set.intersection(*sizes) if sizes else set()
    # Of several lengths, that which is most often the first of a leaf.
    leading = [shapes[path][numbers[0]] for path, numbers in may.items() if numbers]
    size = max(shared, key=lambda size: (leading.count(size), size), default=None)
    found = {
        f'{path}:{next(n for n in numbers if shapes[path][n] == size)}'
        for path, numbers in may.items()
        if size in (shapes[path][n] for n in numbers)
    }
    if shown is not None and len(shared) > 1:
        # An example then has a place in either axis, or the axes are the other way round.
        # Of a matrix of which each device has a row, that is an example; else it may have several.
        rows = len(shapes) == 1 and all(len(shape) < 3 for shape in shapes.values())
        parts = shown.parted or shown.maps_gradients or (shown.among_devices and not rows)
        return set() if parts or found & shown.contracted else found
    return found
