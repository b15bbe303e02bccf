"""The stock networks as users of each JAX library write them, all from the same weights.

Each function of `IN_JAX` takes a case and gives parameters, and a function of them and of the letters. Libraries are
imported where they are used, so that one that isn't installed is missed by its own rows alone.
"""

import functools
import math
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from absl import flags

from jaxrnn.cli import common
from jaxrnn.types import UserError

LETTERS, STEPS, SIZE = 27, 20, 100  # V, T, E: the embedded default
RATE = 1e-3  # of Adam
WIDTHS = {'lstm': 1024, 'gru': 1024, 'stacked': 512}

PACKAGES = {
    'jaxrnn': 'jaxrnn',
    'jaxrnn-reference': 'jaxrnn',
    'nnx': 'flax',
    'linen': 'flax',
    'haiku': 'haiku',
    'equinox': 'equinox',
    'keras-jax': 'keras',
    'keras-torch': 'keras',
    'torch': 'torch',
    'cudnn': 'jax',
}
"""Implementation -> the module that must be there."""

TIME_MAJOR = ('jaxrnn', 'jaxrnn-reference', 'haiku', 'torch', 'equations')
"""Those that take letters as [T, B]; the others take [B, T]."""

Tree = Any


class Case(NamedTuple):
    """A network at a size."""

    network: str
    batch: int
    hidden: int
    unroll: int = 1  # time steps in one iteration of a peer's loop; jaxrnn chooses its own
    steps: int = STEPS  # T


def define_cases() -> None:
    """The flags that say which cases."""
    common.define('run', 'networks', ','.join(WIDTHS), 'Networks, as lstm,gru.')
    common.define('run', 'batches', '32,128,512', 'Words in a batch, as 32,128.')
    common.define('run', 'hidden', 0, 'Width; 0: stock.')


def chosen(flag: str, known: Any) -> list[str]:
    """The names in a flag. Raises UserError for one that isn't known."""
    names = [name for name in flags.FLAGS[flag].value.split(',') if name]
    for name in names:
        if name not in known:
            raise UserError(f'--{flag}: {name!r} found, some of {",".join(known)} expected')
    return names or list(known)


def cases() -> list[Case]:
    values = flags.FLAGS
    if not all(batch.isdigit() and int(batch) for batch in values.batches.split(',')):
        raise UserError(f'--batches: {values.batches!r} found, positive numbers as 32,128 expected')
    return [
        Case(network, int(batch), values.hidden or WIDTHS[network])
        for network in chosen('networks', WIDTHS)
        for batch in values.batches.split(',')
    ]


# The data and the weights, in one layout: kernels [D, G], gates i, f, g, o or z, r, n.


def examples(case: Case, time_major: bool) -> tuple[np.ndarray, np.ndarray]:
    """Letters [T, B] or [B, T] and targets [B, E]."""
    rng = np.random.default_rng(1)
    letters = rng.integers(0, LETTERS, (case.steps, case.batch), np.int32)
    targets = rng.normal(size=(case.batch, SIZE)).astype(np.float32)
    return np.ascontiguousarray(letters if time_major else letters.T), targets


