"""jaxrnn's GRU in plain JAX: spells words to a network, letter by letter, and teaches it their vectors.

The parameters are a dictionary, and the train step is a function. python examples/plain.py
"""

import jax
import jax.numpy as jnp
import optax
from words import ALPHABET, SIZE, batch_at, train

from jaxrnn.rnn import cells, scan

GRU = cells.gru_reset_after(cells.SIGMOID)
ADAM = optax.adam(1e-2)
WIDTH = 32  # H


def init():
    input_key, recurrent_key, output_key = jax.random.split(jax.random.key(0), 3)
    glorot, orthogonal = jax.nn.initializers.glorot_uniform(), jax.nn.initializers.orthogonal()
    gru = scan.Weights(
        kernel=glorot(input_key, (ALPHABET, 3 * WIDTH)),
        bias=jnp.zeros(3 * WIDTH),
        recurrent_kernel=orthogonal(recurrent_key, (WIDTH, 3 * WIDTH)),
        recurrent_bias=jnp.zeros(3 * WIDTH),
    )
    params = {'gru': gru, 'output': glorot(output_key, (WIDTH, SIZE))}
    return {'params': params, 'opt_state': ADAM.init(params)}


def predict(params, letters, mask):
    _, last = scan.run(GRU, params['gru'], letters, mask=mask, sequences=False)
    return last.h @ params['output']


def step(state, batch):
    def loss_of(params):
        return jnp.mean((predict(params, batch['letters'], batch['mask']) - batch['targets']) ** 2)

    loss, gradients = jax.value_and_grad(loss_of)(state['params'])
    updates, opt_state = ADAM.update(gradients, state['opt_state'])
    params = optax.apply_updates(state['params'], updates)
    return {'params': params, 'opt_state': opt_state}, {'loss': loss}


def main():
    train(init, step, batch_at)


if __name__ == '__main__':
    main()
