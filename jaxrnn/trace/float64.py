"""A step computed twice, as it is and in float64: the first operation whose result loses its digits.

Each equation is computed from the step's own operands, and once more from float64 operands. These were computed in
float64 from the same arguments. Rounding errors are small nearly everywhere. But where two large numbers cancel, they
may be all that is left.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend import core

from jaxrnn.trace.findings import MOST_EXAMPLES
from jaxrnn.trace.naming import code_at, layer_of, pass_of, source_of
from jaxrnn.trace.retrace import EXAMPLE, TIME, Frame, Measurement, ProbePoint, TracedStep, is_record
from jaxrnn.trace.values import Node, Value, ancestors, is_float, is_key
from jaxrnn.trace.widening import run, wide_params, wide_type
from jaxrnn.types import Step, Tree

LOST = 0.1
"""From this error on, over a result's largest element, its digits count as lost."""

MOVED = 8
"""Of an operation that joins many operands, so many are looked at."""

SOUND = 0.01
"""Up to this error operands are not to blame. A bfloat16's rounding error, 0.004, is below it."""


class TwoPrecisions(NamedTuple):
    """A value as the step computes it, and in float64."""

    own: Any
    wide: Any


class PrecisionLoss(NamedTuple):
    """An operation whose operands are still right, but whose result has lost its digits."""

    pass_: str
    op: str
    source: str
    code: str
    layer: str
    time_step: int | None
    examples: tuple[int, ...]  # the first MOST_EXAMPLES of those with half of the error
    error: float  # largest, over the largest element in float64
    of_operands: float  # the largest of theirs


class PrecisionReport(NamedTuple):
    """How a step's values differ from those in float64."""

    lost: PrecisionLoss | None  # the first that reaches an output whose digits are lost
    outputs: dict[str, float]  # error of each record and of each leaf's update, by path
    restarted: tuple[
        str, ...
    ]  # operations that don't work in float64; from their own results on, float64 started anew


def lost_precision(step: Step, state: Tree, batch: Tree, *, example_axes: Tree = None) -> PrecisionReport:
    """Computes a step as it is and in float64, and names the first operation that loses its digits.

    A loop that counts (`while_loop`) and a branch (`cond`) are computed as they are. Float64 goes on from their
    results. Values that aren't finite are left out: `first_bad` is for them.

    Args:
        step: `(state, batch) -> (state, record)`, a pure function.
        state, batch: what it is given.
        example_axes: as in `first_bad`.

    Example:
        The variance as the difference of two large numbers: nothing of it is left in float32.

        >>> import jax.numpy as jnp
        >>> from jaxrnn import trace
        >>> def step(weight, x):
        ...     variance = jnp.mean((weight * x) ** 2) - jnp.mean(weight * x) ** 2
        ...     return weight, {'loss': variance}
        >>> report = trace.lost_precision(step, jnp.float32(1), jnp.array([1000.0, 1000.1, 1000.2]))
        >>> report.lost.op, report.lost.pass_
        ('sub', 'forward')
        >>> report.outputs['record/loss'] > 1, report.lost.of_operands < 1e-6  # relative errors
        (True, True)
    """
    traced = TracedStep(step, state, batch, example_axes=example_axes)
    shadow = _Shadow(traced)
    # As float64 is switched on, a count of steps in Python would become an int64.
    pairs = zip(jax.tree.leaves((state, batch)), traced.closed.jaxpr.invars, strict=True)
    leaves = [leaf if is_key(leaf) else jnp.asarray(leaf, variable.aval.dtype) for leaf, variable in pairs]
    with jax.enable_x64(True):
        errors, outputs = jax.jit(shadow.measure)(leaves)
        errors, outputs = jax.device_get((errors, outputs))
    of_outputs = {path: float(error) for path, error in zip(shadow.paths, outputs, strict=True)}
    ends = [node for node, error in zip(shadow.ends, outputs, strict=True) if error >= LOST]
    lost = _first(traced, errors, ends) or _drowned(traced, ends)
    return PrecisionReport(lost, of_outputs, tuple(sorted(shadow.restarted)))


