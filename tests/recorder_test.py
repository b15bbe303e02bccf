"""A loop that somebody has, recorded: the same bits with and without, and all that the debugger needs."""

import collections
import contextlib
import functools
import gc
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

import jaxrnn
from jaxrnn.record import checkpoint, kept_batches, layout, outline, recorder
from jaxrnn.record.record_file import RecordFile
from jaxrnn.types import UserError

OPTIMISER = optax.adam(1e-2)
WEIGHTS = np.random.default_rng(7).normal(size=(8, 4)).astype(np.float32)


def start():
    params = {
        'w': jax.random.normal(jax.random.key(0), (8, 32)) * 0.1,
        'v': jax.random.normal(jax.random.key(1), (32, 4)) * 0.1,
    }
    return params, OPTIMISER.init(params)


def loss_of(params, batch):
    return jnp.mean((jnp.tanh(batch['x'] @ params['w']) @ params['v'] - batch['y']) ** 2)


def step(state, batch):
    params, moments = state
    loss, gradients = jax.value_and_grad(loss_of)(params, batch)
    updates, moments = OPTIMISER.update(gradients, moments, params)
    return (optax.apply_updates(params, updates), moments), {'loss': loss}


train_step = jax.jit(step)
donating = jax.jit(step, donate_argnums=0)


def loader(count, bad=None, seed=None):
    """Batches that nobody can make again, but with a seed."""
    rng = np.random.default_rng(seed)
    for number in range(count):
        x = rng.normal(size=(16, 8)).astype(np.float32)
        y = x @ WEIGHTS
        if number == bad:
            x[3, 2] = np.inf
        yield {'x': x, 'y': y}


def trained(directory, batches, by=train_step, state=None, **options):
    """The loop that somebody has, with two lines more; the last state."""
    state = start() if state is None else state
    with jaxrnn.Recorder(directory, state, **{'checkpoint_every': 10, **options}) as recorder:
        for batch in batches:
            state, metrics = by(state, batch)
            recorder(state, metrics, batch)
    return state


def rows(directory):
    return list(RecordFile(layout.Paths(Path(directory)).records).read())


