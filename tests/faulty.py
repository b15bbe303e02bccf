"""Train steps with a fault in them: an operation that breaks at one time step of one example.

Five steps as users of plain JAX, nnx, linen, haiku and equinox write them, each around its library's own cell, and
jaxrnn's three networks. Each calls `strike` in five places; the fault of the moment strikes in one of them.
"""

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from jaxrnn import cells, config, models, train
from jaxrnn.types import Array, Batch

V, T, B, H, E = 26, 7, 5, 6, 4
ADAM = optax.adam(1e-2)


# What breaks. Each line with a mark breaks where `hit` is 1, and changes nothing where it is 0.


def log_of_a_negative(x, hit):
    hit = hit + 0 * x
    return x + jnp.log(1 - 2 * hit)  # here


def root_of_a_negative(x, hit):
    hit = hit + 0 * x
    return x + jnp.sqrt(1 - 2 * hit) - 1  # here


def power_of_a_negative(x, hit):
    hit = hit + 0 * x
    return x + (1 - 2 * hit) ** (hit + 0.5) - 1  # here


def overflowing_exponential(x, hit):
    hit = hit + 0 * x
    weight = jnp.exp(200 * hit)  # here
    return x + (weight - weight)


def overflowing_product(x, hit):
    hit = hit + 0 * x
    large = 1e30 * hit
    square = large * large  # here
    return x + 0 * square


def divided_by_zero(x, hit):
    hit = hit + 0 * x
    return x / (1 - hit)  # here


def zero_by_zero(x, hit):
    hit = hit + 0 * x
    rest = 1 - hit
    return x + (rest / rest - 1)  # here


def logarithm_of_zero(x, hit):
    hit = hit + 0 * x
    return x + 0 * jnp.log(1 - hit)  # here


def root_whose_gradient_is_infinite(x, hit):
    return x + 1e-3 * jnp.sqrt(0 * x + (1 - hit))  # here


def gradient_through_a_where(x, hit):
    distance = jnp.sqrt(0 * x + (1 - hit))  # here
    return x + jnp.where(hit > 0, 0.0, 1e-3 * distance)


@jax.custom_vjp
def _backwards(x, hit):
    return x


def _backwards_bwd(hit, d):
    return d / (1 - hit), None  # here


_backwards.defvjp(lambda x, hit: (x, hit), _backwards_bwd)


def backward_pass_by_hand(x, hit):
    return _backwards(x, hit)


class Kind(NamedTuple):
    """What a trace must say of it."""

    function: Callable
    ops: tuple[str, ...]
    kinds: tuple[str, ...]
    backward: bool = False
    marked: Callable | None = None  # where the mark is, if not in the function itself

    @property
    def line(self) -> int:
        lines, start = inspect.getsourcelines(self.marked or self.function)
        return start + next(n for n, line in enumerate(lines) if '# here' in line)


KINDS = {
    'log of a negative': Kind(log_of_a_negative, ('log',), ('invalid argument',)),
    'root of a negative': Kind(root_of_a_negative, ('sqrt',), ('invalid argument',)),
    'power of a negative': Kind(power_of_a_negative, ('pow',), ('invalid argument',)),
    'overflowing exponential': Kind(overflowing_exponential, ('exp',), ('overflow',)),
    'overflowing product': Kind(overflowing_product, ('mul',), ('overflow',)),
    'divided by zero': Kind(divided_by_zero, ('div',), ('division by zero',)),
    'zero by zero': Kind(zero_by_zero, ('div',), ('invalid argument',)),
    'logarithm of zero': Kind(logarithm_of_zero, ('log',), ('division by zero',)),
    'root whose gradient is infinite': Kind(
        root_whose_gradient_is_infinite, ('div', 'mul', 'rsqrt'), ('division by zero', 'infinities'), True
    ),
    'gradient through a where': Kind(
        gradient_through_a_where, ('div', 'mul', 'rsqrt'), ('gradient through where',), True
    ),
    'backward pass by hand': Kind(
        backward_pass_by_hand, ('div',), ('division by zero', 'invalid argument'), True, _backwards_bwd
    ),
}

PLACES = ('data', 'cell', 'cell backward', 'dense', 'loss', 'update')


class Fault(NamedTuple):
    network: str
    place: str
    kind: str
    time_step: int
    example: int


_now: list[tuple[str, Callable]] = []


@contextlib.contextmanager
def strike_with(place: str, function: Callable) -> Iterator[None]:
    """What strikes while a step is traced: a function of x and `hit`."""
    _now.append((place, function))
    try:
        yield
    finally:
        _now.pop()


def strike_at(place: str, kind: str) -> contextlib.AbstractContextManager[None]:
    return strike_with(place, KINDS[kind].function)


