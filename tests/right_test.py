"""Runs that nobody here made, rebuilt small from public reports: each kind of wrong answer that was given once, right.

What a fault looks like in records alone is in course_test, what a step does to its examples in axes_test.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

import jaxrnn
from jaxrnn import Change, Changed, UserError

WEIGHTS = np.float32([0.5, -1.5, 2, 1])


def regression(bad=None, spoil=lambda x, y: (x, y), rate=0.02, record=lambda loss, x: {'loss': loss}):
    """Linear regression by momentum; one batch is spoilt."""

    def init():
        return {'w': jnp.zeros(4), 'v': jnp.zeros(4)}

    def batch_at(k):
        x = np.random.default_rng(k).normal(size=(10, 4)).astype(np.float32)
        return spoil(x, x @ WEIGHTS) if k == bad else (x, x @ WEIGHTS)

    def step(state, batch):
        x, y = batch
        loss, g = jax.value_and_grad(lambda w: jnp.mean((x @ w - y) ** 2) + 0.02 * jnp.mean(x**2))(state['w'])
        v = 0.6 * state['v'] + g
        return {'w': state['w'] - rate * v, 'v': v}, record(loss, x)

    return step, batch_at, init


def diagnosed(run, directory, steps, changes=(), **options):
    step, batch_at, init = run
    jaxrnn.record(step, batch_at, init, directory, max_steps=steps)
    return jaxrnn.diagnose(step, batch_at, directory, changes, like=init, **options)[0]


def outcomes(diagnosis):
    return {remedy['name']: remedy['outcome'] for remedy in diagnosis.remedies}


def as_change(name, points_to, step, batch_at):
    return Change(name, points_to, lambda: Changed(step, batch_at))


def all_targets(x, y):
    return x, 500 * y


def one_target(x, y):
    y[7] *= 2000
    return x, y


def test_a_change_that_can_not_be_made_is_an_outcome(tmp_path):
    """One mistyped, one that raises; and float64 through a carry that is written in float32."""

    def init():
        return {'w': jnp.full(3, 0.2)}

    def batch_at(k):
        x = np.random.default_rng(k).normal(size=(5, 6, 3)).astype(np.float32)
        if k == 33:
            x[1, 4, 0] = np.inf
        return x

    def step(state, x):
        def loss_of(w):
            def body(h, x_t):
                return (0.5 * h + jnp.sin(x_t @ w)).astype(jnp.float32), None

            return jnp.mean((jax.lax.scan(body, jnp.zeros(5, jnp.float32), x.swapaxes(0, 1))[0] - 1) ** 2)

        loss, g = jax.value_and_grad(loss_of)(state['w'])
        return {'w': state['w'] - 0.05 * g}, {'loss': loss}

    changes = [
        as_change('mistyped', 'model', lambda state, x: step({'w': state['W']}, x), batch_at),
        as_change('other batches than there are', 'model', step, lambda k: batch_at(k)['x']),
    ]
    found = diagnosed((step, batch_at, init), tmp_path, 60, changes)
    assert (found.first_bad_step, found.cause.kind) == (33, 'data')
    assert found.where['examples'] in ([1], [])
    said = outcomes(found)
    assert said['mistyped'] == "not possible: KeyError: 'W'"
    assert said['other batches than there are'].startswith('not possible: ')
    assert said['float64'] == 'unchanged' and said['without the batch of step 33'] == 'averted'


@pytest.mark.parametrize('bad', [3, 41, 260])
def test_a_bad_batch_is_found_wherever_it_lies(bad, tmp_path):
    found = diagnosed(regression(bad, all_targets), tmp_path, 380)
    assert (found.first_bad_step, found.cause.kind) == (bad, 'data')
    assert found.remedies[0]['name'] == f'without the batch of step {bad}'
    assert not any(remedy['flags'] for remedy in found.remedies)


def test_one_target_is_named_and_not_the_optimiser_beside_it(tmp_path):
    found = diagnosed(regression(145, one_target), tmp_path, 330)
    assert (found.first_bad_step, found.cause.kind) == (145, 'data')
    assert (found.where['pass'], found.where['examples']) == ('data', [7])
    assert 'spike at step 145' in str(found) and 'without the batch of step 145' in str(found)


def test_steps_too_long_from_the_first_on_are_no_batch_s_fault(tmp_path):
    found = diagnosed(regression(rate=0.75), tmp_path, 160)
    assert found.symptom is not None and found.onset_step <= 6 and found.cause.kind == 'optimiser'
    for remedy in found.remedies:
        assert remedy['outcome'] != 'averted' or remedy['loss_at_horizon'] < 20, remedy


def test_a_relu_that_dies(tmp_path):
    """After Adam took it below zero for every example; what moves on is momentum alone."""
    optimiser = optax.adam(0.2)

    def init():
        w = {'w': jnp.full(6, 0.2), 'b': jnp.float32(0.1)}
        return w, optimiser.init(w)

    def batch_at(k):
        x = np.abs(np.random.default_rng(k).normal(size=(20, 6))).astype(np.float32)
        return x, x.sum(1) - (900 if 60 <= k < 90 else 0)

    def step(state, batch):
        w, opt = state
        loss, g = jax.value_and_grad(
            lambda w: jnp.mean((jax.nn.relu(batch[0] @ w['w'] + w['b']) - batch[1]) ** 2)
        )(w)
        updates, opt = optimiser.update(g, opt, w)
        return (optax.apply_updates(w, updates), opt), {'metrics': {'loss': loss}}

    found = diagnosed((step, batch_at, init), tmp_path, 420, symptom='dead')
    assert found.symptom.kind == 'dead' and 60 <= found.onset_step < 110  # the targets are others from 60 on


def test_a_guard_that_did_its_work_is_healthy(tmp_path):
    optimiser = optax.apply_if_finite(optax.adamw(1e-2), 3)
    _, batch_at, _ = regression(150, lambda x, y: (x, y * np.nan))

    def init():
        return jnp.zeros(4), optimiser.init(jnp.zeros(4))

    def step(state, batch):
        w, opt = state
        loss, g = jax.value_and_grad(lambda w: jnp.mean((batch[0] @ w - batch[1]) ** 2))(w)
        updates, opt = optimiser.update(g, opt, w)
        return (optax.apply_updates(w, updates), opt), loss

    found = diagnosed((step, batch_at, init), tmp_path, 260)
    assert found.symptom is None and 'nonfinite at step 150 passed' in found.cause.why
    assert str(found).startswith('healthy: ')


def test_a_metric_that_is_not_a_number_is_a_note(tmp_path):
    def record(loss, x):
        return {'train_loss': loss, 'recall': jnp.sum(x > 2.5) / jnp.sum(x > 2.5)}

    found = diagnosed(regression(record=record), tmp_path, 200)
    assert found.symptom is None
    (note,) = [check for check in found.checks if check['name'] == 'other numbers are finite']
    assert 'recall' in note['why'] and note['ok'] is None


def test_code_that_bears_the_bad_batch_comes_before_leaving_it_out(tmp_path):
    def init():
        return jnp.full(3, 0.3)

    def batch_at(k):
        x = np.abs(np.random.default_rng(k).normal(size=(6, 3))).astype(np.float32) + 0.2
        if k == 77:
            x[4] = 0
        return x

    def with_floor(floor):
        def step(w, x):
            def loss_of(w):
                return jnp.mean((1 / jnp.maximum(jnp.sum(x, 1), floor) - x @ w) ** 2)

            loss, g = jax.value_and_grad(loss_of)(w)
            return w - 0.01 * g, {'loss': loss}

        return step

    mended = as_change('floor', 'model', with_floor(0.3), batch_at)
    found = diagnosed((with_floor(0.0), batch_at, init), tmp_path, 200, [mended])
    averting = [name for name, outcome in outcomes(found).items() if outcome == 'averted']
    assert averting[0] == 'floor' and averting[-1] == 'other batches'
    assert found.where['examples'] == [4] and found.cause.kind in ('model', 'data')


def test_what_can_not_be_told_apart_is_asked_for(tmp_path):
    def record(loss, x):
        return {'actor_loss': loss, 'critic_loss': 2 * loss}

    run = regression(190, all_targets, record=record)
    with pytest.raises(UserError, match='loss: actor_loss, critic_loss found'):
        diagnosed(run, tmp_path, 330)
    step, batch_at, init = run
    found, _ = jaxrnn.diagnose(step, batch_at, tmp_path, like=init, loss='critic_loss')
    assert (found.first_bad_step, found.cause.kind) == (190, 'data')
    for wrong in ({'loss': 'critic'}, {'when': 'critic_los > 3'}):
        with pytest.raises(UserError, match='critic_loss'):
            jaxrnn.diagnose(step, batch_at, tmp_path, like=init, **wrong)


def test_fields_and_buffers_of_anybody_s_own(tmp_path):
    """A step of its own in the metrics, one ahead; an average that starts as the weights themselves."""
    inner, batch_at, _ = regression(88, lambda x, y: (x, y * np.inf))

    def init():
        w = jnp.zeros(4)
        return {'now': {'w': w, 'v': jnp.zeros(4)}, 'average': w, 'n': jnp.int32(1)}

    def step(state, batch):
        now, record = inner(state['now'], batch)
        average = 0.9 * state['average'] + 0.1 * now['w']
        return {'now': now, 'average': average, 'n': state['n'] + 1}, {**record, 'step': state['n']}

    found = diagnosed((step, batch_at, init), tmp_path, 150)
    assert found.first_bad_step == 88 and found.replay.bit_identical and 'batch' in found.where['source']


def test_a_run_that_was_another_in_between_is_not_reproducible(tmp_path):
    step, batch_at, init = regression()
    with ocp.CheckpointManager(tmp_path) as manager:
        advance, state = jax.jit(step), init()
        for k in range(241):
            if k % 40 == 0:
                manager.save(k, args=ocp.args.StandardSave(state))
                manager.wait_until_finished()
            state, _ = advance(state, batch_at(k))
            if k == 130:
                state = {**state, 'v': 0 * state['v'] + 1}
    found, _ = jaxrnn.diagnose(step, batch_at, tmp_path, like=init)
    assert found.symptom is None and found.replay.first_mismatch in range(120, 161)
    assert 'not reproducible between checkpoints 120 and 160' in found.cause.why


def test_too_short_to_tell(tmp_path):
    found = diagnosed(regression(), tmp_path, 12)
    assert found.symptom is None and found.cause.why.startswith('too short to tell')
    assert str(found).startswith('too short to tell')


def test_nothing_learnt_is_no_health(tmp_path):
    found = diagnosed(regression(rate=1e-9), tmp_path, 300)
    assert found.symptom is None and str(found).startswith('no symptom, but not all is well')


def test_batches_that_are_others_from_a_step_on(tmp_path):
    """Targets of other rows from step 150 on: no single batch stands out, and shorter steps only put it off."""
    inner, ordinary, init = regression()

    def batch_at(k):
        x, y = ordinary(k)
        return x, (np.roll(y, 3) if k >= 150 else y)

    found = diagnosed((inner, batch_at, init), tmp_path, 330)
    assert found.symptom is not None and found.onset_step in range(148, 156)
    assert found.cause.kind == 'data' and outcomes(found)['other batches'] == 'averted'


def test_checks_that_need_no_words(tmp_path):
    """Of the bad step's batch, and of the state that it meets."""
    found = diagnosed(regression(66, lambda x, y: (x * 1e4, y * np.nan)), tmp_path, 120)
    checks = {check['name']: check for check in found.checks}
    assert (
        checks['the batch is finite']['ok'] is False
        and '10 of 10 in batch/1' in checks['the batch is finite']['why']
    )
    scaled = checks['inputs and weights are scaled']
    assert scaled['ok'] is None and 'batch/0' in scaled['why']
    assert (
        checks['loss and state are finite']['ok'] is False
        and 'the loss' in checks['loss and state are finite']['why']
    )
    assert 'input' in checks['what broke']['why']
    healthy = diagnosed(regression(), tmp_path / 'healthy', 120)
    checks = {check['name']: check['ok'] for check in healthy.checks}
    assert (
        checks['the batch is finite']
        and checks['inputs and weights are scaled']
        and checks['something was learnt']
    )


