"""The loop: records of every step, checkpoints, and runs that go on as if they had never stopped."""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small

from jaxrnn import tree
from jaxrnn.record import checkpoint, kept_batches, layout, loop, telemetry
from jaxrnn.record.record_file import RecordFile, encoded
from jaxrnn.types import UserError


def run(directory, network='lstm', **options):
    program = small.program(network)
    others = {name: options.pop(name) for name in ('identity', 'on_row') if name in options}
    options = loop.LoopOptions(**{'max_steps': 50, 'checkpoint_every': 20, **options})
    return loop.run(program.step, program.batch_at, program.init, directory, options, **others)


def rows(directory):
    return RecordFile(Path(directory) / 'records.jsonl').read()


def checkpoints(directory, network='lstm'):
    like = jax.eval_shape(small.program(network).init)
    return checkpoint.Checkpoints(Path(directory) / 'checkpoints', like=like)


def straight(steps: int, network: str = 'lstm'):
    """The run as a plain Python loop: records and final state."""
    program = small.program(network)
    step, state, records = jax.jit(program.step), program.init(), []
    for number in range(steps):
        state, record = step(state, program.batch_at(number))
        records.append(record)
    return state, records


@pytest.mark.parametrize('network', small.NETWORKS)
def test_the_loop_is_the_plain_loop(network, tmp_path):
    """Bit for bit, in its final state and in every record."""
    ended = run(tmp_path, network)
    state, records = straight(50, network)
    assert loop.state_digest(ended.state) == loop.state_digest(state)
    got = rows(tmp_path)
    assert [row['step'] for row in got] == list(range(50))
    for row, record in zip(got, records, strict=True):
        assert {name: np.float32(row[name]) for name in record} == {
            n: np.float32(v) for n, v in record.items()
        }
        assert row['finite_state'] is True


def test_digests_are_those_of_the_states(tmp_path):
    run(tmp_path, digest_every=20)
    got = rows(tmp_path)
    assert [row['step'] for row in got if 'digest' in row] == [19, 39]
    for step in (20, 40):
        state, _ = straight(step)
        assert (
            got[step - 1]['digest'] == loop.state_digest(state) == checkpoints(tmp_path).meta(step)['state']
        )


def test_checkpoints_hold_the_state_their_step_starts_from(tmp_path):
    run(tmp_path)
    saved = checkpoints(tmp_path)
    assert saved.steps() == [0, 20, 40, 50]
    for step in saved.steps():
        assert loop.state_digest(saved.restore(step)) == loop.state_digest(straight(step)[0])


def test_checkpoints_are_thinned(tmp_path):
    run(tmp_path, checkpoint_every=5, keep_latest=2, keep_every=20)
    assert checkpoints(tmp_path).steps() == [0, 20, 40, 45, 50]


def test_meta_names_what_the_run_was(tmp_path):
    run(tmp_path, identity={'config': 'c0ffee', 'data': 'da7a'})
    meta = checkpoints(tmp_path).meta(20)
    assert (meta['config'], meta['data'], meta['step']) == ('c0ffee', 'da7a', 20)
    assert meta['environment_details']['jax'] == jax.__version__


def test_a_step_compiles_once(tmp_path):
    traces = 0

    def step(state, batch):
        nonlocal traces
        traces += 1
        return state + batch, {'loss': state}

    loop.run(step, lambda n: np.float32(n), lambda: jnp.float32(0), tmp_path, loop.LoopOptions(max_steps=30))
    assert traces == 1


