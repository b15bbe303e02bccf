"""Programs with other optimisers than Adam alone, kept apart as those of held_out are: denoising, a differential
equation by its residual, a graph, low-rank adapters, preferences, two gradients a step.

Schedule-free AdamW, Muon, Lion, Adafactor for a part of the parameters, lookahead, and sharpness-aware steps.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn

from benchmarks.foreign.common import Program, Run, Setting, prototypes, tidy
from benchmarks.foreign.held_out import DATA_FAULTS, RATE_FAULTS


class Denoiser(nn.Module):
    @nn.compact
    def __call__(self, x, t):
        angles = t[:, None] * jnp.float32([1, 2, 4, 8])
        h = jnp.concatenate([x, jnp.sin(angles), jnp.cos(angles)], -1)
        for _ in range(2):
            h = nn.silu(nn.Dense(48)(h))
        return nn.Dense(2)(h)


def denoiser(s: Setting) -> Run:
    """Which noise was added to points of a ring, from none to all. Schedule-free AdamW."""
    model = Denoiser()
    tx = optax.contrib.schedule_free_adamw(s.rate_of(5e-3), weight_decay=1e-4)

    def init():
        params = model.init(s.key, jnp.zeros((1, 2)), jnp.zeros(1))['params']
        return {'params': params, 'opt_state': tx.init(params)}

    def batch_at(k):
        rng = s.rng(k)
        angle = rng.uniform(0, 2 * np.pi, 4 * s.batch_size)
        ring = 2 * np.stack([np.cos(angle), np.sin(angle)], -1)
        return {
            'x': ring.astype(np.float32),
            't': rng.uniform(0, np.pi / 2, 4 * s.batch_size).astype(np.float32),
            'noise': rng.normal(size=ring.shape).astype(np.float32),
        }

    def step(state, batch):
        def loss_of(params):
            t = batch['t'][:, None]
            noisy = jnp.cos(t) * batch['x'] + jnp.sin(t) * batch['noise']
            return jnp.mean((model.apply({'params': params}, noisy, batch['t']) - batch['noise']) ** 2)

        loss, g = jax.value_and_grad(loss_of)(state['params'])
        updates, opt = tx.update(tidy(g, s), state['opt_state'], state['params'])
        params = optax.apply_updates(state['params'], updates)
        return {'params': params, 'opt_state': opt}, {'loss': loss, 'grad_norm': optax.tree.norm(g)}

    return Run(step, batch_at, init)


def physics(s: Setting) -> Run:
    """y'' + 4 y = f on [0, 2], y(0) = 1 and y'(0) = 0: a network is fitted by what is left over. Muon."""
    tx = optax.contrib.muon(s.rate_of(1e-2))

    def init():
        keys = jax.random.split(s.key, 3)
        shapes = [(1, 24), (24, 24), (24, 1)]
        params = [
            {'w': jax.random.normal(key, shape) / np.sqrt(shape[0]), 'b': jnp.zeros(shape[1])}
            for key, shape in zip(keys, shapes, strict=True)
        ]
        return params, tx.init(params)

    def batch_at(k):
        x = s.rng(k).uniform(0, 2, 2 * s.batch_size).astype(np.float32)
        return {'x': x, 'force': (3 * np.cos(x)).astype(np.float32)}

    def step(state, batch):
        params, opt = state

        def y(params, x):
            h = jnp.reshape(x, (1,))
            for layer in params[:-1]:
                h = jnp.tanh(h @ layer['w'] + layer['b'])
            return (h @ params[-1]['w'] + params[-1]['b'])[0]

        def loss_of(params):
            slope = jax.grad(y, argnums=1)
            bend = jax.vmap(jax.grad(slope, argnums=1), (None, 0))(params, batch['x'])
            left = bend + 4 * jax.vmap(y, (None, 0))(params, batch['x']) - batch['force']
            start = (y(params, jnp.float32(0)) - 1) ** 2 + slope(params, jnp.float32(0)) ** 2
            return jnp.mean(left**2) + 10 * start

        loss, g = jax.value_and_grad(loss_of)(params)
        updates, opt = tx.update(tidy(g, s), opt, params)
        return (optax.apply_updates(params, updates), opt), {'loss': loss}

    return Run(step, batch_at, init)


NODES, EDGES = 12, 30


