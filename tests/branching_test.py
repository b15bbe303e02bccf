"""A run branched from another one at a step: what it starts from, and what it refuses."""

import json
import logging
import shutil

import jax
import numpy as np
import pytest
import small

from jaxrnn.record import layout
from jaxrnn.record.checkpoint import Checkpoints, state_digest
from jaxrnn.record.record_file import RecordFile
from jaxrnn.types import UserError
from jaxrnn.words import branching, data, investigation, remedies, run, train
from jaxrnn.words.branching import Branch

STEPS, AT = 60, 33
CONFIG = small.configuration(seed=3, signals=True).changed(
    max_steps=STEPS, checkpoint_every=20, on_divergence='continue'
)


@pytest.fixture(scope='module')
def parent(tmp_path_factory):
    directory = tmp_path_factory.mktemp('parent')
    data.write_dataset(layout.Paths(directory).data, small.dataset())
    run.train_run(CONFIG, directory)
    return directory


def branched(parent, directory, at=AT, **options):
    config = CONFIG.changed(**options)
    branching.begin(Branch(str(parent), at), directory, config)
    run.train_run(config, directory)
    return list(RecordFile(directory / 'records.jsonl').read())


@pytest.mark.parametrize('at', [0, 20, AT, STEPS])
def test_without_another_flag_it_is_the_same_run(parent, tmp_path, at):
    """Bit for bit: each record, its digest among them; the branch goes on where its parent ended."""
    rows = branched(parent, tmp_path / 'branch', at, max_steps=STEPS + 3)
    assert [row['step'] for row in rows] == [*range(at, STEPS + 3)]
    whole = list(RecordFile(parent / 'records.jsonl').read())
    assert rows[: STEPS - at] == whole[at:]
    assert json.loads((tmp_path / 'branch' / 'branch.json').read_text()) == {
        'run': str(parent), 'step': at,
    }  # fmt: skip


def test_under_other_flags_it_goes_on_with_what_was_converted(parent, tmp_path):
    """The step of the other configuration, called by hand from the state that the parent had there."""
    options = {'update_clip': 0.5, 'second_moment': 'amsgrad', 'learning_rate': 1e-3}
    other = CONFIG.changed(**options)
    before, after = (train.make_program(config, small.dataset()) for config in (CONFIG, other))
    state = before.init()
    for number in range(AT):
        state, _ = jax.jit(before.step)(state, before.batch_at(number))
    moments = jax.tree.leaves(state.opt_state)
    assert any(np.any(np.asarray(leaf) != 0) for leaf in moments)
    state, expected = remedies.converted(CONFIG, other, state), []
    for number in range(AT, STEPS):
        state, record = jax.jit(after.step)(state, after.batch_at(number))
        expected.append(float(record['loss']))
    rows = branched(parent, tmp_path / 'branch', **options)
    assert [row['loss'] for row in rows] == pytest.approx(expected, rel=1e-6)
    whole = [row['loss'] for row in RecordFile(parent / 'records.jsonl').read()]
    assert rows[0]['loss'] == whole[AT] and rows[-1]['loss'] != whole[-1]


def test_one_that_is_cut_short_ends_in_the_same_bits_and_without_a_word(parent, tmp_path, caplog):
    rows = branched(parent, tmp_path / 'whole', update_clip=0.5)
    with caplog.at_level(logging.WARNING, logger='jaxrnn'):
        copied = shutil.copytree(parent, tmp_path / 'parent')
        branched(copied, tmp_path / 'two', update_clip=0.5, max_steps=47)
        shutil.rmtree(copied)  # it has all that it needs
        again = branched(copied, tmp_path / 'two', update_clip=0.5)
    assert again == rows and caplog.messages == []
    found = [
        state_digest(Checkpoints(tmp_path / name / 'checkpoints').restore(STEPS)) for name in ('whole', 'two')
    ]
    assert found[0] == found[1]


