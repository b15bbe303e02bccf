"""The evaluation: equation by equation, each whole, and opened where something bad comes out of it."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core
from jax.sharding import Mesh, NamedSharding

from jaxrnn.trace import axes
from jaxrnn.trace.axes import Axes
from jaxrnn.trace.births import (
    MOST_PLACES,
    MOVERS,
    causes,
    discarded,
    is_meant,
    kind_of,
    largest,
    new_elements,
)
from jaxrnn.trace.equations import alone, holds, inner, last_uses, name_of, scan_counts
from jaxrnn.trace.findings import LEAK, MOST_EXAMPLES, WRITTEN, Finding, TraceReport
from jaxrnn.trace.naming import Flow, chain, code_at, flow_of, layer_of, marked, origin, pass_of, source_of
from jaxrnn.trace.sharded import Layout, entered, layout_of, left, sliced, starts, through_collective
from jaxrnn.trace.times import Times
from jaxrnn.trace.values import (
    Bad,
    Birth,
    Node,
    Place,
    Value,
    caused,
    inherited,
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
) -> TraceReport:
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
    leaves = named_arguments(arguments, names)
    data = f'{names[len(arguments) - 1]}'
    run.examples = example_names([pair for pair in leaves if pair[0].split('/')[0] == data], example_axes)
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


def named_arguments(arguments: Sequence[Tree], names: Sequence[str]) -> list[tuple[str, Any]]:
    """The leaves of arguments by path, as `state/params/kernel`."""
    found = []
    for name, argument in zip(names, arguments, strict=False):
        for path, leaf in jax.tree_util.tree_leaves_with_path(argument):
            within = jax.tree_util.keystr(path, simple=True, separator='/')
            found.append((f'{name}/{within}' if within else name, leaf))
    return found


def example_names(data: Sequence[tuple[str, Any]], example_axes: Tree) -> set[str]:
    """The names of the axes that run over examples, of the leaves of the data."""
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
        self.compiled: dict[tuple, tuple[Any, Callable]] = {}  # by the identity of the jaxpr, which is kept
        self.equations: dict[tuple, tuple[Any, Callable]] = {}
        self.layout = Layout()  # of the shard_map that is open
        self.meshes: list[Mesh] = []  # on which the arguments lie

    @contextlib.contextmanager
    def within(self, layout: Layout) -> Iterator[None]:
        before, self.layout = self.layout, layout
        try:
            yield
        finally:
            self.layout = before

    def argument(self, path: str, array: Any, *, is_data: bool) -> Value:
        with np.errstate(over='ignore', invalid='ignore'):  # what float32 can't hold is told, not warned of
            array = array if isinstance(array, jax.Array) else jnp.asarray(array)
        if isinstance(array.sharding, NamedSharding) and isinstance(array.sharding.mesh, Mesh):
            self.meshes.append(array.sharding.mesh)
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
        params, ins = equation.params, [operand.axes for operand in operands]
        late = not is_backward(equation, place)
        if equation.primitive.name != 'dynamic_slice':
            return self.follow(equation, params, ins, late)
        shape = np.shape(equation.invars[0].aval)
        at = starts([operand.array for operand in operands[1:]], shape, params['slice_sizes'], self.layout)
        params = {**params, 'starts': [0 if start is None else start[0] for start in at]}
        found = [sliced(made, shape, at) for made in self.follow(equation, params, ins, late)]
        self.times.take(place, ins[0], found[0])
        return found

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
            case 'shard_map':
                return self.through_shards(equation, ins, late)
        if not shapes:
            return []
        if (passed := through_collective(equation, ins, shapes, self.layout)) is not None:
            return passed
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
        _, carried = scan_counts(params)
        inside, over = self.inside_scan(equation, ins, late)
        made = self.through(params['jaxpr'].jaxpr, inside, late)
        over = over or (axes.Factor('', params['length']),)
        return [*made[:carried], *(axes.stacked(a, over) for a in made[carried:])]

    def inside_scan(
        self, equation: Any, ins: Sequence[Axes], late: bool
    ) -> tuple[list[Axes], axes.Axis | None]:
        """Of the arguments of a loop's body, and what the loop runs over, if that is known."""
        params = equation.params
        consts, carried = scan_counts(params)
        xs = ins[consts + carried :]
        over = next((a.axes[0] for a in xs if any(f.name for f in a.axes[0])), None)
        names = {f.name for a in xs for f in a.axes[0] if f.name}
        self.times.run_over(equation, names)
        inner = [*ins[: consts + carried], *(axes.along(a) for a in xs)]
        made = self.through(params['jaxpr'].jaxpr, inner, late)
        if any(old.names() != new.names() for old, new in zip(ins[consts:], made[:carried], strict=False)):
            inner[consts : consts + carried] = [
                axes.unfixed(new if new.names() else old, names)
                for old, new in zip(ins[consts:], made[:carried], strict=False)
            ]
        return inner, over

    def through_shards(self, equation: Any, ins: Sequence[Axes], late: bool) -> list[Axes]:
        params, layout = equation.params, layout_of(equation, self.meshes)
        shapes = [np.shape(variable.aval) for variable in equation.outvars]
        if layout is None:
            return [axes.unknown(shape) for shape in shapes]
        given = [entered(a, spec, layout) for a, spec in zip(ins, params['in_specs'], strict=True)]
        with self.within(layout):
            made = self.through(params['jaxpr'], given, late)
        joined = zip(made, params['out_specs'], shapes, strict=True)
        return [left(a, spec, shape, layout) for a, spec, shape in joined]

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
            aligned = [self.layout.aligned(operand, np.ndim(array)) for operand in operands]
            node.causes = causes(equation, aligned, np.asarray(array))
            new = new_elements(equation, aligned, np.asarray(array))
            if new is None or not new.any():
                if not node.bad.nan or not any(is_meant(operand) for operand in operands):
                    continue
                new, kind = np.isnan(np.asarray(array)), WRITTEN
            else:
                kind = kind_of(equation, aligned, np.asarray(array), new)
            if (
                kind in ('infinities', 'invalid argument')
                and node.is_backward()
                and discarded(equation, aligned, new)
            ):
                kind = LEAK
            self.note(node, kind, new, meaning, operands, array)

    def note(
        self, node: Node, kind: str, new: np.ndarray, meaning: Axes, operands: Sequence[Value], array: Any
    ) -> None:
        sources = [(origin(operand.node), operand.array) for operand in operands]
        name = name_of(node.equation)
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
        new = self.layout.seen(new)
        places = (
            [meaning.places(index) for index in np.argwhere(new)[:MOST_PLACES].tolist()]
            if new.ndim
            else [dict(meaning.fixed)]
        )
        along = meaning.names()
        examples = self.examples_of(places)
        if not examples and (found := largest(values, self.examples)):
            examples, along = self.examples_of(found), along | {name for at in found for name in at}
            places = [{**of_operand, **at} for at in places[:1] for of_operand in found]
        went_in, came_out = (
            tuple(range_of(*pair) for pair in pairs if not is_key(pair[1])) for pairs in (operands, results)
        )
        devices = self.layout.devices(new)[:MOST_EXAMPLES]
        return Birth(
            kind, tuple(places), frozenset(along), examples, int(new.sum()), went_in, came_out, devices
        )

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
                return self.open_cond(equation, operands, place)
            case 'shard_map':
                return self.open_shards(equation, operands, place)
        return None

    def constant(self, array: Any) -> Value:
        meaning = axes.unknown(np.shape(array))
        return Value(self.layout.spread(array), meaning, Node(0, None, None, (), Bad()))

    def open_shards(
        self, equation: Any, operands: Sequence[Value], place: Place | None
    ) -> list[Node | None] | None:
        params, layout = equation.params, layout_of(equation, self.meshes)
        if layout is None or self.layout.names:
            return None
        given = [
            Value(layout.split(value.array, spec), entered(value.axes, spec, layout), value.node)
            for value, spec in zip(operands, params['in_specs'], strict=True)
        ]
        with self.within(layout):
            made = self.evaluate(params['jaxpr'], (), given, Place(equation, None, place))
        return [value.node for value in made]

    def open_cond(self, equation: Any, operands: Sequence[Value], place: Place | None) -> list[Node | None]:
        branches = equation.params['branches']
        chosen = np.clip(np.asarray(operands[0].array, int), 0, len(branches) - 1)
        chosen = np.broadcast_to(chosen, self.layout.sizes)
        nodes: list[Node] = []
        for number in np.unique(chosen[self.layout.where(True)]):
            branch = branches[int(number)]
            with self.apart(chosen == number) as layout:
                given = [layout.fill(operand) for operand in operands[1:]]
                held = [self.constant(const) for const in branch.consts]
                made = self.evaluate(branch.jaxpr, held, given, Place(equation, None, place))
            # Where devices take different branches, the first bad value speaks for all.
            old = nodes or [value.node for value in made]
            nodes = [b.node if b.node.bad and not a.bad else a for a, b in zip(old, made, strict=True)]
        return list(nodes)

    @contextlib.contextmanager
    def apart(self, holds: Any) -> Iterator[Layout]:
        """Of the devices at hand those for which a condition holds."""
        active = self.layout.where(holds)
        layout = self.layout if active.all() else self.layout.only(active)
        with self.within(layout):
            yield layout

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
            at = [self.at(x, i) for x in xs]
            # What is carried is of the iteration now, in whichever direction the loop runs.
            carry = [value._replace(axes=axes.unfixed(value.axes, over)) for value in carry]
            made = self.iterate(params['jaxpr'], [*fixed, *carry, *at], Place(equation, i, place), found)
            carry = made[:carried]
            for n in range(carried):
                found[n] = carry[n].node
        return found

    def at(self, x: Value, i: int) -> Value:
        """x[i], which may be good where x is bad elsewhere."""
        array, node = self.layout.take(x.array, i), x.node
        if node.bad and (bad := look(array)) != node.bad:
            node = Node(node.order, node.equation, node.place, (x.node,) if x.node.parents else (), bad)
            node.input, node.is_model, node.causes = x.node.input, x.node.is_model, inherited([x.node], bad)
        return Value(array, axes.along(x.axes, i), node)

    def open_while(self, equation: Any, operands: Sequence[Value], place: Place | None) -> list[Node | None]:
        params = equation.params
        tests, held = params['cond_nconsts'], params['body_nconsts']
        asked, fixed, carry = operands[:tests], operands[tests : tests + held], list(operands[tests + held :])
        found: list[Node | None] = [None] * len(carry)
        more = self.whole(params['cond_jaxpr'])
        i = 0
        while (going := self.layout.where(more(*(value.array for value in (*asked, *carry)))[0])).any():
            with self.apart(going) as layout:
                given = [layout.fill(value) for value in (*fixed, *carry)]
                made = self.iterate(params['body_jaxpr'], given, Place(equation, i, place), found)
            carry = [layout.merge(new, old) for new, old in zip(made, carry, strict=True)]
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
        for node, old in zip(nodes, found, strict=True):
            if node.bad and old is not None:  # as it was an iteration before
                node.causes = inherited([old], node.bad)
        return [Value(*made) for made in zip(arrays, meanings, nodes, strict=True)]

    def alone(self, equation: Any) -> Callable[..., list[Any]]:
        key = id(equation), self.layout.key
        if key not in self.equations:
            given = [v for v in equation.invars if not isinstance(v, core.Literal)]
            run = self.layout.each(alone(equation), given, equation.outvars)
            self.equations[key] = equation, run
        return self.equations[key][1]

    def whole(self, closed: Any) -> Callable:
        """A closed jaxpr, compiled once."""
        key = id(closed), self.layout.key
        if key not in self.compiled:
            run = self.layout.each(
                jax.jit(core.jaxpr_as_fun(closed)), closed.jaxpr.invars, closed.jaxpr.outvars
            )
            self.compiled[key] = closed, run
        return self.compiled[key][1]

    # What it all means.

    def story(self, outputs: Sequence[Node]) -> TraceReport:
        flow = flow_of(self.nodes, outputs)
        reaching = caused([node for node in outputs if node.bad and not is_kept(node)])
        rest = [node for node in self.born if node not in reaching]
        first = None
        if born := [node for node in self.born if node in reaching]:
            earliest = min(born, key=lambda node: _turn(node, flow))
            first = self.finding(earliest, flow)
            leaks = [node for node in born if node.birth is not None and node.birth.kind == LEAK]
            if first.pass_ == 'backward' and any(earliest in caused([leak]) for leak in leaks):
                first = first._replace(kind=LEAK)
        return TraceReport(
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
            op='input' if node.equation is None else name_of(node.equation),
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
            devices=birth.devices,
        )


def is_kept(output: Node) -> bool:
    """Whether a bad output is but an infinity of the state, as it was before the step: a mask, or the best loss so far.
    As one that is written down, it is meant."""
    return not output.bad.nan and all(
        node.is_model if node.equation is None else node.equation.primitive.name in MOVERS
        for node in caused([output])
    )
