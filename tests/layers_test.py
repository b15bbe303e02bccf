"""jaxrnn's layers in the place of flax's own: the same options, the same numbers, the same wrappers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tolerance import assert_close

from jaxrnn.rnn import cells, layers

B, T, D, H = 3, 6, 2, 4
LENGTHS = np.array([6, 1, 4])
OURS = {'lstm': layers.LSTM, 'gru': layers.GRU}
FLAXS = {'lstm': nnx.OptimizedLSTMCell, 'gru': nnx.GRUCell}
each_kind = pytest.mark.parametrize('kind', OURS)


def pair(kind: str, seed: int = 0, **options) -> tuple[nnx.Module, nnx.Module]:
    """Ours and flax's, with the same weights: flax's gates are i, f, g, o and r, z, n; its GRU has one bias."""
    theirs = nnx.RNN(FLAXS[kind](D, H, rngs=nnx.Rngs(seed)), **options)
    ours = OURS[kind](D, H, rngs=nnx.Rngs(0), **options)
    dense_i, dense_h = theirs.cell.dense_i, theirs.cell.dense_h
    bias = (dense_h if kind == 'lstm' else dense_i).bias
    drawn = np.random.default_rng(seed).normal(size=bias.shape).astype(np.float32)
    bias[...] = drawn
    for parameter, value in (
        (ours.kernel, dense_i.kernel[...]),
        (ours.recurrent_kernel, dense_h.kernel[...]),
        (ours.bias, drawn),
    ):
        parameter[...] = jnp.asarray(value if kind == 'lstm' else zrn(value))
    return ours, theirs


def zrn(value: np.ndarray) -> np.ndarray:
    r, z, n = np.split(value, 3, axis=-1)
    return np.concatenate([z, r, n], axis=-1)


def inputs(*, time_major: bool = False) -> np.ndarray:
    xs = np.random.default_rng(1).normal(size=(B, T, D)).astype(np.float32)
    return xs.swapaxes(0, 1) if time_major else xs


def carry(kind: str) -> tuple:
    """Ours and flax's."""
    c, h = np.random.default_rng(2).normal(size=(2, B, H)).astype(np.float32)
    return (cells.LSTMCarry(c=c, h=h), (c, h)) if kind == 'lstm' else (cells.GRUCarry(h), h)


def assert_same_carry(kind: str, ours, theirs) -> None:
    pairs = [(ours.c, theirs[0]), (ours.h, theirs[1])] if kind == 'lstm' else [(ours.h, theirs)]
    for found, expected in pairs:
        assert_close(found, expected, 'float32 forward')


@pytest.mark.parametrize('given', ['layer', 'call'])
@pytest.mark.parametrize('time_major', [False, True])
@pytest.mark.parametrize(('reverse', 'keep_order'), [(False, False), (True, False), (True, True)])
@each_kind
def test_options_are_those_of_flax(kind, reverse, keep_order, time_major, given):
    options = {'reverse': reverse, 'keep_order': keep_order, 'time_major': time_major, 'return_carry': True}
    made, called = (options, {}) if given == 'layer' else ({}, options)
    ours, theirs = pair(kind, **made)
    started = carry(kind)
    for lengths in (None, jnp.asarray(LENGTHS)):
        xs = inputs(time_major=time_major)
        last, outputs = ours(xs, initial_carry=started[0], seq_lengths=lengths, **called)
        their_last, expected = theirs(xs, initial_carry=started[1], seq_lengths=lengths, **called)
        assert_same_carry(kind, last, their_last)
        if not time_major:
            outputs, expected = outputs.swapaxes(0, 1), expected.swapaxes(0, 1)
        for b, length in enumerate(LENGTHS if lengths is not None else [T] * B):
            assert_close(outputs[:length, b], expected[:length, b], 'float32 forward')


@each_kind
def test_outputs_alone_unless_the_carry_is_asked_for(kind):
    ours, theirs = pair(kind)
    found, expected = ours(inputs()), theirs(inputs())
    assert found.shape == (B, T, H)
    assert_close(found, expected, 'float32 forward')


@each_kind
def test_gradients_are_those_of_flax(kind):
    ours, theirs = pair(kind)

    def loss(layer):
        return jnp.sum(jnp.square(layer(inputs())))

    found, expected = nnx.grad(loss)(ours), nnx.grad(loss)(theirs)
    for name, of_flax in (
        ('kernel', expected.cell.dense_i.kernel),
        ('recurrent_kernel', expected.cell.dense_h.kernel),
    ):
        slope = of_flax[...] if kind == 'lstm' else zrn(of_flax[...])
        assert_close(found[name][...], slope, 'float32 gradient')


@each_kind
def test_beyond_its_length_a_sequence_repeats_its_last_output(kind):
    ours, _ = pair(kind)
    xs = inputs()
    for b, length in enumerate(LENGTHS):
        xs[b, length:] = np.nan
    outputs = ours(xs, seq_lengths=jnp.asarray(LENGTHS))
    for b, length in enumerate(LENGTHS):
        assert np.all(np.asarray(outputs[b, length:]) == np.asarray(outputs[b, length - 1]))
    last = ours.last(xs.swapaxes(0, 1), seq_lengths=jnp.asarray(LENGTHS))
    assert np.array_equal(last, outputs[:, -1])


@pytest.mark.parametrize('keep_order', [False, True])
@each_kind
def test_beyond_its_length_a_reversed_sequence_has_not_begun(kind, keep_order):
    ours, _ = pair(kind, reverse=True, keep_order=keep_order)
    started, _ = carry(kind)
    outputs = ours(inputs(), initial_carry=started, seq_lengths=jnp.asarray(LENGTHS))
    for b, length in enumerate(LENGTHS):
        assert np.all(np.asarray(outputs[b, length:]) == started.h[b])


@each_kind
def test_flaxs_bidirectional_and_sequential(kind):
    (forward, backward), (their_forward, their_backward) = zip(pair(kind, 0), pair(kind, 1), strict=True)
    ours = nnx.Sequential(nnx.Bidirectional(forward, backward), lambda x: x * 2)
    theirs = nnx.Sequential(nnx.Bidirectional(their_forward, their_backward), lambda x: x * 2)
    assert_close(ours(inputs()), theirs(inputs()), 'float32 forward')


@each_kind
def test_bfloat16(kind):
    ours = OURS[kind](D, H, dtype=jnp.bfloat16, return_carry=True, rngs=nnx.Rngs(0))
    last, outputs = ours(inputs())
    assert outputs.dtype == jnp.bfloat16
    assert {leaf.dtype.name for leaf in jax.tree.leaves(last)} == {'float32'}
