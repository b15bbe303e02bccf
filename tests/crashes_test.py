"""A run that is cut short at any call goes on, and nothing is lost; a part of what benchmarks/crashes.py asks for."""

import acts
import crashes
import disk
import numpy as np
import pytest
import shim
from shim import Call

SHARES = {
    'first save': 0.02,
    'save': 0.03,
    'record': 1,
    'resume': 0.04,
    'rewind': 0.06,
    'first recorded': 0.02,
    'recorder goes on': 0.02,
    'words': 0.002,
    'experiments': 1,
}
"""Of the places of each act."""

KILLED_EVERY = {'first save': 100, 'recorder goes on': 90, 'save': 60, 'resume': 60, 'rewind': 25}
"""Calls from one real kill to the next."""

needs_shim = pytest.mark.skipif(bool(shim.MISSING), reason=shim.MISSING)


@pytest.fixture(autouse=True)
def quiet():
    with acts.quiet():
        yield


@needs_shim
@pytest.mark.parametrize('name', SHARES)
def test_a_run_goes_on_from_whatever_a_disk_holds(name, full):
    with acts.folder() as folder:
        recorded = crashes.record(name, folder)
        outcomes = list(crashes.outcomes(recorded, folder, 1 if full else SHARES[name]))
    assert outcomes and [outcome for outcome in outcomes if outcome.wrong or outcome.refused] == []


@needs_shim
@pytest.mark.parametrize('name', KILLED_EVERY)
def test_a_killed_process_leaves_what_its_calls_did(name, full):
    """And not more: what is made of the record of an act is what there is."""
    with acts.folder() as folder:
        every = 1 if full else KILLED_EVERY[name]
        outcomes = list(crashes.kills(name, folder, start=1 if full else 10, every=every))
    assert outcomes and [outcome for outcome in outcomes if outcome.wrong or outcome.refused] == []


# The model of a disk


def call(kind, path, to='', **others):
    return Call(
        **{'kind': kind, 'path': path, 'to': to, 'failed': False, 'at': 0, 'flags': 0, 'data': b'', **others}
    )


WRITTEN = [
    call('open', 'a'),
    call('write', 'a', data=b'new'),
    call('sync', 'a'),
    call('rename', 'a', 'b'),
    call('write', 'b', data=b'er', at=3),
]


@pytest.mark.parametrize(
    'loss, synced, found',
    [
        (disk.KEPT, '', {'b': b'newer'}),
        (disk.DROPPED, '', {'b': b'new'}),
        (disk.BYTES_DROPPED, None, {'b': b'new'}),
        (disk.DROPPED, None, {'b': b'0'}),
        (disk.NAMES_DROPPED, None, {'b': b'0'}),
    ],
)
def test_what_was_synced_is_on_the_disk(loss, synced, found):
    """Bytes by the sync of the file, names by that of its folder; a file that is replaced is there until then."""
    model = disk.Disk({'b': b'0'})
    for each in [*WRITTEN, *([] if synced is None else [call('sync', synced)])]:
        model.do(each)
    assert model.after(loss) == found


def test_garbled_is_anything_between(tmp_path):
    seen = set()
    for seed in range(60):
        model = disk.Disk({'b': b'0'})
        for each in WRITTEN:
            model.do(each)
        rng = np.random.default_rng(seed)
        seen.add(tuple(sorted(model.after(disk.garbled(rng)).items())))
    assert {(('b', b'0'),), (('b', b'newer'),), (('a', b'new'),)} & seen
    assert len(seen) > 4


def test_an_image_is_written_and_read(tmp_path):
    image = {'a': None, 'a/b': b'1', 'c': b''}
    disk.write(image, tmp_path)
    assert disk.read(tmp_path) == image
