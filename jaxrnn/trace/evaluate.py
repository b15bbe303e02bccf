"""The evaluation: equation by equation, each computed whole, and opened where something bad comes out of it."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core

from jaxrnn.trace import axes
from jaxrnn.trace.culprits import Recomputation, found_out
from jaxrnn.trace.devices import Devices, Layout
from jaxrnn.trace.equations import holds, inner, last_uses, parents_of, scan_counts
from jaxrnn.trace.findings import TraceReport
from jaxrnn.trace.judging import Judge
from jaxrnn.trace.meaning import AxisMeaning
from jaxrnn.trace.reporting import report
from jaxrnn.trace.sharded import entered
from jaxrnn.trace.tracing import Argument, TracedFunction, traced
from jaxrnn.trace.values import (
    Bad,
    Node,
    Place,
    Tape,
    Value,
    badness,
    constant,
    inherited,
    is_backward,
    is_float,
    read,
)
from jaxrnn.types import Tree


def first_bad(
    function: Callable[..., Tree],
    *arguments: Tree,
    names: Sequence[str] = ('state', 'batch'),
    example_axes: Tree = None,
) -> TraceReport:
    """Evaluates `function(*arguments)` and finds where its first NaN or infinity was born.

    Args:
        function: anything JAX can trace, jitted or not; called once, abstractly.
        *arguments: trees of arrays.
        names: of the arguments. The leaves of the last are the data; those of the others are the model's.
        example_axes: for each leaf of the last argument, which of its axes runs over the examples, -1 for none; if not
            given, that whose length all its leaves share.

    Returns:
        The finding, and what was bad but harmless.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxrnn import trace
        >>> def loss_of(weight, inputs):
        ...     return jnp.sum(jnp.log(weight * inputs))
        >>> finding = trace.first_bad(loss_of, jnp.float32(2), jnp.array([1.0, 0.0, 3.0])).finding
        >>> finding.op, finding.kind, finding.pass_, finding.examples
        ('log', 'division by zero', 'forward', (1,))
        >>> finding.results[0].infinities
        1
    """
    traced_function = traced(function, arguments, names, example_axes)
    evaluation = Evaluation(traced_function.examples)
    values = [evaluation.argument(argument) for argument in traced_function.arguments]
    outputs = evaluation.evaluate_closed(traced_function.closed, values, None)
    return report(
        evaluation.tape,
        evaluation.judge.born,
        [value.node for value in outputs],
        evaluation.meaning.times,
        traced_function.examples,
        lambda node: _culprits(node, evaluation, traced_function, values),
    )


def _culprits(
    node: Node, evaluation: 'Evaluation', function: TracedFunction, values: Sequence[Value]
) -> tuple[int, ...] | None:
    """The examples that a value is bad by, found out by replacing them; None if only its axes can say."""
    assert node.birth is not None
    named = {at for place in node.birth.places for at in place.items()}
    claimed = sorted({place for name, place in named if name in function.examples})
    again = Recomputation(evaluation.devices, function.closed, node)
    axes_of = [argument.example_axis(function.examples) for argument in function.arguments]
    return found_out(again, [value.array for value in values], axes_of, claimed)


class Evaluation:
    """One evaluation of a function.

    Args:
        examples: names of the axes that run over examples.
    """

    def __init__(self, examples: set[str]):
        self.devices = Devices()
        self.meaning = AxisMeaning(self.devices)
        self.judge = Judge(self.devices, examples)
        self.tape = Tape()

    def argument(self, argument: Argument) -> Value:
        # What float32 can't hold is in the report, so NumPy need not warn of it.
        with np.errstate(over='ignore', invalid='ignore'):
            array = argument.leaf if isinstance(argument.leaf, jax.Array) else jnp.asarray(argument.leaf)
        self.devices.add_mesh_of(array)
        self.meaning.times.add_sizes(argument.path, array.shape)
        value = Value(array, argument.axes, argument.node(badness(array)))
        if value.node.is_model and is_float(array):
            value.node.shape = array.shape
        if value.node.bad:
            self.judge.argument(value)
        return value

    def evaluate_closed(self, closed: Any, arguments: Sequence[Value], place: Place | None) -> list[Value]:
        """The outputs of a closed jaxpr."""
        return self.evaluate(closed.jaxpr, closed.consts, arguments, place)

    def evaluate(
        self, jaxpr: Any, consts: Sequence[Any], arguments: Sequence[Value], place: Place | None
    ) -> list[Value]:
        """The outputs of a jaxpr."""
        held = [self._constant(const) for const in consts]
        values: dict[Any, Value] = dict(zip(jaxpr.constvars, held, strict=True))
        values |= zip(jaxpr.invars, arguments, strict=True)
        last = last_uses(jaxpr)
        for number, equation in enumerate(jaxpr.eqns):
            operands = [read(values, variable) for variable in equation.invars]
            results = self._equation(equation, operands, place)
            values |= zip(equation.outvars, results, strict=True)
            for variable in last.get(number, ()):
                values.pop(variable, None)
        return [read(values, variable) for variable in jaxpr.outvars]

    def _constant(self, array: Any) -> Value:
        return constant(array)._replace(array=self.devices.layout.spread(array))

    def _equation(self, equation: Any, operands: Sequence[Value], place: Place | None) -> list[Value]:
        """Its results, computed whole; opened if they are bad."""
        given = [
            o.array for v, o in zip(equation.invars, operands, strict=True) if not isinstance(v, core.Literal)
        ]
        arrays = self.devices.function_of(equation)(*given)
        meanings = self.meaning.of_results(equation, operands, place)
        nodes = self._nodes(equation, place, operands, [badness(array) for array in arrays])
        results = [Value(*of_each) for of_each in zip(arrays, meanings, nodes, strict=True)]
        if not any(node.bad for node in nodes):
            return results
        inside = self._open(equation, operands, place)
        if inside is None:
            self.judge.equation(equation, operands, results)
            return results
        # An output that is bad though no iteration made it so keeps its own node.
        results = [
            result._replace(node=node) if node is not None and node.bad and result.node.bad else result
            for result, node in zip(results, inside, strict=True)
        ]
        if not any(result.node.bad and result.node.equation is not equation for result in results):
            self.judge.unexplained(equation, operands, results)
        return results

    def _nodes(
        self, equation: Any, place: Place | None, operands: Sequence[Value], bads: Sequence[Bad]
    ) -> list[Node]:
        """Of the results of an equation, of which it is known how bad they are."""
        self.tape.equations += 1
        parents = parents_of(equation, [operand.node for operand in operands])
        return [self.tape.add(equation, place, of, bad) for of, bad in zip(parents, bads, strict=True)]

    # Opening: the nodes of an equation's results as its insides made them; None if there is nothing inside.

    def _open(
        self, equation: Any, operands: Sequence[Value], place: Place | None
    ) -> Sequence[Node | None] | None:
        match holds(equation):
            case 'call':
                inside = inner(equation)
                assert inside is not None
                made = self.evaluate(*inside, operands, Place(equation, None, place))
                return [value.node for value in made]
            case 'scan':
                return self._open_scan(equation, operands, place)
            case 'while':
                return self._open_while(equation, operands, place)
            case 'cond':
                return self._open_cond(equation, operands, place)
            case 'shard_map':
                return self._open_shards(equation, operands, place)
        return None

    def _open_shards(
        self, equation: Any, operands: Sequence[Value], place: Place | None
    ) -> Sequence[Node] | None:
        params, layout = equation.params, self.devices.layout_of(equation)
        if layout is None or self.devices.layout.names:
            return None
        given = [
            Value(layout.split(value.array, spec), entered(value.axes, spec, layout), value.node)
            for value, spec in zip(operands, params['in_specs'], strict=True)
        ]
        with self.devices.within(layout):
            made = self.evaluate(params['jaxpr'], (), given, Place(equation, None, place))
        return [value.node for value in made]

    def _open_cond(self, equation: Any, operands: Sequence[Value], place: Place | None) -> Sequence[Node]:
        branches, layout = equation.params['branches'], self.devices.layout
        chosen = np.clip(np.asarray(operands[0].array, int), 0, len(branches) - 1)
        chosen = np.broadcast_to(chosen, layout.sizes)
        nodes: list[Node] = []
        for number in np.unique(chosen[layout.where(True)]):
            with self.devices.only_where(chosen == number) as taking_it:
                given = [taking_it.fill(operand) for operand in operands[1:]]
                made = self.evaluate_closed(branches[int(number)], given, Place(equation, None, place))
            # Where devices take different branches, the first that is bad stands for all.
            old = nodes or [value.node for value in made]
            nodes = [b.node if b.node.bad and not a.bad else a for a, b in zip(old, made, strict=True)]
        return nodes

    def _open_scan(
        self, equation: Any, operands: Sequence[Value], place: Place | None
    ) -> Sequence[Node | None]:
        params = equation.params
        (consts, carried), length = scan_counts(params), params['length']
        fixed, carry = operands[:consts], list(operands[consts : consts + carried])
        over = self.meaning.times.over(equation)
        found: list[Node | None] = [None] * len(equation.outvars)
        for i in range(length)[::-1] if params['reverse'] else range(length):
            xs = [_at(x, i, self.devices.layout) for x in operands[consts + carried :]]
            # What is carried belongs to the iteration at hand, in whichever direction the loop runs.
            carry = [value._replace(axes=axes.unfixed(value.axes, over)) for value in carry]
            made = self._iterate(params['jaxpr'], [*fixed, *carry, *xs], Place(equation, i, place), found)
            carry = made[:carried]
            found[:carried] = [value.node for value in carry]
        return found

    def _open_while(
        self, equation: Any, operands: Sequence[Value], place: Place | None
    ) -> Sequence[Node | None]:
        params, layout = equation.params, self.devices.layout
        of_condition, of_both = params['cond_nconsts'], params['cond_nconsts'] + params['body_nconsts']
        asked, fixed, carry = (
            operands[:of_condition],
            operands[of_condition:of_both],
            list(operands[of_both:]),
        )
        found: list[Node | None] = [None] * len(carry)
        condition = self.devices.compiled(params['cond_jaxpr'])
        i = 0
        while (going := layout.where(condition(*(v.array for v in (*asked, *carry)))[0])).any():
            with self.devices.only_where(going) as going_on:
                given = [going_on.fill(value) for value in (*fixed, *carry)]
                made = self._iterate(params['body_jaxpr'], given, Place(equation, i, place), found)
            carry = [going_on.merge(new, old) for new, old in zip(made, carry, strict=True)]
            found[:] = [value.node for value in carry]
            i += 1
        return found

    def _iterate(
        self, body: Any, operands: Sequence[Value], place: Place, found: list[Node | None]
    ) -> list[Value]:
        """One iteration: whole, and opened if a result is bad that was not bad before."""
        arrays = self.devices.compiled(body)(*(operand.array for operand in operands))
        bads = [badness(array) for array in arrays]
        if any(_bad(old).also(bad) for old, bad in zip(found, bads, strict=True)):
            made = self.evaluate_closed(body, operands, place)
            for n, value in enumerate(made):
                if value.node.bad and not _bad(found[n]):
                    found[n] = value.node
            return made
        late = not is_backward(place.equation, place.outer)
        meanings = self.meaning.through(body.jaxpr, [operand.axes for operand in operands], late)
        nodes = self._nodes(place.equation, place, operands, bads)
        for node, old in zip(nodes, found, strict=True):
            if node.bad and old is not None:  # as it was an iteration before
                node.causes = inherited([old], node.bad)
        return [Value(*of_each) for of_each in zip(arrays, meanings, nodes, strict=True)]


def _bad(node: Node | None) -> Bad:
    return Bad() if node is None else node.bad


def _at(x: Value, i: int, layout: Layout) -> Value:
    """x[i], which may be finite where x is bad elsewhere."""
    array, node = layout.take(x.array, i), x.node
    if node.bad and (bad := badness(array)) != node.bad:
        node = Node(node.order, node.equation, node.place, (x.node,) if x.node.parents else (), bad)
        node.input, node.is_model, node.causes = x.node.input, x.node.is_model, inherited([x.node], bad)
    return Value(array, axes.along(x.axes, i), node)
