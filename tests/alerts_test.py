"""Alerts: the first sign and each kind of symptom, once in a run; and nothing that fails of them ends a training."""

import json
import logging
import math
import os
import re
import shlex
import subprocess
import sys
import threading
import time
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import small

import jaxrnn
from jaxrnn import detect
from jaxrnn.alerts import Alerts, commands
from jaxrnn.detect import live
from jaxrnn.record.record_file import RecordFile
from jaxrnn.record.records import series
from jaxrnn.types import Signal, UserError
from jaxrnn.words import config, data, run

ROOT = Path(__file__).parent.parent
ALARMS = detect.alarms_of([Signal('creep', 'x', 'whole', 'creep > 2', 'it creeps', 'derived', 'none', '40')])
NOTE = [sys.executable, '-c', 'import sys; open(sys.argv[1], "a").write(repr(sys.argv[2:]) + "\\n")']
"""A command that writes its other arguments into the file that the first one names."""


def course(count=600, bad=None, creeps=None, relapse=None, spike=None, lasts=1, seed=0):
    """Records of a training that learns; what goes wrong in it, and when."""
    rng = np.random.default_rng(seed)
    for step in range(count):
        loss = float(np.exp(-min(step, 400) / 80) * rng.uniform(0.95, 1.05))
        if relapse is not None and step >= relapse:
            loss *= 30
        if spike is not None and spike <= step < spike + lasts:
            loss *= 30
        row = {'step': step, 'loss': math.nan if step == bad else loss, 'creep': 1.0}
        if creeps is not None and creeps[0] <= step < creeps[1]:
            row['creep'] = 3.0
        yield row


def told_of(rows, directory, **options):
    """What the callback gets."""
    found: list[dict] = []
    with Alerts(directory, callback=found.append, alarms=ALARMS, every=25, **options) as alerts:
        for row in rows:
            alerts(row)
    return found


def short(found):
    return [(alert['kind'], alert['symptom'], alert['step']) for alert in found]


def lines(directory):
    return [json.loads(line) for line in (directory / 'alerts.jsonl').read_text().splitlines()]


def noted(path, count=1):
    """What `NOTE` wrote, once it has."""
    until = time.monotonic() + 20
    while time.monotonic() < until and not (path.exists() and path.read_text().count('\n') >= count):
        time.sleep(0.02)
    return [eval(line) for line in path.read_text().splitlines()]


# What is told


def test_a_sign_and_then_the_symptom(tmp_path):
    found = told_of(course(creeps=(250, 600), relapse=450), tmp_path)
    assert short(found)[0] == ('sign', 'creep', 250)
    assert [alert['kind'] for alert in found[1:]] == ['symptom'] * len(found[1:])
    collapse = next(alert for alert in found if alert['symptom'] == 'collapse')
    expected = detect.first(detect.named('collapse')[1], series(course(relapse=450)))
    assert collapse['step'] == expected.step and 450 < collapse['step'] < 500
    assert found[0]['value'] == 3.0 and found[0]['means'] == 'it creeps' and found[0]['run'] == str(tmp_path)
    assert collapse['value'] == pytest.approx(30 * math.exp(-5), rel=0.06)
    assert re.fullmatch(r'\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00', found[0]['time'])
    assert lines(tmp_path) == found
    assert len({(alert['kind'], alert['symptom']) for alert in found}) == len(found)


def test_a_healthy_run_is_silent(tmp_path):
    for seed in range(3):
        assert told_of(course(1500, seed=seed), tmp_path) == []
    assert [*tmp_path.iterdir()] == []


def test_an_alarm_of_some_steps_is_no_sign(tmp_path):
    assert told_of(course(creeps=(300, 300 + live.LASTS - 1)), tmp_path) == []
    assert short(told_of(course(creeps=(300, 360)), tmp_path)) == [('sign', 'creep', 300)]


@pytest.mark.parametrize('lasts', [1, live.SHORT])
def test_a_leap_that_is_gone_at_once_is_none(lasts, tmp_path):
    assert told_of(course(spike=450, lasts=lasts), tmp_path) == []