def initial_weights(case: Case) -> dict[str, dict[str, np.ndarray]]:
    """Layer -> name -> array, with jaxrnn's names."""
    rng, width = np.random.default_rng(0), case.hidden

    def uniform(*shape: int, limit: float) -> np.ndarray:
        return rng.uniform(-limit, limit, shape).astype(np.float32)

    def dense(inputs: int, outputs: int) -> dict[str, np.ndarray]:
        limit = math.sqrt(6 / (inputs + outputs))
        return {'kernel': uniform(inputs, outputs, limit=limit), 'bias': uniform(outputs, limit=0.1)}

    def recurrent(inputs: int, gates: int) -> dict[str, np.ndarray]:
        kernel = uniform(width, gates * width, limit=1 / math.sqrt(width))
        return {**dense(inputs, gates * width), 'recurrent_kernel': kernel}

    if case.network != 'stacked':
        gates = 4 if case.network == 'lstm' else 3
        return {'recurrent': recurrent(LETTERS, gates), 'output': dense(width, SIZE)}
    return {
        'lower': recurrent(LETTERS, 4),
        'between': dense(width, width),
        'upper': recurrent(width, 4),
        'narrow': dense(width, width // 2),
        'output': dense(width // 2, SIZE),
    }


def reorder(array: np.ndarray, order: tuple[int, ...]) -> np.ndarray:
    """Puts the gates, blocks of the last axis, into another order."""
    blocks = np.split(array, len(order), axis=-1)
    return np.concatenate([blocks[k] for k in order], axis=-1)


# The equations, which every implementation's losses must agree with.


def equations(case: Case, recurrent_biases: str) -> tuple[Tree, Callable]:
    """Parameters and the function of a network, as the textbook has them."""
    import jax
    import jax.numpy as jnp

    params = initial_weights(case)
    for layer in params.values():
        if 'recurrent_kernel' in layer and recurrent_biases in ('all', 'candidate'):
            count = layer['bias'].shape[0] if recurrent_biases == 'all' else case.hidden
            layer['recurrent_bias'] = np.zeros(count, np.float32)

    before = recurrent_biases == 'before'
    recur = functools.partial(_gru, before=before) if case.network == 'gru' else _lstm

    def predict(params, letters):
        xs = jax.nn.one_hot(letters, LETTERS)
        if case.network != 'stacked':
            return _dense(params['output'], recur(params['recurrent'], xs)[-1])
        between = jax.nn.sigmoid(_dense(params['between'], recur(params['lower'], xs)))
        narrow = jnp.tanh(_dense(params['narrow'], recur(params['upper'], between)[-1]))
        return _dense(params['output'], narrow)

    return params, predict


def _lstm(layer: Tree, xs: Any) -> Any:
    """xs: [T, B, D]. Returns outputs [T, B, H]."""
    import jax
    import jax.numpy as jnp

    def body(carry, x):
        c, h = carry
        i, f, g, o = jnp.split(x + h @ layer['recurrent_kernel'], 4, -1)
        c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
        h = jax.nn.sigmoid(o) * jnp.tanh(c)
        return (c, h), h

    zeros = jnp.zeros((xs.shape[1], layer['recurrent_kernel'].shape[0]))
    inputs = xs @ layer['kernel'] + layer['bias'] + layer.get('recurrent_bias', 0)
    return jax.lax.scan(body, (zeros, zeros), inputs)[1]


def _gru(layer: Tree, xs: Any, *, before: bool) -> Any:
    """As `_lstm`; `before`: the reset gate precedes the product."""
    import jax
    import jax.numpy as jnp

    width = layer['recurrent_kernel'].shape[0]
    extra = layer.get('recurrent_bias', jnp.zeros(0))
    extra = jnp.pad(extra, (3 * width - extra.shape[0], 0))

    def body(h, x):
        x_z, x_r, x_n = jnp.split(x, 3, -1)
        u_z, u_r, u_n = jnp.split(h @ layer['recurrent_kernel'] + extra, 3, -1)
        z, r = jax.nn.sigmoid(x_z + u_z), jax.nn.sigmoid(x_r + u_r)
        if before:
            u_n, r = (r * h) @ layer['recurrent_kernel'][:, 2 * width :], 1.0
        h = z * h + (1 - z) * jnp.tanh(x_n + r * u_n)
        return h, h

    return jax.lax.scan(body, jnp.zeros((xs.shape[1], width)), xs @ layer['kernel'] + layer['bias'])[1]


def _dense(layer: Tree, x: Any) -> Any:
    return x @ layer['kernel'] + layer['bias']


# The implementations in JAX: each gives parameters, and a function of them and of the letters.


def jaxrnn(case: Case, recurrence: str = 'fast') -> tuple[Tree, Callable]:
    import jax
    from flax import nnx

    from jaxrnn.words import config, models

    options = config.Model(network=case.network, hidden=case.hidden, preset='keras3', recurrence=recurrence)
    build = functools.partial(models.build, options, letters=LETTERS, vector_size=SIZE, key=jax.random.key(0))
    graph, abstract = nnx.split(nnx.eval_shape(build))
    params = initial_weights(case)
    for name, layer in nnx.to_pure_dict(abstract).items():
        if 'recurrent_bias' in layer:
            params[name]['recurrent_bias'] = np.zeros(layer['recurrent_bias'].shape, np.float32)

    def predict(params, letters):
        return nnx.merge(graph, nnx.State(jax.tree.map(nnx.Param, params)))(letters)

    return params, predict


def nnx(case: Case) -> tuple[Tree, Callable]:
    import jax
    import jax.numpy as jnp
    from flax import nnx

    rngs, width = nnx.Rngs(0), case.hidden

    class Network(nnx.Module):
        def __init__(self):
            cell = nnx.GRUCell if case.network == 'gru' else nnx.OptimizedLSTMCell
            if case.network != 'stacked':
                self.recurrent = nnx.RNN(cell(LETTERS, width, rngs=rngs), rngs=rngs, unroll=case.unroll)
                self.output = nnx.Linear(width, SIZE, rngs=rngs)
                return
            self.lower = nnx.RNN(cell(LETTERS, width, rngs=rngs), rngs=rngs, unroll=case.unroll)
            self.between = nnx.Linear(width, width, rngs=rngs)
            self.upper = nnx.RNN(cell(width, width, rngs=rngs), rngs=rngs, unroll=case.unroll)
            self.narrow = nnx.Linear(width, width // 2, rngs=rngs)
            self.output = nnx.Linear(width // 2, SIZE, rngs=rngs)

        def __call__(self, letters):
            xs = jax.nn.one_hot(letters, LETTERS)
            if case.network != 'stacked':
                return self.output(self.recurrent(xs)[:, -1])
            between = jax.nn.sigmoid(self.between(self.lower(xs)))
            return self.output(jnp.tanh(self.narrow(self.upper(between)[:, -1])))

    network = Network()
    for name, layer in initial_weights(case).items():
        _fill_nnx(getattr(network, name), layer, gru=case.network == 'gru')
    graph, params, rest = nnx.split(network, nnx.Param, ...)

    def predict(params, letters):
        # Counts of the carries' keys, which may only move in the trace that they are made in.
        fresh = jax.tree.map(lambda leaf: leaf, rest)
        return nnx.merge(graph, params, fresh)(letters)

    return params, predict


def _fill_nnx(module: Any, layer: dict[str, np.ndarray], gru: bool) -> None:
    if 'recurrent_kernel' not in layer:
        module.kernel[...], module.bias[...] = layer['kernel'], layer['bias']
        return
    order = (1, 0, 2) if gru else (0, 1, 2, 3)  # the GRU's: r, z, n
    cell, with_bias = module.cell, module.cell.dense_i if gru else module.cell.dense_h
    cell.dense_i.kernel[...] = reorder(layer['kernel'], order)
    cell.dense_h.kernel[...] = reorder(layer['recurrent_kernel'], order)
    with_bias.bias[...] = reorder(layer['bias'], order)


def linen(case: Case) -> tuple[Tree, Callable]:
    import jax
    import jax.numpy as jnp
    from flax import linen as nn

    cell = nn.GRUCell if case.network == 'gru' else nn.OptimizedLSTMCell
    rnn = functools.partial(nn.RNN, unroll=case.unroll)

    class Network(nn.Module):
        @nn.compact
        def __call__(self, letters):
            xs, width = jax.nn.one_hot(letters, LETTERS), case.hidden
            if case.network != 'stacked':
                last = rnn(cell(width, name='recurrent'))(xs)[:, -1]
                return nn.Dense(SIZE, name='output')(last)
            between = jax.nn.sigmoid(nn.Dense(width, name='between')(rnn(cell(width, name='lower'))(xs)))
            last = rnn(cell(width, name='upper'))(between)[:, -1]
            return nn.Dense(SIZE, name='output')(jnp.tanh(nn.Dense(width // 2, name='narrow')(last)))

    network = Network()
    params = {name: _linen_layer(layer) for name, layer in initial_weights(case).items()}
    return params, lambda params, letters: network.apply({'params': params}, letters)


def _linen_layer(layer: dict[str, np.ndarray]) -> Tree:
    if 'recurrent_kernel' not in layer:
        return layer
    gru = layer['kernel'].shape[1] != 4 * layer['recurrent_kernel'].shape[0]
    gates = 'zrn' if gru else 'ifgo'
    kernels, recurrent, biases = (
        np.split(layer[name], len(gates), axis=-1) for name in ('kernel', 'recurrent_kernel', 'bias')
    )
    made = {f'i{gate}': {'kernel': kernel} for gate, kernel in zip(gates, kernels, strict=True)}
    made |= {f'h{gate}': {'kernel': kernel} for gate, kernel in zip(gates, recurrent, strict=True)}
    for gate, bias in zip(gates, biases, strict=True):
        made[f'{"i" if gru else "h"}{gate}']['bias'] = bias
    if gru:
        made['hn']['bias'] = np.zeros_like(biases[0])
    return made


def haiku(case: Case) -> tuple[Tree, Callable]:
    import haiku as hk
    import jax
    import jax.numpy as jnp

    def unroll(name, xs):
        core = (hk.GRU if case.network == 'gru' else hk.LSTM)(case.hidden, name=name)
        return hk.dynamic_unroll(core, xs, core.initial_state(case.batch), unroll=case.unroll)[0]

    def network(letters):
        xs = jax.nn.one_hot(letters, LETTERS)
        if case.network != 'stacked':
            return hk.Linear(SIZE, name='output')(unroll('recurrent', xs)[-1])
        between = jax.nn.sigmoid(hk.Linear(case.hidden, name='between')(unroll('lower', xs)))
        narrow = jnp.tanh(hk.Linear(case.hidden // 2, name='narrow')(unroll('upper', between)[-1]))
        return hk.Linear(SIZE, name='output')(narrow)

    apply = hk.without_apply_rng(hk.transform(network)).apply
    return dict(_haiku_layer(name, layer) for name, layer in initial_weights(case).items()), apply


def _haiku_layer(name: str, layer: dict[str, np.ndarray]) -> tuple[str, Tree]:
    if 'recurrent_kernel' not in layer:
        return name, {'w': layer['kernel'], 'b': layer['bias']}
    kernel, recurrent, bias = layer['kernel'], layer['recurrent_kernel'], layer['bias']
    width = recurrent.shape[0]
    if kernel.shape[1] == 3 * width:  # its z is our 1 - z
        sign = np.repeat(np.float32([-1, 1, 1]), width)
        return name, {'w_i': sign * kernel, 'w_h': sign * recurrent, 'b': sign * bias}
    bias = bias - np.repeat(np.float32([0, 1, 0, 0]), width)  # it adds 1 to the forget gate
    order = (0, 2, 1, 3)
    w = np.concatenate([reorder(kernel, order), reorder(recurrent, order)])
    return f'{name}/linear', {'w': w, 'b': reorder(bias, order)}


def equinox(case: Case) -> tuple[Tree, Callable]:
    import equinox as eqx
    import jax
    import jax.numpy as jnp

    cell = eqx.nn.GRUCell if case.network == 'gru' else eqx.nn.LSTMCell

    def unroll(cell, xs):
        def body(state, x):
            state = cell(x, state)
            return state, state if case.network == 'gru' else state[0]

        zeros = jnp.zeros(case.hidden)
        return jax.lax.scan(body, zeros if case.network == 'gru' else (zeros, zeros), xs, unroll=case.unroll)[
            1
        ]

    def one(layers, letters):
        xs = jax.nn.one_hot(letters, LETTERS)
        if case.network != 'stacked':
            return layers['output'](unroll(layers['recurrent'], xs)[-1])
        between = jax.nn.sigmoid(jax.vmap(layers['between'])(unroll(layers['lower'], xs)))
        return layers['output'](jnp.tanh(layers['narrow'](unroll(layers['upper'], between)[-1])))

    layers = {name: _equinox_layer(cell, layer) for name, layer in initial_weights(case).items()}
    params, static = eqx.partition(layers, eqx.is_array)
    return params, lambda params, letters: jax.vmap(functools.partial(one, eqx.combine(params, static)))(
        letters
    )


def _equinox_layer(cell: type, layer: dict[str, np.ndarray]) -> Any:
    import equinox as eqx
    import jax
    import jax.numpy as jnp

    inputs, outputs = layer['kernel'].shape
    if 'recurrent_kernel' not in layer:
        made = eqx.nn.Linear(inputs, outputs, key=jax.random.key(0))
        new = jnp.asarray(layer['kernel'].T), jnp.asarray(layer['bias'])
        return eqx.tree_at(lambda m: (m.weight, m.bias), made, new)
    width = layer['recurrent_kernel'].shape[0]
    made = cell(inputs, width, key=jax.random.key(0))
    order = (0, 1, 2, 3) if outputs == 4 * width else (1, 0, 2)  # the GRU's: r, z, n
    kernels = (reorder(layer[name], order).T for name in ('kernel', 'recurrent_kernel', 'bias'))
    made = eqx.tree_at(lambda m: (m.weight_ih, m.weight_hh, m.bias), made, tuple(map(jnp.asarray, kernels)))
    return made if outputs == 4 * width else eqx.tree_at(lambda m: m.bias_n, made, jnp.zeros(width))


def cudnn(case: Case) -> tuple[Tree, Callable]:
    import jax
    import jax.numpy as jnp
    from jax.experimental import rnn

    def flat(layer):
        if 'recurrent_kernel' not in layer:
            return layer
        bias = layer['bias']
        parts = layer['kernel'].T, layer['recurrent_kernel'].T, bias, np.zeros_like(bias)
        return np.concatenate([part.ravel() for part in parts])

    def lstm(weights, xs):
        zeros = jnp.zeros((1, case.batch, case.hidden))
        lengths = jnp.full(case.batch, case.steps, jnp.int32)
        sizes = {'input_size': xs.shape[-1], 'hidden_size': case.hidden, 'num_layers': 1}
        return rnn.lstm(xs, zeros, zeros, weights, lengths, **sizes, dropout=0.0, bidirectional=False)[0]

    def predict(params, letters):
        xs = jax.nn.one_hot(letters, LETTERS)
        if case.network != 'stacked':
            return _dense(params['output'], lstm(params['recurrent'], xs)[:, -1])
        between = jax.nn.sigmoid(_dense(params['between'], lstm(params['lower'], xs)))
        narrow = jnp.tanh(_dense(params['narrow'], lstm(params['upper'], between)[:, -1]))
        return _dense(params['output'], narrow)

    return {name: flat(layer) for name, layer in initial_weights(case).items()}, predict


IN_JAX = {
    'jaxrnn': jaxrnn,
    'jaxrnn-reference': functools.partial(jaxrnn, recurrence='reference'),
    'nnx': nnx,
    'linen': linen,
    'haiku': haiku,
    'equinox': equinox,
    'cudnn': cudnn,
}


# The train step around a network.


class Step(NamedTuple):
    """A train step that is ready to run, with its state inside."""

    advance: Callable[[], Any]  # one step; returns its loss, perhaps not yet computed
    wait: Callable[[Any], None]  # until that loss and the state are there
    compile_seconds: float
    temp_bytes: int | None


def jax_step(case: Case, params: Tree, predict: Callable, time_major: bool, keras: bool = False) -> Step:
    """Compiles loss, gradient and optax.adam around a network; `keras`: with Keras' form of Adam."""
    import jax
    import jax.numpy as jnp
    import optax

    from jaxrnn.optim import transforms

    optimiser = optax.adam(RATE)
    if keras:
        scaled = transforms.scale_by_adam(0.9, 0.999, 1e-7, epsilon_hat=True)
        optimiser = optax.chain(scaled, optax.scale_by_learning_rate(RATE))

    def step(state, letters, targets):
        params, opt_state = state

        def loss_of(params):
            return jnp.mean(jnp.square(predict(params, letters) - targets))

        loss, gradients = jax.value_and_grad(loss_of)(params)
        updates, opt_state = optimiser.update(gradients, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), loss

    params = jax.tree.map(jnp.array, params)
    return compiled_step(step, (params, optimiser.init(params)), examples(case, time_major))


def compiled_step(step: Callable, state: Tree, batch: tuple[np.ndarray, ...]) -> Step:
    """Compiles (state, *batch) -> (state, loss), the state donated."""
    import jax

    device = [jax.device_put(part) for part in batch]
    start = time.perf_counter()
    compiled = jax.jit(step, donate_argnums=0).lower(state, *device).compile()
    seconds = time.perf_counter() - start
    kept = [state]

    def advance():
        kept[0], loss = compiled(kept[0], *device)
        return loss

    analysis = compiled.memory_analysis()
    temp = None if analysis is None else int(analysis.temp_size_in_bytes)
    return Step(advance, lambda loss: jax.block_until_ready((kept, loss)), seconds, temp)