class _Shadow:
    """What is computed for each equation, and measured of each result."""

    def __init__(self, traced: TracedStep):
        self.traced = traced
        self.restarted: set[str] = set()
        self.paths: list[str] = []
        self.ends: list[Node] = []

    def measure(self, leaves: Sequence[Any]) -> tuple[list[Any], list[Any]]:
        """Errors at all probe points, and of the outputs."""
        frame = self.traced.trace([_both(leaf) for leaf in leaves], self.compute, self.measurement, _both)
        before = {
            leaf.path: value
            for leaf, value in zip(self.traced.leaves, self.traced.arguments, strict=True)
            if not leaf.is_data
        }
        errors: list[Any] = []
        self.paths, self.ends = [], []
        for path, value in zip(self.traced.out_paths, self.traced.outputs, strict=True):
            array = _both(value.array)
            if not is_float(array.own) or not np.size(array.own):
                continue
            old = before.get(path)
            if old is not None and not is_record(
                path
            ):  # of a parameter's new value the update is a small part
                array = TwoPrecisions(array.own - old.array.own, array.wide - old.array.wide)
            errors.append(_error(array, tuple(range(jnp.ndim(array.own)))))
            self.paths.append(path)
            self.ends.append(value.node)
        return frame.measured, errors

    def compute(self, equation: Any, operands: Sequence[Any]) -> Sequence[Any]:
        pairs = [_both(operand) for operand in operands]
        given = [
            both.own
            for variable, both in zip(equation.invars, pairs, strict=True)
            if not isinstance(variable, core.Literal)
        ]
        own = self.traced.devices.function_of(equation)(*given)
        if not any(is_float(array) for array in own):
            return [TwoPrecisions(array, array) for array in own]
        wide = self._in_float64(equation, [both.wide for both in pairs])
        if wide is None:
            self.restarted.add(equation.primitive.name)
            return [_both(array) for array in own]
        return [
            TwoPrecisions(*pair) if is_float(pair[0]) else TwoPrecisions(pair[0], pair[0])
            for pair in zip(own, wide, strict=True)
        ]

    def _in_float64(self, equation: Any, operands: Sequence[Any]) -> Sequence[Any] | None:
        """An equation's results from float64 operands; None if it doesn't take them."""
        if equation.primitive.name == 'reduce_precision':
            return operands[:1]
        try:
            params = wide_params(equation)

            def wide(*arrays: Any) -> Sequence[Any]:
                return run(equation, arrays, params)

            jax.jit(wide).lower(*(jax.typeof(jnp.asarray(operand)) for operand in operands))
            return wide(*operands)
        except Exception:  # whatever a primitive raises for a type that it wasn't traced for
            return None

    def measurement(self, value: Value, carried: bool) -> Measurement | None:
        array = _both(value.array)
        if not is_float(array.own) or not np.size(array.own):
            return None
        kept, dimensions = self.traced.kept(value.axes)
        factors = [factor.size for axis in value.axes.axes for factor in axis]
        gone = tuple(n for n in range(len(factors)) if n not in kept)
        shaped = TwoPrecisions(array.own.reshape(factors), array.wide.reshape(factors))
        return Measurement(dimensions, None, _error(shaped, gone))


def _both(array: Any) -> TwoPrecisions:
    if isinstance(array, TwoPrecisions):
        return array
    if is_key(array) or not is_float(array):
        return TwoPrecisions(array, array)
    return TwoPrecisions(
        array, lax.convert_element_type(jnp.asarray(array), wide_type(jnp.result_type(array)))
    )


def _error(array: TwoPrecisions, gone: Any) -> Any:
    """Largest difference, over the largest element of the whole; 0 where either isn't finite."""
    difference = jnp.abs(array.own.astype(array.wide.dtype) - array.wide)
    size = jnp.max(jnp.abs(array.wide))
    error = jnp.max(difference, axis=gone) / jnp.where(size > 0, size, 1)
    return jnp.where(jnp.isfinite(error), error, 0)


