"""From what was born bad in an evaluation to its report: what reached an output, and what of it came first."""

from collections.abc import Callable, Sequence

from jaxrnn.trace.births import MOVERS
from jaxrnn.trace.equations import name_of
from jaxrnn.trace.findings import LEAK, MOST_EXAMPLES, WRITTEN, Finding, TraceReport
from jaxrnn.trace.naming import Flow, chain, code_at, flow_of, layer_of, pass_of, source_of
from jaxrnn.trace.times import Times
from jaxrnn.trace.values import Node, Tape, caused, outwards


def report(
    tape: Tape,
    born: Sequence[Node],
    outputs: Sequence[Node],
    times: Times,
    examples: set[str],
    culprits: Callable[[Node], tuple[int, ...] | None],
) -> TraceReport:
    """The first finding that reached an output, and those that are harmless.

    Args:
        tape: of the evaluation.
        born: the nodes that were born bad.
        outputs: of the function.
        times, examples: which axes run over time and over examples.
        culprits: the examples that a node is bad by; None if only its axes can say.
    """
    flow = flow_of(tape.nodes, outputs)
    reaching = caused([node for node in outputs if node.bad and not is_kept(node)])
    reached = [node for node in born if node in reaching]
    rest = [node for node in born if node not in reaching]
    first = None
    if reached:
        earliest = min(reached, key=lambda node: _turn(node, flow))
        first = _finding(earliest, flow, times, examples)
        # An update is of all examples, unless its axes say otherwise.
        asked = first.kind != WRITTEN and (first.pass_ != 'update' or first.examples)
        if asked and (found := culprits(earliest)) is not None:
            assert earliest.birth is not None
            if earliest.birth.guessed and found != first.examples:
                first = first._replace(time_step=None)  # it was that of other elements
            first = first._replace(examples=found[:MOST_EXAMPLES])
        leaks = [node for node in reached if node.birth is not None and node.birth.kind == LEAK]
        if first.pass_ == 'backward' and any(earliest in caused([leak]) for leak in leaks):
            first = first._replace(kind=LEAK)
    harmless = [_finding(node, flow, times, examples)._replace(harmless=True) for node in rest]
    return TraceReport(first, tuple(harmless), tape.equations)


def is_kept(output: Node) -> bool:
    """Whether a bad output is only an infinity of the state, as it was before the step: a mask, or the best loss so
    far. Such an infinity is intended, as a literal is."""
    return not output.bad.nan and all(
        node.is_model if node.equation is None else node.equation.primitive.name in MOVERS
        for node in caused([output])
    )


def _turn(node: Node, flow: Flow) -> tuple[bool, bool, int]:
    """What sorts first of all that was born bad is what is reported."""
    # A `where` may have dropped the NaN that is written down, while what it chose went bad for another reason.
    is_written = node.birth is not None and node.birth.kind == WRITTEN
    # JAX puts what the backward pass will need between the equations of the forward pass.
    return is_written, pass_of(node, flow) in ('backward', 'update'), node.order


def _finding(node: Node, flow: Flow, times: Times, examples: set[str]) -> Finding:
    birth = node.birth
    assert birth is not None
    in_pass = pass_of(node, flow)
    iterations = [place.iteration for place in outwards(node.place) if place.iteration is not None]
    source, library = node.input, ''
    if node.equation is not None:
        source, library = source_of(node.equation, node.place)
    return Finding(
        kind=birth.kind,
        pass_=in_pass,
        op='input' if node.equation is None else name_of(node.equation),
        source=source,
        code=code_at(source),
        library=library,
        layer=layer_of(node, in_pass),
        iterations=tuple(reversed(iterations)),
        # An update belongs to all time steps, whichever of them was the last to be summed into its gradient.
        time_step=None if in_pass == 'update' else times.of(node, examples),
        examples=birth.examples,
        elements=birth.elements,
        operands=birth.operands,
        results=birth.results,
        chain=chain(node),
        devices=birth.devices,
        detail=birth.detail,
    )
