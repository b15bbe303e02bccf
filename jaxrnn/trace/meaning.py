"""What axes mean, followed through a whole jaxpr: into the loops, calls, branches and shard_maps that it holds."""

import functools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from jax.extend import core

from jaxrnn.trace import axes
from jaxrnn.trace.axes import Axes, Axis, Factor
from jaxrnn.trace.devices import Devices, Layout, dims
from jaxrnn.trace.equations import holds, inner, scan_counts
from jaxrnn.trace.sharded import entered, left, sliced, starts, through_collective
from jaxrnn.trace.times import TRANSPOSED, Times
from jaxrnn.trace.values import Place, Value, is_backward


def solver(params: dict, ins: Sequence[Axes]) -> tuple[Any, list[Axes]] | None:
    """Of a linear system the jaxpr that solves it, and the axes of its arguments; None in a version of JAX that keeps
    them otherwise."""
    try:
        of_each, lengths = params['jaxprs'], params['const_lengths']
        start = lengths.matvec + lengths.vecmat
        constants, right_side = ins[start : start + lengths.solve], ins[sum(lengths) :]
        jaxpr = of_each.solve.jaxpr
    except (AttributeError, KeyError, TypeError):
        return None
    arguments = [*constants, *right_side]
    return (jaxpr, arguments) if len(arguments) == len(jaxpr.invars) else None


MOST_SETTLING = 4
"""So many times a loop's body is followed until what it carries means the same as before."""


