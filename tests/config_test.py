"""Options and flags: each refuses what nobody can compute with, in one line that names it, and before any work."""

import dataclasses
import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxrnn import environment
from jaxrnn.types import UserError
from jaxrnn.words import config, data, optimisers, remedies, train
from jaxrnn.words.config import Config

OPTIONS = [
    (group.name, option)
    for group in dataclasses.fields(Config)
    for option in dataclasses.fields(getattr(Config(), group.name))
]
NUMBERS = [(group, option) for group, option in OPTIONS if option.type in (int, float)]
HOSTILE = {
    'negative': -1, '2^31': 2**31, '2^63': 2**63, '2^64': 2**64, '10^12': 10**12, '10^900': 10**900,
    '10^5000': 10**5000,
    '1e308': 1e308, 'nan': math.nan, 'inf': math.inf, '-inf': -math.inf, 'empty': '', 'text': '1', 'none': None,
    'list': [], 'true': True,
}  # fmt: skip


def made(group, option, value) -> Config:
    return Config.from_json({group: {option.name: value}})


def refused(says, call, *arguments) -> None:
    with pytest.raises(UserError) as caught:
        call(*arguments)
    message = str(caught.value)
    assert message.startswith(says) and '\n' not in message and len(message) < 300


@pytest.mark.parametrize('kind', HOSTILE)
def test_every_number_has_bounds(kind):
    for group, option in NUMBERS:
        large = kind in ('2^31', '2^63', '2^64', '10^12')
        if large and option.type is float and option.metadata['below'] is None:
            continue  # a float32 has room for it
        if option.name != 'seed' or kind not in ('2^31', '10^12'):
            refused(f'--{option.name}: ', made, group, option, HOSTILE[kind])


def test_numbers_at_their_bounds_are_taken():
    for group, option in NUMBERS:
        most = option.metadata['at_most'] or config.LARGEST[option.type]
        if option.metadata['below'] is None:
            assert getattr(getattr(made(group, option, most), group), option.name) == most
            refused(f'--{option.name}: ', made, group, option, most * 2)
    assert np.float32(config.LARGEST[float]) == np.finfo(np.float32).max


@pytest.mark.parametrize('text', ['a\nb', 'a\rb', 'a\0b', 'a\udcffb'])
def test_texts_are_one_line_of_utf8(text):
    """Else flags.txt, which has one flag a line, would say another flag, or could not be written."""
    for group, option in OPTIONS:
        if option.type is str:
            refused(f'--{option.name}: ', made, group, option, text)
    assert made('data', OPTIONS[0][1], 'naïve \x1b.txt').data.vectors == 'naïve \x1b.txt'


@pytest.mark.parametrize(
    'text', ['9' * 5000, '1000000001', '1,' * 200 + '2', '１２', '1_0', '-1', '1e3', '', ' ']
)
def test_boundaries(text):
    options = config.Optimiser(schedule='piecewise', boundaries=text)
    refused('--boundaries: ', optimisers.learning_rate, options)


@pytest.mark.parametrize(
    'text',
    ['9' * 5000, '１２', '1-2-3', ','.join(f'{n}-{n + 999_999}' for n in range(1, 10**9, 10**6)), '0', ''],
)
def test_skipped_batches(text):
    start = time.process_time()
    refused('--skip_batches: ', train.skipped, text)
    assert time.process_time() - start < 2


# What fits into memory.