def adam_run(rate=lambda count: 1e-2, hit=None, at=-1, depth=2):
    """A small network under Adam; `hit` changes its state within one step, before it trains."""
    optimiser = optax.adam(rate)
    teacher = np.random.default_rng(1).normal(size=(6, 3)).astype(np.float32)

    def init():
        keys = jax.random.split(jax.random.key(0), 2)
        params = {
            'first': {'w': jax.random.normal(keys[0], (6, 16)) / 3, 'b': jnp.zeros(16)},
            'second': {'w': jax.random.normal(keys[1], (16, 3)) / 4, 'b': jnp.zeros(3)},
        }
        return {'params': params, 'opt': optimiser.init(params), 'count': jnp.int32(0)}

    def batch_at(k):
        x = np.random.default_rng(k).normal(size=(16, 6)).astype(np.float32)
        return x, np.tanh(x @ teacher)

    def loss_of(params, x, y):
        hidden = jax.nn.relu(x @ params['first']['w'] + params['first']['b'][None])
        return jnp.mean((hidden @ params['second']['w'] + params['second']['b'][None] - y) ** 2)

    def step(state, batch):
        if hit is not None:
            now = state['count'] == at
            state = jax.tree.map(lambda new, old: jnp.where(now, new, old), hit(state), state)
        loss, g = jax.value_and_grad(loss_of)(state['params'], *batch)
        updates, opt = optimiser.update(g, state['opt'])
        params = optax.apply_updates(state['params'], updates)
        return {'params': params, 'opt': opt, 'count': state['count'] + 1}, {'loss': loss}

    return step, batch_at, init


