"""A bit that flips in a run's file is noticed, or harmless; a part of what benchmarks/bit_flips.py asks for."""

import acts
import flips
import pytest
import words_acts

from jaxrnn.record import layout, resume
from jaxrnn.types import UserError
from jaxrnn.words import investigation, run

BITS = {'checkpoint': 20, 'run': 400}
"""Of each file."""


@pytest.fixture(autouse=True)
def quiet():
    with acts.quiet():
        yield


@pytest.fixture(scope='module')
def home():
    with acts.folder() as folder:
        flips.any_run(folder / 'any')
        flips.words_run(folder / 'words')
        yield folder


def unnoticed(targets, most):
    found = {name: flips.flips(target, flips.bits_of(target, most)) for name, target in targets.items()}
    assert all(counts.flips == counts.noticed + counts.same for counts in found.values()), found
    return {name: counts.same for name, counts in found.items()}


@pytest.mark.parametrize('recorded', [True, False])
def test_of_a_checkpoint(home, recorded, full):
    same = unnoticed(
        flips.checkpoint_targets(home / 'any', recorded=recorded), None if full else BITS['checkpoint']
    )
    # The array itself, and where it is.
    assert [same[name] for name in same if name.startswith(('state/d/', 'state/manifest'))] == [0, 0]


def test_of_the_records(home, full):
    same = unnoticed({'records': flips.records_target(home / 'any')}, None if full else 4 * BITS['run'])
    assert same == {'records': 0}


def test_of_the_files_that_decide_what_a_run_was(home, full):
    same = unnoticed(flips.words_targets(home / 'words'), None if full else BITS['run'])
    assert same['rewinds.json'] == 0


def test_no_other_file_is_read(home):
    """So whatever flips there is harmless; flags.txt is read by its name only, and held against config.json."""
    directory = home / 'words'
    make = lambda *_: words_acts.program()  # noqa: E731

    def look():
        run.open_run(directory, make)
        investigation.bisect_run(directory, make_program=make)
        words_acts.trains(directory)

    opened = {
        name for name in flips.opened_by(look, directory) if (directory / name).is_file() and '/' not in name
    }
    known = {'config.json', 'data.npz', 'records.jsonl', 'rewinds.json', 'experiments.jsonl'}
    assert known - {'experiments.jsonl'} <= opened <= known
    there = {path.name for path in directory.iterdir() if path.is_file()}
    assert there - known == {'evaluation.json', 'diagnosis.json', 'flags.txt', 'lock'}


def test_a_run_is_not_another_for_one_bit_of_its_newest_meta(home):
    """The older checkpoints say what it is; a run that is another is another in all of them."""
    directory = home / 'any'
    path = layout.Paths(directory).checkpoints / '4' / 'meta' / 'metadata'
    whole = path.read_text()
    path.write_text(whole.replace('c0ffee', 'c0ffed'))
    try:
        assert acts.run(directory, 4, identity=flips.IDENTITY).resumed_from == 4
        with pytest.raises(UserError, match='another config'):
            resume.check_identity(directory, acts.checkpoints(directory), {'config': 'another'})
    finally:
        path.write_text(whole)
