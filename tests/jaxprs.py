"""What JAX traced, equation by equation."""

from collections.abc import Iterator

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn


def equations(jaxpr: Jaxpr) -> Iterator[JaxprEqn]:
    """All of them, those of inner functions and loops too."""
    for equation in jaxpr.eqns:
        yield equation
        for value in jax.tree.leaves(tuple(equation.params.values())):
            if isinstance(value, ClosedJaxpr):
                yield from equations(value.jaxpr)


def named(jaxpr: ClosedJaxpr, primitive: str) -> list[JaxprEqn]:
    """The equations of one primitive, such as 'dot_general'."""
    return [equation for equation in equations(jaxpr.jaxpr) if equation.primitive.name == primitive]
