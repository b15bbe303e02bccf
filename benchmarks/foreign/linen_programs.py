"""flax linen: a convolutional classifier, sequences to sequences, sentences to two classes, a small decoder."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from flax.training import train_state

from benchmarks.foreign.common import (
    Program,
    Run,
    Setting,
    adam,
    cross_entropy,
    initialiser,
    one_hot,
    prototypes,
    tidy,
    unit,
)

BATCH_FAULTS = ('nan_row', 'bad_inputs', 'shuffled_labels')
RATE_FAULTS = ('rate_jump', 'rate_huge', 'wrong_sign', 'stopped')
ADAM_FAULTS = ('wiped', 'bfloat16_moments', 'clip_after')
STATE_FAULTS = ('corrupt_weight', 'dead_relu')


class CNN(nn.Module):
    s: Setting

    @nn.compact
    def __call__(self, x, rng):
        kernel = initialiser(self.s, nn.initializers.lecun_normal())
        x = nn.relu(nn.Conv(6, (3, 3), kernel_init=kernel)(x))
        x = nn.avg_pool(x, (2, 2), strides=(2, 2))
        x = x.reshape((x.shape[0], -1))
        x = nn.relu(nn.Dense(24, kernel_init=kernel, name='hidden')(x))
        if self.s.flaw == 'dropout':
            x = nn.Dropout(0.998, deterministic=False)(x, rng=rng)
        return nn.Dense(10, name='logits')(x)


def mnist(s: Setting) -> Run:
    """8 x 8 images of ten classes, SGD with momentum."""
    model = CNN(s)
    centres = prototypes(s.seed, 10, 64)

    def init():
        variables = model.init(s.key, jnp.zeros((1, 8, 8, 1)), s.key)
        tx = optax.sgd(s.rate_of(0.02), momentum=0.9)
        return train_state.TrainState.create(apply_fn=model.apply, params=variables['params'], tx=tx)

    def batch_at(k):
        rng = s.rng(k)
        label = rng.integers(10, size=s.batch_size)
        image = centres[label] + rng.normal(size=(s.batch_size, 64))
        return {'image': image.reshape(-1, 8, 8, 1).astype(np.float32), 'label': label.astype(np.int32)}

    def step(state, batch):
        def loss_fn(params):
            rows = batch['image'].reshape(-1, 64)
            images = unit(rows, s.floor) * 8 if s.units else rows
            key = jax.random.fold_in(s.key, state.step)
            logits = state.apply_fn({'params': params}, images.reshape(-1, 8, 8, 1), key)
            return cross_entropy(logits, batch['label'], s).mean(), logits

        (loss, logits), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params)
        accuracy = jnp.mean(jnp.argmax(logits, -1) == batch['label'])
        return state.apply_gradients(grads=tidy(grads, s)), {'loss': loss, 'accuracy': accuracy}

    return Run(step, batch_at, init)


class Seq2seq(nn.Module):
    s: Setting

    @nn.compact
    def __call__(self, query, answer):
        carry, _ = nn.RNN(nn.OptimizedLSTMCell(24), return_carry=True, name='encoder')(query)
        outputs = nn.RNN(nn.OptimizedLSTMCell(24), name='decoder')(answer, initial_carry=carry)
        return nn.Dense(8, name='output')(outputs)


def seq2seq(s: Setting) -> Run:
    """Copies a sequence of symbols; the loss of an example is a mean over its length. Adam."""
    model = Seq2seq(s)
    tx = adam(s, 5e-3)

    def init():
        empty = jnp.zeros((1, 4, 8))
        params = model.init(s.key, empty, empty)['params']
        return train_state.TrainState.create(apply_fn=model.apply, params=params, tx=tx)

    def batch_at(k):
        rng = s.rng(k)
        symbols = rng.integers(2, 8, size=(s.batch_size, 4))
        lengths = rng.integers(1, 5, size=s.batch_size)
        mask = (np.arange(4) < lengths[:, None]).astype(np.float32)
        before = np.concatenate([np.ones_like(symbols[:, :1]), symbols[:, :-1]], 1)
        return {
            'query': one_hot(symbols, 8),
            'before': one_hot(before, 8),
            'answer': symbols.astype(np.int32),
            'mask': mask,
        }

    def step(state, batch):
        def loss_fn(params):
            logits = state.apply_fn({'params': params}, batch['query'], batch['before'])
            losses = cross_entropy(logits, batch['answer'], s) * batch['mask']
            length = batch['mask'].sum(-1)
            return jnp.mean(losses.sum(-1) / jnp.maximum(length, s.floor)), logits

        (loss, logits), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params)
        hits = (jnp.argmax(logits, -1) == batch['answer']) * batch['mask']
        accuracy = hits.sum() / batch['mask'].sum()
        return state.apply_gradients(grads=tidy(grads, s)), {'loss': loss, 'accuracy': accuracy}

    return Run(step, batch_at, init)


class Sentences(nn.Module):
    s: Setting

    @nn.compact
    def __call__(self, tokens, mask):
        x = nn.Embed(50, 16, name='embedding')(tokens) * mask[..., None]
        x = x.sum(1) / jnp.maximum(mask.sum(1), self.s.floor)[:, None]
        x = nn.relu(
            nn.Dense(24, kernel_init=initialiser(self.s, nn.initializers.lecun_normal()), name='hidden')(x)
        )
        return nn.Dense(2, name='classifier')(x)


def sst2(s: Setting) -> Run:
    """Sentences of up to 8 tokens, of which some speak for one class; each has a weight. Adam."""
    model = Sentences(s)
    tx = adam(s, 3e-3)
    speaks = np.random.default_rng(s.seed).normal(size=50)

    def init():
        params = model.init(s.key, jnp.zeros((1, 8), jnp.int32), jnp.ones((1, 8)))['params']
        return {'params': params, 'opt_state': tx.init(params)}

    def batch_at(k):
        rng = s.rng(k)
        tokens = rng.integers(1, 50, size=(s.batch_size, 8))
        mask = np.arange(8) < rng.integers(3, 9, size=s.batch_size)[:, None]
        label = (speaks[tokens] * mask).sum(1) > 0
        return {
            'tokens': tokens.astype(np.int32),
            'mask': mask.astype(np.float32),
            'label': label.astype(np.int32),
            'weight': rng.uniform(0.5, 1.5, size=s.batch_size).astype(np.float32),
        }

    def step(state, batch):
        def loss_fn(params):
            logits = model.apply({'params': params}, batch['tokens'], batch['mask'])
            return jnp.mean(cross_entropy(logits, batch['label'], s) * batch['weight']), logits

        (loss, logits), grads = jax.value_and_grad(loss_fn, has_aux=True)(state['params'])
        updates, opt_state = tx.update(tidy(grads, s), state['opt_state'], state['params'])
        params = optax.apply_updates(state['params'], updates)
        accuracy = jnp.mean(jnp.argmax(logits, -1) == batch['label'])
        return {'params': params, 'opt_state': opt_state}, {'loss': loss, 'accuracy': accuracy}

    return Run(step, batch_at, init)


class Decoder(nn.Module):
    """One block: causal attention and a feed-forward layer, normalised before each."""

    s: Setting

    @nn.compact
    def __call__(self, tokens):
        x = nn.Embed(24, 16, name='embed')(tokens) + nn.Embed(8, 16, name='position')(jnp.arange(8))
        y = nn.LayerNorm(use_bias=False, name='norm_1')(x)
        q, k, v = (nn.Dense(16, use_bias=False, name=name)(y) for name in ('query', 'key', 'value'))
        scores = jnp.einsum('btd,bsd->bts', q, k) / 4
        scores = jnp.where(jnp.tril(jnp.ones((8, 8), bool)), scores, -1e9)
        x = x + nn.Dense(16, use_bias=False, name='out')(nn.softmax(scores) @ v)
        y = nn.LayerNorm(use_bias=False, name='norm_2')(x)
        x = x + nn.Dense(16, name='down')(nn.relu(nn.Dense(32, name='up')(y)))
        return nn.Dense(24, use_bias=False, name='head')(x)


def decoder(s: Setting) -> Run:
    """Which token follows, in sequences that count upwards by a stride; AdamW, warm-up and a cosine."""
    model = Decoder(s)
    cosine = optax.warmup_cosine_decay_schedule(0.0, 1.0, 30, 900, 0.1)
    tx = adam(s, 3e-3, b2=0.98, decay=1e-3, schedule=cosine)

    def init():
        params = model.init(s.key, jnp.zeros((1, 8), jnp.int32))['params']
        return train_state.TrainState.create(apply_fn=model.apply, params=params, tx=tx)

    def batch_at(k):
        rng = s.rng(k)
        start, stride = rng.integers(24, size=(s.batch_size, 1)), rng.integers(1, 3, size=(s.batch_size, 1))
        sequence = (start + stride * np.arange(9)) % 24
        return {'in': sequence[:, :-1].astype(np.int32), 'out': sequence[:, 1:].astype(np.int32)}

    def step(state, batch):
        def loss_fn(params):
            logits = state.apply_fn({'params': params}, batch['in'])
            return cross_entropy(logits, batch['out'], s).mean()

        loss, grads = jax.value_and_grad(loss_fn)(state.params)
        record = {'train_loss': loss, 'learning_rate': 3e-3 * s.rate * cosine(state.step)}
        return state.apply_gradients(grads=tidy(grads, s)), record

    return Run(step, batch_at, init)


PROGRAMS = [
    Program(
        name='linen_mnist',
        make=mnist,
        inputs=('image',),
        labels=('label',),
        zeros=('image',),
        code={'unguarded': ('jnp.maximum(jnp.sqrt',), 'naive': ('jnp.exp', 'jnp.log', 'weights.sum')},
        relu_bias="['hidden']['bias']",
        kinds=(
            *BATCH_FAULTS,
            *RATE_FAULTS,
            *STATE_FAULTS,
            'zero_row',
            'overflowing_row',
            'identical',
            'dropout',
        ),
    ),
    Program(
        name='linen_seq2seq',
        make=seq2seq,
        inputs=('query',),
        labels=('answer',),
        zeros=('mask',),
        code={'unguarded': ('jnp.maximum(length',)},
        kinds=('nan_row', 'shuffled_labels', 'zero_row', 'corrupt_weight', *RATE_FAULTS, *ADAM_FAULTS),
    ),
    Program(
        name='linen_sst2',
        make=sst2,
        inputs=('weight',),
        targets=('weight',),
        labels=('label',),
        ids=('tokens',),
        zeros=('mask',),
        code={'unguarded': ('jnp.maximum(mask.sum(1)',), 'ids': ('nn.Embed(',)},
        relu_bias="['hidden']['bias']",
        kinds=(
            'nan_row',
            'bad_row',
            'shuffled_labels',
            'out_of_range',
            'zero_row',
            'epsilon_0',
            'identical',
            *RATE_FAULTS,
            *ADAM_FAULTS,
            *STATE_FAULTS,
        ),
    ),
    Program(
        name='tiny_decoder',
        make=decoder,
        loss=('train_loss',),
        labels=('out',),
        ids=('in',),
        code={'ids': ("nn.Embed(24, 16, name='embed')",)},
        relu_bias="['up']['bias']",
        kinds=('out_of_range', 'shuffled_labels', 'wiped', 'bfloat16_moments', *RATE_FAULTS, *STATE_FAULTS),
    ),
]