# Which is the first.


def _first(traced: TracedStep, errors: Sequence[np.ndarray], ends: Sequence[Node]) -> PrecisionLoss | None:
    """The first operation that loses digits and reaches an output that has lost them, through values that have, too."""
    if not ends:
        return None
    frame = traced.frame
    of = {one.node: error for one, error in zip(frame.probe_points, errors, strict=True) if not one.carried}
    begun = _at_the_beginning(frame, errors)
    bad = {node for node, error in of.items() if np.max(error) >= LOST}
    reaching = ancestors(ends, lambda node: node in bad or node not in of)
    flow = traced.flow()
    for one, error in zip(frame.probe_points, errors, strict=True):
        if one.carried or one.node not in reaching or np.max(error) < LOST:
            continue
        before = [_of_operand(parent, of, begun) for parent in one.node.parents]
        sound = _all_sound(error, before)
        if sound is not None:
            return _lost(one, error, sound, max((float(np.max(b)) for b in before), default=0.0), flow)
    return None


def _drowned(traced: TracedStep, ends: Sequence[Node]) -> PrecisionLoss | None:
    """An update that is lost where it is added, too small beside its parameter, though no result is wrong by much."""
    node = next((node for node in ends if node.equation is not None), None)
    if node is None:
        return None
    where = np.ones(())
    return _lost(ProbePoint(node, (), False), where, where > 0, 0.0, traced.flow())


def _at_the_beginning(frame: Frame, errors: Sequence[np.ndarray]) -> dict[Node, np.ndarray]:
    """Errors of what each iteration of a loop begins with: those that the iteration before it ended with."""
    ended = {one.node: error for one, error in zip(frame.probe_points, errors, strict=True) if one.carried}
    found = {}
    for carried in frame.carried:
        if carried.end not in ended:
            continue
        error = ended[carried.end]
        shifted = np.zeros_like(error)
        if carried.reverse:
            shifted[:-1] = error[1:]
        else:
            shifted[1:] = error[:-1]
        found[carried.begin] = shifted
    return found


def _of_operand(node: Node, of: dict[Node, np.ndarray], begun: dict[Node, np.ndarray]) -> np.ndarray:
    """Error of an operand. An operation that only moves values has the error of what it moved."""
    if node in begun or node in of:
        return begun[node] if node in begun else of[node]
    before = [_of_operand(parent, of, begun) for parent in node.parents[:MOVED]]
    return before[0] if len(before) == 1 else np.asarray(max((np.max(b) for b in before), default=0.0))


def _all_sound(error: np.ndarray, before: Sequence[np.ndarray]) -> np.ndarray | None:
    """Where a result has lost its digits though its operands are right; None if nowhere. By its dimensions."""
    alike = [b if b.shape == error.shape else np.full(error.shape, np.max(b, initial=0)) for b in before]
    where = error >= LOST
    for b in alike:
        where &= b <= SOUND
    return where if where.any() else None


def _lost(
    one: ProbePoint, error: np.ndarray, where: np.ndarray, of_operands: float, flow: Any
) -> PrecisionLoss:
    time_step: int | None = None
    examples: tuple[int, ...] = ()
    error = np.where(where, error, 0)
    for axis, dimension in enumerate(one.dimensions):
        along = error.max(axis=tuple(n for n in range(error.ndim) if n != axis))
        if dimension.kind == TIME:
            time_step = dimension.places[int(np.flatnonzero(along >= LOST)[0])]
        elif dimension.kind == EXAMPLE:
            large = np.flatnonzero(along >= along.max() / 2)
            examples = tuple(dimension.places[int(n)] for n in large[:MOST_EXAMPLES])
    in_pass = pass_of(one.node, flow)
    source, _ = source_of(one.node.equation, one.node.place)
    layer = layer_of(one.node, in_pass)
    op = one.node.equation.primitive.name
    return PrecisionLoss(
        in_pass, op, source, code_at(source), layer, time_step, examples, float(error.max()), of_operands
    )
