"""Train steps with a fault in them: an operation that breaks at one time step of one example, or of two.

Five steps as users of plain JAX, nnx, linen, haiku and equinox write them, each around its library's own cell, and
jaxrnn's three networks; three of them also with the loop over time unrolled. Each calls `strike` in several places;
the fault of the moment, one of `breaks.KINDS`, strikes in one of them.
"""

import contextlib
import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from breaks import KINDS, PLACES, Places, batch_leaf
from flax import nnx

from jaxrnn.rnn import cells, scan
from jaxrnn.types import Array
from jaxrnn.words import config, models, train
from jaxrnn.words.data import Batch

V, T, B, H, E = 26, 7, 5, 6, 4
ADAM = optax.adam(1e-2)


class Fault(NamedTuple):
    network: str
    place: str
    kind: str
    time_step: int
    examples: tuple[int, ...]


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
    batch: Callable[..., Any]  # of a time step, *examples
    layers: dict[str, tuple[str, ...]]


def struck_gradients(gradients: Any, hit: Array) -> Any:
    """Each of them, those of the dense layer, or their tree."""

    def of_a_layer(path: Any, g: Array) -> Array:
        return strike('update of a layer', g, hit) if 'output' in jax.tree_util.keystr(path) else g

    gradients = jax.tree.map(lambda g: strike('update', g, hit), gradients)
    return strike('update of all', jax.tree_util.tree_map_with_path(of_a_layer, gradients), hit)


def batch_of(time_step: int, *examples: int, time_major: bool = False) -> dict[str, np.ndarray]:
    """Letters as one-hot rows [B, T, V], and where the fault strikes: of letters [B, T, 1], of examples [B, 1]."""
    rng = np.random.default_rng(0)
    letters = np.eye(V, dtype=np.float32)[rng.integers(0, V, (B, T))]
    hit = np.zeros((B, T, 1), np.float32)
    hit[examples, time_step] = 1
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
    # As much as a schedule or a correction of bias, it depends on the number of the step.
    counts = optax.tree.get_all_with_path(opt_state, 'count')
    struck = jnp.max(batch['hit']) + 0 * (counts[0][1] if counts else 0)
    gradients = struck_gradients(gradients, struck)
    updates, opt_state = ADAM.update(gradients, opt_state, params)
    return optax.apply_updates(params, updates), opt_state, {'loss': loss}


def random_params(shapes: Any) -> Any:
    leaves, structure = jax.tree.flatten(shapes, is_leaf=lambda leaf: isinstance(leaf, tuple))
    rng = np.random.default_rng(1)
    return jax.tree.unflatten(structure, [jnp.asarray(0.3 * rng.normal(size=s), jnp.float32) for s in leaves])


def plain(unrolled: bool = False) -> Subject:
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

        carry = jnp.zeros((B, H)), jnp.zeros((B, H))
        if unrolled:
            for t in range(xs.shape[1]):
                carry, _ = cell(carry, xs[:, t])
        else:
            carry, _ = jax.lax.scan(cell, carry, xs.swapaxes(0, 1))
        _, h = carry
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


def own(network: str, platform: str = 'cpu') -> Subject:
    """The network with struck cells, layers and loss, laid out as for a platform: for 'gpu', without a loop."""
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
        count = optax.tree.get(opt_state, 'count', 0)  # some optimisers have none
        return ADAM.update(struck_gradients(gradients, 1.0 + 0 * count), opt_state, params)

    inner = train.make_step(
        predict, optax.GradientTransformationExtraArgs(ADAM.init, update), lambda state: jnp.float32(0)
    )

    def step(state, batch):
        hit = _examples_hit(batch.letters)
        with struck(hit), scan.compiled_for(platform):
            return inner(state, batch._replace(targets=strike('data', batch.targets, hit)))

    def batch(time_step, *examples):
        rng = np.random.default_rng(0)
        letters = rng.integers(0, V, (T, B)).astype(np.int32)
        letters[time_step, examples] = MARKED
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
    'plain unrolled': lambda: plain(unrolled=True),
    'nnx': nnx_step,
    'linen': linen,
    'haiku': haiku,
    'equinox': equinox,
    'lstm': lambda: own('lstm'),
    'gru': lambda: own('gru'),
    'stacked': lambda: own('stacked'),
    'lstm unrolled': lambda: own('lstm', 'gpu'),
    'gru unrolled': lambda: own('gru', 'gpu'),
}

OURS = ('lstm', 'gru', 'stacked', 'lstm unrolled', 'gru unrolled')


