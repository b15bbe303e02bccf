"""--dtype=bfloat16: what is narrow, what stays wide, and that the networks train."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import jaxprs
import numpy as np
import pytest
import small
from tolerance import TOLERANCES, assert_close

from jaxrnn.trace.equations import scan_counts
from jaxrnn.words import config, train

each_network = pytest.mark.parametrize('network', small.NETWORKS)


@functools.cache
def program(network: str, dtype: str) -> train.Program:
    made = small.configuration(network)
    model = dataclasses.replace(made.model, dtype=dtype)
    return train.make_program(dataclasses.replace(made, model=model), small.dataset())


@each_network
def test_products_are_narrow_and_all_else_is_wide(network):
    made = program(network, 'bfloat16')
    state = jax.eval_shape(made.init)
    traced = jax.make_jaxpr(made.predict)(state.params, made.batch_at(0).letters)
    products = jaxprs.named(traced, 'dot_general')
    assert len(products) == {'lstm': 2, 'gru': 2, 'stacked': 6}[network]
    for product in products:
        assert {operand.aval.dtype.name for operand in product.invars} == {'bfloat16'}
        assert product.outvars[0].aval.dtype == jnp.float32
    loops = jaxprs.named(traced, 'scan')
    assert len(loops) == {'lstm': 1, 'gru': 1, 'stacked': 2}[network]
    for loop in loops:
        carries = loop.outvars[: scan_counts(loop.params)[1]]
        assert {carry.aval.dtype.name for carry in carries} == {'float32'}


@each_network
def test_numbers_are_those_of_float32_but_for_the_products(network):
    narrow, wide = program(network, 'bfloat16'), program(network, 'float32')
    params, batch = wide.init().params, wide.batch_at(0)
    jax.tree.map(np.testing.assert_array_equal, narrow.init().params, params)

    def slopes(predict):
        def loss(params):
            return train.mean_squared_error(predict(params, batch.letters), batch.targets)

        return jax.jit(jax.grad(loss))

    found, expected = (jax.jit(made.predict)(params, batch.letters) for made in (narrow, wide))
    assert found.dtype == jnp.float32
    assert_close(found, expected, 'bfloat16 forward')
    off = np.max(np.abs(found - expected)) / np.max(np.abs(expected))
    assert off > 2 * TOLERANCES['float32 forward'].scaled
    found, expected = (slopes(made.predict)(params) for made in (narrow, wide))
    assert {leaf.dtype.name for leaf in jax.tree.leaves(found)} == {'float32'}
    jax.tree.map(lambda a, b: assert_close(a, b, 'bfloat16 gradient'), found, expected)


@each_network
def test_they_train(network):
    made = program(network, 'bfloat16')
    step, state, losses = jax.jit(made.step), made.init(), []
    for number in range(500):
        state, record = step(state, made.batch_at(number))
        assert record['finite_gradients']
        losses.append(record['loss'])
    assert np.mean(losses[-20:]) < 0.7 * np.mean(losses[:20])
    floats = [leaf for leaf in jax.tree.leaves(state) if jnp.issubdtype(leaf.dtype, jnp.floating)]
    assert {leaf.dtype.name for leaf in floats} == {'float32'}


def test_the_dtype_is_part_of_the_configuration():
    model = config.Model(dtype='bfloat16')
    chosen = config.Config(model=model)
    assert config.Config.from_json(chosen.to_json()) == chosen
    assert chosen.digest() != config.Config().digest()
    assert chosen.differences(config.Config()) == ['--dtype: bfloat16, float32']