def graph(s: Setting) -> Run:
    """Which kind a node is of, by its neighbours: messages are summed over edges. Lion."""
    tx = optax.lion(s.rate_of(1e-3), weight_decay=1e-4)
    kinds = prototypes(s.seed, 4, 6)

    def init():
        keys = jax.random.split(s.key, 3)
        params = {
            'self': jax.random.normal(keys[0], (6, 32)) / 3,
            'message': jax.random.normal(keys[1], (6, 32)) / 3,
            'out': jax.random.normal(keys[2], (32, 4)) / 6,
        }
        return {'params': params, 'opt': tx.init(params)}

    def batch_at(k):
        rng = s.rng(k)
        label = rng.integers(0, 4, (s.batch_size, NODES))
        source, target = rng.integers(0, NODES, (2, s.batch_size, EDGES))
        own = np.take_along_axis(label, source, 1)
        target = np.where(rng.uniform(size=own.shape) < 0.7, _of_kind(label, own, target), target)
        nodes = kinds[label] + 2 * rng.normal(size=(s.batch_size, NODES, 6))
        return {
            'nodes': nodes.astype(np.float32), 'source': source.astype(np.int32),
            'target': target.astype(np.int32), 'label': label.astype(np.int32),
        }  # fmt: skip

    def step(state, batch):
        def logits_of(params, nodes, source, target):
            sent = nodes[source] @ params['message']
            got = jax.ops.segment_sum(sent, target, NODES)
            count = jax.ops.segment_sum(jnp.ones(EDGES), target, NODES)
            return jax.nn.relu(nodes @ params['self'] + got / jnp.maximum(count, 1)[:, None]) @ params['out']

        def loss_of(params):
            logits = jax.vmap(logits_of, (None, 0, 0, 0))(
                params, batch['nodes'], batch['source'], batch['target']
            )
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch['label'])
            return losses.mean(), jnp.mean(logits.argmax(-1) == batch['label'])

        (loss, accuracy), g = jax.value_and_grad(loss_of, has_aux=True)(state['params'])
        updates, opt = tx.update(tidy(g, s), state['opt'], state['params'])
        params = optax.apply_updates(state['params'], updates)
        return {'params': params, 'opt': opt}, {'loss': loss, 'accuracy': accuracy}

    return Run(step, batch_at, init)


def _of_kind(label: np.ndarray, own: np.ndarray, other: np.ndarray) -> np.ndarray:
    """For each edge a node of the kind that it comes from; the other where there is none."""
    same = label[:, None, :] == own[:, :, None]
    return np.where(same.any(-1), same.argmax(-1), other)


def adapter(s: Setting) -> Run:
    """A network that stays as it is, and two matrices of rank 2 beside each of its own. Adafactor for these alone."""
    base = [jax.random.normal(key, (16, 16)) / 4 for key in jax.random.split(jax.random.key(77), 2)]
    wanted = [w + 0.5 * np.outer(*prototypes(n, 2, 16)) / 4 for n, w in enumerate(base)]

    def labelled(params):
        return jax.tree.map_with_path(lambda path, _: 'frozen' if path[-1].key == 'w' else 'trained', params)

    tx = optax.multi_transform(
        {'trained': optax.adafactor(s.rate_of(3e-2)), 'frozen': optax.set_to_zero()}, labelled
    )

    def init():
        keys = jax.random.split(s.key, 2)
        params = {
            f'layer_{n}': {'w': w, 'down': jax.random.normal(key, (16, 2)) / 4, 'up': jnp.zeros((2, 16))}
            for n, (w, key) in enumerate(zip(base, keys, strict=True))
        }
        return {'params': params, 'opt': tx.init(params)}

    def batch_at(k):
        x = s.rng(k).normal(size=(2 * s.batch_size, 16)).astype(np.float32)
        return {'x': x, 'y': np.tanh(x @ np.asarray(wanted[0])) @ np.asarray(wanted[1])}

    def step(state, batch):
        def loss_of(params):
            h = batch['x']
            for n in range(2):
                layer = params[f'layer_{n}']
                h = h @ layer['w'] + h @ layer['down'] @ layer['up']
                h = jnp.tanh(h) if n == 0 else h
            return jnp.mean((h - batch['y']) ** 2)

        loss, g = jax.value_and_grad(loss_of)(state['params'])
        updates, opt = tx.update(tidy(g, s), state['opt'], state['params'])
        return {'params': optax.apply_updates(state['params'], updates), 'opt': opt}, {'loss': loss}

    return Run(step, batch_at, init)