def strike(place: str, x: Array, hit: Array) -> Array:
    """Breaks x where `hit` is 1, if the fault is of this place."""
    for at, function in _now:
        if at == place:
            return function(x, hit)
    return x


class Subject(NamedTuple):
    """A train step, its state, the batch that a fault strikes, and the layers that a place may be called."""

    step: Callable
    init: Callable[[], Any]
    batch: Callable[[int, int], Any]  # time step, example
    layers: dict[str, tuple[str, ...]]


def batch_of(time_step: int, example: int, time_major: bool = False) -> dict[str, np.ndarray]:
    """Letters as one-hot rows [B, T, V], and where the fault strikes: of letters [B, T, 1], of examples [B, 1]."""
    rng = np.random.default_rng(0)
    letters = np.eye(V, dtype=np.float32)[rng.integers(0, V, (B, T))]
    hit = np.zeros((B, T, 1), np.float32)
    hit[example, time_step] = 1
    if time_major:
        letters, hit = letters.swapaxes(0, 1), hit.swapaxes(0, 1)
    targets = rng.normal(size=(B, E)).astype(np.float32)
    return {
        'letters': letters,
        'hit': hit,
        'targets': targets,
        'hit_example': hit.max(0 if time_major else 1),
    }


def learn(predict: Callable, params: Any, opt_state: Any, batch: Any) -> tuple[Any, Any, dict]:
    """Loss, gradient, update, as everybody writes them."""

    def loss_of(params):
        letters = strike('data', batch['letters'], batch['hit'])
        predictions = predict(params, jnp.concatenate([letters, batch['hit']], -1), batch)
        errors = jnp.mean((predictions - batch['targets']) ** 2, axis=-1, keepdims=True)
        return jnp.mean(strike('loss', errors, batch['hit_example']))

    loss, gradients = jax.value_and_grad(loss_of)(params)
    struck = jnp.max(batch['hit'])
    gradients = jax.tree.map(lambda g: strike('update', g, struck), gradients)
    updates, opt_state = ADAM.update(gradients, opt_state, params)
    return optax.apply_updates(params, updates), opt_state, {'loss': loss}


def random_params(shapes: Any) -> Any:
    leaves, structure = jax.tree.flatten(shapes, is_leaf=lambda leaf: isinstance(leaf, tuple))
    rng = np.random.default_rng(1)
    return jax.tree.unflatten(structure, [jnp.asarray(0.3 * rng.normal(size=s), jnp.float32) for s in leaves])


def plain() -> Subject:
    def predict(params, xs, batch):
        def cell(carry, x):
            c, h = carry
            x, hit = x[:, :-1], x[:, -1:]
            i, f, g, o = jnp.split(
                x @ params['lstm']['w'] + h @ params['lstm']['u'] + params['lstm']['b'][None], 4, -1
            )
            c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
            h = strike('cell', jax.nn.sigmoid(o) * jnp.tanh(c), hit)
            return (c, h), None

        zeros = jnp.zeros((B, H))
        (_, h), _ = jax.lax.scan(cell, (zeros, zeros), xs.swapaxes(0, 1))
        return strike('dense', h @ params['output']['w'] + params['output']['b'][None], batch['hit_example'])

    def init():
        lstm = {'w': (V, 4 * H), 'u': (H, 4 * H), 'b': (4 * H,)}
        params = random_params({'lstm': lstm, 'output': {'w': (H, E), 'b': (E,)}})
        return {'params': params, 'opt_state': ADAM.init(params)}

    def step(state, batch):
        params, opt_state, record = learn(predict, state['params'], state['opt_state'], batch)
        return {'params': params, 'opt_state': opt_state}, record

    return Subject(step, init, batch_of, {'cell': ('lstm',), 'dense': ('output',)})


def nnx_step() -> Subject:
    class Cell(nnx.OptimizedLSTMCell):
        def __call__(self, carry, inputs):
            (c, h), _ = super().__call__(carry, inputs[..., :-1])
            h = strike('cell', h, inputs[..., -1:])
            return (c, h), h

    class Network(nnx.Module):
        def __init__(self, rngs):
            self.lstm = nnx.RNN(Cell(V, H, rngs=rngs))
            self.output = nnx.Linear(H, E, rngs=rngs)

        def __call__(self, xs, batch):
            return strike('dense', self.output(self.lstm(xs)[:, -1]), batch['hit_example'])

    graph, params, rest = nnx.split(Network(nnx.Rngs(0)), nnx.Param, ...)

    def predict(params, xs, batch):
        return nnx.merge(graph, params, jax.tree.map(lambda leaf: leaf, rest))(xs, batch)

    def step(state, batch):
        params, opt_state, record = learn(predict, *state, batch)
        return (params, opt_state), record

    return Subject(
        step, lambda: (params, ADAM.init(params)), batch_of, {'cell': ('lstm',), 'dense': ('output',)}
    )


