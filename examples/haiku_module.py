"""jaxrnn's LSTM as a haiku module, between hk.transform and optax. python examples/haiku_module.py

It takes the place of hk.dynamic_unroll(hk.LSTM(...)), whose gates are i, g, f, o with 1 added to f at each time step;
here they are i, f, g, o, and the bias says all.
"""

from typing import NamedTuple

import haiku as hk
import jax
import jax.numpy as jnp
import optax
from words import ALPHABET, SIZE, batch_at, train

from jaxrnn.rnn import cells, scan

ADAM = optax.adam(1e-2)


class LSTM(hk.Module):
    def __init__(self, letters, width, name=None):
        super().__init__(name=name)
        self.letters, self.width = letters, width

    def __call__(self, letters, mask):
        """letters, mask: [T, B]. Returns the last output [B, H]."""
        gates, glorot = 4 * self.width, hk.initializers.VarianceScaling(1, 'fan_avg', 'uniform')
        weights = scan.Weights(
            kernel=hk.get_parameter('kernel', (self.letters, gates), init=glorot),
            bias=hk.get_parameter('bias', (gates,), init=jnp.zeros),
            recurrent_kernel=hk.get_parameter(
                'recurrent_kernel', (self.width, gates), init=hk.initializers.Orthogonal()
            ),
        )
        _, last = scan.run(cells.lstm(cells.SIGMOID), weights, letters, mask=mask, sequences=False)
        return last.h


def network(letters, mask, *, alphabet=ALPHABET, width=32, size=SIZE):
    return hk.Linear(size, name='output')(LSTM(alphabet, width, name='lstm')(letters, mask))


NETWORK = hk.without_apply_rng(hk.transform(network))


class State(NamedTuple):
    params: hk.Params
    opt_state: optax.OptState


def init():
    batch = batch_at(0)
    params = NETWORK.init(jax.random.key(0), batch['letters'], batch['mask'])
    return State(params, ADAM.init(params))


def step(state, batch):
    def loss_of(params):
        predictions = NETWORK.apply(params, batch['letters'], batch['mask'])
        return jnp.mean((predictions - batch['targets']) ** 2)

    loss, gradients = jax.value_and_grad(loss_of)(state.params)
    updates, opt_state = ADAM.update(gradients, state.opt_state)
    return State(optax.apply_updates(state.params, updates), opt_state), {'loss': loss}


def main():
    train(init, step, batch_at)


if __name__ == '__main__':
    main()