@pytest.mark.parametrize(
    ('leaf', 'value'), [(('second', 'w'), 300.0), (('first', 'b'), -1e3)], ids=['corrupt', 'dead']
)
def test_a_step_that_wrote_to_the_state_is_named_with_the_tensor(leaf, value, tmp_path):
    """Its batch is innocent, and so is the length of its steps."""

    def hit(state):
        params = jax.tree.map(lambda x: x, state['params'])
        params[leaf[0]][leaf[1]] = params[leaf[0]][leaf[1]] * 0 + value
        return {**state, 'params': params}

    found = diagnosed(adam_run(hit=hit, at=137), tmp_path, 400)
    assert found.cause.kind == 'program' and 'without step 137' in found.cause.why, found
    path = f'state/params/{leaf[0]}/{leaf[1]}'
    assert path in found.cause.why
    said = outcomes(found)
    assert said['without step 137'] == 'averted' and said['without the batch of step 137'] != 'averted'
    if found.where['pass'] == 'update':
        assert found.where['layer'] == path
    assert (
        found.remedies[0]['name'] != 'without step 137'
        or len([*filter('averted'.__eq__, said.values())]) == 1
    )


def test_a_part_that_died_is_named_by_its_tensors(tmp_path):
    """A layer whose units are off: its tensors get no gradient any more, and those behind it go on."""

    def hit(state):
        params = state['params']
        return {**state, 'params': {**params, 'first': {'w': params['first']['w'], 'b': jnp.full(16, -1e3)}}}

    found = diagnosed(adam_run(hit=hit, at=80), tmp_path, 700, symptom='dead')
    assert found.symptom.kind == 'dead' and found.where['layer'].startswith('state/params/first/'), found
    (check,) = [check for check in found.checks if check['name'] == 'all tensors move']
    assert 'state/params/first/b' in check['why'] and 'second/b' not in check['why']


