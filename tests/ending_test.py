"""A run that nobody watches: signals, its time, and a step that never ends."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import small

from jaxrnn.record import checkpoint, ending, loop, watchdog
from jaxrnn.record.record_file import RecordFile
from jaxrnn.words import data

ROOT = Path(__file__).parent.parent
STEPS = 30
PATIENCE = 300
"""Seconds, on a machine that has much else to do."""


def step(state, batch):
    w = state['w'] * 1.01 + batch
    return {'w': w}, {'loss': w.sum()}


def run(directory, batch_at=np.float32, on_row=lambda row: False, **options):
    return loop.run(
        step, batch_at, lambda: {'w': jnp.ones(5)}, directory,
        loop.LoopOptions(**{'max_steps': STEPS, 'checkpoint_every': 10, **options}), on_row=on_row,
    )  # fmt: skip


def rows(directory):
    return RecordFile(Path(directory) / 'records.jsonl').read()


def saved(directory):
    return checkpoint.Checkpoints(Path(directory) / 'checkpoints').steps()


@pytest.fixture(scope='module')
def straight(tmp_path_factory):
    """A run that never stopped: its directory, and the digest of its last state."""
    directory = tmp_path_factory.mktemp('straight')
    return directory, loop.state_digest(run(directory).state)


def check_same(directory, ended, straight):
    assert ended.step == STEPS and loop.state_digest(ended.state) == straight[1]
    assert rows(directory) == rows(straight[0])


def sends(number, at):
    """Sends a signal when the record of a step comes."""

    def on_row(row):
        if row['step'] == at:
            os.kill(os.getpid(), number)
        return False

    return on_row


@pytest.fixture(autouse=True)
def hanging_up_is_not_ignored():
    """As it is where the tests themselves run under nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


class TestSignals:
    def test_hanging_up_saves_and_ends(self, tmp_path, straight):
        handler = signal.getsignal(signal.SIGHUP)
        ended = run(tmp_path, on_row=sends(signal.SIGHUP, 13))
        assert ended.interrupted == signal.SIGHUP and 14 <= ended.step <= 16
        assert signal.getsignal(signal.SIGHUP) is handler and saved(tmp_path)[-1] == ended.step
        check_same(tmp_path, run(tmp_path), straight)

    def test_under_nohup_it_goes_on(self, tmp_path, straight):
        handler = signal.signal(signal.SIGHUP, signal.SIG_IGN)
        try:
            check_same(tmp_path, run(tmp_path, on_row=sends(signal.SIGHUP, 13)), straight)
        finally:
            signal.signal(signal.SIGHUP, handler)

    def test_sigusr1_saves_and_goes_on(self, tmp_path, straight):
        """At an odd step, which changes no bit; it can be gone on from as from any other."""
        ended = run(tmp_path, on_row=sends(signal.SIGUSR1, 12))
        (odd,) = set(saved(tmp_path)) - {0, 10, 20, 30}
        assert ended.interrupted is None and 13 <= odd <= 15
        check_same(tmp_path, ended, straight)
        for step in (20, 30):
            shutil.rmtree(tmp_path / 'checkpoints' / str(step))
        again = run(tmp_path)
        assert again.resumed_from == odd and again.first_mismatch is None
        check_same(tmp_path, again, straight)


class TestTime:
    def test_a_step_is_done_whatever_the_time(self, tmp_path, straight):
        """So that a run of too short jobs gets on."""
        for done in range(1, 5):
            ended = run(tmp_path, max_minutes=1e-9)
            assert (ended.step, ended.timed_out, ended.interrupted) == (done, True, None)
            assert saved(tmp_path)[-1] == done
        ended = run(tmp_path)
        assert not ended.timed_out
        check_same(tmp_path, ended, straight)

    def test_it_ends_after_the_step_into_which_they_fall(self, tmp_path, monkeypatch):
        now = [100.0]
        monkeypatch.setattr(ending.time, 'monotonic', lambda: now[0])

        def batch_at(number):
            now[0] += 60  # a minute a step
            return np.float32(number)

        assert run(tmp_path, batch_at, max_minutes=4.5).step == 5
        assert len(rows(tmp_path)) == 5

    def test_one_that_is_done_in_time_is_not_timed_out(self, tmp_path):
        assert not run(tmp_path, max_minutes=10).timed_out

    def test_it_is_no_part_of_what_a_run_is(self):
        config = small.configuration()
        changed = config.changed(max_minutes=5.0, step_timeout=60.0)
        assert changed.digest() == config.digest() and not config.differences(changed)


