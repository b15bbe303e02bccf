"""A train step that also says how large everything in it is: each equation's result, by time step and example.

The step's jaxpr is traced once more into one compiled function, loops and all, which returns a few numbers for each
equation beside the outputs. So a healthy-looking step can be compared with another, equation by equation.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend import core

from jaxrnn import axes
from jaxrnn.axes import Axes, Factor
from jaxrnn.trace.births import MOVERS
from jaxrnn.trace.equations import holds, inner, scan_counts
from jaxrnn.trace.evaluate import Run, example_names, named_arguments
from jaxrnn.trace.naming import Flow, flow_of, marked
from jaxrnn.trace.values import Bad, Node, Place, Value, ancestors, is_backward, is_float, outwards
from jaxrnn.types import Step, Tree

TIME, EXAMPLE, ITERATION = 'time', 'example', 'iteration'

SATURATED = {'logistic': (0.1, 0.9), 'tanh': (-0.8, 0.8), 'clip': (0.1, 0.9)}
"""Values outside of which a squashing function counts as saturated: gates as in Karpathy et al. 2015 (arXiv 1506.02078,
section 4.2); tanh at the same arguments, since tanh(x) = 2 sigmoid(2 x) - 1."""


class Dimension(NamedTuple):
    """An axis of what was measured."""

    kind: str  # TIME, EXAMPLE, or ITERATION of a loop that isn't over time
    places: tuple[int, ...]


class Observed(NamedTuple):
    """What is measured, known when the step is traced."""

    node: Node
    dimensions: tuple[Dimension, ...]
    saturates: str  # of SATURATED, or nothing
    carried: bool = False  # whether a loop carries it from one time step to the next


class Size(NamedTuple):
    """How large a result is."""

    largest: np.ndarray  # absolute value, by dimension
    norm: np.ndarray | None  # Euclidean, of what loops carry, by dimension
    saturated: np.ndarray | None  # share of elements, of what saturates, by the dimensions of loops


class Parameter(NamedTuple):
    """One leaf of the model: Euclidean norms."""

    norm: float
    update: float
    gradient: float | None  # None where it can't be told which value is the gradient


class Measured(NamedTuple):
    """What one step gave."""

    record: dict[str, float]
    sizes: list[Size]
    parameters: dict[str, Parameter]
    gradients: dict[str, jax.Array]  # path of the leaf -> array


class Probe:
    """A train step, traced for arguments of one shape.

    Args:
        step: `(state, batch) -> (state, record)`.
        state, batch: of the shapes that it will be measured on.
        example_axes: as in `first_bad`.
    """

    def __init__(self, step: Step, state: Tree, batch: Tree, *, example_axes: Tree = None):
        with marked():
            self.closed, self.shapes = jax.make_jaxpr(step, return_shape=True)(state, batch)
        self.run = Run()
        self.leaves = named_arguments((state, batch), ('state', 'batch'))
        data = [pair for pair in self.leaves if is_data(pair[0])]
        self.run.examples = example_names(data, example_axes)
        meanings = [_meaning(path, leaf) for path, leaf in self.leaves]
        self.run.through(self.closed.jaxpr, meanings, late=True)  # finds the axes that loops run over
        self.observed: list[Observed] = []
        self.outputs: list[Node] = []
        self.state: list[Node] = []  # the outputs that are the next state's
        self._compiled = jax.jit(self._measure)

    def __call__(self, state: Tree, batch: Tree) -> Measured:
        """Measures one step. State and batch stay as they are."""
        leaves = jax.tree.leaves((state, batch))
        record, sizes, parameters, gradients = self._compiled(leaves)
        record, sizes, parameters = jax.device_get((record, sizes, parameters))
        told = {
            path: Parameter(float(norm), float(update), None if gradient is None else float(gradient))
            for path, (norm, update, gradient) in parameters.items()
        }
        return Measured({name: float(value) for name, value in record.items()}, sizes, told, gradients)

    def largest_arguments(self, state: Tree, batch: Tree) -> dict[str, float]:
        """Largest absolute value of each floating-point leaf, by path."""
        leaves = zip(self.leaves, jax.tree.leaves((state, batch)), strict=True)
        return {
            path: float(jnp.max(jnp.abs(leaf)))
            for (path, _), leaf in leaves
            if is_float(leaf) and np.size(leaf)
        }

    @property
    def examples(self) -> int:
        """How many examples a batch has; 0 where no axis is known to run over them."""
        return next((np.shape(leaf)[axis] for leaf, axis in self._example_axes() if axis is not None), 0)

    def only(self, batch: Tree, place: int) -> Tree:
        """A batch of the same shape that holds one example alone, again and again."""
        leaves, structure = jax.tree.flatten(batch)
        axes_of = [axis for _, axis in self._example_axes()]
        made = [
            leaf if axis is None else jnp.take(leaf, jnp.full(leaf.shape[axis], place), axis)
            for leaf, axis in zip(leaves, axes_of, strict=True)
        ]
        return jax.tree.unflatten(structure, made)

    def _example_axes(self) -> list[tuple[Any, int | None]]:
        """Of the batch's leaves."""
        data = [(path, leaf) for path, leaf in self.leaves if is_data(path)]
        return [
            (leaf, next((n for n in range(np.ndim(leaf)) if f'{path}:{n}' in self.run.examples), None))
            for path, leaf in data
        ]

    def leading_on(self) -> set[Node]:
        """The nodes of which the next state is made, and not a record alone."""
        return ancestors(self.state, lambda node: True)

    def flow(self) -> Flow:
        """Which nodes lead where, as `pass_of` wants them."""
        return flow_of(self.run.nodes, self.outputs)

    # Traced.

    def _measure(self, leaves: Sequence[Any]) -> tuple[dict, list, dict, dict]:
        frame = _Frame()
        self.run.nodes = []
        values = [self._argument(path, leaf) for (path, _), leaf in zip(self.leaves, leaves, strict=True)]
        consts = [self.run.constant(const) for const in self.closed.consts]
        outputs = self._evaluate(self.closed.jaxpr, consts, values, None, frame)
        self.observed, self.outputs = frame.observed, [value.node for value in outputs]
        paths = [path for path, _ in named_arguments(self.shapes, ('state', 'record'))]
        self.state = [node for path, node in zip(paths, self.outputs, strict=True) if not _is_record(path)]
        self.reading = _read_by_the_loss(self.run.nodes)
        out = dict(zip(paths, outputs, strict=True))
        record = {
            path.removeprefix('record').lstrip('/') or 'loss': jnp.asarray(value.array, jnp.float32)
            for path, value in out.items()
            if _is_record(path) and np.size(value.array) == 1
        }
        before = {path: value for (path, _), value in zip(self.leaves, values, strict=True)}
        parameters, gradients = self._parameters(before, out, frame)
        return {n: jnp.reshape(v, ()) for n, v in record.items()}, frame.measured, parameters, gradients

    def _parameters(
        self, before: dict[str, Value], after: dict[str, Value], frame: '_Frame'
    ) -> tuple[dict, dict]:
        """Norms of the leaves that the loss reads, and their gradients, by path."""
        told, gradients = {}, {}
        for path, old in before.items():
            new = after.get(path)
            if new is None or old.node not in self.reading or not is_float(old.array):
                continue
            gradient = _gradient(new.node, frame)
            update = _norm(jnp.asarray(new.array) - old.array)
            told[path] = (_norm(old.array), update, None if gradient is None else _norm(gradient))
            if gradient is not None:
                gradients[path] = gradient
        return told, gradients

    def _argument(self, path: str, array: Any) -> Value:
        node = Node(0, None, None, (), Bad())
        node.input, node.is_model = path, not is_data(path)
        return Value(array, _meaning(path, array), node)

    def _evaluate(
        self,
        jaxpr: Any,
        consts: Sequence[Value],
        arguments: Sequence[Value],
        place: Place | None,
        frame: '_Frame',
    ) -> list[Value]:
        values: dict[Any, Value] = dict(zip(jaxpr.constvars, consts, strict=True))
        values |= zip(jaxpr.invars, arguments, strict=True)
        for equation in jaxpr.eqns:
            operands = [self.run.read(values, variable) for variable in equation.invars]
            values |= zip(equation.outvars, self._equation(equation, operands, place, frame), strict=True)
        return [self.run.read(values, variable) for variable in jaxpr.outvars]

    def _equation(
        self, equation: Any, operands: Sequence[Value], place: Place | None, frame: '_Frame'
    ) -> list[Value]:
        self.run.count += 1
        match holds(equation):
            case 'call':
                held = inner(equation)
                assert held is not None
                consts = [self.run.constant(const) for const in held[1]]
                return self._evaluate(held[0], consts, operands, Place(equation, None, place), frame)
            case 'scan':
                return self._scan(equation, operands, place, frame)
        pairs = zip(equation.invars, operands, strict=True)
        given = [operand.array for variable, operand in pairs if not isinstance(variable, core.Literal)]
        arrays = self.run.alone(equation)(*given)
        late = not is_backward(equation, place)
        meanings = self.run.follow(equation, equation.params, [operand.axes for operand in operands], late)
        parents = tuple(operand.node for operand in operands)
        made = []
        for array, meaning in zip(arrays, meanings, strict=True):
            node = self.run.node(equation, place, parents, Bad())
            made.append(Value(array, meaning, node))
            frame.add(node, array)
            if equation.primitive.name not in MOVERS or _is_clip(node):
                self._observe(made[-1], frame)
        return made

    def _scan(
        self, equation: Any, operands: Sequence[Value], place: Place | None, frame: '_Frame'
    ) -> list[Value]:
        """The loop again, with the sizes of what each iteration makes among its outputs."""
        params, body = equation.params, equation.params['jaxpr']
        consts, carried = scan_counts(params)
        late = not is_backward(equation, place)
        inside, over = self.run.inside_scan(equation, [operand.axes for operand in operands], late)
        within = Place(equation, None, place)
        held = [self.run.constant(const) for const in body.consts]
        traced: list[Any] = []

        def step(carry: Sequence[Any], xs: Sequence[Any]) -> tuple[list[Any], tuple[list[Any], list[Size]]]:
            frame = _Frame()
            fixed = [operand.array for operand in operands[:consts]]
            arrays = [*fixed, *carry, *xs]
            arguments = [
                Value(array, meaning, operand.node)
                for array, meaning, operand in zip(arrays, inside, operands, strict=True)
            ]
            made = self._evaluate(body.jaxpr, held, arguments, within, frame)
            for value in made[:carried]:
                self._observe(value, frame, carried=True)
            traced[:] = [frame, made]  # lax.scan may trace twice; the last counts
            outputs = [value.array for value in made]
            return outputs[:carried], (outputs[carried:], frame.measured)

        xs = [operand.array for operand in operands[consts + carried :]]
        start = [
            lax.convert_element_type(operand.array, variable.aval.dtype)
            if is_float(operand.array)
            else operand.array
            for operand, variable in zip(
                operands[consts : consts + carried], body.jaxpr.invars[consts : consts + carried], strict=True
            )
        ]
        last, (stacked, sizes) = lax.scan(step, start, xs, length=params['length'], reverse=params['reverse'])
        within_loop, made = traced
        frame.shapes |= within_loop.shapes
        loop = _loop_dimension(over, params['length'], self.run.times.looped())
        frame.observed += [one._replace(dimensions=(loop, *one.dimensions)) for one in within_loop.observed]
        frame.measured += sizes
        return self._out_of_scan(
            equation, place, [*last, *stacked], made, carried, over, params['length'], frame
        )

    def _out_of_scan(
        self,
        equation: Any,
        place: Place | None,
        arrays: Sequence[Any],
        made: Sequence[Value],
        carried: int,
        over: Any,
        length: int,
        frame: '_Frame',
    ) -> list[Value]:
        results = []
        carries = tuple(value.node for value in made[:carried])  # of which later iterations are made
        for number, (array, value) in enumerate(zip(arrays, made, strict=True)):
            node = self.run.node(equation, place, (value.node, *carries), Bad())
            frame.add(node, array)
            meaning = value.axes
            if number >= carried:
                meaning = axes.stacked(meaning, over or (Factor('', length),))
            results.append(Value(array, meaning, node))
        return results

    def _observe(self, value: Value, frame: '_Frame', *, carried: bool = False) -> None:
        if not is_float(value.array) or not np.size(value.array):
            return
        saturates = '' if carried else _saturates(value.node)
        kept, dimensions = self._kept(value.axes)
        frame.observed.append(Observed(value.node, dimensions, saturates, carried))
        frame.measured.append(_size(value, kept, saturates, carried))

    def _kept(self, meaning: Axes) -> tuple[tuple[int, ...], tuple[Dimension, ...]]:
        """The factors of a value's axes by which it's measured: time and examples."""
        kept: dict[str, tuple[int, Dimension]] = {}
        factors = [factor for axis in meaning.axes for factor in axis]
        for number, factor in enumerate(factors):
            kind = (
                EXAMPLE
                if factor.name in self.run.examples
                else TIME
                if factor.name in self.run.times.looped()
                else ''
            )
            if kind and kind not in kept:
                kept[kind] = number, Dimension(kind, tuple(factor.at(p) for p in range(factor.size)))
        ordered = sorted(kept.values())
        return tuple(number for number, _ in ordered), tuple(dimension for _, dimension in ordered)


