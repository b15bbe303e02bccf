"""A generator of small pure steps: state, batch, record, operations, optimiser and fault, each drawn at random."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks.foreign import operations
from benchmarks.foreign.common import Run
from benchmarks.foreign.planting import Counted

D = operations.D


class Pair(NamedTuple):
    left: Any
    right: Any


class Measured(NamedTuple):
    loss: Any
    size: Any


CONTAINERS: dict[str, Callable] = {
    'dict': lambda a, b: {'w': a, 'b': b},
    'nested': lambda a, b: {'layers': [{'kernel': a}, {'kernel': b}], 'empty': {}},
    'tuple': lambda a, b: (a, b),
    'NamedTuple': Pair,
    'list': lambda a, b: [a, [b, None]],
    'names': lambda a, b: {'a/b': {'0': a}, 'step': b},
}
EXTRAS: dict[str, tuple[Callable, Callable]] = {
    'none': (lambda: (), lambda x: x),
    'int': (lambda: 0, lambda n: n + 1),
    'int32': (lambda: jnp.int32(3), lambda n: n + 1),
    'float': (lambda: 1.0, lambda x: x * 0.99),
    'bool': (lambda: False, lambda flag: ~jnp.asarray(flag)),
    'key': (lambda: jax.random.key(1), lambda key: jax.random.split(key)[0]),
    'raw key': (lambda: jax.random.PRNGKey(1), lambda key: jax.random.split(key)[1]),
    'bytes': (lambda: np.zeros((2, 3), np.uint8), lambda n: n + jnp.uint8(1)),
    'half': (lambda: {'ema': jnp.ones(3, jnp.bfloat16), 'n': np.int16(2)}, lambda s: s),
    'empty': (lambda: {'none': None, 'zero': jnp.zeros((0, 3)), 'dict': {}}, lambda s: s),
    'complex': (lambda: jnp.ones(2, jnp.complex64), lambda z: z * 1j),
}
OPTIMISERS: dict[str, Callable] = {
    'sgd': lambda r: optax.sgd(r),
    'momentum': lambda r: optax.sgd(r, momentum=0.9, nesterov=True),
    'adam': lambda r: optax.adam(r),
    'adam, eps 0': lambda r: optax.adam(r, eps=0.0),
    'adam, bfloat16': lambda r: optax.adam(r, mu_dtype=jnp.bfloat16),
    'adamw': lambda r: optax.adamw(r, weight_decay=1e-2),
    'amsgrad': lambda r: optax.amsgrad(r),
    'lion': lambda r: optax.lion(r / 10),
    'rmsprop': lambda r: optax.rmsprop(r, momentum=0.5),
    'adafactor': lambda r: optax.adafactor(r),
    'adagrad': lambda r: optax.adagrad(r),
    'lamb': lambda r: optax.lamb(r),
    'MultiSteps': lambda r: optax.MultiSteps(optax.adam(r), 3),
    'apply_if_finite': lambda r: optax.apply_if_finite(optax.adam(r), 2),
    'masked': lambda r: optax.masked(optax.adam(r), lambda p: jax.tree.map(lambda leaf: leaf.ndim > 1, p)),
    'inject': lambda r: optax.inject_hyperparams(optax.adam)(learning_rate=r),
    'schedule': lambda r: optax.adam(optax.warmup_cosine_decay_schedule(0.0, r, 5, 50)),
    'clipped': lambda r: optax.chain(optax.clip_by_global_norm(1.0), optax.adam(r)),
    'lookahead-like': lambda r: optax.chain(optax.trace(0.9), optax.ema(0.9), optax.scale(-r)),
    'by hand': lambda r: optax.stateless(lambda g, p: jax.tree.map(lambda d: (-r * d).astype(d.dtype), g)),
}
RECORDS: dict[str, Callable] = {
    'bare': lambda loss, more: loss,
    'loss': lambda loss, more: {'loss': loss},
    'train_loss': lambda loss, more: {'train_loss': loss, 'accuracy': more},
    'nested': lambda loss, more: {'metrics': {'loss': loss, 'aux': (more, more > 0)}, 'n': jnp.int32(3)},
    'NamedTuple': Measured,
    'tuple': lambda loss, more: (loss, more),
    'names': lambda loss, more: {'loss': loss, 'step': more, 'digest': more, 'all_finite': more, 'time': 1.5},
    'other': lambda loss, more: {'objective': -loss, 'reward': more},
    'two': lambda loss, more: {'d_loss': loss, 'g_loss': more},
    'nan metric': lambda loss, more: {'loss': loss, 'precision': (more - more) / (more - more)},
    'none': lambda loss, more: {'loss': loss, 'skipped': None},
    'empty': lambda loss, more: {},
    'vector': lambda loss, more: {'loss': loss, 'parts': jnp.stack([loss, more])},
    'half': lambda loss, more: {'loss': loss.astype(jnp.float16), 'ok': True},
}
BATCHES: dict[str, Callable] = {
    'array': lambda x, k: x,
    'dict': lambda x, k: {'x': x, 'k': k},
    'tuple': lambda x, k: (x, np.float32(k)),
    'list': lambda x, k: [x, {'ids': np.arange(len(x))}],
    'NamedTuple': lambda x, k: Pair(x, np.ones(len(x), bool)),
    'float64': lambda x, k: {'x': x.astype(np.float64), 'n': np.int64(k)},
    'jax': lambda x, k: {'x': jnp.asarray(x), 'none': None},
    'numbers': lambda x, k: [float(v) for v in x[0]],
    'number': lambda x, k: float(x[0, 0]),
    'time first': lambda x, k: {'x': x.T, 'n': np.ones(len(x), np.float32)},
}
FAULTS = ('none', 'none', 'nan', 'inf', 'huge', 'zero', 'state', 'rate', 'pole')


@dataclasses.dataclass(frozen=True)
class Drawn:
    """A random step, and in words what it is made of."""

    run: Run
    words: dict[str, Any]
    faster: Callable[[float], Run]  # the same at another rate


def input_of(batch, rows: int):
    """What the operations work on, [B, D]: wherever the batch has it."""
    leaves = [jnp.asarray(leaf) for leaf in jax.tree.leaves(batch)]
    first = next((leaf for leaf in leaves if leaf.ndim == 2), None)
    if first is None:
        return jnp.broadcast_to(
            jnp.stack([leaf.astype(jnp.float32) for leaf in leaves[:D]]), (rows, min(len(leaves), D))
        )
    return first if first.shape[-1] == D else first.T


def batches(words: dict[str, Any]) -> Callable:
    at, fault, rows = words['at'], words['fault'], words['rows']

    def batch_at(k):
        x = np.random.default_rng((words['seed'], k)).normal(size=(rows, D)).astype(np.float32)
        if k == at and fault in ('nan', 'inf', 'huge', 'zero'):
            x[words['row']] = {'nan': np.nan, 'inf': np.inf, 'huge': x[0] * 1e6, 'zero': 0}[fault]
        return BATCHES[words['batch']](x, k)

    return batch_at


def loss_of(words: dict[str, Any], params, batch, count):
    x = input_of(batch, words['rows'])
    if x.shape[-1] != D:
        x = jnp.tile(x[:, :1], (1, D))
    x = x.astype(words['dtype'])
    w, v = sorted(jax.tree.leaves(params), key=lambda leaf: -leaf.ndim)
    for name in words['operations']:
        x = operations.ALL[name](x, w)
    out = (x + v).astype(jnp.float32)
    if words['fault'] == 'pole':
        out = out / jnp.where(count == words['at'], 0.0, 1.0)
    return {
        'square': lambda: jnp.mean((out - 1) ** 2),
        'absolute': lambda: jnp.mean(jnp.abs(out)),
        'entropy': lambda: -jnp.mean(jax.nn.log_softmax(out)[:, 0]),
        'sum': lambda: jnp.sum(out**2) - 3,
        'log': lambda: jnp.mean(jnp.log(out**2 + 1e-6)),
    }[words['loss']]()


def rate_of(words: dict[str, Any], count) -> Any:
    return jnp.where((count >= words['at']) & (words['fault'] == 'rate'), 1e4, 1.0)


def assembled(words: dict[str, Any], factor: float = 1.0) -> Run:
    tx = OPTIMISERS[words['optimiser']](words['rate'] * factor)
    make, advance = EXTRAS[words['extra']]
    dtype = jnp.dtype(words['dtype'])

    def init():
        rng = np.random.default_rng(words['seed'])
        w, v = (jnp.asarray(rng.normal(size=shape) / 2, dtype) for shape in ((D, D), (D,)))
        params = CONTAINERS[words['container']](w, v)
        return Counted({'params': params, 'opt': tx.init(params), 'extra': make()}, jnp.int32(0))

    def step(state, batch):
        inner, count = state
        loss, g = jax.value_and_grad(lambda p: loss_of(words, p, batch, count))(inner['params'])
        updates, opt = tx.update(g, inner['opt'], inner['params'])
        updates = jax.tree.map(lambda u: (u * rate_of(words, count)).astype(u.dtype), updates)
        params = optax.apply_updates(inner['params'], updates)
        if words['fault'] == 'state':
            params = jax.tree.map(
                lambda p: jnp.where(count == words['at'], jnp.inf, p).astype(p.dtype), params
            )
        record = RECORDS[words['record']](loss, optax.tree.norm(g).astype(jnp.float32))
        return Counted({'params': params, 'opt': opt, 'extra': advance(inner['extra'])}, count + 1), record

    return Run(step, batches(words), init)


def draw(seed: int) -> Drawn:
    rng = np.random.default_rng([seed, 5])

    def one(of) -> str:
        return str(rng.choice([*of]))

    words: dict[str, Any] = {
        'seed': seed,
        'dtype': one(('float32', 'float32', 'float32', 'bfloat16', 'float16')),
        'operations': [one(operations.ALL) for _ in range(rng.integers(1, 4))],
        'optimiser': one(OPTIMISERS),
        'container': one(CONTAINERS),
        'extra': one(EXTRAS),
        'record': one(RECORDS),
        'batch': one(BATCHES),
        'loss': one(('square', 'absolute', 'entropy', 'sum', 'log')),
        'fault': one(FAULTS),
        'at': int(rng.integers(0, 36)),
        'rows': int(rng.choice([2, 4, 6, 8])),
        'rate': float(rng.choice([1e-3, 1e-2, 1e-1])),
    }
    words['row'] = int(rng.integers(words['rows']))
    return Drawn(assembled(words), words, lambda factor: assembled(words, factor))
