"""Where a compiled program has a NaN or an infinity that its own equations, computed one by one, don't have.

The calls in a program are laid out flat, and each equation is computed alone. Then prefixes of the equations are
compiled, each as one program, and halved down to the shortest whose results differ; from the front, too; and what is
left is thinned out. A loop is computed whole, and where it differs iteration by iteration.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core

from jaxrnn.trace.equations import alone, holds, inner, name_of, parents_of, scan_counts
from jaxrnn.trace.findings import Range
from jaxrnn.trace.naming import code_at, flow_of, layer_of, pass_of, source_of
from jaxrnn.trace.tracing import TracedFunction, traced
from jaxrnn.trace.values import Bad, Node, Place, Tape, is_float, range_of
from jaxrnn.types import Tree

THINNED = 32
"""Equations of a piece, at most, of which each is tried to be left out."""

STEP, LOOP, EQUATIONS = 'step', 'loop', 'equations'


class CompiledDifference(NamedTuple):
    """The smallest piece of a program whose compiled form differs from its equations."""

    kind: str  # STEP, the program as a whole and no part of it; LOOP, and none of its iterations; EQUATIONS
    primitives: tuple[str, ...]  # of the piece, in their order; none of STEP
    pass_: str
    source: str  # of the equation whose result differs: file:line of the user's code, else of jaxrnn's
    code: str
    library: str
    layer: str
    iterations: tuple[int, ...]  # of each loop around it
    alone: tuple[Range, ...]  # results of the piece, equation by equation
    compiled: tuple[Range, ...]  # the same results, compiled


def compiled_otherwise(
    function: Callable[..., Tree], *arguments: Tree, names: Sequence[str] = ('state', 'batch')
) -> CompiledDifference | None:
    """Finds the smallest piece of `function` that has a NaN or an infinity only when it is compiled.

    Args:
        function: anything JAX can trace. It is called once, as it is, and must leave its arguments whole.
        *arguments: trees of arrays.
        names: as in `first_bad`.

    Returns:
        The piece; None where the compiled function is as finite as its equations.

    >>> import jax.numpy as jnp
    >>> def distance(x, scale):  # jax-ml/jax#26147: contracted to fma, the difference is not 0
    ...     return jnp.sqrt((x * scale) ** 2 - x**2)
    >>> found = compiled_otherwise(distance, jnp.float32(0.1), jnp.float32(1))
    >>> found is None or 'sqrt' in found.primitives  # as the processor has fma
    True
    """
    whole = traced(function, arguments, names, None)
    program = _flat(whole.closed)
    leaves = [jnp.asarray(argument.leaf) for argument in whole.arguments]
    found = _search(program, leaves)
    if isinstance(found, _Piece):
        return found.named(whole)
    if not found:
        return None
    results = jax.tree.leaves(function(*arguments))
    if not any(_worse(new, old) for new, old in zip(results, found, strict=True)):
        return None
    apart = [(old, new) for old, new in zip(found, results, strict=True) if _worse(new, old)]
    return CompiledDifference(STEP, (), '', '', '', '', '', (), *_ranges(apart))


class _Line(NamedTuple):
    """An equation of a program that is laid out flat; values by number."""

    equation: Any
    place: Place | None
    given: tuple[int, ...]  # operands that are no literals
    results: tuple[int, ...]


class _Program(NamedTuple):
    """A jaxpr whose calls are laid out flat."""

    lines: list[_Line]
    constants: Mapping[int, Any]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]

    def live(self, end: int) -> tuple[int, ...]:
        """What the first lines make and the others, or the outputs, need."""
        made = {number for line in self.lines[:end] for number in line.results}
        needed = {number for line in self.lines[end:] for number in line.given} | set(self.outputs)
        return tuple(sorted(made & needed))


class _Flattener:
    """Numbers the values of a jaxpr, and of the calls within."""

    def __init__(self) -> None:
        self.lines: list[_Line] = []
        self.constants: dict[int, Any] = {}
        self._count = 0

    def new(self) -> int:
        self._count += 1
        return self._count - 1

    def constant(self, value: Any) -> int:
        number = self.new()
        self.constants[number] = jnp.asarray(value) if is_float(value) else value
        return number

    def lay_out(
        self, jaxpr: Any, consts: Sequence[Any], inputs: Sequence[int], place: Place | None
    ) -> list[int]:
        """Numbers of the outputs."""
        known = dict(zip(jaxpr.constvars, map(self.constant, consts), strict=True))
        known |= zip(jaxpr.invars, inputs, strict=True)

        def read(variable: Any) -> int:
            return self.constant(variable.val) if isinstance(variable, core.Literal) else known[variable]

        for equation in jaxpr.eqns:
            held = inner(equation) if holds(equation) == 'call' else None
            if held is not None:
                within = Place(equation, None, place)
                results = self.lay_out(*held, [read(v) for v in equation.invars], within)
            else:
                given = [read(v) for v in equation.invars if not isinstance(v, core.Literal)]
                results = [self.new() for _ in equation.outvars]
                self.lines.append(_Line(equation, place, tuple(given), tuple(results)))
            known |= zip(equation.outvars, results, strict=True)
        return [read(variable) for variable in jaxpr.outvars]


def _flat(closed: Any, place: Place | None = None) -> _Program:
    made = _Flattener()
    inputs = [made.new() for _ in closed.jaxpr.invars]
    outputs = made.lay_out(closed.jaxpr, closed.consts, inputs, place)
    return _Program(made.lines, made.constants, tuple(inputs), tuple(outputs))


class _Piece(NamedTuple):
    """Lines of a program that differ when they are compiled together."""

    lines: Sequence[_Line]
    outputs: tuple[int, ...]
    values: Mapping[int, Any]  # of all lines, each alone
    compiled: Sequence[Any]  # the outputs
    kind: str = EQUATIONS
    expected: Sequence[Any] = ()  # the outputs each alone, where `values` has them otherwise

    def named(self, whole: TracedFunction) -> CompiledDifference:
        last = self.lines[-1]
        node, in_pass = _node_of(last, whole)
        source, library = source_of(last.equation, last.place)
        expected = self.expected or [self.values[number] for number in self.outputs]
        apart = [(old, new) for old, new in zip(expected, self.compiled, strict=True) if _worse(new, old)]
        primitives = tuple(name_of(line.equation) for line in self.lines)
        iterations = tuple(reversed([at.iteration for at in _around(last.place) if at.iteration is not None]))
        layer = layer_of(node, in_pass)
        return CompiledDifference(
            self.kind,
            primitives,
            in_pass,
            source,
            code_at(source),
            library,
            layer,
            iterations,
            *_ranges(apart),
        )


def _search(program: _Program, arguments: Sequence[Any]) -> '_Piece | list[Any]':
    """The smallest piece that differs; where there is none, the outputs, each equation computed alone. No output where
    the equations themselves have what isn't finite."""
    values = dict(program.constants) | dict(zip(program.inputs, arguments, strict=True))
    for line in program.lines:
        given = [values[number] for number in line.given]
        results = alone(line.equation)(*given)
        is_loop = line.equation.primitive.name == 'scan'
        if is_loop and any(map(_is_bad, results)) and not any(map(_is_bad, given)):
            found = _in_loop(line, given, results)
            if found is not None:
                return found
        values |= zip(line.results, results, strict=True)
    trial = _Trial(program, values)
    if not trial.shows(program.lines, program.outputs):
        return [values[number] for number in program.outputs]
    return trial.smallest()