class TestResume:
    def test_continues_bit_for_bit(self, tmp_path):
        run(tmp_path / 'a', max_steps=30)
        ended = run(tmp_path / 'a', max_steps=50)
        run(tmp_path / 'b', max_steps=50)
        assert ended.resumed_from == 30
        assert rows(tmp_path / 'a') == rows(tmp_path / 'b')
        assert loop.state_digest(ended.state) == loop.state_digest(straight(50)[0])

    def test_finished_run_does_nothing(self, tmp_path):
        run(tmp_path)
        before = rows(tmp_path)
        assert run(tmp_path).step == 50
        assert rows(tmp_path) == before

    def test_half_written_line_is_dropped(self, tmp_path):
        run(tmp_path, max_steps=30)
        path = tmp_path / 'records.jsonl'
        with open(path, 'a') as file:
            file.write('{"step": 30, "lo')
        assert len(rows(tmp_path)) == 30
        run(tmp_path)
        assert [row['step'] for row in rows(tmp_path)] == list(range(50))

    def test_records_beyond_the_checkpoint_are_computed_again_and_compared(self, tmp_path):
        """As after a kill at step 47: the newest checkpoint is 40, seven records are ahead of it."""
        run(tmp_path / 'a', max_steps=47)
        (tmp_path / 'a' / 'checkpoints' / '47').rename(tmp_path / '47')
        ended = run(tmp_path / 'a')
        assert ended.resumed_from == 40 and ended.first_mismatch is None
        assert [row['step'] for row in rows(tmp_path / 'a')] == list(range(50))

    def test_a_different_record_is_noticed(self, tmp_path):
        run(tmp_path / 'a', max_steps=47)
        (tmp_path / 'a' / 'checkpoints' / '47').rename(tmp_path / '47')
        path = tmp_path / 'a' / 'records.jsonl'
        lines = small.read_records(path)
        lines[43]['loss'] *= 1.0001
        small.write_records(path, lines)
        assert run(tmp_path / 'a').first_mismatch == 43

    def test_other_identity_is_refused_and_nothing_is_touched(self, tmp_path):
        run(tmp_path, max_steps=20, identity={'config': 'a'})
        before = {path: path.read_bytes() for path in tmp_path.rglob('*') if path.is_file()}
        with pytest.raises(UserError, match=r'another config .*\(a, not b\)'):
            run(tmp_path, identity={'config': 'b'})
        assert before == {path: path.read_bytes() for path in tmp_path.rglob('*') if path.is_file()}

    def test_another_environment_is_said(self, tmp_path, monkeypatch, caplog):
        run(tmp_path, max_steps=20)
        monkeypatch.setenv('XLA_FLAGS', os.environ.get('XLA_FLAGS', '') + ' ')
        run(tmp_path, max_steps=21)
        assert 'going on in another environment (xla_flags: ' in caplog.text

    def test_remains_of_a_killed_save_are_cleared(self, tmp_path):
        run(tmp_path, max_steps=20)
        (tmp_path / 'checkpoints' / '40.orbax-checkpoint-tmp').mkdir()
        run(tmp_path)
        assert sorted(path.name for path in (tmp_path / 'checkpoints').iterdir()) == ['0', '20', '40', '50']

    def test_altered_checkpoint_is_refused(self, tmp_path):
        run(tmp_path, max_steps=20)
        for step in ('0', '20'):
            path = tmp_path / 'checkpoints' / step / 'meta' / 'metadata'
            path.write_text(path.read_text().replace('"state": "', '"state": "f'))
        with pytest.raises(UserError, match='altered on disk'):
            run(tmp_path)


class TestRecordsReachEveryCheckpoint:
    """Whatever ends a run: no step before its newest checkpoint is without a record."""

    @staticmethod
    def run(directory, batch_at, **options):
        return loop.run(
            lambda state, batch: (state + batch, {'loss': state}),
            batch_at,
            lambda: jnp.float32(0),
            directory,
            loop.LoopOptions(**{'max_steps': 12, 'checkpoint_every': 5, **options}),
        )

    @pytest.mark.parametrize('at', [3, 5])
    def test_a_batch_that_fails(self, at, tmp_path):
        def batch_at(step):
            if step == at:
                raise RuntimeError('no batch')
            return np.float32(step)

        with pytest.raises(RuntimeError, match='no batch'):
            self.run(tmp_path, batch_at)
        assert [row['step'] for row in rows(tmp_path)] == list(range(at))

    def test_a_checkpoint_that_fails(self, tmp_path, monkeypatch):
        def save(writer, step, state, meta):
            assert [row['step'] for row in rows(tmp_path)] == list(range(step))
            if step:
                raise UserError('no room')

        monkeypatch.setattr(checkpoint.Writer, 'save', save)
        with pytest.raises(UserError, match='no room'):
            self.run(tmp_path, np.float32)
        assert len(rows(tmp_path)) == 5

    def test_a_record_that_fails_is_not_written_twice_and_none_after_it(self, tmp_path):
        def ends(row):
            if row['step'] == 7:
                raise KeyboardInterrupt
            return False

        with pytest.raises(KeyboardInterrupt):
            loop.run(
                lambda state, batch: (state + batch, {'loss': state}), np.float32, lambda: jnp.float32(0), tmp_path,
                loop.LoopOptions(max_steps=12, checkpoint_every=5), on_row=ends,
            )  # fmt: skip
        assert [row['step'] for row in rows(tmp_path)] == list(range(8))

    def test_killed_while_a_batch_is_made(self, tmp_path):
        code = [sys.executable, '-c', SLOW_BATCH, str(tmp_path)]
        with subprocess.Popen(code, cwd=Path(__file__).parent.parent, stdout=subprocess.PIPE) as process:
            assert process.stdout is not None and process.stdout.readline() == b'waiting\n'
            _wait_for(tmp_path / 'checkpoints' / '5')
            process.kill()
        assert [row['step'] for row in rows(tmp_path)] == list(range(5))


SLOW_BATCH = """
import sys, time
sys.path.insert(0, 'tests')
import loop_test
def batch_at(step):
    if step == 5:
        print('waiting', flush=True)
        time.sleep(100)
    return loop_test.np.float32(step)
loop_test.TestRecordsReachEveryCheckpoint.run(sys.argv[1], batch_at)
"""


