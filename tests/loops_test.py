"""Thirteen loops in the style of public training code: each is recorded, ended, gone on with, broken and diagnosed."""

import functools
import itertools
import os
import pickle
import random
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from looping import FAULTS, NAMES, EndedError, ending, load, marked, without_recorder

import jaxrnn
from jaxrnn.record import checkpoint, layout
from jaxrnn.record.record_file import RecordFile

ROOT = Path(__file__).parent.parent
STEPS, ENDED = 40, 25
SEED = int(os.environ.get('LOOPS_SEED') or random.randrange(10**6))

BUDGET = 400
"""Steps of a diagnosis: enough for the first experiments."""

DEVICES = {'pmapped': 2, 'sharded_map': 2}
"""Those that need more than one."""

ANEW = {'equinox_dropout'}
"""Those whose loop has a key of its own, that begins anew when the loop does."""

PLANTED = {
    'equinox_dropout': 'nan in a batch',
    'haiku_plain': 'rate too high',
    'haiku_state': 'infinite parameter',
    'linen_batch_stats': 'nan in a batch',
    'linen_ema': 'rate too high',
    'loss_scale': 'infinite parameter',
    'nnx_dropout': 'infinite parameter',
    'nnx_metrics': 'nan in a batch',
    'nnx_rnn': 'infinite parameter',
    'optax_multi_steps': 'nan in a batch',
    'pmapped': 'nan in a batch',
    'scanned_updates': 'nan in a batch',
    'sharded_map': 'infinite parameter',
}

CAUSES = {
    'nan in a batch': {'data'},
    'infinite parameter': {'program', 'none'},
    'rate too high': {'program', 'optimiser', 'none'},
}
"""Those that are not wrong: 'none' is one that isn't known."""


@pytest.fixture(params=NAMES)
def name(request) -> str:
    """A program; one of several devices is tested by another process, which has them."""
    wanted = DEVICES.get(request.param, 1)
    if jax.device_count() < wanted:
        flags = f'{os.environ.get("XLA_FLAGS", "")} --xla_force_host_platform_device_count={wanted}'
        again = subprocess.run(
            [sys.executable, '-m', 'pytest', '-n', '0', '-p', 'no:cacheprovider', request.node.nodeid],
            cwd=ROOT,
            env={**os.environ, 'XLA_FLAGS': flags, 'PYTHONPATH': str(ROOT), 'LOOPS_SEED': str(SEED)},
            capture_output=True,
            text=True,
        )
        assert again.returncode == 0, again.stdout
        pytest.skip('passed in a process of its own')
    return request.param


def batches(name: str, count: int = STEPS) -> list[Any]:
    return list(itertools.islice(load(name).batches(), count))


def rows(directory: Path) -> list[dict[str, Any]]:
    return [{**row} for row in RecordFile(layout.Paths(directory).records).read()]


def test_there_are_thirteen():
    assert sorted(PLANTED) == NAMES and len(NAMES) == 13


@pytest.mark.parametrize('name', NAMES)
def test_three_lines_at_most(name):
    lines = marked(name)
    assert 1 <= len(lines) <= 3, lines


def test_the_recorder_changes_nothing(name, tmp_path):
    """The losses have the same bits without its lines; and when it goes on where it was ended."""
    given = batches(name)
    plain = load(name, recorded=False).main(given, tmp_path)
    straight, twice = tmp_path / 'straight', tmp_path / 'twice'
    program = load(name)
    assert program.main(given, straight) == plain
    with pytest.raises(EndedError):
        program.main(ending(given[:ENDED]), twice)
    program.main(given[ENDED:], twice)
    found, expected = rows(twice), rows(straight)
    assert [row['step'] for row in found] == [*range(STEPS)]
    losses = [[row[key] for row in of for key in row if 'loss' in key] for of in (found, expected)]
    assert len(losses[0]) >= STEPS and (losses[0] == losses[1]) == (name not in ANEW)
    step, like = program.replayed()
    diagnosis, _ = jaxrnn.bisect(step, None, twice, like=like, verify=True)
    assert diagnosis.replay.bit_identical and diagnosis.symptom is None
    assert diagnosis.replay.steps_replayed >= STEPS


