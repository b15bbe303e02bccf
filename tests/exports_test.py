"""Records as files of other programs, each read back by its own reader, whatever somebody's loop calls its fields."""

import csv
import json
import math
import os
import signal
import struct
import subprocess
import sys
import time
import urllib.parse
import urllib.request
from pathlib import Path

import jax
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import small
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import jaxrnn
from jaxrnn import exports
from jaxrnn.exports import names
from jaxrnn.exports import parquet as parquet_format
from jaxrnn.exports.csv import as_text
from jaxrnn.record.record_file import RecordFile
from jaxrnn.types import UserError
from jaxrnn.words import run

ROOT = Path(__file__).parent.parent

ROWS = [
    {'step': 0, 'loss': 0.1, 'sound': True, 'count': 2**62 + 1, 'digest': '0123456789abcdef'},
    {'step': 1, 'loss': math.nan, 'sound': False, 'count': -1, 'digest': 'f' * 16, 'val': 1.0},
    {'step': 2, 'loss': math.inf, 'sound': True, 'count': 0, 'digest': 'e' * 16, 'flag': True, 'epoch': 1},
    {'step': 3, 'loss': -math.inf, 'sound': True, 'count': 1, 'digest': 'd' * 16, 'val': math.nan},
    {'step': 5, 'loss': 5e-324, 'sound': True, 'count': 2, 'digest': 'c' * 16, 'huge': 2**64 - 1},
    {'step': 9, 'loss': 1e-40, 'sound': True, 'count': 3, 'digest': 'b' * 16, 'checkify': 'nan: a, "b"'},
]
"""Whatever a record may hold: steps with a gap, what not every record has, numbers at their bounds."""

HOSTILE = [
    '=cmd|"/c calc"!A0', '+1', '-1', '@SUM(A1)', 'a;=1', '\uff1d1', 'a\nb', 'a\r\nb', '\x1b[31m', '\u202e',
    '../../up', '/etc/passwd', 'a//b', '.', '..', '', ' ', '_step', 'a,b', '"', "'", '\t=1', 'é', '日本語', 'a\x00b',
    'a=b', 'a_x003D_b', '{run}', '<script>', '%s', 'x' * 5000, 'x' * 5001, 'wall_time', 'LOSS', 'loss',
]  # fmt: skip
"""Names of fields."""


def written(directory, rows) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    records = RecordFile(directory / 'records.jsonl')
    for row in rows:
        records.append(row)
    records.close()
    return directory


@pytest.fixture
def recorded(tmp_path) -> Path:
    return written(tmp_path / 'run', ROWS)


@pytest.fixture
def hostile(tmp_path) -> Path:
    return written(tmp_path / 'run', [{'step': k, **dict.fromkeys(HOSTILE, float(k))} for k in range(3)])


def read_csv(path) -> list[dict[str, str]]:
    with open(path, encoding='utf-8', newline='') as file:
        return list(csv.DictReader(file, strict=True))


def scalars(path) -> dict[str, list[tuple[int, float]]]:
    read = EventAccumulator(str(path), size_guidance={'scalars': 0})
    read.Reload()
    return {tag: [(e.step, e.value) for e in read.Scalars(tag)] for tag in read.Tags()['scalars']}


def same(found: float, expected: float) -> bool:
    return found == expected or (math.isnan(found) and math.isnan(expected))


def cell(row, name):
    """As CSV has it."""
    value = row.get(name, '')
    return str(value).lower() if isinstance(value, bool) else str(value)


def call(*arguments, **environ):
    command = [sys.executable, '-m', 'jaxrnn', 'export', *arguments]
    env = {**os.environ, 'PYTHONPATH': f'{ROOT}{os.pathsep}{os.environ.get("PYTHONPATH", "")}', **environ}
    return subprocess.run(command, capture_output=True, text=True, env=env, timeout=120)


# Round trips


