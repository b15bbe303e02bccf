"""A function as a jaxpr whose equations know their lines of code, and what its arguments are.

In a stack of Python's frames the user's part ends at this file, which calls `make_jaxpr`: `naming` knows its name.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxrnn.trace import axes
from jaxrnn.trace.axes import Axes
from jaxrnn.trace.naming import marked
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
    examples = example_names([leaf for leaf in leaves if leaf.is_data], example_axes)
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


def example_names(data: Sequence[Argument], example_axes: Tree) -> set[str]:
    """The names of the axes that run over examples: of each leaf of the data, the one that `example_axes` says, or that
    whose length all leaves share."""
    if example_axes is not None:
        chosen = jax.tree.leaves(example_axes)
        return {f'{leaf.path}:{n}' for leaf, n in zip(data, chosen, strict=True) if n >= 0}
    shapes = {leaf.path: np.shape(leaf.leaf) for leaf in data}
    sizes = [set(shape) for shape in shapes.values() if shape]
    shared = set.intersection(*sizes) if sizes else set()
    # Of several lengths, that which is most often the first of a leaf.
    leading = [shape[0] for shape in shapes.values() if shape]
    size = max(shared, key=lambda size: (leading.count(size), size), default=None)
    return {f'{path}:{shape.index(size)}' for path, shape in shapes.items() if size in shape}
