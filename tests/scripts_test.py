"""The scripts as a person runs them: flags, exit codes, the last line, and every bad input in one line."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import small

from jaxrnn import detect
from jaxrnn.words import config, data

ROOT = Path(__file__).parent.parent
SMALL = ('--network=lstm', '--hidden=8', '--batch_size=8', '--learning_rate=3e-3', '--checkpoint_every=20')


def call(script, *flags, **environ):
    command = [sys.executable, f'{ROOT}/scripts/{script}.py', *flags]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env={**os.environ, **environ})
    assert 'Traceback' not in done.stderr, done.stderr
    return done


def read(path):
    return data.read_vectors(path, max_length=19)


def last_json(done):
    return json.loads(done.stdout.splitlines()[-1], parse_constant=pytest.fail)


def content(directory: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in sorted(directory.rglob('*')) if path.is_file()}


@pytest.fixture(scope='module')
def vectors(tmp_path_factory):
    """A word2vec file of 60 words."""
    rng = np.random.default_rng(0)
    words: dict[str, None] = {}
    while len(words) < 60:
        words[''.join(rng.choice(list('abcdefgh'), rng.integers(2, 7)))] = None
    path = tmp_path_factory.mktemp('data') / 'vectors.txt'
    data.write_vectors(path, list(words), rng.normal(size=(60, 10)).astype(np.float32))
    return path


@pytest.fixture(scope='module')
def trained(vectors, tmp_path_factory):
    """A run of 60 steps."""
    directory = tmp_path_factory.mktemp('runs') / 'run'
    done = call('train', f'--vectors={vectors}', *SMALL, '--max_steps=60', f'--run_dir={directory}', '--json')
    assert done.returncode == 0, done.stderr
    return directory, done


def test_what_is_dropped_is_said(vectors, tmp_path):
    more = tmp_path / 'vectors.txt'
    lines = vectors.read_text().splitlines(keepends=True)[1:]
    more.write_text(''.join([*lines, *(f'{word} {"1 " * 9}1\n' for word in ('a$b', 'c$', 'x' * 30))]))
    done = call('train', f'--vectors={more}', *SMALL, '--max_steps=1', f'--run_dir={tmp_path / "run"}')
    assert '60 words from' in done.stderr
    assert 'dropped: 2 with a $, 1 of more than 19 letters' in done.stderr


def test_train_leaves_a_run(trained):
    directory, done = trained
    names = {path.name for path in directory.iterdir()}
    files = {'config.json', 'flags.txt', 'data.npz', 'records.jsonl', 'evaluation.json', 'diagnosis.json'}
    assert files | {'checkpoints'} <= names
    assert len((directory / 'records.jsonl').read_text().splitlines()) == 60
    assert last_json(done) == json.loads((directory / 'diagnosis.json').read_text())
    scores = json.loads((directory / 'evaluation.json').read_text())
    assert set(scores) == {'train', 'validation', 'test'}
    assert set(scores['train']) == {'words', 'loss', 'accuracy', 'cosine', 'nearest', 'r2'}


def test_result_has_the_fields_of_the_design(trained):
    result = last_json(trained[1])
    assert list(result) == [
        'symptom', 'first_bad_step', 'onset_step', 'where', 'checks', 'cause', 'remedies', 'replay', 'versions',
    ]  # fmt: skip
    assert set(result['cause']) == {'kind', 'why'}
    assert set(result['replay']) == {
        'bit_identical',
        'first_mismatch',
        'steps_replayed',
        'checkpoints_probed',
    }


def test_a_preset_sets_what_no_flag_says(vectors, tmp_path):
    """And the run's own flags, which say all, make the same run."""
    flags = f'--vectors={vectors}', '--hidden=8', '--batch_size=8', '--preset=stable', '--max_steps=9'
    made = {}
    for name, more in (('plain', ()), ('own', ('--learning_rate=1e-3',))):
        assert call('train', *flags, *more, f'--run_dir={tmp_path / name}').returncode == 0
        made[name] = json.loads((tmp_path / name / 'config.json').read_text())['optimiser']
    names = 'learning_rate', 'schedule', 'decay_steps'
    assert [made['plain'][name] for name in names] == [5e-4, 'warmup_cosine', 9]
    assert [made['own'][name] for name in names] == [1e-3, 'warmup_cosine', 9]
    again = f'--flagfile={tmp_path}/plain/flags.txt', '--max_steps=12', f'--run_dir={tmp_path / "plain"}'
    assert call('train', *again).returncode == 0
    longer = call('train', *flags, '--max_steps=12', f'--run_dir={tmp_path / "plain"}')
    assert longer.returncode == 2 and '--decay_steps: 12, 9 there' in longer.stderr, longer.stderr