def _wait_for(path: Path) -> None:
    until = time.monotonic() + 60
    while not path.exists():
        assert time.monotonic() < until, f'{path} never came'
        time.sleep(0.01)


@pytest.fixture(scope='module')
def finished(tmp_path_factory):
    """A run of 50 steps, with a checkpoint at every 10th."""
    directory = tmp_path_factory.mktemp('finished')
    run(directory, checkpoint_every=10)
    return directory


class TestGaps:
    """Records that are missing before the checkpoint that a run goes on from."""

    @staticmethod
    def lose(directory, lost):
        path = directory / 'records.jsonl'
        lines = path.read_text().splitlines(keepends=True)
        path.write_text(''.join(line for step, line in enumerate(lines) if step not in lost))

    def again(self, finished, tmp_path, lost, without=(), **options):
        """The run without the records of some steps, and without some checkpoints, gone on with."""
        shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
        for step in without:
            shutil.rmtree(tmp_path / 'checkpoints' / str(step))
        self.lose(tmp_path, lost)
        return run(tmp_path, checkpoint_every=10, **options)

    @pytest.mark.parametrize(
        ('lost', 'says'),
        [
            ({49}, 'step 49'),
            ({13, 14, 15}, 'steps 13 to 15'),
            ({0, 9, 12, *range(18, 33)}, 'steps 0, 9, 12, 18 to 32'),
            (set(range(50)), 'steps 0 to 49'),
        ],
    )
    def test_are_computed_again(self, lost, says, finished, tmp_path, caplog):
        self.again(finished, tmp_path, lost, max_steps=52)
        assert [record.getMessage() for record in caplog.records] == [
            f'the records of {says} are missing: computing them again, from the checkpoints before them'
        ]
        assert rows(tmp_path)[:50] == rows(finished) and len(rows(tmp_path)) == 52

    def test_without_a_checkpoint_before_them_it_is_said(self, finished, tmp_path, caplog):
        self.again(finished, tmp_path, {13, 25}, without=(0, 10))
        assert [record.getMessage() for record in caplog.records] == [
            'the records of step 13 are missing for good: no checkpoint before them is left',
            'the records of step 25 are missing: computing them again, from the checkpoints before them',
        ]
        assert [row['step'] for row in rows(tmp_path)] == [*range(13), *range(14, 50)]

    def test_of_a_run_that_comes_out_otherwise_stay(self, finished, tmp_path, caplog):
        """What is computed is held against the records around it, and no other is put in their place."""
        shutil.copytree(finished, tmp_path / 'a')
        path = tmp_path / 'a' / 'records.jsonl'
        lines = small.read_records(path)
        lines[12]['loss'] *= 1.0001
        small.write_records(path, lines)
        self.again(tmp_path / 'a', tmp_path / 'b', {14, 31})
        assert 'step 14 stay missing: computed again, step 12 comes out otherwise' in caplog.text
        assert [row['step'] for row in rows(tmp_path / 'b')] == [*range(14), *range(15, 50)]

    def test_are_held_against_the_next_checkpoint(self, finished, tmp_path, caplog, monkeypatch):
        program, made = small.program('lstm'), small.program
        batch_at = lambda n: program.batch_at(n if n != 15 else 3)  # noqa: E731
        monkeypatch.setattr(small, 'program', lambda network: made(network)._replace(batch_at=batch_at))
        self.again(finished, tmp_path, set(range(12, 22)))
        assert 'stay missing: computed again, step 19 comes out otherwise' in caplog.text


