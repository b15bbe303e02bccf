"""A run is data, not code: looking into a stranger's runs nothing of it, reads nothing outside of it without the
user's word, and whatever is wrong with it is one line.
"""

import contextlib
import io
import json
import os
import pickle
import shutil
import stat
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest

from jaxrnn import environment, files
from jaxrnn.record import layout
from jaxrnn.record.checkpoint import Checkpoints
from jaxrnn.types import UserError
from jaxrnn.words import config, data, investigation, opening, run
from jaxrnn.words.config import Config

COMMANDS = {'bisect': [], 'trace': ['--step=3'], 'diagnose': [], 'embed': ['ab']}
"""Those that look into a run, and what else they need."""

DRIVER = """
import contextlib, io, json, sys, traceback
from jaxrnn.cli import common
from jaxrnn.cli.commands import load
name, calls = sys.argv[1], json.loads(sys.argv[2])
sys.argv = ['jaxrnn', name]
module = load(name)
for arguments in calls:
    errors, out = io.StringIO(), io.StringIO()
    with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(out):
        try:
            code = common.run(module.main, '', f'jaxrnn {name}', arguments)
        except BaseException:
            code = 1
            traceback.print_exc()
    print(json.dumps([code, errors.getvalue(), out.getvalue()]), flush=True)
"""
"""Calls a command many times in one process, which starts JAX once."""


def call(name, *calls, timeout=300, **environ):
    """Exit code, standard error and standard output of each call of a command."""
    done = subprocess.run(
        [sys.executable, '-c', DRIVER, name, json.dumps(calls)],
        capture_output=True,
        text=True,
        timeout=timeout,
        env={**os.environ, 'PYTHONPATH': str(Path(__file__).parent.parent), **environ},
    )
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(answers) == len(calls), done.stderr
    return answers


def refused(answer, *says):
    code, errors, _ = answer
    assert code == 2, errors
    assert len(errors.strip().splitlines()) == 1, errors
    for each in says:
        assert each in errors, errors


def edited(directory, **options) -> Config:
    """The run's config.json with other options in it."""
    path = directory / 'config.json'
    changed = Config.from_json(json.loads(path.read_text())).changed(**options)
    path.write_text(json.dumps(changed.to_json()))
    return changed


@pytest.fixture(scope='module')
def vectors(tmp_path_factory) -> Path:
    rng = np.random.default_rng(0)
    words: dict[str, None] = {'ab': None}
    while len(words) < 40:
        words[''.join(rng.choice(list('abcdefgh'), rng.integers(2, 7)))] = None
    path = tmp_path_factory.mktemp('data') / 'vectors.txt'
    data.write_vectors(path, list(words), rng.normal(size=(40, 8)).astype(np.float32))
    return path


@pytest.fixture(scope='module')
def kept(vectors, tmp_path_factory) -> Path:
    """A run of 40 steps."""
    directory = tmp_path_factory.mktemp('runs') / 'run'
    made = Config(
        data=config.Data(vectors=str(vectors)),
        model=config.Model(hidden=8),
        training=config.Training(batch_size=8),
        loop=config.Loop(max_steps=40, checkpoint_every=20),
    )
    run.train_run(made, directory)
    return directory


@pytest.fixture
def copied(kept, tmp_path) -> Path:
    shutil.copytree(kept, tmp_path / 'run')
    return tmp_path / 'run'


