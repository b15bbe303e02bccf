"""The equations of a function as lines of text, to be held against those of another day.

A line has what an equation computes, not what Python calls it: names of functions and numbers of source lines change
when nothing else does.
"""

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax.extend import core

from jaxrnn.trace.equations import name_of
from jaxrnn.types import Tree

NAMES = frozenset(
    ('name', 'debug_info', 'metadata', 'ctx_mesh', 'compiler_options_kvs', 'inline', 'keep_unused', 'donated_invars',
     'in_layouts', 'out_layouts', 'in_shardings', 'out_shardings')
)  # fmt: skip
"""Parameters that say nothing of what is computed."""


def listing(function: Callable[..., Tree], *values: Tree) -> list[str]:
    """A line for each equation, those of calls and loops further in; of values only the shapes are looked at.

    >>> import jax.numpy as jnp
    >>> for line in listing(lambda x: jnp.sin(x) * 2, jnp.ones(3)):
    ...     print(line)
    c:float32[3] = sin a:float32[3]
    d:float32[3] = mul c:float32[3] 2.0
    return d:float32[3]
    """
    return list(_lines(jax.make_jaxpr(function)(*values).jaxpr, 0))


def _lines(jaxpr: Any, depth: int) -> Iterator[str]:
    numbers = itertools.count()
    names: dict[Any, str] = {}

    def named(variable: Any) -> str:
        if isinstance(variable, core.Literal):
            return str(np.asarray(variable.val))
        if variable not in names:
            names[variable] = _letters(next(numbers))
        aval = variable.aval
        shape = ','.join(map(str, getattr(aval, 'shape', ())))
        return f'{names[variable]}:{getattr(aval, "dtype", aval)}[{shape}]'

    for variable in (*jaxpr.constvars, *jaxpr.invars):
        named(variable)
    indent = '  ' * depth
    for equation in jaxpr.eqns:
        operands = ' '.join(named(v) for v in equation.invars)
        results = ' '.join(named(v) for v in equation.outvars)
        held = list(_held(equation.params))
        params = ' '.join(_said(name, value) for name, value in sorted(equation.params.items()))
        yield indent + ' '.join(f'{results} = {name_of(equation)} {operands} {params}'.split())
        for inner in held:
            yield from _lines(inner, depth + 1)
    yield f'{indent}return {" ".join(named(v) for v in jaxpr.outvars)}'


def _held(params: dict[str, Any]) -> Iterator[Any]:
    for _, value in sorted(params.items()):
        for each in value if isinstance(value, tuple | list) else (value,):
            if isinstance(each, core.ClosedJaxpr):
                yield each.jaxpr
            elif isinstance(each, core.Jaxpr):
                yield each


def _said(name: str, value: Any) -> str:
    """A parameter; '' for one that holds equations, functions or names."""
    if name in NAMES or value is None or callable(value) or list(_held({name: value})):
        return ''
    text = str(value)
    return '' if ' at 0x' in text else f'{name}={text}'.replace('\n', ' ')


def _letters(number: int) -> str:
    """a, b, … z, ba, bb, …"""
    text = ''
    while True:
        number, letter = divmod(number, 26)
        text = chr(ord('a') + letter) + text
        if not number:
            return text
