"""What a recurrent layer did in one pass, forward and back, measured during the pass (docs/decisions/0009-signals.md).

`scan.run` takes a probe: an argument of zeros that changes no result, and whose gradient is what was measured.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxrnn.rnn import cells
from jaxrnn.types import Array, Tree

UNITS = 64
"""Units of a layer that a probe looks at, evenly spread: of 1,024 a sixteenth; of the cotangents as many numbers, of
all gates side by side."""

SATURATED = 0.1
"""From 0 or 1, within which a gate's value counts as saturated (Karpathy, Johnson & Fei-Fei 2015, 1506.02078)."""

LARGE_CELL = 4.0
"""|c| from which on tanh(c) passes less than 1.4e-3 of a gradient."""

TINY = 1e-30
"""Keeps a ratio off 0/0, which it makes 1, and finite."""


class Probe(NamedTuple):
    """What a layer did in one pass, forward and back: numbers by which to tell how it will fare.

    An argument of `scan.run` that changes no result; its gradient is what was measured. So it comes out beside the
    weights' gradients, of the pass that makes these. Of some UNITS units; masked time steps don't count.
    """

    saturated: dict[str, Array]  # gate -> share of its values within SATURATED of 0 or 1
    dead: dict[
        str, Array
    ]  # gate -> share of the units whose gate is at 0 or 1 for all examples and time steps
    large_cells: Array  # share of |c| > LARGE_CELL; 0 for a GRU
    memory: (
        Array  # Σ Var(h after the last time step) / Σ Var(h at each example's `end`), over examples and units
    )
    through_time: Array  # RMS(∂L/∂a) at the first time step, over that at the last; a: pre-activations
    # log of ‖∂L/∂a‖ at an example's `end` over that at the last time step, mean of the examples that end before: the
    # Lyapunov exponent of what comes between, along the gradient, times its steps
    padding_gain: Array


def new_probe(cell: cells.Cell, dtype: Any = jnp.float32) -> Probe:
    """What `scan.run` takes to look at a layer: zeros, to be differentiated by."""
    zero = jnp.zeros((), dtype)
    per_gate = {name: zero for name, _ in cell.gates}
    return Probe(per_gate, per_gate, zero, zero, zero, zero)


def measure(
    start: Probe,
    gates: Mapping[str, Array],
    tm1: Tree,
    last: Array,
    d: Array,
    *,
    ends: Array,
    mask: Array | None,
    reverse: bool,
    features_first: bool,
) -> Probe:
    """What is measured of one pass.

    Args:
        start: the probe, of whose types it shall be.
        gates: of each its values, [T, B, H]; [T, H, B] if `features_first`, and so the others.
        tm1: carries before each time step, the same.
        last: h after the last, [B, H].
        d: cotangents of pre-activations, of all gates side by side, [T, B, ..].
        ends: int [B], as `scan.run` has it.
        mask: bool [T, B]; None where all counts.
        reverse: whether time ran backwards.
        features_first: how all of these lie.
    """
    axis = -2 if features_first else -1
    units = functools.partial(_some_units, axis)
    examples = jnp.ones(tm1.h.shape[:1] + ends.shape, bool) if mask is None else mask  # [T, B]
    values = {name: units(value) for name, value in gates.items()}
    saturated, alive, large = _over_time(
        features_first, values, jnp.abs(units(tm1.c)) if 'c' in tm1._fields else None, examples
    )
    squares = jnp.sum(jnp.square(units(d)), axis=axis)  # [T, B]
    if reverse:
        examples, squares = examples[::-1], squares[::-1]
    norms = jnp.sum(squares, axis=1) / jnp.maximum(jnp.sum(examples, axis=1), 1)
    final = norms.shape[0] - 1 - jnp.argmax(jnp.any(examples, axis=1)[::-1])
    found = Probe(
        saturated=saturated,
        dead={name: 1 - jnp.mean(value) for name, value in alive.items()},
        large_cells=large,
        memory=jnp.ones(()) if reverse else _memory(axis, units(tm1.h), units(last[None])[0], ends),
        through_time=_ratio(jnp.sqrt(norms[0]), jnp.sqrt(norms[final])),
        padding_gain=jnp.zeros(()) if reverse or mask is not None else _padding_gain(squares, ends),
    )
    return jax.tree.map(lambda x, zero: x.astype(zero.dtype), found, start)


def _over_time(
    features_first: bool, gates: dict[str, Array], cells: Array | None, examples: Array
) -> tuple[dict[str, Array], dict[str, Array], Array]:
    """Of each gate the share of saturated values, and which units ever pass a gradient, [units]; and the share of large
    cells. One loop over all of them, where XLA:CPU has a loop for each sum.

    Args:
        features_first: how arrays lie.
        gates: values [T, units, B] or [T, B, units].
        cells: |c|, the same; None where there is none.
        examples: bool [T, B], what counts.
    """
    valid = examples[:, None, :] if features_first else examples[:, :, None]
    stuck = [(y < SATURATED) | (y > 1 - SATURATED) for y in gates.values()]
    sums = [*stuck, *([] if cells is None else [cells > LARGE_CELL])]
    largest = [(y > 0) & (y < 1) for y in gates.values()]
    operands = [(x & valid).astype(jnp.float32) for x in (*sums, *largest)]

    def combine(a: Sequence[Array], b: Sequence[Array]) -> list[Array]:
        return [
            x + y if place < len(sums) else jnp.maximum(x, y)
            for place, (x, y) in enumerate(zip(a, b, strict=True))
        ]

    axes = (0, 2) if features_first else (0, 1)
    per_unit = lax.reduce(operands, [np.float32(0)] * len(operands), combine, axes)
    total = jnp.maximum(jnp.sum(examples), 1)
    shares = [jnp.mean(x) / total for x in per_unit[: len(sums)]]
    saturated = dict(zip(gates, shares, strict=False))
    alive = dict(zip(gates, per_unit[len(sums) :], strict=True))
    return saturated, alive, jnp.zeros(()) if cells is None else shares[-1]


def _padding_gain(squares: Array, ends: Array) -> Array:
    """squares: of the cotangents of an example's pre-activations, [T, B]."""
    at_end = jnp.take_along_axis(squares, jnp.maximum(ends - 1, 0)[None], axis=0, mode='clip')[0]
    gains = jnp.log(_ratio(jnp.sqrt(at_end), jnp.sqrt(squares[-1])))
    padded = ends < squares.shape[0]
    return jnp.sum(jnp.where(padded, gains, 0)) / jnp.maximum(jnp.sum(padded), 1)


def _memory(axis: int, h: Array, last: Array, ends: Array) -> Array:
    """h: before each time step."""
    every = jnp.concatenate([h, last[None]])
    places = ends[None, None, :] if axis == -2 else ends[None, :, None]
    at_end = jnp.take_along_axis(every, places, axis=0, mode='clip')[0]
    examples = -1 if axis == -2 else -2
    return _ratio(jnp.sum(jnp.var(last, axis=examples)), jnp.sum(jnp.var(at_end, axis=examples)))


def _some_units(axis: int, x: Array) -> Array:
    every = max(x.shape[axis] // UNITS, 1)
    return x[..., ::every, :] if axis == -2 else x[..., ::every]


def _ratio(a: Array, b: Array) -> Array:
    found = (a + TINY) / (b + TINY)
    of_type = jnp.finfo(found.dtype)
    return jnp.clip(found, of_type.tiny, of_type.max)