def test_a_leap_that_lasts_is_told(tmp_path):
    assert short(told_of(course(spike=450, lasts=15), tmp_path)) == [('symptom', 'spike', 450)]


def test_each_kind_is_told_once(tmp_path):
    rows = [row if row['step'] not in (210, 310) else {**row, 'loss': math.inf} for row in course(bad=110)]
    found = told_of(rows, tmp_path)
    assert short(found) == [('symptom', 'nonfinite', 110)] and math.isnan(found[0]['value'])
    assert lines(tmp_path)[0]['value'] == 'NaN'


def test_what_is_not_finite_is_told_at_once(tmp_path):
    seen = []
    alerts = Alerts(tmp_path, callback=lambda alert: seen.append(step), every=100)
    for row in course(200, bad=110):
        step = row['step']
        alerts(row)
    assert seen == [110]


def test_the_last_steps_are_looked_at(tmp_path):
    """Between the last look and the end."""
    assert any(step > 450 for _, _, step in short(told_of(course(499, relapse=450), tmp_path)))
    rows = [*course(490, relapse=450)]
    found: list = []
    alerts = Alerts(tmp_path / 'other', callback=found.append, every=500)
    for row in rows:
        alerts(row)
    assert found == []
    alerts.close()
    assert ('symptom', 'collapse') in {(kind, symptom) for kind, symptom, _ in short(found)}


def test_a_loss_of_another_name(tmp_path, caplog):
    rows = [{'train_loss' if n == 'loss' else n: v for n, v in row.items()} for row in course(relapse=450)]
    assert 'collapse' in {symptom for _, symptom, _ in short(told_of(rows, tmp_path))}
    rows = [
        {'step': row['step'], 'actor_loss': row['loss'], 'critic_loss': 1.0} for row in course(relapse=450)
    ]
    assert told_of(rows, tmp_path / 'b') == [] and 'actor_loss, critic_loss found' in caplog.text
    assert 'collapse' in {s for _, s, _ in short(told_of(rows, tmp_path / 'c', loss='actor_loss'))}


# Resuming


def recorded(directory, rows):
    records = RecordFile(directory / 'records.jsonl')
    for row in rows:
        records.append(row)
        yield row
    records.close()


def test_what_was_told_is_not_told_again(tmp_path):
    rows = [*course(creeps=(250, 600), relapse=450)]
    first = told_of(recorded(tmp_path, rows[:520]), tmp_path)
    assert {'sign', 'symptom'} == {alert['kind'] for alert in first}
    RecordFile(tmp_path / 'records.jsonl').keep_before(440)
    again = told_of(recorded(tmp_path, rows[440:]), tmp_path)
    kinds = {alert['symptom'] for alert in first}
    assert not kinds & {alert['symptom'] for alert in again} and lines(tmp_path) == [*first, *again]


def test_what_was_not_told_is(tmp_path):
    """A run that was killed between a step and a look at it, or that had no alerts."""
    rows = [*course(relapse=450)]
    [*recorded(tmp_path, rows[:500])]
    found = told_of(recorded(tmp_path, rows[500:510]), tmp_path)
    assert ('symptom', 'collapse') in {(alert['kind'], alert['symptom']) for alert in found}


def test_history_counts(tmp_path):
    """A relapse is one against what was learnt before."""
    rows = [*course(relapse=450)]
    [*recorded(tmp_path, rows[:440])]
    found = told_of(recorded(tmp_path, rows[440:]), tmp_path)
    assert short(found) == short(told_of(rows, tmp_path / 'whole'))


def test_a_line_that_is_torn_is_no_alert(tmp_path):
    whole = json.dumps({'kind': 'symptom', 'symptom': 'collapse', 'step': 1})
    hostile = ['[' * 100_000, '{"kind": [], "symptom": 3}', '\x00', '7', 'null', '{"kind": "symptom"}']
    (tmp_path / 'alerts.jsonl').write_text('\n'.join([*hostile, whole, whole[:20]]))
    found = told_of(course(relapse=450, bad=300), tmp_path)
    kinds = [alert['symptom'] for alert in found]
    assert 'nonfinite' in kinds and 'collapse' not in kinds
    assert json.loads((tmp_path / 'alerts.jsonl').read_text().splitlines()[len(hostile) + 2]) == {
        **found[0], 'value': 'NaN',
    }  # fmt: skip


