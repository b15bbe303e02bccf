"""A step that is finite but bad, compared with an earlier one: what changed, and where most of the change is.

Three steps are measured (`measure`): the earlier state on its own batch, the earlier state on the later batch, and the
later state on the later batch. From the second it is known how much of the change is due to the batch, and how much to
the state. Then parameters, gates, time steps, operations and examples are ranked by their share. An example's loss and
gradient are those of the same compiled step on a batch that repeats this one example.
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
from jaxrnn.trace.values import Node, is_float
from jaxrnn.types import Step, Tree

ABSURD = 1e6
"""A result is absurd if its largest element is so many times that of the same operation in the earlier step. Gradients
in training grow up to 1,000 times from one step to the next (Huang et al. 2025, arXiv 2501.06842). Adam's v is computed
from their squares, which grow by the square of it. And it is large, not only larger: see LARGE."""

LARGE = 1e3
"""So many times as large as anything that the earlier step was given, and as 1, an absurd result is at least. Networks
are scaled so that what they compute is of the order of 1 (LeCun et al. 1998, section 4.3; Glorot and Bengio 2010), and
a healthy gradient, as above, grows up to 1,000 times as large. A gradient that grew from 1e-9 to 1e-2 grew from next to
nothing."""

DUST = float(np.finfo(np.float32).eps)
"""Of the largest number that the earlier step was given: its rounding error. What is smaller counts as that large, as
nothing is learnt from how many times a rounding error grew."""

OUTLYING = 10
"""An example's numbers stand out of a leaf if one is so many times as large as all numbers of the earlier batch."""

HALF = 0.5
"""Share of a change that the examples named of a finite step make together."""

MOST_MEASURED = 64
"""At most so many examples have their loss and gradient computed: in a larger batch those with the largest values."""


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
    share: float  # of the change of the squared gradient norm; without a gradient, of the squared update norm

    @property
    def relative_step(self) -> Pair:
        """Norm of the update over the parameter's."""
        return Pair(*(u / p if p else float('inf') for u, p in zip(self.update, self.parameter, strict=True)))


class Saturation(NamedTuple):
    """How far a squashing function in the forward pass is saturated."""

    layer: str  # with the gate's own scope, where it has one
    op: str
    source: str
    saturated: Pair  # share of its elements
    time_step: int | None  # at which it rose most


class TimeStepGradient(NamedTuple):
    """The gradient at one time step of one layer's backward pass."""

    layer: str
    time_step: int
    gradient: Pair  # Euclidean norm of the cotangents that come from later time steps
    share: float  # of the change of the squared norms over this layer's time steps


class OverTime(NamedTuple):
    """One quantity of a layer at each time step, in the earlier step and now."""

    name: str  # of the layer, or the gate
    kind: (
        str  # 'saturated': share of elements; 'gradient': Euclidean norm of what comes from later time steps
    )
    places: tuple[int, ...]
    before: tuple[float, ...]
    now: tuple[float, ...]


class Example(NamedTuple):
    """One example of the later batch by itself."""

    place: int
    loss: Pair
    share: float  # of the change of the loss
    gradient: float  # share of the squared norm of the batch's gradient; NaN where no gradient was found


class Leap(NamedTuple):
    """An operation whose result grew, or an argument that did."""

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


class Outlying(NamedTuple):
    """Examples whose numbers are far larger than all that the earlier batch had there."""

    path: str  # of the batch's leaf
    places: tuple[int, ...]  # the first MOST_EXAMPLES


class Comparison(NamedTuple):
    """How a step differs from an earlier one. Each list is in the order of the share, the largest first."""

    scores: dict[
        str, tuple[float, float, float]
    ]  # record -> before; the later batch on the earlier state; now
    by_batch: bool  # whether most of the change in loss is due to the later batch, not to the later state
    layers: tuple[Layer, ...]
    gates: tuple[Saturation, ...]
    time_steps: tuple[TimeStepGradient, ...]
    examples: tuple[Example, ...]
    additive: bool  # whether the batch's loss is the mean of its examples'
    leaps: tuple[Leap, ...]  # the largest ratio first
    absurd: Leap | None  # the first in the order of evaluation that is absurd: see ABSURD and LARGE
    outlying: Outlying | None = None  # where the examples that brought a change stand out of the data
    over_time: tuple[OverTime, ...] = ()  # of each gate and each layer that runs over time