class TestDamagedCheckpoints:
    """A run goes on from the newest checkpoint that is what it was, and keeps those that aren't aside."""

    @pytest.fixture
    def copy(self, finished, tmp_path):
        shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
        return tmp_path

    @staticmethod
    def truncate(checkpoint):
        for path in (checkpoint / 'state').rglob('*'):
            if path.is_file():
                path.write_bytes(path.read_bytes()[:10])

    @staticmethod
    def put(name, checkpoint):
        """State or meta of the checkpoint of step 20."""
        shutil.rmtree(checkpoint / name)
        shutil.copytree(checkpoint.parent / '20' / name, checkpoint / name)

    def damage(self, how, checkpoint):
        match how:
            case 'truncated':
                self.truncate(checkpoint)
            case 'state of another step':
                self.put('state', checkpoint)
            case 'state of another step, no meta':
                self.put('state', checkpoint)
                shutil.rmtree(checkpoint / 'meta')
            case 'all of another step':
                self.put('state', checkpoint)
                self.put('meta', checkpoint)
            case 'no state':
                shutil.rmtree(checkpoint / 'state')

    HOWS = (
        'truncated',
        'state of another step',
        'state of another step, no meta',
        'all of another step',
        'no state',
    )

    @pytest.mark.parametrize('how', HOWS)
    def test_an_older_one_is_gone_on_from(self, how, copy, caplog):
        self.damage(how, copy / 'checkpoints' / '50')
        ended = run(copy, checkpoint_every=10, max_steps=55)
        assert ended.resumed_from == 40 and ended.first_mismatch is None
        assert loop.state_digest(ended.state) == loop.state_digest(straight(55)[0])
        (said,) = (record.getMessage() for record in caplog.records)
        assert said.startswith('going on from the checkpoint of step 40: that of step 50 is damaged (')
        assert said.endswith('), and kept as 50.damaged') and '\n' not in said
        assert sorted(path.name for path in (copy / 'checkpoints').iterdir()) == sorted(
            ['50.damaged', *map(str, range(0, 60, 10)), '55']
        )
        assert [row['step'] for row in rows(copy)] == list(range(55))

    def test_none_that_was_kept_aside_is_written_over(self, copy):
        for _ in range(3):
            self.truncate(copy / 'checkpoints' / '50')
            run(copy, checkpoint_every=10)
        asides = [f'50.damaged{more}' for more in ('', '.2', '.3')]
        assert all((copy / 'checkpoints' / name / 'state').is_dir() for name in asides)
        assert checkpoints(copy).steps() == [0, 10, 20, 30, 40, 50]

    def test_several_and_one_lost_between_them(self, copy, caplog):
        """What is lost is written again when the run passes it."""
        for step in (30, 50):
            self.truncate(copy / 'checkpoints' / str(step))
        shutil.rmtree(copy / 'checkpoints' / '40')
        assert run(copy, checkpoint_every=10).resumed_from == 20
        assert 'those of steps 30, 50 are damaged (' in caplog.text
        assert 'kept as 30.damaged, 50.damaged' in caplog.text
        for step in (30, 40, 50):
            assert loop.state_digest(checkpoints(copy).restore(step)) == checkpoints(copy).meta(step)['state']

    def test_without_an_intact_one_nothing_is_touched(self, copy):
        for path in (copy / 'checkpoints').iterdir():
            self.truncate(path)
        before = {path: path.read_bytes() for path in copy.rglob('*') if path.is_file()}
        with pytest.raises(UserError, match=r"checkpoints/50/state: the checkpoint can't be read"):
            run(copy)
        assert before == {path: path.read_bytes() for path in copy.rglob('*') if path.is_file()}

    @pytest.mark.parametrize('how', ['no meta', 'meta of another step', 'damaged meta'])
    def test_a_record_vouches_for_a_state(self, how, copy, caplog):
        newest = copy / 'checkpoints' / '50'
        if how == 'meta of another step':
            self.put('meta', newest)
        elif how == 'damaged meta':
            (newest / 'meta' / 'metadata').write_text('{')
        else:
            shutil.rmtree(newest / 'meta')
        ended = run(copy, checkpoint_every=10, max_steps=55)
        assert ended.resumed_from == 50 and not caplog.records
        assert loop.state_digest(ended.state) == loop.state_digest(straight(55)[0])

    def test_one_with_neither_digest_is_as_somebody_elses(self, tmp_path, caplog):
        run(tmp_path, max_steps=20, digest_every=1000)
        shutil.rmtree(tmp_path / 'checkpoints' / '20' / 'meta')
        assert run(tmp_path, max_steps=21, digest_every=1000).resumed_from == 20
        assert [record.getMessage() for record in caplog.records] == [
            f'{tmp_path}/checkpoints/20: no digest says whether this checkpoint is of this run, or is still what it was'
        ]

    def test_one_of_another_step_that_no_record_vouches_for_is_damaged(self, tmp_path, caplog):
        run(tmp_path, max_steps=40, digest_every=1000)
        self.damage('all of another step', tmp_path / 'checkpoints' / '40')
        assert run(tmp_path, max_steps=41, digest_every=1000).resumed_from == 20
        assert 'its meta is of step 20' in caplog.text

    @pytest.mark.parametrize('how', ['no meta', 'damaged meta'])
    def test_identity_is_asked_of_another_meta(self, how, tmp_path):
        run(tmp_path, max_steps=40, identity={'config': 'a'})
        meta = tmp_path / 'checkpoints' / '40' / 'meta'
        if how == 'no meta':
            shutil.rmtree(meta)
        else:
            (meta / 'metadata').write_text('{')
        with pytest.raises(UserError, match=r'another config .*\(a, not b\)'):
            run(tmp_path, identity={'config': 'b'})

    def test_a_gap_is_not_filled_from_a_damaged_one(self, copy, caplog):
        self.truncate(copy / 'checkpoints' / '20')
        TestGaps.lose(copy, {25})
        assert run(copy, checkpoint_every=10).resumed_from == 50
        assert (
            'the records of step 25 stay missing: ' in caplog.text
            and "20/state: the checkpoint can't" in caplog.text
        )


NAMES = (
    'x[0]', 'lr=[0.1]', '[!a]', 'a*b', 'q?', '~', 'two words', 'a\nline', 'ünïcode 漢字', 'back\\slash', '{a,b}', '%41',
    '#h', '$HOME', 'gs:', '-dash', 'quo\'te"', '\udcff', '\x01', 'x' * 255,
)  # fmt: skip