def test_means_that_were_set_back_are_the_optimiser_s_fault(tmp_path):
    def hit(state):
        adam, *others = state['opt']
        return {**state, 'opt': (adam._replace(nu=jax.tree.map(jnp.zeros_like, adam.nu)), *others)}

    found = diagnosed(adam_run(hit=hit, at=60), tmp_path, 300)
    assert found.cause.kind == 'optimiser' and 'set back' in found.cause.why, found


SCHEDULES = {
    'a jump': (lambda n: jnp.where(n >= 150, 1.0, 1e-2), 'a learning rate of 0.01, as before'),
    'upwards': (lambda n: jnp.where(n >= 60, -1e-2, 1e-2), 'a learning rate of 0.01, as before'),
    'far too long': (lambda n: 3.0, 'the usual learning rate, 0.001'),
}


@pytest.mark.parametrize('name', SCHEDULES)
def test_a_rate_that_is_another_is_found_without_being_told(name, tmp_path):
    """By what the state shows of it, and proven at the rate that it had."""
    schedule, change = SCHEDULES[name]
    found = diagnosed(adam_run(rate=schedule), tmp_path, 400)
    assert found.cause.kind == 'optimiser', found
    assert outcomes(found)[change] == 'averted', found


def test_a_rate_far_above_the_usual_is_said_whatever_comes_of_it(tmp_path):
    found = diagnosed(adam_run(rate=lambda n: 0.2), tmp_path, 60)
    (check,) = [check for check in found.checks if check['name'] == 'the learning rate is usual']
    assert check['ok'] is None and check['value'] == pytest.approx(0.2, rel=1e-3)
    found = diagnosed(adam_run(), tmp_path / 'usual', 60)
    assert 'the learning rate is usual' not in {check['name'] for check in found.checks}


