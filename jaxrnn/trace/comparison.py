"""A step that is finite but bad, held against an earlier one: what changed, and where most of it lies.

Three steps are measured (`probe`): the earlier state on its own batch, the earlier state on the later batch, and the
later step itself. The second parts what the batch brought from what the state brought. Then parameters, gates, time
steps, operations and examples are ranked by their share. An example's loss and gradient are those of the same
compiled step on a batch that holds this example alone, as often as the batch is large.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxrnn.trace.findings import MOST_EXAMPLES
from jaxrnn.trace.measure import Magnitude, MeasuredStep, StepMeasurements
from jaxrnn.trace.naming import code_at, layer_of, pass_of, source_of
from jaxrnn.trace.retrace import EXAMPLE, TIME, ProbePoint, is_data
from jaxrnn.trace.values import Node
from jaxrnn.types import Step, Tree

ABSURD = 1e6
"""Times the same operation's largest element in the earlier step, from where on a result is called absurd. Gradients in
training leap by up to 1,000 (Huang et al. 2025, arXiv 2501.06842), and their squares, of which Adam's v is made, by the
square of it."""

MOST_MEASURED = 64
"""Examples whose own loss and gradient are computed; of a larger batch those that stand out most."""


class Pair(NamedTuple):
    """A quantity in the earlier step, and now."""

    before: float
    now: float


class Layer(NamedTuple):
    """A leaf of the parameters."""

    path: str
    gradient: Pair | None  # Euclidean norms
    update: Pair
    parameter: Pair
    share: float  # in the change of the squared gradient norm, else of the squared update norm

    @property
    def relative_step(self) -> Pair:
        """Norm of the update over the parameter's."""
        return Pair(*(u / p if p else float('inf') for u, p in zip(self.update, self.parameter, strict=True)))


class Saturation(NamedTuple):
    """A squashing function in the forward pass."""

    layer: str  # with the gate's own scope, where it has one
    op: str
    source: str
    saturated: Pair  # share of its elements
    time_step: int | None  # at which it rose most


class TimeStepGradient(NamedTuple):
    """A time step of one layer's backward pass."""

    layer: str
    time_step: int
    gradient: Pair  # Euclidean norm of the cotangents that reach it from later ones
    share: float  # in the change of the squared norms over this layer's time steps


class Example(NamedTuple):
    """One example of the later batch by itself."""

    place: int
    loss: Pair
    share: float  # in the change of the loss
    gradient: float  # share in the squared norm of the batch's gradient; NaN where no gradient was found


class Leap(NamedTuple):
    """An operation, or an argument, whose result grew."""

    pass_: str
    op: str  # 'input' for an argument
    source: str
    code: str
    layer: str
    largest: Pair  # absolute value
    time_step: int | None
    examples: tuple[int, ...]

    @property
    def ratio(self) -> float:
        return self.largest.now / self.largest.before


class Comparison(NamedTuple):
    """What a step did otherwise than an earlier one. Each list is in the order of the share, the largest first."""

    scores: dict[str, tuple[float, float, float]]  # record: before; the later batch on the earlier state; now
    by_batch: bool  # whether the later batch, not the later state, brought most of the change in loss
    layers: tuple[Layer, ...]
    gates: tuple[Saturation, ...]
    time_steps: tuple[TimeStepGradient, ...]
    examples: tuple[Example, ...]
    additive: bool  # whether the batch's loss is the mean of its examples'
    leaps: tuple[Leap, ...]  # in the order of their size
    absurd: Leap | None  # the first in the order of evaluation that is ABSURD


def compare(
    step: Step,
    before: tuple[Tree, Tree],
    now: tuple[Tree, Tree],
    *,
    example_axes: Tree = None,
    loss: str = 'loss',
) -> Comparison:
    """Says what `step(*now)` does otherwise than `step(*before)`, and where.

    Args:
        step: `(state, batch) -> (state, record)`, a pure function.
        before: state and batch of a step that was in order.
        now: state and batch of the step in question, of the same shapes.
        example_axes: as in `first_bad`.
        loss: name of the record that is to be explained.

    Raises:
        ValueError: the two steps' arguments differ in structure or shape.
    """
    shapes = [jax.tree.map(jnp.shape, pair) for pair in (before, now)]
    if shapes[0] != shapes[1]:
        raise ValueError(f'arguments of the same shapes expected, {shapes[0]} and {shapes[1]} found')
    probe = MeasuredStep(step, *now, example_axes=example_axes)
    first, crossed, last = probe(*before), probe(before[0], now[1]), probe(*now)
    scores = {n: (first.record[n], crossed.record[n], last.record[n]) for n in last.record}
    by_batch = _is_by_batch(scores.get(loss))
    basis = first if by_batch else crossed
    names = _Names(probe)
    leading = probe.leading_on()
    leaps = [
        *_leaps_of_arguments(probe, before, now),
        *_leaps(probe, names, leading, (first,) if by_batch else (first, crossed), last),
    ]
    examples, additive = _examples(probe, before[0], now, last, scores, by_batch, loss)
    return Comparison(
        scores=scores,
        by_batch=by_batch,
        layers=_layers(basis, last),
        gates=_gates(probe, names, basis, last),
        time_steps=_time_steps(probe, names, basis, last),
        examples=examples,
        additive=additive,
        leaps=tuple(sorted(leaps, key=lambda leap: -leap.ratio)),
        absurd=next((leap for leap in leaps if leap.ratio >= ABSURD), None),
    )


