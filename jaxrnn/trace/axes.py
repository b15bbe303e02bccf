"""What the axes of an intermediate value mean: which runs over the examples of the batch, which over time.

A batch's axes are given names. The names are followed through the equations of a jaxpr: through transposes, reshapes,
slices, products and gathers. So it is known to which example and to which time step an element of any array belongs,
although no equation says so. This module has the rules for single equations, `meaning` follows whole jaxprs.
"""

import math
from collections.abc import Callable, Sequence, Set
from typing import Any, NamedTuple


class Factor(NamedTuple):
    """A named axis, or a part of one: place p here is place start + stride p of the axis of that name."""

    name: str  # '' where nothing is known
    size: int
    stride: int = 1
    start: int = 0

    def at(self, place: int) -> int:
        """The place in the axis of that name."""
        return self.start + self.stride * place


Axis = tuple[Factor, ...]
"""Row-major: the last factor varies fastest. An axis made by merging two has two."""


class Shard(NamedTuple):
    """A named axis that is divided among devices: device c along the mesh's axis has the places from stride c on."""

    name: str
    axis: int  # of the mesh
    stride: int


class Axes(NamedTuple):
    """The axes of one value. If its array has leading axes for the mesh's, these have no entry in `axes`."""

    axes: tuple[Axis, ...]
    fixed: tuple[
        tuple[str, int], ...
    ] = ()  # name -> place, where the value belongs to one place, as x[3] does
    shards: tuple[Shard, ...] = ()

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(math.prod(factor.size for factor in axis) for axis in self.axes)

    def names(self) -> set[str]:
        return {factor.name for axis in self.axes for factor in axis if factor.name}

    def places(self, index: Sequence[int]) -> dict[str, int]:
        """Name -> place of the element at `index`."""
        found = dict(self.fixed)
        for axis, place in zip(self.axes, index[len(index) - len(self.axes) :], strict=True):
            for factor in reversed(axis):
                place, within = divmod(place, factor.size)
                if factor.name:
                    found[factor.name] = found.get(factor.name, 0) + factor.stride * within
                    found[factor.name] += factor.start
        for shard in self.shards:
            if shard.name in found:
                found[shard.name] += shard.stride * index[shard.axis]
        return found


def unknown(shape: Sequence[int]) -> Axes:
    """Axes of which nothing is known."""
    return Axes(tuple(_nameless(size) for size in shape))


def named(prefix: str, shape: Sequence[int]) -> Axes:
    """Axes `prefix:0`, `prefix:1`, …"""
    return Axes(tuple((Factor(f'{prefix}:{n}', size),) for n, size in enumerate(shape)))


def follow(
    name: str, params: dict[str, Any], ins: Sequence[Axes], shapes: Sequence[Sequence[int]], late: bool = True
) -> list[Axes]:
    """Axes of an equation's results.

    Args:
        name: of the primitive; one without inner equations.
        params: of the equation.
        ins: axes of the operands.
        shapes: of the results.
        late: which place a result has whose operands have different places of one axis. True: the largest, as in a
            forward pass, which computes h_3 from h_2 and x_3. False: the smallest, as in a backward pass.

    Returns:
        Axes for each result; nameless where the primitive isn't known.
    """
    if name in _SEVERAL:
        try:
            return [_sharded(part, ins) for part in _SEVERAL[name](params, ins[0], shapes)]
        except (KeyError, TypeError, ValueError):
            return [unknown(shape) for shape in shapes]
    rule = _RULES.get(name)
    made = None
    if rule is not None:
        try:
            made = rule(params, list(ins), tuple(shapes[0]))
        except (IndexError, KeyError, TypeError, ValueError, AttributeError):
            made = None  # a parameter has another name in this version of JAX: nothing is known
    if made is None:
        made = _elementwise(params, list(ins), tuple(shapes[0]))
    if name != 'squeeze':  # which fixes the place in what it drops
        made = _without_halves(made, ins)
    fixed = made.fixed if name in _FIX else fix([_fixed_of(axes, made) for axes in ins], late)
    results = []
    for shape in shapes:
        same = made.shape == tuple(shape)
        results.append(_sharded(Axes(made.axes if same else unknown(shape).axes, fixed), ins))
    return results


def _fixed_of(operand: Axes, made: Axes) -> tuple[tuple[str, int], ...]:
    """Which places an operand fixes in a result. Not in an axis that another operand has whole, as in x - x[3]."""
    whole = made.names() - operand.names()
    return tuple(item for item in operand.fixed if item[0] not in whole)


