"""The evaluation: equation by equation, each whole, and opened where something bad comes out of it."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core

from jaxrnn import axes
from jaxrnn.axes import Axes
from jaxrnn.trace.births import MOST_PLACES, discarded, is_meant, kind_of, largest, new_elements
from jaxrnn.trace.equations import alone, holds, inner, last_uses, scan_counts
from jaxrnn.trace.findings import LEAK, MOST_EXAMPLES, WRITTEN, Finding, Story
from jaxrnn.trace.naming import Flow, chain, code_at, flow_of, layer_of, marked, origin, pass_of, source_of
from jaxrnn.trace.times import Times
from jaxrnn.trace.values import (
    Bad,
    Birth,
    Node,
    Place,
    Value,
    ancestors,
    is_backward,
    is_float,
    is_key,
    look,
    outwards,
    range_of,
)
from jaxrnn.types import Tree


def first_bad(
    function: Callable[..., Tree],
    *arguments: Tree,
    names: Sequence[str] = ('state', 'batch'),
    example_axes: Tree = None,
) -> Story:
    """Evaluates `function(*arguments)` and tells where its first NaN or infinity was born.

    Args:
        function: anything JAX can trace, jitted or not; called once, abstractly.
        *arguments: trees of arrays.
        names: of the arguments. The leaves of the last are the data; those of the others are the model's.
        example_axes: for each leaf of the last argument, which of its axes runs over the examples, -1 for none; if not
            given, that whose length all its leaves share.

    Returns:
        The finding, and what was bad but harmless.
    """
    with marked():
        closed = jax.make_jaxpr(function)(*arguments)
    run = Run()
    leaves = _leaves(arguments, names)
    data = f'{names[len(arguments) - 1]}'
    run.examples = _example_names([pair for pair in leaves if pair[0].split('/')[0] == data], example_axes)
    values = [run.argument(path, leaf, is_data=path.split('/')[0] == data) for path, leaf in leaves]
    consts = [run.constant(const) for const in closed.consts]
    outputs = run.evaluate(closed.jaxpr, consts, values, None)
    return run.story([value.node for value in outputs])


def _turn(node: Node, flow: Flow) -> tuple[bool, bool, int]:
    """The first of what was born bad sorts lowest."""
    # A where may have left what is written down, though what it took went bad.
    is_written = node.birth is not None and node.birth.kind == WRITTEN
    # JAX puts what the backward pass will need between the equations of the forward pass.
    return is_written, pass_of(node, flow) in ('backward', 'update'), node.order


def _leaves(arguments: Sequence[Tree], names: Sequence[str]) -> list[tuple[str, Any]]:
    found = []
    for name, argument in zip(names, arguments, strict=False):
        for path, leaf in jax.tree_util.tree_leaves_with_path(argument):
            within = jax.tree_util.keystr(path, simple=True, separator='/')
            found.append((f'{name}/{within}' if within else name, leaf))
    return found


def _example_names(data: Sequence[tuple[str, Any]], example_axes: Tree) -> set[str]:
    """The names of the axes that run over examples."""
    shapes = [np.shape(leaf) for _, leaf in data]
    if example_axes is not None:
        chosen = jax.tree.leaves(example_axes)
        return {f'{path}:{n}' for (path, _), n in zip(data, chosen, strict=True) if n >= 0}
    sizes = [set(shape) for shape in shapes if shape]
    shared = set.intersection(*sizes) if sizes else set()
    # Of several, that which leads most leaves.
    leading = [shape[0] for shape in shapes if shape]
    size = max(shared, key=lambda size: (leading.count(size), size), default=None)
    return {
        f'{path}:{shape.index(size)}' for (path, _), shape in zip(data, shapes, strict=True) if size in shape
    }


class Run:
    """One evaluation."""

    def __init__(self) -> None:
        self.count = 0
        self.examples: set[str] = set()
        self.times = Times()
        self.born: list[Node] = []
        self.nodes: list[Node] = []  # of equations
        self.compiled: dict[int, tuple[Any, Callable]] = {}  # by the identity of the jaxpr, which is kept
        self.equations: dict[int, tuple[Any, Callable]] = {}

    def argument(self, path: str, array: Any, *, is_data: bool) -> Value:
        with np.errstate(
            over='ignore', invalid='ignore'
        ):  # what float32 can't hold is to be found, not warned of
            array = array if isinstance(array, jax.Array) else jnp.asarray(array)
        node = Node(0, None, None, (), Bad() if is_key(array) else look(array))
        node.input, node.is_model = path, not is_data
        if node.is_model and is_float(array):
            node.shape = array.shape
        meaning = axes.named(path, array.shape) if is_data else axes.unknown(array.shape)
        self.times.sizes |= {f'{path}:{n}': size for n, size in enumerate(array.shape)}
        value = Value(array, meaning, node)
        if node.bad:
            node.birth = self.birth('input', ~np.isfinite(np.asarray(array)), meaning, [], [(path, array)])
            self.born.append(node)
        return value

    def evaluate(
        self, jaxpr: Any, consts: Sequence[Value], arguments: Sequence[Value], place: Place | None
    ) -> list[Value]:
        """The outputs of a jaxpr."""
        values: dict[Any, Value] = dict(zip(jaxpr.constvars, consts, strict=True))
        values |= zip(jaxpr.invars, arguments, strict=True)
        last = last_uses(jaxpr)
        for number, equation in enumerate(jaxpr.eqns):
            operands = [self.read(values, variable) for variable in equation.invars]
            results = self.equation(equation, operands, place)
            for variable, result in zip(equation.outvars, results, strict=True):
                values[variable] = result
            for variable in last.get(number, ()):
                values.pop(variable, None)
        return [self.read(values, variable) for variable in jaxpr.outvars]

    def read(self, values: dict, variable: Any) -> Value:
        if isinstance(variable, core.Literal):
            node = Node(0, None, None, (), Bad())  # what somebody wrote down is meant
            node.input = f'{variable.val}'
            return Value(variable.val, axes.unknown(np.shape(variable.val)), node)
        return values[variable]

    def equation(self, equation: Any, operands: Sequence[Value], place: Place | None) -> list[Value]:
        """Its results, computed whole; opened if they are bad."""
        self.count += 1
        pairs = zip(equation.invars, operands, strict=True)
        given = [operand.array for variable, operand in pairs if not isinstance(variable, core.Literal)]
        arrays = self.alone(equation)(*given)
        meanings = self.meanings(equation, operands, place)
        parents = tuple(operand.node for operand in operands)
        bads = [Bad() if is_key(array) else look(array) for array in arrays]
        nodes = [self.node(equation, place, parents, bad) for bad in bads]
        if any(bads):
            opened = self.open(equation, operands, arrays, place)
            if opened is not None:
                # An output that is bad though no iteration gave it so keeps its own node.
                nodes = [
                    found if found is not None and bad and found.bad else node
                    for node, found, bad in zip(nodes, opened, bads, strict=True)
                ]
                if not any(node.bad and node.equation is not equation for node in nodes):
                    self.unexplained(equation, operands, arrays, meanings, nodes)
            else:
                self.judge(equation, operands, arrays, meanings, nodes)
        return [Value(*made) for made in zip(arrays, meanings, nodes, strict=True)]

    def node(self, equation: Any, place: Place | None, parents: tuple[Node, ...], bad: Bad) -> Node:
        self.nodes.append(Node(self.count, equation, place, parents, bad))
        return self.nodes[-1]

    # What axes mean.

    def meanings(self, equation: Any, operands: Sequence[Value], place: Place | None) -> list[Axes]:
        params = equation.params
        if equation.primitive.name == 'dynamic_slice':
            params = {**params, 'starts': [int(operand.array) for operand in operands[1:]]}
        late = not is_backward(equation, place)
        ins = [operand.axes for operand in operands]
        made = self.follow(equation, params, ins, late)
        if equation.primitive.name == 'dynamic_slice':
            self.times.take(place, ins[0], made[0])
        return made

    def follow(self, equation: Any, params: dict, ins: Sequence[Axes], late: bool) -> list[Axes]:
        """Through what an equation holds, too."""
        made = self.made(equation, params, ins, late)
        self.times.see(equation, made)
        return made

    def made(self, equation: Any, params: dict, ins: Sequence[Axes], late: bool) -> list[Axes]:
        shapes = [np.shape(variable.aval) for variable in equation.outvars]
        match holds(equation):
            case 'call':
                held = inner(equation)
                assert held is not None
                return self.through(held[0], ins, late)
            case 'scan':
                return self.through_scan(equation, ins, late)
            case 'while':
                carried = ins[params['cond_nconsts'] + params['body_nconsts'] :]
                return [
                    a if a.shape == tuple(s) else axes.unknown(s)
                    for a, s in zip(carried, shapes, strict=True)
                ]
            case 'cond':
                made = [self.through(branch.jaxpr, ins[1:], late) for branch in params['branches']]
                return [max(of_each, key=lambda a: len(a.names())) for of_each in zip(*made, strict=True)]
        if not shapes:
            return []
        return axes.follow(equation.primitive.name, params, ins, shapes, late)

    def through(self, jaxpr: Any, ins: Sequence[Axes], late: bool) -> list[Axes]:
        known: dict[Any, Axes] = dict(zip(jaxpr.invars, ins, strict=True))

        def read(variable: Any) -> Axes:
            if isinstance(variable, core.Literal):
                return axes.unknown(np.shape(variable.val))
            return known.get(variable) or axes.unknown(np.shape(variable.aval))

        for equation in jaxpr.eqns:
            made = self.follow(equation, equation.params, [read(v) for v in equation.invars], late)
            known |= zip(equation.outvars, made, strict=True)
        return [read(variable) for variable in jaxpr.outvars]

    def through_scan(self, equation: Any, ins: Sequence[Axes], late: bool) -> list[Axes]:
        params = equation.params
        consts, carried = scan_counts(params)
        xs = ins[consts + carried :]
        over = next((a.axes[0] for a in xs if any(f.name for f in a.axes[0])), None)
        self.times.run_over(equation, {f.name for a in xs for f in a.axes[0] if f.name})
        body = params['jaxpr'].jaxpr
        inner = [*ins[: consts + carried], *(axes.along(a) for a in xs)]
        made = self.through(body, inner, late)
        if any(old.names() != new.names() for old, new in zip(ins[consts:], made[:carried], strict=False)):
            names = self.times.over(equation)
            carry = [
                axes.unfixed(new if new.names() else old, names)
                for old, new in zip(ins[consts:], made[:carried], strict=False)
            ]
            made = self.through(body, [*ins[:consts], *carry, *inner[consts + carried :]], late)
        length = params['length']
        over = over or (axes.Factor('', length),)
        return [*made[:carried], *(axes.stacked(a, over) for a in made[carried:])]

    # What is bad, and since when.

    def judge(
        self,
        equation: Any,
        operands: Sequence[Value],
        arrays: Sequence[Any],
        meanings: Sequence[Axes],
        nodes: list[Node],
    ) -> None:
        """Notes what of an equation's results was born bad, not inherited."""
        for array, meaning, node in zip(arrays, meanings, nodes, strict=True):
            if not node.bad:
                continue
            new = new_elements(equation, operands, np.asarray(array))
            if new is None or not new.any():
                if not node.bad.nan or not any(is_meant(operand) for operand in operands):
                    continue
                new, kind = np.isnan(np.asarray(array)), WRITTEN
            else:
                kind = kind_of(equation, operands, np.asarray(array), new)
            if kind in ('infinities', 'invalid argument') and node.is_backward() and discarded(operands, new):
                kind = LEAK
            self.note(node, kind, new, meaning, operands, array)

    def note(
        self, node: Node, kind: str, new: np.ndarray, meaning: Axes, operands: Sequence[Value], array: Any
    ) -> None:
        sources = [(origin(operand.node), operand.array) for operand in operands]
        name = node.equation.primitive.name
        node.birth = self.birth(kind, new, meaning, sources, [(name, array)], operands)
        self.born.append(node)

    def birth(
        self,
        kind: str,
        new: np.ndarray,
        meaning: Axes,
        operands: Sequence[tuple[str, Any]],
        results: Sequence[tuple[str, Any]],
        values: Sequence[Value] = (),
    ) -> Birth:
        places = (
            [meaning.places(index) for index in np.argwhere(new)[:MOST_PLACES]]
            if new.ndim
            else [dict(meaning.fixed)]
        )
        along = meaning.names()
        examples = self.examples_of(places)
        if not examples and (found := largest(values, self.examples)):
            examples, along = self.examples_of(found), along | {name for at in found for name in at}
            places = [{**of_operand, **at} for at in places[:1] for of_operand in found]
        ranges = [
            tuple(range_of(*pair) for pair in pairs if not is_key(pair[1])) for pairs in (operands, results)
        ]
        return Birth(kind, tuple(places), frozenset(along), examples, int(new.sum()), *ranges)

    def examples_of(self, places: Sequence[dict[str, int]]) -> tuple[int, ...]:
        found = {int(place) for at in places for name, place in at.items() if name in self.examples}
        return tuple(sorted(found)[:MOST_EXAMPLES])

    def unexplained(
        self,
        equation: Any,
        operands: Sequence[Value],
        arrays: Sequence[Any],
        meanings: Sequence[Axes],
        nodes: list[Node],
    ) -> None:
        """Bad only when it is computed whole: a compiled loop may round otherwise than its parts."""
        if any(operand.node.bad for operand in operands):
            return
        for array, meaning, node in zip(arrays, meanings, nodes, strict=True):
            if node.bad:
                self.note(node, 'loop', ~np.isfinite(np.asarray(array)), meaning, operands, array)
                return

    # Opening.

    def open(
        self, equation: Any, operands: Sequence[Value], arrays: Sequence[Any], place: Place | None
    ) -> list[Node | None] | None:
        """The nodes of an equation's results as its insides made them; None if there is nothing inside."""
        match holds(equation):
            case 'call':
                inside = inner(equation)
                assert inside is not None
                jaxpr, consts = inside
                held = [self.constant(const) for const in consts]
                made = self.evaluate(jaxpr, held, operands, Place(equation, None, place))
                return [value.node for value in made]
            case 'scan':
                return self.open_scan(equation, operands, place)
            case 'while':
                return self.open_while(equation, operands, place)
            case 'cond':
                branches = equation.params['branches']
                chosen = branches[int(np.clip(int(operands[0].array), 0, len(branches) - 1))]
                held = [self.constant(const) for const in chosen.consts]
                made = self.evaluate(chosen.jaxpr, held, operands[1:], Place(equation, None, place))
                return [value.node for value in made]
        return None

    def constant(self, array: Any) -> Value:
        return Value(array, axes.unknown(np.shape(array)), Node(0, None, None, (), Bad()))

    def open_scan(self, equation: Any, operands: Sequence[Value], place: Place | None) -> list[Node | None]:
        params = equation.params
        (consts, carried), length = scan_counts(params), params['length']
        fixed, carry, xs = (
            operands[:consts],
            list(operands[consts : consts + carried]),
            operands[consts + carried :],
        )
        order = range(length)[::-1] if params['reverse'] else range(length)
        over = self.times.over(equation)
        found: list[Node | None] = [None] * len(equation.outvars)
        for i in order:
            at = [Value(x.array[i], axes.along(x.axes, i), x.node) for x in xs]
            # What is carried is of the iteration now, in whichever direction the loop runs.
            carry = [value._replace(axes=axes.unfixed(value.axes, over)) for value in carry]
            made = self.iterate(params['jaxpr'], [*fixed, *carry, *at], Place(equation, i, place), found)
            carry = made[:carried]
            for n in range(carried):
                found[n] = carry[n].node
        return found

    def open_while(self, equation: Any, operands: Sequence[Value], place: Place | None) -> list[Node | None]:
        params = equation.params
        tests, held = params['cond_nconsts'], params['body_nconsts']
        asked, fixed, carry = operands[:tests], operands[tests : tests + held], list(operands[tests + held :])
        found: list[Node | None] = [None] * len(carry)
        more = self.whole(params['cond_jaxpr'])
        i = 0
        while bool(more(*(value.array for value in (*asked, *carry)))[0]):
            carry = self.iterate(params['body_jaxpr'], [*fixed, *carry], Place(equation, i, place), found)
            found[:] = [value.node for value in carry]
            i += 1
        return found

    def iterate(
        self, body: Any, operands: Sequence[Value], place: Place, found: list[Node | None]
    ) -> list[Value]:
        """One iteration: whole, and opened if a result is bad that was not bad before."""
        arrays = self.whole(body)(*(operand.array for operand in operands))
        bads = [Bad() if is_key(array) else look(array) for array in arrays]
        before = [Bad() if node is None else node.bad for node in found]
        if any(old.also(new) for old, new in zip(before, bads, strict=True)):
            held = [self.constant(const) for const in body.consts]
            made = self.evaluate(body.jaxpr, held, operands, place)
            for n, value in enumerate(made):
                old = found[n]
                if value.node.bad and (old is None or not old.bad):
                    found[n] = value.node
            return made
        self.count += 1
        late = not is_backward(place.equation, place.outer)
        meanings = self.through(body.jaxpr, [operand.axes for operand in operands], late)
        parents = tuple(operand.node for operand in operands)
        nodes = [self.node(place.equation, place, parents, bad) for bad in bads]
        return [Value(*made) for made in zip(arrays, meanings, nodes, strict=True)]

    def alone(self, equation: Any) -> Callable[..., list[Any]]:
        if id(equation) not in self.equations:
            self.equations[id(equation)] = equation, alone(equation)
        return self.equations[id(equation)][1]

    def whole(self, closed: Any) -> Callable:
        """A closed jaxpr, compiled once."""
        if id(closed) not in self.compiled:
            self.compiled[id(closed)] = closed, jax.jit(core.jaxpr_as_fun(closed))
        return self.compiled[id(closed)][1]

    # What it all means.

    def story(self, outputs: Sequence[Node]) -> Story:
        flow = flow_of(self.nodes, outputs)
        reaching = ancestors([node for node in outputs if node.bad], lambda node: bool(node.bad))
        rest = [node for node in self.born if node not in reaching]
        first = None
        if born := [node for node in self.born if node in reaching]:
            earliest = min(born, key=lambda node: _turn(node, flow))
            first = self.finding(earliest, flow)
            leaks = [node for node in born if node.birth is not None and node.birth.kind == LEAK]
            if first.pass_ == 'backward' and any(
                earliest in ancestors([leak], lambda node: bool(node.bad)) for leak in leaks
            ):
                first = first._replace(kind=LEAK)
        return Story(
            first, tuple(self.finding(node, flow)._replace(harmless=True) for node in rest), self.count
        )

    def finding(self, node: Node, flow: Flow) -> Finding:
        birth = node.birth
        assert birth is not None
        in_pass = pass_of(node, flow)
        iterations = tuple(reversed([p.iteration for p in outwards(node.place) if p.iteration is not None]))
        source, library = (
            source_of(node.equation, node.place) if node.equation is not None else (node.input, '')
        )
        return Finding(
            kind=birth.kind,
            pass_=in_pass,
            op='input' if node.equation is None else node.equation.primitive.name,
            source=source,
            code=code_at(source),
            library=library,
            layer=layer_of(node, in_pass),
            iterations=iterations,
            # An update is of all time steps, whichever of them its gradients were summed of last.
            time_step=None if in_pass == 'update' else self.times.of(node, self.examples),
            examples=birth.examples,
            elements=birth.elements,
            operands=birth.operands,
            results=birth.results,
            chain=chain(node),
        )
