"""Detectors on records made by hand: what each must see, at which step, and what it must not."""

import math

import numpy as np
import pytest

from jaxrnn import detect
from jaxrnn.diagnosis import Symptom
from jaxrnn.record.records import series
from jaxrnn.types import UserError

RNG = np.random.default_rng(0)


def healthy(steps: int = 1000, batch: int = 32) -> dict[str, np.ndarray]:
    """A run that learns: the loss falls with batch noise, the accuracy rises and is a mean of `batch` words."""
    rng = np.random.default_rng(1)
    progress = 1 - np.exp(-np.arange(steps) / 300)
    return {
        'step': np.arange(steps, dtype=float),
        'loss': 0.01 * (1.05 - progress) * np.exp(0.15 * rng.normal(size=steps)),
        'accuracy': rng.binomial(batch, 0.8 * progress, size=steps) / batch,
        'variance_ratio': 0.002 + 0.8 * progress,
        'cosine': 0.9 * progress,
        'finite_state': np.ones(steps),
    }


def found(columns) -> dict[str, int]:
    return {symptom.kind: symptom.step for symptom in detect.symptoms(columns)}


@pytest.mark.parametrize('batch', [4, 8, 32, 128])
def test_healthy_runs_raise_no_alarm(batch):
    assert found(healthy(5000, batch)) == {}


def test_no_records_no_symptom():
    assert detect.symptoms({}) == []


@pytest.mark.parametrize('value', [math.nan, math.inf, -math.inf])
def test_nonfinite_loss(value):
    columns = healthy()
    columns['loss'][321:] = value
    assert found(columns) == {'nonfinite': 321}


def test_nonfinite_state_behind_a_finite_loss():
    columns = healthy()
    columns['finite_state'][500] = 0
    assert found(columns) == {'nonfinite': 500}


def test_spike():
    columns = healthy()
    columns['loss'][700] *= 10
    assert found(columns) == {'spike': 700}


def stalled(steps: int = 2400, *, at: int = 300, cosine: float = 0.3) -> dict[str, np.ndarray]:
    """One whose loss falls no more from a step on."""
    columns = healthy(steps)
    noise = np.exp(0.15 * np.random.default_rng(2).normal(size=steps))
    columns['loss'] = np.where(columns['step'] < at, columns['loss'], columns['loss'][at] * noise)
    columns['cosine'] = np.minimum(columns['cosine'], cosine)
    return columns


def test_stall():
    """Once its loss is what it was 800 steps ago, though little has been learnt: what has converged doesn't stall."""
    assert 1400 <= found(stalled())['stall'] <= 1520
    assert found(stalled(cosine=0.9)) == found(stalled(1400)) == {}
    late = found(stalled(at=1000))
    assert 1900 <= late['stall'] <= 2210


def test_a_slow_learner_does_not_stall():
    """A twentieth in 800 steps is progress."""
    columns = stalled(4000)
    columns['loss'] *= np.exp(-np.maximum(columns['step'] - 300, 0) * 0.05 / 800)
    assert found(columns) == {}


def test_a_stall_among_steps_that_are_not_finite():
    columns = stalled()
    columns['loss'][400:2000:7] = math.nan
    assert 1400 <= found(columns)['stall'] <= 1600


def test_one_nan_does_not_hide_a_later_spike():
    """A NaN in a window is left out of it: the rule goes on to be judged by the others."""
    columns = healthy()
    columns['loss'][600] = math.nan
    columns['loss'][700] *= 10
    assert found(columns) == {'nonfinite': 600, 'spike': 700}


def test_noise_is_no_spike():
    """Losses that scatter over a factor of ten from batch to batch."""
    columns = healthy()
    columns['loss'] *= np.exp(1.0 * np.random.default_rng(2).normal(size=1000))
    assert 'spike' not in found(columns)


@pytest.mark.parametrize('batch', [8, 32, 128])
def test_collapse_is_seen_within_its_window(batch):
    columns = healthy(2000, batch)
    columns['accuracy'][1500:] = np.random.default_rng(3).binomial(batch, 0.1, 500) / batch
    assert 1501 <= found(columns)['collapse'] < 1516


def test_learning_slowly_is_no_collapse():
    """Accuracy that drifts down by .1 in 1,000 steps, as overfitting or decay does."""
    columns = healthy(2000)
    columns['accuracy'] = RNG.binomial(32, np.linspace(0.7, 0.5, 2000)) / 32
    assert 'collapse' not in found(columns)


def test_constant_after_having_varied():
    columns = healthy()
    columns['variance_ratio'][600:] = 1e-4
    assert found(columns) == {'constant': 616}


def test_constant_from_the_start_counts_after_1000_steps():
    columns = healthy(1200)
    columns['variance_ratio'][:] = 1e-4
    assert found(columns) == {'constant': 1000}
    assert found({name: values[:900] for name, values in columns.items()}) == {}


def test_a_network_that_learns_the_mean_first_is_healthy():
    """As one with masked padding does: its initial outputs vary, then they hardly do, then more and more."""
    columns = healthy(1200)
    columns['variance_ratio'] = np.maximum(columns['variance_ratio'], 0.02)
    columns['variance_ratio'][:15], columns['variance_ratio'][15:190] = 0.3, 1e-3
    assert found(columns) == {}
    columns['variance_ratio'][210:250], columns['variance_ratio'][250:] = 0.3, 1e-3
    assert found(columns) == {'constant': 400}


