"""Replay and bisection against runs whose fault, and its step, are known."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import planted
import pytest
import small

import jaxrnn
from jaxrnn import detect
from jaxrnn.bisect import inspection, replay
from jaxrnn.diagnosis import Symptom
from jaxrnn.record import checkpoint, loop
from jaxrnn.record.record_file import RecordFile
from jaxrnn.types import UserError

FAULTS = 200
QUICK = 36
"""Of the faults, without --full."""

STEPS = 90


def train(step, batch_at, init, directory, **options) -> Path:
    loop.run(step, batch_at, init, directory, loop.LoopOptions(**{'max_steps': STEPS, **options}))
    return Path(directory)


def subject(step, batch_at, init, directory, *, records=True, **options) -> replay.Subject:
    rows = RecordFile(directory / 'records.jsonl').read() if records else ()
    checkpoints = checkpoint.Checkpoints(directory / 'checkpoints', like=jax.eval_shape(init))
    return replay.subject(step, batch_at, checkpoints, rows, **options)


@pytest.fixture
def healthy(tmp_path):
    program = small.program('lstm')
    run = program.step, program.batch_at, program.init, tmp_path
    train(*run, checkpoint_every=20)
    return run


def random_faults(network: str) -> list[planted.Fault]:
    """A third of the faults, the same ones in every run."""
    rng = np.random.default_rng(small.NETWORKS.index(network))
    kinds = list(planted.KINDS)
    count = FAULTS // 3 + (small.NETWORKS.index(network) < FAULTS % 3)
    return [
        planted.Fault(kinds[n % len(kinds)], *map(int, (rng.integers(25, 85), rng.integers(1000))))
        for n in range(count)
    ]


def test_there_are_200_faults():
    assert sum(len(random_faults(network)) for network in small.NETWORKS) == FAULTS


@pytest.mark.parametrize('network', small.NETWORKS)
def test_bisect_names_the_step_of_every_planted_fault(network, tmp_path, full):
    program = small.program(network)
    step = planted.plant(program.step)
    rng = np.random.default_rng(7)
    missed = []
    for number, fault in enumerate(random_faults(network)[: None if full else QUICK // 3]):
        batch_at = planted.batches(program.batch_at, fault)
        run = step, batch_at, program.init, tmp_path / str(number)
        train(*run, checkpoint_every=int(rng.integers(7, 30)))
        for records in (True, False):
            found, _ = replay.bisect(subject(*run, records=records), planted.detectors(fault))
            if found.first_bad_step != fault.step or not found.replay.bit_identical:
                missed.append((fault, records, found.symptom, found.replay))
    assert not missed


@pytest.mark.parametrize('network', small.NETWORKS)
def test_bisect_looks_into_the_step(network, tmp_path):
    """Of 8 examples the NaN is in the target of number 5."""
    program = small.program(network)
    fault = planted.Fault('NaN in a target', 40, 5)
    run = planted.plant(program.step), planted.batches(program.batch_at, fault), program.init, tmp_path
    train(*run, checkpoint_every=15)
    found, inspected = inspection.locate(subject(*run), replay.bisect(subject(*run))[0])
    assert found.first_bad_step == 40
    assert found.where is not None and inspected.where() == found.where
    assert found.where['source'].startswith(planted.__file__)
    said = {name: found.where[name] for name in ('pass', 'op', 'time_step', 'examples')}
    assert said == {'pass': 'data', 'op': 'mul', 'time_step': None, 'examples': [5]}


def test_nonfinite_takes_few_probes_without_records(tmp_path):
    """Halving 16 checkpoints takes 4 probes more than the two ends; then one interval is replayed."""
    program = small.program('lstm')
    fault = planted.Fault('NaN in a weight', 101, 0)
    run = planted.plant(program.step), planted.batches(program.batch_at, fault), program.init, tmp_path
    train(*run, max_steps=160, checkpoint_every=10)
    found, _ = replay.bisect(subject(*run, records=False))
    assert found.first_bad_step == 101
    assert found.replay.checkpoints_probed <= 2 + 5
    assert found.replay.steps_replayed <= 7 + 10


def test_with_records_one_checkpoint_is_restored(tmp_path):
    program = small.program('gru')
    fault = planted.Fault('NaN in a weight', 47, 3)
    run = planted.plant(program.step), planted.batches(program.batch_at, fault), program.init, tmp_path
    train(*run, checkpoint_every=20)
    found, rows = replay.bisect(subject(*run))
    assert found.replay == replay.Replay(True, None, steps_replayed=8, checkpoints_probed=1)
    assert [row['step'] for row in rows] == list(range(40, 48))


def test_healthy_run_has_no_symptom(healthy):
    for records in (True, False):
        found, _ = replay.bisect(subject(*healthy, records=records))
        assert found.symptom is None and found.first_bad_step is None


def test_when_finds_the_first_step_of_a_rule(healthy):
    rows = RecordFile(healthy[-1] / 'records.jsonl').read()
    losses = [row['loss'] for row in rows]
    expected = next(n for n in range(20, STEPS) if losses[n] < 0.97 * np.median(losses[n - 20 : n]))
    rule = detect.custom('loss < .97 * median(loss, 20) and step >= 20')
    for records in (True, False):
        found, _ = replay.bisect(subject(*healthy, records=records), [rule])
        assert found.first_bad_step == expected


def test_good_and_bad_bound_the_search(healthy):
    rule = [detect.custom('step == 13 or step == 42 or step == 77')]
    for records in (True, False):
        found, _ = replay.bisect(subject(*healthy, records=records), rule, good=20, bad=60)
        assert found.first_bad_step == 42


def test_state_is_the_state_of_that_step(healthy):
    step, batch_at, init, _ = healthy
    state = init()
    for number in range(33):
        state, _ = jax.jit(step)(state, batch_at(number))
    replayed = replay.Replayer(subject(*healthy)).state(33)
    assert loop.state_digest(replayed) == loop.state_digest(state)
    assert int(replayed.step) == 33


def test_anybody_can_have_a_step_s_state(healthy):
    step, batch_at, init, directory = healthy
    state = jaxrnn.state(step, batch_at, directory, 33, like=init)
    assert loop.state_digest(state) == loop.state_digest(replay.Replayer(subject(*healthy)).state(33))
    with pytest.raises(UserError, match='step 20 comes out otherwise than it was recorded'):
        jaxrnn.state(step, lambda k: batch_at(k + 1), directory, 33, like=init)


def test_replay_is_bit_identical_from_every_checkpoint(healthy):
    replayer = replay.Replayer(subject(*healthy))
    for start in (0, 20, 40, 60, 80):
        replayer.replay(start, start + 10)
    assert replayer.outcome() == replay.Replay(True, None, 50, 5)


def test_every_step_is_replayed_once(healthy):
    replayer = replay.Replayer(subject(*healthy))
    replayer.replay(20, 30)
    replayer.replay(20, 35)
    replayer.replay(25, 30)
    # The second call goes from the checkpoint again to reach step 30.
    assert replayer.steps_replayed == 10 + 15


class TestNotReproducible:
    """A replay that comes out otherwise is said to, from which step on; no step is blamed."""

    def alter(self, directory: Path, step: int, **values) -> None:
        path = directory / 'records.jsonl'
        rows = small.read_records(path)
        rows[step] |= values
        small.write_records(path, rows)

    def test_other_record(self, healthy):
        """One flipped bit at step 45 of the run that was recorded, whose loss and state were seen to be NaN at 50."""
        self.alter(healthy[-1], 45, digest='0123456789abcdef')
        self.alter(healthy[-1], 50, loss=float('nan'), finite_state=False)
        found, _ = replay.bisect(subject(*healthy))
        assert found.symptom == Symptom('nonfinite', 50)
        assert found.first_bad_step is None
        assert found.replay.first_mismatch == 45
        assert found.replay.bit_identical is False
        assert 'not reproducible from step 45 on' in found.cause.why
        assert 'two replays agree' in found.cause.why

    def test_batch_that_is_not_a_function_of_the_step(self, tmp_path):
        """A batch that depends on more than the step: here on how many were asked for."""
        calls = iter(range(10**6))

        def step(state, batch):
            return state + batch, {'loss': jnp.where(state > 1000, jnp.nan, state)}

        run = step, lambda number: np.float32(next(calls)), lambda: jnp.float32(0), tmp_path
        train(*run, checkpoint_every=20)
        found, _ = replay.bisect(subject(*run))
        assert found.symptom == Symptom('nonfinite', 46)
        assert found.first_bad_step is None
        assert found.replay.first_mismatch == 40
        assert found.cause.kind == 'nondeterminism'
        assert 'two replays disagree' in found.cause.why

    def test_what_was_only_measured_otherwise_is_not_the_hardware(self, healthy):
        """As after an upgrade that changes what a record says, and not what a step does."""
        path = healthy[-1] / 'records.jsonl'
        rows = small.read_records(path)
        rows[45]['loss'] *= 1.001
        small.write_records(path, rows)
        found, _ = replay.bisect(subject(*healthy), [detect.custom('step == 50')])
        assert found.first_bad_step is None and found.replay.first_mismatch == 45
        assert (
            found.cause.kind == 'none'
            and 'the states agree bit for bit, but loss measured' in found.cause.why
        )
        rows[45]['digest'] = '0' * 16
        small.write_records(path, rows)
        found, _ = replay.bisect(subject(*healthy), [detect.custom('step == 50')])
        assert found.cause.kind == 'hardware'

    def test_without_records_checkpoints_tell(self, tmp_path):
        """A step that isn't the one that made the checkpoints reaches the next one with another state."""
        program = small.program('lstm')
        train(program.step, program.batch_at, program.init, tmp_path, checkpoint_every=20)

        def other(state, batch):
            return program.step(state, batch._replace(targets=batch.targets * 1.001))

        found, _ = replay.bisect(
            subject(other, program.batch_at, program.init, tmp_path, records=False),
            [detect.custom('step == 50')],
        )
        assert found.first_bad_step is None
        assert found.replay.first_mismatch == 19
        assert found.cause.kind == 'program' and 'between checkpoints 0 and 20' in found.cause.why


def test_records_with_a_gap_are_not_trusted(healthy, caplog):
    path = healthy[-1] / 'records.jsonl'
    lines = path.read_text().splitlines(keepends=True)
    path.write_text(''.join(lines[:30] + lines[40:]))
    found, _ = replay.bisect(subject(*healthy), [detect.custom('step == 50')])
    assert found.first_bad_step == 50
    assert 'gaps' in caplog.text


def test_lost_checkpoints_are_named(healthy, tmp_path):
    with pytest.raises(UserError, match='no checkpoints'):
        replay.bisect(replay.subject(healthy[0], healthy[1], checkpoint.Checkpoints(tmp_path / 'none')))


def test_altered_checkpoint_is_named(healthy, tmp_path):
    """A checkpoint whose bits aren't those that were saved."""
    path = healthy[-1] / 'checkpoints' / '40' / 'meta' / 'metadata'
    path.write_text(path.read_text().replace('"state": "', '"state": "f'))
    with pytest.raises(UserError, match='altered on disk'):
        replay.Replayer(subject(*healthy)).state(45)
