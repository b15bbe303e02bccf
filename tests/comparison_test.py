"""What a comparison says of steps of which it is known what changed."""

import inspect

import faulty
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax

from jaxrnn import trace
from jaxrnn.rnn import cells
from jaxrnn.trace.measure import MeasuredStep
from jaxrnn.words import config, models

T, B, D, H, E = 6, 5, 4, 7, 3


def params_of(seed=0):
    rng = np.random.default_rng(seed)

    def draw(*shape):
        return jnp.asarray(0.4 * rng.normal(size=shape), jnp.float32)

    return {'w': draw(D, H), 'u': draw(H, H), 'b': draw(H), 'out': draw(H, E)}


def batch_of(seed=0):
    rng = np.random.default_rng(seed)
    return {
        'x': rng.normal(size=(B, T, D)).astype(np.float32),
        'y': rng.normal(size=(B, E)).astype(np.float32),
    }


def errors(params, batch, nudge=None):
    """[B]; `nudge` is added to the states, [T, B, H]."""
    nudge = jnp.zeros((T, B, H)) if nudge is None else nudge

    def body(h, at):
        x, shift = at
        with jax.named_scope('cell'):
            h = jax.nn.sigmoid(x @ params['w'] + h @ params['u'] + params['b'][None]) + shift
        return h, None

    h, _ = lax.scan(body, jnp.zeros((B, H)), (batch['x'].swapaxes(0, 1), nudge))
    return jnp.mean((h @ params['out'] - batch['y']) ** 2, axis=1)


def loss_of(params, batch, nudge=None):
    return jnp.mean(errors(params, batch, nudge))


def step(state, batch):
    loss, gradients = jax.value_and_grad(loss_of)(state['params'], batch)
    velocity = jax.tree.map(lambda v, g: 0.9 * v + g, state['velocity'], gradients)
    params = jax.tree.map(lambda p, v: p - 0.1 * v, state['params'], velocity)
    return {'params': params, 'velocity': velocity}, {'loss': loss}


def state_of(params):
    return {'params': params, 'velocity': jax.tree.map(jnp.zeros_like, params)}


def compare(before, now, **options):
    return trace.compare(step, before, now, **options)


@pytest.fixture(scope='module')
def later():
    """A step in order and the next one, whose output weights are thrice what they were."""
    state = state_of(params_of())
    params = state['params']
    changed = state_of({**params, 'out': 3 * params['out'], 'b': params['b'].at[2].add(9)})
    return compare((state, batch_of(0)), (changed, batch_of(1)))


def test_what_the_batch_brought_is_told_from_what_the_state_brought(later):
    params = params_of()
    changed = {**params, 'out': 3 * params['out'], 'b': params['b'].at[2].add(9)}
    expected = [loss_of(params, batch_of(0)), loss_of(params, batch_of(1)), loss_of(changed, batch_of(1))]
    np.testing.assert_allclose(later.scores['loss'], expected, rtol=1e-5)
    assert not later.by_batch


def test_gradients_are_those_that_jax_gives(later):
    params = params_of()
    changed = {**params, 'out': 3 * params['out'], 'b': params['b'].at[2].add(9)}
    pairs = [jax.grad(loss_of)(p, batch_of(1)) for p in (params, changed)]
    told = {layer.path: layer for layer in later.layers}
    assert set(told) == {f'state/params/{name}' for name in params}
    changes = {}
    for name in params:
        norms = [float(jnp.linalg.norm(g[name])) for g in pairs]
        layer = told[f'state/params/{name}']
        np.testing.assert_allclose(layer.gradient, norms, rtol=1e-4)
        np.testing.assert_allclose(layer.update, [0.1 * n for n in norms], rtol=1e-4)  # from zero velocity
        np.testing.assert_allclose(layer.parameter.now, jnp.linalg.norm(changed[name]), rtol=1e-5)
        changes[name] = norms[1] ** 2 - norms[0] ** 2
    whole = sum(abs(change) for change in changes.values())
    for name, change in changes.items():
        assert told[f'state/params/{name}'].share == pytest.approx(change / whole, rel=1e-3)
    shares = [abs(layer.share) for layer in later.layers]
    assert shares == sorted(shares, reverse=True)


def test_gradient_over_time_steps_is_that_of_the_states(later):
    """Against the gradient of what is added to each state."""
    params = params_of()
    changed = {**params, 'out': 3 * params['out'], 'b': params['b'].at[2].add(9)}
    norms = []
    for p in (params, changed):
        d = jax.grad(loss_of, argnums=2)(p, batch_of(1), jnp.zeros((T, B, H)))
        norms.append([float(jnp.linalg.norm(d[t])) for t in range(T)])
    told = {moment.time_step: moment for moment in later.time_steps}
    assert set(told) == set(range(T)) and {moment.layer for moment in later.time_steps} == {'cell'}
    # A time step hands back the cotangent of the state before it.
    for t in range(1, T):
        np.testing.assert_allclose(told[t].gradient, [n[t - 1] for n in norms], rtol=1e-4)


