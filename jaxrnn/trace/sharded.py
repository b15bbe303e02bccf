"""Values that differ between devices: what a shard_map holds, evaluated one equation at a time.

Inside of a shard_map a value is kept as one array with leading axes for the mesh's, [*mesh, *local]; one over which the
value doesn't vary has length 1. Each equation is computed by a shard_map of its own, so that collectives see all
devices. Not opened, but named as a whole, are: a shard_map within another, one on a mesh that isn't known outside of
the step, and one with operands that are yet to be summed (unreduced).
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxrnn.trace.axes import Axes, Axis, Factor, Shard, unknown
from jaxrnn.trace.values import Value, is_key


class Layout(NamedTuple):
    """How values lie on devices; outside of any shard_map there are none."""

    mesh: Any = None
    names: tuple[str, ...] = ()  # of the mesh's axes, which lead each array
    checked: bool = False  # whether JAX knows over which of them a value varies (check_vma)
    active: Any = None  # [*mesh] bool: where the branch or iteration at hand is computed; None: everywhere

    @property
    def sizes(self) -> tuple[int, ...]:
        return tuple(self.mesh.shape[name] for name in self.names)

    @property
    def key(self) -> tuple:
        return self.mesh, self.names, self.checked

    # Computing.

    def each(self, function: Callable, operands: Sequence[Any], results: Sequence[Any]) -> Callable:
        """`function` on every device; operands and results are the variables of its jaxpr."""
        if not self.names:
            return function
        lead = len(self.names)

        def local(*arrays: Any) -> tuple[Any, ...]:
            made = function(*(array.reshape(array.shape[lead:]) for array in arrays))
            return tuple(array.reshape((1,) * lead + array.shape) for array in made)

        mapped = jax.jit(
            jax.shard_map(
                local,
                mesh=self.mesh,
                in_specs=tuple(map(self.spec, operands)),
                out_specs=tuple(map(self.spec, results)),
                check_vma=self.checked,
                axis_names=set(self.names),
            )
        )

        def run(*arrays: Any) -> list[Any]:
            given = [
                jax.device_put(self.lift(array, v), NamedSharding(self.mesh, self.spec(v)))
                for array, v in zip(arrays, operands, strict=True)
            ]
            return [host(array) for array in mapped(*given)]

        return run

    def spec(self, variable: Any) -> P:
        """Of the leading axes."""
        varying = self.varying(variable)
        return P(*(name if name in varying else None for name in self.names))

    def varying(self, variable: Any) -> frozenset[str]:
        return varying(variable) if self.checked else frozenset(self.names)

    def lift(self, array: Any, variable: Any) -> Any:
        """With leading axes as the variable has them; a scalar without any was written down."""
        wanted = self.varying(variable)
        lead = tuple(self.mesh.shape[name] if name in wanted else 1 for name in self.names)
        if np.ndim(array) == 0:
            array = np.asarray(array, variable.aval.dtype).reshape((1,) * len(lead))
        array = array[tuple(slice(0, 1) if size == 1 else slice(None) for size in lead)]
        shape = (*lead, *array.shape[len(lead) :])
        return array if array.shape == shape else _numpy(array).broadcast_to(array, shape)

    def split(self, array: Any, spec: P) -> Any:
        """An array as the devices are given it."""
        shape: list[int] = []
        at: dict[str, int] = {}
        local = []
        for size, over in zip(np.shape(array), dims(spec, np.ndim(array)), strict=True):
            for name in over:
                at[name] = len(shape)
                shape.append(self.mesh.shape[name])
            local.append(len(shape))
            shape.append(size // math.prod(self.mesh.shape[name] for name in over))
        order = [at[name] for name in self.names if name in at]
        moved = _numpy(array).transpose(host(array).reshape(shape), (*order, *local))
        lead = tuple(self.mesh.shape[name] if name in at else 1 for name in self.names)
        return moved.reshape((*lead, *moved.shape[len(order) :]))

    def spread(self, array: Any) -> Any:
        """What is the same on all devices."""
        return host(array).reshape((1,) * len(self.names) + np.shape(array)) if self.names else array

    def take(self, array: Any, place: int) -> Any:
        """array[place] of the first axis that isn't a device's."""
        return array[(*(slice(None),) * len(self.names), place)]

    def aligned(self, value: Value, rank: int) -> Value:
        """A scalar among arrays of `rank`: its devices' axes against theirs."""
        if np.ndim(value.array) != len(self.names) or is_key(value.array):
            return value
        shape = np.shape(value.array) + (1,) * (rank - len(self.names))
        return value._replace(array=np.asarray(value.array).reshape(shape))

    # Devices that go different ways.

    def where(self, truth: Any) -> np.ndarray:
        """Where a condition holds, among the devices at hand."""
        holds = np.broadcast_to(np.asarray(truth), self.sizes if self.names else ())
        return holds if self.active is None else holds & self.active

    def only(self, active: np.ndarray) -> 'Layout':
        return self._replace(active=active)

    def fill(self, value: Value) -> Value:
        return value._replace(array=self.filled(value.array))

    def merge(self, new: Value, old: Value) -> Value:
        """`new` for the devices at hand, `old` for the others."""
        if self.active is None:
            return new
        node = old.node if old.node.bad and not new.node.bad else new.node
        return Value(self.either(new.array, old.array), new.axes, node)

    def filled(self, array: Any) -> Any:
        """A device that isn't at hand computes what the first one does that is: its own values were never meant for
        this branch, and might be bad in it or keep a loop going for ever."""
        if np.ndim(array) == 0 or self.active is None:
            return array
        lead = array.shape[: len(self.names)]
        first = np.argwhere(self.active)[0]
        at = (slice(n, n + 1) if size > 1 else slice(None) for n, size in zip(first, lead, strict=True))
        source = array[tuple(at)]
        return self.either(array, source)

    def either(self, there: Any, elsewhere: Any) -> Any:
        """`there` where devices are at hand."""
        lead = len(self.names)
        if self.active is None or not lead:
            return there
        wide = max(np.ndim(there), np.ndim(elsewhere)) - lead
        chosen = self.active.reshape(self.active.shape + (1,) * max(wide, 0))
        return _numpy(there).where(chosen, there, elsewhere)

    def seen(self, new: np.ndarray) -> np.ndarray:
        """Elements of devices at hand."""
        if self.active is None or new.ndim < len(self.names):
            return new
        lead = new.shape[: len(self.names)]
        active = self.active
        for n, size in enumerate(lead):
            if size == 1:
                active = active.any(axis=n, keepdims=True)
        return new & active.reshape(active.shape + (1,) * (new.ndim - active.ndim))

    def devices(self, new: np.ndarray) -> tuple[dict[str, int], ...]:
        """Which devices elements belong to, by the mesh's axes over which the array varies."""
        lead = len(self.names)
        if not lead or new.ndim < lead:
            return ()
        over = [n for n in range(lead) if new.shape[n] > 1]
        found = np.argwhere(new.any(axis=tuple(range(lead, new.ndim))))
        return tuple({self.names[n]: int(at[n]) for n in over} for at in found) if over else ()


