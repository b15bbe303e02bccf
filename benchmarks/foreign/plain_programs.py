"""Plain JAX with optax: regressions, accumulation, guards, half precision, an average of the parameters, a policy."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks.foreign.common import Program, Run, Setting, adam, prototypes, tidy, unit

RATE_FAULTS = ('rate_jump', 'rate_huge', 'wrong_sign', 'stopped')
DATA_FAULTS = ('nan_row', 'bad_row', 'bad_batch')


def root(x, floor):
    """The length of each row; its gradient where a row is zero is not a number, without a floor."""
    return jnp.sqrt(jnp.sum(x * x, axis=-1) + floor)


def logistic(s: Setting) -> Run:
    """Logistic regression with momentum; a precision is logged that is 0/0 where nothing was found."""
    true = prototypes(s.seed, 1, 6)[0] * 2

    def init():
        return {
            'w': jnp.zeros(6),
            'b': jnp.float32(0),
            'velocity': {'w': jnp.zeros(6), 'b': jnp.float32(0)},
            'n': 0,
        }

    def batch_at(k):
        rng = s.rng(k)
        x = rng.normal(size=(s.batch_size, 6)).astype(np.float32)
        return x, (x @ true > 0.5).astype(np.float32)

    def step(state, batch):
        x, y = batch
        x = unit(x, s.floor) * 2 if s.units else x

        def loss_of(w, b):
            z = x @ w + b
            if s.flaw == 'naive':
                p = jnp.exp(z) / (1 + jnp.exp(z))
                return -jnp.mean(y * jnp.log(p) + (1 - y) * jnp.log(1 - p)), z
            return jnp.mean(jnp.logaddexp(0.0, z) - y * z), z

        (loss, z), g = jax.value_and_grad(loss_of, (0, 1), has_aux=True)(state['w'], state['b'])
        g = tidy({'w': g[0], 'b': g[1]}, s)
        velocity = jax.tree.map(lambda v, d: 0.8 * v + d, state['velocity'], g)
        rate = s.rate_of(0.1)(state['n'])
        found = z > 2
        precision = jnp.sum(found * y) / jnp.sum(found)
        state = {
            'w': state['w'] - rate * velocity['w'],
            'b': state['b'] - rate * velocity['b'],
            'velocity': velocity,
            'n': state['n'] + 1,
        }
        return state, {'loss': loss, 'precision': precision}

    return Run(step, batch_at, init)


def regression(s: Setting) -> Run:
    """Noiseless linear regression: the loss falls by many orders of magnitude. Momentum; a bare loss."""
    true = prototypes(s.seed, 4, 3)

    class State(NamedTuple):
        w: jax.Array
        opt: optax.OptState

    tx = optax.sgd(s.rate_of(0.03), momentum=0.5)

    def init():
        return State(jnp.full((4, 3), 0.1), tx.init(jnp.zeros((4, 3))))

    def batch_at(k):
        x = s.rng(k).normal(size=(s.batch_size, 4)).astype(np.float32)
        return x, x @ true

    def step(state, batch):
        x, y = batch

        def loss_of(w):
            z = x @ w
            penalty = 1e-6 * jnp.mean(root(z, s.floor)) if s.flaw.startswith('root') else 0
            return jnp.mean(jnp.sum((z - y) ** 2, -1)) + penalty

        loss, g = jax.value_and_grad(loss_of)(state.w)
        updates, opt = tx.update(tidy(g, s), state.opt)
        return State(state.w + updates, opt), loss

    return Run(step, batch_at, init)


def accumulated(s: Setting) -> Run:
    """A regression by a small network, whose gradients are summed over four steps: optax.MultiSteps."""
    rng = np.random.default_rng(s.seed)
    shift = rng.normal(size=8).astype(np.float32)
    tx = optax.MultiSteps(adam(s, 1e-2), 4)

    def init():
        keys = jax.random.split(s.key)
        kernel = jnp.full((5, 16), 0.1) if s.flaw == 'identical' else jax.random.normal(keys[0], (5, 16)) / 2
        params = {
            'first': {'kernel': kernel, 'bias': jnp.zeros(16)},
            'second': {'kernel': jax.random.normal(keys[1], (16, 1)) / 4, 'bias': jnp.zeros(1)},
        }
        return params, tx.init(params)

    def batch_at(k):
        x = s.rng(k).normal(size=(s.batch_size, 5)).astype(np.float32)
        return {'x': x, 'y': (np.tanh(x @ shift[:5]) + np.abs(x[:, 0]) + 1).astype(np.float32)}

    def step(state, batch):
        params, opt = state

        def loss_of(params):
            x = unit(batch['x'], s.floor) * 2 if s.units else batch['x']
            h = jax.nn.relu(x @ params['first']['kernel'] + params['first']['bias'])
            out = (h @ params['second']['kernel'] + params['second']['bias'])[:, 0]
            return jnp.mean((out - batch['y']) ** 2)

        loss, g = jax.value_and_grad(loss_of)(params)
        updates, opt = tx.update(tidy(g, s), opt, params)
        return (optax.apply_updates(params, updates), opt), {'train_loss': loss}

    return Run(step, batch_at, init)


def guarded(s: Setting) -> Run:
    """A Poisson regression whose optimiser leaves out what is not finite: optax.apply_if_finite."""
    true = prototypes(s.seed, 1, 5)[0] / 3
    tx = optax.apply_if_finite(adam(s, 2e-2), 5)

    def init():
        w = jnp.zeros(6)
        return {'w': w, 'opt': tx.init(w)}

    def batch_at(k):
        rng = s.rng(k)
        x = rng.normal(size=(s.batch_size, 5)).astype(np.float32)
        return {'x': x, 'count': rng.poisson(np.exp(x @ true + 1.5)).astype(np.float32)}

    def step(state, batch):
        def loss_of(w):
            z = batch['x'] @ w[:5] + w[5]
            return jnp.mean(jnp.exp(z) - batch['count'] * z + jax.lax.lgamma(batch['count'] + 1))

        loss, g = jax.value_and_grad(loss_of)(state['w'])
        updates, opt = tx.update(tidy(g, s), state['opt'], state['w'])
        record = {'loss': loss, 'not_finite': opt.total_notfinite}
        return {'w': optax.apply_updates(state['w'], updates), 'opt': opt}, record

    return Run(step, batch_at, init)


class Scaled(NamedTuple):
    params: dict
    opt: optax.OptState
    scale: jax.Array
    good: jax.Array


def half_precision(s: Setting) -> Run:
    """float16, with a loss scale that halves where a gradient overflows; such a step is left out."""
    tx = adam(s, 3e-3)
    dtype = jnp.float16 if s.half else jnp.float32

    def init():
        keys = jax.random.split(s.key)
        params = {
            'w1': jax.random.normal(keys[0], (8, 24)) / 3,
            'w2': jax.random.normal(keys[1], (24, 2)) / 5,
        }
        params['b'] = jnp.zeros(2)
        return Scaled(params, tx.init(params), jnp.float32(2.0**10), jnp.int32(0))

    def batch_at(k):
        x = s.rng(k).normal(size=(s.batch_size, 8)).astype(np.float32)
        return x, np.stack([np.sin(x[:, 0]), x[:, 1] * 0.5], 1).astype(np.float32) + 2

    def step(state, batch):
        x, y = batch

        def loss_of(params):
            low = jax.tree.map(lambda w: w.astype(dtype), params)
            h = jnp.tanh(x.astype(dtype) @ low['w1'])
            out = h @ low['w2'] + low['b']
            error = out - y.astype(dtype)
            return jnp.mean(jnp.square(error)).astype(jnp.float32) * state.scale

        scaled, g = jax.value_and_grad(loss_of)(state.params)
        g = jax.tree.map(lambda d: d / state.scale, g)
        finite = jnp.all(jnp.array([jnp.all(jnp.isfinite(d)) for d in jax.tree.leaves(g)]))
        keep = finite | (s.flaw == 'unscaled')
        updates, opt = tx.update(tidy(g, s), state.opt)
        params = optax.apply_updates(state.params, updates)
        params, opt = jax.tree.map(
            lambda new, old: jnp.where(keep, new, old), (params, opt), (state.params, state.opt)
        )
        good = jnp.where(finite, state.good + 1, 0)
        scale = jnp.where(finite, jnp.where(good % 200 == 0, state.scale * 2, state.scale), state.scale / 2)
        scale = jnp.maximum(scale, 1.0)
        return Scaled(params, opt, scale, good), {'loss': scaled / state.scale, 'loss_scale': scale}

    return Run(step, batch_at, init)


class Averaged(NamedTuple):
    params: dict
    average: dict
    opt: optax.OptState
    step: jax.Array


def averaged(s: Setting) -> Run:
    """An average of the parameters that starts as the parameters themselves; the record has a step of its own."""
    tx = adam(s, 5e-3)
    true = prototypes(s.seed, 2, 6)

    def init():
        keys = jax.random.split(s.key)
        params = {'w': jax.random.normal(keys[0], (6, 20)) / 2, 'b': jnp.zeros(20), 'v': jnp.zeros((20, 2))}
        return Averaged(params, params, tx.init(params), jnp.int32(0))

    def batch_at(k):
        x = s.rng(k).normal(size=(s.batch_size, 6)).astype(np.float32)
        return {'x': x, 'y': np.sin(x @ true.T / 2).astype(np.float32) + 1}

    def step(state, batch):
        def loss_of(p):
            h = batch['x'] @ p['w']
            penalty = 1e-5 * jnp.mean(root(h, s.floor)) if s.flaw.startswith('root') else 0
            return jnp.mean(jnp.sum((jax.nn.relu(h + p['b']) @ p['v'] - batch['y']) ** 2, -1)) + penalty

        loss, g = jax.value_and_grad(loss_of)(state.params)
        updates, opt = tx.update(tidy(g, s), state.opt)
        params = optax.apply_updates(state.params, updates)
        average = optax.incremental_update(params, state.average, 0.01)
        after = Averaged(params, average, opt, state.step + 1)
        return after, {'step': after.step, 'loss': loss}

    return Run(step, batch_at, init)


def policy(s: Setting) -> Run:
    """A clipped policy gradient with a value function, over transitions of a fixed behaviour. Adam, clipped."""
    tx = adam(s, 3e-3)
    best = prototypes(s.seed, 3, 4)

    def init():
        keys = jax.random.split(s.key, 3)
        params = {
            'torso': jax.random.normal(keys[0], (4, 24)) / 2,
            'policy': jax.random.normal(keys[1], (24, 3)) / 50,
            'value': jax.random.normal(keys[2], (24, 1)) / 5,
            'baseline': jnp.zeros(()),
        }
        return {'params': params, 'opt_state': tx.init(params)}

    def batch_at(k):
        rng = s.rng(k)
        obs = rng.normal(size=(s.batch_size, 4)).astype(np.float32)
        action = rng.integers(3, size=s.batch_size)
        score = obs @ best.T
        gain = score[np.arange(s.batch_size), action] - score.mean(1)
        return {
            'obs': obs,
            'action': action.astype(np.int32),
            'old_log_prob': np.full(s.batch_size, -np.log(3), np.float32),
            'advantage': gain.astype(np.float32),
            'return': (np.tanh(score.max(1)) * 3 + 2).astype(np.float32),
        }

    def step(state, batch):
        def loss_of(params):
            h = jnp.tanh(batch['obs'] @ params['torso'])
            log_probs = jax.nn.log_softmax(h @ params['policy'])
            log_prob = jnp.take_along_axis(log_probs, batch['action'][:, None], 1)[:, 0]
            a = batch['advantage']
            a = (a - a.mean()) / jnp.maximum(a.std(), s.floor)
            ratio = jnp.exp(log_prob - batch['old_log_prob'])
            gain = jnp.minimum(ratio * a, jnp.clip(ratio, 0.8, 1.2) * a).mean()
            value_loss = jnp.mean(((h @ params['value'])[:, 0] + params['baseline'] - batch['return']) ** 2)
            entropy = -jnp.mean(jnp.sum(jnp.exp(log_probs) * log_probs, -1))
            parts = {'policy_loss': -gain, 'value_loss': value_loss, 'entropy': entropy}
            return -gain + 0.5 * value_loss - 0.01 * entropy, parts

        (loss, parts), g = jax.value_and_grad(loss_of, has_aux=True)(state['params'])
        updates, opt_state = tx.update(tidy(g, s), state['opt_state'])
        params = optax.apply_updates(state['params'], updates)
        return {'params': params, 'opt_state': opt_state}, {'total_loss': loss, **parts}

    return Run(step, batch_at, init)


PROGRAMS = [
    Program(
        name='logistic',
        make=logistic,
        inputs=('0',),
        targets=('1',),
        labels=('1',),
        zeros=('0',),
        code={'unguarded': ('jnp.maximum(jnp.sqrt',), 'naive': ('jnp.exp(z)', 'jnp.log(p)')},
        kinds=(
            'nan_row',
            'bad_inputs',
            'shuffled_labels',
            'zero_row',
            'overflowing_row',
            *RATE_FAULTS,
            'corrupt_weight',
        ),
    ),
    Program(
        name='regression',
        make=regression,
        loss=(),
        inputs=('0',),
        targets=('1',),
        labels=('1',),
        zeros=('0',),
        code={'root': ('jnp.sqrt(',)},
        kinds=(*DATA_FAULTS, 'shuffled_labels', 'zero_gradient', *RATE_FAULTS, 'corrupt_weight'),
    ),
    Program(
        name='accumulated',
        updates_every=4,
        make=accumulated,
        loss=('train_loss',),
        inputs=('x',),
        targets=('y',),
        labels=('y',),
        zeros=('x',),
        code={'unguarded': ('jnp.maximum(jnp.sqrt',)},
        relu_bias="['first']['bias']",
        kinds=(*DATA_FAULTS, 'zero_row', *RATE_FAULTS, 'wiped', 'corrupt_weight', 'dead_relu', 'identical'),
    ),
    Program(
        name='guarded',
        make=guarded,
        inputs=('x',),
        targets=('count',),
        labels=('count',),
        guarded=True,
        kinds=(*DATA_FAULTS, 'nan_row', 'shuffled_labels', *RATE_FAULTS, 'wiped', 'corrupt_weight'),
    ),
    Program(
        name='half_precision',
        falls=0.8,
        make=half_precision,
        inputs=('0',),
        targets=('1',),
        labels=('1',),
        guarded=True,
        half=True,
        code={'unscaled': ('jnp.square(error)',)},
        kinds=('nan_row', 'bad_row', 'bad_batch', 'overflowing_half', *RATE_FAULTS, 'corrupt_weight'),
    ),
    Program(
        name='averaged',
        make=averaged,
        inputs=('x',),
        targets=('y',),
        labels=('y',),
        zeros=('x',),
        code={'root': ('jnp.sqrt(',)},
        relu_bias="['b']",
        kinds=(
            *DATA_FAULTS,
            'zero_gradient',
            *RATE_FAULTS,
            'wiped',
            'corrupt_weight',
            'dead_relu',
            'clip_after',
        ),
    ),
    Program(
        name='policy',
        falls=0.8,
        make=policy,
        loss=('total_loss',),
        inputs=('obs',),
        targets=('return',),
        zeros=('advantage',),
        code={'unguarded': ('jnp.maximum(a.std()',)},
        kinds=(*DATA_FAULTS, 'zero_batch', *RATE_FAULTS, 'wiped', 'corrupt_weight'),
    ),
]
