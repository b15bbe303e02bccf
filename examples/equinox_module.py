"""jaxrnn's LSTM as an equinox module. python examples/equinox_module.py

Equinox writes a module for one example and maps it over a batch. The recurrence is the exception: it takes the
batch whole, as its products need it.
"""

from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from words import ALPHABET, SIZE, batch_at, train

from jaxrnn.rnn import cells, scan

ADAM = optax.adam(1e-2)


class LSTM(eqx.Module):
    weights: scan.Weights

    def __init__(self, letters, width, *, key):
        input_key, recurrent_key = jax.random.split(key)
        self.weights = scan.Weights(
            kernel=jax.nn.initializers.glorot_uniform()(input_key, (letters, 4 * width)),
            bias=jnp.zeros(4 * width),
            recurrent_kernel=jax.nn.initializers.orthogonal()(recurrent_key, (width, 4 * width)),
        )

    def __call__(self, letters, mask):
        """letters, mask: [T, B]. Returns the last output [B, H]."""
        _, last = scan.run(cells.lstm(cells.SIGMOID), self.weights, letters, mask=mask, sequences=False)
        return last.h


class Network(eqx.Module):
    lstm: LSTM
    output: eqx.nn.Linear

    def __init__(self, letters=ALPHABET, width=32, size=SIZE, *, key):
        lstm_key, output_key = jax.random.split(key)
        self.lstm = LSTM(letters, width, key=lstm_key)
        self.output = eqx.nn.Linear(width, size, key=output_key)

    def __call__(self, letters, mask):
        return jax.vmap(self.output)(self.lstm(letters, mask))


class State(NamedTuple):
    """All leaves are arrays; a network with others would keep its eqx.partition's arrays here."""

    network: Network
    opt_state: optax.OptState


def init():
    network = Network(key=jax.random.key(0))
    return State(network, ADAM.init(network))


def step(state, batch):
    @eqx.filter_value_and_grad
    def loss_of(network):
        return jnp.mean((network(batch['letters'], batch['mask']) - batch['targets']) ** 2)

    loss, gradients = loss_of(state.network)
    updates, opt_state = ADAM.update(gradients, state.opt_state)
    return State(eqx.apply_updates(state.network, updates), opt_state), {'loss': loss}


def main():
    train(init, step, batch_at)


if __name__ == '__main__':
    main()