class _Frame:
    """What one body, of the step or of a loop, has given so far."""

    def add(self, node: Node, array: Any) -> None:
        self.arrays[node] = array
        self.shapes[node] = jax.typeof(array)

    def __init__(self) -> None:
        self.observed: list[Observed] = []
        self.measured: list[Any] = []
        self.arrays: dict[Node, Any] = {}
        self.shapes: dict[Node, Any] = {}  # of loops within it, too


def is_data(path: str) -> bool:
    """Whether a leaf is of the batch."""
    return path.split('/')[0] == 'batch'


def _is_record(path: str) -> bool:
    return path.split('/')[0] == 'record'


def _meaning(path: str, leaf: Any) -> Axes:
    return axes.named(path, np.shape(leaf)) if is_data(path) else axes.unknown(np.shape(leaf))


def _size(value: Value, kept: tuple[int, ...], saturates: str, carried: bool) -> Any:
    factors = [factor.size for axis in value.axes.axes for factor in axis]
    gone = tuple(n for n in range(len(factors)) if n not in kept)
    x = jnp.abs(value.array).astype(jnp.float32).reshape(factors)
    # Every reduction takes its time to compile, and there are some for each equation: no more than are needed.
    largest = jnp.max(x, axis=gone)
    norm = jnp.sqrt(jnp.sum(jnp.square(x), axis=gone)) if carried else None
    saturated = None
    if saturates:
        low, high = SATURATED[saturates]
        saturated = jnp.mean((value.array < low) | (value.array > high), dtype=jnp.float32)
    return Size(largest, norm, saturated)  # type: ignore[arg-type]  # traced