def test_the_same_command_resumes(trained, vectors, tmp_path):
    """From the run's own flags, in another place, and further."""
    directory = tmp_path / 'copy'
    shutil.copytree(trained[0], directory)
    done = call('train', f'--flagfile={directory}/flags.txt', '--max_steps=90', f'--run_dir={directory}')
    assert done.returncode == 0, done.stderr
    assert len((directory / 'records.jsonl').read_text().splitlines()) == 90
    straight = tmp_path / 'straight'
    call('train', f'--vectors={vectors}', *SMALL, '--max_steps=90', f'--run_dir={straight}')
    assert (straight / 'records.jsonl').read_bytes() == (directory / 'records.jsonl').read_bytes()


def test_bisect_names_and_proves_the_step(trained):
    directory, _ = trained
    losses = [json.loads(line)['loss'] for line in (directory / 'records.jsonl').read_text().splitlines()]
    expected = next(n for n in range(30, 60) if losses[n] < np.median(losses[n - 20 : n]))
    rule = '--when=step >= 30 and loss < median(loss, 20)'
    for records in ('--records', '--norecords'):
        done = call('bisect', f'--run_dir={directory}', rule, records, '--json')
        assert done.returncode == 3, done.stderr
        result = last_json(done)
        assert result['first_bad_step'] == expected
        assert result['symptom'] == {'kind': 'when', 'step': expected}
        assert result['replay']['bit_identical'] is True


def test_bisect_shows_a_screen(trained):
    done = call('bisect', f'--run_dir={trained[0]}', '--when=step == 40')
    assert done.returncode == 3
    for part in ('when at step 40', 'proven: 1 step replayed from 1 checkpoint', 'gradient'):
        assert part in done.stdout
    assert done.stdout.splitlines()[-1] == f'next: python {ROOT}/scripts/diagnose.py --run_dir={trained[0]}'


def test_bisect_of_a_healthy_run(trained):
    done = call('bisect', f'--run_dir={trained[0]}')
    assert done.returncode == 0 and 'healthy' in done.stdout


def test_bisect_of_a_run_that_does_not_come_out_the_same(trained, tmp_path):
    directory = tmp_path / 'copy'
    shutil.copytree(trained[0], directory)
    path = directory / 'records.jsonl'
    rows = small.read_records(path)
    rows[44]['digest'] = '0' * 16
    small.write_records(path, rows)
    done = call('bisect', f'--run_dir={directory}', '--when=step == 50', '--json')
    assert done.returncode == 4
    assert last_json(done)['replay']['first_mismatch'] == 44
    assert last_json(done)['first_bad_step'] is None


def test_a_healthy_run_is_diagnosed_as_healthy_and_suggests_nothing(trained):
    start = time.monotonic()
    done = call('diagnose', f'--run_dir={trained[0]}', '--json')
    assert time.monotonic() - start < 60
    assert done.returncode == 0, done.stderr
    told = last_json(done)
    assert (told['symptom'], told['cause']['kind'], told['remedies']) == (None, 'none', [])
    assert len(told['checks']) == 7 and not any(check['ok'] is False for check in told['checks'])
    screen = call('diagnose', f'--run_dir={trained[0]}').stdout
    assert screen.startswith('healthy') and 'do:' not in screen
    page = Path(trained[0]) / 'report.html'
    assert screen.splitlines()[-1] == f'page: {page}'
    page.unlink()
    assert call('report', f'--run_dir={trained[0]}').stdout == f'{page}\n'
    assert 'healthy' in page.read_text(encoding='utf-8')


