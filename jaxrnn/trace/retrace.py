"""A jaxpr traced once more into one compiled function, with its loops, that also returns measurements of its values.

Two modules use it, and say what is computed for an equation and what is measured of a result: `measure` measures how
large results are, `float64` computes each twice.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
from jax import lax

from jaxrnn.trace import axes
from jaxrnn.trace.axes import Axes, Axis, Factor
from jaxrnn.trace.births import MOVERS
from jaxrnn.trace.devices import Devices
from jaxrnn.trace.equations import holds, inner, parents_of, scan_counts
from jaxrnn.trace.meaning import AxisMeaning
from jaxrnn.trace.naming import Flow, flow_of
from jaxrnn.trace.tracing import named_leaves, traced
from jaxrnn.trace.values import Bad, Node, Place, Tape, Value, constant, is_backward, read
from jaxrnn.types import Step, Tree

TIME, EXAMPLE, ITERATION = 'time', 'example', 'iteration'


class Dimension(NamedTuple):
    """An axis of a measurement."""

    kind: str  # TIME, EXAMPLE, or ITERATION of a loop that isn't over time
    places: tuple[int, ...]


class ProbePoint(NamedTuple):
    """A value of the step that is measured: what is known of it when the step is traced."""

    node: Node
    dimensions: tuple[Dimension, ...]  # of the measurement
    carried: bool  # whether a loop carries the value from one iteration to the next
    about: Any = None  # whatever the module that measures wants to know of it


class Carried(NamedTuple):
    """What a loop carries: the value that an iteration begins with, and the one that it hands on."""

    begin: Node
    end: Node
    reverse: bool


class Frame:
    """What is known so far of one body, that of the step or of a loop."""

    def __init__(self) -> None:
        self.probe_points: list[ProbePoint] = []
        self.measured: list[Any] = []
        self.arrays: dict[Node, Any] = {}
        self.shapes: dict[Node, tuple[int, ...]] = {}  # in the loops within it, too
        self.carried: list[Carried] = []  # in the loops within it, too


class Measurement(NamedTuple):
    """What is measured of one value."""

    dimensions: tuple[Dimension, ...]
    about: Any  # as in ProbePoint
    measured: Any  # arrays, which the compiled function returns


Compute = Callable[[Any, Sequence[Any]], Sequence[Any]]
"""An equation and its operands, literals too -> its results."""

Lift = Callable[[Any], Any]
"""A literal or an array -> what is carried through loops in its place."""

Measure = Callable[[Value, bool], Measurement | None]
"""A value, and whether a loop carries it -> what is measured of it."""


class TracedStep:
    """A train step, traced for arguments of one shape.

    Args:
        step: `(state, batch) -> (state, record)`.
        state, batch: of the shapes that it will be given.
        example_axes: as in `first_bad`.
    """

    def __init__(self, step: Step, state: Tree, batch: Tree, *, example_axes: Tree = None):
        function = traced(step, (state, batch), ('state', 'batch'), example_axes)
        self.closed, self.leaves, self.examples = function.closed, function.arguments, function.examples
        self.devices = Devices()
        self.meaning = AxisMeaning(self.devices)
        # So it is known, before any loop is traced, which axes loops run over.
        self.meaning.through(self.closed.jaxpr, [leaf.axes for leaf in self.leaves], late=True)
        self.tape = Tape()
        self.frame = Frame()
        self.arguments: list[Value] = []
        self.outputs: list[Value] = []
        self.out_paths = [path for path, _ in named_leaves(function.outputs, ('state', 'record'))]

    def trace(
        self, arrays: Sequence[Any], compute: Compute, measure: Measure, lift: Lift = lambda array: array
    ) -> Frame:
        """Traces the step for these leaves. Tape, arguments, outputs and frame are then those of this time."""
        self.tape, self.frame = Tape(), Frame()
        self.arguments = [
            Value(array, leaf.axes, leaf.node(Bad())) for leaf, array in zip(self.leaves, arrays, strict=True)
        ]
        pass_over = _Pass(self.tape, self.meaning, compute, measure, lift)
        self.outputs = pass_over.evaluate(
            self.closed.jaxpr, self.closed.consts, self.arguments, None, self.frame
        )
        return self.frame

    def flow(self) -> Flow:
        """Which nodes lead where, as `pass_of` needs it."""
        return flow_of(self.tape.nodes, [value.node for value in self.outputs])

    def kept(self, meaning: Axes) -> tuple[tuple[int, ...], tuple[Dimension, ...]]:
        """Which factors of a value's axes run over time and over examples, and these axes as dimensions."""
        times, found = self.meaning.times.looped(), {}
        for number, factor in enumerate(factor for axis in meaning.axes for factor in axis):
            kind = EXAMPLE if factor.name in self.examples else TIME if factor.name in times else ''
            if kind and kind not in found:
                found[kind] = number, Dimension(kind, tuple(factor.at(p) for p in range(factor.size)))
        ordered = sorted(found.values())
        return tuple(number for number, _ in ordered), tuple(dimension for _, dimension in ordered)