def linen() -> Subject:
    from flax import linen as nn
    from flax.training.train_state import TrainState

    class Cell(nn.OptimizedLSTMCell):
        @nn.compact
        def __call__(self, carry, inputs):
            (c, h), _ = super().__call__(carry, inputs[..., :-1])
            h = strike('cell', h, inputs[..., -1:])
            return (c, h), h

    class Network(nn.Module):
        @nn.compact
        def __call__(self, xs, batch):
            h = nn.RNN(Cell(H), name='lstm')(xs)[:, -1]
            return strike('dense', nn.Dense(E, name='output')(h), batch['hit_example'])

    network = Network()

    def init():
        batch = batch_of(0, 0)
        xs = jnp.concatenate([batch['letters'], batch['hit']], -1)
        params = network.init(jax.random.key(0), xs, batch)['params']
        return TrainState.create(apply_fn=network.apply, params=params, tx=ADAM)

    def step(state, batch):
        def predict(params, xs, batch):
            return state.apply_fn({'params': params}, xs, batch)

        params, opt_state, record = learn(predict, state.params, state.opt_state, batch)
        return state.replace(step=state.step + 1, params=params, opt_state=opt_state), record

    return Subject(step, init, batch_of, {'cell': ('lstm', 'Cell'), 'dense': ('output', 'Network')})


def haiku() -> Subject:
    import haiku as hk

    class Cell(hk.LSTM):
        def __call__(self, inputs, prev_state):
            h, state = super().__call__(inputs[..., :-1], prev_state)
            h = strike('cell', h, inputs[..., -1:])
            return h, state._replace(hidden=h)

    def network(xs, batch):
        cell = Cell(H, name='lstm')
        outputs, _ = hk.dynamic_unroll(cell, xs, cell.initial_state(B))
        return strike('dense', hk.Linear(E, name='output')(outputs[-1]), batch['hit_example'])

    made = hk.without_apply_rng(hk.transform(network))

    def init():
        batch = batch_of(0, 0, time_major=True)
        params = made.init(jax.random.key(0), jnp.concatenate([batch['letters'], batch['hit']], -1), batch)
        return params, ADAM.init(params)

    def step(state, batch):
        params, opt_state, record = learn(made.apply, *state, batch)
        return (params, opt_state), record

    batch = functools.partial(batch_of, time_major=True)
    return Subject(step, init, batch, {'cell': ('lstm',), 'dense': ('output',)})


def equinox() -> Subject:
    import equinox as eqx

    class Network(eqx.Module):
        cell: eqx.nn.GRUCell
        output: eqx.nn.Linear

        def __call__(self, xs):
            """Of one example: [T, V + 1] -> [E]."""

            def body(h, x):
                return strike('cell', self.cell(x[:-1], h), x[-1]), None

            h, _ = jax.lax.scan(body, jnp.zeros(H), xs)
            return self.output(h)

    def predict(network, xs, batch):
        return strike('dense', jax.vmap(network)(xs), batch['hit_example'])

    def init():
        keys = jax.random.split(jax.random.key(0))
        network = Network(eqx.nn.GRUCell(V, H, key=keys[0]), eqx.nn.Linear(H, E, key=keys[1]))
        return network, ADAM.init(network)

    def step(state, batch):
        network, opt_state, record = learn(predict, *state, batch)
        return (network, opt_state), record

    return Subject(step, init, batch_of, {'cell': ('cell',), 'dense': ('output',)})


# jaxrnn's own networks. Where the fault strikes is told by a letter of its own, whose row of the kernel is 50 in the
# first gate: the gate's value is then exactly 1.

MARKED, DRIVEN = V, 50.0


def own(network: str) -> Subject:
    """The network with struck cells, layers and loss."""
    options = config.Model(network=network, hidden=H, preset='keras3')
    first = 'lower' if network == 'stacked' else 'recurrent'

    def build():
        return models.build(options, letters=V + 1, vector_size=E, key=jax.random.key(0))

    def init():
        params = nnx.to_pure_dict(nnx.state(build(), nnx.Param))
        params[first]['kernel'] = params[first]['kernel'].at[MARKED, :H].set(DRIVEN)
        return train.TrainState(jnp.int32(0), params, ADAM.init(params))

    def predict(params, letters):
        graph = nnx.graphdef(nnx.eval_shape(build))
        predictions = nnx.merge(graph, nnx.State(jax.tree.map(nnx.Param, params)))(letters)
        return strike('dense', predictions, _examples_hit(letters))

    def update(gradients, opt_state, params, **extra):
        gradients = jax.tree.map(lambda g: strike('update', g, jnp.ones(())), gradients)
        return ADAM.update(gradients, opt_state, params)

    inner = train.make_step(
        predict, optax.GradientTransformationExtraArgs(ADAM.init, update), lambda state: jnp.float32(0)
    )

    def step(state, batch):
        hit = _examples_hit(batch.letters)
        with struck(hit):
            return inner(state, batch._replace(targets=strike('data', batch.targets, hit)))

    def batch(time_step, example):
        rng = np.random.default_rng(0)
        letters = rng.integers(0, V, (T, B)).astype(np.int32)
        letters[time_step, example] = MARKED
        return Batch(letters, rng.normal(size=(B, E)).astype(np.float32), np.arange(B, dtype=np.int32))

    return Subject(step, init, batch, {'cell': (first,), 'dense': ('output',)})