class TestAnyName:
    """A run's directory may be called anything that a file system takes."""

    @staticmethod
    def run(directory, stop):
        step = lambda state, batch: ({'w': state['w'] + batch}, {'loss': state['w'][0]})  # noqa: E731
        options = loop.LoopOptions(max_steps=stop, checkpoint_every=5)
        return loop.run(step, np.float32, lambda: {'w': jnp.zeros(3)}, directory, options)

    @pytest.mark.parametrize('name', NAMES, ids=ascii)
    def test_is_saved_to_and_gone_on_from(self, name, tmp_path):
        self.run(tmp_path / name, 10)
        ended = self.run(tmp_path / name, 15)
        assert ended.resumed_from == 10 and ended.state['w'].tolist() == [105] * 3
        assert [path.name for path in tmp_path.iterdir()] == [name]
        assert checkpoint.Checkpoints(tmp_path / name / 'checkpoints').meta(15)['step'] == 15

    def test_as_a_folder_above_it(self, tmp_path):
        self.run(tmp_path / 'x[0]' / 'run', 10)
        assert self.run(tmp_path / 'x[0]' / 'run', 15).resumed_from == 10

    def test_in_a_working_directory_of_that_name(self, tmp_path, monkeypatch):
        (tmp_path / 'x[0]').mkdir()
        monkeypatch.chdir(tmp_path / 'x[0]')
        self.run('run', 10)
        assert self.run('run', 15).resumed_from == 10

    @pytest.mark.parametrize('name', ['x' * 256, 'nul\0'])
    def test_what_a_file_system_does_not_take_is_refused(self, name, tmp_path):
        with pytest.raises(UserError, match='--run_dir: '):
            self.run(tmp_path / name, 10)

    def test_without_a_plain_folder_for_temporary_files_it_is_refused(self, tmp_path, monkeypatch):
        (tmp_path / 'tmp[0]').mkdir()
        monkeypatch.setattr(tempfile, 'tempdir', str(tmp_path / 'tmp[0]'))
        with pytest.raises(UserError, match='TMPDIR'):
            self.run(tmp_path / 'x[0]', 10)
        self.run(tmp_path / 'plain', 10)

    def test_nothing_is_left_elsewhere(self, tmp_path, monkeypatch):
        (tmp_path / 'tmp').mkdir()
        monkeypatch.setattr(tempfile, 'tempdir', str(tmp_path / 'tmp'))
        self.run(tmp_path / 'x[0]', 10)
        assert list((tmp_path / 'tmp').iterdir()) == []


class TestReadBack:
    """The first checkpoint that a process saves is read back before the next step."""

    @staticmethod
    def damaging(monkeypatch, damage):
        save, begun = checkpoint.Writer.save, []

        def damaged(writer, step, state, meta):
            done = save(writer, step, state, meta)
            writer.wait()
            damage(writer.directory / str(step))
            begun.append(step)
            return done

        monkeypatch.setattr(checkpoint.Writer, 'save', damaged)
        return begun

    def test_one_that_can_not_be_read(self, tmp_path, monkeypatch):
        begun = self.damaging(monkeypatch, TestDamagedCheckpoints.truncate)
        with pytest.raises(
            UserError, match=r"checkpoints/0/state: the checkpoint can't be read .* just been written"
        ):
            run(tmp_path)
        assert begun == [0] and not rows(tmp_path)

    def test_one_of_another_state(self, tmp_path, monkeypatch):
        run(tmp_path, max_steps=20)
        begun = self.damaging(
            monkeypatch,
            lambda path: path.name == '40' and shutil.copytree(path.parent / '20', path, dirs_exist_ok=True),
        )
        with pytest.raises(UserError, match=r'checkpoints/40: .* just been written'):
            run(tmp_path)
        assert begun == [20, 40]

    def test_no_other_is(self, tmp_path, monkeypatch):
        read, restore = [], checkpoint.Checkpoints.restore
        monkeypatch.setattr(
            checkpoint.Checkpoints, 'restore', lambda self, step: (read.append(step), restore(self, step))[1]
        )
        run(tmp_path)
        assert read == [0]