def _sharded(made: Axes, ins: Sequence[Axes]) -> Axes:
    """The result's axes, with each name divided among devices as in the first operand that has it."""
    shards: list[Shard] = []
    if any(operand.shards for operand in ins):
        for name in sorted({*made.names(), *dict(made.fixed)}):
            having = (o for o in ins if name in o.names() or name in dict(o.fixed))
            shards += [s for s in next(having, made).shards if s.name == name]
    return made._replace(shards=tuple(shards))


def fix(parts: Sequence[tuple[tuple[str, int], ...]], late: bool = True) -> tuple[tuple[str, int], ...]:
    """One place for each name."""
    found: dict[str, int] = {}
    choose = max if late else min
    for part in parts:
        for name, place in part:
            found[name] = choose(found.get(name, place), place)
    return tuple(sorted(found.items()))


def along(axes: Axes, place: int | None = None) -> Axes:
    """Axes of x[place], where `axes` are those of x. Without a place, those of any."""
    first, rest = axes.axes[0], axes.axes[1:]
    if place is None:
        return axes._replace(axes=rest)
    return axes._replace(axes=rest, fixed=_fixed_too(axes, first, place))


def unfixed(axes: Axes, names: Set[str]) -> Axes:
    """The same axes, with no place fixed in the axes of these names."""
    return axes._replace(fixed=tuple(item for item in axes.fixed if item[0] not in names))


def stacked(axes: Axes, over: Axis) -> Axes:
    """Axes of values stacked along a new first axis. In a loop over chunks, the place within the chunk stays."""
    stride = {factor.name: factor.stride for factor in over}
    kept = tuple((name, place) for name, place in axes.fixed if 0 <= place < stride.get(name, place + 1))
    fixed = kept if max(stride.values()) > 1 else unfixed(axes, stride.keys()).fixed
    return axes._replace(axes=(over, *axes.axes), fixed=fixed)


def _fixed_too(axes: Axes, axis: Axis, place: int) -> tuple[tuple[str, int], ...]:
    """What is fixed when an axis is left at a place."""
    # An axis may be in two parts, of which one is fixed after the other.
    return tuple(sorted(Axes((axis,), axes.fixed).places([place]).items()))


# The rules: (params, axes of the operands, shape of the first result) -> axes, or None where none applies.


def _nameless(size: int) -> Axis:
    return (Factor('', size),)


def _is_named(axis: Axis) -> bool:
    return any(factor.name for factor in axis)


def _without_halves(made: Axes, ins: Sequence[Axes]) -> Axes:
    """Without the names of axes that were split and have lost a part: what is left of them would name wrong places."""
    lost = set()
    for operand in ins:
        for name in operand.names():
            before = _parts(operand, name)
            fixed = name in dict(made.fixed) and name not in dict(operand.fixed)
            if before > 1 and _parts(made, name) + fixed < before:
                lost.add(name)
    if not lost:
        return made
    axes = [tuple(f._replace(name='') if f.name in lost else f for f in axis) for axis in made.axes]
    return Axes(tuple(axes), tuple(item for item in made.fixed if item[0] not in lost))


def _parts(axes: Axes, name: str) -> int:
    return sum(factor.name == name for axis in axes.axes for factor in axis)


def _elementwise(params: dict, ins: list[Axes], shape: tuple[int, ...]) -> Axes:
    """Operands of the result's shape have its axes. Where two give an axis different names, the first counts."""
    axes = list(unknown(shape).axes)
    for operand in ins:
        if operand.shape == shape:
            axes = [old if _is_named(old) else new for old, new in zip(axes, operand.axes, strict=True)]
    return Axes(tuple(axes))


def _transpose(params: dict, ins: list[Axes], shape: tuple[int, ...]) -> Axes:
    return Axes(tuple(ins[0].axes[n] for n in params['permutation']))


def _broadcast(params: dict, ins: list[Axes], shape: tuple[int, ...]) -> Axes:
    axes = list(unknown(shape).axes)
    for source, target in enumerate(params['broadcast_dimensions']):
        if ins[0].shape[source] == shape[target]:
            axes[target] = ins[0].axes[source]
    return Axes(tuple(axes))


def _reshape(params: dict, ins: list[Axes], shape: tuple[int, ...]) -> Axes | None:
    """The same factors in the new axes; a factor is divided if it has to fill two of them."""
    left = [factor for axis in ins[0].axes for factor in axis if factor.size != 1]
    axes = []
    for size in shape:
        axis: list[Factor] = []
        while size > 1:
            factor = left.pop(0)
            if size % factor.size == 0:
                axis.append(factor)
                size //= factor.size
            elif factor.size % size == 0:
                within = factor.size // size
                axis.append(factor._replace(size=size, stride=factor.stride * within))
                left.insert(0, Factor(factor.name, within, factor.stride))
                size = 1
            else:
                return None
        axes.append(tuple(axis) or _nameless(1))
    return Axes(tuple(axes)) if not left else None