def test_examples_by_themselves(later):
    params = params_of()
    changed = {**params, 'out': 3 * params['out'], 'b': params['b'].at[2].add(9)}
    batch = batch_of(1)
    told = {example.place: example for example in later.examples}
    before, now = errors(params, batch), errors(changed, batch)
    whole = jax.grad(loss_of)(changed, batch)
    square = sum(float(jnp.sum(g**2)) for g in jax.tree.leaves(whole))
    rise = np.asarray(now - before)
    for place in range(B):
        np.testing.assert_allclose(told[place].loss, [before[place], now[place]], rtol=1e-4)
        assert told[place].share == pytest.approx(rise[place] / np.abs(rise).sum(), rel=1e-3)
        own = jax.grad(lambda p, i=place: errors(p, batch)[i])(changed)
        inner = sum(float(jnp.sum(a * b)) for a, b in zip(*map(jax.tree.leaves, (own, whole)), strict=True))
        assert told[place].gradient == pytest.approx(inner / B / square, rel=1e-3, abs=1e-5)
    assert later.additive
    assert sum(example.gradient for example in later.examples) == pytest.approx(1, rel=1e-3)


def test_a_gate_that_saturates(later):
    gate = later.gates[0]
    assert (gate.layer, gate.op) == ('cell', 'logistic')
    params = params_of()

    def saturated(params):
        h, share = np.zeros((B, H)), []
        for t in range(T):
            h = 1 / (1 + np.exp(-(batch_of(1)['x'][:, t] @ params['w'] + h @ params['u'] + params['b'])))
            share.append(np.mean((h < 0.1) | (h > 0.9)))
        return np.array(share)

    host = {name: np.asarray(leaf, np.float64) for name, leaf in params.items()}
    changed = {**host, 'b': host['b'] + 9 * np.eye(H)[2]}
    rise = saturated(changed) - saturated(host)
    np.testing.assert_allclose(gate.saturated, [saturated(host).mean(), saturated(changed).mean()], atol=1e-6)
    assert rise[gate.time_step] == rise.max()


def test_an_outlier_in_the_data_is_blamed_on_the_batch_and_the_example():
    state, batch = state_of(params_of()), batch_of(1)
    batch['y'][3] *= 30
    change = compare((state, batch_of(0)), (state, batch))
    assert change.by_batch and change.examples[0].place == 3 and change.examples[0].share > 0.9
    assert change.examples[0].gradient > 0.9
    assert change.absurd is None  # thirty times is much, not absurd
    assert change.outlying == trace.Outlying('batch/y', (3,))
    assert change.leaps


def test_an_absurd_argument_is_named():
    state, batch = state_of(params_of()), batch_of(1)
    batch['y'][3, 1] = 1e15
    change = compare((state, batch_of(0)), (state, batch))
    assert (change.absurd.pass_, change.absurd.op, change.absurd.source) == ('data', 'input', 'batch/y')
    bits = np.asarray(state['params']['u']).copy()
    bits.view(np.uint32)[2, 3] ^= 1 << 30  # the highest bit of the exponent
    flipped = state_of({**state['params'], 'u': jnp.asarray(bits)})
    change = compare((state, batch_of(1)), (flipped, batch_of(1)))
    assert change.absurd.source == 'state/params/u' and not change.by_batch


def test_an_absurd_operation_is_named_with_time_step_and_example():
    def loss_of(w, batch):
        def body(h, x):
            h = 0.5 * h + x @ w
            return h, jnp.mean(jnp.exp(h), axis=1)  # here

        _, parts = lax.scan(body, jnp.zeros((B, H)), batch['x'].swapaxes(0, 1))
        return jnp.mean(parts)

    def step(w, batch):
        loss, g = jax.value_and_grad(loss_of)(w, batch)
        return w - 1e-3 * g, {'loss': loss}

    w = params_of()['w']
    now = batch_of(1)
    now['x'][2, 4] = 15 * np.sign(w[:, 0])
    change = trace.compare(step, (w, batch_of(0)), (w, now))
    lines, start = inspect.getsourcelines(loss_of)
    line = start + next(n for n, text in enumerate(lines) if '# here' in text)
    absurd = change.absurd
    assert (absurd.op, absurd.pass_, absurd.time_step, absurd.examples) == ('exp', 'forward', 4, (2,))
    assert absurd.source == f'{__file__}:{line}' and 'jnp.exp(h)' in absurd.code


