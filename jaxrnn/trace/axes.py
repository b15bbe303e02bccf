"""What the axes of an intermediate value mean: which runs over the examples of the batch, which over time.

A batch's axes are given names. The names are followed through the equations of a jaxpr: through transposes, reshapes,
slices, products and gathers. So it is known to which example and to which time step an element of any array belongs,
although no equation says so. This module has the rules for single equations, `meaning` follows whole jaxprs.
"""

import itertools
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
    if name in _EACH:
        try:
            return [_sharded(_EACH[name](params, operand), ins) for operand in ins[: len(shapes)]]
        except KeyError:
            return [unknown(shape) for shape in shapes]
    results = [_by_rule(name, params, list(ins), tuple(shape)) for shape in shapes]
    if name != 'squeeze':  # which fixes the place in what it drops
        results = [_without_halves(made, ins) for made in results]
    if name not in _FIX:
        repeats = name == 'broadcast_in_dim' or name in ELEMENTWISE
        fixed = [fix([_fixed_of(axes, made, repeats) for axes in ins], late) for made in results]
        results = [made._replace(fixed=places) for made, places in zip(results, fixed, strict=True)]
    return [_sharded(made, ins) for made in results]


def _by_rule(name: str, params: dict[str, Any], ins: list[Axes], shape: tuple[int, ...]) -> Axes:
    """Axes of one result; nameless where no rule says what they mean."""
    rule = _RULES.get(name, _elementwise if name in ELEMENTWISE or name in COMPARING else None)
    try:
        made = rule(params, ins, shape) if rule is not None else None
    except (IndexError, KeyError, TypeError, ValueError, AttributeError):
        made = None  # a parameter has another name in this version of JAX: nothing is known
    return _once(made) if made is not None and made.shape == shape else unknown(shape)


def _once(made: Axes) -> Axes:
    """Without the names that two axes have which are no parts of one, as those of a product of x with itself."""
    lost = set()
    for name in made.names():
        parts = sorted((f for axis in made.axes for f in axis if f.name == name), key=lambda f: abs(f.stride))
        if any(abs(b.stride) < abs(a.stride) * a.size for a, b in itertools.pairwise(parts)):
            lost.add(name)
    axes = tuple(tuple(f._replace(name='') if f.name in lost else f for f in axis) for axis in made.axes)
    return made if not lost else made._replace(axes=axes)


def has_rule(name: str) -> bool:
    """Whether something is known of a primitive. Of any other the results have no names."""
    return name in _RULES or name in _SEVERAL or name in _EACH or name in ELEMENTWISE or name in COMPARING


def _fixed_of(operand: Axes, made: Axes, repeats: bool) -> tuple[tuple[str, int], ...]:
    """Which places an operand fixes in a result. Not in an axis that another operand has whole, as in x - x[3]. And not
    in an axis of which the operand has a part, and the result has none: then it is one place of several."""
    whole = made.names() - operand.names()
    parts = operand.names() - made.names()
    single = {f.name: f.start for axis in operand.axes for f in axis if f.name and f.size == 1}
    kept = {name: place for name, place in operand.fixed if name not in whole and name not in parts}
    # Of a slice of one place, repeated: whatever comes of it is of that place.
    if repeats:
        before = dict(operand.fixed)
        kept |= {name: start + before.get(name, 0) for name, start in single.items() if name in parts}
    return tuple(sorted(kept.items()))


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


def agreed(old: Axes, new: Axes) -> Axes:
    """Axes that mean the same in two values of which one is taken. Where only one of them has a name, that counts."""
    made = []
    lost = set()
    for a, b in zip(old.axes, new.axes, strict=True):
        if _is_named(a) and _is_named(b) and a != b:
            lost |= {f.name for f in (*a, *b)}
            made.append(_nameless(math.prod(f.size for f in a)))
        else:
            made.append(a if _is_named(a) else b)
    places = dict(old.fixed)
    fixed = [(n, p) for n, p in new.fixed if places.get(n, p) == p]
    fixed += [(n, p) for n, p in old.fixed if n not in dict(new.fixed)]
    shards = old.shards or new.shards
    return Axes(tuple(made), tuple(sorted(item for item in fixed if item[0] not in lost)), shards)


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