def test_a_branch_can_be_bisected_and_branched_again(parent, tmp_path):
    """Its first step is no more 0, which nothing may take for granted."""
    options = {'learning_rate': 1e30}
    rows = branched(parent, tmp_path / 'branch', **options)
    assert np.isfinite(rows[0]['loss']) and not np.isfinite(rows[0]['update_norm']), (
        'its square has no float32'
    )
    diagnosis = investigation.diagnose_run(tmp_path / 'branch').diagnosis
    assert diagnosis.symptom.kind == 'nonfinite' and diagnosis.first_bad_step == AT
    assert diagnosis.replay.bit_identical
    config = CONFIG.changed(learning_rate=1e30)
    branching.begin(Branch(str(tmp_path / 'branch'), AT), tmp_path / 'twig', config)
    state = Checkpoints(tmp_path / 'twig' / 'checkpoints').restore(AT)
    assert state_digest(state) == state_digest(Checkpoints(tmp_path / 'branch' / 'checkpoints').restore(AT))


@pytest.mark.parametrize(
    'at, options, said',
    [
        (STEPS + 1, {}, f'--branch_at: {STEPS + 1} found, but its checkpoints reach from step 0 to {STEPS}'),
        (AT, {'hidden': 9}, 'has another network'),
        (AT, {'network': 'gru'}, 'has another network'),
        (AT, {'num_words': 7}, '--num_words: 7 found, and 0 in the run that is branched from'),
        (AT, {'initial_weights': 'flax'}, '--initial_weights: flax found, and preset in'),
        (AT, {'recurrent_gain': 2.0}, '--recurrent_gain: 2.0 found, and 0.0 in'),
        (AT, {'chrono_steps': 5}, '--chrono_steps: 5 found, and 0 in'),
    ],
)
def test_what_can_not_be_is_refused_and_leaves_nothing(parent, tmp_path, at, options, said):
    with pytest.raises(UserError) as error:
        branched(parent, tmp_path / 'branch', at, **options)
    assert said in str(error.value) and not (tmp_path / 'branch').exists()


def test_a_directory_of_another_run_is_refused(parent, tmp_path):
    """Of one that was not branched, or at another step; nothing is trained there."""
    branched(parent, tmp_path / 'branch', max_steps=40)
    data.write_dataset(layout.Paths(tmp_path).data, small.dataset())
    run.train_run(CONFIG.changed(max_steps=20), tmp_path)
    for directory, at in ((tmp_path, AT), (tmp_path / 'branch', AT - 1)):
        with pytest.raises(UserError, match='holds a run that did not begin at step'):
            branched(parent, directory, at)
    assert len(RecordFile(tmp_path / 'records.jsonl').read()) == 20
    assert len(RecordFile(tmp_path / 'branch' / 'records.jsonl').read()) == 40 - AT


def test_one_that_was_killed_before_its_first_checkpoint_is_not_taken_for_a_run_from_step_0(parent, tmp_path):
    branched(parent, tmp_path / 'branch', max_steps=40)
    shutil.rmtree(tmp_path / 'branch' / 'checkpoints')
    (tmp_path / 'branch' / 'records.jsonl').unlink()
    with pytest.raises(UserError, match='give the same --branch_from and --branch_at again'):
        run.train_run(CONFIG, tmp_path / 'branch')
    assert [row['step'] for row in branched(parent, tmp_path / 'branch')] == [*range(AT, STEPS)]


def test_a_run_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(UserError, match='holds no run'):
        branched(tmp_path / 'none', tmp_path / 'branch')
    assert not (tmp_path / 'branch').exists()


def test_a_parent_that_comes_out_otherwise_is_refused(parent, tmp_path):
    """What a branch begins with would be another run's."""
    copied = tmp_path / 'parent'
    copied.mkdir()
    data.write_dataset(layout.Paths(copied).data, small.dataset())
    run.train_run(CONFIG, copied)
    rows = small.read_records(copied / 'records.jsonl')
    rows[25]['digest'] = '0' * 16
    small.write_records(copied / 'records.jsonl', rows)
    with pytest.raises(UserError, match='is not reproduced here from step 25 on'):
        branched(copied, tmp_path / 'branch')
    assert not (tmp_path / 'branch').exists()


@pytest.mark.parametrize(
    'text', ['', '{', '[]', '3', '{"step": "3"}', '{"step": -1}', '{"step": true}', '{}']
)
def test_a_damaged_note_is_one_line(parent, tmp_path, text):
    branched(parent, tmp_path / 'branch', max_steps=40)
    (tmp_path / 'branch' / 'branch.json').write_text(text)
    with pytest.raises(UserError, match=r'branch\.json') as error:
        branched(parent, tmp_path / 'branch')
    assert '\n' not in str(error.value)