def test_csv(recorded, tmp_path):
    made = exports.export(recorded, to='csv', out=tmp_path / 'a.csv')
    assert made == (6, 10, tmp_path / 'a.csv')
    rows = read_csv(made.out)
    fields = ['step', 'loss', 'sound', 'count', 'digest', 'val', 'flag', 'epoch', 'huge', 'checkify']
    assert [*rows[0]] == fields
    assert rows == [{name: cell(row, name) for name in fields} for row in ROWS]
    assert [row['loss'] for row in rows[1:5]] == ['nan', 'inf', '-inf', '5e-324']
    assert [row['val'] for row in rows] == ['', '1.0', '', 'nan', '', '']


def test_parquet(recorded, tmp_path):
    path = tmp_path / 'a.parquet'
    exports.export(recorded, to='parquet', out=path)
    table = pq.read_table(path)
    types = {
        'step': pa.int64(), 'loss': pa.float64(), 'sound': pa.bool_(), 'count': pa.int64(), 'digest': pa.string(),
        'val': pa.float64(), 'flag': pa.bool_(), 'epoch': pa.int64(), 'huge': pa.uint64(), 'checkify': pa.string(),
    }  # fmt: skip
    assert dict(zip(table.schema.names, table.schema.types, strict=True)) == types
    for name in types:
        for found, row in zip(table.column(name).to_pylist(), ROWS, strict=True):
            expected = row.get(name)
            assert (found is None) == (expected is None) and type(found) is type(expected)
            assert found == expected or same(found, expected)
    assert table.column('val').null_count == 4 and table.column('loss').null_count == 0


def test_parquet_of_several_types_in_a_column(tmp_path):
    rows = [
        {'step': 0, 'mixed': 1, 'text': 'a', 'wide': -1},
        {'step': 1, 'mixed': 0.5, 'text': 2.5, 'wide': 2**64 - 1},
        {'step': 2, 'mixed': True},
    ]
    exports.export(written(tmp_path / 'run', rows), to='parquet', out=tmp_path / 'a')
    table = pq.read_table(tmp_path / 'a')
    assert table.column('mixed').to_pylist() == [1.0, 0.5, 1.0]
    assert table.column('text').to_pylist() == ['a', '2.5', None]
    assert table.column('wide').to_pylist() == [-1.0, 2.0**64, None]


def test_parquet_is_written_in_groups(tmp_path, monkeypatch):
    monkeypatch.setattr(parquet_format, 'ROWS', 100)
    rows = [{'step': k, 'loss': k / 3, **({'val': k} if k >= 250 else {})} for k in range(301)]
    exports.export(written(tmp_path / 'run', rows), to='parquet', out=tmp_path / 'a')
    file = pq.ParquetFile(tmp_path / 'a')
    assert file.num_row_groups == 4 and file.read().to_pylist() == [{'val': None, **row} for row in rows]


def test_tensorboard(recorded, tmp_path):
    path = tmp_path / 'logs' / 'a'
    exports.export(recorded, to='tensorboard', out=path)
    found = scalars(path)
    assert set(found) == {'loss', 'sound', 'count', 'val', 'flag', 'epoch', 'huge'}  # no texts
    for tag, events in found.items():
        expected = [(row['step'], np.float32(float(row[tag]))) for row in ROWS if tag in row]
        assert [step for step, _ in events] == [step for step, _ in expected]
        assert all(same(a, float(b)) for (_, a), (_, b) in zip(events, expected, strict=True)), tag
    assert found['loss'][-1][1] != 0  # below float32's smallest normal number


def test_times_of_events(tmp_path):
    rows = [{'step': 0, 'loss': 1.0}, {'step': 1, 'loss': 1.0, 'wall_time': 1.5e9}, {'step': 2, 'loss': 1.0},
            {'step': 3, 'loss': 1.0, 'wall_time': math.nan}]  # fmt: skip
    directory = written(tmp_path / 'run', rows)
    os.utime(directory / 'records.jsonl', (1.6e9, 1.6e9))
    exports.export(directory, to='tensorboard', out=tmp_path / 'a')
    read = EventAccumulator(str(tmp_path / 'a'))
    read.Reload()
    assert [event.wall_time for event in read.Scalars('loss')] == [1.6e9, 1.5e9, 1.5e9, 1.5e9]