HANGS = """
import os, re, signal, subprocess, sys, threading, time
sys.path.insert(0, 'tests')
import ending_test, jax
from jaxrnn.record import checkpoint
from jaxrnn.types import Staged

forever = threading.Event().wait

def batch(do):
    return {'batch_at': lambda number: (do() if number == 5 else None, ending_test.np.float32(number))[1]}

def save(writer, step, *others, first=checkpoint.Writer.save):
    return forever() if step == 10 else first(writer, step, *others)

def hang_saving():
    checkpoint.Writer.save = save
    return {}

def hang_computing():
    def step(state, batch):
        jax.debug.callback(lambda batch: forever() if batch == 5 else None, batch)
        return ending_test.step.first(state, batch)
    step.first, ending_test.step = ending_test.step, step
    step.first.first = step.first
    return {}

KINDS = {
    'batch': lambda: batch(forever),
    'locked': lambda: batch(lambda: re.match('(a+)+$', 'a' * 60 + 'b')),  # which holds the interpreter's lock
    'ignoring': lambda: signal.signal(signal.SIGALRM, signal.SIG_IGN) and {} or batch(forever),
    'saving': hang_saving,
    'computing': hang_computing,
    'record': lambda: {'on_row': lambda row: forever() if row['step'] == 5 else False},
    'stopped': lambda: batch(lambda: os.kill(os.getpid(), signal.SIGSTOP)),
    'killed': lambda: batch(lambda: os.kill(os.getpid(), signal.SIGKILL)),
}
pids = {}
for kind in KINDS:
    if pid := os.fork():
        pids[kind] = pid
        continue
    break
else:
    os.waitpid(pids['stopped'], os.WUNTRACED)
    time.sleep(9)
    os.kill(pids['stopped'], signal.SIGCONT)
    for kind, pid in pids.items():
        print(kind, os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
    sys.exit()
directory = f'{sys.argv[1]}/{kind}'
os.makedirs(directory)
os.dup2(os.open(f'{directory}/said', os.O_CREAT | os.O_WRONLY), 2)
begin = subprocess.Popen
def noted(*arguments, **named):
    process = begin(*arguments, **named)
    with open(f'{directory}/watching', 'w') as file:
        file.write(str(process.pid))
    return process
subprocess.Popen = noted
# On a busy machine nothing else may take so long; the one that is stopped goes on to save.
ending_test.run(directory, **KINDS[kind](), step_timeout=7 if kind == 'stopped' else 4)
"""


@pytest.fixture(scope='module')
def hung(tmp_path_factory):
    """Processes that hang in many ways; where, and their exit codes."""
    directory = tmp_path_factory.mktemp('hung')
    environ = {**os.environ, 'JAX_ENABLE_COMPILATION_CACHE': 'false'}
    code = [sys.executable, '-c', HANGS, directory]
    done = subprocess.run(code, capture_output=True, text=True, cwd=ROOT, env=environ, timeout=PATIENCE)
    assert done.returncode == 0 and done.stderr == '', done.stderr
    return directory, {kind: int(code) for kind, code in map(str.split, done.stdout.splitlines())}


