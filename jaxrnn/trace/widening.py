"""A step that computes in float64 whatever it computes in narrower types, those that are written down in it, too.

Given float64 arguments, most steps compute in float64 by themselves. But a carry that is written as float32 can't be
traced with them, a flax module with `dtype=float32` stays narrow, and `jax.random` draws other numbers. So the step is
traced as it was trained, in its own types, and its jaxpr is traced once more: equation by equation, where each value
has the wide type of its own. Loops stay loops, branches stay branches. Random bits are those of the step itself.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend import core

from jaxrnn.errors import UserError
from jaxrnn.trace.equations import holds, inner, scan_counts
from jaxrnn.trace.naming import source_of
from jaxrnn.trace.tracing import as_jaxpr
from jaxrnn.trace.values import Place, is_key
from jaxrnn.types import Step, Tree

AS_DRAWN = ('bitcast_convert_type', 'random_gamma', 'rng_uniform', 'nextafter')
"""Primitives whose results are made of the bits of a type: they are computed in the type that they were traced with."""

HALF = {'float64': 'float32', 'complex128': 'complex64', 'int64': 'int32', 'uint64': 'uint32'}
"""Types that are there under x64 alone, and those that stand for them elsewhere."""

TYPES = ('new_dtype', 'preferred_element_type', 'dtype', 'out_dtype')
"""Parameters of equations that fix the type of a result."""


def widened(step: Step, like: tuple[Tree, Tree] | None = None) -> Step:
    """The same step, computed in float64. It can be jitted, and its state handed on from step to step.

    Numbers that are written in the step keep the value that they have in its own types.

    Args:
        step: `(state, batch) -> (state, record)`, a pure function, jitted or not.
        like: a state and a batch of the types that the step is trained with; arrays, or anything else with a shape and
            a dtype. If not given, float64 arguments stand for float32.

    Returns:
        A step that takes arguments of any floating-point type, best float64. Of its results the state has the types
        of the state that it was given, the record is in float64. It is to be called, and jitted, under
        `jax.enable_x64(True)`.

    Raises:
        UserError: when it is called: an operation of the step doesn't work in float64.

    Example:
        In float32 a sum of ones ends at 2^24.

        >>> import jax, jax.numpy as jnp
        >>> from jaxrnn import trace
        >>> def step(total, ones):
        ...     total, _ = jax.lax.scan(lambda sum, x: (sum + x, None), total.astype(jnp.float32), ones)
        ...     return total, {'loss': total}
        >>> state, batch = jnp.float32(2**24), jnp.ones(3)
        >>> float(step(state, batch)[0]) - 2**24
        0.0
        >>> with jax.enable_x64(True):
        ...     wide = jax.jit(trace.widened(step))(state.astype(jnp.float64), batch.astype(jnp.float64))[0]
        >>> float(wide) - 2**24, wide.dtype
        (3.0, dtype('float64'))
    """

    def wide_step(state: Tree, batch: Tree) -> tuple[Tree, Tree]:
        given = (state, batch)
        types = jax.tree.map(_own_type, given if like is None else like)
        with jax.enable_x64(False):  # as it was trained; what was 64 bits wide becomes so again
            closed, outputs = as_jaxpr(step, types)
        with jax.enable_x64(True):
            leaves, variables = jax.tree.leaves(given), closed.jaxpr.invars
            arrays = [_as_wide(leaf, variable) for leaf, variable in zip(leaves, variables, strict=True)]
            made = jax.tree.unflatten(jax.tree.structure(outputs), evaluate(closed, arrays, None))
            return _typed_as(made[0], state), made[1]

    return wide_step


def _own_type(leaf: Any) -> Any:
    """The type of an argument as the step was trained with: without 64 bits."""
    if is_key(leaf):
        return jax.ShapeDtypeStruct(np.shape(leaf), leaf.dtype)
    dtype = np.dtype(getattr(leaf, 'dtype', None) or jnp.result_type(leaf))
    weak = bool(getattr(leaf, 'weak_type', isinstance(leaf, bool | int | float | complex)))
    return jax.ShapeDtypeStruct(np.shape(leaf), HALF.get(dtype.name, dtype), weak_type=weak)


def _typed_as(made: Tree, given: Tree) -> Tree:
    """A state in the types of another, if it has its structure."""
    if jax.tree.structure(made) != jax.tree.structure(given):  # type: ignore[operator]
        return made
    return jax.tree.map(lambda x, like: x if is_key(x) else x.astype(jnp.result_type(like)), made, given)


def evaluate(closed: Any, arguments: Sequence[Any], place: Place | None) -> list[Any]:
    """The outputs of a closed jaxpr, of wide arguments."""
    return _evaluate(closed.jaxpr, closed.consts, arguments, place)


def _evaluate(jaxpr: Any, consts: Sequence[Any], arguments: Sequence[Any], place: Place | None) -> list[Any]:
    values: dict[Any, Any] = {}

    def read(variable: Any) -> Any:
        return _as_wide(variable.val, variable) if isinstance(variable, core.Literal) else values[variable]

    def write(variables: Sequence[Any], arrays: Sequence[Any]) -> None:
        values.update((v, _as_wide(array, v)) for v, array in zip(variables, arrays, strict=True))

    write(jaxpr.constvars, consts)
    write(jaxpr.invars, arguments)
    for equation in jaxpr.eqns:
        with jax.named_scope(str(equation.source_info.name_stack)):
            write(equation.outvars, _results(equation, [read(v) for v in equation.invars], place))
    return [read(variable) for variable in jaxpr.outvars]


def _results(equation: Any, operands: Sequence[Any], place: Place | None) -> Sequence[Any]:
    within, params = Place(equation, None, place), equation.params
    match holds(equation):
        case 'call':
            held = inner(equation)
            assert held is not None
            return _evaluate(*held, operands, within)
        case 'scan':
            return _scan(params, operands, within)
        case 'while':
            return _while(params, operands, within)
        case 'cond':
            branches = [_function(branch, within) for branch in params['branches']]
            return lax.switch(operands[0], branches, *operands[1:])
        case 'shard_map':
            return _shards(equation, operands, within)
    if equation.primitive.name == 'custom_linear_solve':
        return _solved(params, operands, within)
    return _bound(equation, operands, place)


def _function(closed: Any, place: Place) -> Callable[..., list[Any]]:
    return lambda *arrays: evaluate(closed, arrays, place)


def _scan(params: dict[str, Any], operands: Sequence[Any], place: Place) -> list[Any]:
    consts, carried = scan_counts(params)
    fixed, start, xs = operands[:consts], operands[consts : consts + carried], operands[consts + carried :]

    def body(carry: Sequence[Any], at: Sequence[Any]) -> tuple[list[Any], list[Any]]:
        made = evaluate(params['jaxpr'], [*fixed, *carry, *at], place)
        return made[:carried], made[carried:]

    kept = {name: params[name] for name in ('length', 'reverse', 'unroll')}
    last, stacked = lax.scan(body, list(start), list(xs), **kept)
    return [*last, *stacked]


def _while(params: dict[str, Any], operands: Sequence[Any], place: Place) -> list[Any]:
    of_condition, of_both = params['cond_nconsts'], params['cond_nconsts'] + params['body_nconsts']
    asked, fixed = operands[:of_condition], operands[of_condition:of_both]
    condition, body = params['cond_jaxpr'], params['body_jaxpr']
    return lax.while_loop(
        lambda carry: evaluate(condition, [*asked, *carry], place)[0],
        lambda carry: evaluate(body, [*fixed, *carry], place),
        list(operands[of_both:]),
    )


def _shards(equation: Any, operands: Sequence[Any], place: Place) -> Sequence[Any]:
    params = equation.params
    return jax.shard_map(
        lambda *arrays: tuple(_evaluate(params['jaxpr'], (), arrays, place)),
        mesh=params['mesh'],
        in_specs=tuple(params['in_specs']),
        out_specs=tuple(params['out_specs']),
        axis_names=set(params.get('newly_manual_axes', params.get('manual_axes', ()))),
        check_vma=params.get('check_vma', False),
    )(*operands)


def _solved(params: dict[str, Any], operands: Sequence[Any], place: Place) -> list[Any]:
    """A linear system, by the solver that it holds."""
    counts = params['const_lengths']
    before, total = counts.matvec + counts.vecmat, sum(counts)
    given = [*operands[before : before + counts.solve], *operands[total:]]
    return evaluate(params['jaxprs'].solve, given, place)


def _bound(equation: Any, operands: Sequence[Any], place: Place | None) -> Sequence[Any]:
    """The results of an equation that holds no others."""
    name, results = equation.primitive.name, equation.outvars
    if name == 'reduce_precision':
        return operands[:1]
    floats = any(_is_inexact(v.aval) for v in results)
    made = None if name in AS_DRAWN else _in_float64(equation, operands)
    if made is None and floats and name not in AS_DRAWN:
        source, _ = source_of(equation, place)
        raise UserError(
            f'{source}: {name} does not work in float64, so the step cannot be computed in it; '
            f'compute this by other operations, or leave float64 out'
        )
    if made is None:
        pairs = zip(operands, equation.invars, strict=True)
        made = run(equation, [_as_type(x, v.aval.dtype) for x, v in pairs], equation.params)
    return made


def _in_float64(equation: Any, operands: Sequence[Any]) -> Sequence[Any] | None:
    """An equation's results of wide operands; None if it doesn't take them, or if its own results stay narrow."""
    try:
        made = run(equation, operands, wide_params(equation))
    except Exception:  # whatever a primitive raises for a type that it wasn't traced for
        return None
    pairs = zip(made, equation.outvars, strict=True)
    kept = all(not _is_inexact(v.aval) or x.dtype == wide_type(v.aval.dtype) for x, v in pairs)
    return made if kept else None


def run(equation: Any, operands: Sequence[Any], params: dict[str, Any]) -> Sequence[Any]:
    """An equation's results, with these parameters."""
    made = equation.primitive.bind(*operands, **params)
    return made if equation.primitive.multiple_results else [made]