class Evil:
    """Makes a folder where it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.fixture
def evil(copied, tmp_path) -> tuple[Path, Path, Path]:
    """A run that says its vectors are in a pickle, and that it may be read; the pickle; what that makes."""
    pickled, made = tmp_path / 'evil.kv', tmp_path / 'executed'
    pickled.write_bytes(pickle.dumps(Evil(made), protocol=4))
    edited(copied, vectors=str(pickled), allow_pickle=True)
    (copied / 'data.npz').unlink()
    return copied, pickled, made


# Permission


@pytest.mark.parametrize('name', COMMANDS)
def test_a_run_cannot_have_its_pickle_read(name, evil):
    directory, pickled, made = evil
    run_dir, more = f'--run_dir={directory}', COMMANDS[name]
    asked, typed, allowed = call(
        name,
        [run_dir, *more],
        [run_dir, f'--vectors={pickled}', *more],
        [run_dir, f'--vectors={pickled}', '--allow_pickle', *more],
    )
    refused(asked, str(pickled), f'--vectors={pickled}')
    refused(typed, str(pickled), '--allow_pickle')
    refused(allowed, 'no readable KeyedVectors')
    assert made.exists()  # on the third call's own word
    made.rmdir()
    refused(*call(name, [run_dir, '--allow_pickle', *more]), f'--vectors={pickled}')
    assert not made.exists()


@pytest.mark.parametrize('option', ['vectors', 'corpus'])
def test_a_path_of_a_run_is_not_opened(option, copied, tmp_path):
    """Not even to say that it isn't there: that would tell a stranger's run what is."""
    for path in (tmp_path / 'none.txt', Path('/dev/zero')):
        (copied / 'data.npz').unlink(missing_ok=True)
        edited(copied, vectors='', corpus='')
        edited(copied, **{option: str(path)})
        with pytest.raises(UserError, match=rf'data\.npz.*{path}.*--{option}={path}'):
            run.open_run(copied)


def test_a_file_of_flags_allows_nothing(evil, tmp_path):
    directory, pickled, made = evil
    flags = tmp_path / 'flags.txt'
    flags.write_text(f'--vectors={pickled}\n--allow_pickle=true\n')
    new = f'--run_dir={tmp_path / "new"}'
    refused(*call('bisect', [f'--run_dir={directory}', f'--flagfile={flags}']), '--vectors', 'command line')
    refused(*call('train', [f'--flagfile={flags}', new]), str(pickled), '--allow_pickle')
    assert not made.exists()
    refused(*call('train', [f'--flagfile={flags}', '--noallow_pickle', new]), '--allow_pickle')
    assert not made.exists()
    refused(*call('train', [f'--flagfile={flags}', '--allow_pickle', new]), 'no readable KeyedVectors')
    assert made.exists()


def test_the_users_word_is_enough(copied, vectors, tmp_path):
    """The file may have moved since; another is found to be another."""
    (copied / 'data.npz').unlink()
    moved, other = tmp_path / 'moved.txt', tmp_path / 'other.txt'
    moved.write_bytes(vectors.read_bytes())
    other.write_text(vectors.read_text().replace('ab ', 'ba ', 1))
    found = investigation.bisect_run(copied, use_records=False, source=opening.Source(vectors=str(moved)))
    assert found.diagnosis.replay.bit_identical
    with pytest.raises(UserError, match=r'--vectors: .*other\.txt'):
        run.open_run(copied, source=opening.Source(vectors=str(other)))


def test_a_run_trained_on_a_pickle_resumes_as_before(copied, tmp_path):
    """From its own copy of the data, with the permission typed again or not."""
    pickled = tmp_path / 'own.kv'
    shutil.rmtree(copied)
    from gensim.models import KeyedVectors

    words = ['ab', 'cd', 'ef', 'gh', 'abcd', 'efgh']
    keyed = KeyedVectors(3)
    keyed.add_vectors(words, np.random.default_rng(0).normal(size=(6, 3)).astype(np.float32))
    keyed.save(str(pickled))
    first = [
        f'--vectors={pickled}', '--allow_pickle', '--hidden=4', '--batch_size=2', '--max_steps=4',
        '--validation_share=0', '--test_share=0', f'--run_dir={copied}',
    ]  # fmt: skip
    trained, same = call('train', first, first)
    (further,) = call('train', [f'--flagfile={copied}/flags.txt', f'--run_dir={copied}', '--max_steps=6'])
    assert [trained[0], same[0], further[0]] == [0, 0, 0], (trained, same, further)


# Compiled programs

NOW = {'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0', 'JAX_COMPILATION_CACHE_DIR': ''}


def entries(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.rglob('*-cache')}


def test_programs_of_a_run_are_not_loaded(copied, tmp_path):
    """They live with the user; what lies in a run is neither read nor added to."""
    home = {'XDG_CACHE_HOME': str(tmp_path / 'home'), 'JAXRNN_CACHE': '', **NOW}
    description = environment.digest(environment.describe())
    mine = tmp_path / 'home' / 'jaxrnn' / 'compiled'
    command = [f'--run_dir={copied}', '--norecords', '--json']
    (first,) = call('bisect', command, **home)
    assert first[0] == 0 and entries(mine) and not (copied / 'compiled').exists()
    assert stat.S_IMODE(mine.stat().st_mode) == 0o700
    planted = copied / 'compiled' / description
    shutil.copytree(mine / description, planted)
    for path in planted.glob('*-cache'):
        path.write_bytes(b'damaged')
    before = entries(mine)
    (second,) = call('bisect', command, **home)
    assert second[0] == 0 and 'compilation cache' not in second[1], second  # JAX would warn of them
    assert json.loads(second[2].splitlines()[-1])['replay']['bit_identical']
    assert set(entries(planted).values()) == {b'damaged'}
    assert 'jit_observed' in {name.split('-')[0] for name in before} and entries(mine) == before


# What a run was trained with


def test_another_configuration_is_not_called_hardware(copied):
    changed = edited(copied, learning_rate=2e-3)
    for look in (
        lambda: investigation.bisect_run(copied),
        lambda: investigation.diagnose_run(copied),
        lambda: investigation.inspect_run(copied, 3),
        lambda: run.open_run(copied),
    ):
        with pytest.raises(
            UserError, match=r'config\.json is not the one that the run was trained with'
        ) as e:
            look()
        assert changed.digest() in str(e.value)


def test_other_data_is_not_called_hardware(copied):
    found = data.read_dataset(copied / 'data.npz')
    data.write_dataset(copied / 'data.npz', found._replace(vectors=found.vectors * np.float32(1.01)))
    with pytest.raises(UserError, match=r'data\.npz is not the one that the run was trained with'):
        investigation.bisect_run(copied)


def test_what_moves_no_bit_may_differ(copied):
    edited(copied, max_steps=99, keep_latest=3)
    assert run.open_run(copied).config.loop.max_steps == 99


def test_a_checkpoint_without_digests_is_believed(copied):
    """As is one of somebody's own CheckpointManager."""
    for step in (0, 20, 40):
        shutil.rmtree(copied / 'checkpoints' / str(step) / 'meta')
    edited(copied, learning_rate=2e-3)
    run.open_run(copied)