def _is_by_batch(scores: tuple[float, float, float] | None) -> bool:
    if scores is None:
        return False
    before, crossed, now = scores
    return abs(crossed - before) > abs(now - crossed)


class _Names:
    """Pass, layer and line of what was observed."""

    def __init__(self, probe: MeasuredStep):
        self.flow = probe.flow()
        self.cache: dict[Node, tuple[str, str, str]] = {}

    def __call__(self, node: Node) -> tuple[str, str, str]:
        if node not in self.cache:
            in_pass = pass_of(node, self.flow)
            self.cache[node] = (
                in_pass,
                layer_of(node, in_pass),
                source_of(node.equation, node.place)[0] if node.equation is not None else node.input,
            )
        return self.cache[node]


def _layers(before: StepMeasurements, now: StepMeasurements) -> tuple[Layer, ...]:
    made = []
    for path, new in now.parameters.items():
        old = before.parameters[path]
        gradient = None
        if old.gradient is not None and new.gradient is not None:
            gradient = Pair(old.gradient, new.gradient)
        update = Pair(old.update, new.update)
        changed = gradient or update
        change = changed.now**2 - changed.before**2
        made.append(Layer(path, gradient, update, Pair(old.norm, new.norm), change))
    whole = sum(abs(layer.share) for layer in made) or 1
    made = [layer._replace(share=layer.share / whole) for layer in made]
    return tuple(sorted(made, key=lambda layer: -abs(layer.share)))


def _gates(
    probe: MeasuredStep, names: _Names, before: StepMeasurements, now: StepMeasurements
) -> tuple[Saturation, ...]:
    made = []
    for one, old, new in zip(probe.observed, before.sizes, now.sizes, strict=True):
        if not one.about or names(one.node)[0] != 'forward':
            continue
        assert old.saturated is not None and new.saturated is not None
        rise = new.saturated - old.saturated
        time_step = None
        if one.dimensions and one.dimensions[0].kind == TIME and rise.ndim:
            time_step = one.dimensions[0].places[int(rise.argmax())]
        _, layer, source = names(one.node)
        saturated = Pair(float(old.saturated.mean()), float(new.saturated.mean()))
        made.append(Saturation(layer, one.about, source, saturated, time_step))
    return tuple(sorted(_numbered(made), key=lambda gate: gate.saturated.before - gate.saturated.now))


def _numbered(gates: Sequence[Saturation]) -> list[Saturation]:
    """Several of one layer and operation, which no scope tells apart, by their order."""
    counts: dict[tuple[str, str], int] = {}
    seen: dict[tuple[str, str], int] = {}
    for gate in gates:
        counts[gate.layer, gate.op] = counts.get((gate.layer, gate.op), 0) + 1
    made = []
    for gate in gates:
        key = gate.layer, gate.op
        seen[key] = seen.get(key, 0) + 1
        made.append(gate._replace(op=f'{gate.op} {seen[key]}') if counts[key] > 1 else gate)
    return made


def _time_steps(
    probe: MeasuredStep, names: _Names, before: StepMeasurements, now: StepMeasurements
) -> tuple[TimeStepGradient, ...]:
    squares: dict[tuple[str, int], np.ndarray] = {}
    for one, old, new in zip(probe.observed, before.sizes, now.sizes, strict=True):
        kinds = [dimension.kind for dimension in one.dimensions]
        # A loop also carries the sums that become the weights' gradients; they have no examples.
        if not one.carried or kinds[:1] != [TIME] or EXAMPLE not in kinds or names(one.node)[0] != 'backward':
            continue
        assert old.norm is not None and new.norm is not None
        largest = np.finfo(np.float32).max  # an infinite norm has a size as well
        pair = [np.square(np.minimum(norm, largest, dtype=np.float64)) for norm in (old.norm, new.norm)]
        of_both = [square.sum(axis=tuple(range(1, square.ndim))) for square in pair]
        layer = _without_gate(names(one.node)[1])
        for place, pair_at in zip(one.dimensions[0].places, np.stack(of_both, axis=1), strict=True):
            squares[layer, place] = squares.get((layer, place), np.zeros(2)) + pair_at
    totals: dict[str, float] = {}
    for (layer, _), (old, new) in squares.items():
        totals[layer] = totals.get(layer, 0.0) + abs(new - old)
    made = [
        TimeStepGradient(
            layer,
            t,
            Pair(float(np.sqrt(old)), float(np.sqrt(new))),
            float((new - old) / (totals[layer] or 1)),
        )
        for (layer, t), (old, new) in squares.items()
    ]
    return tuple(sorted(made, key=lambda each: -abs(each.share)))


