"""jaxrnn's LSTM as a linen module, trained with flax's TrainState. python examples/linen_module.py

The parameters are linen's own, so that its collections, transforms and checkpoints work as ever.
"""

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from flax.training import train_state
from words import ALPHABET, SIZE, batch_at, train

from jaxrnn.rnn import cells, scan


class LSTM(nn.Module):
    letters: int  # V
    width: int  # H

    @nn.compact
    def __call__(self, letters, mask):
        """letters, mask: [T, B]. Returns the last output [B, H]."""
        gates = 4 * self.width
        weights = scan.Weights(
            kernel=self.param('kernel', nn.initializers.glorot_uniform(), (self.letters, gates)),
            bias=self.param('bias', nn.initializers.zeros, (gates,)),
            recurrent_kernel=self.param(
                'recurrent_kernel', nn.initializers.orthogonal(), (self.width, gates)
            ),
        )
        _, last = scan.run(cells.lstm(cells.SIGMOID), weights, letters, mask=mask, sequences=False)
        return last.h


class Network(nn.Module):
    letters: int = ALPHABET
    width: int = 32
    size: int = SIZE

    @nn.compact
    def __call__(self, letters, mask):
        return nn.Dense(self.size, name='output')(LSTM(self.letters, self.width, name='lstm')(letters, mask))


def init():
    network, batch = Network(), batch_at(0)
    params = network.init(jax.random.key(0), batch['letters'], batch['mask'])['params']
    return train_state.TrainState.create(apply_fn=network.apply, params=params, tx=optax.adam(1e-2))


def step(state, batch):
    def loss_of(params):
        predictions = state.apply_fn({'params': params}, batch['letters'], batch['mask'])
        return jnp.mean((predictions - batch['targets']) ** 2)

    loss, gradients = jax.value_and_grad(loss_of)(state.params)
    return state.apply_gradients(grads=gradients), {'loss': loss}


def main():
    train(init, step, batch_at)


if __name__ == '__main__':
    main()