class _Pass:
    """One time that a step is traced."""

    def __init__(self, tape: Tape, meaning: AxisMeaning, compute: Compute, measure: Measure, lift: Lift):
        self.tape, self.meaning = tape, meaning
        self.compute, self.measure, self.lift = compute, measure, lift

    def evaluate(
        self,
        jaxpr: Any,
        consts: Sequence[Any],
        arguments: Sequence[Value],
        place: Place | None,
        frame: Frame,
    ) -> list[Value]:
        values: dict[Any, Value] = dict(zip(jaxpr.constvars, map(constant, consts), strict=True))
        values |= zip(jaxpr.invars, arguments, strict=True)
        for equation in jaxpr.eqns:
            operands = [read(values, variable) for variable in equation.invars]
            values |= zip(equation.outvars, self._equation(equation, operands, place, frame), strict=True)
        return [read(values, variable) for variable in jaxpr.outvars]

    def _equation(
        self, equation: Any, operands: Sequence[Value], place: Place | None, frame: Frame
    ) -> list[Value]:
        self.tape.equations += 1
        match holds(equation):
            case 'call':
                held = inner(equation)
                assert held is not None
                return self.evaluate(*held, operands, Place(equation, None, place), frame)
            case 'scan':
                return self._scan(equation, operands, place, frame)
        arrays = self.compute(equation, [operand.array for operand in operands])
        late = not is_backward(equation, place)
        meanings = self.meaning.follow(
            equation, equation.params, [operand.axes for operand in operands], late
        )
        parents = parents_of(equation, [operand.node for operand in operands])
        made = []
        for array, meaning, of in zip(arrays, meanings, parents, strict=True):
            node = self.tape.add(equation, place, of, Bad())
            made.append(self._add(Value(array, meaning, node), frame))
            if equation.primitive.name not in MOVERS or is_clip(node):
                self._observe(made[-1], frame)
        return made

    def _scan(
        self, equation: Any, operands: Sequence[Value], place: Place | None, frame: Frame
    ) -> list[Value]:
        """The loop again, with what is measured in each iteration among its outputs."""
        params, body = equation.params, equation.params['jaxpr']
        consts, carried = scan_counts(params)
        late = not is_backward(equation, place)
        inside, over = self.meaning.inside_scan(equation, [operand.axes for operand in operands], late)
        within = Place(equation, None, place)
        operands = [operand._replace(array=self.lift(operand.array)) for operand in operands]
        begin = [self.tape.add(equation, within, (operand.node,), Bad()) for operand in operands[consts:]]
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
            made = self.evaluate(body.jaxpr, body.consts, arguments, within, within_loop)
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
            # Later iterations are computed from what was carried.
            node = self.tape.add(equation, place, (value.node, *ends), Bad())
            results.append(self._add(Value(array, meaning, node), frame))
        return results

    def _take_in(self, loop: Frame, measured: Sequence[Any], over: Dimension, frame: Frame) -> None:
        frame.shapes |= loop.shapes
        frame.carried += loop.carried
        frame.probe_points += [one._replace(dimensions=(over, *one.dimensions)) for one in loop.probe_points]
        frame.measured += measured

    def _loop_dimension(self, over: Axis | None, length: int) -> Dimension:
        if over and len(over) == 1 and over[0].name in self.meaning.times.looped():
            return Dimension(TIME, tuple(over[0].at(place) for place in range(length)))
        return Dimension(ITERATION, tuple(range(length)))

    def _add(self, value: Value, frame: Frame) -> Value:
        frame.arrays[value.node] = value.array
        frame.shapes[value.node] = value.axes.shape
        return value

    def _observe(self, value: Value, frame: Frame, *, carried: bool = False) -> None:
        found = self.measure(value, carried)
        if found is not None:
            frame.probe_points.append(ProbePoint(value.node, found.dimensions, carried, found.about))
            frame.measured.append(found.measured)


def is_data(path: str) -> bool:
    """Whether a leaf is of the batch."""
    return path.split('/')[0] == 'batch'


def is_record(path: str) -> bool:
    """Whether an output is a record."""
    return path.split('/')[0] == 'record'


def is_clip(node: Node) -> bool:
    """Whether a value is clip(x, 0, 1), which is how a hard sigmoid ends."""
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


def _as_strong(x: Any, variable: Any) -> Any:
    """What a loop starts with, without a weak type, as what it hands on has none. Its precision stays."""
    dtype = getattr(x, 'dtype', variable.aval.dtype)
    if jax.dtypes.issubdtype(dtype, jax.dtypes.prng_key):
        return x
    return lax.convert_element_type(x, dtype)