def served(logs: Path, path: str) -> object:
    """What a real TensorBoard answers, once it has anything to answer."""
    command = [sys.executable, '-m', 'tensorboard.main', f'--logdir={logs}', '--host=127.0.0.1', '--port=0']
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            url = next(
                line.partition('http://')[2].split()[0] for line in process.stderr if 'http://' in line
            )
            for _ in range(100):
                with urllib.request.urlopen(f'http://{url.rstrip("/")}{path}', timeout=30) as answer:
                    if found := json.load(answer):
                        return found
                time.sleep(0.1)
        finally:
            process.kill()
            process.communicate()
    return None


def test_a_real_tensorboard_shows_it(hostile, tmp_path):
    """Under every name."""
    exports.export(hostile, to='tensorboard', out=tmp_path / 'logs' / 'run')
    tags = served(tmp_path / 'logs', '/data/plugin/scalars/tags')
    assert set(tags) == {'run'} and len(tags['run']) == len(HOSTILE)
    for tag in (max(tags['run'], key=len), '\\u202e', '<script>'):
        asked = urllib.parse.urlencode({'run': 'run', 'tag': tag})
        events = served(tmp_path / 'logs', f'/data/plugin/scalars/scalars?{asked}')
        assert [event[1:] for event in events] == [[0, 0], [1, 1], [2, 2]]


@pytest.mark.filterwarnings('ignore')
def test_mlflow(hostile, tmp_path):
    pytest.importorskip('jaxrnn.exports.mlflow', reason='no MLflow')  # imports it as it may be
    from mlflow import MlflowClient

    directory = written(tmp_path / 'other', ROWS)
    for source, out in ((directory, tmp_path / 'a b#?%c'), (tmp_path / 'run', tmp_path / 'b')):
        exports.export(source, to='mlflow', out=out)
    (tmp_path / 'a').symlink_to(tmp_path / 'a b#?%c')
    client = MlflowClient(tracking_uri=f'sqlite:///{tmp_path}/a/mlflow.db')
    (experiment,) = [e for e in client.search_experiments() if e.name == 'jaxrnn']
    (found,) = client.search_runs([experiment.experiment_id])
    assert found.info.run_name == 'other' and found.info.status == 'FINISHED'
    history = [(m.step, m.value) for m in client.get_metric_history(found.info.run_id, 'loss')]
    largest = sys.float_info.max
    expected = [(0, 0.1), (1, math.nan), (2, largest), (3, -largest), (5, 5e-324), (9, 1e-40)]
    assert all(a == c and same(b, d) for (a, b), (c, d) in zip(history, expected, strict=True))
    assert set(found.data.metrics) == {'loss', 'sound', 'count', 'val', 'flag', 'epoch', 'huge'}
    (artifact,) = client.list_artifacts(found.info.run_id)
    local = client.download_artifacts(found.info.run_id, artifact.path)
    assert [row['loss'] for row in read_csv(local)] == ['0.1', 'nan', 'inf', '-inf', '5e-324', '1e-40']
    client = MlflowClient(tracking_uri=f'sqlite:///{tmp_path}/b/mlflow.db')
    (found,) = client.search_runs([e.experiment_id for e in client.search_experiments()])
    assert len(found.data.metrics) == len(HOSTILE)


def logged(content: bytes):
    """The records of a log in LevelDB's format, as W&B writes it: after seven bytes of its own blocks of 32 kB, each of
    chunks with checksum, length and kind (whole, first, middle, last)."""
    place, parts = 7, b''
    while place + 7 <= len(content):
        if 32768 - place % 32768 < 7:
            place += 32768 - place % 32768
            continue
        length, kind = struct.unpack_from('<HB', content, place + 4)
        parts += content[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):
            yield parts
            parts = b''


