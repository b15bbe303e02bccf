"""Programs that are kept apart: whoever builds the debugger doesn't look at what it says of these.

A differential equation, a flow, contrasted pairs, two players, a factorised matrix, a Gaussian process.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn

from benchmarks.foreign.common import Program, Run, Setting, adam, prototypes, tidy, unit

RATE_FAULTS = ('rate_jump', 'rate_huge', 'wrong_sign', 'stopped')
DATA_FAULTS = ('nan_row', 'bad_row', 'bad_batch')


def differential(s: Setting) -> Run:
    """The right side of an equation, fitted to where its solutions are: Euler's steps in a scan. Adam."""
    tx = adam(s, 5e-3)

    def init():
        keys = jax.random.split(s.key)
        params = [
            {'w': jax.random.normal(keys[0], (2, 24)) / 2, 'b': jnp.zeros(24)},
            {'w': jax.random.normal(keys[1], (24, 2)) / 5, 'b': jnp.zeros(2)},
        ]
        return params, tx.init(params)

    def batch_at(k):
        x = s.rng(k).normal(size=(s.batch_size, 2)).astype(np.float32)
        times = np.arange(1, 7)[:, None, None] / 3
        decay, angle = np.exp(-0.2 * times), times * 1.5
        u, v = x[:, :1], x[:, 1:]
        path = decay * np.concatenate(
            [u * np.cos(angle) - v * np.sin(angle), u * np.sin(angle) + v * np.cos(angle)], -1
        )
        return {'start': x, 'path': path.swapaxes(0, 1).astype(np.float32)}

    def step(state, batch):
        params, opt = state

        def field(params, y):
            return jnp.tanh(y @ params[0]['w'] + params[0]['b']) @ params[1]['w'] + params[1]['b']

        def loss_of(params):
            def advance(y, _):
                y = jax.lax.fori_loop(0, 2, lambda i, y: y + field(params, y) / 6, y)
                return y, y

            _, path = jax.lax.scan(advance, batch['start'], None, length=6)
            return jnp.mean((path.swapaxes(0, 1) - batch['path']) ** 2)

        loss, g = jax.value_and_grad(loss_of)(params)
        updates, opt = tx.update(tidy(g, s), opt)
        return (optax.apply_updates(params, updates), opt), {'loss': loss}

    return Run(step, batch_at, init)


class Coupling(nn.Module):
    @nn.compact
    def __call__(self, x):
        a, b, log_det = x[:, :2], x[:, 2:], 0.0
        for i in range(2):
            h = nn.tanh(nn.Dense(16, name=f'hidden_{i}')(a))
            scale = nn.Dense(2, kernel_init=nn.initializers.zeros, name=f'scale_{i}')(h)
            shift = nn.Dense(2, kernel_init=nn.initializers.zeros, name=f'shift_{i}')(h)
            a, b = b * jnp.exp(scale) + shift, a
            log_det += scale.sum(-1)
        return jnp.concatenate([a, b], -1), log_det


def flow(s: Setting) -> Run:
    """A normalising flow of affine couplings on four numbers, by their likelihood. Adam; the record has a nll."""
    model = Coupling()
    tx = adam(s, 5e-3)

    def init():
        params = model.init(s.key, jnp.zeros((1, 4)))['params']
        return {'params': params, 'opt': tx.init(params)}

    def batch_at(k):
        z = s.rng(k).normal(size=(s.batch_size, 4))
        x = np.stack([z[:, 0] + 4, z[:, 1] * 3 + z[:, 0] ** 2 / 2, z[:, 2] * 0.3 + z[:, 0], z[:, 3] - 5], -1)
        return x.astype(np.float32)

    def step(state, x):
        def loss_of(params):
            z, log_det = model.apply({'params': params}, x)
            return jnp.mean(0.5 * jnp.sum(z**2, -1) - log_det) + 2 * np.log(2 * np.pi)

        loss, g = jax.value_and_grad(loss_of)(state['params'])
        updates, opt = tx.update(tidy(g, s), state['opt'])
        return {'params': optax.apply_updates(state['params'], updates), 'opt': opt}, {'nll': loss}

    return Run(step, batch_at, init)