@pytest.mark.parametrize('kind', ['fifo', 'link', 'folder'])
def test_something_else_in_place_of_the_file(kind, tmp_path, caplog):
    path = tmp_path / 'alerts.jsonl'
    make = {'fifo': os.mkfifo, 'link': lambda p: p.symlink_to(tmp_path / 'outside'), 'folder': os.mkdir}[kind]
    make(path)
    with pytest.raises(UserError, match=r'alerts\.jsonl: a \w+ found'):
        Alerts(tmp_path)
    path.rmdir() if kind == 'folder' else path.unlink()
    alerts = Alerts(tmp_path)
    make(path)
    for row in course(200, bad=50):
        alerts(row)
    assert caplog.text.count('can not be written down') == 1 and not (tmp_path / 'outside').exists()


# The command


def test_the_command_is_told(tmp_path):
    out = tmp_path / 'a b'
    command = shlex.join(
        [*NOTE, str(out), '{kind}', '{symptom} at {step}', '{run}', '{"json": "{value}"}', '{', '{}']
    )
    told_of(course(200, bad=110), tmp_path, command=command)
    (words,) = noted(out)
    assert words == ['symptom', 'nonfinite at 110', str(tmp_path), '{"json": "nan"}', '{', '{}']


@pytest.mark.parametrize(
    'name', ['; touch x', '$(touch x)', '`touch x`', 'a\'b"c', '-rf', 'a\nb', '{step}', '*', 'é 日本']
)
def test_a_run_of_any_name_is_one_argument(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path(name).mkdir()
    told_of(
        course(120, bad=110), name, command=shlex.join([*NOTE, str(tmp_path / 'out'), '{run}', '--run={run}'])
    )
    path = str(tmp_path / name)
    assert noted(tmp_path / 'out') == [[path, f'--run={path}']] and not (tmp_path / 'x').exists()


@pytest.mark.parametrize(
    ('command', 'says'),
    [
        (
            'mail {who}',
            '{who} found, one of {run}, {symptom}, {step}, {kind}, {value}, {time}, {means} expected',
        ),
        ('mail "x', 'can not be split into words (No closing quotation)'),
        (' ', 'a command expected'),
        ('mail a\0b', 'a command expected'),
    ],
)
def test_a_command_that_can_not_be_read(command, says, tmp_path):
    with pytest.raises(UserError, match=re.escape(says)):
        Alerts(tmp_path, command=command)
    assert [*tmp_path.iterdir()] == []


@pytest.mark.parametrize(
    ('command', 'says'),
    [
        ('/nowhere/at-all {run}', r'/nowhere/at-all can not be started \(No such file or directory\)'),
        ('/etc/passwd', r'/etc/passwd can not be started \(Permission denied\)'),
        ('false', 'false ended with exit code 1'),
    ],
)
def test_a_command_that_fails_is_a_warning(command, says, tmp_path, caplog):
    told_of(course(200, bad=110), tmp_path, command=command)
    warned = [r for r in caplog.records if r.levelno >= logging.WARNING]
    assert len(warned) == 1 and re.search(says, warned[0].getMessage())


def test_a_command_that_hangs_holds_up_nothing(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(commands, 'PATIENCE', 0.3)
    monkeypatch.setattr(commands.Runner.close, '__defaults__', (0.3,))
    pids = tmp_path / 'pids'
    script = f'sh -c "sleep 600 & echo $! >> {pids}; echo $$ >> {pids}; wait"'
    begun = time.monotonic()
    alerts = Alerts(tmp_path, command=script)
    for row in course(200, bad=110):
        alerts(row)
    assert time.monotonic() - begun < 5
    while not pids.exists() or pids.read_text().count('\n') < 2:
        time.sleep(0.01)
    alerts.close()
    assert time.monotonic() - begun < 20 and caplog.text.count('did not end within 0.3 s, and is ended') == 1
    assert len(caplog.records) == 1
    for pid in map(int, pids.read_text().split()):
        assert is_gone(pid)


def is_gone(pid):
    """Ended, and nobody waits for it any more."""
    for _ in range(100):
        try:
            state = Path(f'/proc/{pid}/stat').read_bytes().rpartition(b')')[2].split()
        except (FileNotFoundError, ProcessLookupError):
            return True
        if state[0] == b'Z' and int(state[1]) != os.getpid():
            return True  # of a process that init waits for
        time.sleep(0.05)
    return False


def test_no_process_and_no_thread_is_left(tmp_path):
    out = tmp_path / 'out'
    alerts = Alerts(tmp_path, command=f'sh -c "echo $$ > {out}"')
    for row in course(200, bad=110):
        alerts(row)
    while not out.exists() or not out.read_text():
        time.sleep(0.01)
    assert is_gone(int(out.read_text()))  # while training goes on
    alerts.close()
    assert not [thread for thread in threading.enumerate() if thread.name == 'jaxrnn-alert']


# What fails


def test_a_callback_that_raises_is_a_warning(tmp_path, caplog):
    def callback(alert):
        raise RuntimeError('no network')

    alerts = Alerts(tmp_path, callback=callback)
    for row in course(200, bad=110):
        alerts(row)
    assert [record.getMessage() for record in caplog.records] == [
        'alerts: the callback raised RuntimeError: no network'
    ]
    assert short(lines(tmp_path)) == [('symptom', 'nonfinite', 110)]


def test_a_callback_gets_a_copy(tmp_path):
    alerts = Alerts(
        tmp_path, callback=dict.clear, command=shlex.join([*NOTE, str(tmp_path / 'out'), '{step}'])
    )
    for row in course(200, bad=110):
        alerts(row)
    assert noted(tmp_path / 'out') == [['110']]


def test_an_error_of_ours_ends_the_alerts_alone(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(detect.Watch, '__call__', lambda self, row: 1 / 0)
    assert told_of(course(200, bad=110), tmp_path) == []
    assert [r.getMessage() for r in caplog.records] == [
        'alerts: no more of them, as looking failed: ZeroDivisionError: division by zero'
    ]


# In loops


def trained(directory, alerts, count=40, bad=17):
    x = jnp.float32(1)
    with jaxrnn.Recorder(directory, x, on_row=alerts, checkpoint_every=10) as recorder:
        x = recorder.state
        for number in range(recorder.step, count):
            batch = math.nan if number == bad else 0.5
            x, loss = x * batch, jnp.float32(x * batch)
            recorder(x, loss, batch)


def test_a_recorder(tmp_path):
    found: list = []
    trained(tmp_path, Alerts(tmp_path, callback=found.append))
    assert short(found) == short(lines(tmp_path)) == [('symptom', 'nonfinite', 17)]
    trained(tmp_path, Alerts(tmp_path, callback=found.append), count=60)
    assert len(found) == 1


class Observer:
    """Counts how often it was closed; no record may come after it."""

    closed = 0

    def __call__(self, row):
        assert not self.closed

    def close(self):
        self.closed += 1


def test_an_observer_is_closed(tmp_path):
    """A function has nothing to be closed."""
    of_recorder, of_record = Observer(), Observer()
    trained(tmp_path / 'a', of_recorder)
    trained(tmp_path / 'b', lambda row: None)
    loop = lambda x, batch: (x, {'loss': x}), lambda k: 0, lambda: 1.0, tmp_path / 'c'
    jaxrnn.record(*loop, max_steps=2, on_row=of_record)
    assert (of_recorder.closed, of_record.closed) == (1, 1)


@pytest.fixture(scope='module')
def vectors(tmp_path_factory):
    path = tmp_path_factory.mktemp('data') / 'vectors.txt'
    words = [f'{a}{b}{c}' for a in 'abcd' for b in 'abcd' for c in 'abc']
    vectors = np.random.default_rng(0).normal(size=(48, 8)).astype(np.float32)
    data.write_vectors(path, words, vectors)
    return path


def breaking(vectors, **loop):
    return config.Config(
        data=config.Data(vectors=str(vectors)),
        model=config.Model(hidden=8),
        optimiser=config.Optimiser(learning_rate=1e20),
        training=config.Training(batch_size=8),
        loop=config.Loop(max_steps=60, checkpoint_every=20, **loop),
    )


@pytest.mark.parametrize('on_divergence', ['continue', 'stop', 'rewind'])
def test_a_run_of_our_own(on_divergence, vectors, tmp_path):
    found: list = []
    seen, told_at = [], {}

    def callback(alert):
        found.append(alert)
        told_at[alert['symptom']] = seen[-1]

    made = breaking(vectors, on_divergence=on_divergence)
    for _ in range(2):
        with Alerts(tmp_path / 'run', callback=callback) as alerts:
            run.train_run(made, tmp_path / 'run', alerts=alerts, on_row=lambda row: seen.append(row['step']))
    (bad,) = [alert['step'] for alert in found if alert['symptom'] == 'nonfinite']
    assert told_at['nonfinite'] - bad <= 1  # a norm may be infinite a step before a flag says so
    names = [alert['symptom'] for alert in found if alert['kind'] == 'symptom']
    assert (
        names
        and len(names) == len(set(names))
        and lines(tmp_path / 'run')
        == [
            {**alert, 'value': 'NaN' if alert['value'] != alert['value'] else alert['value']}
            for alert in found
        ]
    )


def test_alarms_end_no_run(vectors, tmp_path):
    """A sign is no symptom for --on_divergence."""
    alarms = detect.alarms_of([Signal('loss', 'x', 'whole', 'loss > 0', 'on', 'derived', 'none', '1')])
    made = small.configuration().changed(vectors=str(vectors), max_steps=130, on_divergence='stop')
    with Alerts(tmp_path / 'run', alarms=alarms) as alerts:
        result = run.train_run(made, tmp_path / 'run', alerts=alerts)
    assert result.result.step == 130 and short(lines(tmp_path / 'run')) == [('sign', 'loss', 0)]


def call(*arguments, cwd=None):
    command = [sys.executable, '-m', 'jaxrnn', 'train', *arguments]
    env = {**os.environ, 'PYTHONPATH': str(ROOT)}
    return subprocess.run(command, capture_output=True, text=True, env=env, timeout=200, cwd=cwd)


def test_the_flag(vectors, tmp_path):
    small_run = [
        f'--vectors={vectors}',
        '--hidden=8',
        '--batch_size=8',
        '--learning_rate=1e20',
        '--max_steps=30',
    ]
    out = tmp_path / 'out'
    note = shlex.join([*NOTE, str(out), '{run}', '{symptom}', '{step}'])
    done = call(*small_run, f'--run_dir={tmp_path / "a b"}', f'--on_symptom={note}')
    assert done.returncode == 3, done.stderr
    told = lines(tmp_path / 'a b')
    assert sorted(noted(out, len(told))) == sorted(
        [str(tmp_path / 'a b'), a['symptom'], str(a['step'])] for a in told
    )
    assert told and 'on_symptom' not in (tmp_path / 'a b' / 'flags.txt').read_text()


def test_a_file_of_flags_runs_no_command(vectors, tmp_path):
    flags = tmp_path / 'flags.txt'
    flags.write_text(
        f'--vectors={vectors}\n--on_symptom=touch {tmp_path}/executed\n--learning_rate=1e20\n--max_steps=9\n'
    )
    done = call(f'--flagfile={flags}', f'--run_dir={tmp_path}/run')
    assert done.returncode == 2 and '--on_symptom: found in a file of flags' in done.stderr
    done = call('--on_symptom=mail {who}', f'--run_dir={tmp_path}/run')
    assert done.returncode == 2 and '{who} found' in done.stderr and done.stderr.count('\n') == 1
    assert not (tmp_path / 'executed').exists() and not (tmp_path / 'run').exists()


# What it costs


def test_it_costs_little(tmp_path):
    """15 µs a row here; other processes may be at work."""
    rows = [{**row, **{f'field_{k}': float(k) for k in range(7)}} for row in course(10_000)]
    alerts = Alerts(tmp_path)
    begun = time.thread_time()
    for row in rows:
        alerts(row)
    assert (time.thread_time() - begun) / len(rows) < 60e-6
