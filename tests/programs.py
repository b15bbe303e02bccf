"""Random programs in which one example of the batch is poisoned, by the seed that they are made of.

Each takes a batch through a few operations that move, mix or keep its examples, then through one that breaks on numbers
that no healthy example has, and trains on the mean: as it is, or in a loop over micro-batches.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

B, T, D = 6, 4, 3

LOW = -20
"""Healthy numbers stay above it in most programs, so a poison below it breaks them."""


def _first_axis(operation):
    """An operation on x as [first axis, rest]."""
    return lambda x, rng: operation(x.reshape(x.shape[0], -1), rng)


def _permuted(x, rng):
    return x[jnp.asarray(rng.permutation(x.shape[0]))]


def _scanned(x, rng):
    return lax.scan(lambda c, row: (jnp.tanh(c + row), c + row), jnp.zeros(x.shape[1:]), x)[1]


def _scanned_over_second(x, rng):
    if x.ndim < 2:
        return x
    return lax.scan(lambda c, at: (jnp.tanh(c + at), c / 2 + at), jnp.zeros_like(x[:, 0]), x.swapaxes(0, 1))[
        1
    ]


def _scattered(x, rng):
    return jnp.zeros_like(x).at[jnp.asarray(rng.permutation(x.shape[0]))].set(x)


def _pooled(x, rng):
    window, strides = (2,) + (1,) * (x.ndim - 1), (1,) * x.ndim
    return lax.reduce_window(x, -jnp.inf, lax.max, window, strides, 'SAME')


def _padded(x, rng):
    return jnp.pad(x, [(1, 0)] + [(0, 0)] * (x.ndim - 1))[:-1] + x


def _last_overwritten(x, rng):
    return lax.dynamic_update_slice(x, x[:1], (x.shape[0] - 1,) + (0,) * (x.ndim - 1))


MOVES: dict[str, Callable[[Any, np.random.Generator], Any]] = {
    'transposed': lambda x, rng: jnp.transpose(x, tuple(rng.permutation(x.ndim))),
    'flat': lambda x, rng: x.reshape(-1),
    'merged': lambda x, rng: x.reshape(x.shape[0] * x.shape[1], *x.shape[2:]) if x.ndim > 1 else x,
    'split': lambda x, rng: x.reshape(2, x.shape[0] // 2, *x.shape[1:]) if x.shape[0] % 2 == 0 else x,
    'sorted': lambda x, rng: jnp.sort(x, 0),
    'sorted within': lambda x, rng: jnp.sort(x, -1),
    'in the order of sums': lambda x, rng: x[jnp.argsort(x.reshape(x.shape[0], -1).sum(1))],
    'permuted': _permuted,
    'along an order': lambda x, rng: jnp.take_along_axis(x, jnp.argsort(x, 0), 0),
    'rolled': lambda x, rng: jnp.roll(x, 1, 0),
    'reversed': lambda x, rng: x[::-1],
    'cumulated': lambda x, rng: jnp.cumsum(x, 0),
    'largest so far': lambda x, rng: lax.cummax(x, 0),
    'mean': lambda x, rng: x.mean(0, keepdims=True) + 0 * x,
    'above the least': lambda x, rng: x - x.min(0, keepdims=True) + 0.5,
    'largest': lambda x, rng: jnp.broadcast_to(x.max(0, keepdims=True), x.shape),
    'summed': lambda x, rng: x.sum(-1, keepdims=True),
    'repeated': lambda x, rng: x[..., None] * jnp.ones((1,) * x.ndim + (2,)) if x.ndim < 4 else x,
    'a product': lambda x, rng: 0.3 * x @ jnp.asarray(rng.normal(size=(x.shape[-1], 3)), jnp.float32),
    'mixed': _first_axis(lambda x, rng: jnp.asarray(np.eye(len(x)) + 0.1 * rng.random((len(x),) * 2), x.dtype) @ x),
    'its own products': _first_axis(lambda x, rng: x @ x.T),
    'a solution': _first_axis(lambda x, rng: jnp.linalg.solve(jnp.eye(len(x)) * 2 + 0.1, x)),
    'scanned': _scanned,
    'scanned over the second': _scanned_over_second,
    'mapped': lambda x, rng: jax.vmap(lambda row: row * 2 - row.mean())(x),
    'gated': lambda x, rng: x * jax.nn.sigmoid(x) + x,
    'convolved': lambda x, rng: jnp.convolve(x.reshape(-1), jnp.ones(3) / 3, mode='same').reshape(x.shape),
    'pooled': _pooled,
    'a spectrum': lambda x, rng: jnp.abs(jnp.fft.fft(x, axis=0)) - 1,
    'the top': lambda x, rng: lax.top_k(x.swapaxes(0, -1), min(3, x.shape[0]))[0].swapaxes(0, -1),
    'branched': lambda x, rng: lax.cond(x.sum() > 0, lambda x: x[::-1], lambda x: x * 1.0, x),
    'rolled in a loop': lambda x, rng: lax.fori_loop(0, 3, lambda i, x: jnp.roll(x, 1, 0), x),
    'scattered': _scattered,
    'two held together': lambda x, rng: lax.optimization_barrier((x[::-1], x))[0],
    'joined': lambda x, rng: jnp.concatenate([x[1:], x[:1]]),
    'padded': _padded,
    'jitted': lambda x, rng: jax.jit(lambda x: x[::-1])(x),
    'rematerialised': lambda x, rng: jax.checkpoint(lambda x: jnp.sin(x) + x)(x),
    'overwritten': _last_overwritten,
    'selected': lambda x, rng: jnp.where(x > 0, x, x[::-1]),
}  # fmt: skip

BREAKS: dict[str, Callable[[Any, Any], Any]] = {
    'root': lambda x, low: jnp.sqrt(x - low),
    'logarithm': lambda x, low: jnp.log(x - low),
    'division': lambda x, low: 1 / jnp.maximum(x - low, 0),
    'exponential': lambda x, low: jnp.exp(-(x - low) * 50),
    'square': lambda x, low: ((x * 1e17) ** 2) * 1e3,
}

POISONS = (-50.0, -1e4, 1e4, 1e19)


class Program(NamedTuple):
    """A step, and a batch of which one example is poisoned."""

    step: Callable
    state: dict[str, Any]
    healthy: dict[str, np.ndarray]
    poisoned: dict[str, np.ndarray]
    example: int
    about: str

    def breaks(self) -> bool:
        """Whether the poison breaks it, and nothing else does."""
        return _is_finite(self.step, self.state, self.healthy) and not _is_finite(
            self.step, self.state, self.poisoned
        )


def _is_finite(step, state, batch):
    return all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(jax.jit(step)(state, batch)))


def program(seed: int) -> Program:
    rng = np.random.default_rng(seed)
    chosen = [str(name) for name in rng.choice(list(MOVES), rng.integers(1, 4))]
    how, in_parts = str(rng.choice(list(BREAKS))), bool(rng.random() < 0.3)

    def loss_of(state, x, y):
        again = np.random.default_rng(seed)
        for name in chosen:
            x = MOVES[name](x, again)
        return state['scale'] * (jnp.mean(BREAKS[how](x, state['low'])) + jnp.mean(y))

    def step(state, batch):
        if not in_parts:
            loss, g = jax.value_and_grad(loss_of)(state, batch['x'], batch['y'])
            return jax.tree.map(lambda p, g: p - 0.1 * g, state, g), {'loss': loss}
        parts = jax.tree.map(lambda leaf: leaf.reshape(2, B // 2, *leaf.shape[1:]), batch)

        def one(total, part):
            loss, g = jax.value_and_grad(loss_of)(state, part['x'], part['y'])
            return jax.tree.map(jnp.add, total, g), loss

        g, losses = lax.scan(one, jax.tree.map(jnp.zeros_like, state), parts)
        return jax.tree.map(lambda p, g: p - 0.1 * g, state, g), {'loss': losses.mean()}

    x = rng.uniform(1, 2, (B, T, D)).astype(np.float32)
    healthy = {'x': x, 'y': rng.normal(size=B).astype(np.float32)}
    example, bad = int(rng.integers(B)), x.copy()
    within = () if rng.random() < 0.5 else (int(rng.integers(T)), int(rng.integers(D)))
    bad[(example, *within)] = rng.choice(POISONS)
    state = {'low': jnp.float32(LOW), 'scale': jnp.float32(1)}
    about = f'{", ".join(chosen)}; {how}{" in parts" * in_parts}'
    return Program(step, state, healthy, healthy | {'x': bad}, example, about)