def test_what_a_rule_waited_for_began_long_before():
    def series(**columns):
        length = len(next(iter(columns.values())))
        return {'step': np.arange(float(length))} | {name: np.array(x) for name, x in columns.items()}

    columns = series(variance_ratio=[0.2] * 440 + [0.001] * 600)
    (symptom,) = detect.symptoms(columns)
    constant = detect.by_name('constant')
    assert symptom == Symptom('constant', 456)  # as soon as the lowest of 16 is low
    late = Symptom('constant', 1000)
    assert detect.began(constant, columns, late) == 456
    assert detect.began(constant, series(variance_ratio=[0.001] * 1001), late) == 16
    # Others don't wait, and without records it isn't known.
    assert detect.began(detect.by_name('spike'), columns, late) == 1000
    assert detect.began(constant, {}, late) == detect.began(constant, series(loss=[1.0] * 1001), late) == 1000


def test_gravest_first():
    columns = healthy()
    columns['loss'][300] *= 10
    columns['loss'][800] = math.nan
    assert [symptom.kind for symptom in detect.symptoms(columns)] == ['nonfinite', 'spike']


def test_records_without_an_accuracy():
    """Somebody's own step: rules over what it lacks are left out."""
    columns = {'step': np.arange(50.0), 'loss': np.ones(50)}
    columns['loss'][30] = 9
    columns['loss'][:29:2] = 1.01
    assert found(columns) == {'spike': 30}


def test_by_name():
    assert detect.by_name('spike').kind == 'spike'
    with pytest.raises(UserError, match='--symptom'):
        detect.by_name('boredom')


@pytest.mark.parametrize('kind', ['nonfinite', 'collapse', 'constant', 'stall', 'spike'])
def test_watch_sees_what_the_whole_run_shows(kind):
    """Looking at a window now and then finds each kind's first step, not later than the next look."""
    steps = 2000 if kind == 'stall' else 1200
    columns = stalled(steps) if kind == 'stall' else healthy(steps)
    match kind:
        case 'nonfinite':
            columns['finite_state'][777] = 0
        case 'collapse':
            columns['accuracy'][777:] = 0
        case 'constant':
            columns['variance_ratio'][777:] = 0
        case 'spike':
            columns['loss'][777] *= 20
    expected = found(columns)
    watch = detect.Watch(every=25)
    seen = {}
    for step in range(steps):
        row = {name: float(values[step]) for name, values in columns.items()} | {'step': step}
        for symptom in watch(row):
            assert symptom.step <= step < symptom.step + (150 if symptom.kind == 'stall' else 25)
            seen.setdefault(symptom.kind, symptom.step)
    assert seen == expected and kind in seen


def test_watch_sees_a_loss_without_flags():
    (found,) = detect.Watch(25)({'step': 0, 'loss': float('nan'), 'debug_nans': 'invalid value'})
    assert (found.kind, found.step) == ('nonfinite', 0)


def warned(columns, step: int, kind: str = 'spike') -> dict[str, int]:
    return dict(detect.onsets(columns, Symptom(kind, step)))


def with_signals(steps: int = 1000) -> dict[str, np.ndarray]:
    """Healthy, with some of the signals."""
    rng = np.random.default_rng(4)
    return healthy(steps) | {
        'update_rms': np.exp(0.3 * rng.normal(size=steps)),
        'momentum_cosine': rng.uniform(-0.6, 0.6, size=steps),
        'bound': rng.uniform(0.1, 0.6, size=steps),
    }


def test_onset_is_where_an_alarm_went_on_for_good():
    columns = with_signals()
    assert warned(columns, 900) == {} and detect.onset(columns, Symptom('spike', 900)) is None
    columns['bound'][[500, 880, 893]] = 1.5  # 500 is another matter
    columns['momentum_cosine'][850:] = -0.99
    found = warned(columns, 900)
    assert found.keys() == {'bound', 'momentum_cosine'}
    assert found['bound'] == 880 and 850 < found['momentum_cosine'] <= 866
    earliest = detect.onset(columns, Symptom('spike', 900))
    assert earliest == ('momentum_cosine', found['momentum_cosine'])


def test_an_alarm_that_fell_silent_is_no_onset():
    columns = with_signals()
    columns['bound'][850:883] = 1.5
    assert warned(columns, 900) == {}
    columns['bound'][883] = 1.5
    assert warned(columns, 900) == {'bound': 850}


def test_an_alarm_at_or_after_the_symptom_is_no_warning():
    columns = with_signals()
    columns['bound'][900:] = 1.5
    assert warned(columns, 900) == {}


def test_signals_measured_now_and_then():
    """Every 25 steps: a step without one says nothing for or against."""
    columns = with_signals()
    sharp = np.where(np.arange(1000) % 25 == 0, 0.5, np.nan)
    sharp[700::25] = 1.2
    columns['preconditioned_sharpness'] = sharp
    assert warned(columns, 915) == {'preconditioned_sharpness': 700}


def test_onset_of_records_without_signals():
    assert warned(healthy(), 700) == {}
    assert detect.onset({}, Symptom('spike', 3)) is None
    assert warned({'step': np.arange(9.0), 'loss': np.ones(9)}, 0) == {}


def test_rows_and_columns_agree():
    rows = [{'step': 0, 'loss': 1.5, 'finite_state': True, 'digest': 'ab'}, {'step': 1, 'loss': math.nan}]
    columns = series(rows)
    assert set(columns) == {'step', 'loss', 'finite_state'}
    np.testing.assert_array_equal(columns['loss'], [1.5, math.nan])
    np.testing.assert_array_equal(columns['finite_state'], [1, math.nan])