@pytest.fixture(scope='module')
def vectors(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp('data') / 'vectors.txt'
    rows = np.random.default_rng(0).normal(size=(9, 4)).astype(np.float32)
    data.write_vectors(path, [f'w{chr(97 + n)}' for n in range(9)], rows)
    return path


@pytest.mark.parametrize('network', ['lstm', 'gru', 'stacked'])
def test_a_network_that_cannot_fit_is_refused(network, vectors):
    options = Config(
        data=config.Data(vectors=str(vectors)), model=config.Model(network=network, hidden=1 << 20)
    )
    refused('--hidden: 1048576 found', train.make_program, options, data.load(options.data, 0))


def test_a_batch_that_cannot_fit_is_refused(vectors):
    options = Config(data=config.Data(vectors=str(vectors)), training=config.Training(batch_size=2**31 - 1))
    dataset = data.load(options.data, 0)
    refused('--batch_size: 2147483647 found', train.check_batch, options, dataset)
    train.check_batch(options.changed(batch_size=32), dataset)


def test_data_that_cannot_fit_is_refused(vectors, monkeypatch):
    monkeypatch.setattr(environment, 'memory', lambda: 4 * 10_000 * 9 - 1)
    options = config.Data(vectors=str(vectors), pad_to=10_000)
    refused('--pad_to: 10000 time steps of 9 words', data.load, options, 0)


def test_what_fits_is_not_refused(vectors, monkeypatch):
    """What is counted is no more than what is needed."""
    options = Config(data=config.Data(vectors=str(vectors)), model=config.Model(hidden=8))
    dataset = data.load(options.data, 0)
    state = jax.eval_shape(train.make_program(options, dataset).init)
    whole = sum(4 * leaf.size for leaf in jax.tree.leaves(state.params))
    monkeypatch.setattr(environment, 'memory', lambda: 3 * whole)
    train.make_program(options, dataset)
    monkeypatch.setattr(environment, 'memory', lambda: 3 * whole - 1)
    refused('--hidden: 8 found', train.make_program, options, dataset)


def test_memory():
    assert 1 << 28 < environment.memory() < 1 << 50


def test_a_container_may_have_less(tmp_path, monkeypatch):
    limit, none = tmp_path / 'limit', tmp_path / 'none'
    limit.write_text('123456789\n')
    none.write_text('max\n')
    monkeypatch.setattr(environment, 'LIMITS', (str(none), str(tmp_path / 'missing')))
    whole = environment.memory()
    monkeypatch.setattr(environment, 'LIMITS', (str(none), str(limit)))
    assert environment.memory() == 123456789 < whole


# Flags that aren't options.

DRIVER = """
import contextlib, io, json, sys
from jaxrnn.cli import common
from jaxrnn.cli.commands import load
module = load(sys.argv[1])
for flag in json.loads(sys.argv[2]):
    for each in common.defined():
        each.unparse()
    errors = io.StringIO()
    with contextlib.redirect_stderr(errors):
        code = common.run(module.main, '', 'jaxrnn', ['--run_dir=none', flag])
    print(json.dumps([flag, code, errors.getvalue()]))
"""
VALUES = (
    '-1',
    str(2**31),
    str(2**64),
    '1' + '0' * 900,
    '9' * 5000,
    '1e999',
    'nan',
    '',
    ' ',
    '1.5',
    '\x1b[31m',
    '\ud800',
)
FLAGS = {
    'bisect': ('good', 'bad', 'threads'),
    'trace': ('step', 'against'),
    'diagnose': ('fresh_runs', 'budget_steps'),
    'embed': ('neighbours',),
    'export': ('threads',),
    'demo': ('seed',),
    'train': ('seed', 'hidden', 'learning_rate'),
}


@pytest.mark.parametrize('command', FLAGS)
def test_every_flag_of_a_command_has_bounds(command):
    taken = {
        '--seed=2147483648',
        '--learning_rate=2147483648',
        f'--learning_rate={2**64}',
        '--learning_rate=1.5',
    }
    calls = [f'--{name}={value}' for name in FLAGS[command] for value in VALUES]
    calls = [call for call in calls if command != 'train' or call not in taken]  # those are fine
    done = subprocess.run(
        [sys.executable, '-c', DRIVER, command, json.dumps(calls)],
        capture_output=True,
        text=True,
        env={**os.environ, 'PYTHONPATH': str(Path(__file__).parent.parent)},
    )
    assert done.returncode == 0, done.stderr
    for line in done.stdout.splitlines():
        flag, code, errors = json.loads(line)
        name = flag.partition('=')[0]
        assert code == 2 and errors.startswith(f'jaxrnn: {name}: ') and 'found' in errors, (
            flag[:40],
            errors[:300],
        )
        assert errors.count('\n') == 1 and len(errors) < 300 and errors.rstrip('\n').isprintable()
    assert len(done.stdout.splitlines()) == len(calls)


# What is computed of options at their bounds.


def test_remedies_stay_within_bounds():
    """A diagnosis goes on, whatever a run was trained with."""
    for group, option in NUMBERS:
        for value in (1e308, -1e308):
            most = config.limited(option.name, option.type(value))
            if option.metadata['below'] is not None and most > 0:
                most = 0.5
            whole = made(group, option, most)
            for remedy in (*remedies.REMEDIES, remedies.epsilon_by_rule(1e30)):
                remedies.applied(remedies.applied(whole, remedy), remedy)


def test_limited():
    assert config.limited('hidden', 10**12) == 1 << 20 and config.limited('hidden', -5) == 0
    assert 0 < config.limited('learning_rate', 0.0) < 1e-300 and config.limited('learning_rate', 0.5) == 0.5
    assert type(config.limited('chrono_steps', 2**40)) is int