def compare(
    step: Step,
    before: tuple[Tree, Tree],
    now: tuple[Tree, Tree],
    *,
    example_axes: Tree = None,
    loss: str = 'loss',
) -> Comparison:
    """Finds how `step(*now)` differs from `step(*before)`, and where.

    Args:
        step: `(state, batch) -> (state, record)`, a pure function.
        before: state and batch of a healthy step.
        now: state and batch of the step in question, of the same shapes.
        example_axes: as in `first_bad`.
        loss: name of the record that is to be explained.

    Raises:
        ValueError: the two steps' arguments differ in structure or shape.

    Example:
        Of four targets, one is far away in the later batch.

        >>> import jax, jax.numpy as jnp
        >>> from jaxrnn import trace
        >>> def loss_of(weight, targets):
        ...     return jnp.mean((weight - targets) ** 2)
        >>> def step(weight, targets):
        ...     loss, gradient = jax.value_and_grad(loss_of)(weight, targets)
        ...     return weight - 0.1 * gradient, {'loss': loss}
        >>> weight, before, now = jnp.float32(1), jnp.zeros(4), jnp.array([0.0, 0.0, 30.0, 0.0])
        >>> comparison = trace.compare(step, (weight, before), (weight, now))
        >>> comparison.by_batch, comparison.examples[0].place, comparison.examples[0].loss
        (True, 2, Pair(before=1.0, now=841.0))
    """
    _check_shapes(before, now)
    measured_step = MeasuredStep(step, *now, example_axes=example_axes)
    first, crossed, last = measured_step(*before), measured_step(before[0], now[1]), measured_step(*now)
    scores = {n: (first.record[n], crossed.record[n], last.record[n]) for n in last.record}
    by_batch = _is_by_batch(scores.get(loss))
    basis, names = first if by_batch else crossed, _Names(measured_step)
    given = max((1.0, *measured_step.largest_arguments(*before).values()))
    earlier = (first,) if by_batch else (first, crossed)
    leaps = _leaps_of_arguments(measured_step, before, now) + _leaps(measured_step, names, earlier, last)
    gates, over_time = _gates(measured_step, names, basis, last)
    time_steps = _time_steps(measured_step, names, basis, last)
    examples, additive = _examples(measured_step, before[0], now, last, scores, by_batch, loss)
    return Comparison(
        scores=scores,
        by_batch=by_batch,
        layers=_layers(basis, last),
        gates=tuple(sorted(gates, key=lambda gate: gate.saturated.before - gate.saturated.now)),
        time_steps=tuple(sorted(time_steps, key=lambda each: -abs(each.share))),
        examples=examples,
        additive=additive,
        leaps=tuple(sorted(leaps, key=lambda leap: -_growth(leap, given))),
        absurd=_absurd(leaps, given),
        outlying=_outlying(measured_step, before[1], now[1], leading(examples)) if by_batch else None,
        over_time=(*over_time, *_gradients_over_time(time_steps)),
    )


def _check_shapes(before: Tree, now: Tree) -> None:
    shapes = [jax.tree.map(jnp.shape, pair) for pair in (before, now)]
    if shapes[0] != shapes[1]:
        raise ValueError(f'arguments of the same shapes expected, {shapes[0]} and {shapes[1]} found')


def _growth(leap: Leap, given: float) -> float:
    """How many times as large it became. `given` is the largest number that the earlier step was given."""
    return leap.largest.now / max(leap.largest.before, DUST * given)


def _absurd(leaps: Sequence[Leap], given: float) -> Leap | None:
    """The first that is absurd. An optimiser squares gradients and divides by their roots: of its equations only what
    grew by more than these grew, and squared."""
    grown = [_growth(leap, given) for leap in leaps if leap.pass_ != 'update']
    by_gradients = max((1.0, *grown)) ** 2
    for leap in leaps:
        wanted = ABSURD * (by_gradients if leap.pass_ == 'update' else 1.0)
        if leap.largest.now >= LARGE * given and _growth(leap, given) >= wanted:
            return leap
    return None


