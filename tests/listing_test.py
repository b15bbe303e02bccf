"""Equations as text: the same for the same computation, another for another."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrnn.trace import listing as listing_module
from jaxrnn.trace.listing import listing


def scanned(x, rate=0.5, length=4):
    return jax.lax.scan(lambda c, _: (c * rate + 1, c), x, None, length=length)


def named_otherwise(x):
    halves = jax.jit(lambda carry: carry * 0.5 + 1)
    return jax.lax.scan(lambda carry, nothing: (halves(carry), carry), x, None, length=4)


X = jnp.ones(3)


def test_names_and_lines_of_code_are_left_out():
    def first(x):
        return jnp.where(x > 0, jnp.exp(x), 0)

    def second(y):
        # Written otherwise.
        positive = y > 0
        return jnp.where(positive, jnp.exp(y), 0)

    assert listing(jax.jit(first), X) == listing(jax.jit(second), X)
    assert listing(jax.jit(first, donate_argnums=0), X) == listing(jax.jit(second), X)


@pytest.mark.parametrize(
    'other',
    [
        functools.partial(scanned, rate=0.25),
        functools.partial(scanned, length=5),
        named_otherwise,
        lambda x: scanned(x)[0],
        lambda x: scanned(x.astype(jnp.float16)),
    ],
)
def test_what_is_computed_is_in_it(other):
    assert listing(scanned, X) != listing(other, X)


def test_it_is_the_same_twice():
    assert listing(scanned, X) == listing(scanned, X) == listing(scanned, np.ones(3, np.float32))


def test_what_is_inside_is_listed():
    lines = listing(scanned, X)
    assert any(line.startswith('  ') and ' mul ' in line and '0.5' in line for line in lines)


def test_a_python_function_in_a_parameter_has_no_address():
    @jax.custom_vjp
    def f(x):
        return x

    f.defvjp(lambda x: (x, None), lambda _, g: (g * 2,))
    assert not any('0x' in line for line in listing(jax.grad(lambda x: f(x).sum()), X))
    assert listing_module._said('functions', (object(),)) == ''
    assert not any('0x' in line for line in listing(lambda x: jax.pure_callback(lambda y: y, x, x), X))