def contrastive(s: Setting) -> Run:
    """Two views of a thing are to be closest to each other, at a temperature that is learnt. Adam; nested metrics."""
    tx = adam(s, 5e-3)
    views = prototypes(s.seed, 8, 4).reshape(2, 4, 4)

    def init():
        keys = jax.random.split(s.key)
        params = {
            'left': jax.random.normal(keys[0], (4, 8)) / 2,
            'right': jax.random.normal(keys[1], (4, 8)) / 2,
            'log_temperature': jnp.float32(1.0),
        }
        return {'params': params, 'opt': tx.init(params)}

    def batch_at(k):
        z = s.rng(k).normal(size=(s.batch_size, 4))
        return {'left': (z @ views[0]).astype(np.float32), 'right': (z @ views[1]).astype(np.float32)}

    def step(state, batch):
        def loss_of(params):
            left = unit(batch['left'] @ params['left'], s.floor)
            right = unit(batch['right'] @ params['right'], s.floor)
            logits = left @ right.T * jnp.exp(params['log_temperature'])
            labels = jnp.arange(logits.shape[0])
            both = [
                optax.softmax_cross_entropy_with_integer_labels(z, labels).mean() for z in (logits, logits.T)
            ]
            return sum(both) / 2, jnp.mean(logits.argmax(-1) == labels)

        (loss, accuracy), g = jax.value_and_grad(loss_of, has_aux=True)(state['params'])
        updates, opt = tx.update(tidy(g, s), state['opt'])
        state = {'params': optax.apply_updates(state['params'], updates), 'opt': opt}
        return state, {'metrics': {'loss': loss, 'accuracy': accuracy}}

    return Run(step, batch_at, init)


def players(s: Setting) -> Run:
    """A generator of points on a line and a critic with a penalty: two optimisers in a step, two losses."""
    txs = {'critic': adam(s, 4e-3), 'generator': adam(s, 2e-3)}

    def init():
        keys = jax.random.split(s.key, 3)
        params = {
            'critic': {
                'w': jax.random.normal(keys[0], (2, 16)) / 2,
                'v': jax.random.normal(keys[1], (16, 1)) / 4,
            },
            'generator': {'w': jax.random.normal(keys[2], (2, 2)) / 4, 'b': jnp.zeros(2)},
        }
        return params, {name: tx.init(params[name]) for name, tx in txs.items()}

    def batch_at(k):
        rng = s.rng(k)
        real = rng.normal(size=(s.batch_size, 2)) * [0.5, 0.2] + [2, -1]
        return {
            'real': real.astype(np.float32),
            'noise': rng.normal(size=(s.batch_size, 2)).astype(np.float32),
        }

    def step(state, batch):
        params, opts = state

        def critic(p, x):
            return (jax.nn.leaky_relu(x @ p['w']) @ p['v'])[:, 0]

        def made(p):
            return batch['noise'] @ p['w'] + p['b']

        def critic_loss(p):
            real, fake = critic(p, batch['real']), critic(p, made(params['generator']))
            smooth = sum(jnp.sum(w * w) for w in jax.tree.leaves(p))
            return jnp.mean(jax.nn.softplus(-real) + jax.nn.softplus(fake)) + 0.05 * smooth

        def generator_loss(p):
            return jnp.mean(jax.nn.softplus(-critic(params['critic'], made(p))))

        losses, after, states = {}, {}, {}
        for name, loss_of in (('critic', critic_loss), ('generator', generator_loss)):
            losses[name], g = jax.value_and_grad(loss_of)(params[name])
            updates, states[name] = txs[name].update(tidy(g, s), opts[name])
            after[name] = optax.apply_updates(params[name], updates)
        return (after, states), {'d_loss': losses['critic'], 'g_loss': losses['generator']}

    return Run(step, batch_at, init)


class Factors(NamedTuple):
    rows: jax.Array
    columns: jax.Array
    opt: optax.OptState


def factorisation(s: Setting) -> Run:
    """A matrix of 30 x 20 by the product of two, entry by entry; Adagrad's cousin RMSProp with momentum."""
    rng = np.random.default_rng(s.seed)
    true = (rng.normal(size=(30, 3)) @ rng.normal(size=(3, 20))).astype(np.float32)
    tx = optax.chain(
        optax.scale_by_rms(0.95, eps=max(s.epsilon, 1e-8)), optax.scale_by_learning_rate(s.rate_of(1e-2))
    )

    def init():
        keys = jax.random.split(s.key)
        rows, columns = jax.random.normal(keys[0], (30, 4)) / 2, jax.random.normal(keys[1], (20, 4)) / 2
        return Factors(rows, columns, tx.init((rows, columns)))

    def batch_at(k):
        rng = s.rng(k)
        i, j = rng.integers(30, size=4 * s.batch_size), rng.integers(20, size=4 * s.batch_size)
        return {'row': i.astype(np.int32), 'column': j.astype(np.int32), 'rating': true[i, j]}

    def step(state, batch):
        def loss_of(parts):
            rows, columns = (
                jnp.take(part, batch[name], axis=0)
                for part, name in zip(parts, ('row', 'column'), strict=True)
            )
            return jnp.mean((jnp.sum(rows * columns, -1) - batch['rating']) ** 2)

        loss, g = jax.value_and_grad(loss_of)((state.rows, state.columns))
        updates, opt = tx.update(tidy(g, s), state.opt)
        rows, columns = optax.apply_updates((state.rows, state.columns), updates)
        return Factors(rows, columns, opt), {'epoch': jnp.int32(0), 'mse': loss}

    return Run(step, batch_at, init)