def leading(examples: Sequence[Example]) -> list[int]:
    """The examples that together make half of a change."""
    rising = [example for example in examples if example.share > 0]
    total, found = sum(example.share for example in rising), []
    reached = 0.0
    for example in rising[:MOST_EXAMPLES]:
        if reached >= HALF * total:
            break
        reached += example.share
        found.append(example.place)
    return found


def _outlying(
    measured_step: MeasuredStep, before: Tree, now: Tree, examples: Sequence[int]
) -> Outlying | None:
    """The leaf in which at least one of these examples stands out most, and all that stand out in it."""
    best, largest = None, float(OUTLYING)
    leaves = zip(measured_step.example_axes(), jax.tree.leaves(before), jax.tree.leaves(now), strict=True)
    for (path, axis), old, new in leaves:
        if axis is None or not is_float(new) or not np.size(new):
            continue
        usual = float(np.max(np.abs(np.asarray(old, np.float64))))
        sizes = (
            np.moveaxis(np.abs(np.asarray(new, np.float64)), axis, 0).reshape(np.shape(new)[axis], -1).max(1)
        )
        times = sizes / usual if usual else np.where(sizes > 0, np.inf, 0)
        if (most := max((float(times[n]) for n in examples), default=0.0)) >= largest:
            places = np.flatnonzero(times >= OUTLYING)[:MOST_EXAMPLES]
            best, largest = Outlying(path, tuple(int(n) for n in places)), most
    return best


def _is_by_batch(scores: tuple[float, float, float] | None) -> bool:
    if scores is None:
        return False
    before, crossed, now = scores
    return abs(crossed - before) > abs(now - crossed)


class _Names:
    """Pass, layer and line of code of each node."""

    def __init__(self, measured_step: MeasuredStep):
        self.flow = measured_step.flow()
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
    measured_step: MeasuredStep, names: _Names, before: StepMeasurements, now: StepMeasurements
) -> tuple[tuple[Saturation, ...], tuple[OverTime, ...]]:
    """In the order of evaluation, and each at every time step."""
    made: list[Saturation] = []
    over_time: list[tuple[int, OverTime]] = []  # with the place of its gate
    for one, old, new in zip(measured_step.probe_points, before.magnitudes, now.magnitudes, strict=True):
        if not one.about or names(one.node)[0] != 'forward':
            continue
        assert old.saturated is not None and new.saturated is not None
        rise = new.saturated - old.saturated
        time_step = None
        if one.dimensions and one.dimensions[0].kind == TIME and rise.ndim:
            time_step = one.dimensions[0].places[int(np.argmax(_by_first(rise)))]
            each = (_by_first(share) for share in (old.saturated, new.saturated))
            over_time.append((len(made), OverTime('', 'saturated', one.dimensions[0].places, *each)))
        _, layer, source = names(one.node)
        saturated = Pair(float(old.saturated.mean()), float(new.saturated.mean()))
        made.append(Saturation(layer, one.about, source, saturated, time_step))
    gates = _numbered(made)
    named = [one._replace(name=' '.join((gates[place].layer, gates[place].op))) for place, one in over_time]
    return tuple(gates), tuple(named)


def _by_first(shares: np.ndarray) -> tuple[float, ...]:
    """Means over all dimensions but the first."""
    return tuple(float(share) for share in shares.mean(axis=tuple(range(1, shares.ndim))))


def _gradients_over_time(time_steps: Sequence[TimeStepGradient]) -> list[OverTime]:
    layers: dict[str, list[TimeStepGradient]] = {}
    for each in sorted(time_steps, key=lambda each: each.time_step):
        layers.setdefault(each.layer, []).append(each)
    return [
        OverTime(
            layer,
            'gradient',
            tuple(each.time_step for each in found),
            tuple(each.gradient.before for each in found),
            tuple(each.gradient.now for each in found),
        )
        for layer, found in sorted(layers.items())
    ]