@pytest.mark.parametrize('name', ['linen_ema', 'nnx_dropout'])
def test_killed(name, tmp_path):
    """By SIGKILL, at a step that nobody expects; it goes on from a checkpoint, and ends as if nothing had been."""
    print(f'LOOPS_SEED={SEED}')
    at = random.Random(f'{SEED} {name} killed').randrange(11, STEPS - 1)
    given, kept = batches(name), tmp_path / 'batches'
    kept.write_bytes(pickle.dumps(given))
    command = [sys.executable, str(ROOT / 'tests' / 'looping.py'), name, str(tmp_path / 'run'), str(kept)]
    env = {**os.environ, 'PYTHONPATH': str(ROOT)}
    done = subprocess.run([*command, '0', str(at)], env=env, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    saved = checkpoint.Checkpoints(layout.Paths(tmp_path / 'run').checkpoints).steps()
    assert saved[-1] in (at // 10 * 10, at // 10 * 10 - 10)  # the last is being written
    program = load(name)
    program.main(given[saved[-1] :], tmp_path / 'run')
    program.main(given, tmp_path / 'straight')
    assert [row['loss'] for row in rows(tmp_path / 'run')] == [
        row['loss'] for row in rows(tmp_path / 'straight')
    ]
    step, like = program.replayed()
    diagnosis, _ = jaxrnn.bisect(step, None, tmp_path / 'run', like=like, verify=True)
    assert diagnosis.replay.bit_identical and diagnosis.symptom is None


def test_diagnosed(name, tmp_path, monkeypatch):
    """A fault is planted: its step is named, where in it, and no cause that it isn't."""
    print(f'LOOPS_SEED={SEED}')
    at = random.Random(f'{SEED} {name}').randrange(16, STEPS - 8)
    fault, given = FAULTS[PLANTED[name]], batches(name)
    fault.planted(monkeypatch, given, at)
    program = load(name)
    program.main(given, tmp_path)
    taken = at
    if name == 'loss_scale':  # a step whose gradients overflow is no update
        taken = [row['step'] for row in rows(tmp_path) if row['is_finite']][at]
    step, like = program.replayed()
    diagnosis, _ = jaxrnn.diagnose(step, None, tmp_path, like=like, budget=BUDGET)
    print(diagnosis)
    assert diagnosis.first_bad_step == taken + fault.shown
    assert diagnosis.replay.bit_identical and diagnosis.replay.first_mismatch is None
    assert diagnosis.cause.kind in CAUSES[PLANTED[name]]
    assert diagnosis.where is not None
    if fault is FAULTS['nan in a batch']:
        assert (diagnosis.where['pass'], diagnosis.where['op']) == ('data', 'input')
        assert diagnosis.where['source'].startswith('batch/')
    else:
        assert diagnosis.where['layer'].startswith('state/')


@functools.partial(jax.jit, donate_argnums=(0, 1))
def consuming(state, x):
    weights, _ = state
    return (weights - 0.1 * x, 2 * x), jnp.sum(weights**2)


def seeded():
    rng = np.random.default_rng(3)
    while True:
        yield jnp.asarray(rng.normal(size=20).astype(np.float32))


def test_a_seeded_loader_is_gone_on_with_and_batches_may_be_consumed(tmp_path):
    """By `recorder.batches`: those of steps that were taken are left out, and each is kept before its step."""

    def init():
        return jnp.ones(20), jnp.zeros(20)

    def train(directory, steps):
        with jaxrnn.Recorder(directory, init(), checkpoint_every=10) as recorder:
            state = recorder.state
            for x in itertools.islice(recorder.batches(seeded), steps - recorder.step):
                state, loss = consuming(state, x)
                assert x.is_deleted()
                recorder(state, loss)

    for steps in (17, STEPS):
        train(tmp_path / 'twice', steps)
    train(tmp_path / 'once', STEPS)
    twice, once = rows(tmp_path / 'twice'), rows(tmp_path / 'once')
    assert [row['loss'] for row in twice] == [row['loss'] for row in once]
    found, _ = jaxrnn.bisect(consuming, None, tmp_path / 'twice', like=init(), verify=True)
    assert found.replay.bit_identical and found.replay.steps_replayed >= STEPS


def test_a_line_is_taken_out():
    text = 'a = 1\nwith b() as c:  # recorder\n    d()  # recorder\n    for e in c(f):  # recorder: for e in f:\n'
    text += '        g()\n\n        with h():\n            i()\nj()\n'
    assert without_recorder(text) == 'a = 1\nfor e in f:\n    g()\n\n    with h():\n        i()\nj()\n'
