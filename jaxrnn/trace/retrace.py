"""A jaxpr traced once more into one compiled function, loops and all, which also returns something of each value.

What is computed for an equation, and what is noticed of a result, are functions of whoever uses it: `probe` notices
sizes, `shadow` computes all of it twice.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import lax

from jaxrnn.trace import axes
from jaxrnn.trace.axes import Axes, Factor
from jaxrnn.trace.births import MOVERS
from jaxrnn.trace.equations import holds, inner, scan_counts
from jaxrnn.trace.evaluate import Run, example_names, named_arguments
from jaxrnn.trace.naming import Flow, flow_of, marked
from jaxrnn.trace.values import Bad, Node, Place, Value, is_backward
from jaxrnn.types import Step, Tree

TIME, EXAMPLE, ITERATION = 'time', 'example', 'iteration'


class Dimension(NamedTuple):
    """An axis of what was noticed."""

    kind: str  # TIME, EXAMPLE, or ITERATION of a loop that isn't over time
    places: tuple[int, ...]


class ProbePoint(NamedTuple):
    """What is noticed, known when the step is traced."""

    node: Node
    dimensions: tuple[Dimension, ...]
    carried: bool  # whether a loop carries it from one iteration to the next
    about: Any = None  # of whoever notices


class Carried(NamedTuple):
    """What a loop carries: the value that an iteration begins with, and that which it hands on."""

    begin: Node
    end: Node
    reverse: bool


class Frame:
    """What one body, of the step or of a loop, has given so far."""

    def __init__(self) -> None:
        self.observed: list[ProbePoint] = []
        self.measured: list[Any] = []
        self.arrays: dict[Node, Any] = {}
        self.shapes: dict[Node, tuple[int, ...]] = {}  # of loops within it, too
        self.carried: list[Carried] = []  # likewise


class Measurement(NamedTuple):
    """Of one value: what is known when it is traced, and arrays."""

    dimensions: tuple[Dimension, ...]
    about: Any
    measured: Any


Compute = Callable[[Any, Sequence[Any]], Sequence[Any]]
"""An equation and its operands, those written down too -> its results."""

Lift = Callable[[Any], Any]
"""What is written down, or an array -> what is carried through loops in its place."""

Notice = Callable[[Value, bool], Measurement | None]
"""A value, and whether a loop carries it."""


class TracedStep:
    """A train step, traced for arguments of one shape.

    Args:
        step: `(state, batch) -> (state, record)`.
        state, batch: of the shapes that it will be given.
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
        self.frame = Frame()
        self.arguments: list[Value] = []
        self.outputs: list[Value] = []
        self.out_paths = [path for path, _ in named_arguments(self.shapes, ('state', 'record'))]

    def trace(
        self, leaves: Sequence[Any], compute: Compute, notice: Notice, lift: Lift = lambda array: array
    ) -> Frame:
        """Traces the step for these leaves. Arguments, outputs and frame are those of the last time."""
        self.run.nodes = []
        self.arguments = [
            self._argument(path, leaf) for (path, _), leaf in zip(self.leaves, leaves, strict=True)
        ]
        self.frame = Frame()
        consts = [self.run.constant(const) for const in self.closed.consts]
        pass_over = _Pass(self.run, compute, notice, lift)
        self.outputs = pass_over.evaluate(self.closed.jaxpr, consts, self.arguments, None, self.frame)
        return self.frame

    def flow(self) -> Flow:
        """Which nodes lead where, as `pass_of` wants them."""
        return flow_of(self.run.nodes, [value.node for value in self.outputs])

    def kept(self, meaning: Axes) -> tuple[tuple[int, ...], tuple[Dimension, ...]]:
        """The factors of a value's axes that stand for time and for examples, and what they stand for."""
        times, found = self.run.times.looped(), {}
        for number, factor in enumerate(factor for axis in meaning.axes for factor in axis):
            kind = EXAMPLE if factor.name in self.run.examples else TIME if factor.name in times else ''
            if kind and kind not in found:
                found[kind] = number, Dimension(kind, tuple(factor.at(p) for p in range(factor.size)))
        ordered = sorted(found.values())
        return tuple(number for number, _ in ordered), tuple(dimension for _, dimension in ordered)

    def _argument(self, path: str, array: Any) -> Value:
        node = Node(0, None, None, (), Bad())
        node.input, node.is_model = path, not is_data(path)
        return Value(array, _meaning(path, jax.tree.leaves(array)[0]), node)