def _without_gate(layer: str) -> str:
    """The carries of a layer may come out of different gates."""
    outer, _, last = layer.rpartition('/')
    return outer if last.endswith(('gate', 'candidate')) else layer


def _leaps_of_arguments(probe: MeasuredStep, before: tuple[Tree, Tree], now: tuple[Tree, Tree]) -> list[Leap]:
    old, new = probe.largest_arguments(*before), probe.largest_arguments(*now)
    return [
        Leap('data' if is_data(path) else '', 'input', path, '', path, Pair(old[path], largest), None, ())
        for path, largest in new.items()
        if 0 < old[path] < largest
    ]


def _leaps(
    probe: MeasuredStep,
    names: _Names,
    leading: set[Node],
    before: Sequence[StepMeasurements],
    now: StepMeasurements,
) -> list[Leap]:
    """Operations in the order of evaluation; only what grew, was not 0 before, and leads to the next state."""
    made = []
    for number, (one, size) in enumerate(zip(probe.observed, now.sizes, strict=True)):
        old = max(float(np.max(m.sizes[number].largest)) for m in before)
        new = float(np.max(size.largest))
        if one.carried or one.node not in leading or not 0 < old < new:
            continue
        pass_, layer, source = names(one.node)
        op = one.node.equation.primitive.name
        made.append(Leap(pass_, op, source, code_at(source), layer, Pair(old, new), *_places(one, size)))
    return made


def _places(one: ProbePoint, size: Magnitude) -> tuple[int | None, tuple[int, ...]]:
    """The time step of a result's largest element, and the examples that have one half as large."""
    time_step: int | None = None
    examples: tuple[int, ...] = ()
    for axis, dimension in enumerate(one.dimensions):
        along = size.largest.max(axis=tuple(n for n in range(size.largest.ndim) if n != axis))
        if dimension.kind == TIME:
            time_step = dimension.places[int(along.argmax())]
        elif dimension.kind == EXAMPLE:
            large = np.flatnonzero(along >= along.max() / 2)
            examples = tuple(dimension.places[int(n)] for n in large[:MOST_EXAMPLES])
    return time_step, examples


def _examples(
    probe: MeasuredStep,
    earlier: Tree,
    now: tuple[Tree, Tree],
    last: StepMeasurements,
    scores: dict[str, tuple[float, float, float]],
    by_batch: bool,
    loss: str,
) -> tuple[tuple[Example, ...], bool]:
    state, batch = now
    count = probe.examples
    if not count or loss not in scores:
        return (), True
    chosen = _outstanding(probe, last, count)
    before, after, along = {}, {}, {}
    for place in chosen:
        alone = probe.only(batch, place)
        single = probe(state, alone)
        after[place] = single.record[loss]
        along[place] = float(_inner(single.gradients, last.gradients)) if last.gradients else float('nan')
        before[place] = scores[loss][0] if by_batch else probe(earlier, alone).record[loss]
    change = sum(abs(after[p] - before[p]) for p in chosen) or 1
    whole = sum(along.values()) if len(chosen) == count else count * sum(n**2 for n in _norms(last))
    made = [
        Example(p, Pair(before[p], after[p]), (after[p] - before[p]) / change, along[p] / (whole or 1))
        for p in chosen
    ]
    mean = sum(after.values()) / count
    additive = len(chosen) < count or abs(mean - scores[loss][2]) <= 1e-2 * abs(scores[loss][2])
    return tuple(sorted(made, key=lambda example: -example.share)), additive


def _norms(measured: StepMeasurements) -> list[float]:
    return [p.gradient for p in measured.parameters.values() if p.gradient is not None]


def _outstanding(probe: MeasuredStep, now: StepMeasurements, count: int) -> list[int]:
    """All examples, or those of the largest values where the forward pass last has examples."""
    if count <= MOST_MEASURED:
        return list(range(count))
    found = list(range(count))
    for one, size in zip(probe.observed, now.sizes, strict=True):
        if [d.kind for d in one.dimensions] == [EXAMPLE] and not one.node.is_backward():
            ranked = np.argsort(-size.largest, kind='stable')
            found = [one.dimensions[0].places[int(n)] for n in ranked]
    return sorted(found[:MOST_MEASURED])


@jax.jit
def _inner(a: Any, b: Any) -> Any:
    parts = jax.tree.map(lambda x, y: jnp.sum(x.astype(jnp.float32) * y.astype(jnp.float32)), a, b)
    return sum(jax.tree.leaves(parts))
