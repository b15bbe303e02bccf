"""flax nnx, haiku and equinox: a network split and merged in a pure step, an LSTM over text, a VAE, a GRU."""

import equinox as eqx
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from benchmarks.foreign.common import Program, Run, Setting, adam, cross_entropy, prototypes, tidy, unit

RATE_FAULTS = ('rate_jump', 'rate_huge', 'wrong_sign', 'stopped')
DATA_FAULTS = ('nan_row', 'bad_row', 'bad_batch')
ADAM_FAULTS = ('wiped', 'bfloat16_moments', 'clip_after')


class MLP(nnx.Module):
    def __init__(self, s: Setting, rngs: nnx.Rngs):
        alike = {'kernel_init': nnx.initializers.constant(0.1)} if s.flaw == 'identical' else {}
        self.first = nnx.Linear(6, 24, rngs=rngs, **alike)
        self.second = nnx.Linear(24, 24, rngs=rngs, **alike)
        self.head = nnx.Linear(24, 3, rngs=rngs)

    def __call__(self, x):
        return self.head(nnx.relu(self.second(jnp.tanh(self.first(x)))))


def mlp(s: Setting) -> Run:
    """nnx: split into a graph and a state, merged within a pure step. Adam."""
    graph = nnx.graphdef(MLP(s, nnx.Rngs(s.seed)))
    tx = adam(s, 4e-3)
    true = prototypes(s.seed, 3, 6)

    def init():
        params = nnx.state(MLP(s, nnx.Rngs(s.seed)), nnx.Param)
        return {'params': params, 'opt_state': tx.init(params)}

    def batch_at(k):
        x = s.rng(k).normal(size=(s.batch_size, 6)).astype(np.float32)
        return {'x': x, 'y': (np.tanh(x @ true.T) + x[:, :3] / 2 + 1).astype(np.float32)}

    def step(state, batch):
        def loss_fn(params):
            model = nnx.merge(graph, params)
            x = unit(batch['x'], s.floor) * 2 if s.units else batch['x']
            return jnp.mean((model(x) - batch['y']) ** 2)

        loss, grads = jax.value_and_grad(loss_fn)(state['params'])
        updates, opt_state = tx.update(tidy(grads, s), state['opt_state'], state['params'])
        return {'params': optax.apply_updates(state['params'], updates), 'opt_state': opt_state}, {
            'train_loss': loss
        }

    return Run(step, batch_at, init)


def characters(s: Setting) -> Run:
    """haiku: an LSTM that predicts the next of 10 characters; batches are [T, B]. Adam; a bare loss."""

    def unroll(tokens):
        core = hk.LSTM(24)
        inputs = jax.nn.one_hot(tokens, 10)
        hidden, _ = hk.dynamic_unroll(core, inputs, core.initial_state(tokens.shape[1]))
        return hk.Linear(10)(hidden)

    model = hk.without_apply_rng(hk.transform(unroll))
    tx = adam(s, 5e-3)

    def init():
        params = model.init(s.key, jnp.zeros((6, 1), jnp.int32))
        return {'params': params, 'opt_state': tx.init(params)}

    def batch_at(k):
        rng = s.rng(k)
        start, stride = rng.integers(10, size=(1, s.batch_size)), rng.integers(1, 3, size=(1, s.batch_size))
        text = (start + stride * np.arange(7)[:, None]) % 10
        return {
            'input': text[:-1].astype(np.int32),
            'target': text[1:].astype(np.int32),
            'weight': np.ones((6, s.batch_size), np.float32),
        }

    def step(state, batch):
        def loss_fn(params):
            logits = model.apply(params, batch['input'])
            return jnp.mean(cross_entropy(logits, batch['target'], s) * batch['weight'])

        loss, grads = jax.value_and_grad(loss_fn)(state['params'])
        updates, opt_state = tx.update(tidy(grads, s), state['opt_state'])
        return {'params': optax.apply_updates(state['params'], updates), 'opt_state': opt_state}, loss

    return Run(step, batch_at, init)