class TestBadDirectory:
    def test_in_use(self, tmp_path):
        with layout.locked(layout.Paths(tmp_path)), pytest.raises(UserError, match='in use'):
            run(tmp_path)

    def test_is_a_file(self, tmp_path):
        (tmp_path / 'file').write_text('')
        with pytest.raises(UserError, match='--run_dir'):
            run(tmp_path / 'file')

    def test_truncated_checkpoint(self, tmp_path):
        run(tmp_path, max_steps=20)
        for step in ('0', '20'):
            TestDamagedCheckpoints.truncate(tmp_path / 'checkpoints' / step)
        with pytest.raises(UserError, match="checkpoint can't be read"):
            run(tmp_path)

    def test_checkpoint_of_another_network(self, tmp_path):
        run(tmp_path, 'lstm', max_steps=20)
        with pytest.raises(UserError, match="checkpoint can't be read"):
            run(tmp_path, 'stacked', max_steps=20)

    def test_damaged_record_is_named_with_its_line(self, tmp_path):
        run(tmp_path, max_steps=20)
        path = tmp_path / 'records.jsonl'
        lines = path.read_text().splitlines(keepends=True)
        path.write_text(''.join([*lines[:5], 'garbage\n', *lines[6:]]))
        with pytest.raises(UserError, match='line 6'):
            rows(tmp_path)


def test_disk_without_room_for_a_checkpoint(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint.shutil, 'disk_usage', lambda path: type('Usage', (), {'free': 100}))
    with pytest.raises(UserError, match='the disk has 0 MB free'):
        run(tmp_path)


FILE_SIZE_LIMIT = """
import resource, sys
sys.path.insert(0, 'tests')
import loop_test
loop_test.small.program('lstm')
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]),) * 2)
try:
    loop_test.run(sys.argv[1], max_steps=50)
except loop_test.UserError as error:
    print('refused:', error)
"""


@pytest.mark.parametrize(('limit', 'says'), [(10_000, 'records.jsonl'), (1500, 'checkpoint')])
def test_writes_that_the_system_refuses(limit, says, tmp_path):
    """A real refusal in the middle of a write, as of a full disk: one line, and the run can be resumed."""
    root = Path(__file__).parent.parent
    code = [sys.executable, '-c', FILE_SIZE_LIMIT, str(tmp_path), str(limit)]
    environ = {**os.environ, 'JAX_ENABLE_COMPILATION_CACHE': 'false'}  # or its files would be refused first
    out = subprocess.run(code, capture_output=True, text=True, cwd=root, env=environ, timeout=120)
    assert 'refused:' in out.stdout and says in out.stdout, out.stdout + out.stderr
    assert len(out.stdout.splitlines()) == 1
    ended = run(tmp_path)
    assert loop.state_digest(ended.state) == loop.state_digest(straight(50)[0])


NO_FOLDER = """
import errno, os, sys
sys.path.insert(0, 'tests')
import loop_test
loop_test.small.program('lstm')
mkdir = os.mkdir
def full(path, *others, **named):
    if sys.argv[2] in str(path):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)
    mkdir(path, *others, **named)
os.mkdir = full
try:
    loop_test.run(sys.argv[1], max_steps=50)
except loop_test.UserError as error:
    print('refused:', error)
"""


@pytest.mark.parametrize('folder', ['', '/meta', '/state'])
def test_a_disk_that_is_full_inside_a_checkpoint_ends_the_process_with_one_line(folder, tmp_path):
    code = [sys.executable, '-c', NO_FOLDER, str(tmp_path), f'20.orbax-checkpoint-tmp{folder}']
    environ = {**os.environ, 'JAX_ENABLE_COMPILATION_CACHE': 'false'}
    root = Path(__file__).parent.parent
    out = subprocess.run(code, capture_output=True, text=True, cwd=root, env=environ, timeout=60)
    assert out.stdout.startswith('refused: ') and out.stdout.count('\n') == 1, out.stdout
    assert out.stderr == ''


def test_on_row_sees_every_record_and_can_end_the_run(tmp_path):
    seen = []

    def look(row):
        seen.append(row['step'])
        return row['step'] == 27

    ended = run(tmp_path, on_row=look)
    # The record of a step is read while the next one runs: one more is done, and recorded.
    assert ended.step == 29 and seen == list(range(29))
    assert checkpoints(tmp_path).steps()[-1] == 29


@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT])
def test_signal_saves_and_resumes(number, tmp_path):
    def interrupt(row):
        if row['step'] == 23:
            os.kill(os.getpid(), number)
        return False

    handler = signal.getsignal(number)
    ended = run(tmp_path, on_row=interrupt)
    assert ended.interrupted == number and 24 <= ended.step <= 26
    assert signal.getsignal(number) is handler
    assert checkpoints(tmp_path).steps()[-1] == ended.step
    assert loop.state_digest(run(tmp_path).state) == loop.state_digest(straight(50)[0])


def test_nan_is_recorded_in_standard_json(tmp_path):
    def step(state, batch):
        return state + 1, {'loss': jnp.where(state == 3, jnp.nan, jnp.inf), 'minus': -jnp.inf}

    loop.run(step, lambda n: 0, lambda: jnp.float32(0), tmp_path, loop.LoopOptions(max_steps=5))
    lines = (tmp_path / 'records.jsonl').read_text().splitlines()
    values = [json.loads(line, parse_constant=pytest.fail) for line in lines]
    assert (
        values[3]['loss'] == 'NaN' and values[2]['loss'] == 'Infinity' and values[2]['minus'] == '-Infinity'
    )
    assert np.isnan(rows(tmp_path)[3]['loss']) and rows(tmp_path)[2]['minus'] == -np.inf