# Types.


def wide_type(dtype: Any) -> Any:
    """What a floating-point type is computed in."""
    return np.dtype(np.complex128 if jnp.issubdtype(dtype, jnp.complexfloating) else np.float64)


def wide_params(equation: Any) -> dict[str, Any]:
    """The parameters of an equation for float64 operands."""
    return {name: _wide_param(name, value) for name, value in equation.params.items()}


def _wide_param(name: str, value: Any) -> Any:
    if name in TYPES and value is not None:
        return wide_type(value) if jnp.issubdtype(value, jnp.inexact) else value
    if name == 'precision' and isinstance(value, lax.DotAlgorithm | lax.DotAlgorithmPreset):
        return None  # it names the types that it multiplies and adds in
    # From jax 0.11 on the two classes are one.
    if isinstance(value, core.ClosedJaxpr) and not isinstance(value, core.Jaxpr) and not value.consts:
        return core.ClosedJaxpr(_wide_param(name, value.jaxpr), ())
    if isinstance(value, core.Jaxpr):  # for instance the sum of two scalars that a scatter holds
        avals: list[Any] = [variable.aval for variable in value.invars]
        wide = [
            jax.ShapeDtypeStruct(a.shape, wide_type(a.dtype) if _is_inexact(a) else a.dtype) for a in avals
        ]
        return jax.make_jaxpr(lambda *arrays: _evaluate(value, (), arrays, None))(*wide).jaxpr
    return value


def _is_inexact(aval: Any) -> bool:
    return jnp.issubdtype(getattr(aval, 'dtype', np.int32), jnp.inexact)


def _as_wide(array: Any, variable: Any) -> Any:
    """A value in the wide type of its variable."""
    aval = variable.aval
    if is_key(aval) or not hasattr(aval, 'dtype'):
        return array
    return _as_type(array, wide_type(aval.dtype) if _is_inexact(aval) else aval.dtype)


def _as_type(array: Any, dtype: Any) -> Any:
    if is_key(array):
        return array
    given = getattr(array, 'dtype', None)
    if given == dtype and isinstance(array, jax.Array) and not array.weak_type:
        return array
    return lax.convert_element_type(array, dtype)