def test_what_grew_from_next_to_nothing_is_not_absurd():
    """An error of 1e-9 that becomes 1e-2 has grown ten million times. It is still small."""

    def step(w, target):
        loss, g = jax.value_and_grad(lambda w: jnp.sum(jnp.abs(w - target)))(w)
        return w - 1e-3 * jnp.abs(w - target) * g, {'loss': loss}

    near, far = (np.float32([1e-9, 1e-9]), np.float32([1e-2, 1e-9]))
    change = trace.compare(step, (jnp.zeros(2), near), (jnp.zeros(2), far))
    assert change.absurd is None and change.leaps[0].ratio > trace.ABSURD
    huge = trace.compare(step, (jnp.zeros(2), near), (jnp.zeros(2), 1e7 * far))
    assert huge.absurd is not None


def test_an_optimiser_that_squares_is_not_absurd():
    """Gradients a hundred thousand times as large; their squares, in the update, ten thousand million times."""

    def step(state, x):
        loss, g = jax.value_and_grad(lambda w: jnp.mean(x * jnp.sin(w)))(state['w'])
        v = 0.9 * state['v'] + 0.1 * g**2
        return {'w': state['w'] - 1e-3 * g / (jnp.sqrt(v) + 1e-8), 'v': v}, {'loss': loss}

    state, x = {'w': jnp.float32(1), 'v': jnp.float32(0)}, jnp.ones(4)
    change = trace.compare(step, (state, x), (state, 1e5 * x))
    assert change.leaps[0].pass_ == 'update' and change.leaps[0].ratio > trace.ABSURD
    assert change.absurd is None


ALIKE = ('plain', 'nnx', 'haiku', 'lstm', 'gru unrolled')
"""Of which another of the same kind is looked at in any case."""


@pytest.mark.parametrize(
    'network',
    [pytest.param(name, marks=pytest.mark.battery if name in ALIKE else ()) for name in faulty.SUBJECTS],
)
def test_neighbouring_steps_of_every_library(network):
    """Nothing is absurd, and every parameter has its gradient."""
    subject = faulty.SUBJECTS[network]()
    state, batch = subject.init(), subject.batch(1, 2)
    now = jax.jit(subject.step)(state, batch)[0], subject.batch(3, 4)
    change = trace.compare(subject.step, (state, batch), now)
    assert change.absurd is None
    assert change.layers and all(layer.gradient is not None for layer in change.layers)
    assert change.gates
    assert len(change.time_steps) >= (
        0 if 'unrolled' in network else faulty.T
    )  # where a loop carries cotangents
    assert len(change.examples) == faulty.B and change.additive


@pytest.mark.parametrize('network', ['lstm', 'gru'])
def test_our_gates_have_names(network):
    subject = faulty.SUBJECTS[network]()
    state, batch = subject.init(), subject.batch(1, 2)
    change = trace.compare(subject.step, (state, batch), (state, batch))
    names = {
        'lstm': {cells.INPUT, cells.FORGET, cells.CANDIDATE, cells.OUTPUT},
        'gru': {cells.UPDATE, cells.RESET, cells.CANDIDATE},
    }[network]
    assert {gate.layer.rpartition('/')[2] for gate in change.gates} >= names


def test_a_hard_sigmoid_counts_as_a_gate():
    """It ends in a clip, which is no squashing primitive."""
    options = config.Model(network='lstm', hidden=H, preset='keras1')
    network = models.build(options, letters=9, vector_size=E, key=jax.random.key(0))
    graph, params = nnx.split(network, nnx.Param)
    letters = np.random.default_rng(0).integers(0, 9, (T, B))

    def step(params, batch):
        loss, g = jax.value_and_grad(lambda p: jnp.mean(nnx.merge(graph, p)(batch) ** 2))(params)
        return jax.tree.map(lambda p, g: p - g, params, g), {'loss': loss}

    opened = jax.tree.map(lambda leaf: leaf, params)
    opened['recurrent']['bias'] = opened['recurrent']['bias'].replace(
        opened['recurrent']['bias'][...].at[H : 2 * H].set(9)
    )
    change = trace.compare(step, (params, letters), (opened, letters), example_axes=1)
    gate = change.gates[0]
    assert gate.layer == f'recurrent/{cells.FORGET}' and gate.saturated.now == 1 > gate.saturated.before