@pytest.mark.filterwarnings('ignore')
def test_wandb(tmp_path):
    pytest.importorskip('jaxrnn.exports.wandb', reason='no W&B')
    from wandb.proto.wandb_internal_pb2 import Record

    directory = written(tmp_path / 'other', [{**row, '_step': 7, '=x': 1} for row in ROWS])
    exports.export(directory, to='wandb', out=tmp_path / 'a')
    (path,) = (tmp_path / 'a').rglob('*.wandb')
    rows = []
    for content in logged(path.read_bytes()):
        record = Record.FromString(content)
        if record.HasField('history'):
            items = record.history.item
            rows.append(
                {item.key or '.'.join(item.nested_key): json.loads(item.value_json) for item in items}
            )
        if record.HasField('run'):
            assert (record.run.display_name, record.run.host) == ('other', '')
    assert [row['_step'] for row in rows] == [0, 1, 2, 3, 5, 9]
    assert [str(row['loss']) for row in rows] == ['0.1', 'nan', 'inf', '-inf', '5e-324', '1e-40']
    assert [str(float(row.get('val', -1))) for row in rows] == ['-1.0', '1.0', '-1.0', 'nan', '-1.0', '-1.0']
    assert {row['field_step'] for row in rows} == {7} and rows[0]['count'] == 2**62 + 1
    assert all('digest' not in row for row in rows)
    left = [path for path in (tmp_path / 'a').rglob('*') if path.is_symlink() or path.suffix == '.log']
    assert left == []


# Any run


def test_a_run_of_our_own(tmp_path):
    config = small.configuration().changed(max_steps=30, vectors=str(vectors(tmp_path)), checkpoint_every=30)
    run.train_run(config, tmp_path / 'run')
    exports.export(tmp_path / 'run', to='parquet', out=tmp_path / 'a')
    table = pq.read_table(tmp_path / 'a')
    records = RecordFile(tmp_path / 'run' / 'records.jsonl').read()
    assert table.to_pylist() == list(records) and table.schema.field('finite_loss').type == pa.bool_()


def vectors(folder: Path) -> Path:
    from jaxrnn.words import data

    path = folder / 'vectors.txt'
    words = [f'{a}{b}{c}' for a in 'abcd' for b in 'abcd' for c in 'abc']
    data.write_vectors(path, words, np.random.default_rng(0).normal(size=(48, 8)).astype(np.float32))
    return path


def test_a_loop_of_somebody_else(tmp_path):
    step = jax.jit(lambda x, batch: (x - batch, {'loss': x, 'deep': {'er': [x, x]}}))
    state = jax.numpy.float32(1)
    with jaxrnn.Recorder(tmp_path / 'run', state) as recorder:
        for _ in range(5):
            state, metrics = step(state, 0.25)
            recorder(state, metrics, 0.25)
        jaxrnn.export(tmp_path / 'run', to='csv', out=tmp_path / 'while.csv')  # a step late
    jaxrnn.export(tmp_path / 'run', to='csv', out=tmp_path / 'a.csv')
    rows = read_csv(tmp_path / 'a.csv')
    assert [row['deep_er_1'] for row in rows] == ['1.0', '0.75', '0.5', '0.25', '0.0']
    assert len(read_csv(tmp_path / 'while.csv')) == 4


def test_a_training_by_keras(tmp_path):
    import keras

    model = keras.Sequential([keras.layers.Input((2,)), keras.layers.Dense(1, use_bias=False)])
    model.compile('sgd', 'mse')
    x = np.ones((32, 2), np.float32)
    model.fit(x, x[:, :1], batch_size=8, verbose=0, callbacks=[jaxrnn.keras.Recorder(tmp_path / 'run')])
    jaxrnn.export(tmp_path / 'run', to='parquet', out=tmp_path / 'a')
    found = pq.read_table(tmp_path / 'a').to_pydict()
    assert (
        found['step'] == [0, 1, 2, 3]
        and found['epoch'] == [0] * 4
        and {'loss', 'learning_rate'} <= set(found)
    )