def preferences(s: Setting) -> Run:
    """Which of two answers is better, by the ratio to what a frozen model says of each. Adam with lookahead."""
    tx = optax.lookahead(optax.adam(s.rate_of(1e-2)), sync_period=5, slow_step_size=0.5)
    frozen = jax.random.normal(jax.random.key(78), (8,)) / 3
    taste = prototypes(s.seed, 1, 8)[0]

    def init():
        keys = jax.random.split(s.key)
        own = {
            'hidden': jax.random.normal(keys[0], (8, 32)) / 3,
            'score': jax.random.normal(keys[1], (32,)) / 6,
        }
        params = optax.LookaheadParams.init_synced(own)
        return {'params': params, 'opt': tx.init(params)}

    def batch_at(k):
        pair = s.rng(k).normal(size=(2, 2 * s.batch_size, 8))
        score = pair @ taste + np.sin(2 * pair[..., 0])
        first = (score[0] > score[1])[:, None]
        good, bad = np.where(first, pair[0], pair[1]), np.where(first, pair[1], pair[0])
        return {'good': good.astype(np.float32), 'bad': bad.astype(np.float32)}

    def step(state, batch):
        def loss_of(params):
            def ratio(x):
                return jnp.tanh(x @ params['hidden']) @ params['score'] - 0.1 * x @ frozen

            margin = ratio(batch['good']) - ratio(batch['bad'])
            return -jnp.mean(jax.nn.log_sigmoid(margin)), jnp.mean(margin > 0)

        (loss, won), g = jax.value_and_grad(loss_of, has_aux=True)(state['params'].fast)
        updates, opt = tx.update(tidy(g, s), state['opt'], state['params'])
        params = optax.apply_updates(state['params'], updates)
        return {'params': params, 'opt': opt}, {'loss': loss, 'reward_accuracy': won}

    return Run(step, batch_at, init)


def sharpness(s: Setting) -> Run:
    """Two moons, by a gradient taken a little uphill. SGD with momentum, by hand; averaged weights beside it."""

    def init():
        keys = jax.random.split(s.key)
        params = {
            'w1': jax.random.normal(keys[0], (2, 32)), 'b1': jnp.zeros(32),
            'w2': jax.random.normal(keys[1], (32,)) / 6, 'b2': jnp.float32(0),
        }  # fmt: skip
        still = jax.tree.map(jnp.zeros_like, params)
        return {'params': params, 'velocity': still, 'average': params, 'count': jnp.int32(0)}

    def batch_at(k):
        rng = s.rng(k)
        side = rng.integers(0, 2, 2 * s.batch_size)
        angle = rng.uniform(0, np.pi, side.shape)
        x = np.stack(
            [np.cos(angle) + side - 0.5, np.where(side, 0.25 - np.sin(angle), np.sin(angle) - 0.25)], -1
        )
        x = x + rng.normal(size=x.shape) / 8
        return {'x': x.astype(np.float32), 'side': (2 * side - 1).astype(np.float32)}

    def step(state, batch):
        def loss_of(params):
            h = jax.nn.gelu(batch['x'] @ params['w1'] + params['b1'])
            return jnp.mean(jnp.logaddexp(0, -batch['side'] * (h @ params['w2'] + params['b2'])))

        params = state['params']
        loss, g = jax.value_and_grad(loss_of)(params)
        far = 0.05 / (optax.tree.norm(g) + 1e-6)
        g = tidy(jax.grad(loss_of)(jax.tree.map(lambda p, d: p + far * d, params, g)), s)
        rate = s.rate_of(0.1)(state['count'])
        velocity = jax.tree.map(lambda v, d: 0.9 * v + d, state['velocity'], g)
        params = jax.tree.map(lambda p, v: p - rate * v, params, velocity)
        average = optax.incremental_update(params, state['average'], 0.02)
        return {
            'params': params, 'velocity': velocity, 'average': average, 'count': state['count'] + 1,
        }, {'loss': loss}  # fmt: skip

    return Run(step, batch_at, init)


PROGRAMS = [
    Program(
        name='denoiser', make=denoiser, inputs=('x',), targets=('noise',), labels=('noise',),
        kinds=(*DATA_FAULTS, *RATE_FAULTS, 'corrupt_weight'), held_out=True,
    ),
    Program(
        name='physics', make=physics, inputs=('x',), targets=('force',),
        kinds=(*DATA_FAULTS, *RATE_FAULTS, 'corrupt_weight'), held_out=True,
    ),
    Program(
        name='graph', make=graph, inputs=('nodes',), labels=('label',),
        kinds=('nan_row', 'shuffled_labels', 'bad_inputs', *RATE_FAULTS, 'corrupt_weight'), falls=0.7, held_out=True,
    ),
    Program(
        name='adapter', make=adapter, inputs=('x',), targets=('y',), labels=('y',), rate_limits=(0.8, 1.5),
        kinds=(*DATA_FAULTS, *RATE_FAULTS, 'corrupt_weight'), held_out=True,
    ),
    Program(
        name='preferences', make=preferences, inputs=('good',), targets=('bad',),
        kinds=(*DATA_FAULTS, *RATE_FAULTS, 'corrupt_weight'), held_out=True,
    ),
    Program(
        name='sharpness', make=sharpness, inputs=('x',), targets=('x',), labels=('side',),
        kinds=(*DATA_FAULTS, 'shuffled_labels', *RATE_FAULTS, 'corrupt_weight'), held_out=True,
    ),
]  # fmt: skip
