"""What a power loss leaves: the system's memory is gone, and with it what was never synced to the disk."""

import errno
import os
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import small

from jaxrnn import files
from jaxrnn.record import checkpoint, layout, loop
from jaxrnn.record.record_file import RecordFile
from jaxrnn.types import UserError
from jaxrnn.words import data


@pytest.fixture
def synced(monkeypatch):
    """Paths in the order in which they were synced, under the names that they had then."""
    paths, fsync = [], os.fsync

    def noted(file):
        number = file if isinstance(file, int) else file.fileno()
        paths.append(Path(os.readlink(f'/proc/self/fd/{number}')))
        fsync(number)

    monkeypatch.setattr(os, 'fsync', noted)
    return paths


def run(directory, **options):
    return loop.run(
        lambda state, batch: ({'w': state['w'] + batch}, {'loss': state['w'][0]}),
        np.float32,
        lambda: {'w': jnp.zeros(1000)},
        directory,
        loop.LoopOptions(**{'max_steps': 10, 'checkpoint_every': 5, **options}),
    )


def test_a_checkpoint_is_on_the_disk_before_it_counts(tmp_path, synced):
    """Its files and folders while they still have the name of something unfinished."""
    run(tmp_path)
    for step in (0, 5, 10):
        home = tmp_path / 'checkpoints' / str(step)
        depth = len(home.parts)
        unfinished = {Path(*path.parts[depth:]) for path in synced if f'/{step}.orbax' in str(path)}
        whole = {path.relative_to(home) for path in home.rglob('*')}
        # orbax writes this line when all is done.
        assert whole - unfinished == {Path('commit_success.txt')}
        assert Path('.') in unfinished


def test_the_folders_above_it_follow(tmp_path, synced):
    run(tmp_path, max_steps=0)
    ours = [path for path in synced if tmp_path in (path, *path.parents)]
    assert ours[-2:] == [tmp_path / 'checkpoints', tmp_path]
    assert tmp_path / 'checkpoints' / '0' / 'commit_success.txt' in ours


def test_records_are_on_the_disk_before_a_checkpoint_is_begun(tmp_path, synced, monkeypatch):
    save, seen = checkpoint.Writer.save, []

    def saved(writer, step, *others):
        seen.append((step, synced.count(tmp_path / 'records.jsonl')))
        return save(writer, step, *others)

    monkeypatch.setattr(checkpoint.Writer, 'save', saved)
    run(tmp_path)
    assert [step for step, _ in seen] == [0, 5, 10]
    before = [times for _, times in seen]
    assert 0 < before[1] < before[2] < 10  # not with each step


def test_the_names_of_a_new_run_are_on_the_disk(tmp_path, synced):
    """Those of its directory and of its records, before there is a second checkpoint."""
    directory = tmp_path / 'runs' / 'mine'
    run(directory, max_steps=3)
    assert tmp_path in synced and tmp_path / 'runs' in synced
    place = synced.index(directory / 'records.jsonl')
    assert synced[place + 1] == directory


def test_going_back_is_on_the_disk(tmp_path, synced):
    """Else what was deleted comes back, of a run that has changed since."""
    run(tmp_path)
    synced.clear()
    loop.rewind(tmp_path, 0)
    assert synced[0] == tmp_path / 'checkpoints' and synced[-1] == tmp_path / 'records.jsonl'


@pytest.mark.parametrize('thin', [True, False])
def test_a_checkpoint_that_is_being_deleted_does_not_count(thin, tmp_path, synced, monkeypatch):
    """It is renamed, and that is on the disk, before any of it is deleted."""
    removed, unlink = [], os.unlink

    def unlinked(path, *, dir_fd=None):
        home = '' if dir_fd is None else os.readlink(f'/proc/self/fd/{dir_fd}')
        removed.append(Path(home, path))
        unlink(path, dir_fd=dir_fd)

    run(tmp_path, keep_latest=4)
    (tmp_path / 'checkpoints' / 'deleted' / '5').mkdir(parents=True)  # left by a kill
    monkeypatch.setattr(os, 'unlink', unlinked)
    if thin:
        run(tmp_path, max_steps=15, keep_latest=1)
    else:
        loop.rewind(tmp_path, 0)
    home = tmp_path / 'checkpoints'
    inside = [path.relative_to(home).parts for path in removed if home in path.parents]
    assert {parts[0] for parts in inside} == {'deleted'} and {'5', '10'} <= {parts[1] for parts in inside}
    assert not list((tmp_path / 'checkpoints' / 'deleted').iterdir())


def test_a_failing_disk_is_said_in_one_line(tmp_path, monkeypatch):
    def fsync(file):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, 'fsync', fsync)
    with pytest.raises(UserError, match='Input/output error'):
        run(tmp_path)


@pytest.mark.parametrize(
    ('name', 'write'),
    [
        ('a.txt', lambda path: layout.write_text(path, 'text')),
        ('data.npz', lambda path: data.write_dataset(path, small.dataset())),
    ],
)
def test_a_file_is_on_the_disk_before_it_has_its_name(name, write, tmp_path, synced, monkeypatch):
    small.dataset()  # which writes files of its own
    synced.clear()
    replace = os.replace
    monkeypatch.setattr(os, 'replace', lambda a, b: (synced.append('replaced'), replace(a, b)))
    write(tmp_path / name)
    written, *others = synced
    assert written.parent == tmp_path and written.name.startswith(f'{name}.') and written.suffix == '.tmp'
    assert others == ['replaced', tmp_path]
    assert (tmp_path / name).exists()


def test_records_are_inserted_all_or_none(tmp_path, synced, monkeypatch):
    records = RecordFile(tmp_path / 'records.jsonl')
    records.append({'step': 0, 'loss': 1.0})
    records.insert({1: {'step': 1, 'loss': float('nan')}})
    assert (
        synced[0].name.startswith('records.jsonl.') and synced[0].suffix == '.tmp' and synced[1] == tmp_path
    )
    assert [row['step'] for row in records.read()] == [0, 1]
    monkeypatch.setattr(os, 'replace', lambda a, b: (_ for _ in ()).throw(OSError(errno.ENOSPC, 'full')))
    with pytest.raises(UserError, match='full'):
        records.insert({2: {'step': 2}})
    assert [row['step'] for row in records.read()] == [0, 1]


def test_a_folder_that_takes_no_sync_is_no_failure(tmp_path, monkeypatch):
    """As on some network file systems."""

    def fsync(file):
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))

    monkeypatch.setattr(os, 'fsync', fsync)
    files.sync(tmp_path)
    (tmp_path / 'file').write_text('')
    with pytest.raises(OSError, match='Invalid argument'):
        files.sync(tmp_path / 'file')