@pytest.mark.parametrize(
    'flag', ['--budget_steps=0', '--symptom=hiccup', '--when=loss >', '--budget_steps=x']
)
def test_diagnose_says_what_it_cannot_use(trained, flag):
    done = call('diagnose', f'--run_dir={trained[0]}', flag)
    assert done.returncode == 2 and flag.split('=')[0] in done.stderr
    assert len([line for line in done.stderr.splitlines() if '…' not in line]) == 1


def test_trace_of_a_healthy_step(trained):
    done = call('trace', f'--run_dir={trained[0]}', '--step=7')
    assert done.returncode == 0 and 'every output is finite' in done.stdout


def test_trace_holds_a_finite_step_against_an_earlier_one(trained):
    directory, _ = trained
    asked = '--checkify', '--float64', '--json'
    done = call('trace', f'--run_dir={directory}', '--step=9', '--against=4', *asked)
    assert done.returncode == 0, done.stderr
    told = last_json(done)
    assert told['finding'] is None and (told['step'], told['against']) == (9, 4)
    assert told['checks'] == [{'name': 'checkify', 'ok': True, 'value': 0.0, 'why': 'found nothing'}]
    assert told['float64']['lost'] is None and 0 < told['float64']['outputs']['record/loss'] < 1e-5
    rows = [json.loads(line) for line in (directory / 'records.jsonl').read_text().splitlines()]
    before, _, now = told['change']['scores']['loss']
    np.testing.assert_allclose([before, now], [rows[4]['loss'], rows[9]['loss']], rtol=1e-5)
    assert all(example['word'] for example in told['change']['examples'])
    screen = call('trace', f'--run_dir={directory}', '--step=9', '--against=4').stdout
    assert 'against step 4' in screen and 'backward through' in screen


@pytest.mark.parametrize(
    'step', ['', '--step=-1', '--step=100000', '--step=9 --against=9', '--step=9 --against=-1']
)
def test_trace_needs_a_step_of_the_run(trained, step):
    done = call('trace', f'--run_dir={trained[0]}', *step.split())
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1 and ('--step' in done.stderr or '--against' in done.stderr)


def test_embed(trained, vectors, tmp_path):
    directory, _ = trained
    known = read(vectors).words[0]
    done = call('embed', f'--run_dir={directory}', known, 'hag', '--neighbours=3', '--json')
    found = last_json(done)
    assert [(entry['word'], entry['known']) for entry in found] == [(known, True), ('hag', False)]
    assert all(len(entry['nearest']) == 3 and len(entry['vector']) == 10 for entry in found)
    export = tmp_path / 'out.txt'
    assert call('embed', f'--run_dir={directory}', f'--export={export}', known, 'hag').returncode == 0
    written = read(export)
    np.testing.assert_allclose(written.vectors, [entry['vector'] for entry in found], rtol=1e-6)