class TestHangs:
    @pytest.mark.parametrize(
        ('kind', 'number', 'says', 'records'),
        [
            ('batch', signal.SIGALRM, 'the batch of step 5 is still being made', 4),
            ('locked', signal.SIGALRM, 'the batch of step 5 is still being made', 4),
            ('ignoring', signal.SIGKILL, 'the batch of step 5 is still being made', 4),
            ('saving', signal.SIGALRM, 'a checkpoint is still being written, at step 10', 10),
            ('computing', signal.SIGALRM, 'step 5 is still being computed', 4),
            ('record', signal.SIGALRM, 'the record of step 5 is still being written', 6),
        ],
    )
    def test_are_ended_with_one_line(self, kind, number, says, records, hung, straight):
        directory, codes = hung
        assert codes[kind] == -number
        (line,) = (directory / kind / 'said').read_text().splitlines()
        assert line.startswith('jaxrnn: --step_timeout: no step finished in 4 s: ') and says in line
        assert len(rows(directory / kind)) == records
        ended = run(directory / kind)
        assert ended.first_mismatch is None
        check_same(directory / kind, ended, straight)

    def test_a_stopped_process_does_not_hang(self, hung, straight):
        directory, codes = hung
        assert codes['stopped'] == 0 and (directory / 'stopped' / 'said').read_text() == ''
        assert rows(directory / 'stopped') == rows(straight[0])

    def test_what_watches_ends_with_what_it_watches(self, hung):
        directory, codes = hung
        assert codes['killed'] == -signal.SIGKILL
        until = time.monotonic() + 10
        for kind in codes:
            pid = int((directory / kind / 'watching').read_text())
            while (
                Path(f'/proc/{pid}/cmdline').exists()
                and b'watchdog' in Path(f'/proc/{pid}/cmdline').read_bytes()
            ):
                assert time.monotonic() < until, f'the watchdog of {kind} is still there'
                time.sleep(0.05)

    def test_without_a_limit_nothing_watches(self, tmp_path, monkeypatch):
        monkeypatch.setattr(subprocess, 'Popen', None)
        assert run(tmp_path).step == STEPS

    def test_one_that_can_not_be_watched_goes_on_and_says_so(self, tmp_path, monkeypatch, caplog):
        monkeypatch.setattr(sys, 'executable', str(tmp_path / 'nothing'))
        assert run(tmp_path, step_timeout=60).step == STEPS
        assert '--step_timeout: nothing watches this run' in caplog.text


def test_what_is_said_names_the_step_and_what_it_was_at():
    assert watchdog.message(61.04, ending.CHECKPOINT, 1302) == (
        'jaxrnn: --step_timeout: no step finished in 61 s: a checkpoint is still being written, at step 1,302; the '
        'process is ended, and all records and checkpoints so far are kept: run the same command again to resume'
    )


ON_A_TERMINAL = """
import fcntl, os, sys, termios
os.setsid()
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
"""


def test_the_command(tmp_path):
    """On a terminal: a checkpoint when asked for one; one at the end when the terminal is closed. Then out of time."""
    vectors = tmp_path / 'vectors.txt'
    data.write_vectors(vectors, small.dataset().words, small.dataset().vectors)
    command = [
        'scripts/train.py', f'--vectors={vectors}', '--hidden=8', '--batch_size=8', '--max_steps=1000000',
        '--checkpoint_every=500000', f'--run_dir={tmp_path / "run"}',
    ]  # fmt: skip
    terminal, inside = os.openpty()
    argv = [sys.executable, '-c', ON_A_TERMINAL, *command, '--step_timeout=600']
    process = subprocess.Popen(argv, cwd=ROOT, stdin=inside, stdout=inside, stderr=inside)
    os.close(inside)
    wait_for(
        lambda: (tmp_path / 'run' / 'records.jsonl').exists() and len(rows(tmp_path / 'run')) > 20, terminal
    )
    process.send_signal(signal.SIGUSR1)
    wait_for(lambda: len(saved(tmp_path / 'run')) > 1, terminal)
    assert process.poll() is None
    os.close(terminal)  # which sends SIGHUP; nothing can be written to it any more
    assert process.wait(PATIENCE) == 128 + signal.SIGHUP
    _, asked_for, last = saved(tmp_path / 'run')
    assert asked_for < last == len(rows(tmp_path / 'run'))
    again = [sys.executable, *command, '--max_minutes=0.001']
    done = subprocess.run(again, cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 124 and done.stderr.endswith(
        f'saved at step {last + 1:,}: --max_minutes are over; run the same command again to resume\n'
    )


def wait_for(comes, terminal):
    """Takes what is written to a terminal meanwhile."""
    os.set_blocking(terminal, False)
    until = time.monotonic() + PATIENCE
    while not comes():
        assert time.monotonic() < until
        try:
            os.read(terminal, 1 << 16)
        except BlockingIOError:
            time.sleep(0.02)