def _squeeze(params: dict, ins: list[Axes], shape: tuple[int, ...]) -> Axes:
    dropped = {n % len(ins[0].axes) for n in params['dimensions']}
    kept = Axes(tuple(axis for n, axis in enumerate(ins[0].axes) if n not in dropped), ins[0].fixed)
    for n in dropped:
        kept = kept._replace(fixed=_fixed_too(kept, ins[0].axes[n], 0))
    return kept


def _expand(params: dict, ins: list[Axes], shape: tuple[int, ...]) -> Axes:
    axes = list(ins[0].axes)
    for n in sorted(params['dimensions']):
        axes.insert(n, _nameless(1))
    return Axes(tuple(axes))


def _sliced(axis: Axis, start: int, size: int, stride: int = 1) -> Axis:
    if len(axis) > 1 and math.prod(factor.size for factor in axis) == size:
        return axis
    if len(axis) > 1:
        return _nameless(size)
    (factor,) = axis
    return (factor._replace(size=size, start=factor.at(start), stride=factor.stride * stride),)


def _slice(params: dict, ins: list[Axes], shape: tuple[int, ...]) -> Axes:
    strides = params.get('strides') or [1] * len(shape)
    parts = zip(ins[0].axes, params['start_indices'], shape, strides, strict=True)
    return Axes(tuple(_sliced(*part) for part in parts))


def _dynamic_slice(params: dict, ins: list[Axes], shape: tuple[int, ...]) -> Axes:
    """The parameter `starts`, if there is one, has the values of the start indices."""
    starts = params.get('starts')
    axes = []
    for n, (axis, size) in enumerate(zip(ins[0].axes, shape, strict=True)):
        if ins[0].shape[n] == size:
            axes.append(axis)
        else:
            axes.append(
                _sliced(axis, min(max(starts[n], 0), ins[0].shape[n] - size), size)
                if starts
                else _nameless(size)
            )
    return Axes(tuple(axes))


def _rev(params: dict, ins: list[Axes], shape: tuple[int, ...]) -> Axes:
    axes = list(ins[0].axes)
    for n in params['dimensions']:
        if len(axes[n]) == 1:
            axes[n] = _sliced(axes[n], shape[n] - 1, shape[n], -1)
        else:
            axes[n] = _nameless(shape[n])
    return Axes(tuple(axes))


def _reduce(params: dict, ins: list[Axes], shape: tuple[int, ...]) -> Axes:
    gone = params['axes']
    return Axes(tuple(axis for n, axis in enumerate(ins[0].axes) if n not in gone))


def _reduce_several(params: dict, ins: list[Axes], shape: tuple[int, ...]) -> Axes:
    """lax.reduce, which is given its operands first, then the value that each starts with."""
    return _reduce({'axes': params['dimensions']}, ins, shape)


def _dot_general(params: dict, ins: list[Axes], shape: tuple[int, ...]) -> Axes:
    (contracted, batch) = params['dimension_numbers']
    kept = [ins[0].axes[n] for n in batch[0]]
    for operand, over, together in zip(ins, contracted, batch, strict=True):
        kept += [axis for n, axis in enumerate(operand.axes) if n not in over and n not in together]
    return Axes(tuple(kept))


def _concatenate(params: dict, ins: list[Axes], shape: tuple[int, ...]) -> Axes:
    joined = params['dimension']
    axes = []
    for n in range(len(shape)):
        of_all = [operand.axes[n] for operand in ins]
        named = [axis for axis in of_all if _is_named(axis)]
        if n != joined:
            axes.append(named[0] if named else of_all[0])
        else:
            axes.append(_joined(ins, of_all, shape[n]))
    gone = {factor.name for factor in axes[joined]}
    kept = [tuple(item for item in operand.fixed if item[0] not in gone) for operand in ins]
    return Axes(tuple(axes), fix(kept))


def _stack(params: dict, ins: list[Axes], shape: tuple[int, ...]) -> Axes:
    at = params['axis'] % len(shape)
    apart = [Axes((*x.axes[:at], _nameless(1), *x.axes[at:]), x.fixed) for x in ins]
    return _concatenate({'dimension': at}, apart, shape)


def _split(params: dict, axes: Axes, shapes: Sequence[Sequence[int]]) -> list[Axes]:
    at, start, made = params['axis'], 0, []
    for size, shape in zip(params['sizes'], shapes, strict=True):
        kept = list(axes.axes)
        kept[at] = _sliced(axes.axes[at], start, size)
        made.append(Axes(tuple(kept), axes.fixed) if math.prod(shape) else unknown(shape))
        start += size
    return made