def test_a_diverging_run_ends_with_3_and_is_bisected(vectors, tmp_path):
    flags = [
        f'--vectors={vectors}',
        *SMALL,
        '--learning_rate=1e38',
        '--max_steps=300',
        '--on_divergence=stop',
    ]
    done = call('train', *flags, f'--run_dir={tmp_path / "run"}', '--json')
    assert done.returncode == 3, done.stderr
    assert last_json(done)['symptom']['kind'] == 'nonfinite'
    steps = len((tmp_path / 'run' / 'records.jsonl').read_text().splitlines())
    assert steps < 130
    again = call('train', *flags, f'--run_dir={tmp_path / "run"}', '--json')
    assert again.returncode == 3
    assert len((tmp_path / 'run' / 'records.jsonl').read_text().splitlines()) == steps
    found = last_json(call('bisect', f'--run_dir={tmp_path / "run"}', '--json'))
    step = found['first_bad_step']
    assert step == last_json(done)['symptom']['step']
    assert found['where'].keys() == {'pass', 'op', 'source', 'layer', 'time_step', 'examples', 'words'}
    traced = call('trace', f'--run_dir={tmp_path / "run"}', f'--step={step}', '--json')
    assert traced.returncode == 3
    told = last_json(traced)['finding']
    assert {name: told[name] for name in found['where']} == found['where']
    screen = call('trace', f'--run_dir={tmp_path / "run"}', f'--step={step}').stdout
    assert f'step {step}: {told["kind"]}' in screen and 'operand' in screen
    diagnosed = call('diagnose', f'--run_dir={tmp_path / "run"}', '--budget_steps=120', '--json')
    assert diagnosed.returncode == 3, diagnosed.stderr
    told = last_json(diagnosed)
    assert told == json.loads((tmp_path / 'run' / 'diagnosis.json').read_text())
    assert (told['first_bad_step'], told['where']) == (step, found['where'])
    assert [check['ok'] for check in told['checks']][1:3] == [True, False]
    assert [check['name'] for check in told['checks'][7:]] == ['other numbers are finite', 'what broke']
    assert told['remedies'] and {remedy['outcome'] for remedy in told['remedies']} <= {
        'averted',
        'delayed',
        'unchanged',
        'worse',
    }
    assert told['replay']['bit_identical'] and told['replay']['steps_replayed'] <= 110
    assert told['cause']['why']


def test_compiled_steps_are_kept_with_the_user(vectors, tmp_path):
    """Unless the user keeps them elsewhere; what is found there gives the same bits."""
    run, home = f'--run_dir={tmp_path / "run"}', tmp_path / 'home'
    kept = {'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0', 'JAXRNN_CACHE': str(home)}
    command = ['train', f'--vectors={vectors}', *SMALL, '--max_steps=30', run]
    assert call(*command, **kept).returncode == 0 and not (home / 'compiled').exists()
    shutil.rmtree(tmp_path / 'run')
    kept['JAX_COMPILATION_CACHE_DIR'] = ''
    assert call(*command, **kept).returncode == 0
    assert not (tmp_path / 'run/compiled').exists()
    (environment,) = (home / 'compiled').iterdir()
    before = content(environment)
    assert before
    done = call('bisect', run, '--norecords', '--json', **kept)
    assert done.returncode == 0 and last_json(done)['replay']['bit_identical']
    names = {path.name.split('-')[0] for path in content(environment).keys() - before.keys()}
    assert 'jit_observed' not in names and 'jit_observed' in {path.name.split('-')[0] for path in before}


@pytest.mark.parametrize('check', ['--debug_nans', '--checkify'])
def test_jax_own_checks(check, vectors, tmp_path):
    flags = [
        f'--vectors={vectors}',
        *SMALL,
        '--learning_rate=1e38',
        '--max_steps=100',
        '--on_divergence=stop',
    ]
    done = call('train', *flags, check, f'--run_dir={tmp_path / "run"}', '--json')
    assert done.returncode == 3, done.stderr
    rows = [json.loads(line) for line in (tmp_path / 'run' / 'records.jsonl').read_text().splitlines()]
    assert any(check.strip('-') in row for row in rows)
    found = call('bisect', f'--run_dir={tmp_path / "run"}', '--json')
    assert last_json(found)['replay']['bit_identical'] is True


@pytest.mark.parametrize(
    'script', ['train', 'bisect', 'trace', 'diagnose', 'report', 'watch', 'embed', 'demo']
)
def test_help_is_complete_and_grouped(script):
    done = call(script, '--help')
    assert done.returncode == 0
    assert 'exit codes' in done.stdout and '--run_dir' in done.stdout and '\nrun\n' in done.stdout
    if script in ('bisect', 'diagnose'):
        assert all(detector.kind in done.stdout for detector in detect.DETECTORS)
    if script == 'train':
        for group in ('data', 'model', 'optimiser', 'training', 'loop'):
            assert f'\n{group}\n' in done.stdout
            for name in config.Config().to_json()[group]:
                assert f'--{name}=' in done.stdout or f'--[no]{name}' in done.stdout


