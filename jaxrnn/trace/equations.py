"""Equations of a jaxpr: what is inside one, and one equation as a function."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.extend import core

OPENED = ('scan', 'while', 'cond', 'shard_map')
"""Primitives that are opened by their own rules."""


EACH = frozenset(
    (
        *(
            'optimization_barrier',
            'psum',
            'psum2',
            'psum_invariant',
            'pmax',
            'pmin',
            'ppermute',
            'device_put',
        ),
        *(
            'pvary',
            'pcast',
            'pbroadcast',
            'all_gather',
            'all_gather_invariant',
            'reduce_scatter',
            'all_to_all',
        ),
    )
)
"""Primitives of which each result comes from the operand at its place alone, however many there are."""


def parents_of(equation: Any, operands: Sequence[Any]) -> list[tuple[Any, ...]]:
    """For each result of an equation what it is computed from, of what stands for its operands."""
    count = len(equation.outvars)
    if equation.primitive.name in EACH and len(operands) == count:
        return [(operand,) for operand in operands]
    return [tuple(operands)] * count


def holds(equation: Any) -> str:
    """What kind of inside an equation has: one of OPENED, or 'call'; '' if it has none."""
    name = equation.primitive.name
    return name if name in OPENED else 'call' if inner(equation) is not None else ''


def name_of(equation: Any) -> str:
    """The primitive, by the name of the function that users call."""
    return equation.primitive.name.removesuffix('_invariant')  # psum_invariant: a psum in a checked shard_map


def inner(equation: Any) -> tuple[Any, Sequence[Any]] | None:
    """Jaxpr and constants of a call, whose arguments and results are the equation's own; None for anything else."""
    if equation.primitive.name in (*OPENED, 'pallas_call'):
        return None
    held = [value for value in equation.params.values() if isinstance(value, core.Jaxpr | core.ClosedJaxpr)]
    if len(held) != 1:
        return None
    jaxpr, consts = (
        (held[0].jaxpr, held[0].consts) if isinstance(held[0], core.ClosedJaxpr) else (held[0], ())
    )
    # Else it is the function of two numbers by which a reduction or a scatter combines many.
    same = _shapes(jaxpr.invars) == _shapes(equation.invars) and _shapes(jaxpr.outvars) == _shapes(
        equation.outvars
    )
    return (jaxpr, consts) if same and equation.primitive.name not in REDUCERS else None


REDUCERS = ('reduce', 'reduce_window', 'scatter', 'select_and_scatter')
"""Primitives whose jaxpr combines two numbers. If they are given scalars, that looks like the jaxpr of a call."""


def _shapes(variables: Sequence[Any]) -> list[tuple[int, ...]]:
    return [np.shape(variable.aval) for variable in variables]


def alone(equation: Any) -> Callable[..., list[Any]]:
    """An equation as a function of its operands that are no literals."""
    if equation.primitive.name not in OPENED and (held := inner(equation)) is not None:
        # Compiled anew, a call donates none of its operands, so they can still be read.
        called = core.jaxpr_as_fun(core.ClosedJaxpr(*held))
        if not is_short(held[0]):
            called = jax.jit(called)
        values = [v.val if isinstance(v, core.Literal) else None for v in equation.invars]

        def call(*arrays: Any) -> list[Any]:
            left = iter(arrays)
            return called(*(next(left) if value is None else value for value in values))

        return call
    results = [core.Var(variable.aval) for variable in equation.outvars]  # some may be dropped
    operands = list(dict.fromkeys(v for v in equation.invars if not isinstance(v, core.Literal)))
    about = _about()('trace', 'one equation', ('',) * len(operands), ('',) * len(results))
    jaxpr = core.Jaxpr((), operands, results, [equation.replace(outvars=results)], equation.effects, about)
    function = core.jaxpr_as_fun(core.ClosedJaxpr(jaxpr, ()))
    if equation.primitive.name == 'shard_map':  # else it would run operation by operation
        function = jax.jit(function)
    places = [equation.invars.index(variable) for variable in operands]
    given = [n for n, v in enumerate(equation.invars) if not isinstance(v, core.Literal)]

    def run(*arrays: Any) -> list[Any]:
        by_place = dict(zip(given, arrays, strict=True))
        return list(function(*(by_place[place] for place in places)))

    return run


SHORT = 16
"""So many equations are evaluated one by one sooner than they are compiled."""


def is_short(jaxpr: Any) -> bool:
    """Whether it has at most SHORT equations and no loop, in each call that it holds, too."""
    held = [inner(equation) for equation in jaxpr.eqns if holds(equation) == 'call']
    return (
        len(jaxpr.eqns) <= SHORT
        and not any(equation.primitive.name in OPENED for equation in jaxpr.eqns)
        and all(is_short(one[0]) for one in held if one is not None)
    )


def last_uses(jaxpr: Any) -> dict[int, list[Any]]:
    """Equation number -> variables that are not read after it."""
    last: dict[Any, int] = {}
    for number, equation in enumerate(jaxpr.eqns):
        for variable in (*equation.invars, *equation.outvars):
            if not isinstance(variable, core.Literal):
                last[variable] = number
    for variable in jaxpr.outvars:
        if not isinstance(variable, core.Literal):
            last.pop(variable, None)
    uses: dict[int, list[Any]] = {}
    for variable, number in last.items():
        uses.setdefault(number, []).append(variable)
    return uses


@functools.cache
def _about() -> Any:
    """The class of a jaxpr's debug_info, which jax.extend doesn't name in every version."""
    return type(jax.make_jaxpr(lambda: ())().jaxpr.debug_info)


def scan_counts(equation_params: dict[str, Any]) -> tuple[int, int]:
    """How many of a scan's operands are constants, and how many its carry."""
    if 'num_consts' in equation_params:
        return equation_params['num_consts'], equation_params['num_carry']
    consts, carry, _ = equation_params['ft_in'].unpack()  # from jax 0.11 on
    return len(list(consts.vals)), len(list(carry.vals))
