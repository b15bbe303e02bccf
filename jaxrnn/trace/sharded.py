"""What axes mean inside a shard_map, where each device has a part: of its operands, its collectives and its results."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from jax.sharding import PartitionSpec as P

from jaxrnn.trace.axes import Axes, Axis, Factor, Shard, unknown
from jaxrnn.trace.devices import Layout, dims


def entered(axes: Axes, spec: P, layout: Layout) -> Axes:
    """Axes of what one device is given, of those of the whole operand."""
    made, fixed, shards = [], dict(axes.fixed), list(axes.shards)
    for axis, over in zip(axes.axes, dims(spec, len(axes.axes)), strict=True):
        left = list(axis)
        for name in over:
            size = layout.mesh.shape[name]
            left, shard = _split(left, size, layout.names.index(name))
            shards += [shard] if shard is not None else []
        for n, factor in enumerate(left):
            # Of a single place: whatever comes of it is of that place.
            if factor.name and factor.size == 1 and over:
                fixed[factor.name] = factor.start
                left[n] = Factor('', 1)
        made.append(tuple(left))
    return Axes(tuple(made), tuple(sorted(fixed.items())), tuple(shards))


def _split(axis: list[Factor], size: int, number: int) -> tuple[list[Factor], Shard | None]:
    """An axis divided among the devices of the mesh's axis `number`."""
    first, rest = axis[0], axis[1:]
    total = math.prod(factor.size for factor in axis)
    if first.size % size:
        return [Factor('', total // size)], None
    within = first.size // size
    shard = Shard(first.name, number, first.stride * within) if first.name else None
    return [first._replace(size=within), *rest], shard


def left(axes: Axes, spec: P, shape: Sequence[int], layout: Layout) -> Axes:
    """Axes of what the devices' results are joined to, of those of one device's result."""
    mentioned = {name for over in dims(spec, len(shape)) for name in over}
    lost = {s.name for s in axes.shards if layout.names[s.axis] not in mentioned}
    found = set()  # names whose places can be read off the joined axes
    made = []
    for axis, over in zip(axes.axes, dims(spec, len(shape)), strict=True):
        factors = list(axis)
        here = {factor.name for factor in axis}
        for name in reversed(over):
            number = layout.names.index(name)
            among = sorted((s for s in axes.shards if s.axis == number), key=lambda s: s.name not in here)
            lost |= {s.name for s in among[1:]}
            shard = among[0] if among else Shard('', number, 1)
            found.add(shard.name)
            factors.insert(0, Factor(shard.name, layout.mesh.shape[name], shard.stride))
        made.append(_joined(factors))
    return without(_unfixed(Axes(tuple(made), axes.fixed), found), lost)


def _joined(factors: list[Factor]) -> Axis:
    """Neighbours that make up one axis again."""
    made = [factors[0]]
    for factor in factors[1:]:
        last = made[-1]
        if last.name == factor.name and last.name and last.stride == factor.size * factor.stride:
            start = last.start + factor.start
            made[-1] = factor._replace(size=last.size * factor.size, start=start)
        else:
            made.append(factor)
    return tuple(made)


def _unfixed(axes: Axes, names: set[str]) -> Axes:
    """Joined, the one place that each device has is one of several: it moves from `fixed` to an axis."""
    fixed = dict(axes.fixed)
    if not names & set(fixed):
        return axes
    made = []
    for axis in axes.axes:
        factors = []
        for factor in axis:
            start = fixed.pop(factor.name, 0) if factor.name in names else 0
            factors.append(factor._replace(start=factor.start + start))
        made.append(tuple(factors))
    return axes._replace(axes=tuple(made), fixed=tuple(sorted(fixed.items())))


def without(axes: Axes, names: set[str]) -> Axes:
    """The same axes, of which those of these names have none."""
    made = [tuple(f._replace(name='') if f.name in names else f for f in axis) for axis in axes.axes]
    fixed = tuple(item for item in axes.fixed if item[0] not in names)
    return Axes(tuple(made), fixed, tuple(s for s in axes.shards if s.name not in names))


def through_collective(
    equation: Any, ins: Sequence[Axes], shapes: Sequence[Sequence[int]], layout: Layout
) -> list[Axes] | None:
    """Axes of the results of a collective; None for any other equation."""
    name, params = equation.primitive.name, equation.params
    if not layout.names or name not in COLLECTIVES:
        return None
    over = params.get('axes', params.get('axis_name', ()))
    over = over if isinstance(over, tuple) else (over,)
    numbers = {layout.names.index(axis) for axis in over if axis in layout.names}
    if name in GATHERS and len(numbers) == 1:
        return [_gathered(axes, params, numbers, layout) for axes in ins]
    made = []
    for axes, shape in zip(ins, shapes, strict=False):
        mixed = without(axes, {s.name for s in axes.shards if s.axis in numbers})
        made.append(mixed if mixed.shape == tuple(shape) else unknown(shape))
    return made


def _gathered(axes: Axes, params: dict[str, Any], numbers: set[int], layout: Layout) -> Axes:
    (number,) = numbers
    at, size = params['all_gather_dimension'], layout.sizes[number]
    before = axes.axes[at] if params['tiled'] else ()
    here = {factor.name for factor in before}
    among = sorted((s for s in axes.shards if s.axis == number), key=lambda s: s.name not in here)
    shard = among[0] if among else Shard('', number, 1)
    axis = _joined([Factor(shard.name, size, shard.stride), *before])
    made = (*axes.axes[:at], axis, *axes.axes[at + len(before[:1]) :])
    kept = tuple(s for s in axes.shards if s.axis != number)
    joined = _unfixed(Axes(made, axes.fixed, kept), {shard.name})
    return without(joined, {s.name for s in among[1:]})


def starts(operands: Sequence[Any], shape: Sequence[int], sizes: Sequence[int], layout: Layout) -> list[Any]:
    """Where a slice starts, for each axis: its place on the first device, and how much further it is on the next device
    along each axis of the mesh. None where the starts aren't evenly spaced."""
    found: list[Any] = []
    for start, size, taken in zip(operands, shape, sizes, strict=True):
        places = np.broadcast_to(np.clip(np.asarray(start), 0, size - taken), layout.sizes)
        first = int(places[(0,) * places.ndim])
        steps = [
            int(places[tuple(int(k == n) for k in range(places.ndim))]) - first if length > 1 else 0
            for n, length in enumerate(places.shape)
        ]
        grid = np.indices(places.shape)
        regular = (places == first + sum(step * at for step, at in zip(steps, grid, strict=True))).all()
        found.append((first, steps) if regular else None)
    return found


def sliced(axes: Axes, shape: Sequence[int], starts: Sequence[Any]) -> Axes:
    """Axes of a slice of an array of `shape` that starts elsewhere on each device. `axes` are the first device's."""
    shards = list(axes.shards)
    lost = set()
    for axis, size, before, start in zip(axes.axes, axes.shape, shape, starts, strict=True):
        for factor in axis if size != before else ():
            if factor.name and start is None:
                lost.add(factor.name)
            elif factor.name:
                shards += [Shard(factor.name, n, factor.stride * s) for n, s in enumerate(start[1]) if s]
    return without(axes._replace(shards=tuple(shards)), lost)


GATHERS = ('all_gather', 'all_gather_invariant', 'all_gather_reduced')
COLLECTIVES = (
    *GATHERS,
    *('psum', 'psum_invariant', 'pmax', 'pmin', 'ppermute', 'all_to_all', 'reduce_scatter', 'unreduced_psum'),
    *('psend', 'precv', 'ragged_all_to_all', 'unreduced_reduce_scatter'),
)
"""Primitives by which values pass from device to device: an element isn't of the operands' elements at its place."""