def process(s: Setting) -> Run:
    """Length, height and noise of a Gaussian process, by the likelihood of what was seen: a Cholesky factor. Adam."""
    tx = adam(s, 2e-2)

    def init():
        params = {'length': jnp.float32(1.0), 'height': jnp.float32(1.5), 'noise': jnp.float32(0.5)}
        return {'params': params, 'opt': tx.init(params)}

    def batch_at(k):
        rng = s.rng(k)
        x = np.sort(rng.uniform(-3, 3, size=s.batch_size))
        y = np.sin(2 * x + rng.uniform(0, 6)) * 0.7 + 0.1 * rng.normal(size=s.batch_size)
        return x.astype(np.float32), y.astype(np.float32)

    def step(state, batch):
        x, y = batch

        def loss_of(p):
            gram = jnp.exp(2 * p['height'] - 0.5 * ((x[:, None] - x) / jnp.exp(p['length'])) ** 2)
            factor = jnp.linalg.cholesky(gram + (jnp.exp(2 * p['noise']) + 1e-5) * jnp.eye(x.shape[0]))
            solved = jax.scipy.linalg.solve_triangular(factor, y, lower=True)
            return (0.5 * solved @ solved + jnp.sum(jnp.log(jnp.diag(factor)))) / x.shape[0] + 0.5 * np.log(
                2 * np.pi
            )

        loss, g = jax.value_and_grad(loss_of)(state['params'])
        updates, opt = tx.update(tidy(g, s), state['opt'])
        return {'params': optax.apply_updates(state['params'], updates), 'opt': opt}, {'loss': loss}

    return Run(step, batch_at, init)


PROGRAMS = [
    Program(
        name='differential',
        make=differential,
        inputs=('start',),
        targets=('path',),
        labels=('path',),
        kinds=(*DATA_FAULTS, 'shuffled_labels', *RATE_FAULTS, 'wiped', 'bfloat16_moments', 'corrupt_weight'),
        held_out=True,
    ),
    Program(
        name='flow',
        make=flow,
        loss=('nll',),
        inputs=(),
        targets=(),
        kinds=(*DATA_FAULTS, *RATE_FAULTS, 'wiped', 'corrupt_weight'),
        held_out=True,
    ),
    Program(
        name='contrastive',
        make=contrastive,
        loss=('metrics', 'loss'),
        inputs=('left',),
        labels=('left',),
        zeros=('left',),
        code={'unguarded': ('jnp.maximum(jnp.sqrt',)},
        kinds=(
            'nan_row',
            'shuffled_labels',
            'zero_row',
            *RATE_FAULTS,
            'wiped',
            'clip_after',
            'corrupt_weight',
        ),
        held_out=True,
    ),
    Program(
        name='players',
        make=players,
        loss=('d_loss',),
        inputs=('real',),
        targets=('real',),
        falls=1.05,
        kinds=(*DATA_FAULTS, 'rate_jump', 'rate_huge', 'corrupt_weight'),
        held_out=True,
    ),
    Program(
        name='factorisation',
        make=factorisation,
        loss=('mse',),
        inputs=('rating',),
        targets=('rating',),
        labels=('rating',),
        ids=('row',),
        code={'ids': ('jnp.take(',)},
        kinds=(*DATA_FAULTS, 'out_of_range', 'shuffled_labels', *RATE_FAULTS, 'corrupt_weight'),
        held_out=True,
    ),
    Program(
        name='process',
        make=process,
        inputs=('0',),
        targets=('1',),
        kinds=('nan_row', 'bad_row', 'bad_batch', 'rate_jump', 'wrong_sign', 'stopped', 'corrupt_weight'),
        held_out=True,
    ),
]