def _norm(x: Any) -> Any:
    x = jnp.asarray(x).astype(jnp.float32)
    return jnp.sqrt(jnp.sum(jnp.square(x)))


def _loop_dimension(over: Any, length: int, scanned: set[str]) -> Dimension:
    if over and len(over) == 1 and over[0].name in scanned:
        return Dimension(TIME, tuple(over[0].at(place) for place in range(length)))
    return Dimension(ITERATION, tuple(range(length)))


def _saturates(node: Node) -> str:
    name = node.equation.primitive.name if node.equation is not None else ''
    return 'clip' if _is_clip(node) else name if name in SATURATED else ''


def _is_clip(node: Node) -> bool:
    """Whether a value is clip(x, 0, 1), as a hard sigmoid ends."""
    name = node.equation.primitive.name if node.equation is not None else ''
    if name == 'clamp':
        return _is_number(node.parents[0], 0) and _is_number(node.parents[-1], 1)
    if name != 'min' or not any(_is_number(parent, 1) for parent in node.parents):
        return False
    lower = [p for p in node.parents if p.equation is not None and p.equation.primitive.name == 'max']
    return any(_is_number(parent, 0) for node in lower for parent in node.parents)


def _is_number(node: Node, number: float) -> bool:
    while node.equation is not None and node.equation.primitive.name in (
        'convert_element_type',
        'broadcast_in_dim',
    ):
        node = node.parents[0]
    try:
        return not node.is_model and float(node.input) == number
    except ValueError:
        return False