def test_a_rate_that_fell_to_nothing_too_soon(tmp_path):
    found = diagnosed(adam_run(rate=lambda n: jnp.maximum(0, 1e-2 * (1 - n / 60))), tmp_path, 300)
    assert (found.symptom.kind, found.cause.kind) == ('dead', 'optimiser'), found
    assert any(name.endswith('as before') and said == 'averted' for name, said in outcomes(found).items())


def test_a_state_that_holds_its_optimiser_is_changed_by_like(tmp_path):
    """As flax's TrainState does: a changed step alone would use the run's own."""

    @jax.tree_util.register_dataclass
    @dataclasses.dataclass
    class TrainState:
        w: jax.Array
        rate: float = dataclasses.field(metadata={'static': True})

    def step(state, x):
        loss, g = jax.value_and_grad(lambda w: jnp.mean((w - x) ** 2))(state.w)
        return dataclasses.replace(state, w=state.w - state.rate * g), {'loss': loss}

    def batch_at(k):
        return np.float32([0.1, 0.2, 0.3])

    def init(rate=4.0):
        return TrainState(jnp.ones(3), rate)

    changes = [
        Change('less', 'optimiser', lambda: Changed(step, batch_at, like=lambda: init(0.1))),
        Change('no effect', 'optimiser', lambda: Changed(step, batch_at)),
        Change(
            'another', 'optimiser', lambda: Changed(step, batch_at, like={'w': np.ones(3), 'v': np.ones(3)})
        ),
    ]
    found = diagnosed((step, batch_at, init), tmp_path, 60, changes)
    said = outcomes(found)
    assert said['less'] == 'averted' and said['no effect'] == 'unchanged' and found.cause.kind == 'optimiser'
    assert said['another'].startswith('not possible: like: 2 numbers and tensors found, 1 as in the run')