ELEMENTWISE = frozenset(
    (
        *(
            'add',
            'add_any',
            'sub',
            'mul',
            'div',
            'rem',
            'neg',
            'abs',
            'sign',
            'max',
            'min',
            'clamp',
            'select_n',
        ),
        *('pow', 'integer_pow', 'square', 'sqrt', 'rsqrt', 'cbrt', 'exp', 'exp2', 'expm1', 'log', 'log1p'),
        *('sin', 'cos', 'tan', 'asin', 'acos', 'atan', 'atan2', 'sinh', 'cosh', 'tanh'),
        *('asinh', 'acosh', 'atanh', 'logistic', 'erf', 'erfc', 'erf_inv', 'lgamma', 'digamma', 'polygamma'),
        *('igamma', 'igammac', 'igamma_grad_a', 'regularized_incomplete_beta', 'zeta', 'random_gamma_grad'),
        *('bessel_i0e', 'bessel_i1e', 'nextafter', 'floor', 'ceil', 'round', 'reduce_precision'),
        *('complex', 'conj', 'real', 'imag', 'convert_element_type', 'copy', 'copy_p', 'stop_gradient'),
        *('device_put', 'reshard', 'sharding_constraint', 'pvary', 'pcast'),
    )
)
"""Primitives that compute element by element. A shape is not enough to know: a product of square matrices keeps it."""


COMPARING = frozenset(
    (
        *(
            'eq',
            'ne',
            'lt',
            'le',
            'gt',
            'ge',
            'eq_to',
            'lt_to',
            'le_to',
            'and',
            'or',
            'xor',
            'not',
            'is_finite',
        ),
        *('shift_left', 'shift_right_logical', 'shift_right_arithmetic', 'population_count', 'clz', 'sub'),
        *('bessel_i0', 'bessel_i1', 'igammac_grad_a', 'mulhi', 'pbroadcast', 'to_edtype', 'from_edtype'),
    )
)
"""Further primitives of which each element is of the operands' elements at its place, though no number goes bad."""


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
    """An operand has the result's axes, but for those along which it is repeated. Where two give an axis different
    names, the first counts."""
    axes = list(unknown(shape).axes)
    for operand in ins:
        if len(operand.axes) == len(shape):
            pairs = zip(axes, operand.axes, operand.shape, shape, strict=True)
            axes = [new if size == whole and not _is_named(old) else old for old, new, size, whole in pairs]
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


def _along(params: dict, operand: Axes) -> Axes:
    """A sort of several operands, each along the same axis: what was in a place is elsewhere."""
    return _mixed(operand, {params['dimension'] % len(operand.axes)})


def _same(params: dict, operand: Axes) -> Axes:
    return operand


def _mixed(operand: Axes, among: Set[int]) -> Axes:
    """Without the names of some axes, along which elements are moved or joined."""
    lost = {f.name for n in among for f in operand.axes[n]}
    axes = tuple(
        _nameless(size) if n in among or any(f.name in lost and f.name for f in axis) else axis
        for n, (axis, size) in enumerate(zip(operand.axes, operand.shape, strict=True))
    )
    return Axes(axes, tuple(item for item in operand.fixed if item[0] not in lost))


def _cumulated(params: dict, ins: list[Axes], shape: tuple[int, ...]) -> Axes:
    return _mixed(ins[0], {params['axis'] % len(shape)})


def _top(params: dict, ins: list[Axes], shape: tuple[int, ...]) -> Axes:
    """The largest elements along an axis, and where they are."""
    at = params['reduction_dimension' if 'reduction_dimension' in params else 'axis'] % len(shape)
    axes = list(_mixed(ins[0], {at}).axes)
    axes[at] = _nameless(shape[at])
    return Axes(tuple(axes))


def _windows(params: dict, ins: list[Axes], shape: tuple[int, ...]) -> Axes:
    """Axes along which each window is one element stay."""
    if 'window_dimensions' not in params:
        return unknown(shape)
    ones = [
        all(params[name][n] in (1, (0, 0)) for name in WINDOWS if params.get(name) is not None)
        for n in range(len(shape))
    ]
    axes = [
        axis if one else _nameless(size) for axis, one, size in zip(ins[0].axes, ones, shape, strict=True)
    ]
    return Axes(tuple(axes))


WINDOWS = ('window_dimensions', 'window_strides', 'padding', 'base_dilation', 'window_dilation')


def _of_matrices(params: dict, ins: list[Axes], shape: tuple[int, ...]) -> Axes:
    """Linear algebra on the last two axes, for each place in the others."""
    batch = len(ins[0].axes) - 2
    axes = [
        next((o.axes[n] for o in ins if n < len(o.axes) and _is_named(o.axes[n])), _nameless(shape[n]))
        if n < batch
        else _nameless(shape[n])
        for n in range(len(shape))
    ]
    return Axes(tuple(axes))