def test_gradients_that_are_summed_over_parts_of_a_batch():
    """Accumulated in a loop of the user's own, outside of what is differentiated."""

    def accumulated(state, batch):
        def body(total, part):
            loss, g = jax.value_and_grad(lambda w: jnp.mean((part @ w) ** 2))(state)
            return jax.tree.map(jnp.add, total, (loss, g)), None

        parts = batch.reshape(3, -1, *batch.shape[1:])
        (loss, g), _ = lax.scan(body, (jnp.float32(0), jnp.zeros_like(state)), parts)
        return state - 0.1 * g / 3, {'loss': loss / 3}

    x = np.random.default_rng(0).normal(size=(12, D)).astype(np.float32)
    w = jnp.ones((D, E))
    change = trace.compare(accumulated, (w, x), (w, 2 * x))
    (layer,) = change.layers
    expected = [
        3 * float(jnp.linalg.norm(jax.grad(lambda w, x=x: jnp.mean((x @ w) ** 2))(w))) for x in (x, 2 * x)
    ]
    np.testing.assert_allclose(layer.gradient, expected, rtol=1e-4)


def test_examples_that_depend_on_one_another():
    def step(w, batch):
        def loss_of(w):
            h = batch @ w
            return jnp.mean((h - h.mean(0, keepdims=True)) ** 2)

        loss, g = jax.value_and_grad(loss_of)(w)
        return w - g, {'loss': loss}

    x = np.random.default_rng(0).normal(size=(B, D)).astype(np.float32)
    assert not trace.compare(step, (jnp.ones((D, E)), x), (jnp.full((D, E), 2.0), x)).additive


def test_of_a_large_batch_the_outstanding_examples_are_measured():
    def step(w, batch):
        x, y = batch
        loss, g = jax.value_and_grad(lambda w: jnp.mean(jnp.mean((x @ w - y) ** 2, axis=1)))(w)
        return w - 0.1 * g, {'loss': loss}

    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(300, D)).astype(np.float32), rng.normal(size=(300, E)).astype(np.float32)
    bad = y.copy()
    bad[277] += 50
    change = trace.compare(step, (jnp.ones((D, E)), (x, y)), (jnp.ones((D, E)), (x, bad)))
    assert len(change.examples) == 64 and change.examples[0].place == 277


def test_without_loss_examples_or_a_gradient():
    def step(state, batch):
        return state * 0.9 + batch, {'size': jnp.sum(state)}

    change = trace.compare(step, (jnp.ones(3), np.float32(1)), (jnp.ones(3) * 2, np.float32(1)))
    assert change.scores['size'] == (3, 3, 6)
    assert (change.layers, change.gates, change.time_steps, change.examples) == ((), (), (), ())
    assert change.leaps[0].ratio == pytest.approx(2)


def test_other_shapes_are_refused():
    state = state_of(params_of())
    other = {name: leaf[:3] for name, leaf in batch_of(0).items()}
    with pytest.raises(ValueError, match='same shapes'):
        compare((state, batch_of(0)), (state, other))


def test_a_step_is_measured_without_being_changed():
    """State and batch stay as they are, and outputs are the step's."""
    state, batch = state_of(params_of()), batch_of(0)
    probe = MeasuredStep(jax.jit(step, donate_argnums=0), state, batch)
    measured = probe(state, batch)
    assert not state['params']['w'].is_deleted()
    assert measured.record['loss'] == pytest.approx(float(loss_of(state['params'], batch)), rel=1e-6)


@pytest.mark.parametrize('together', ['barrier', 'mean of devices'])
def test_parameters_of_the_same_shape_have_gradients_of_their_own(together):
    """Though one equation has all of them: each result of it comes from the operand at its place."""
    mesh = jax.make_mesh((1,), ('i',), axis_types=(jax.sharding.AxisType.Auto,))

    def tied(state, batch):
        def loss_of(state):
            return jnp.mean((batch @ state['a']) ** 2) + jnp.mean((batch @ state['b'] - 1) ** 2) * 7

        loss, gradients = jax.value_and_grad(loss_of)(state)
        if together == 'barrier':
            gradients = lax.optimization_barrier(gradients)
        else:
            everywhere = jax.sharding.PartitionSpec()
            gradients = jax.shard_map(
                lambda gradients: lax.pmean(gradients, 'i'),
                mesh=mesh,
                in_specs=everywhere,
                out_specs=everywhere,
            )(gradients)
        after = jax.tree.map(lambda p, g: p - 0.1 * g, state, gradients)
        return lax.optimization_barrier(after), {'loss': loss}

    rng = np.random.default_rng(0)
    state = {name: jnp.asarray(rng.normal(size=3), jnp.float32) for name in ('a', 'b')}
    batch = jnp.asarray(rng.normal(size=(8, 3)), jnp.float32)
    after, _ = tied(state, batch)
    found = {
        layer.path: layer.gradient for layer in trace.compare(tied, (state, batch), (state, batch)).layers
    }
    for name in ('a', 'b'):
        gradient = found[f'state/{name}']
        if together == 'mean of devices':  # which isn't looked into
            assert gradient is None
        else:
            expected = float(jnp.linalg.norm(state[name] - after[name])) / 0.1
            assert gradient.now == pytest.approx(expected, rel=1e-4)