def test_weights_of_another_step_are_not_taken(copied):
    """A checkpoint's state is the one that was saved with its digest, for whoever asks for vectors, too."""
    opened, checkpoints = run.open_run(copied), copied / 'checkpoints'
    assert run.newest_params(opened)
    shutil.rmtree(checkpoints / '40' / 'state')
    shutil.copytree(checkpoints / '20' / 'state', checkpoints / '40' / 'state')
    with pytest.raises(UserError, match='40: the checkpoint was altered on disk'):
        run.newest_params(opened)


@pytest.mark.parametrize(
    'content',
    [b'', b'{', b'[]', b'3', b'\xff', b'[' * 100_000, b'{"config": [1]}', b'{"state": 7, "config": ""}'],
)
def test_digests_that_cannot_be_read(content, copied):
    found = [path for path in (copied / 'checkpoints' / '40' / 'meta').iterdir() if path.is_file()]
    (written,) = [path for path in found if b'"config"' in path.read_bytes()]
    written.write_bytes(content)
    with pytest.raises(UserError, match='40') as raised:
        run.open_run(copied)
    assert len(str(raised.value)) < 700


def test_a_sample_that_is_another_is_not_called_data_npz(copied, monkeypatch):
    """A run without a source was made from gensim's own sample, which may have changed since."""
    edited(copied, vectors='')
    found = data.read_dataset(copied / 'data.npz')
    (copied / 'data.npz').unlink()
    monkeypatch.setattr(data, 'load', lambda *_, **__: found._replace(digest='another'))
    for step in (0, 20, 40):  # of which the configuration alone would be another now
        shutil.rmtree(copied / 'checkpoints' / str(step) / 'meta')
    monkeypatch.setattr(Checkpoints, 'meta', lambda *_: {'data': found.digest})
    with pytest.raises(UserError, match=r"has no data\.npz, and gensim's sample of Wikipedia is not the one"):
        run.open_run(copied)


# Damages


def fifo(path):
    os.mkfifo(path)


def link(path):
    outside = path.parent.parent / f'outside-{path.name}'
    outside.write_bytes(b'kept')
    path.symlink_to(outside)