class AxisMeaning:
    """Follows axes from the operands of equations to their results, and notes which of them loops run over.

    `late` is as in `axes.follow`.
    """

    def __init__(self, devices: Devices):
        self.devices = devices
        self.times = Times()
        self.loops: list[Any] = []  # around the jaxpr that is followed, the outermost first

    def of_results(self, equation: Any, operands: Sequence[Value], place: Place | None) -> list[Axes]:
        """As `follow`, where the operands' arrays are known, too: they say where a slice starts."""
        params, ins = equation.params, [operand.axes for operand in operands]
        late = not is_backward(equation, place)
        if equation.primitive.name != 'dynamic_slice':
            return self.follow(equation, params, ins, late)
        shape, layout = np.shape(equation.invars[0].aval), self.devices.layout
        at = starts([operand.array for operand in operands[1:]], shape, params['slice_sizes'], layout)
        params = {**params, 'starts': [0 if start is None else start[0] for start in at]}
        found = [sliced(made, shape, at) for made in self.follow(equation, params, ins, late)]
        self.times.take(place, ins[0], found[0])
        return found

    def follow(self, equation: Any, params: dict, ins: Sequence[Axes], late: bool) -> list[Axes]:
        """Axes of an equation's results, of those of its operands."""
        late = late and TRANSPOSED not in str(equation.source_info.name_stack)
        made = self._through_equation(equation, params, ins, late)
        self.times.see(equation, made)
        self._notice(equation, params, ins, made, late)
        return made

    def _notice(
        self, equation: Any, params: dict, ins: Sequence[Axes], made: Sequence[Axes], late: bool
    ) -> None:
        """What an equation shows of the axes of its operands."""
        scopes = str(equation.source_info.name_stack)
        self.times.maps_gradients |= 'vmap(jvp(' in scopes or f'vmap({TRANSPOSED}' in scopes
        name = equation.primitive.name
        if name in axes.ELEMENTWISE and len(ins) > 1 and any(a.names() for a in ins):
            self.times.meet(ins, len(made[0].axes))
        if name == 'dynamic_slice' and self.loops:
            self.times.take_in(self.loops[-1], ins[0], made[0])
        if name == 'dot_general' and late:
            over = params['dimension_numbers'][0]
            summed = (operand.axes[n] for operand, at in zip(ins, over, strict=True) for n in at)
            self.times.contracted |= {factor.name for axis in summed for factor in axis if factor.name}

    def through(self, jaxpr: Any, ins: Sequence[Axes], late: bool) -> list[Axes]:
        """Axes of a jaxpr's outputs, of those of its arguments."""
        known: dict[Any, Axes] = dict(zip(jaxpr.invars, ins, strict=True))

        def read(variable: Any) -> Axes:
            if isinstance(variable, core.Literal):
                return axes.unknown(np.shape(variable.val))
            return known.get(variable) or axes.unknown(np.shape(variable.aval))

        for equation in jaxpr.eqns:
            made = self.follow(equation, equation.params, [read(v) for v in equation.invars], late)
            known |= zip(equation.outvars, made, strict=True)
        return [read(variable) for variable in jaxpr.outvars]

    def inside_scan(self, equation: Any, ins: Sequence[Axes], late: bool) -> tuple[list[Axes], Axis | None]:
        """Axes of the arguments of a loop's body, and the axis that the loop runs over, if that is known."""
        params = equation.params
        consts, carried = scan_counts(params)
        xs = ins[consts + carried :]
        over = next((a.axes[0] for a in xs if any(f.name for f in a.axes[0])), None)
        names = {f.name for a in xs for f in a.axes[0] if f.name}
        self.times.run_over(equation, names, late)
        inside = [*ins[: consts + carried], *(axes.along(a) for a in xs)]
        self.loops.append(equation)
        inside = self._settled(params['jaxpr'], inside, slice(consts, consts + carried), names, late)
        self.loops.pop()
        return inside, over

    def _settled(
        self, body: Any, inside: list[Axes], carried: slice, over: set[str], late: bool
    ) -> list[Axes]:
        """Axes of the arguments of a loop's body that are those of what it hands on. What is carried may get its names
        only in the first iteration. If they change again, as where it is moved along an axis, it has none."""
        for _ in range(MOST_SETTLING):
            made = self.through(body.jaxpr, inside, late)
            old = inside[carried]
            new = [axes.unfixed(axes.agreed(a, b), over) for a, b in zip(old, made[: len(old)], strict=True)]
            if [a.axes for a in new] == [a.axes for a in old]:
                return inside
            inside[carried] = new
        inside[carried] = [axes.unknown(a.shape) for a in inside[carried]]
        return inside

    def _through_equation(self, equation: Any, params: dict, ins: Sequence[Axes], late: bool) -> list[Axes]:
        shapes = [np.shape(variable.aval) for variable in equation.outvars]
        match holds(equation):
            case 'call':
                held = inner(equation)
                assert held is not None
                return self.through(held[0], ins, late)
            case 'scan':
                return self._through_scan(equation, ins, late)
            case 'while':
                fixed = params['body_nconsts']
                self.loops.append(equation)
                inside = list(ins[params['cond_nconsts'] :])
                inside = self._settled(
                    params['body_jaxpr'], inside, slice(fixed, fixed + len(shapes)), set(), late
                )
                self.loops.pop()
                return inside[fixed:]
            case 'cond':
                made = [self.through(branch.jaxpr, ins[1:], late) for branch in params['branches']]
                return [functools.reduce(axes.agreed, of_each) for of_each in zip(*made, strict=True)]
            case 'shard_map':
                return self._through_shards(equation, ins, late)
        if not shapes:
            return []
        if equation.primitive.name == 'custom_linear_solve' and (held := solver(params, ins)) is not None:
            return self.through(held[0], held[1], late)
        if (passed := through_collective(equation, ins, shapes, self.devices.layout)) is not None:
            return passed
        return axes.follow(equation.primitive.name, params, ins, shapes, late)

    def _through_scan(self, equation: Any, ins: Sequence[Axes], late: bool) -> list[Axes]:
        params = equation.params
        _, carried = scan_counts(params)
        inside, over = self.inside_scan(equation, ins, late)
        made = self.through(params['jaxpr'].jaxpr, inside, late)
        over = over or (Factor('', params['length']),)
        return [*made[:carried], *(axes.stacked(a, over) for a in made[carried:])]

    def _through_shards(self, equation: Any, ins: Sequence[Axes], late: bool) -> list[Axes]:
        params, layout = equation.params, self.devices.layout_of(equation)
        shapes = [np.shape(variable.aval) for variable in equation.outvars]
        if layout is None:
            return [axes.unknown(shape) for shape in shapes]
        self._notice_devices(ins, params['in_specs'], layout)
        given = [entered(a, spec, layout) for a, spec in zip(ins, params['in_specs'], strict=True)]
        with self.devices.within(layout):
            made = self.through(params['jaxpr'], given, late)
        joined = zip(made, params['out_specs'], shapes, strict=True)
        return [left(a, spec, shape, layout) for a, spec, shape in joined]

    def _notice_devices(self, ins: Sequence[Axes], specs: Sequence[Any], layout: Layout) -> None:
        """An axis of which each device has one place runs over the devices."""
        for operand, spec in zip(ins, specs, strict=True):
            for axis, over in zip(operand.axes, dims(spec, len(operand.axes)), strict=True):
                count = math.prod(layout.mesh.shape[name] for name in over)
                if count > 1 and len(axis) == 1 and axis[0].name and axis[0].size == count:
                    self.times.among_devices.add(axis[0].name)