class _Pass:
    """One time that a step is traced."""

    def __init__(self, run: Run, compute: Compute, notice: Notice, lift: Lift):
        self.run, self.compute, self.notice, self.lift = run, compute, notice, lift

    def evaluate(
        self,
        jaxpr: Any,
        consts: Sequence[Value],
        arguments: Sequence[Value],
        place: Place | None,
        frame: Frame,
    ) -> list[Value]:
        values: dict[Any, Value] = dict(zip(jaxpr.constvars, consts, strict=True))
        values |= zip(jaxpr.invars, arguments, strict=True)
        for equation in jaxpr.eqns:
            operands = [self.run.read(values, variable) for variable in equation.invars]
            values |= zip(equation.outvars, self._equation(equation, operands, place, frame), strict=True)
        return [self.run.read(values, variable) for variable in jaxpr.outvars]

    def _equation(
        self, equation: Any, operands: Sequence[Value], place: Place | None, frame: Frame
    ) -> list[Value]:
        self.run.count += 1
        match holds(equation):
            case 'call':
                held = inner(equation)
                assert held is not None
                consts = [self.run.constant(const) for const in held[1]]
                return self.evaluate(held[0], consts, operands, Place(equation, None, place), frame)
            case 'scan':
                return self._scan(equation, operands, place, frame)
        arrays = self.compute(equation, [operand.array for operand in operands])
        late = not is_backward(equation, place)
        meanings = self.run.follow(equation, equation.params, [operand.axes for operand in operands], late)
        parents = tuple(operand.node for operand in operands)
        made = []
        for array, meaning in zip(arrays, meanings, strict=True):
            node = self.run.node(equation, place, parents, Bad())
            made.append(self._add(Value(array, meaning, node), frame))
            if equation.primitive.name not in MOVERS or is_clip(node):
                self._observe(made[-1], frame)
        return made

    def _scan(
        self, equation: Any, operands: Sequence[Value], place: Place | None, frame: Frame
    ) -> list[Value]:
        """The loop again, with what is noticed in each iteration among its outputs."""
        params, body = equation.params, equation.params['jaxpr']
        consts, carried = scan_counts(params)
        late = not is_backward(equation, place)
        inside, over = self.run.inside_scan(equation, [operand.axes for operand in operands], late)
        within = Place(equation, None, place)
        operands = [operand._replace(array=self.lift(operand.array)) for operand in operands]
        held = [self.run.constant(const) for const in body.consts]
        begin = [self.run.node(equation, within, (operand.node,), Bad()) for operand in operands[consts:]]
        nodes = [
            *(operand.node for operand in operands[:consts]),
            *begin[:carried],
            *(operand.node for operand in operands[consts + carried :]),
        ]
        traced: list[Any] = []

        def step(carry: Sequence[Any], xs: Sequence[Any]) -> tuple[list[Any], tuple[list[Any], list[Any]]]:
            within_loop = Frame()
            arrays = [*(operand.array for operand in operands[:consts]), *carry, *xs]
            arguments = [Value(*of_each) for of_each in zip(arrays, inside, nodes, strict=True)]
            made = self.evaluate(body.jaxpr, held, arguments, within, within_loop)
            for value in made[:carried]:
                self._observe(value, within_loop, carried=True)
            traced[:] = [within_loop, made]  # lax.scan may trace twice; the last counts
            outputs = [value.array for value in made]
            return outputs[:carried], (outputs[carried:], within_loop.measured)

        start = [
            jax.tree.map(lambda x, v=variable: _as_strong(x, v), operand.array)
            for operand, variable in zip(
                operands[consts : consts + carried], body.jaxpr.invars[consts : consts + carried], strict=True
            )
        ]
        xs = [operand.array for operand in operands[consts + carried :]]
        last, (stacked, measured) = lax.scan(
            step, start, xs, length=params['length'], reverse=params['reverse']
        )
        within_loop, made = traced
        self._take_in(within_loop, measured, self._loop_dimension(over, params['length']), frame)
        ends = [value.node for value in made[:carried]]
        frame.carried += [
            Carried(b, e, params['reverse']) for b, e in zip(begin[:carried], ends, strict=True)
        ]
        meanings = [value.axes for value in made[:carried]]
        over = over or (Factor('', params['length']),)
        meanings += [axes.stacked(value.axes, over) for value in made[carried:]]
        results = []
        for array, meaning, value in zip([*last, *stacked], meanings, made, strict=True):
            # Later iterations are made of what was carried.
            node = self.run.node(equation, place, (value.node, *ends), Bad())
            results.append(self._add(Value(array, meaning, node), frame))
        return results

    def _take_in(self, loop: Frame, measured: Sequence[Any], over: Dimension, frame: Frame) -> None:
        frame.shapes |= loop.shapes
        frame.carried += loop.carried
        frame.observed += [one._replace(dimensions=(over, *one.dimensions)) for one in loop.observed]
        frame.measured += measured

    def _loop_dimension(self, over: Any, length: int) -> Dimension:
        if over and len(over) == 1 and over[0].name in self.run.times.looped():
            return Dimension(TIME, tuple(over[0].at(place) for place in range(length)))
        return Dimension(ITERATION, tuple(range(length)))

    def _add(self, value: Value, frame: Frame) -> Value:
        frame.arrays[value.node] = value.array
        frame.shapes[value.node] = value.axes.shape
        return value

    def _observe(self, value: Value, frame: Frame, *, carried: bool = False) -> None:
        noticed = self.notice(value, carried)
        if noticed is not None:
            frame.observed.append(ProbePoint(value.node, noticed.dimensions, carried, noticed.about))
            frame.measured.append(noticed.measured)


def is_data(path: str) -> bool:
    """Whether a leaf is of the batch."""
    return path.split('/')[0] == 'batch'


def is_record(path: str) -> bool:
    """Whether an output is a record."""
    return path.split('/')[0] == 'record'


def is_clip(node: Node) -> bool:
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


def _meaning(path: str, leaf: Any) -> Axes:
    return axes.named(path, np.shape(leaf)) if is_data(path) else axes.unknown(np.shape(leaf))


def _as_strong(x: Any, variable: Any) -> Any:
    """What a loop starts with, of no weaker type than what it hands on, and as wide as it came."""
    dtype = getattr(x, 'dtype', variable.aval.dtype)
    if jax.dtypes.issubdtype(dtype, jax.dtypes.prng_key):
        return x
    return lax.convert_element_type(x, dtype)