def _nothing(path: Path) -> None:
    pass


def _binary(change) -> callable:
    def make(path: Path) -> None:
        body = b'2 3\n' + b''.join(word + b' ' + np.ones(3, '<f4').tobytes() for word in (b'ab', b'cd'))
        path.write_bytes(change(body))

    return make


def _text(text: str):
    return lambda path: path.write_bytes(text.encode('latin-1'))


BAD_FILES = {
    'missing file': _nothing,
    'a directory': lambda path: path.mkdir(),
    'empty': _text(''),
    'truncated binary': _binary(lambda body: body[:-5]),
    'header of 10^12 vectors': _text('1000000000000 100\nab 1 2 3\n'),
    'header of 10^9 numbers': _text('2 1000000000\nab 1 2 3\n'),
    'ragged rows': _text('ab 1 2 3\ncd 1 2\n'),
    'NaN in vectors': _text('ab 1 2 3\ncd 1 nan 3\nef 1 1 1\n'),
    'duplicate words': _text('ab 1 2 3\nab 3 2 1\ncd 1 1 1\n'),
    'not UTF-8': _text('ab 1 2 3\n\xff\xfe 1 2 3\n'),
    'a pickle': lambda path: path.write_bytes(b'\x80\x04\x95\x10\x00\x00\x00'),
    'zero vector': _text('ab 1 2 3\ncd 0 0 0\nef 1 1 1\n'),
    'one word only': _text('ab 1 2 3\n'),
}


@pytest.mark.parametrize('name', BAD_FILES)
def test_bad_vectors_are_one_line(name, trained, tmp_path):
    """Named with what to do; the run that was there is as it was."""
    path = tmp_path / 'vectors.bin'
    BAD_FILES[name](path)
    before = content(tmp_path)
    done = call('train', f'--vectors={path}', *SMALL, '--max_steps=5', f'--run_dir={tmp_path / "run"}')
    assert done.returncode == 2
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert str(path) in done.stderr or '--' in done.stderr
    assert content(tmp_path) == before and not (tmp_path / 'run').exists()


@pytest.mark.parametrize(
    ('flags', 'says'),
    [
        (['--hidden=-1'], '--hidden'),
        (['--learning_rate=nan'], '--learning_rate'),
        (['--learning_rate=fast'], 'learning_rate'),
        (['--network=transformer'], 'network'),
        (['--no_such_flag=1'], 'no_such_flag'),
        (['--validation_share=1'], '--validation_share'),
        (['--schedule=piecewise'], '--boundaries'),
        (['--pad_to=3'], '--pad_to'),
        (['--corpus=x.txt'], '--corpus'),
        (['word'], "'word'"),
        (['--threads=-1'], '--threads'),
        (['--run_dir='], '--run_dir'),
        (['--run_dir=/proc/nowhere'], '--run_dir'),
    ],
)
def test_bad_flags_are_one_line(flags, says, vectors, tmp_path):
    done = call(
        'train', f'--vectors={vectors}', *SMALL, '--max_steps=5', f'--run_dir={tmp_path / "run"}', *flags
    )
    assert done.returncode == 2, done.stderr
    assert len(done.stderr.strip().splitlines()) == 1 and says in done.stderr


@pytest.mark.skipif(os.geteuid() == 0, reason='root may write anywhere')
def test_unwritable_run_directory(vectors, tmp_path):
    (tmp_path / 'closed').mkdir(mode=0o500)
    done = call('train', f'--vectors={vectors}', *SMALL, f'--run_dir={tmp_path / "closed" / "run"}')
    assert done.returncode == 2 and '--run_dir' in done.stderr


def test_run_directory_of_another_config(trained, vectors):
    before = content(trained[0])
    done = call('train', f'--vectors={vectors}', *SMALL, '--hidden=9', f'--run_dir={trained[0]}')
    assert done.returncode == 2
    assert '--hidden: 9, 8 there' in done.stderr and len(done.stderr.strip().splitlines()) == 1
    assert content(trained[0]) == before