def equal(a, b):
    return all(np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


@pytest.mark.parametrize('by', [train_step, donating])
def test_training_is_not_changed(by, tmp_path):
    batches = list(loader(25))
    state = start()
    for batch in batches:
        state, metrics = by(state, batch)
    assert equal(trained(tmp_path, batches, by), state)
    assert [row['step'] for row in rows(tmp_path)] == list(range(25))
    assert rows(tmp_path)[-1]['loss'] == float(str(metrics['loss']))
    saved = checkpoint.Checkpoints(tmp_path / 'checkpoints', like=start())
    assert saved.steps() == [0, 10, 20, 25] and equal(saved.restore(25), state)


@pytest.mark.parametrize('by', [train_step, donating])
def test_a_bad_batch_of_an_unseeded_loader_is_found(by, tmp_path):
    bad = random.randrange(60)
    trained(tmp_path, loader(60, bad), by)
    diagnosis, found = jaxrnn.bisect(by, None, tmp_path, like=start())
    assert (diagnosis.symptom.kind, diagnosis.first_bad_step) == ('nonfinite', bad)
    assert (diagnosis.where['pass'], diagnosis.where['op'], diagnosis.where['examples']) == (
        'data',
        'input',
        [3],
    )
    # The loss shows it a step later than the state.
    assert diagnosis.replay.bit_identical and bad % 10 + 1 <= len(found) <= bad % 10 + 2


def test_it_is_diagnosed_by_its_own_batches(tmp_path):
    trained(tmp_path, loader(90, bad := random.randrange(50, 80)))
    diagnosis, report = jaxrnn.diagnose(train_step, None, tmp_path, like=start())
    assert (diagnosis.first_bad_step, diagnosis.cause.kind) == (bad, 'data')
    averted = {o.change.name for o in report.outcomes if o.verdict == 'averted'}
    assert f'without the batch of step {bad}' in averted, report.outcomes


def test_between_digests_the_state_is_looked_at_again(tmp_path):
    """A loss that stays finite for a step more than the state."""
    trained(tmp_path, loader(40, bad=33), digest_every=10)
    assert [row['step'] for row in rows(tmp_path) if 'digest' in row] == [9, 19, 29, 39]
    diagnosis, _ = jaxrnn.bisect(train_step, None, tmp_path, like=start())
    assert diagnosis.first_bad_step == 33


def test_digests_cost_a_share_of_a_step_if_nothing_is_said(tmp_path, monkeypatch):
    from jaxrnn.record import telemetry

    monkeypatch.setattr(telemetry.Beside, 'seconds', lambda self, state: 1e9)
    trained(tmp_path / 'slow', loader(40), checkpoint_every=20)
    monkeypatch.setattr(telemetry.Beside, 'seconds', lambda self, state: 0)
    trained(tmp_path / 'fast', loader(40), checkpoint_every=20)
    slow, fast = ([row['step'] for row in rows(tmp_path / n) if 'digest' in row] for n in ('slow', 'fast'))
    assert slow == [*range(8), 19, 39] and fast == [*range(40)]


def test_checkpoints_cost_a_share_of_the_time_if_nothing_is_said(tmp_path, monkeypatch):
    clock = (
        itertools.count()
    )  # which goes on each time that somebody looks: for a checkpoint, or at a hundredth step
    monkeypatch.setattr(recorder._Output, '_clock', lambda self: next(clock))
    monkeypatch.setattr(recorder, 'SHARE', 0.1)
    trained(tmp_path, loader(2250), checkpoint_every=0)
    assert checkpoint.Checkpoints(tmp_path / 'checkpoints', like=start()).steps() == [0, 1000, 2000, 2250]


def test_a_checkpoint_is_due_before_batches_are_lost(tmp_path, monkeypatch):
    monkeypatch.setattr(recorder, 'SHARE', 1e-9)
    rng = np.random.default_rng()
    batches = (rng.integers(0, 2**32, 250, np.uint32) for _ in range(1000))
    step = jax.jit(lambda x, batch: (x + batch[0], {'loss': jnp.sum(x)}))
    trained(tmp_path, batches, step, jnp.zeros(2), checkpoint_every=0, most_bytes=500_000)
    steps = checkpoint.Checkpoints(tmp_path / 'checkpoints', like=jnp.zeros(2)).steps()
    assert (np.diff(steps) <= 400).all() and len(steps) < 6
    assert jaxrnn.bisect(step, None, tmp_path, like=jnp.zeros(2), when='step == 990')[0].replay.bit_identical


# Going on


PROGRAM = """
import os, signal, sys
sys.path.insert(0, {tests!r})
import jaxrnn, recorder_test as program

directory, stop = sys.argv[1], int(sys.argv[2])
with jaxrnn.Recorder(directory, program.start(), checkpoint_every=10) as recorder:
    state = recorder.state
    for batch in recorder.batches(lambda: program.loader(50, seed=3)):
        if recorder.step == stop:
            os.kill(os.getpid(), signal.SIGKILL)
        state, metrics = program.train_step(state, batch)
        recorder(state, metrics)
"""


def test_a_killed_loop_goes_on_from_its_checkpoint(tmp_path):
    program = PROGRAM.format(tests=str(Path(__file__).parent))
    environment = {**os.environ, 'JAX_PLATFORMS': 'cpu'}
    for stop in (random.randrange(21, 30), random.randrange(31, 50), 99):
        ended = subprocess.run(
            [sys.executable, '-c', program, tmp_path / 'run', str(stop)], env=environment, check=False
        )
        assert ended.returncode == (0 if stop == 99 else -signal.SIGKILL)
    whole = trained(tmp_path / 'whole', loader(50, seed=3))
    saved = checkpoint.Checkpoints(tmp_path / 'run' / 'checkpoints', like=start())
    assert equal(saved.restore(50), whole)
    shared = ('step', 'loss', 'state_moved', 'state_rms')
    ours, theirs = ([{n: row[n] for n in shared} for row in rows(tmp_path / n)] for n in ('run', 'whole'))
    assert ours == theirs
    kept = kept_batches.KeptBatches(tmp_path / 'run' / 'batches')
    assert kept.steps() == [*range(50)]
    assert all(equal(kept(k), batch) for k, batch in enumerate(loader(50, seed=3)))


def test_after_an_exception_of_the_loop_nothing_is_lost(tmp_path):
    with pytest.raises(ZeroDivisionError), jaxrnn.Recorder(tmp_path, start()) as recorder:
        state = start()
        for batch in loader(7):
            state, metrics = train_step(state, batch)
            recorder(state, metrics, batch)
        raise ZeroDivisionError
    assert len(rows(tmp_path)) == 7
    with jaxrnn.Recorder(tmp_path, start()) as recorder:
        assert recorder.step == 7 and equal(recorder.state, state)


def test_what_came_after_the_checkpoint_is_of_another_course(tmp_path):
    first, second = list(loader(14)), list(loader(6))
    with pytest.raises(ZeroDivisionError):
        state = trained(tmp_path, itertools.chain(first, iter_error()), by=consumed)
    with jaxrnn.Recorder(tmp_path, start(), checkpoint_every=10) as recorder:
        state = recorder.state
        assert recorder.step == 10 and [row['step'] for row in rows(tmp_path)] == [*range(10)]
        for batch in second:
            state, metrics = train_step(state, batch)
            recorder(state, metrics, batch)
    kept = kept_batches.KeptBatches(tmp_path / 'batches')
    assert all(equal(kept(k), batch) for k, batch in enumerate([*first[:10], *second]))
    assert jaxrnn.bisect(train_step, None, tmp_path, like=start(), verify=True)[0].replay.bit_identical


def iter_error():
    yield {'x': np.zeros((16, 8), np.float32), 'y': np.full((16, 4), 9, np.float32)}


def consumed(state, batch):
    """A step that fails after it has consumed its state."""
    if batch['y'][0, 0] == 9:
        donating(state, batch)
        raise ZeroDivisionError
    return donating(state, batch)


def test_records_that_are_lost_are_said(tmp_path, caplog):
    trained(tmp_path, loader(30, bad=17))
    lines = (tmp_path / 'records.jsonl').read_bytes().splitlines(keepends=True)
    (tmp_path / 'records.jsonl').write_bytes(b''.join([*lines[:4], b'x', *lines[5:]]))
    jaxrnn.Recorder(tmp_path, start()).close()
    assert 'the records of steps 4 to 5 are lost; a bisect goes by the checkpoints' in caplog.text
    assert [row['step'] for row in rows(tmp_path)] == [*range(4), *range(6, 30)]
    diagnosis, _ = jaxrnn.bisect(train_step, None, tmp_path, like=start())
    assert diagnosis.first_bad_step == 17 and diagnosis.replay.bit_identical


def test_a_run_that_is_there_is_not_mistaken_for_a_new_one(tmp_path):
    trained(tmp_path, loader(12))
    before = (tmp_path / 'records.jsonl').read_bytes()
    with pytest.raises(UserError, match=r'a run of 12 steps is there already; go on with recorder\.state'):
        trained(tmp_path, loader(3))
    assert (tmp_path / 'records.jsonl').read_bytes() == before


def test_a_run_of_another_model_is_refused(tmp_path):
    trained(tmp_path, loader(3))
    with pytest.raises(UserError, match="state: no '0/v' found"):
        jaxrnn.Recorder(tmp_path, {'w': jnp.zeros(3)})
    jaxrnn.record(step, lambda k: next(loader(1, seed=k)), start, tmp_path / 'loop', max_steps=2)
    with pytest.raises(UserError, match='holds a run that no recorder made'):
        jaxrnn.Recorder(tmp_path / 'loop', start())


def test_a_run_that_ended_in_its_first_steps_is_there(tmp_path):
    with pytest.raises(ZeroDivisionError):
        trained(tmp_path, itertools.chain(loader(3), iter_error()), by=consumed)
    with jaxrnn.Recorder(tmp_path, start()) as recorder:
        assert (recorder.resumed, recorder.step) == (True, 0) and equal(recorder.state, start())
    with jaxrnn.Recorder(tmp_path / 'new', start()) as recorder:
        assert not recorder.resumed


def test_what_ended_before_its_first_checkpoint_is_begun_anew(tmp_path):
    trained(tmp_path, loader(3))
    shutil.rmtree(tmp_path / 'checkpoints')
    trained(tmp_path, [np.float32(1)] * 4, adding, jnp.float32(0))
    assert [row['loss'] for row in rows(tmp_path)] == [0, 1, 2, 3]
    assert kept_batches.KeptBatches(tmp_path / 'batches').steps() == [*range(4)]


def test_a_loader_that_is_too_short_is_named(tmp_path):
    trained(tmp_path, loader(12))
    with (
        jaxrnn.Recorder(tmp_path, start()) as recorder,
        pytest.raises(UserError, match='ended after 5 batches, and the run has 12 steps'),
    ):
        next(recorder.batches(loader(5)))


class Placed:
    """Batches that are random, and an iterator that knows its place, as Grain's do."""

    def __init__(self, count, kind=dict):
        self.count, self.kind, self.drawn, self.place = count, kind, 0, 0

    def __iter__(self):
        return self

    def __next__(self):
        if self.place == self.count:
            raise StopIteration
        self.place += 1
        self.drawn += 1
        return np.float32(self.place - 1)

    def get_state(self):
        return {'next_index': self.place} if self.kind is dict else str(self.place).encode()

    def set_state(self, state):
        self.place = state['next_index'] if self.kind is dict else int(state)


adding = jax.jit(lambda x, batch: (x + batch, {'loss': x}))


@pytest.mark.parametrize('kind', [dict, bytes])
def test_a_loader_that_knows_its_place_is_set_there(kind, tmp_path):
    def go_on(stop):
        with jaxrnn.Recorder(tmp_path, jnp.float32(0), checkpoint_every=5) as recording:
            state, source = recording.state, Placed(30, kind)
            for batch in recording.batches(source):
                state, metrics = adding(state, batch)
                recording(state, metrics)
                if recording.step == stop:
                    break
        return source.drawn, float(state)

    assert go_on(12) == (12, sum(range(12)))
    assert go_on(99) == (18, sum(range(30)))
    kept = kept_batches.KeptBatches(tmp_path / 'batches')
    assert [float(kept(k)) for k in range(30)] == [*range(30)]


@pytest.mark.parametrize('begin', [lambda: iter(range(1000)), lambda: Placed(1000)])
def test_batches_of_a_loader_in_any_order(begin):
    begun = []

    def counted():
        begun.append(1)
        return begin()

    batch_at = jaxrnn.Drawn(counted)
    order = random.sample(range(1000), 60)
    assert [float(batch_at(step)) for step in order] == order
    assert [float(batch_at(step)) for step in range(700, 900)] == [*range(700, 900)]
    with pytest.raises(
        UserError, match='the loader ended after 1000, and the batch of step 1000 is asked for'
    ):
        batch_at(1000)


def test_a_seeded_loader_does_without_kept_batches(tmp_path):
    with jaxrnn.Recorder(tmp_path, start(), checkpoint_every=10, most_bytes=0) as recording:
        state = recording.state
        for batch in recording.batches(loader(40, bad=33, seed=2)):
            state, metrics = train_step(state, batch)
            recording(state, metrics)
    batch_at = jaxrnn.Drawn(lambda: loader(40, bad=33, seed=2))
    diagnosis, _ = jaxrnn.bisect(train_step, batch_at, tmp_path, like=start())
    assert diagnosis.first_bad_step == 33 and diagnosis.replay.bit_identical


# States and metrics


def test_a_state_may_hold_what_is_no_array(tmp_path):
    """Functions and settings stay; a count that begins as a Python number becomes an array."""

    def of_parts(state, batch):
        w = state['w'] - state['rate'] * state['function'](state['w'] - batch)
        return {**state, 'w': w, 'count': jnp.asarray(state['count']) + 1}, jnp.sum(w)

    made = lambda: {'w': jnp.ones(3), 'rate': 0.1, 'count': 0, 'function': jnp.tanh, 'name': None}  # noqa: E731
    batches = [np.float32(np.nan if k == 21 else k) for k in range(30)]
    state = trained(tmp_path, batches, of_parts, made())
    assert int(state['count']) == 30
    assert json.loads((tmp_path / 'recorder.json').read_text())['state'] == ['count', 'w']
    diagnosis, _ = jaxrnn.bisect(of_parts, None, tmp_path, like=made())
    assert diagnosis.first_bad_step == 21 and diagnosis.replay.bit_identical
    with jaxrnn.Recorder(tmp_path, made()) as recorder:
        assert recorder.state['function'] is jnp.tanh and int(recorder.state['count']) == 30


def test_a_state_may_hold_numbers_of_numpy(tmp_path):
    def by_numpy(state, batch):
        return {'w': state['w'] + np.float32(batch), 'n': state['n']}, state['w']

    made = lambda: {'w': np.float32(1), 'n': np.int64(3)}  # noqa: E731
    trained(tmp_path, [np.nan if k == 7 else k for k in range(12)], by_numpy, made())
    diagnosis, _ = jaxrnn.bisect(by_numpy, None, tmp_path, like=made())
    assert diagnosis.first_bad_step == 7 and diagnosis.replay.bit_identical


def test_no_state_is_held_on_to(tmp_path):
    """It would take the memory of one more, all the time."""
    step = jax.jit(lambda x, batch: (x + batch, {'loss': x.sum()}))

    def states():
        gc.collect()
        return sum(each.shape == (3, 7, 11) for each in jax.live_arrays())

    for steps in (4, 8):
        with jaxrnn.Recorder(tmp_path, jnp.zeros((3, 7, 11)), checkpoint_every=2) as recorder:
            state = recorder.state
            while recorder.step < steps - 1:
                state, metrics = step(state, 1)
                recorder(state, metrics, 1)
            assert float(recorder.state[0, 0, 0]) == steps - 1  # what the next step starts from
            recorder._output._writer.wait()
            assert states() == 1


def test_the_equations_of_what_was_begun_before_are_gone(tmp_path, caplog):
    trained(tmp_path, loader(3), step=jax.jit(other_step), by=jax.jit(other_step))
    shutil.rmtree(tmp_path / 'checkpoints')
    trained(tmp_path, loader(30, bad=22))
    assert jaxrnn.bisect(train_step, None, tmp_path, like=start())[0].first_bad_step == 22
    assert 'another program' not in caplog.text


def test_a_state_of_another_structure_is_named(tmp_path):
    said = r'another structure than it begins with \(b is new\)'
    with jaxrnn.Recorder(tmp_path, {'w': jnp.ones(2)}) as recorder, pytest.raises(UserError, match=said):
        recorder({'w': jnp.ones(2), 'b': jnp.ones(1)}, 0.0)


@pytest.mark.parametrize(
    'metrics, row',
    [
        (0.1, {'loss': 0.1}),
        (np.float32(0.1), {'loss': 0.1}),
        (jnp.float32(0.1), {'loss': 0.1}),
        (float(jnp.float32(0.1)), {'loss': 0.1}),
        ({'train': {'loss': jnp.ones((1, 1))}, 'step': 7}, {'train_loss': 1.0, 'record_step': 7}),
        ((jnp.bfloat16(0.5), True), {'0': 0.5, '1': True}),
    ],
)
def test_metrics_are_any_tree_of_scalars(metrics, row, tmp_path):
    with jaxrnn.Recorder(tmp_path, jnp.ones(2)) as recorder:
        recorder(jnp.ones(2), metrics)
    assert rows(tmp_path)[0].items() >= row.items()


@pytest.mark.parametrize(
    'metrics, said',
    [
        ({'loss': jnp.ones(3)}, r'record: scalars expected, loss \(3,\) found'),
        ({'loss': 'low'}, "record: numbers expected, loss = 'low' found"),
    ],
)
def test_other_metrics_are_refused(metrics, said, tmp_path):
    with jaxrnn.Recorder(tmp_path, jnp.ones(2)) as recorder, pytest.raises(UserError, match=said):
        recorder(jnp.ones(2), metrics)


def test_a_recorder_in_a_compiled_step_is_refused(tmp_path):
    with jaxrnn.Recorder(tmp_path, jnp.ones(2)) as recorder:

        @jax.jit
        def within(x):
            recorder(jnp.ones(2), x)

        with pytest.raises(UserError, match=r'after its call, outside of jax\.jit'):
            within(1.0)


# Checkpoints of somebody's own


def test_an_own_checkpoint_manager_saves_the_states(tmp_path):
    directory = tmp_path / 'checkpoints'

    def go_on(batches):
        options = ocp.CheckpointManagerOptions(save_interval_steps=15, max_to_keep=3)
        with ocp.CheckpointManager(directory, options=options) as manager:
            with jaxrnn.Recorder(tmp_path, start(), checkpoints=manager) as recording:
                state = recording.state
                for batch in batches:
                    state, metrics = train_step(state, batch)
                    recording(state, metrics, batch)
            return recording.step, manager.all_steps(), state

    step, saved, state = go_on(loader(40))
    assert (step, [*saved]) == (40, [15, 30, 40])
    with ocp.CheckpointManager(directory) as manager:
        restored = manager.restore(40, args=ocp.args.StandardRestore(start()))
    assert equal(restored, state)
    assert go_on(loader(40, bad=33))[0] == 80
    diagnosis, _ = jaxrnn.bisect(train_step, None, tmp_path, like=start())
    assert diagnosis.first_bad_step == 73 and diagnosis.replay.bit_identical


def test_a_damaged_checkpoint_of_a_manager_is_saved_again(tmp_path):
    directory = tmp_path / 'checkpoints'

    def go_on(steps):
        options = ocp.CheckpointManagerOptions(save_interval_steps=5)
        with (
            ocp.CheckpointManager(directory, options=options) as manager,
            jaxrnn.Recorder(tmp_path, jnp.float32(0), checkpoints=manager, digest_every=1) as recording,
        ):
            state = recording.state
            while recording.step < steps:
                state, metrics = adding(state, 1)
                recording(state, metrics, 1)

    go_on(10)
    for path in (directory / '10').rglob('d/*'):
        path.write_bytes(path.read_bytes()[:-9])
    go_on(10)
    saved = checkpoint.Checkpoints(directory, like=jnp.float32(0))
    assert saved.steps() == [0, 5, 10] and float(saved.restore(10)) == 10


def test_a_manager_of_another_folder_or_of_several_items_is_refused(tmp_path):
    said = r'a manager of .*/mine found'
    with ocp.CheckpointManager(tmp_path / 'mine') as manager, pytest.raises(UserError, match=said):
        jaxrnn.Recorder(tmp_path / 'run', start(), checkpoints=manager)
    directory, items = tmp_path / 'run' / 'checkpoints', ('state', 'other')
    with (
        ocp.CheckpointManager(directory, item_names=items) as manager,
        pytest.raises(UserError, match='it must be one of a single item'),
    ):
        trained(tmp_path / 'run', loader(2), checkpoints=manager)


# The program


def other_step(state, batch):
    """As `step`, at another rate."""
    params, moments = state
    loss, gradients = jax.value_and_grad(loss_of)(params, batch)
    updates, moments = optax.adam(2e-2).update(gradients, moments, params)
    return (optax.apply_updates(params, updates), moments), {'loss': loss}


def test_a_replay_by_another_program_says_in_which_equation(tmp_path, caplog):
    trained(tmp_path, loader(30, bad=22), step=train_step)
    diagnosis, _ = jaxrnn.bisect(train_step, None, tmp_path, like=start())
    assert diagnosis.first_bad_step == 22 and not caplog.text
    diagnosis, _ = jaxrnn.bisect(jax.jit(other_step), None, tmp_path, like=start())
    assert diagnosis.cause.kind == 'program' and diagnosis.first_bad_step is None
    assert 'the step is another program than trained: equation' in diagnosis.cause.why
    assert '0.02' in diagnosis.cause.why and '0.01' in diagnosis.cause.why


def late_step(state, batch):
    """As `step`, but for another rate from step 13 on."""
    params, moments = state
    loss, gradients = jax.value_and_grad(loss_of)(params, batch)
    count = moments[0].count
    updates, moments = OPTIMISER.update(gradients, moments, params)
    updates = jax.tree.map(lambda x: jnp.where(count >= 13, 2 * x, x), updates)
    return (optax.apply_updates(params, updates), moments), {'loss': loss}


def test_also_where_it_is_another_from_some_step_on(tmp_path):
    trained(tmp_path, loader(30, bad=17), step=train_step)
    diagnosis, _ = jaxrnn.bisect(jax.jit(late_step), None, tmp_path, like=start())
    assert (diagnosis.cause.kind, diagnosis.replay.first_mismatch) == ('program', 13)
    assert 'the step is another program than trained: equation' in diagnosis.cause.why


def test_a_step_that_can_not_be_traced_is_recorded(tmp_path):
    def by_numbers(x, batch):
        return jnp.float32(float(x) + float(batch)), {'loss': float(x)}

    with jaxrnn.Recorder(tmp_path, x := jnp.float32(0), step=by_numbers) as recording:
        for batch in range(5):
            x, metrics = by_numbers(x, batch)
            recording(x, metrics, batch)
    assert not (tmp_path / 'equations.txt').exists()
    assert jaxrnn.bisect(by_numbers, None, tmp_path, like=x, verify=True)[0].replay.bit_identical


# Batches


def test_a_buffer_that_a_loader_uses_again_is_copied(tmp_path):
    buffer = np.zeros(3, np.float32)

    def reusing():
        for number in range(20):
            buffer[:] = number
            yield buffer

    trained(tmp_path, reusing(), jax.jit(lambda x, b: (x + b, {'loss': x.sum()})), jnp.zeros(3))
    kept = kept_batches.KeptBatches(tmp_path / 'batches')
    assert [kept(k)[0] for k in range(20)] == [*range(20)]


def test_a_batch_that_the_step_consumes_is_kept_before_it(tmp_path):
    both = jax.jit(lambda x, batch: (x + batch, {'loss': x.sum()}), donate_argnums=1)

    def batches():
        return (jnp.full(3, k, jnp.float32) for k in range(12))

    with pytest.raises(UserError, match='consumed by the step'):
        trained(tmp_path / 'after', batches(), both, jnp.zeros(3))
    with jaxrnn.Recorder(tmp_path / 'before', state := jnp.zeros(3)) as recorder:
        for batch in recorder.batches(batches()):
            state, metrics = both(state, batch)
            recorder(state, metrics)
    recorder = jaxrnn.Recorder(tmp_path / 'around', state := jnp.zeros(3))
    recorded = recorder.around(both)
    for batch in batches():
        state, metrics = recorded(state, batch)
    recorder.close()
    for name in ('before', 'around'):
        kept = kept_batches.KeptBatches(tmp_path / name / 'batches')
        assert [float(kept(k)[0]) for k in range(12)] == [*range(12)]


Pair = collections.namedtuple('Pair', ['x', 'y'])


class Mine:
    """A class of somebody's own."""

    def __init__(self, x):
        self.x = x


jax.tree_util.register_pytree_node(Mine, lambda mine: ((mine.x,), None), lambda _, children: Mine(*children))


BATCHES = {
    'numpy': np.arange(6, dtype=np.float32).reshape(2, 3),
    'float64': np.array([0.1, np.nan, -np.inf]),
    'integers': [np.array(3, np.int8), np.arange(3, dtype=np.uint64), np.array([[True, False]])],
    'numbers': {'rate': 0.1, 'train': True, 'count': 2**40, 'nan': float('nan')},
    'half': (jnp.arange(3, dtype=jnp.bfloat16), np.float16(0.1)),
    'empty': {'x': np.zeros((0, 3), np.float32), 'none': None, 'list': [], 'tuple': ()},
    'strided': np.arange(12, dtype=np.float32).reshape(3, 4).T[::2],
    'order': collections.OrderedDict(b=np.ones(1), a=np.zeros(1)),
    'keys': {1: np.ones(1), 0: np.zeros(2)},
    'complex': np.array([1 + 2j], np.complex64),
}


@pytest.mark.parametrize('name', BATCHES)
def test_a_batch_comes_back_as_it_was(name, tmp_path):
    writer = kept_batches.BatchWriter(tmp_path)
    writer.put(5, kept_batches.taken(BATCHES[name]))
    writer.close()
    found = kept_batches.KeptBatches(tmp_path)(5)
    assert jax.tree.structure(found) == jax.tree.structure(BATCHES[name])
    for was, now in zip(jax.tree.leaves(BATCHES[name]), jax.tree.leaves(found), strict=True):
        assert np.asarray(was).dtype == np.asarray(now).dtype and np.shape(was) == np.shape(now)
        assert np.asarray(was).tobytes() == np.asarray(now).tobytes()
        assert isinstance(was, bool | int | float) == isinstance(now, bool | int | float)


def test_an_outline_has_the_leaves_in_their_order():
    tree = {1: 'a', 0: ('b', None), 'never': []}
    tree = {'z': tree[1], 'a': tree[0], 'm': tree['never']}
    assert outline.made(outline.of(tree), jax.tree.leaves(tree), '') == tree


def test_a_random_key_and_classes_come_back(tmp_path):
    writer = kept_batches.BatchWriter(tmp_path)
    writer.put(0, kept_batches.taken(Pair(jax.random.key(3), jax.random.PRNGKey(4))))
    writer.put(1, kept_batches.taken(Mine(np.ones(2))))
    writer.close()
    found = kept_batches.KeptBatches(tmp_path)(0)
    assert found._fields == ('x', 'y') and type(found).__name__ == 'Pair'
    assert jax.random.uniform(found.x) == jax.random.uniform(jax.random.key(3))
    with pytest.raises(UserError, match='the batch of step 1 is a Mine; give one like it: batch_like='):
        kept_batches.KeptBatches(tmp_path)(1)
    assert isinstance(kept_batches.KeptBatches(tmp_path, like=Mine(0))(1), Mine)


def test_a_text_is_no_batch():
    with pytest.raises(UserError, match='a batch: a str found, arrays and numbers expected'):
        kept_batches.taken({'x': 'words'})


def test_they_stay_within_their_bound(tmp_path):
    def batches():
        rng = np.random.default_rng()
        return (rng.integers(0, 2**32, 1000, np.uint32) for _ in range(200))

    largest = 0

    def watched():
        nonlocal largest
        for batch in batches():
            with contextlib.suppress(FileNotFoundError):  # of a file that is being deleted
                largest = max(largest, sum(p.stat().st_size for p in (tmp_path / 'batches').iterdir()))
            yield batch

    step = jax.jit(lambda x, batch: (x + batch[0], {'loss': jnp.sum(x)}))
    trained(tmp_path, watched(), step, jnp.zeros(2), most_bytes=100_000)
    assert 80_000 < largest <= 100_000
    kept = kept_batches.KeptBatches(tmp_path / 'batches')
    assert kept.steps() == [*range(kept.steps()[0], 200)] and 175 < kept.steps()[0] < 185
    with pytest.raises(UserError, match=r'no batch of step 3 is kept; there are those of steps \d+ to 199$'):
        kept(3)
    diagnosis, _ = jaxrnn.bisect(step, None, tmp_path, like=jnp.zeros(2), when='step == 195')
    assert diagnosis.first_bad_step == 195 and diagnosis.replay.bit_identical
    with pytest.raises(
        UserError, match=r'no checkpoint at or before step 50 \(the first is of step 1[89]0\)'
    ):
        jaxrnn.bisect(step, None, tmp_path, like=jnp.zeros(2), when='step == 50')


def test_one_that_is_too_large_is_said(tmp_path):
    with pytest.raises(UserError, match=r'a batch has 4,\d+ bytes, and 1,000 are allowed in all'):
        rng = np.random.default_rng()
        trained(
            tmp_path,
            [rng.integers(0, 2**32, 1000, np.uint32)] * 9,
            lambda x, b: (x, 0.0),
            jnp.ones(1),
            most_bytes=1000,
        )


def test_without_batches_a_function_is_needed(tmp_path):
    trained(tmp_path, loader(12, bad=7, seed=5), most_bytes=0)
    assert not (tmp_path / 'batches').exists()
    with pytest.raises(UserError, match='no batch of step 0 is kept; there is none'):
        jaxrnn.bisect(train_step, None, tmp_path, like=start())
    known = list(loader(12, bad=7, seed=5))
    diagnosis, _ = jaxrnn.bisect(train_step, lambda k: known[k], tmp_path, like=start())
    assert diagnosis.first_bad_step == 7 and diagnosis.replay.bit_identical


@pytest.mark.parametrize('damage', ['cut', 'bit', 'gone'])
def test_a_batch_that_is_damaged_is_named(damage, tmp_path):
    trained(tmp_path, loader(30, bad=18))
    path = tmp_path / 'batches' / '10.batches'
    content = bytearray(path.read_bytes())
    if damage == 'gone':
        path.unlink()
    elif damage == 'cut':
        path.write_bytes(content[: len(content) // 2])
    else:
        content[random.randrange(400)] ^= 1 << random.randrange(8)
        path.write_bytes(content)
    with pytest.raises(UserError, match=r'batch(es)? .*of step 1\d|batch of step 1\d'):
        jaxrnn.bisect(train_step, None, tmp_path, like=start())


@pytest.mark.parametrize('where', ['batches', 'file'])
def test_batches_outside_of_the_run_are_not_read(where, tmp_path):
    trained(tmp_path / 'theirs', loader(12))
    trained(tmp_path / 'run', loader(12, bad=7))
    path = tmp_path / 'run' / 'batches'
    if where == 'file':
        (path / '0.batches').unlink()
        (path / '0.batches').symlink_to(tmp_path / 'theirs' / 'batches' / '0.batches')
    else:
        shutil.rmtree(path)
        path.symlink_to(tmp_path / 'theirs' / 'batches')
    with pytest.raises(UserError, match='a link found'):
        jaxrnn.bisect(train_step, None, tmp_path / 'run', like=start())


def test_every_bit_of_a_file_of_batches_is_noticed(tmp_path):
    writer = kept_batches.BatchWriter(tmp_path)
    for number in range(3):
        writer.put(number, kept_batches.taken({'x': np.arange(4, dtype=np.float32) + number}))
    writer.close()
    path = tmp_path / '0.batches'
    content = path.read_bytes()
    for bit in range(8 * len(content)):
        flipped = bytearray(content)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        with pytest.raises(UserError):
            kept = kept_batches.KeptBatches(tmp_path)
            for number in range(3):
                kept(number)


def test_a_full_disk_is_one_line(tmp_path, monkeypatch):
    def full(self, step, batch):
        raise OSError(28, 'No space left on device')

    monkeypatch.setattr(kept_batches.BatchWriter, '_write', full)
    with pytest.raises(UserError, match=r"a batch couldn't be kept \(No space left on device\); make room"):
        trained(tmp_path, loader(40))


# Its notes


@pytest.mark.parametrize(
    'content, said',
    [
        (
            '{"format": 2, "state": []}',
            'format 2 found, at most 1 expected; it is of a newer release of jaxrnn',
        ),
        ('{"format": 1, "state": [3]}', 'not as a recorder wrote it'),
        ('{"format": 1, "state": [], "crc32": "12345678"}', 'its checksum is'),
        ('[]', 'not as a recorder wrote it'),
        ('{', 'not JSON'),
    ],
)
def test_other_notes_are_refused_in_a_line(content, said, tmp_path):
    trained(tmp_path, loader(3))
    (tmp_path / 'recorder.json').write_text(content)
    for ask in (
        functools.partial(jaxrnn.Recorder, tmp_path, start()),
        functools.partial(jaxrnn.bisect, train_step, None, tmp_path, like=start()),
    ):
        with pytest.raises(UserError, match=said) as found:
            ask()
        assert '\n' not in str(found.value)


@pytest.mark.parametrize('option', [{'checkpoint_every': -1}, {'keep_latest': 0}, {'most_bytes': -1}])
def test_a_number_that_is_too_small_is_named(option, tmp_path):
    ((name, number),) = option.items()
    with pytest.raises(UserError, match=f'{name}: {number} found, at least [01] expected'):
        jaxrnn.Recorder(tmp_path, start(), **option)


def test_two_recorders_in_a_directory_are_refused(tmp_path):
    with jaxrnn.Recorder(tmp_path, start()), pytest.raises(UserError, match='in use by another process'):
        jaxrnn.Recorder(tmp_path, start())


def test_closed_twice_is_closed_once(tmp_path):
    recorder = jaxrnn.Recorder(tmp_path, start())
    recorder.close()
    recorder.close()
    jaxrnn.Recorder(tmp_path, start()).close()