KINDS = {
    'directory': lambda path: path.mkdir(),
    'FIFO': fifo,
    'link': link,
    'dangling link': lambda path: path.symlink_to(path.parent / 'nowhere'),
}
TEXTS = {
    'empty': b'',
    'not JSON': b'{"data"',
    'not UTF-8': b'{"\xff\xfe": {}}',
    'deep': b'[' * 200_000 + b']' * 200_000,
    'gigantic': b' ' * (files.MOST_BYTES + 1),
}
OF_CONFIG = {
    'a list': b'[1, 2]',
    'a number': b'3',
    'a group that is a list': b'{"data": [1]}',
    'a group that is none': b'{"data": null}',
    'an unknown group': b'{"\\u001b[31mdata": {}}',
    'an unknown option': b'{"data": {"no_such": 1}}',
    'a text for a number': b'{"model": {"hidden": "8"}}',
    'a list for a number': b'{"model": {"hidden": [8]}}',
    'a dictionary for a text': b'{"data": {"vectors": {"a": 1}}}',
    'not a number': b'{"optimiser": {"learning_rate": NaN}}',
    'a number of 400 digits': b'{"optimiser": {"learning_rate": 1' + b'0' * 400 + b'}}',
    'a text of a million': b'{"model": {"network": "' + b'a' * 1_000_000 + b'"}}',
}
OF_REWINDS = {
    'a dictionary': b'{}',
    'of numbers': b'[1]',
    'incomplete': b'[{"kind": "spike", "step": 5, "to": 0, "done": true}]',
    'more': b'[{"kind": "spike", "step": 5, "to": 0, "skipped": null, "done": true, "more": 1}]',
    'a text for a step': b'[{"kind": "spike", "step": "5", "to": 0, "skipped": null, "done": true}]',
    'a number for a kind': b'[{"kind": 7, "step": 5, "to": 0, "skipped": null, "done": true}]',
    'one end': b'[{"kind": "spike", "step": 5, "to": 0, "skipped": [3], "done": true}]',
    'from before the start': b'[{"kind": "spike", "step": 5, "to": 0, "skipped": [0, 5], "done": true}]',
    'a checkpoint of none': b'[{"kind": "spike", "step": 5, "to": -1, "skipped": null, "done": false}]',
    'too much in all': json.dumps(
        [
            {'kind': 'spike', 'step': 5, 'to': 0, 'skipped': [i, i + 999_999], 'done': True}
            for i in range(1, 2000)
        ]
    ).encode(),
    'without end': b'[{"kind": "spike", "step": 5, "to": 0, "skipped": [1, 1000000000000], "done": true}]',
}


def arrays(change) -> callable:
    def make(whole: bytes) -> bytes:
        with np.load(io.BytesIO(whole)) as file:
            found = dict(file)
        change(found)
        written = io.BytesIO()
        np.savez(written, **found)
        return written.getvalue()

    return make


def compressed(whole: bytes) -> bytes:
    with np.load(io.BytesIO(whole)) as file:
        found = dict(file)
    found['words'] = np.zeros(1 << 26, np.uint8)
    written = io.BytesIO()
    np.savez_compressed(written, **found)
    return written.getvalue()


def claiming(whole: bytes) -> bytes:
    """An array whose header claims 10^12 numbers."""
    written = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(whole)) as old, zipfile.ZipFile(written, 'w') as new:
        for name in old.namelist():
            body = old.read(name)
            if name == 'vectors.npy':
                header = b"{'descr': '<f4', 'fortran_order': False, 'shape': (1000000000, 1000), }"
                body = b'\x93NUMPY\x01\x00' + (len(header) + 1).to_bytes(2, 'little') + header + b'\n'
            new.writestr(name, body)
    return written.getvalue()