class _Trial:
    """Pieces of a program compiled, and held against the values of their equations."""

    def __init__(self, program: _Program, values: Mapping[int, Any]):
        self.program, self.values = program, values

    def compiled(self, lines: Sequence[_Line], outputs: Sequence[int]) -> list[Any]:
        """The outputs of some lines, compiled together. What they need of others they get as it is alone."""
        made = {number for line in lines for number in line.results}
        needed = sorted({number for line in lines for number in line.given} - made)

        def piece(*given: Any) -> list[Any]:
            known = dict(zip(needed, given, strict=True))
            for line in lines:
                known |= zip(line.results, alone(line.equation)(*(known[n] for n in line.given)), strict=True)
            return [known[number] for number in outputs]

        return list(jax.jit(piece)(*(self.values[number] for number in needed)))

    def shows(self, lines: Sequence[_Line], outputs: Sequence[int]) -> bool:
        """Whether something isn't finite that is finite alone."""
        made = {number for line in lines for number in line.results}
        asked = [number for number in outputs if number in made and is_float(self.values[number])]
        return bool(asked) and any(
            _worse(new, self.values[number])
            for number, new in zip(asked, self.compiled(lines, asked), strict=True)
        )

    def smallest(self) -> _Piece:
        lines = self.program.lines
        end = _first(len(lines), lambda n: self.shows(lines[:n], self.program.live(n)))
        outputs: tuple[int, ...] = lines[end - 1].results
        if not self.shows(lines[:end], outputs):
            outputs = self.program.live(end)
        start = end - _first(end, lambda n: self.shows(lines[end - n : end], outputs))
        piece = _feeding(lines[start:end], outputs)
        if len(piece) <= THINNED:
            for line in piece[:-1]:
                fewer = [one for one in piece if one is not line]
                if self.shows(fewer, outputs):
                    piece = fewer
        made = {number for line in piece for number in line.results}
        outputs = tuple(number for number in outputs if number in made and is_float(self.values[number]))
        return _Piece(piece, outputs, self.values, self.compiled(piece, outputs))