@pytest.mark.parametrize('script', ['bisect', 'trace', 'diagnose', 'report', 'watch', 'embed'])
def test_directory_without_a_run(script, tmp_path):
    words = {'embed': ['word'], 'trace': ['--step=3']}.get(script, [])
    for directory in (tmp_path, tmp_path / 'none'):
        done = call(script, f'--run_dir={directory}', *words)
        assert done.returncode == 2 and 'holds no run' in done.stderr
        assert len(done.stderr.strip().splitlines()) == 1


@pytest.mark.parametrize('name', ['config.json', 'data.npz', 'records.jsonl'])
def test_damaged_run_is_named(name, trained, tmp_path):
    directory = tmp_path / 'copy'
    shutil.copytree(trained[0], directory)
    (directory / name).write_bytes(b'garbage\n' * 3)
    done = call('bisect', f'--run_dir={directory}')
    assert done.returncode == 2 and name in done.stderr and len(done.stderr.strip().splitlines()) == 1


def test_embed_refuses_what_it_can_not_spell(trained):
    done = call('embed', f'--run_dir={trained[0]}', 'жук')
    assert done.returncode == 2 and 'ж' in done.stderr


def test_when_is_never_evaluated(trained, tmp_path):
    spy = tmp_path / 'spy'
    done = call('bisect', f'--run_dir={trained[0]}', f"--when=open('{spy}', 'w') == 1")
    assert done.returncode == 2 and '--when' in done.stderr and not spy.exists()


def test_interrupt_saves_and_resumes(vectors, tmp_path):
    """SIGTERM while it trains: exit code 143, a checkpoint, and the same command goes on."""
    flags = [f'--vectors={vectors}', *SMALL, '--max_steps=2000', f'--run_dir={tmp_path / "run"}']
    process = subprocess.Popen(
        [sys.executable, f'{ROOT}/scripts/train.py', *flags], stderr=subprocess.PIPE, text=True
    )
    records = tmp_path / 'run' / 'records.jsonl'
    while process.poll() is None and not (records.exists() and records.stat().st_size > 20_000):
        time.sleep(0.05)
    process.terminate()
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 143 and 'run the same command again to resume' in errors
    done = call('train', *flags)
    assert done.returncode in (0, 3)
    assert len(records.read_text().splitlines()) == 2000


def test_what_is_advised_can_be_gone_on_with_from_where_it_was_proven(trained, tmp_path):
    """The line that says so is a command that runs, and the branch has what the experiment had: no symptom."""
    parent, run = f'--flagfile={trained[0]}/flags.txt', f'--run_dir={tmp_path / "run"}'
    branch = f'--branch_from={trained[0]}', '--branch_at=43', '--learning_rate=1e38', '--max_steps=300'
    done = call('train', parent, *branch, '--on_divergence=stop', run, '--json')
    assert done.returncode == 3, done.stderr
    screen = call('diagnose', f'--run_dir={tmp_path / "run"}', '--budget_steps=4000').stdout
    (line,) = (line for line in screen.splitlines() if line.startswith('or from step '))
    found = re.fullmatch(r'or from step (\d+) on, where it was replayed: python (\S+) (.*)', line)
    assert found is not None, line
    start = int(found[1])
    assert f' --branch_at={start} ' in line and start == 43, line
    branched = subprocess.run(
        [sys.executable, found[2], *shlex.split(found[3])], capture_output=True, text=True
    )
    assert branched.returncode == 0, branched.stderr
    rows = [json.loads(row) for row in (tmp_path / 'run-2' / 'records.jsonl').read_text().splitlines()]
    assert [row['step'] for row in rows] == [*range(start, 300)]
    half = call('train', f'--branch_from={tmp_path / "run"}', f'--run_dir={tmp_path / "other"}')
    assert half.returncode == 2 and half.stderr.count('\n') == 1 and '--branch_at' in half.stderr
    assert not (tmp_path / 'other').exists()