OF_DATA = {
    'cut short': lambda whole: whole[: len(whole) // 2],
    'a bit flipped': lambda whole: whole[:2000] + bytes([whole[2000] ^ 4]) + whole[2001:],
    'no zip': lambda whole: b'PK\x03\x04 and no more',
    'an array': lambda whole: np.lib.format.magic(1, 0) + whole,
    'one is missing': arrays(lambda found: found.pop('train')),
    'objects': arrays(lambda found: found.update(train=np.array([Evil(Path('x')), None], object))),
    'other types': arrays(lambda found: found.update(vectors=found['vectors'].astype('<U9'))),
    'floats for rows': arrays(lambda found: found.update(train=found['train'].astype(np.float32))),
    'other shapes': arrays(lambda found: found.update(vectors=found['vectors'][:-1])),
    'one axis': arrays(lambda found: found.update(letters=found['letters'][0])),
    'no rows': arrays(lambda found: found.update(train=found['train'][:0])),
    'a row of none': arrays(lambda found: found.update(train=found['train'] + 9999)),
    'a letter of none': arrays(lambda found: found.update(letters=found['letters'] + 99)),
    'words not UTF-8': arrays(lambda found: found.update(words=np.full(9, 255, np.uint8))),
    'a bomb': compressed,
    'a claim': claiming,
}
FILES = ('config.json', 'data.npz', 'records.jsonl', 'rewinds.json', 'experiments.jsonl', 'evaluation.json')
OURS = ('diagnosis.json', 'flags.txt', 'lock', 'alerts.jsonl')


def damages():
    """(file, what is wrong) -> what makes it so, of the path and the whole file's bytes; both refused."""
    table = {}
    for name in (*FILES, *OURS, 'checkpoints'):
        for kind, make in KINDS.items():
            if (name, kind) != ('checkpoints', 'directory'):
                table[name, kind] = lambda path, whole, make=make: make(path)
    for name, more in (('config.json', OF_CONFIG), ('rewinds.json', OF_REWINDS)):
        for kind, text in {**TEXTS, **more}.items():
            table[name, kind] = lambda path, whole, text=text: path.write_bytes(text)
    for kind, change in OF_DATA.items():
        table['data.npz', kind] = lambda path, whole, change=change: path.write_bytes(change(whole))
    return table


def damaged(kept: Path, folder: Path) -> dict[tuple[str, str], Path]:
    """A run for each damage; one file of it is damaged."""
    made = {}
    for number, ((name, kind), make) in enumerate(damages().items()):
        directory = folder / str(number) / 'run'
        shutil.copytree(kept, directory)
        path = directory / name
        whole = path.read_bytes() if path.is_file() else b''
        if path.is_dir():
            shutil.rmtree(path)
        path.unlink(missing_ok=True)
        make(path, whole)
        made[name, kind] = directory
    return made


OF_META = {
    'empty': b'',
    'a list': b'[]',
    'a step in words': b'{"step": "1"}',
    'a digest of numbers': b'{"state": 7}',
    'nested': b'{"step": ' + b'[' * 100_000 + b']' * 100_000 + b'}',
    'not UTF-8': b'{"state": "\xff"}',
    'large': b'{"state": "' + b'a' * (2 << 20) + b'"}',
    'a NaN': b'{"step": NaN}',
}


@pytest.mark.parametrize('content', OF_META.values(), ids=list(OF_META))
def test_a_damaged_meta_is_named(kept, tmp_path, content):
    shutil.copytree(kept, tmp_path, dirs_exist_ok=True)
    checkpoints = Checkpoints(tmp_path / 'checkpoints')
    step = checkpoints.steps()[-1]
    (tmp_path / 'checkpoints' / str(step) / 'meta' / 'metadata').write_bytes(content)
    with pytest.raises(
        UserError, match=rf"checkpoints/{step}/meta: it can't be read \(.{{1,200}}\); delete"
    ) as error:
        checkpoints.meta(step)
    assert str(error.value).isprintable()


def test_notes_of_any_size_are_not_read(kept, tmp_path):
    shutil.copytree(kept, tmp_path, dirs_exist_ok=True)
    checkpoints = Checkpoints(tmp_path / 'checkpoints')
    step = checkpoints.steps()[-1]
    with open(tmp_path / 'checkpoints' / str(step) / 'state' / '_METADATA', 'ab') as file:
        file.truncate(1 << 40)  # takes no room
    with pytest.raises(UserError, match='_METADATA: 1,099,511,627,776 bytes found, at most'):
        checkpoints.restore(step)


@pytest.mark.parametrize('command', [*COMMANDS, 'train'])
def test_every_damage_is_one_line(command, kept, tmp_path):
    """No traceback, no waiting for a FIFO, and nothing outside of the run is read or written."""
    runs = damaged(kept, tmp_path)
    more = COMMANDS.get(command, [f'--flagfile={kept}/flags.txt', '--max_steps=45'])
    answers = call(command, *([f'--run_dir={directory}', *more] for directory in runs.values()))
    wrong = {}
    for (name, kind), (code, errors, _) in zip(runs, answers, strict=True):
        if code != 2 or name not in errors or len(errors.strip().splitlines()) != 1 or len(errors) > 700:
            wrong[name, kind] = (code, errors[-500:])
        if not errors.strip().isprintable():
            wrong[name, kind, 'control characters'] = errors[-500:]
    assert wrong == {}
    for directory in runs.values():
        for outside in directory.parent.glob('outside-*'):
            assert outside.read_bytes() == b'kept'


@pytest.mark.parametrize('name', ['evaluation.json', 'diagnosis.json'])
def test_results_that_are_damaged_are_written_anew(name, copied):
    """Nothing reads them."""
    (copied / name).write_bytes(TEXTS['not UTF-8'])
    investigation.bisect_run(copied)
    (again,) = call('train', [f'--flagfile={copied}/flags.txt', f'--run_dir={copied}'])
    assert again[0] == 0 and json.loads((copied / name).read_text())


FLAGS = {
    'none': lambda path: None,
    **KINDS,
    'not UTF-8': lambda path: path.write_bytes(b'--hidden=\xff\n'),
    'gigantic': lambda path: path.write_bytes(b'--hidden=8\n' * 1_000_000),
    'itself': lambda path: path.write_text(f'--flagfile={path}\n'),
    'another': lambda path: path.write_text('--hidden=8\n --flagfile /etc/passwd\n'),
    'another, after a carriage return': lambda path: path.write_bytes(b'--hidden=8\r--flagfile=/etc/passwd'),
    'a name of a thousand letters': lambda path: path.write_bytes(b'--' + b'a' * 1200),
    'no flags': lambda path: path.write_bytes(b'root:x:0:0\0\n'),
}


def test_every_damage_of_a_file_of_flags_is_one_line(tmp_path):
    calls = []
    for number, make in enumerate(FLAGS.values()):
        (tmp_path / str(number)).mkdir()
        make(tmp_path / str(number) / 'flags.txt')
        calls.append([f'--flagfile={tmp_path}/{number}/flags.txt', f'--run_dir={tmp_path / "new"}'])
    wrong = {
        kind: answer
        for kind, answer in zip(FLAGS, call('train', *calls, timeout=120), strict=True)
        if answer[0] != 2 or len(answer[1].strip().splitlines()) != 1 or len(answer[1]) > 700
    }
    assert wrong == {} and not (tmp_path / 'new').exists()


# Links and devices in the way of what is written


def test_data_is_not_written_through_a_link(kept, tmp_path):
    """A temporary name that can be foreseen is one under which a link can be laid."""
    outside = tmp_path / 'outside'
    outside.write_text('kept')
    for name in ('data.npz.part', 'data.npz'):
        (tmp_path / name).symlink_to(outside)
    with pytest.raises(UserError, match='a link found'):
        data.write_dataset(tmp_path / 'data.npz', data.read_dataset(kept / 'data.npz'))
    (tmp_path / 'data.npz').unlink()
    data.write_dataset(tmp_path / 'data.npz', data.read_dataset(kept / 'data.npz'))
    assert outside.read_text() == 'kept'


@pytest.mark.parametrize(
    'name', ['config.json', 'flags.txt', 'evaluation.json', 'diagnosis.json', 'rewinds.json']
)
def test_nothing_is_written_through_a_foreseen_name(name, copied, tmp_path):
    outside = tmp_path / 'outside'
    outside.write_text('kept')
    (copied / f'{name}.part').symlink_to(outside)
    for write in (
        lambda: investigation.bisect_run(copied),
        lambda: run.train_run(run.read_config(layout.Paths(copied)), copied),
    ):
        with contextlib.suppress(UserError):
            write()
    assert outside.read_text() == 'kept'


@pytest.mark.parametrize('kind', KINDS)
def test_an_export_replaces_a_file_only(kind, kept, tmp_path):
    """As root it would have replaced /dev/null."""
    path = tmp_path / 'below' / 'vectors.txt'
    path.parent.mkdir()
    KINDS[kind](path)
    before = os.lstat(path)
    with pytest.raises(UserError, match=r'vectors\.txt: a (directory|FIFO|link) found'):
        data.write_vectors(path, ['ab'], np.ones((1, 2), np.float32))
    assert os.lstat(path) == before