def layout_of(equation: Any, known: Sequence[Mesh] = ()) -> Layout | None:
    """Of a shard_map; None if it can't be opened. `known` are meshes that it may run on, if it doesn't say."""
    params = equation.params
    manual = params.get('newly_manual_axes', params.get('manual_axes', frozenset()))
    if hasattr(jax.sharding, 'get_mesh'):
        known = (jax.sharding.get_mesh(), *known)
    fit = (m for m in (params['mesh'], *known) if isinstance(m, Mesh) and m.shape == params['mesh'].shape)
    mesh = next(fit, None)
    if mesh is None or not manual:
        return None
    names = tuple(name for name in mesh.axis_names if name in manual)
    specs = [spec for key in ('in_specs', 'out_specs') for spec in params.get(key, (None,))]
    if not all(isinstance(spec, P) and not getattr(spec, 'unreduced', None) for spec in specs):
        return None
    return Layout(mesh, names, bool(params.get('check_vma', False)))


def varying(variable: Any) -> frozenset[str]:
    """Over which of the mesh's axes JAX says that a value varies."""
    kind = getattr(variable.aval, 'mat', None)
    found = kind.varying if kind is not None else getattr(variable.aval, 'vma', frozenset())
    return frozenset(found)


def dims(spec: P, rank: int) -> list[tuple[str, ...]]:
    """For each of an array's axes those of the mesh over which it is split."""
    over = [() if part is None else part if isinstance(part, tuple) else (part,) for part in spec]
    return over + [()] * (rank - len(over))


def host(array: Any) -> Any:
    """Without devices, whose own rules of what may be reshaped aren't asked; a key stays."""
    return array if is_key(array) else np.asarray(array)


def _numpy(array: Any) -> Any:
    return jnp if is_key(array) else np


# What axes mean.


def entered(axes: Axes, spec: P, layout: Layout) -> Axes:
    """Of what one device is given."""
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
    """Of what the devices' results are joined to."""
    mentioned = {name for over in dims(spec, len(shape)) for name in over}
    lost = {s.name for s in axes.shards if layout.names[s.axis] not in mentioned}
    found = set()  # names whose places the joined axes tell
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
    """Each device's only place is one of several where they are together: it moves from the whole to an axis."""
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
    made = [tuple(f._replace(name='') if f.name in names else f for f in axis) for axis in axes.axes]
    fixed = tuple(item for item in axes.fixed if item[0] not in names)
    return Axes(tuple(made), fixed, tuple(s for s in axes.shards if s.name not in names))


def through_collective(
    equation: Any, ins: Sequence[Axes], shapes: Sequence[Sequence[int]], layout: Layout
) -> list[Axes] | None:
    """Axes of the results of an equation that lets devices talk; None for another."""
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
    """Where a slice starts, for each axis: on the first device, and how far on on the next along each axis of the mesh;
    None where that isn't regular."""
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
    """Of a slice of an array of `shape`, which starts elsewhere on each device; `axes` are the first device's."""
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
