"""A train step that also measures how large everything in it is: each equation's result, by time step and example.

So a step that looks healthy can be compared with another, equation by equation.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core

from jaxrnn.trace.naming import Flow
from jaxrnn.trace.retrace import Frame, Measurement, ProbePoint, TracedStep, is_clip, is_record
from jaxrnn.trace.values import Node, Value, ancestors, is_float, outwards
from jaxrnn.types import Step, Tree

SATURATED = {'logistic': (0.1, 0.9), 'tanh': (-0.8, 0.8), 'clip': (0.1, 0.9)}
"""Values outside of which a squashing function counts as saturated: gates as in Karpathy et al. 2015 (arXiv 1506.02078,
section 4.2); tanh at the same arguments, since tanh(x) = 2 sigmoid(2 x) - 1."""


QUICKLY = {'xla_backend_optimization_level': 0}
"""How a program of a thousand results is compiled, each of which is measured, and that is run a few times: on a
processor in half to two thirds of the time. It runs up to twice as long."""


class Magnitude(NamedTuple):
    """How large a result is."""

    largest: np.ndarray  # absolute value, by dimension
    norm: np.ndarray | None  # Euclidean, by dimension; only of what loops carry
    saturated: np.ndarray | None  # share of elements, by the dimensions of loops; only of squashing functions


class Parameter(NamedTuple):
    """One leaf of the model: Euclidean norms."""

    norm: float
    update: float
    gradient: float | None  # None where it isn't known which value is the gradient


class StepMeasurements(NamedTuple):
    """What was measured in one step."""

    record: dict[str, float]
    magnitudes: list[Magnitude]
    parameters: dict[str, Parameter]
    gradients: dict[str, jax.Array]  # path of the leaf -> array


class MeasuredStep:
    """A train step that also returns its measurements. Arguments as in `TracedStep`."""

    def __init__(self, step: Step, state: Tree, batch: Tree, *, example_axes: Tree = None):
        self.step = TracedStep(step, state, batch, example_axes=example_axes)
        self._compiled = jax.jit(
            self._measure, compiler_options=QUICKLY if jax.default_backend() == 'cpu' else None
        )

    @property
    def probe_points(self) -> list[ProbePoint]:
        """What is measured, in the order of the magnitudes; known after the first call."""
        return self.step.frame.probe_points

    def __call__(self, state: Tree, batch: Tree) -> StepMeasurements:
        """Does and measures one step. State and batch stay as they are."""
        leaves = jax.tree.leaves((state, batch))
        record, magnitudes, parameters, gradients = self._compiled(leaves)
        record, magnitudes, parameters = jax.device_get((record, magnitudes, parameters))
        norms = {
            path: Parameter(float(norm), float(update), None if gradient is None else float(gradient))
            for path, (norm, update, gradient) in parameters.items()
        }
        return StepMeasurements(
            {name: float(value) for name, value in record.items()}, magnitudes, norms, gradients
        )

    def largest_arguments(self, state: Tree, batch: Tree) -> dict[str, float]:
        """Largest absolute value of each floating-point leaf, by path."""
        arrays = zip(self.step.leaves, jax.tree.leaves((state, batch)), strict=True)
        return {
            leaf.path: float(jnp.max(jnp.abs(array)))
            for leaf, array in arrays
            if is_float(array) and np.size(array)
        }

    @property
    def examples(self) -> int:
        """How many examples a batch has; 0 where no axis is known to run over them."""
        return next((np.shape(leaf)[axis] for leaf, axis in self._with_axes() if axis is not None), 0)

    def only(self, batch: Tree, place: int) -> Tree:
        """A batch of the same shape that holds one example alone, again and again."""
        leaves, structure = jax.tree.flatten(batch)
        axes_of = [axis for _, axis in self._with_axes()]
        made = [
            leaf if axis is None else jnp.take(leaf, jnp.full(leaf.shape[axis], place), axis)
            for leaf, axis in zip(leaves, axes_of, strict=True)
        ]
        return jax.tree.unflatten(structure, made)

    def example_axes(self) -> list[tuple[str, int | None]]:
        """The path of each leaf of the batch, and which of its axes runs over the examples."""
        examples = self.step.examples
        return [
            (path, next((n for n in range(np.ndim(array)) if f'{path}:{n}' in examples), None))
            for path, array, is_data in self.step.leaves
            if is_data
        ]

    def _with_axes(self) -> list[tuple[Any, int | None]]:
        arrays = [array for _, array, is_data in self.step.leaves if is_data]
        return [(array, axis) for array, (_, axis) in zip(arrays, self.example_axes(), strict=True)]

    def leading_on(self) -> set[Node]:
        """The nodes that the next state is computed from; not those that only a record needs."""
        outputs = zip(self.step.out_paths, self.step.outputs, strict=True)
        return ancestors([value.node for path, value in outputs if not is_record(path)], lambda node: True)

    def flow(self) -> Flow:
        """Which nodes lead where, as `pass_of` needs it."""
        return self.step.flow()

    # While it is traced.

    def _measure(self, leaves: Sequence[Any]) -> tuple[dict, list, dict, dict]:
        frame = self.step.trace(leaves, self._compute, self._measurement)
        after = dict(zip(self.step.out_paths, self.step.outputs, strict=True))
        record = {
            path.removeprefix('record').lstrip('/') or 'loss': jnp.asarray(value.array, jnp.float32)
            for path, value in after.items()
            if is_record(path) and np.size(value.array) == 1
        }
        parameters, gradients = self._parameters(after, frame)
        return {n: jnp.reshape(v, ()) for n, v in record.items()}, frame.measured, parameters, gradients

    def _compute(self, equation: Any, operands: Sequence[Any]) -> Sequence[Any]:
        pairs = zip(equation.invars, operands, strict=True)
        given = [array for variable, array in pairs if not isinstance(variable, core.Literal)]
        return self.step.devices.function_of(equation)(*given)

    def _measurement(self, value: Value, carried: bool) -> Measurement | None:
        if not is_float(value.array) or not np.size(value.array):
            return None
        saturates = '' if carried else _saturates(value.node)
        kept, dimensions = self.step.kept(value.axes)
        return Measurement(dimensions, saturates, _size(value, kept, saturates, carried))

    def _parameters(self, after: dict[str, Value], frame: Frame) -> tuple[dict, dict]:
        """Norms of the leaves that the loss reads, and their gradients, by path."""
        norms, gradients = {}, {}
        reading = _read_by_the_loss(self.step.tape.nodes)
        for (path, *_), old in zip(self.step.leaves, self.step.arguments, strict=True):
            new = after.get(path)
            if new is None or old.node not in reading or not is_float(old.array):
                continue
            gradient = _gradient(new.node, frame)
            update = _norm(jnp.asarray(new.array) - old.array)
            norms[path] = (_norm(old.array), update, None if gradient is None else _norm(gradient))
            if gradient is not None:
                gradients[path] = gradient
        return norms, gradients


def _size(value: Value, kept: tuple[int, ...], saturates: str, carried: bool) -> Any:
    factors = [factor.size for axis in value.axes.axes for factor in axis]
    gone = tuple(n for n in range(len(factors)) if n not in kept)
    x = jnp.abs(value.array).astype(jnp.float32).reshape(factors)
    # Each reduction takes time to compile, and each equation has several: so no more than are needed.
    largest = jnp.max(x, axis=gone)
    norm = jnp.sqrt(jnp.sum(jnp.square(x), axis=gone)) if carried else None
    saturated = None
    if saturates:
        low, high = SATURATED[saturates]
        saturated = jnp.mean((value.array < low) | (value.array > high), dtype=jnp.float32)
    return Magnitude(largest, norm, saturated)  # type: ignore[arg-type]  # traced


def _norm(x: Any) -> Any:
    x = jnp.asarray(x).astype(jnp.float32)
    return jnp.sqrt(jnp.sum(jnp.square(x)))


def _saturates(node: Node) -> str:
    name = node.equation.primitive.name if node.equation is not None else ''
    return 'clip' if is_clip(node) else name if name in SATURATED else ''


def _read_by_the_loss(nodes: Sequence[Node]) -> set[Node]:
    """Arguments of the model that what is differentiated reads."""
    found = ancestors([node for node in nodes if _is_differentiated(node)], lambda node: True)
    return {node for node in found if node.equation is None and node.is_model}


def _is_differentiated(node: Node) -> bool:
    places = [node.equation, *(p.equation for p in outwards(node.place))]
    return any('jvp(' in str(equation.source_info.name_stack) for equation in places)


def _gradient(output: Node, frame: Frame) -> Any:
    """The gradient that a new parameter was computed from: the first value of a backward pass that is met on the way
    back from the parameter, through values of its shape. None where two are met at once, as behind a call that takes
    the gradients of several parameters of one shape and isn't looked into."""
    for level in _alike(output, frame.shapes):
        met = [n for n in level if n in frame.arrays and (n.is_backward() or _sums_gradients(n, frame))]
        if met:
            return frame.arrays[met[0]] if len(met) == 1 else None
    return None


def _sums_gradients(node: Node, frame: Frame) -> bool:
    """Whether it comes out of a loop that adds up the gradients of parts of a batch."""
    if node.equation is None or node.equation.primitive.name != 'scan':
        return False
    return any(within.is_backward() for level in _alike(node.parents[0], frame.shapes) for within in level)


def _alike(node: Node, shapes: Mapping[Node, tuple[int, ...]]) -> Iterator[list[Node]]:
    """A node, and the nodes before it that have its shape, in steps away from it."""
    if node not in shapes:
        return
    shape = shapes[node]
    seen, level = {node}, [node]
    while level:
        yield level
        before = [parent for node in level for parent in node.parents]
        level = [p for p in dict.fromkeys(before) if p not in seen and p in shapes and shapes[p] == shape]
        seen |= set(level)