def _fft(params: dict, ins: list[Axes], shape: tuple[int, ...]) -> Axes:
    kept = len(shape) - len(params['fft_lengths'])
    axes = [axis if n < kept else _nameless(shape[n]) for n, axis in enumerate(ins[0].axes)]
    return Axes(tuple(axes))


def _dot_general(params: dict, ins: list[Axes], shape: tuple[int, ...]) -> Axes:
    (contracted, batch) = params['dimension_numbers']
    kept = [
        ins[0].axes[a] if _is_named(ins[0].axes[a]) else ins[1].axes[b] for a, b in zip(*batch, strict=True)
    ]
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
    """A window has those of the operand's axes that it takes whole. The other axes are those of the indices, and of the
    operand's those that go along with them. If a named axis is looked up in, its places are known at run time only."""
    numbers, sizes = params['dimension_numbers'], params['slice_sizes']
    batching = dict(zip(numbers.start_indices_batching_dims, numbers.operand_batching_dims, strict=True))
    looked_up = [n for n in numbers.start_index_map if sizes[n] != ins[0].shape[n]]
    is_data = any(_is_named(ins[0].axes[n]) for n in looked_up)
    operand, indices = ins[0], ins[1]
    gone = {*numbers.collapsed_slice_dims, *numbers.operand_batching_dims}
    windows = [n for n in range(len(operand.axes)) if n not in gone]
    axes = list(unknown(shape).axes)
    for place, n in zip(numbers.offset_dims, windows, strict=True):
        if sizes[n] == operand.shape[n]:
            axes[place] = operand.axes[n]
    others = [n for n in range(len(shape)) if n not in numbers.offset_dims]
    for number, (place, axis) in enumerate(zip(others, indices.axes[:-1], strict=True)):
        if number in batching and _is_named(operand.axes[batching[number]]):
            axes[place] = operand.axes[batching[number]]
        elif not is_data or number in batching:
            axes[place] = axis
    return Axes(tuple(axes))


def _scatter(params: dict, ins: list[Axes], shape: tuple[int, ...]) -> Axes:
    """The axes of the operand that is written into, but for those along which the indices say where."""
    numbers = params['dimension_numbers']
    return _mixed(ins[0], set(numbers.scatter_dims_to_operand_dims))


def _updated(params: dict, ins: list[Axes], shape: tuple[int, ...]) -> Axes:
    """A slice written into an operand. Along an axis that it doesn't fill, its own places are elsewhere."""
    operand, update = ins[:2]
    if update.shape == shape:
        return update
    axes = []
    for old, new, size, whole in zip(operand.axes, update.axes, update.shape, shape, strict=True):
        if size == whole and (old == new or not _is_named(old) or not _is_named(new)):
            axes.append(old if _is_named(old) else new)
        else:
            axes.append(_nameless(whole))
    return Axes(tuple(axes))


def _convolution(params: dict, ins: list[Axes], shape: tuple[int, ...]) -> Axes:
    numbers = params['dimension_numbers']
    axes = list(unknown(shape).axes)
    if params['batch_group_count'] != 1:
        return unknown(shape)
    axes[numbers.out_spec[0]] = ins[0].axes[numbers.lhs_spec[0]]
    return Axes(tuple(axes))


def _nothing(params: dict, ins: list[Axes], shape: tuple[int, ...]) -> Axes:
    return unknown(shape)


_FIX = ('squeeze', 'concatenate', 'stack')
"""Primitives whose rules say themselves which places are fixed."""

_EACH = {'sort': _along, 'optimization_barrier': _same}

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
    'dynamic_update_slice': _updated,
    'fft': _fft,
    **dict.fromkeys(('top_k', 'approx_top_k'), _top),
    **dict.fromkeys(('cumsum', 'cumprod', 'cummax', 'cummin', 'cumlogsumexp'), _cumulated),
    **dict.fromkeys(('reduce_window_max', 'reduce_window_min', 'reduce_window_sum'), _windows),
    **dict.fromkeys(
        ('cholesky', 'triangular_solve', 'lu', 'qr', 'geqrf', 'eigh', 'eig', 'svd', 'householder_product'),
        _of_matrices,
    ),
    **dict.fromkeys(
        ('scatter', 'scatter-add', 'scatter_add', 'scatter_mul', 'scatter_min', 'scatter_max'), _scatter
    ),
    **dict.fromkeys(
        (
            'reduce_sum',
            'reduce_max',
            'reduce_min',
            'reduce_prod',
            'reduce_and',
            'reduce_or',
            'reduce_xor',
            'argmax',
            'argmin',
        ),
        _reduce,
    ),
}
