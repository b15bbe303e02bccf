"""jaxrnn's LSTM in an nnx module, where it stands for nnx.RNN(nnx.OptimizedLSTMCell(...)).

The train step is pure: it merges the modules from the state, and splits them again. python examples/nnx_module.py
"""

import jax.numpy as jnp
import optax
from flax import nnx
from words import ALPHABET, SIZE, batch_at, train

from jaxrnn.rnn import layers


class Network(nnx.Module):
    def __init__(self, letters=ALPHABET, width=32, size=SIZE, *, rngs):
        self.lstm = layers.LSTM(letters, width, rngs=rngs)
        self.output = nnx.Linear(width, size, rngs=rngs)

    def __call__(self, letters, lengths):
        """letters: [T, B]; lengths: [B]. Returns vectors [B, E]."""
        return self.output(self.lstm.last(letters, seq_lengths=lengths))


def modules():
    network = Network(rngs=nnx.Rngs(0))
    return network, nnx.Optimizer(network, optax.adam(1e-2), wrt=nnx.Param)


GRAPH = nnx.graphdef(nnx.eval_shape(modules))


def init():
    return nnx.state(modules())


def step(state, batch):
    network, optimizer = nnx.merge(GRAPH, state)

    def loss_of(network):
        predictions = network(batch['letters'], jnp.sum(batch['mask'], axis=0))
        return jnp.mean((predictions - batch['targets']) ** 2)

    loss, gradients = nnx.value_and_grad(loss_of)(network)
    optimizer.update(network, gradients)
    return nnx.state((network, optimizer)), {'loss': loss}


def main():
    train(init, step, batch_at)


if __name__ == '__main__':
    main()
