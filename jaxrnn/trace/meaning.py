"""What axes mean, followed through a whole jaxpr: into the loops, calls, branches and shard_maps that it holds."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from jax.extend import core

from jaxrnn.trace import axes
from jaxrnn.trace.axes import Axes, Axis, Factor
from jaxrnn.trace.devices import Devices
from jaxrnn.trace.equations import holds, inner, scan_counts
from jaxrnn.trace.sharded import entered, left, sliced, starts, through_collective
from jaxrnn.trace.times import Times
from jaxrnn.trace.values import Place, Value, is_backward


class AxisMeaning:
    """Follows axes from the operands of equations to their results, and notes which of them loops run over.

    `late` is as in `axes.follow`.
    """

    def __init__(self, devices: Devices):
        self.devices = devices
        self.times = Times()

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
        made = self._through_equation(equation, params, ins, late)
        self.times.see(equation, made)
        return made

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
        self.times.run_over(equation, names)
        inside = [*ins[: consts + carried], *(axes.along(a) for a in xs)]
        made = self.through(params['jaxpr'].jaxpr, inside, late)
        # What is carried may have got its names only in the first iteration.
        if any(old.names() != new.names() for old, new in zip(ins[consts:], made[:carried], strict=False)):
            inside[consts : consts + carried] = [
                axes.unfixed(new if new.names() else old, names)
                for old, new in zip(ins[consts:], made[:carried], strict=False)
            ]
        return inside, over

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
                carried = ins[params['cond_nconsts'] + params['body_nconsts'] :]
                return [
                    a if a.shape == tuple(s) else axes.unknown(s)
                    for a, s in zip(carried, shapes, strict=True)
                ]
            case 'cond':
                made = [self.through(branch.jaxpr, ins[1:], late) for branch in params['branches']]
                return [max(of_each, key=lambda a: len(a.names())) for of_each in zip(*made, strict=True)]
            case 'shard_map':
                return self._through_shards(equation, ins, late)
        if not shapes:
            return []
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
        given = [entered(a, spec, layout) for a, spec in zip(ins, params['in_specs'], strict=True)]
        with self.devices.within(layout):
            made = self.through(params['jaxpr'], given, late)
        joined = zip(made, params['out_specs'], shapes, strict=True)
        return [left(a, spec, shape, layout) for a, spec, shape in joined]
