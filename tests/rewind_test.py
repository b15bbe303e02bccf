"""Going back while training: what is planned, what it does to a run, and that a replay repeats it."""

import json

import causes
import pytest
import small
from detectors_test import stalled

from jaxrnn import detect
from jaxrnn.diagnosis import Symptom
from jaxrnn.record import layout, rewind
from jaxrnn.record.record_file import RecordFile
from jaxrnn.record.rewind import Rewind
from jaxrnn.types import UserError
from jaxrnn.words import data, investigation, run

EVERY = range(0, 1000, 100)


def test_a_plan_goes_back_then_leaves_out_more_and_gives_up():
    symptom, before = Symptom('collapse', 662), []
    for skipped in (None, (653, 662), (600, 662)):
        planned = rewind.plan(symptom, EVERY, before)
        assert planned == Rewind('collapse', 662, 600, skipped, done=False)
        before.append(planned)
    assert rewind.plan(symptom, EVERY, before) is None
    # Elsewhere it is another matter.
    assert rewind.plan(Symptom('collapse', 862), EVERY, before) == Rewind('collapse', 862, 800, None, False)


@pytest.mark.parametrize(
    'step, checkpoints, to', [(629, EVERY, 500), (630, EVERY, 600), (5, EVERY, 0), (700, [690], 690)]
)
def test_a_checkpoint_is_some_steps_before_the_symptom_where_there_is_one(step, checkpoints, to):
    assert rewind.plan(Symptom('spike', step), checkpoints, []).to == to


def test_a_symptom_at_the_first_step_is_given_up_too():
    before: list[Rewind] = []
    while (planned := rewind.plan(Symptom('nonfinite', 0), EVERY, before)) is not None:
        before.append(planned)
        assert len(before) <= rewind.TRIES
    assert len(before) == rewind.TRIES


def test_without_a_checkpoint_before_it_there_is_no_plan():
    assert rewind.plan(Symptom('collapse', 62), [100, 200], []) is None


@pytest.mark.parametrize('step', [0, 1, 7])
def test_the_first_batch_is_never_left_out(step):
    tried = [Rewind('nonfinite', step, 0, None, True)] if step else []
    planned = rewind.plan(Symptom('nonfinite', step), EVERY, tried)
    assert planned.skipped == ((1, step) if step else None)


def trained(cause, directory, **options):
    data.write_dataset(layout.Paths(directory).data, small.dataset())
    lines: list[str] = []
    made = cause.config().changed(on_divergence='rewind', max_steps=750, **options)
    return run.train_run(made, directory, make_program=cause.make(), say=lines.append), lines


def test_a_fault_of_the_machine_does_not_come_again(tmp_path):
    """And leaves the run that there would have been without it."""
    (tmp_path / 'struck').mkdir()
    (tmp_path / 'twin').mkdir()
    found, lines = trained(causes.CAUSES['bit of a weight'], tmp_path / 'struck')
    assert lines == ['nonfinite at step 650: going back to step 600']
    assert found.result.step == 750 and found.diagnosis.symptom is None
    twin = causes.CAUSES['bit of a weight']
    data.write_dataset(layout.Paths(tmp_path / 'twin').data, small.dataset())
    run.train_run(twin.config().changed(max_steps=750), tmp_path / 'twin', make_program=twin.make(later=True))
    records = [(tmp_path / name / 'records.jsonl').read_text() for name in ('struck', 'twin')]
    assert records[0] == records[1]


def test_a_bad_batch_is_left_out_and_a_replay_leaves_it_out_too(tmp_path):
    cause = causes.CAUSES['NaN targets']
    found, lines = trained(cause, tmp_path)
    assert lines == [
        'nonfinite at step 650: going back to step 600',
        'nonfinite at step 650: going back to step 600, without the batches of steps 641 to 650',
    ]
    assert found.diagnosis.symptom is None
    assert [each.skipped for each in rewind.read(tmp_path / 'rewinds.json')] == [None, (641, 650)]
    rows = RecordFile(tmp_path / 'records.jsonl').read()
    assert [row['step'] for row in rows] == list(range(750))
    diagnosis = investigation.bisect_run(tmp_path, use_records=False, make_program=cause.make()).diagnosis
    assert diagnosis.symptom is None and diagnosis.replay.bit_identical
    assert diagnosis.replay.steps_replayed >= 750
    # Without the note of what was left out it is another run.
    (tmp_path / 'rewinds.json').unlink()
    other = investigation.bisect_run(tmp_path, use_records=False, make_program=cause.make()).diagnosis
    assert (
        not other.replay.bit_identical and other.replay.first_mismatch == 699
    )  # at the checkpoint of step 700


def test_what_comes_again_each_time_ends_the_run(tmp_path):
    cause = causes.CAUSES['learning rate jumps']
    found, lines = trained(cause, tmp_path)
    assert len(lines) == 4 and lines[-1].endswith('went back 3 times, to no avail')
    assert found.diagnosis.symptom.kind == 'collapse' and found.result.step < 700
    again, lines = trained(cause, tmp_path)
    assert again.result.step == found.result.step and lines[-1].endswith('to no avail')


def test_going_back_is_finished_by_the_next_call(tmp_path):
    """Killed between the note and the deed: of the run's files, not all are from before it."""
    cause = causes.CAUSES['NaN targets']
    found, _ = trained(cause, tmp_path)
    records = (tmp_path / 'records.jsonl').read_text()
    path = tmp_path / 'rewinds.json'
    *earlier, last = rewind.read(path)
    rewind.write(path, [*earlier, last._replace(done=False)])
    again, lines = trained(cause, tmp_path)
    assert lines == [] and again.result.resumed_from == 600 and again.result.step == found.result.step
    assert (tmp_path / 'records.jsonl').read_text() == records
    assert all(each.done for each in rewind.read(path))


@pytest.mark.parametrize(
    'text', ['', '[{"kind": 3}]', '{', '[{"kind": "a", "step": 1, "to": 0, "done": true}]']
)
def test_a_damaged_file_is_refused(tmp_path, text):
    path = tmp_path / 'rewinds.json'
    path.write_text(text)
    with pytest.raises(UserError, match='can not be read'):
        rewind.read(path)


def test_another_bit_is_noticed(tmp_path):
    """Else other batches are left out than were, and the run is called not reproducible."""
    path = tmp_path / 'rewinds.json'
    rewind.write(path, [Rewind('spike', 662, 600, (653, 662), True)])
    whole = path.read_text()
    for old, new in (('653', '652'), ('spike', 'spiku'), ('true', 'false'), ('600', '601')):
        path.write_text(whole.replace(old, new))
        with pytest.raises(UserError, match='its checksum is'):
            rewind.read(path)
    (row,) = json.loads(whole)
    del row['crc32']  # as earlier versions wrote it
    path.write_text(json.dumps([row]))
    assert rewind.read(path) == [Rewind('spike', 662, 600, (653, 662), True)]


def test_a_stall_ends_a_run_and_takes_none_back():
    """What stalls would stall again, from wherever it starts."""
    columns = stalled()
    rows = [
        {**{name: float(values[step]) for name, values in columns.items()}, 'step': step}
        for step in range(len(columns['step']))
    ]
    for on, ends in (('stop', True), ('rewind', False), ('continue', False)):
        stop = run._Stop(on, detect.Watch())
        assert any(stop(row) for row in rows) == ends
        assert (stop.found is not None and stop.found.kind == 'stall') == ends