def _unstack(params: dict, axes: Axes, shapes: Sequence[Sequence[int]]) -> list[Axes]:
    at = params['axis']
    first = Axes((axes.axes[at], *axes.axes[:at], *axes.axes[at + 1 :]), axes.fixed)
    return [along(first, place) for place in range(len(shapes))]


def _joined(ins: list[Axes], of_all: list[Axis], size: int) -> Axis:
    """The axis of x[0], x[1], … put together again, or of slices of x that follow one another."""
    if len(ins) == 1:
        return of_all[0]
    if all(len(axis) == 1 and axis[0].name for axis in of_all):
        factors = [axis[0] for axis in of_all]
        first, end = factors[0], factors[0].start
        for factor in factors:
            if (factor.name, factor.stride, factor.start) != (first.name, first.stride, end):
                return _nameless(size)
            end = factor.at(factor.size)
        return (first._replace(size=size),)
    if all(
        operand.shape and math.prod(f.size for f in axis) == 1
        for operand, axis in zip(ins, of_all, strict=True)
    ):
        for name in {name for name, _ in ins[0].fixed}:
            places = [dict(operand.fixed).get(name) for operand in ins]
            start, second = places[:2]
            if start is None or second is None or start == second:
                continue
            if places == [start + (second - start) * n for n in range(size)]:
                return (Factor(name, size, second - start, start),)
    return _nameless(size)


def _pad(params: dict, ins: list[Axes], shape: tuple[int, ...]) -> Axes:
    axes = []
    for axis, (low, high, inner), size in zip(ins[0].axes, params['padding_config'], shape, strict=True):
        if (low, high, inner) == (0, 0, 0):
            axes.append(axis)
        elif len(axis) == 1 and inner == 0:
            axes.append(_sliced(axis, -low, size))
        else:
            axes.append(_nameless(size))
    return Axes(tuple(axes))


def _gather(params: dict, ins: list[Axes], shape: tuple[int, ...]) -> Axes:
    """A window has those of the operand's axes that it takes whole. The other axes are those of the indices."""
    numbers, sizes = params['dimension_numbers'], params['slice_sizes']
    operand, indices = ins[0], ins[1]
    gone = {*numbers.collapsed_slice_dims, *numbers.operand_batching_dims}
    windows = [n for n in range(len(operand.axes)) if n not in gone]
    axes = list(unknown(shape).axes)
    for place, n in zip(numbers.offset_dims, windows, strict=True):
        if sizes[n] == operand.shape[n]:
            axes[place] = operand.axes[n]
    others = [n for n in range(len(shape)) if n not in numbers.offset_dims]
    for place, axis in zip(others, indices.axes[:-1], strict=True):
        axes[place] = axis
    return Axes(tuple(axes))


def _as_first(params: dict, ins: list[Axes], shape: tuple[int, ...]) -> Axes:
    """The axes of the operand that is written into; where nothing is known of one, that of what is written."""
    axes = list(ins[0].axes)
    if len(ins) > 1 and ins[1].shape == ins[0].shape:
        axes = [old if _is_named(old) else new for old, new in zip(axes, ins[1].axes, strict=True)]
    return Axes(tuple(axes))


def _convolution(params: dict, ins: list[Axes], shape: tuple[int, ...]) -> Axes:
    numbers = params['dimension_numbers']
    axes = list(unknown(shape).axes)
    axes[numbers.out_spec[0]] = ins[0].axes[numbers.lhs_spec[0]]
    return Axes(tuple(axes))


def _nothing(params: dict, ins: list[Axes], shape: tuple[int, ...]) -> Axes:
    return unknown(shape)


_FIX = ('squeeze', 'concatenate', 'stack')
"""Primitives whose rules say themselves which places are fixed."""

_SEVERAL = {'split': _split, 'unstack': _unstack}

_RULES: dict[str, Callable[[dict, list[Axes], tuple[int, ...]], Axes | None]] = {
    'transpose': _transpose,
    'broadcast_in_dim': _broadcast,
    'reshape': _reshape,
    'squeeze': _squeeze,
    'expand_dims': _expand,
    'slice': _slice,
    'dynamic_slice': _dynamic_slice,
    'rev': _rev,
    'dot_general': _dot_general,
    'concatenate': _concatenate,
    'stack': _stack,
    'pad': _pad,
    'gather': _gather,
    'conv_general_dilated': _convolution,
    'iota': _nothing,
    'reduce': _reduce_several,
    **dict.fromkeys(
        ('dynamic_update_slice', 'scatter', 'scatter-add', 'scatter_add', 'scatter_mul', 'sort'), _as_first
    ),
    **dict.fromkeys(
        (
            'reduce_sum',
            'reduce_max',
            'reduce_min',
            'reduce_prod',
            'reduce_and',
            'reduce_or',
            'argmax',
            'argmin',
        ),
        _reduce,
    ),
}
