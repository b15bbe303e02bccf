"""The commands on a run of somebody's own loop."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

PROGRAM = """
import jax, jax.numpy as jnp, numpy as np, jaxrnn

@jax.jit
def train_step(w, batch):
    x, y = batch
    loss, gradient = jax.value_and_grad(lambda w: jnp.mean((x @ w - y) ** 2))(w)
    return w - 0.05 * gradient, {'loss': loss}

def loader():
    for number in range(80):
        x = np.random.default_rng().normal(size=(8, 3)).astype(np.float32)
        yield x, x[:, 0] * (np.nan if number == 57 else 1)

def replay():
    return train_step, jnp.zeros(3)

def pure(step):
    x = np.random.default_rng(step).normal(size=(8, 3)).astype(np.float32)
    return x, x[:, 0] * (np.nan if step == 57 else 1)

def with_batches():
    return train_step, pure, jnp.zeros(3)

def number():
    return 3

if __name__ == '__main__':
    w = jnp.zeros(3)
    with jaxrnn.Recorder('run', w) as recorder:
        for batch in loader():
            w, metrics = train_step(w, batch)
            recorder(w, metrics, batch)
    jaxrnn.record(train_step, pure, lambda: jnp.zeros(3), 'pure', max_steps=80)
"""


@pytest.fixture(scope='module')
def there(tmp_path_factory):
    """A directory with the program and its runs."""
    folder = tmp_path_factory.mktemp('own')
    (folder / 'mine.py').write_text(PROGRAM)
    done = subprocess.run(
        [sys.executable, 'mine.py'], cwd=folder, env=environ(), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return folder


def environ():
    return {**os.environ, 'PYTHONPATH': str(ROOT), 'JAX_NUMPY_RANK_PROMOTION': 'allow'}


def call(there, *arguments):
    command = [sys.executable, '-m', 'jaxrnn', *arguments]
    done = subprocess.run(command, cwd=there, env=environ(), capture_output=True, text=True, timeout=200)
    return done.returncode, done.stdout, done.stderr


def test_a_recorded_loop_is_bisected(there):
    code, said, error = call(there, 'bisect', '--run_dir=run', '--program=mine:replay')
    assert code == 3, error
    assert said.startswith('nonfinite at step 57') and 'data: batch/1' in said
    assert said.splitlines()[-1].endswith('diagnose --run_dir=run --program=mine:replay')


def test_a_recorded_loop_is_diagnosed(there):
    code, said, error = call(there, 'diagnose', '--run_dir=run', '--program=mine:replay', '--json')
    assert code == 3, error
    found = json.loads(said.splitlines()[-1])
    assert (found['first_bad_step'], found['cause']['kind'], found['replay']['bit_identical']) == (
        57,
        'data',
        True,
    )
    assert json.loads((there / 'run' / 'diagnosis.json').read_text()) == found


def test_a_run_of_record_needs_its_batches(there):
    code, said, error = call(there, 'bisect', '--run_dir=pure', '--program=mine:with_batches')
    assert code == 3 and said.startswith('nonfinite at step 57'), error
    code, _, error = call(there, 'bisect', '--run_dir=pure', '--program=mine:replay')
    assert code == 2 and 'batch_at: None found' in error and error.count('\n') == 1


@pytest.mark.parametrize(
    'arguments, said',
    [
        (['--run_dir=run'], "run is a run of somebody's own loop; type "),
        (['--run_dir=run', '--program=mine'], 'mine found, a module and a function expected'),
        (['--run_dir=run', '--program=nowhere:x'], 'no module nowhere found from '),
        (['--run_dir=run', '--program=mine:x'], 'no function x found in mine'),
        (['--run_dir=run', '--program=mine:number'], 'gives a int; expected the train step and a state'),
        (['--run_dir=run', '--model=mine:replay'], 'run is no run by jaxrnn.keras.Recorder; leave --model out'),
        (['--run_dir=.', '--program=mine:replay'], ". is no run of somebody's own loop; leave --program out"),
        (['--flagfile=flags.txt'], '--program: found in a file of flags; type it on the command line'),
    ],
)  # fmt: skip
def test_mistakes_are_one_line(arguments, said, there):
    (there / 'flags.txt').write_text('--run_dir=run\n--program=mine:replay\n')
    code, _, error = call(there, 'bisect', *arguments)
    assert code == 2 and said in error and error.count('\n') == 1, error