def _first(most: int, shows: Callable[[int], bool]) -> int:
    """The least number up to `most`, of which it is known that it shows, that does; by halving."""
    low, high = 0, most
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if shows(middle) else (middle, high)
    return high


def _feeding(lines: Sequence[_Line], outputs: Sequence[int]) -> list[_Line]:
    """The lines that the outputs come from."""
    needed, found = set(outputs), []
    for line in reversed(lines):
        if needed & set(line.results):
            needed |= set(line.given)
            found.append(line)
    return found[::-1]


def _in_loop(line: _Line, operands: Sequence[Any], results: Sequence[Any]) -> _Piece | None:
    """The piece of a scan that has what isn't finite only when it is compiled: within an iteration, else the loop."""
    params = line.equation.params
    (consts, carried), length = scan_counts(params), params['length']
    given = iter(operands)
    all_of = [v.val if isinstance(v, core.Literal) else next(given) for v in line.equation.invars]
    fixed, carry, over = all_of[:consts], all_of[consts : consts + carried], all_of[consts + carried :]
    made: list[Sequence[Any]] = []
    for i in range(length)[::-1] if params['reverse'] else range(length):
        program = _flat(params['jaxpr'], Place(line.equation, i, line.place))
        found = _search(program, [*fixed, *carry, *(x[i] for x in over)])
        if isinstance(found, _Piece):
            return found
        if any(map(_is_bad, found)):
            return None
        carry = found[:carried]
        made.append(found[carried:])
    stacked = [jnp.stack(each) for each in zip(*(made[::-1] if params['reverse'] else made), strict=True)]
    return _Piece([line], line.results, {}, results, LOOP, [*carry, *stacked])


def _node_of(last: _Line, whole: TracedFunction) -> tuple[Node, str]:
    """The node of a line in the whole program, of which pass and layer are known."""
    outer = [at.equation for at in _around(last.place) if at.iteration is not None]
    sought = outer[-1] if outer else last.equation
    program, tape = _flat(whole.closed), Tape()
    nodes: dict[int, Node] = dict(
        zip(program.inputs, [argument.node(Bad()) for argument in whole.arguments], strict=True)
    )
    nodes |= {number: Node(0, None, None, (), Bad()) for number in program.constants}
    found = None
    for line in program.lines:
        tape.equations += 1
        parents = parents_of(line.equation, [nodes[number] for number in line.given])
        for number, of in zip(line.results, parents, strict=True):
            nodes[number] = tape.add(line.equation, line.place, of, Bad())
        if line.equation is sought:
            found = nodes[line.results[0]]
    assert found is not None
    flow = flow_of(tape.nodes, [nodes[number] for number in program.outputs])
    return found, pass_of(found, flow)


def _around(place: Place | None) -> Iterator[Place]:
    while place is not None:
        yield place
        place = place.outer


def _is_bad(value: Any) -> bool:
    return is_float(value) and not bool(np.isfinite(np.asarray(value)).all())


def _worse(new: Any, old: Any) -> bool:
    """Whether an element isn't finite that was."""
    return is_float(old) and bool((~np.isfinite(np.asarray(new)) & np.isfinite(np.asarray(old))).any())


def _ranges(apart: Sequence[tuple[Any, Any]]) -> tuple[tuple[Range, ...], tuple[Range, ...]]:
    return (
        tuple(range_of('alone', old) for old, _ in apart),
        tuple(range_of('compiled', new) for _, new in apart),
    )