def _examples_hit(letters: Array) -> Array:
    """[T, B] -> [B, 1]."""
    return jnp.any(letters == MARKED, axis=0)[:, None].astype(jnp.float32)


@contextlib.contextmanager
def struck(hit: Array) -> Iterator[None]:
    """jaxrnn's cells and loss with the fault in them."""

    def struck_cell(make: Callable) -> Callable:
        def made(gate):
            cell = make(gate)

            def forward(products, x_t, tm1):
                t, saved = cell.forward(products, x_t, tm1)
                return t._replace(h=strike('cell', t.h, jnp.float32(x_t[0] > DRIVEN / 2))), saved

            def backward(transposed, saved, tm1, d_t):
                struck_d = strike('cell backward', d_t.h, jnp.float32(saved[0] == 1))
                return cell.backward(transposed, saved, tm1, d_t._replace(h=struck_d))

            return cell._replace(forward=forward, backward=backward)

        return made

    def mean_squared_error(predictions, targets):
        return jnp.mean(strike('loss', jnp.mean(jnp.square(predictions - targets), -1, keepdims=True), hit))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cells, 'lstm', struck_cell(cells.lstm))
        patch.setattr(cells, 'gru_reset_after', struck_cell(cells.gru_reset_after))
        patch.setattr(train, 'mean_squared_error', mean_squared_error)
        yield


SUBJECTS: dict[str, Callable[[], Subject]] = {
    'plain': plain,
    'nnx': nnx_step,
    'linen': linen,
    'haiku': haiku,
    'equinox': equinox,
    'lstm': lambda: own('lstm'),
    'gru': lambda: own('gru'),
    'stacked': lambda: own('stacked'),
}


def applies(network: str, place: str, kind: str) -> bool:
    """Whether such a fault can be planted there, and can show."""
    ours, backward = network in ('lstm', 'gru', 'stacked'), KINDS[kind].backward
    if place == 'cell backward':  # a pass written by hand, where forward operations stand
        return ours and not backward
    if place in ('data', 'update'):  # nothing is differentiated there
        return not backward
    if place == 'cell' and ours:  # whose backward pass doesn't differentiate it
        return not backward
    return True


def expected_pass(fault: Fault) -> str:
    if fault.place in ('data', 'update'):
        return fault.place
    return 'backward' if KINDS[fault.kind].backward or fault.place == 'cell backward' else 'forward'


def missed(fault: Fault) -> dict[str, tuple[Any, Any]]:
    """What a trace says otherwise than it should: name -> (said, expected)."""
    from jaxrnn import trace

    subject, kind = SUBJECTS[fault.network](), KINDS[fault.kind]
    with strike_at(fault.place, fault.kind):
        told = trace.first_bad(
            subject.step, subject.init(), subject.batch(fault.time_step, fault.example)
        ).finding
    if told is None:
        return {'finding': (None, fault)}
    expected: dict[str, Any] = {
        'source': f'{__file__}:{kind.line}',
        'pass_': expected_pass(fault),
        'examples': () if fault.place == 'update' else (fault.example,),
        'time_step': fault.time_step if _in_time(fault) else None,
    }
    found = {name: getattr(told, name) for name in expected}
    wrong = {name: (found[name], expected[name]) for name in expected if found[name] != expected[name]}
    if told.op not in kind.ops:
        wrong['op'] = told.op, kind.ops
    if told.kind not in kind.kinds:
        wrong['kind'] = told.kind, kind.kinds
    layers = subject.layers.get(fault.place.split()[0], ('',))
    if not any(layer in told.layer for layer in layers):
        wrong['layer'] = told.layer, layers
    return wrong


def _in_time(fault: Fault) -> bool:
    ours = fault.network in ('lstm', 'gru', 'stacked')
    return fault.place in ('cell', 'cell backward') or (fault.place == 'data' and not ours)
