"""Looking into steps of runs whose fault is known."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxrnn
from jaxrnn import trace
from jaxrnn.bisect import inspection, replay
from jaxrnn.diagnosis import Diagnosis, Symptom
from jaxrnn.record import checkpoint, layout, telemetry
from jaxrnn.record.record_file import RecordFile
from jaxrnn.record.records import series
from jaxrnn.types import UserError

BAD, ROW, STEPS = 251, 3, 260
WEIGHTS = np.linspace(-1, 1, 5).astype(np.float32)


def init():
    return {'w': jnp.zeros(5), 'velocity': jnp.zeros(5)}


def batches(change):
    def batch_at(step):
        rng = np.random.default_rng(step)
        x = rng.normal(size=(16, 5)).astype(np.float32)
        y = x @ WEIGHTS + 0.1 * rng.normal(size=16).astype(np.float32)
        if step == BAD:
            y[ROW] = change(y[ROW])
        return {'x': x, 'y': y}

    return batch_at


def step(state, batch):
    def loss_of(w):
        return jnp.mean((batch['x'] @ w - batch['y']) ** 2)

    loss, gradient = jax.value_and_grad(loss_of)(state['w'])
    velocity = 0.9 * state['velocity'] + gradient
    return {'w': state['w'] - 0.01 * velocity, 'velocity': velocity}, {'loss': loss}


@pytest.fixture(scope='module', params=['outlier', 'nan'])
def run(request, tmp_path_factory):
    directory = tmp_path_factory.mktemp(request.param)
    batch_at = batches({'outlier': lambda y: y + 40, 'nan': lambda y: y * np.nan}[request.param])
    jaxrnn.record(step, batch_at, init, directory, max_steps=STEPS, checkpoint_every=50)
    return request.param, batch_at, directory


def subject_of(run, *, records=True):
    _, batch_at, directory = run
    paths = layout.Paths(directory)
    rows = RecordFile(paths.records).read() if records else ()
    checkpoints = checkpoint.Checkpoints(paths.checkpoints, like=jax.eval_shape(init))
    return replay.subject(step, batch_at, checkpoints, rows)


def test_a_bisect_looks_into_the_step_it_names(run):
    kind, batch_at, directory = run
    diagnosis, _ = jaxrnn.bisect(step, batch_at, directory, like=init)
    assert diagnosis.first_bad_step == BAD and diagnosis.replay.bit_identical
    assert diagnosis.symptom.kind == {'outlier': 'spike', 'nan': 'nonfinite'}[kind]
    assert diagnosis.where['pass'] == 'data' and diagnosis.where['examples'] == [ROW]
    if kind == 'nan':
        assert (diagnosis.where['op'], diagnosis.where['source']) == ('input', 'batch/y')


def test_a_finite_step_is_held_against_the_last_ordinary_one(run):
    kind, _, directory = run
    found = inspection.inspect(subject_of(run), BAD)
    if kind == 'nan':
        assert (
            found.trace_report.finding.source == 'batch/y'
            and found.comparison is None
            and found.against is None
        )
        return
    losses = series(RecordFile(layout.Paths(directory).records).read())['loss']
    median = np.median(losses[BAD - 200 : BAD])
    assert losses[found.against] <= median and (losses[found.against + 1 : BAD] > median).all()
    assert found.trace_report.finding is None and found.comparison.by_batch
    assert found.comparison.scores['loss'][0] == pytest.approx(losses[found.against], rel=1e-5)
    assert found.comparison.scores['loss'][2] == pytest.approx(losses[BAD], rel=1e-5)
    other = inspection.inspect(subject_of(run), BAD, against=200, finite=True)
    assert other.against == 200 and other.trace_report is None
    assert other.comparison.scores['loss'][0] == pytest.approx(losses[200], rel=1e-5)


@pytest.mark.parametrize('ahead', [0, 1, 40, 159, 161, 200])
def test_it_is_held_against_a_step_before_the_first_sign_where_that_is_near(run, ahead):
    if run[0] == 'nan':
        return
    subject = subject_of(run)
    diagnosis = Diagnosis(symptom=Symptom('spike', BAD), first_bad_step=BAD, onset_step=BAD - ahead)
    _, found = inspection.locate(subject, diagnosis)
    quiet = BAD - ahead if ahead <= 160 else BAD
    losses = subject.columns()['loss']
    median = np.median(losses[max(quiet - 200, 0) : quiet])
    assert found.against == max(step for step in range(quiet) if losses[step] <= median)


@pytest.mark.parametrize('sign', [BAD - 3, BAD, BAD + 3])
def test_a_collapse_is_looked_into_at_the_step_that_set_it_off(run, sign):
    """Not where it is recognised: by then other examples are in the batch."""
    if run[0] == 'nan':
        return
    diagnosis = Diagnosis(symptom=Symptom('collapse', BAD + 6), first_bad_step=BAD + 6, onset_step=sign)
    told, found = inspection.locate(subject_of(run), diagnosis)
    moved = subject_of(run).columns()['state_moved']
    assert found.step == found.set_off.step == BAD and found.against < BAD
    assert found.set_off.times == pytest.approx(moved[BAD] / moved[BAD - 1], rel=1e-5)
    assert told.where['examples'] == [ROW]
    (said,) = (check for check in told.checks if check['name'] == 'no step sets off the next ones')
    assert said['value'] == BAD and f'at step {BAD + 6} grew from there' in said['why']
    for kind, at in (('spike', BAD + 6), ('collapse', BAD - 30)):
        other = Diagnosis(symptom=Symptom(kind, at), first_bad_step=at, onset_step=at - 3)
        assert inspection.locate(subject_of(run), other)[1].set_off is None


def test_without_records_it_is_held_against_the_step_before(run):
    if run[0] == 'outlier':
        assert inspection.inspect(subject_of(run, records=False), BAD, finite=True).against == BAD - 1


def test_the_first_step_has_none_before(run):
    found = inspection.inspect(subject_of(run), 0)
    assert found.trace_report.finding is None and found.comparison is None and found.where() is None
    with pytest.raises(UserError, match='no checkpoint'):
        inspection.inspect(subject_of(run), 3, against=-1)


def test_what_jax_own_tools_say(run):
    found = inspection.inspect(subject_of(run), BAD, screens=tuple(inspection.SCREENS))
    told = {check['name']: check for check in found.screens}
    assert set(told) == {'checkify', 'debug_nans'}
    for check in told.values():
        assert check['ok'] is (run[0] == 'outlier')
        assert ('nan' in check['why']) is (run[0] == 'nan'), check
    asked = Diagnosis(symptom=Symptom('nonfinite', BAD), first_bad_step=BAD)
    diagnosis, _ = inspection.locate(subject_of(run), asked, screens=('checkify',))
    beside = ['what broke'] if run[0] == 'nan' else []
    assert [check['name'] for check in diagnosis.checks] == [*beside, 'checkify']
    assert diagnosis.checks[-1] == told['checkify']


def test_debug_nans_of_the_run_do_not_raise_where_we_look(run):
    with jax.debug_nans(True):
        found = inspection.inspect(subject_of(run), BAD)
    assert (found.trace_report.finding is None) is (run[0] == 'outlier')


def test_a_healthy_diagnosis_is_left_as_it_is(run):
    healthy = Diagnosis()
    assert inspection.locate(subject_of(run), healthy) == (healthy, None)


def test_examples_that_make_half_of_a_change():
    pair = trace.Pair(0, 1)
    shares = [0.3, 0.15, 0.1, 0.05, -0.4]
    examples = [trace.Example(place, pair, share, 0) for place, share in enumerate(shares)]
    assert inspection.leading(examples) == [0]
    assert inspection.leading([e._replace(share=0.2) for e in examples]) == [0, 1, 2]
    assert inspection.leading([e._replace(share=-0.2) for e in examples]) == []


def test_an_absurd_operation_is_what_a_diagnosis_names(run):
    if run[0] == 'nan':
        return
    change = inspection.inspect(subject_of(run), BAD, finite=True).comparison
    leap = trace.Leap('forward', 'exp', 'a.py:3', 'exp(x)', 'cell', trace.Pair(1, 1e9), 4, (7,))
    where = inspection.of_comparison(change._replace(absurd=leap, by_batch=False))
    assert where == {
        'pass': 'forward',
        'op': 'exp',
        'source': 'a.py:3',
        'layer': 'cell',
        'time_step': 4,
        'examples': [7],
        'words': [],
    }
    assert inspection.of_comparison(change._replace(by_batch=False))['pass'] == 'update'


def test_what_the_batch_brought_is_the_data_whatever_grew_of_it(run):
    if run[0] == 'nan':
        return
    change = inspection.inspect(subject_of(run), BAD, finite=True).comparison
    leap = trace.Leap('forward', 'sub', 'a.py:3', 'x - y', 'w', trace.Pair(1e-6, 1e4), None, (7,))
    where = inspection.of_comparison(change._replace(absurd=leap))
    place = {name: where[name] for name in ('pass', 'op', 'source', 'layer', 'examples')}
    assert place == {'pass': 'data', 'op': 'input', 'source': 'batch/y', 'layer': '', 'examples': [ROW]}
    unknown = inspection.of_comparison(change._replace(outlying=None))
    assert (unknown['pass'], unknown['op'], unknown['source'], unknown['examples']) == ('data', '', '', [ROW])
    several = inspection.of_comparison(change._replace(outlying=trace.Outlying('batch/y', (1, ROW))))
    assert several['examples'] == [1, ROW]
    state = trace.Leap('', 'input', 'state/w', '', 'state/w', trace.Pair(1, 1e30), None, ())
    assert inspection.of_comparison(change._replace(absurd=state, by_batch=False))['pass'] == 'update'


def test_a_subject_without_its_step_cannot_be_looked_into(run):
    with pytest.raises(ValueError, match='without its step'):
        inspection.inspect(subject_of(run)._replace(step=None), BAD)


def test_where_has_the_fields_of_a_diagnosis(run):
    expected = {'pass', 'op', 'source', 'layer', 'time_step', 'examples', 'words'}
    found = inspection.inspect(subject_of(run), BAD)
    assert set(found.where()) == expected
    assert dataclasses.replace(Diagnosis(), where=found.where()).to_json()['where'] == found.where()


def test_custom_rules_are_looked_into_too(run):
    kind, batch_at, directory = run
    if kind == 'outlier':
        diagnosis, _ = jaxrnn.bisect(step, batch_at, directory, like=init, when='loss > 50')
        assert diagnosis.symptom == Symptom('when', BAD) and diagnosis.where['examples'] == [ROW]
    else:
        diagnosis, _ = jaxrnn.bisect(step, batch_at, directory, like=init, when='not finite(loss)')
        assert diagnosis.symptom == Symptom('when', BAD) and diagnosis.where['source'] == 'batch/y'


@pytest.mark.parametrize('recorder', [False, True])
def test_what_the_program_wrote_is_no_fault_of_the_batch(recorder, tmp_path):
    """An infinity that is written in it comes of no operation; the tensor that has it is named, and nothing else."""

    def faulty(state, batch):
        after, record = step(state, batch['given'])
        return {**after, 'w': jnp.where(batch['at'] == BAD, jnp.inf, after['w'])}, record

    given = batches(lambda y: y)

    def batch_at(number):
        return {'given': given(number), 'at': np.int32(number)}

    if recorder:
        state = init()
        with jaxrnn.Recorder(tmp_path, state, checkpoint_every=50) as recording:
            for number in range(STEPS):
                state, record = faulty(state, batch_at(number))
                recording(state, record)
    else:
        jaxrnn.record(faulty, batch_at, init, tmp_path, max_steps=STEPS, checkpoint_every=50)
    diagnosis, _ = jaxrnn.bisect(faulty, batch_at, tmp_path, like=init())
    assert diagnosis.first_bad_step == BAD and diagnosis.replay.bit_identical
    assert (diagnosis.where['pass'], diagnosis.where['layer']) == ('update', 'state/w')
    assert diagnosis.where['examples'] == [] and diagnosis.cause.kind == 'none'
    (said,) = [check['why'] for check in diagnosis.checks if check['name'] == 'what broke']
    assert f'step {BAD} leaves state/w not finite' in said


def test_a_step_that_somebody_else_calls_can_be_traced():
    """So that what is compiled can be held against its equations."""
    called = telemetry.CalledStep(jax.jit(step))
    program = jax.make_jaxpr(lambda *given: called(*given, True))(init(), batches(lambda y: y)(0))
    assert len(program.out_avals) == 3