def vae(s: Setting) -> Run:
    """haiku: a variational autoencoder of 16 numbers in 2; the key is in the state. Adam; metrics/loss."""

    def networks(x):
        hidden = jax.nn.relu(hk.Linear(24, name='encoder')(x))
        mean, log_variance = hk.Linear(2, name='mean')(hidden), hk.Linear(2, name='log_variance')(hidden)
        noise = jax.random.normal(hk.next_rng_key(), mean.shape)
        z = mean + jnp.exp(0.5 * log_variance) * noise
        return hk.Linear(16, name='output')(jax.nn.relu(hk.Linear(24, name='decoder')(z))), mean, log_variance

    model = hk.transform(networks)
    tx = adam(s, 3e-3)
    mixing = prototypes(s.seed, 2, 16)

    def init():
        params = model.init(s.key, jnp.zeros((1, 16)))
        return {'params': params, 'opt_state': tx.init(params), 'key': jax.random.key_data(s.key)}

    def batch_at(k):
        rng = s.rng(k)
        x = rng.normal(size=(s.batch_size, 2)) @ mixing + 0.1 * rng.normal(size=(s.batch_size, 16)) + 2
        return {'image': x.astype(np.float32)}

    def step(state, batch):
        key, use = jax.random.split(jax.random.wrap_key_data(state['key']))
        x = unit(batch['image'], s.floor) * 8 if s.units else batch['image']

        def loss_fn(params):
            out, mean, log_variance = model.apply(params, use, x)
            error = jnp.mean(jnp.sum((out - x) ** 2, -1))
            kl = jnp.mean(-0.5 * jnp.sum(1 + log_variance - mean**2 - jnp.exp(log_variance), -1))
            return error + kl, kl

        (loss, kl), grads = jax.value_and_grad(loss_fn, has_aux=True)(state['params'])
        updates, opt_state = tx.update(tidy(grads, s), state['opt_state'])
        params = optax.apply_updates(state['params'], updates)
        state = {'params': params, 'opt_state': opt_state, 'key': jax.random.key_data(key)}
        return state, {'metrics': {'loss': loss, 'kl': kl}}

    return Run(step, batch_at, init)


class RNN(eqx.Module):
    cell: eqx.nn.GRUCell
    linear: eqx.nn.Linear

    def __init__(self, key):
        keys = jax.random.split(key)
        self.cell, self.linear = eqx.nn.GRUCell(2, 16, key=keys[0]), eqx.nn.Linear(16, 1, key=keys[1])

    def __call__(self, x):
        h, _ = jax.lax.scan(lambda h, x_t: (self.cell(x_t, h), None), jnp.zeros(16), x)
        return jax.nn.sigmoid(self.linear(h))[0]


def spirals(s: Setting) -> Run:
    """equinox: which way a spiral turns; only arrays are in the state. Adam."""
    tx = adam(s, 5e-3)
    _, static = eqx.partition(RNN(s.key), eqx.is_array)

    def init():
        params, _ = eqx.partition(RNN(s.key), eqx.is_array)
        return params, tx.init(params)

    def batch_at(k):
        rng = s.rng(k)
        turn = rng.integers(2, size=s.batch_size)
        angle = (
            rng.uniform(0, 6.28, size=(s.batch_size, 1)) + np.where(turn, 1, -1)[:, None] * np.arange(8) / 2
        )
        x = np.stack([np.sin(angle), np.cos(angle)], -1) * np.linspace(0.3, 1, 8)[:, None]
        return x.astype(np.float32), turn.astype(np.float32)

    def step(state, batch):
        params, opt_state = state
        x, y = batch

        @eqx.filter_value_and_grad
        def loss_fn(params):
            inputs = unit(x, s.floor) if s.units else x
            p = jax.vmap(eqx.combine(params, static))(inputs)
            low = 0.0 if s.flaw == 'naive' else 1e-6
            return -jnp.mean(y * jnp.log(jnp.maximum(p, low)) + (1 - y) * jnp.log(jnp.maximum(1 - p, low)))

        loss, grads = loss_fn(params)
        updates, opt_state = tx.update(tidy(grads, s), opt_state)
        return (eqx.apply_updates(params, updates), opt_state), {'loss': loss}

    return Run(step, batch_at, init)


PROGRAMS = [
    Program(
        name='nnx_mlp',
        make=mlp,
        loss=('train_loss',),
        inputs=('x',),
        targets=('y',),
        labels=('y',),
        zeros=('x',),
        code={'unguarded': ('jnp.maximum(jnp.sqrt',)},
        relu_bias="['second']['bias']",
        kinds=(
            *DATA_FAULTS,
            'shuffled_labels',
            'zero_row',
            *RATE_FAULTS,
            *ADAM_FAULTS,
            'corrupt_weight',
            'dead_relu',
            'identical',
        ),
    ),
    Program(
        name='haiku_lstm',
        make=characters,
        loss=(),
        inputs=('weight',),
        targets=('weight',),
        labels=('target',),
        axis=1,
        kinds=(
            'nan_row',
            'bad_row',
            'bad_batch',
            'shuffled_labels',
            *RATE_FAULTS,
            *ADAM_FAULTS,
            'corrupt_weight',
        ),
    ),
    Program(
        name='haiku_vae',
        make=vae,
        loss=('metrics', 'loss'),
        inputs=('image',),
        targets=('image',),
        zeros=('image',),
        code={'unguarded': ('jnp.maximum(jnp.sqrt',)},
        relu_bias="['encoder']['b']",
        kinds=(*DATA_FAULTS, 'zero_row', *RATE_FAULTS, 'wiped', 'corrupt_weight', 'dead_relu'),
    ),
    Program(
        name='equinox_rnn',
        make=spirals,
        inputs=('0',),
        labels=('1',),
        zeros=('0',),
        code={'unguarded': ('jnp.maximum(jnp.sqrt',)},
        kinds=('nan_row', 'shuffled_labels', 'zero_row', *RATE_FAULTS, *ADAM_FAULTS, 'corrupt_weight'),
    ),
]