def _read_by_the_loss(nodes: Sequence[Node]) -> set[Node]:
    """Arguments that what is differentiated reads."""
    found = ancestors([node for node in nodes if _is_differentiated(node)], lambda node: True)
    return {node for node in found if node.equation is None and node.is_model}


def _is_differentiated(node: Node) -> bool:
    places = [node.equation, *(p.equation for p in outwards(node.place))]
    return any('jvp(' in str(equation.source_info.name_stack) for equation in places)


def _gradient(output: Node, frame: _Frame) -> Any:
    """The first value of a backward pass that is met on the way back from an output through values of its shape."""
    for node in _alike(output, frame.arrays):
        if node in frame.arrays and (node.is_backward() or _sums_gradients(node, frame)):
            return frame.arrays[node]
    return None


def _sums_gradients(node: Node, frame: _Frame) -> bool:
    """Whether it comes out of a loop in which gradients of parts of a batch are added up."""
    if node.equation is None or node.equation.primitive.name != 'scan':
        return False
    return any(within.is_backward() for within in _alike(node.parents[0], frame.shapes))


def _alike(node: Node, shapes: Mapping[Node, Any]) -> Iterator[Node]:
    """A node, and those before it of its shape, the nearest first."""
    if node not in shapes:
        return
    shape = np.shape(shapes[node])
    seen, level = {node}, [node]
    while level:
        yield from level
        before = [parent for node in level for parent in node.parents]
        level = [
            p for p in dict.fromkeys(before) if p not in seen and p in shapes and shapes[p].shape == shape
        ]
        seen |= set(level)