@pytest.mark.parametrize('to', ['csv', 'parquet', 'tensorboard'])
def test_a_run_that_is_still_written(to, recorded, tmp_path):
    whole = (recorded / 'records.jsonl').read_bytes()
    (recorded / 'records.jsonl').write_bytes(whole[:-20])
    assert exports.export(recorded, to=to, out=tmp_path / 'a').records == 5
    assert (recorded / 'records.jsonl').read_bytes() == whole[:-20]


def test_a_damaged_record_is_refused(recorded, tmp_path):
    """As by every command that looks into a run."""
    lines = (recorded / 'records.jsonl').read_bytes().splitlines(keepends=True)
    lines[2] = lines[2].replace(b'"count": 0', b'"count": 8')
    (recorded / 'records.jsonl').write_bytes(b''.join(lines))
    with pytest.raises(UserError, match='line 3 is not a record'):
        exports.export(recorded, to='csv', out=tmp_path / 'a')
    assert not (tmp_path / 'a').exists()


def test_nothing_outside_of_a_run_is_read(tmp_path):
    outside = written(tmp_path / 'other', ROWS)
    (tmp_path / 'run').mkdir()
    (tmp_path / 'run' / 'records.jsonl').symlink_to(outside / 'records.jsonl')
    with pytest.raises(UserError, match=r'records\.jsonl: a link found'):
        exports.export(tmp_path / 'run', to='csv', out=tmp_path / 'a')


def test_a_hundred_thousand_records(tmp_path):
    count = 100_000
    lines = (f'{{"step": {k}, "loss": {k / 7}, "sound": true, "digest": "{k:016x}"}}\n' for k in range(count))
    (tmp_path / 'run').mkdir()
    with open(tmp_path / 'run' / 'records.jsonl', 'w') as file:
        file.writelines(lines)
    begun = time.process_time()
    for to in ('csv', 'parquet', 'tensorboard'):
        exports.export(tmp_path / 'run', to=to, out=tmp_path / to)
    assert time.process_time() - begun < 30  # some 5, of which TensorBoard's checksums are most
    assert len(read_csv(tmp_path / 'csv')) == pq.read_metadata(tmp_path / 'parquet').num_rows == count
    assert len(scalars(tmp_path / 'tensorboard')['loss']) == count


# Hostile names


def test_hostile_names_in_csv(hostile, tmp_path):
    exports.export(hostile, to='csv', out=tmp_path / 'a')
    text = (tmp_path / 'a').read_text()
    assert text.count('\n') == 4 and text.replace('\n', '').isprintable()
    rows = read_csv(tmp_path / 'a')
    assert len(rows[2]) == len(HOSTILE) + 1 and {*rows[2].values()} == {'2', '2.0'}
    for separator in ',;\t|"':
        for part in text.splitlines()[0].split(separator):
            assert not part.strip(' "').startswith(('=', '+', '-', '@', '\uff1d')), part
    assert max(map(len, rows[0])) <= names.MOST


@pytest.mark.parametrize('text', ['=1+1', 'a;=1', 'a, -1', ' @x', 'a\t=1', 'a"=1', '\n=1', '\uff0b1'])
def test_no_text_is_a_formula(text, tmp_path):
    shown = as_text(text)
    assert "'" in shown or shown.startswith('\\') or '\\t=' in shown
    rows = [{'step': 0, 'checkify': text}, {'step': 1, 'checkify': 'a = b, x-y'}]
    exports.export(written(tmp_path / 'run', rows), to='csv', out=tmp_path / 'a')
    assert [row['checkify'] for row in read_csv(tmp_path / 'a')] == [shown, 'a = b, x-y']