def test_record_of_any_structure(tmp_path):
    def step(state, batch):
        return state, {
            'loss': jnp.bfloat16(1.5),
            'nested': {'count': jnp.int32(3), 'flags': [jnp.array(True)]},
        }

    loop.run(step, lambda n: 0, lambda: jnp.float32(0), tmp_path, loop.LoopOptions(max_steps=1))
    row = rows(tmp_path)[0]
    assert row['loss'] == 1.5 and row['nested_count'] == 3 and row['nested_flags_0'] is True


def test_record_that_is_no_scalar_is_refused(tmp_path):
    with pytest.raises(UserError, match=r'scalars expected, wide \(3,\) found'):
        loop.run(
            lambda state, batch: (state, {'wide': jnp.zeros(3)}),
            lambda n: 0,
            lambda: jnp.float32(0),
            tmp_path,
            loop.LoopOptions(max_steps=1),
        )


@pytest.mark.parametrize('name', sorted(telemetry.RESERVED))
def test_a_field_of_a_reserved_name_is_kept_under_another(name, tmp_path):
    def step(x, batch):
        return x + 1, {name: x + 100, 'loss': x}

    loop.run(step, lambda n: 0, lambda: 0.0, tmp_path, loop.LoopOptions(max_steps=5))
    got = rows(tmp_path)
    assert [row['step'] for row in got] == list(range(5))
    assert [row[f'record_{name}'] for row in got] == [100, 101, 102, 103, 104]
    assert all(row['finite_state'] is True and len(row['digest']) == 16 for row in got)


@pytest.mark.parametrize(
    ('record', 'says'),
    [
        ({'a/b': 1.0, 'a_b': 2.0}, "'a/b' and 'a_b' would both be recorded as 'a_b'"),
        ({'a/b': 1.0, 'a': {'b': 2.0}}, "'a/b' and 'a/b' would both"),
        (
            {'step': 1.0, 'record_step': 2.0},
            "'record_step' and 'step' would both be recorded as 'record_step'",
        ),
    ],
)
def test_two_fields_of_one_name_are_refused(record, says, tmp_path):
    with pytest.raises(UserError, match=says):
        loop.run(
            lambda x, batch: (x, record), lambda n: 0, lambda: 0.0, tmp_path, loop.LoopOptions(max_steps=1)
        )


class TestSharedBuffers:
    """A step donates its state: each buffer once, and none that somebody else still has."""

    @staticmethod
    def step(state, batch):
        w = state['w'] + batch
        return {**state, 'w': w, 'average': 0.5 * (state['average'] + w)}, {'loss': w.sum()}

    def test_twice_in_the_state(self, tmp_path):
        def init():
            w, key = jnp.zeros(3), jax.random.key(1)
            again = jax.device_put(w, jax.local_devices()[0])  # another array, the same buffer
            return {'w': w, 'average': w, 'again': again, 'key': key, 'keys': (key, key)}

        options = loop.LoopOptions(max_steps=4)
        ended = loop.run(self.step, lambda n: 1.0, init, tmp_path, options)
        assert ended.state['w'].tolist() == [4, 4, 4]
        np.testing.assert_array_equal(ended.state['average'], 49 / 16)

    def test_what_made_the_state_keeps_it(self, tmp_path):
        w, data = jnp.zeros(3), jnp.ones(3)
        run = self.step, lambda n: data, lambda: {'w': w, 'average': w, 'data': data}
        for name in ('one', 'two'):
            ended = loop.run(*run, tmp_path / name, loop.LoopOptions(max_steps=4))
            assert ended.state['w'].tolist() == [4, 4, 4] and w.tolist() == [0, 0, 0]

    def test_where_a_replay_starts(self, tmp_path):
        w = jnp.ones(3)
        _, state = loop.advance(
            telemetry.instrument(self.step), lambda n: 1.0, {'w': w, 'average': w}, 3, 5, digest_every=1,
            put=lambda row: None,
        )  # fmt: skip
        assert state['w'].tolist() == [3, 3, 3]

    def test_only_what_is_shared_is_copied(self):
        w = jnp.ones(3)
        state = loop.unshared({'a': w, 'b': w, 'c': jnp.ones(3)})
        assert state['a'] is w and state['b'] is not w and state['b'].tolist() == [1, 1, 1]


def _dividing(state, batch):
    return state + 1, {'loss': 1.0 / (state - 7)}


def test_checkify_names_the_operation(tmp_path):
    loop.run(
        _dividing,
        lambda n: 0,
        lambda: jnp.float32(0),
        tmp_path,
        loop.LoopOptions(max_steps=10, checkify=True),
    )
    assert [row['step'] for row in rows(tmp_path) if 'checkify' in row] == [7]
    assert 'division by zero' in rows(tmp_path)[7]['checkify']


