"""The devices that a shard_map runs on, and how an equation is computed there.

Inside a shard_map a value is kept as one array with leading axes for the mesh's, [*mesh, *local]. An axis over which
the value doesn't vary has length 1. Each equation is computed by a shard_map of its own, so that collectives see all
devices. Three kinds of shard_map are not opened, but named as a whole: one within another, one on a mesh that isn't
known outside the step, and one with operands that are yet to be summed (unreduced).
"""

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxrnn.trace import equations
from jaxrnn.trace.values import Value, is_key


class Layout(NamedTuple):
    """How values lie on devices. Outside any shard_map there are none."""

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
        """`function` on every device. Operands and results are the variables of its jaxpr."""
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
        """An array with leading axes as the variable has them. A scalar that has none is a literal."""
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
        """A device that isn't at hand computes what the first one at hand does. Its own values don't belong in this
        branch: they might be bad in it, or keep a loop going for ever."""
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
        """Only the elements of devices at hand."""
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


class Devices:
    """The devices at hand: the functions that compute equations on them, each compiled once."""

    def __init__(self) -> None:
        self.layout = Layout()  # of the shard_map that is open
        self.meshes: list[Mesh] = []  # those that the arguments lie on
        self._equations: dict[tuple, tuple[Any, Callable]] = {}  # by identity of the equation, which is kept
        self._jaxprs: dict[tuple, tuple[Any, Callable]] = {}

    def add_mesh_of(self, array: Any) -> None:
        if (
            isinstance(array, jax.Array)
            and isinstance(array.sharding, NamedSharding)
            and isinstance(array.sharding.mesh, Mesh)
        ):
            self.meshes.append(array.sharding.mesh)

    def layout_of(self, equation: Any) -> Layout | None:
        """Of a shard_map; None if it can't be opened."""
        return layout_of(equation, self.meshes)

    @contextlib.contextmanager
    def within(self, layout: Layout) -> Iterator[Layout]:
        """While it lasts, equations are computed in this layout."""
        before, self.layout = self.layout, layout
        try:
            yield layout
        finally:
            self.layout = before

    def only_where(self, condition: Any) -> contextlib.AbstractContextManager[Layout]:
        """While it lasts, of the devices at hand those for which a condition holds."""
        active = self.layout.where(condition)
        return self.within(self.layout if active.all() else self.layout.only(active))

    def function_of(self, equation: Any) -> Callable[..., list[Any]]:
        """An equation as a function of its operands that are no literals."""
        key = id(equation), self.layout.key
        if key not in self._equations:
            given = [v for v in equation.invars if not isinstance(v, core.Literal)]
            run = self.layout.each(equations.alone(equation), given, equation.outvars)
            self._equations[key] = equation, run
        return self._equations[key][1]

    def compiled(self, closed: Any) -> Callable[..., list[Any]]:
        """A closed jaxpr as a function, compiled."""
        key = id(closed), self.layout.key
        if key not in self._jaxprs:
            compiled = jax.jit(core.jaxpr_as_fun(closed))
            run = self.layout.each(compiled, closed.jaxpr.invars, closed.jaxpr.outvars)
            self._jaxprs[key] = closed, run
        return self._jaxprs[key][1]


def layout_of(equation: Any, known: Sequence[Mesh] = ()) -> Layout | None:
    """Of a shard_map; None if it can't be opened. `known` are meshes that it may run on, if it doesn't name one."""
    params = equation.params
    manual = params.get('newly_manual_axes', params.get('manual_axes', frozenset()))
    if hasattr(jax.sharding, 'get_mesh'):
        with contextlib.suppress(ValueError):  # within a trace there is none to be had
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
    """A NumPy array, which has no rules about devices when it is reshaped. A key stays as it is."""
    return array if is_key(array) else np.asarray(array)


def _numpy(array: Any) -> Any:
    return jnp if is_key(array) else np