def applies(network: str, place: str, kind: str) -> bool:
    """Whether such a fault can be planted there, and can show."""
    ours, backward = network in OURS, KINDS[kind].backward
    if place not in KINDS[kind].places:
        return False
    if place == 'cell backward':  # a pass written by hand, where forward operations stand
        return ours and not backward
    if place in ('data', 'update'):  # nothing is differentiated there
        return not backward
    if place == 'cell' and ours:  # whose backward pass doesn't differentiate it
        return not backward
    return not (ours and kind == 'NaN in inputs')  # which are numbers of letters


FAULTS = tuple(
    (network, place, kind)
    for network in SUBJECTS
    for place in PLACES
    for kind in KINDS
    if applies(network, place, kind)
)
"""All of them: (network, place, kind)."""


def sample() -> list[tuple[str, str, str]]:
    """A few of them, in which each kind, each network and each place has its turn."""
    chosen: list[tuple[str, str, str]] = []
    for number, kind in enumerate(KINDS):
        fits = [fault for fault in FAULTS if fault[2] == kind]
        times = {name: sum(name in fault for fault in chosen) for fault in fits for name in fault[:2]}
        fewest = min(times[network] + times[place] for network, place, _ in fits)
        fits = [fault for fault in fits if times[fault[0]] + times[fault[1]] == fewest]
        chosen.append(fits[number % len(fits)])
    return chosen


def spread(faults: Iterable[tuple[str, str, str]], seed: int = 0) -> list[Fault]:
    """At random time steps and examples, one or two; each has its turn."""
    rng = np.random.default_rng(seed)
    singles = [(example,) for example in range(B)]
    times = _turns(rng, range(T))
    examples = _turns(rng, [*singles, *singles, *itertools.combinations(range(B), 2)])
    return [Fault(*fault, next(times), next(examples)) for fault in faults]


def _turns(rng: np.random.Generator, items: Sequence[Any]) -> Iterator[Any]:
    """All items in a random order, again and again."""
    while True:
        for n in rng.permutation(len(items)):
            yield items[n]


def planted(fault: Fault) -> tuple[Callable, Any, Any, str]:
    """The step, its state and its batch, to be traced within `strike_at`; and what a trace must name: a line of code,
    or the path of what was given."""
    subject, kind = subject_of(fault.network), KINDS[fault.kind]
    state, batch = init_of(fault.network), subject.batch(fault.time_step, *fault.examples)

    def step(state, batch):  # a new function each time, since JAX remembers what it has traced
        return subject.step(state, batch)

    if fault.place != 'input':
        return step, state, batch, kind.source
    time_major = batch_leaf(batch, 'letters').shape[0] == T
    letters = V + (fault.network in OURS)
    where = Places(fault.time_step, fault.examples, time_major, subject.layers['cell'], letters)
    return step, *kind.function(state, batch, where)


subject_of = functools.cache(lambda network: SUBJECTS[network]())
init_of = functools.cache(lambda network: subject_of(network).init())


def expected_pass(fault: Fault) -> str:
    if fault.place in ('data', 'input'):
        return 'data'
    if fault.place.startswith('update'):
        return 'update'
    return 'backward' if KINDS[fault.kind].backward or fault.place == 'cell backward' else 'forward'


def missed(fault: Fault) -> dict[str, tuple[Any, Any]]:
    """What a trace says otherwise than it should: name -> (said, expected)."""
    from jaxrnn import trace

    kind = KINDS[fault.kind]
    step, state, batch, source = planted(fault)
    with strike_at(fault.place, fault.kind):
        told = trace.first_bad(step, state, batch).finding
    if told is None:
        return {'finding': (None, fault)}
    expected: dict[str, Any] = {
        'source': source,
        'pass_': expected_pass(fault),
        'examples': fault.examples if _in_examples(fault) else (),
        'time_step': fault.time_step if _in_time(fault) else None,
    }
    found = {name: getattr(told, name) for name in expected}
    wrong = {name: (found[name], expected[name]) for name in expected if found[name] != expected[name]}
    if told.op not in kind.ops:
        wrong['op'] = told.op, kind.ops
    if told.kind not in kind.kinds:
        wrong['kind'] = told.kind, kind.kinds
    layers = _layers(fault)
    if not any(layer in told.layer for layer in layers):
        wrong['layer'] = told.layer, layers
    return wrong


def _layers(fault: Fault) -> tuple[str, ...]:
    """What the layer may be called; anything where no single one is struck."""
    layers = subject_of(fault.network).layers
    if fault.kind == 'NaN in the row of a letter':
        return layers['cell']
    return layers.get('dense' if fault.place == 'update of a layer' else fault.place.split()[0], ('',))


def _in_examples(fault: Fault) -> bool:
    return not fault.place.startswith('update') and fault.kind != 'NaN in the row of a letter'


def _in_time(fault: Fault) -> bool:
    if fault.place == 'data':
        return fault.network not in OURS  # whose targets are struck
    return fault.place in ('cell', 'cell backward') or fault.kind == 'NaN in inputs'