def test_hostile_names_in_parquet(hostile, tmp_path):
    exports.export(hostile, to='parquet', out=tmp_path / 'a')
    assert pq.read_table(tmp_path / 'a').to_pylist()[2] == {'step': 2, **dict.fromkeys(HOSTILE, 2.0)}


@pytest.mark.parametrize('to', ['csv', 'parquet', 'tensorboard'])
def test_nothing_is_made_beside_an_export(to, hostile, tmp_path):
    before = {*tmp_path.rglob('*')}
    exports.export(hostile, to=to, out=tmp_path / 'a')
    made = {*tmp_path.rglob('*')} - before
    assert len(made) == (2 if to == 'tensorboard' else 1) and tmp_path / 'a' in made


@pytest.mark.parametrize('spell', [names.as_word, as_text])
def test_no_two_names_become_one(spell):
    found = names.distinct(HOSTILE, spell)
    assert len({*found.values()}) == len(HOSTILE) and max(map(len, found.values())) <= names.MOST
    assert found['loss'] == 'loss'


# Where it goes


KINDS = {
    'file': lambda path: path.write_text('kept'),
    'folder': lambda path: path.mkdir(),
    'link': lambda path: path.symlink_to(path.parent / 'nowhere'),
}


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('to', ['csv', 'tensorboard'])
def test_what_is_there_stays(kind, to, recorded, tmp_path):
    KINDS[kind](tmp_path / 'a')
    before = os.lstat(tmp_path / 'a')
    with pytest.raises(UserError, match=r'--out: .*a: a (file|directory|link) found, nothing expected'):
        exports.export(recorded, to=to, out=tmp_path / 'a')
    assert os.lstat(tmp_path / 'a') == before and not (tmp_path / 'nowhere').exists()


@pytest.mark.parametrize('to', ['csv', 'tensorboard'])
def test_what_comes_to_be_there_meanwhile_stays(to, recorded, tmp_path, monkeypatch):
    out = tmp_path / 'a'
    writer = exports._loaded(to)
    original = writer.write

    def write(run, path):
        out.write_text('kept')
        original(run, path)

    monkeypatch.setattr(writer, 'write', write)
    with pytest.raises(UserError, match='a: a file found, nothing expected'):
        exports.export(recorded, to=to, out=out)
    assert out.read_text() == 'kept' and {path.name for path in tmp_path.iterdir()} == {'run', 'a'}