def _numbered(gates: Sequence[Saturation]) -> list[Saturation]:
    """Gates of the same layer and operation are numbered, as they have no scopes that differ."""
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
    measured_step: MeasuredStep, names: _Names, before: StepMeasurements, now: StepMeasurements
) -> tuple[TimeStepGradient, ...]:
    squares: dict[tuple[str, int], np.ndarray] = {}
    for one, old, new in zip(measured_step.probe_points, before.magnitudes, now.magnitudes, strict=True):
        kinds = [dimension.kind for dimension in one.dimensions]
        # A loop also carries sums that become the gradients of weights. These have no axis of examples.
        if not one.carried or kinds[:1] != [TIME] or EXAMPLE not in kinds or names(one.node)[0] != 'backward':
            continue
        assert old.norm is not None and new.norm is not None
        largest = np.finfo(np.float32).max  # so that an infinite norm can be compared, too
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
    return tuple(made)


def _without_gate(layer: str) -> str:
    """The layer of a gate: what a layer carries may come out of different gates."""
    outer, _, last = layer.rpartition('/')
    return outer if last.endswith(('gate', 'candidate')) else layer


def _leaps_of_arguments(
    measured_step: MeasuredStep, before: tuple[Tree, Tree], now: tuple[Tree, Tree]
) -> list[Leap]:
    old, new = measured_step.largest_arguments(*before), measured_step.largest_arguments(*now)
    return [
        Leap('data' if is_data(path) else '', 'input', path, '', path, Pair(old[path], largest), None, ())
        for path, largest in new.items()
        if 0 < old[path] < largest
    ]


def _leaps(
    measured_step: MeasuredStep,
    names: _Names,
    before: Sequence[StepMeasurements],
    now: StepMeasurements,
) -> list[Leap]:
    """Operations in the order of evaluation whose result grew, was not 0 before, and is needed for the next state."""
    made, leading = [], measured_step.leading_on()
    for number, (one, size) in enumerate(zip(measured_step.probe_points, now.magnitudes, strict=True)):
        old = max(float(np.max(m.magnitudes[number].largest)) for m in before)
        new = float(np.max(size.largest))
        if one.carried or one.node not in leading or not 0 < old < new:
            continue
        pass_, layer, source = names(one.node)
        op = one.node.equation.primitive.name
        made.append(Leap(pass_, op, source, code_at(source), layer, Pair(old, new), *_places(one, size)))
    return made


def _places(one: ProbePoint, size: Magnitude) -> tuple[int | None, tuple[int, ...]]:
    """The time step of a result's largest element, and the examples that have an element at least half as large."""
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
    measured_step: MeasuredStep,
    earlier: Tree,
    now: tuple[Tree, Tree],
    last: StepMeasurements,
    scores: dict[str, tuple[float, float, float]],
    by_batch: bool,
    loss: str,
) -> tuple[tuple[Example, ...], bool]:
    state, batch = now
    count = measured_step.examples
    if not count or loss not in scores:
        return (), True
    chosen = _outstanding(measured_step, last, count)
    before, after, along = {}, {}, {}
    for place in chosen:
        alone = measured_step.only(batch, place)
        single = measured_step(state, alone)
        after[place] = single.record[loss]
        along[place] = float(_inner(single.gradients, last.gradients)) if last.gradients else float('nan')
        before[place] = scores[loss][0] if by_batch else measured_step(earlier, alone).record[loss]
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


def _outstanding(measured_step: MeasuredStep, now: StepMeasurements, count: int) -> list[int]:
    """All examples. Of too many, those with the largest values in the last result of the forward pass that has one
    value for each example."""
    if count <= MOST_MEASURED:
        return list(range(count))
    found = list(range(count))
    for one, size in zip(measured_step.probe_points, now.magnitudes, strict=True):
        if [d.kind for d in one.dimensions] == [EXAMPLE] and not one.node.is_backward():
            ranked = np.argsort(-size.largest, kind='stable')
            found = [one.dimensions[0].places[int(n)] for n in ranked]
    return sorted(found[:MOST_MEASURED])


@jax.jit
def _inner(a: Any, b: Any) -> Any:
    parts = jax.tree.map(lambda x, y: jnp.sum(x.astype(jnp.float32) * y.astype(jnp.float32)), a, b)
    return sum(jax.tree.leaves(parts))