def test_debug_nans_ends_at_the_step(tmp_path):
    def step(state, batch):
        return state + 1, {'loss': jnp.log(7.5 - state)}

    ended = loop.run(
        step, lambda n: 0, lambda: jnp.float32(0), tmp_path, loop.LoopOptions(max_steps=20, debug_nans=True)
    )
    got = rows(tmp_path)
    assert ended.step == 8 and float(ended.state) == 8
    assert [row['step'] for row in got] == list(range(9))
    assert 'log' in got[8]['debug_nans'] and np.isnan(got[8]['loss'])


@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16, jnp.float16])
def test_records_read_back_to_the_same_bits(dtype):
    rng = np.random.default_rng(0)
    values = np.concatenate([rng.normal(size=200) * 10.0 ** rng.integers(-30, 30, 200), [0.0, -0.0, 1e-40]])
    with np.errstate(over='ignore'):
        values = values.astype(dtype)
    for value in values:
        observation = telemetry.Observation(
            {'x': jnp.asarray(value), 'digest': jnp.zeros(2, jnp.uint32)}, None
        )
        back = json.loads(json.dumps(encoded(telemetry.row(0, observation))))['x']
        back = {'Infinity': np.inf, '-Infinity': -np.inf}.get(back, back)
        assert np.asarray(back, dtype).tobytes() == np.asarray(value).tobytes()


def test_state_tree_survives_jit():
    """No field is lost or changed on the way through a compiled function."""
    state = small.program('stacked').init()
    through = jax.jit(lambda x: x)(state)
    assert jax.tree.structure(through) == jax.tree.structure(state)
    assert loop.state_digest(through) == loop.state_digest(state)
    after = jax.jit(small.program('stacked').step)(state, small.program('stacked').batch_at(0))[0]
    assert jax.tree.structure(after) == jax.tree.structure(state)
    assert 'params/lower/kernel' in tree.named_leaves(state)


KILLED = """
import sys
sys.path.insert(0, 'tests')
import loop_test
loop_test.run(sys.argv[1], 'stacked', max_steps=2000, checkpoint_every=50, keep_latest=3, keep_every=1000)
print('done')
"""
KILLS, QUICK = 25, 6
"""With --full, and without."""


def test_killed_at_random_moments_ends_as_if_never_killed(tmp_path, full):
    """SIGKILL; the final state and every record are bit for bit those of a run in one go."""
    root = Path(__file__).parent.parent
    code = [sys.executable, '-c', KILLED, str(tmp_path / 'killed')]
    # Saves compiling each time; what is compiled is the same.
    cache = {
        'JAX_COMPILATION_CACHE_DIR': str(tmp_path / 'cache'),
        'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0',
    }
    environ = {**os.environ, **cache}
    rng = np.random.default_rng(0)
    kills, wanted = 0, KILLS if full else QUICK
    while kills < wanted:
        process = subprocess.Popen(
            code, cwd=root, env=environ, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        _wait_for_steps(tmp_path / 'killed', process)
        time.sleep(rng.uniform(0, 0.3))
        if process.poll() is None:
            process.kill()
            kills += 1
        out, errors = process.communicate()
        if 'done' in out:  # it got to the end between two kills: begin again
            assert kills >= QUICK, errors
            break
        assert not errors or process.returncode == -signal.SIGKILL, errors
    final = subprocess.run(code, cwd=root, env=environ, capture_output=True, text=True, check=True)
    assert 'done' in final.stdout
    run(tmp_path / 'straight', 'stacked', max_steps=2000, checkpoint_every=50)
    assert rows(tmp_path / 'killed') == rows(tmp_path / 'straight')
    last = checkpoints(tmp_path / 'killed', 'stacked').restore(2000)
    assert loop.state_digest(last) == loop.state_digest(
        checkpoints(tmp_path / 'straight', 'stacked').restore(2000)
    )
    assert kills == wanted


def _wait_for_steps(directory: Path, process: subprocess.Popen) -> None:
    """Until the process has begun to train, or a little sooner in a third of the cases."""
    before = _size(directory)
    while process.poll() is None and _size(directory) == before:
        time.sleep(0.01)


def _size(directory: Path) -> int:
    path = directory / 'records.jsonl'
    return path.stat().st_size if path.exists() else 0


def test_a_batch_that_is_left_out_does_not_come_again(tmp_path):
    """After the last of those that were kept the first come again: of a batch that is left out, nor then."""
    writer = kept_batches.BatchWriter(tmp_path)
    for number in range(3, 7):
        writer.put(number, number)
    writer.close()
    kept = kept_batches.KeptBatches(tmp_path, steps=7)
    assert [kept(number) for number in range(4, 12)] == [4, 5, 6, 3, 4, 5, 6, 3]
    without = loop.without(kept, {5})
    assert [without(number) for number in range(4, 12)] == [4, 4, 6, 3, 4, 4, 6, 3]