@pytest.mark.parametrize('to', ['csv', 'parquet', 'tensorboard'])
def test_what_is_interrupted_leaves_nothing(to, recorded, tmp_path, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr('jaxrnn.record.records.Records.blocks', interrupted)
    with pytest.raises(KeyboardInterrupt):
        exports.export(recorded, to=to, out=tmp_path / 'a')
    assert {path.name for path in tmp_path.iterdir()} == {'run'}


def test_what_is_killed_leaves_nothing_that_looks_whole(tmp_path):
    (tmp_path / 'run').mkdir()
    with open(tmp_path / 'run' / 'records.jsonl', 'w') as file:
        file.writelines(f'{{"step": {k}, "loss": {k / 7}}}\n' for k in range(400_000))
    command = [sys.executable, '-m', 'jaxrnn', 'export', f'--run_dir={tmp_path}/run', '--to=tensorboard',
               f'--out={tmp_path}/logs/a']  # fmt: skip
    env = {**os.environ, 'PYTHONPATH': str(ROOT)}
    with subprocess.Popen(command, env=env) as process:
        until = time.monotonic() + 60
        while time.monotonic() < until and not [*tmp_path.glob('logs/*/*')]:
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
    names = [path.name for path in (tmp_path / 'logs').rglob('*')]
    assert names and not (tmp_path / 'logs' / 'a').exists() and not any('tfevents' in name for name in names)


def test_a_path_that_nothing_can_be_written_to(recorded, tmp_path):
    done = call(f'--run_dir={recorded}', '--out=/dev/full/a')
    assert done.returncode == 2 and done.stderr.count('\n') == 1 and '--out: /dev/full/a' in done.stderr


# What is asked for


def test_the_command(recorded, tmp_path):
    done = call(f'--run_dir={recorded}', f'--out={tmp_path}/a b.csv', '--json')
    assert done.returncode == 0, done.stderr
    answer = {'records': 6, 'fields': 10, 'out': f'{tmp_path}/a b.csv'}
    assert json.loads(done.stdout) == answer and '6 records of 10 fields written to' in done.stderr
    done = call(f'--run_dir={recorded}', '--to=tensorboard', f'--out={tmp_path}/a b')
    assert f"next: tensorboard --logdir='{tmp_path}/a b'" in done.stderr


@pytest.mark.parametrize(
    ('arguments', 'says'),
    [
        (['--run_dir={run}', '--to=xls', '--out={out}'], '--to=xls: value should be one of'),
        (['--run_dir={run}'], '--out: nothing found, the path of a new file or folder expected'),
        (['--out={out}'], '--run_dir: nothing found'),
        (['--run_dir={out}', '--out={out}'], 'holds no records'),
        (['--run_dir={run}', '--out={run}'], 'a directory found, nothing expected'),
        (['--run_dir={run}', '--out={out}', 'more'], "'more' found, flags only expected"),
    ],
)
def test_a_mistake_is_one_line(arguments, says, recorded, tmp_path):
    done = call(*(word.format(run=recorded, out=tmp_path / 'a') for word in arguments))
    assert done.returncode == 2 and says in done.stderr and done.stderr.count('\n') == 1, done.stderr
    assert not (tmp_path / 'a').exists()


def test_an_unknown_format(recorded, tmp_path):
    with pytest.raises(
        UserError, match=r"--to: 'xls' found, one of csv, parquet, tensorboard, mlflow, wandb"
    ):
        exports.export(recorded, to='xls', out=tmp_path / 'a')
    with pytest.raises(UserError, match=r'--out: .*x00b.* a name without zero bytes expected'):
        exports.export(recorded, to='csv', out=f'{tmp_path}/a\0b')


@pytest.mark.parametrize('to', [name for name, found in exports.FORMATS.items() if found.library])
def test_a_library_that_is_missing(to, recorded, tmp_path, monkeypatch):
    library = exports.FORMATS[to].library
    for name in [
        n for n in sys.modules if n.startswith((f'jaxrnn.exports.{to}', f'{library}.')) or n == library
    ]:
        monkeypatch.delitem(sys.modules, name)

    class Missing:
        @staticmethod
        def find_spec(name, path=None, target=None):
            if name == library:
                raise ModuleNotFoundError(f'No module named {name!r}', name=name)

    monkeypatch.setattr(sys, 'meta_path', [Missing, *sys.meta_path])
    with pytest.raises(
        UserError, match=f'--to={to}: {library} is not installed; install it: pip install {library}$'
    ):
        exports.export(recorded, to=to, out=tmp_path / 'a')
    assert {path.name for path in tmp_path.iterdir()} == {'run'}


def test_a_library_that_is_broken(recorded, tmp_path, monkeypatch):
    monkeypatch.delitem(sys.modules, 'jaxrnn.exports.parquet', raising=False)
    monkeypatch.setitem(sys.modules, 'pyarrow.parquet', None)
    monkeypatch.delattr(pa, 'parquet')
    with pytest.raises(UserError, match=r'--to=parquet: pyarrow can not be imported \(.*\); install it'):
        exports.export(recorded, to='parquet', out=tmp_path / 'a')


def test_every_format_has_its_file():
    files = {path.stem for path in (ROOT / 'jaxrnn' / 'exports').glob('*.py')}
    assert files - {'__init__', 'names', 'numbers', 'environ'} == set(exports.FORMATS)
