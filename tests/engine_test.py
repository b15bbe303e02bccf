"""Experiments on toys whose every outcome is known beforehand: a number that grows by a factor at each step."""

import math
import shutil
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small

import jaxrnn
from jaxrnn import detect, experiment
from jaxrnn.bisect import replay
from jaxrnn.diagnosis import Symptom
from jaxrnn.experiment import window
from jaxrnn.experiment.cause import cause_of, ranked
from jaxrnn.experiment.changes import in_float64, in_slow_motion, other_batches, without_batch
from jaxrnn.experiment.engine import budget_for, most_for
from jaxrnn.experiment.explain import explain, nudge_of, run
from jaxrnn.experiment.mechanisms import Mechanism
from jaxrnn.experiment.outcome import (
    AVERTED,
    UNCHANGED,
    VERDICTS,
    Change,
    Changed,
    ExperimentReport,
    Outcome,
)
from jaxrnn.experiment.replays import Budget
from jaxrnn.experiment.strategies import FARTHER, bad_batches
from jaxrnn.experiment.window import AFTER, FAR, LEAD, Window, window_of
from jaxrnn.record import checkpoint, loop, telemetry
from jaxrnn.record.record_file import RecordFile
from jaxrnn.record.records import series
from jaxrnn.types import Staged
from jaxrnn.words import remedies

RATE, FIRST, STEPS = 1.1, 1e-8, 320
SYMPTOM = math.floor(math.log(1 / FIRST) / math.log(RATE)) + 1  # the first step that starts above 1
LARGE = detect.custom('loss > 1')


def growing(rate):
    def step(x, batch):
        return x * jnp.float32(rate) + batch, {'loss': x}

    return step


def no_batch(step):
    return np.float32(0)


def subject_of(step, batch_at, init, directory, *, records=True, every=50, steps=STEPS):
    options = loop.LoopOptions(max_steps=steps, checkpoint_every=every)
    loop.run(step, batch_at, init, directory, options)
    rows = RecordFile(directory / 'records.jsonl').read() if records else ()
    checkpoints = checkpoint.Checkpoints(directory / 'checkpoints', like=jax.eval_shape(init))
    return replay.subject(step, batch_at, checkpoints, rows)


def first():
    return jnp.float32(FIRST)


@pytest.fixture(params=[True, False], ids=['records', 'checkpoints alone'])
def subject(request, tmp_path):
    return subject_of(growing(RATE), no_batch, first, tmp_path, records=request.param)


def on(subject, symptom, detectors=detect.DETECTORS, *, budget, keep=None):
    """Experiments on a symptom, over the steps that a diagnosis would choose."""
    own = next(detector for detector in detectors if detector.kind == symptom.kind)
    columns = series(subject.records) if subject.records else {}
    window = window_of(subject, symptom.step, detect.began(own, columns, symptom))
    return experiment.Experiments(subject, symptom, window, detectors, budget=budget, keep=keep)


def experiments(subject, *, detectors=(LARGE,), budget=2000):
    found, _ = replay.bisect(subject, detectors)
    assert found.symptom is not None
    return on(subject, found.symptom, detectors, budget=budget)


def mechanism(name):
    """As a network's owner would define it, or one's own; none of no name."""
    return remedies.MECHANISMS.get(name, Mechanism(name)) if name else None


def change(name, step, points_to='model', removes='', initial=False, **more):
    removed = mechanism(removes)
    return Change(name, points_to, lambda: Changed(step, no_batch, **more), removes=removed, initial=initial)


def test_outcomes(subject):
    told = run(
        experiments(subject),
        [
            change('slower', growing(1.08)),
            change('a little slower', growing(1.0999)),
            change('shrinking', growing(0.5)),
            change('still', growing(1.0)),
            change('faster', growing(1.5)),
            change('not finite', lambda x, batch: (x * jnp.nan, {'loss': x})),
            change('a smaller number', growing(RATE), convert=lambda x: x * 0),
        ],
    )
    assert told.window == (100, SYMPTOM, SYMPTOM + 51, False) and told.identical
    assert told.control.symptom == Symptom('when', SYMPTOM) and told.control.verdict == 'unchanged'
    assert told.nudge.verdict == 'unchanged'
    assert {outcome.change.name: outcome.verdict for outcome in told.outcomes} == {
        'shrinking': 'averted',
        'still': 'averted',
        'a smaller number': 'averted',
        'slower': 'delayed',
        'a little slower': 'unchanged',
        'faster': 'worse',
        'not finite': 'worse',
    }
    assert [outcome.verdict for outcome in told.outcomes] == sorted(
        (outcome.verdict for outcome in told.outcomes), key=VERDICTS.index
    )
    assert told.untried == () and told.chosen_at_random.change.name in {o.change.name for o in told.outcomes}


def test_the_best_is_replayed_on_and_its_point_of_no_return_is_exact(subject):
    (best,) = run(experiments(subject), [change('shrinking', growing(0.5))]).outcomes
    # At the symptom's own step the number is above 1, whatever the step does with it.
    assert best.point_of_no_return == SYMPTOM - 1
    assert best.reached == SYMPTOM + FARTHER and best.loss < 1e-8


def test_what_holds_for_a_while_alone_is_delayed(subject):
    """Growth so slow that the symptom comes 150 steps later."""
    slow = math.exp(-math.log(RATE ** (150 - SYMPTOM)) / (SYMPTOM + 150 - 150))
    (told,) = run(experiments(subject), [change('slow', growing(slow))]).outcomes
    assert told.verdict == 'delayed' and told.symptom.step > SYMPTOM + AFTER


@pytest.mark.parametrize('budget', [0, 40, 100, 130, 200, 333, 500, 1000])
def test_the_budget_is_kept(tmp_path, budget):
    subject = subject_of(growing(RATE), no_batch, first, tmp_path)
    changes = [change(f'{rate}', growing(rate)) for rate in (0.5, 1.0, 1.05, 2.0)]
    made = experiments(subject, budget=budget)
    told = run(made, changes)
    assert told.steps_replayed == made.budget.spent
    # The control is no matter of choice.
    assert told.steps_replayed <= max(budget, SYMPTOM + 1 - told.window.start)
    assert {o.change.name for o in told.outcomes} | {c.name for c in told.untried} == {
        c.name for c in changes
    }
    if budget < 100:
        assert cause_of(told).why.startswith('undecided: the budget')


def test_a_cause_is_what_the_best_change_points_to(subject):
    told = run(
        experiments(subject),
        [change('faster', growing(2.0), 'data'), change('shrinking', growing(0.5), 'optimiser')],
    )
    cause = cause_of(told)
    assert (cause.kind, cause.why) == ('optimiser', 'shrinking averts it; not so faster')


def test_nothing_averts(subject):
    cause = cause_of(run(experiments(subject), [change('faster', growing(2.0))]))
    assert (cause.kind, cause.why) == ('none', 'undecided: nothing tried averts it: faster')


def outcomes(*made):
    """(name, points to, removes, verdict) -> what experiments told, in that order."""
    found = [
        Outcome(Change(name, points_to, lambda: None, removes=mechanism(removes)), verdict, None, 0.1, 200)
        for name, points_to, removes, verdict in made
    ]
    window, control = (
        Window(100, 150, 201),
        Outcome(found[0].change, 'unchanged', None, 1, 151),
    )
    return ExperimentReport(window, control, True, control, tuple(found))


def test_a_mechanism_is_named_where_all_that_takes_it_away_averts():
    """And speaks before what would have helped against any, and before what is wider."""
    told = outcomes(
        ('half', 'optimiser', '', 'averted'),
        ('masked', 'model', 'padding', 'averted'),
        ('amsgrad', 'optimiser', 'second-moment decay', 'averted'),
        ('epsilon', 'optimiser', 'second-moment decay', 'averted'),
        ('sigmoid', 'model', 'shut gates', 'worse'),
    )
    cause = cause_of(told)
    assert cause.kind == 'optimiser' and cause.why == (
        "second-moment decay (Adam's v decays in quiet steps until the next ones are too long): amsgrad averts it; "
        'so does epsilon, half, masked; not so sigmoid'
    )
    refuted = told._replace(outcomes=(*told.outcomes[:3], told.outcomes[3]._replace(verdict='delayed')))
    cause = cause_of(refuted)
    assert (cause.kind, cause.why[:14]) == (
        'optimiser',
        'half averts it',
    )  # which changes less than the masks
    cause = cause_of(refuted._replace(outcomes=refuted.outcomes[1:]))
    assert cause.kind == 'model' and cause.why.startswith('padding (')
    own = outcomes(('mine', 'model', 'a worn bearing', 'averted'))
    assert cause_of(own).why == 'a worn bearing: mine averts it'


def test_what_speaks_for_the_cause_is_ranked_first():
    """Although others leave a lower loss."""
    told = outcomes(
        ('half', 'optimiser', '', 'averted'),
        ('amsgrad', 'optimiser', 'second-moment decay', 'averted'),
        ('without the batch', 'data', '', 'averted'),
        ('sigmoid', 'model', 'shut gates', 'worse'),
    )
    made = [o._replace(loss=loss) for o, loss in zip(told.outcomes, (0.1, 0.3, 0.5, 0.01), strict=True)]

    def names(**options):
        return [outcome.change.name for outcome in ranked(made, **options)]

    assert names() == names(by_batch=False) == ['amsgrad', 'half', 'without the batch', 'sigmoid']
    assert names(by_batch=True) == ['without the batch', 'half', 'amsgrad', 'sigmoid']
    # Longer steps are borne by what takes the cause away for good, and count before the cause.
    half, amsgrad, *others = made
    made = [half._replace(margin=4), amsgrad, *others]
    assert names()[0] == 'amsgrad'
    edgy = amsgrad.change._replace(stressed=lambda times: None)
    made = [half._replace(margin=4), amsgrad._replace(change=edgy)]
    assert names() == ['half', 'amsgrad']
    made = [half._replace(margin=2), made[1]._replace(margin=2)]
    assert names() == ['amsgrad', 'half']


def test_shorter_steps_alone_come_after_what_bears_longer_ones():
    """A lower rate, however far from its edge, puts a symptom off; unless a rate that is too high is what is named."""
    told = outcomes(
        ('an eighth', 'optimiser', '', 'averted'),
        ('amsgrad', 'optimiser', '', 'averted'),
        ('decaying', 'optimiser', '', 'averted'),
    )
    eighth, amsgrad, decaying = told.outcomes
    shorter = {'flags': '--rate', 'shortens': 8, 'stressed': lambda times: None}
    untried = eighth._replace(change=eighth.change._replace(**shorter))
    eighth = untried._replace(margin=4)
    decaying = decaying._replace(change=decaying.change._replace(decays=True, **shorter))

    def names(*outcomes):
        return [outcome.change.name for outcome in ranked(outcomes)]

    assert names(untried, decaying, amsgrad) == ['decaying', 'amsgrad', 'an eighth']
    assert names(eighth, amsgrad._replace(margin=2)) == ['amsgrad', 'an eighth']
    assert names(amsgrad._replace(margin=1), eighth) == ['an eighth', 'amsgrad']
    too_high = mechanism('excessive learning rate')
    usual = untried._replace(change=untried.change._replace(removes=too_high, name='usual', stressed=None))
    assert names(eighth, usual) == ['usual', 'an eighth']


def test_shorter_steps_that_put_it_off_farther_than_others_are_replayed_do_not_avert(tmp_path):
    """A tenth of each step takes ten times as many to what a leap that goes on brings."""
    step, batch_at = overshooting(0.5, lasts=10**6)
    subject = subject_of(step, batch_at, lambda: jnp.float32(0.3), tmp_path, steps=760)
    rule = detect.custom(f'loss > {16 * float(np.max(subject.columns()["loss"][200:700]))}')
    diagnosis, _ = replay.bisect(subject, (rule,))
    tenth = in_slow_motion(subject, 0.1, 'a tenth of each step')
    found, report = explain(subject, diagnosis, lambda window, bad: [tenth], (rule,))
    (outcome,) = report.outcomes
    assert outcome.verdict == 'delayed' and outcome.symptom.step > 760 + FARTHER
    assert found.cause.kind == 'none'


def test_other_batches_say_nothing_where_a_nudge_puts_it_off_for_good():
    """And the batch that stands out is innocent."""
    told = outcomes(
        ('other batches', 'data', '', 'averted'),
        ('without the batch', 'data', '', 'unchanged'),
        ('half', 'optimiser', '', 'averted'),
    )
    other, without, half = told.outcomes
    avoiding = [o._replace(change=o.change._replace(avoids=True)) for o in (other, without)]
    told = told._replace(outcomes=(*avoiding, half))
    assert cause_of(told, by_batch=True).kind == 'data'
    delayed = half._replace(verdict='delayed')
    assert cause_of(told._replace(nudge=delayed), by_batch=True).kind == 'optimiser'
    late = delayed._replace(symptom=Symptom('collapse', 190))
    assert cause_of(told._replace(nudge=late), by_batch=True).kind == 'data'


class _Nudged:
    """Stands for experiments whose nudge has an outcome, and shows the symptom at step 300 where it is replayed on."""

    window, budget = Window(100, 150, 201), Budget(10_000)

    def __init__(self, verdict):
        self.first = Outcome(Change('nudge', '', lambda: None), verdict, None, 0.1, 201)
        self.horizons = []

    def nudge(self):
        return self.first

    def attempt(self, change, *, horizon):
        return self.first._replace(verdict='delayed', symptom=Symptom('collapse', 300))

    def longer(self, horizon):
        self.horizons.append(horizon)


@pytest.mark.parametrize(('verdict', 'horizons'), [
    ('averted', [351]), ('delayed', [351]), ('unchanged', []), ('not possible', []),
])  # fmt: skip
def test_what_a_nudge_puts_off_is_judged_over_the_time_that_it_takes_to_come(verdict, horizons):
    made = _Nudged(verdict)
    found = nudge_of(made)
    assert made.horizons == horizons
    assert found.symptom == (Symptom('collapse', 300) if horizons else None)


def learning(rate, late, slow=1.0):
    """x falls to 0; from a step on it grows, unless the rate is below .5."""

    def step(state, batch):
        number, x = state
        grows = (number >= late) & (rate >= 0.5)
        after = jnp.where(grows, 1.5 * x + 1e-3, x * (1 - 0.1 * slow * rate))
        return (number + 1, after), {'loss': jnp.abs(x)}

    return step


@pytest.mark.parametrize(('slow', 'learns'), [(1.0, True), (1e-3, False)])
def test_what_the_best_makes_of_the_beginning_is_replayed(tmp_path, slow, learns):
    """As one may avert a symptom by keeping a network from learning, which late in a run can't be seen."""
    init = jnp.int32(0), jnp.float32(1)
    subject = subject_of(learning(1.0, 250), no_batch, lambda: init, tmp_path)
    diagnosis, _ = replay.bisect(subject, (rule := detect.custom('loss > .5 and step > 240'),))
    slower = change('slower', learning(0.4, 250, slow), 'optimiser')
    _, report = explain(subject, diagnosis, lambda window, bad: [slower], (rule,))
    found = report.beginning
    assert report.outcomes[0].verdict == 'averted' and found.symptom is None
    assert found.step == report.window.start >= 150 and found.own < 1e-6
    assert (found.loss < 0.01) == learns
    # A budget that somebody gave is for everything, and for this last.
    assert explain(subject, diagnosis, lambda window, bad: [slower], (rule,), budget=400)[1].beginning is None


def test_of_a_symptom_at_the_beginning_none_is_replayed(tmp_path):
    subject = subject_of(learning(1.0, 20), no_batch, lambda: (jnp.int32(0), jnp.float32(1)), tmp_path)
    diagnosis, _ = replay.bisect(subject, (rule := detect.custom('loss > .5 and step > 22'),))
    _, report = explain(
        subject, diagnosis, lambda window, bad: [change('slower', learning(0.4, 20))], (rule,)
    )
    assert report.outcomes[0].verdict == 'averted' and report.beginning is None


def test_the_narrowest_mechanism_is_named():
    wide = ('sigmoid', 'model', 'shut gates', 'averted')
    narrow = ('float32', 'precision', 'low precision', 'averted')
    assert cause_of(outcomes(wide, narrow)).kind == 'precision'
    assert cause_of(outcomes(narrow, wide)).kind == 'precision'


def test_data_alone_averts_but_an_earlier_state_bears_the_batch():
    told = outcomes(('other batches', 'data', '', 'averted'), ('half', 'optimiser', '', 'worse'))
    cause = cause_of(told, by_batch=False)
    assert cause.kind == 'none' and cause.why == (
        'undecided: other batches averts it, but an earlier state does no worse on that batch than on others; '
        'not so half'
    )
    assert cause_of(told).kind == cause_of(told, by_batch=True).kind == 'data'


def too_small_to_see(state, batch):
    """Steps of a hundred-millionth of a number: in float32 it stands still, and that shows from step 150 on."""
    number, x = state
    after = x + jnp.asarray(1e-8, x.dtype)
    stuck = (number >= 150) & (after == x)
    return (number + 1, after), {'loss': jnp.where(stuck, 5.0, 0.1).astype(x.dtype)}


def test_what_float64_averts_is_the_rounding(tmp_path):
    """Its own compilation, of 64-bit types; everything else stays as narrow as it was."""

    def init():
        return jnp.int32(0), jnp.float32(1)

    subject = subject_of(too_small_to_see, no_batch, init, tmp_path)
    told = run(experiments(subject), [in_float64(subject), change('as it was', too_small_to_see)])
    assert {o.change.name: o.verdict for o in told.outcomes} == {'float64': AVERTED, 'as it was': UNCHANGED}
    assert told.identical and told.nudge.verdict == UNCHANGED
    cause = cause_of(told)
    assert cause.kind == 'precision' and cause.why.startswith('low precision (')
    assert told.outcomes[0].point_of_no_return == 150
    assert not jax.config.values['jax_enable_x64']
    # What rounding has no part in, it doesn't avert.
    grows = subject_of(growing(RATE), no_batch, first, tmp_path / 'grows')
    (outcome,) = run(experiments(grows), [in_float64(grows)]).outcomes
    assert outcome.verdict == UNCHANGED


def with_a_bad_batch(step):
    return np.float32(5 if step == 200 else 1e-3 * (1 + step % 7))


def halving(x, batch):
    return x / 2 + batch, {'loss': x + batch}


def bearing(name, rate, removes=''):
    """A change to another rate, which can be made longer: it averts up to a rate of 1."""

    def at(times):
        made = change(f'{name} x {times}', growing(rate * times), 'optimiser')
        return made._replace(
            key=rate * times, stressed=at if times == 1 else None, removes=mechanism(removes)
        )

    return at(1)


def test_what_bears_longer_steps_is_ranked_first(tmp_path):
    """Each replayed once, however often it is asked for; the largest margin ends the asking."""
    subject = subject_of(growing(RATE), no_batch, first, tmp_path)
    made = experiments(subject)
    replayed, replay_of = [], made._replay
    made._replay = lambda change, *steps: replayed.append(change.name) or replay_of(change, *steps)
    told = run(made, [bearing('a', 0.9), bearing('b', 0.4), bearing('c', 0.2), bearing('d', 0.8)])
    margins = {o.change.name: o.margin for o in told.outcomes}
    # b and c leave a loss of 0. b x 2 and c x 4 are what d is, c x 2 is what b is.
    assert margins == {'a x 1': None, 'b x 1': 2, 'c x 1': 4, 'd x 1': None}
    assert told.outcomes[0].change.name == 'c x 1' and told.outcomes[0].point_of_no_return is not None
    assert list(dict.fromkeys(replayed)) == [
        'nudge',
        'a x 1',
        'b x 1',
        'c x 1',
        'd x 1',
        'b x 4',
    ]


def test_margins_of_what_speaks_for_the_cause_are_asked_first(tmp_path):
    """It is named although others bear more; one combined with another is tried where it bears some."""
    subject = subject_of(growing(RATE), no_batch, first, tmp_path)
    fragile, sound = bearing('fragile', 0.9, 'wear'), bearing('sound', 0.45, 'wear')
    asked = []

    def combine(change):
        asked.append(change.name)
        return bearing('both', 0.225, 'wear')

    told = run(experiments(subject), [fragile, sound, bearing('half', 0.55)], combine=combine)
    assert asked == ['sound x 1']
    assert {o.change.name: o.margin for o in told.outcomes} == {
        'both x 1': 4, 'sound x 1': 2, 'fragile x 1': None, 'half x 1': None
    }  # fmt: skip
    assert [o.change.name for o in told.outcomes][:2] == ['both x 1', 'sound x 1']
    assert told.outcomes[0].reached == SYMPTOM + FARTHER
    cause = cause_of(told)
    assert cause.why.startswith('wear: both x 1 averts it; so does sound x 1')


@pytest.mark.parametrize('given', [False, True])
def test_margins_and_what_is_combined_do_not_depend_on_how_many_changes_there_were(tmp_path, given):
    """Unless somebody gave the budget."""
    subject = subject_of(growing(RATE), no_batch, first, tmp_path)
    changes = [change(f'{n}', growing(0.7 + n / 100)) for n in range(8)]
    sound = bearing('sound', 0.45, 'wear')
    made = experiments(subject, budget=600)
    told = run(
        made, [sound, *changes], combine=lambda one: bearing('both', 0.225, 'wear'), changes_only=not given
    )
    assert len(told.untried) > 3
    found = {o.change.name: o.margin for o in told.outcomes}
    assert ('both x 1' in found) == (not given)
    if not given:
        assert found['both x 1'] == 4 and told.outcomes[0].point_of_no_return is not None


def test_a_margin_that_leads_back_to_the_run_as_it_was(tmp_path):
    """It broke, and isn't replayed again."""
    subject = subject_of(growing(RATE), no_batch, first, tmp_path)
    half = change('half', growing(0.5))._replace(stressed=lambda times: None)
    (outcome,) = run(experiments(subject), [half]).outcomes
    assert outcome.margin == 1


def test_no_margin_is_asked_of_what_takes_the_mechanism_away_for_good(tmp_path):
    """Nor of what does not avert, nor beyond the budget."""
    subject = subject_of(growing(RATE), no_batch, first, tmp_path)
    for_good = change('for good', growing(0.9))._replace(removes=mechanism('wear'))
    worse = change('worse', growing(2.0))._replace(stressed=lambda times: 1 / 0)
    told = run(experiments(subject), [for_good, bearing('slower', 0.2), worse])
    assert [(o.change.name, o.margin) for o in told.outcomes] == [
        ('for good', None), ('slower x 1', None), ('worse', None)
    ]  # fmt: skip
    short = run(experiments(subject, budget=540), [bearing('slower', 0.2)])
    assert short.outcomes[0].margin == 2 and short.steps_replayed <= 540


def test_a_bad_batch(tmp_path):
    """A state that forgets, so that the batch alone is to blame."""
    subject = subject_of(halving, with_a_bad_batch, first, tmp_path)
    made = experiments(subject)
    assert bad_batches(made) == (200,)
    changes = [without_batch(subject, 200), other_batches(subject, made.window)]
    told = run(made, [change('half', lambda x, batch: (x / 2, {'loss': x})), *changes])
    assert {o.change.name: o.verdict for o in told.outcomes} == {
        'without the batch of step 200': 'averted',
        'other batches': 'averted',
        'half': 'averted',
    }
    cause = cause_of(told, by_batch=True)
    assert cause.kind == 'data' and 'batch' in cause.why
    assert [o.change.name for o in told.outcomes if o.verdict == 'averted'][-1] == 'other batches'
    assert without_batch(subject, 200, '--skip_batches=200').flags == '--skip_batches=200'


def test_a_batch_that_a_state_at_the_edge_cannot_bear_is_not_bad(tmp_path):
    """All batches are alike; what any other step or batch averts is the state's."""

    def ordinary(step):
        return np.float32(1e-9 * (step % 7))

    subject = subject_of(growing(RATE), ordinary, first, tmp_path)
    made = experiments(subject)
    assert bad_batches(made) == ()
    told = run(
        made,
        [
            Change('no batches', 'data', lambda: Changed(growing(RATE), no_batch, lambda x: 0 * x)),
            change('shrinking', growing(0.5)),
        ],
    )
    assert {o.verdict for o in told.outcomes} == {'averted'}
    assert cause_of(told, by_batch=False).kind == 'model'


def asleep(rate):
    """A network whose outputs vary the more the longer it learns; at a rate of 0 they never do."""

    def step(x, batch):
        return x * jnp.float32(1 + rate), {'loss': 1 - x, 'variance_ratio': x}

    return step


def test_a_network_that_never_learns_is_taken_back_to_its_start(tmp_path):
    """The rule waits for step 1,000; the state has been there since step 0, and is looked for after 200 steps."""
    subject = subject_of(asleep(0), no_batch, lambda: jnp.float32(1e-3), tmp_path, every=100, steps=1010)
    found = on(subject, Symptom('constant', 1000), budget=9000)
    assert found.window == Window(0, 199, 200, lasting=True)
    told = run(
        found,
        [
            change('awake', asleep(0.05), 'model'),
            change('slow', asleep(0.005), 'optimiser'),
            change('broken', lambda x, batch: (x * jnp.nan, {'loss': x, 'variance_ratio': x})),
        ],
    )
    assert told.control.verdict == told.nudge.verdict == 'unchanged' and told.control.reached == 200
    verdicts = {outcome.change.name: outcome.verdict for outcome in told.outcomes}
    assert verdicts == {'awake': 'averted', 'slow': 'unchanged', 'broken': 'worse'}
    # Whenever it is switched on, 200 steps are time enough.
    assert told.outcomes[0].point_of_no_return == 199
    assert cause_of(told).kind == 'model'


def test_what_set_in_late_is_no_lasting_state(tmp_path):
    """Outputs that varied, and ceased to a little before the rule said so."""
    died = 500

    def batch_at(step):
        return np.float32(1 if step < died else 1e-4)

    def step(x, batch):
        return x - 1e-4, {'loss': x, 'variance_ratio': batch}

    subject = subject_of(step, batch_at, lambda: jnp.float32(1), tmp_path, every=100, steps=540)
    found, _ = replay.bisect(subject)
    window = on(subject, found.symptom, budget=2000).window
    assert found.symptom.kind == 'constant' and died < found.symptom.step < died + 20
    assert window == Window(400, found.symptom.step, found.symptom.step + 51, lasting=False)


def logistic_map(x, batch):
    return 4 * x * (1 - x), {'loss': x}


def test_what_depends_on_chance_is_undecided(tmp_path):
    """Chaos doubles a millionth at each step, and meets the rule elsewhere or not at all."""
    subject = subject_of(logistic_map, no_batch, lambda: jnp.float32(0.3), tmp_path)
    columns = series(subject.records)
    highest = int(np.argmax(columns['loss'][150:250])) + 150
    rule = detect.custom(f'loss >= {float(columns["loss"][highest])!r} and step > 100')
    made = experiments(subject, detectors=(rule,))
    assert made.judge.symptom.step == highest
    told = run(made, [change('still', lambda x, batch: (x, {'loss': x * 0}))])
    assert told.nudge.verdict == 'averted' and told.outcomes[0].verdict == 'averted'
    cause = cause_of(told)
    assert cause.kind == 'none' and 'chance' in cause.why


def test_another_run_than_was_recorded_is_not_experimented_on(tmp_path):
    subject = subject_of(growing(RATE), no_batch, first, tmp_path)
    made = experiments(subject)
    path = tmp_path / 'records.jsonl'
    rows = small.read_records(path)
    rows[160] |= {'digest': '0123456789abcdef'}
    small.write_records(path, rows)
    altered = subject._replace(records=RecordFile(path).read())
    told = run(on(altered, made.judge.symptom, (LARGE,), budget=2000), [change('still', growing(1.0))])
    assert not told.identical and told.outcomes == () and told.nudge is None
    assert cause_of(told).kind == 'nondeterminism'


def test_steps_that_do_not_show_the_symptom_again_are_not_experimented_on(tmp_path):
    subject = subject_of(growing(RATE), no_batch, first, tmp_path, records=False)
    other = Symptom('when', SYMPTOM - 30)
    told = run(on(subject, other, (LARGE,), budget=2000), [change('still', growing(1.0))])
    assert told.outcomes == () and 'did not show' in cause_of(told).why


def test_without_a_checkpoint_nothing_is_tried(tmp_path):
    subject = subject_of(growing(RATE), no_batch, first, tmp_path, every=320)
    diagnosis, _ = replay.bisect(subject, (LARGE,))
    assert window_of(subject, -1) is None
    shutil.rmtree(tmp_path / 'checkpoints' / '0')
    found, report = explain(subject, diagnosis, lambda window, bad: 1 / 0, (LARGE,), budget=2000)
    assert report.window is None and report.outcomes == () and found.remedies == ()
    assert found.cause.kind == 'none' and 'no checkpoint' in found.cause.why


def test_a_window_starts_early_enough_where_it_can(tmp_path):
    subject = subject_of(growing(RATE), no_batch, first, tmp_path)
    lead = LEAD
    assert window_of(subject, 50 + lead).start == 50
    assert window_of(subject, 49 + lead).start == 0
    assert window_of(subject, 10).start == 0
    assert not window_of(subject, 0, began=0).lasting


def test_a_window_starts_late_enough_where_checkpoints_are_far_apart(tmp_path, monkeypatch):
    subject = subject_of(growing(RATE), no_batch, first, tmp_path, every=320)
    assert window_of(subject, 310) == Window(310 - FAR, 310, 311 + AFTER)
    assert window_of(subject, 310, began=105) == Window(5, 204, 205, lasting=True)
    monkeypatch.setattr(window, 'FAR', 70)
    found = experiments(subject)
    assert found.window.start == SYMPTOM - 70
    control, identical = found.control()
    assert identical and control.verdict == 'unchanged'
    assert found.attempt(change('slower', growing(1.01))).verdict == 'averted'


def test_anybody_s_run_is_diagnosed(tmp_path):
    """A batch that is not a number, in a run of which nothing is known but its step."""

    def batch_at(step):
        return np.float32(np.nan if step == 120 else 1e-3 * (1 + step % 7))

    jaxrnn.record(halving, batch_at, first, tmp_path, max_steps=200, checkpoint_every=50)
    changes = [Change('half', 'optimiser', lambda: Changed(halving, batch_at, lambda x: x / 2))]
    diagnosis, told = jaxrnn.diagnose(halving, batch_at, tmp_path, changes, like=first)
    assert (diagnosis.first_bad_step, diagnosis.cause.kind) == (120, 'data')
    assert diagnosis.where['source'] == 'batch'
    outcomes = {remedy['name']: remedy['outcome'] for remedy in diagnosis.remedies}
    assert outcomes == {
        'skip what is not finite': 'averted',
        'without the batch of step 120': 'averted',
        'other batches': 'averted',
        'half': 'unchanged',
        'float64': 'unchanged',
        'a tenth of each step': 'unchanged',
        'a hundredth of each step': 'unchanged',
    }
    assert diagnosis.replay.steps_replayed == 21 + told.steps_replayed <= 2000
    # What bears the next batch like it comes first; other batches, which nobody has, last. A step of one's own has no
    # flags.
    averting = [remedy['name'] for remedy in diagnosis.remedies if remedy['outcome'] == 'averted']
    assert averting == ['skip what is not finite', 'without the batch of step 120', 'other batches']
    assert not any(remedy['flags'] for remedy in diagnosis.remedies)
    assert diagnosis.remedies[0]['point_of_no_return'] in (119, 120)


def test_a_change_is_compiled_while_another_is_replayed(tmp_path, monkeypatch):
    """By another thread, and once."""
    subject = subject_of(growing(RATE), no_batch, first, tmp_path)
    prepared, prepare = [], telemetry.PlainStep.prepare

    def see(self, state, batch):
        prepared.append(threading.current_thread() is threading.main_thread())
        prepare(self, state, batch)

    monkeypatch.setattr(telemetry.PlainStep, 'prepare', see)
    made = experiments(subject)
    told = run(made, [change(f'{rate}', growing(rate)) for rate in (0.5, 1.0, 1.05)])
    assert len(told.outcomes) == 3 and prepared == [False] * 3
    for future in made.replayer._compiled.values():
        observed = future.result().observed
        assert observed is subject.observed or observed._finish._cache_size() == 1


def test_a_staged_step_is_begun_by_one_program_for_all_changes(tmp_path):
    begun = []

    def begin(state, batch):
        begun.append(1)  # when it is traced
        return 2.0 * state

    def staged(rate):
        return Staged(begin, lambda state, batch, doubled: growing(rate)(state + 0 * doubled, batch))

    subject = subject_of(growing(RATE), no_batch, first, tmp_path)
    told = run(experiments(subject), [change(f'{rate}', staged(rate)) for rate in (0.5, 1.0, RATE)])
    verdicts = {o.change.name: o.verdict for o in told.outcomes}
    assert verdicts == {'0.5': AVERTED, '1.0': AVERTED, f'{RATE}': UNCHANGED} and len(begun) == 1


def test_a_change_that_records_less_than_the_run_is_not_taken_for_one_that_breaks(tmp_path):
    """NaN is what a column lacks; it is no symptom of the change."""

    def chatty(state, batch):
        state, record = growing(RATE)(state, batch)
        return state, {**record, 'more': state}

    subject = subject_of(chatty, no_batch, first, tmp_path)
    looking_back = detect.custom('loss > 1 and loss > median(loss, 20)')
    told = run(experiments(subject, detectors=[looking_back]), [change('half', growing(0.5))])
    assert told.identical and told.outcomes[0].verdict == AVERTED


def test_a_change_is_made_where_there_are_64_bit_types_if_there_are(tmp_path):
    """In the thread that compiles, too."""
    seen = []

    def make():
        seen.append(jax.config.values['jax_enable_x64'])
        return Changed(growing(0.5), no_batch)

    for wide in (False, True):
        with jax.enable_x64(wide):
            subject = subject_of(growing(RATE), no_batch, first, tmp_path / str(wide))
            run(experiments(subject), [Change('half', 'model', make)])
    assert seen == [False, True]


def test_what_can_not_be_made_is_said(tmp_path):
    subject = subject_of(growing(RATE), no_batch, first, tmp_path)

    def make():
        raise ValueError('no such step')

    def mistyped(x, batch):
        return x['weights'], {'loss': x}

    told = run(experiments(subject), [Change('broken', 'model', make), change('mistyped', mistyped),
                                      change('shrinking', growing(0.5))])  # fmt: skip
    assert {o.change.name: o.verdict for o in told.outcomes} == {
        'shrinking': 'averted', 'broken': 'not possible', 'mistyped': 'not possible'
    }  # fmt: skip
    assert told.outcomes[0].change.name == 'shrinking' and cause_of(told).why == 'shrinking averts it'
    assert {o.why for o in told.outcomes if 'broken' in o.change.name} == {'ValueError: no such step'}


def test_a_healthy_run_has_nothing_to_explain(tmp_path):
    jaxrnn.record(halving, no_batch, first, tmp_path, max_steps=60, checkpoint_every=20)
    diagnosis, told = jaxrnn.diagnose(halving, no_batch, tmp_path, like=first)
    assert (diagnosis.symptom, diagnosis.remedies, told) == (None, (), None)


def test_what_did_nothing_refutes_nothing(tmp_path):
    """A clipping that never clips says nothing of whether there was something to clip; one that does refutes."""
    subject = subject_of(growing(RATE), no_batch, first, tmp_path)

    def clipped(at):
        return lambda x, batch: (jnp.minimum(x * jnp.float32(RATE), at), {'loss': x})

    def named_with(*more):
        still = change('still', growing(1.0), removes='outlying gradients')
        told = run(experiments(subject), [still, *more])
        return told, cause_of(told, by_batch=False)

    told, named = named_with(change('clipped at 100', clipped(100.0), removes='outlying gradients'))
    assert named.why.startswith('outlying gradients')
    assert {o.change.name: o.acted for o in told.outcomes} == {'still': True, 'clipped at 100': False}
    told, named = named_with(change('faster', growing(1.101), removes='outlying gradients'))
    assert all(o.acted for o in told.outcomes) and not named.why.startswith('outlying gradients')


def test_a_named_mechanism_is_confirmed_by_what_the_budget_had_not_reached(tmp_path):
    """The last change of the list takes away the mechanism that the first names; in between there is more than the
    budget reaches to. It refutes it, or it doesn't."""
    subject = subject_of(growing(RATE), no_batch, first, tmp_path)

    def told(last):
        still = change('still', growing(1.0), removes='outlying gradients')
        between = [change(f'no {n}', growing(1.0 + 1e-3 * n)) for n in range(1, 30)]
        changes = [still, *between, change('last', growing(last), removes='outlying gradients')]
        found = run(experiments(subject, budget=1500), changes)
        assert found.steps_replayed <= 1500 and any(c.name == 'no 29' for c in found.untried)
        return found

    refuted, confirmed = told(1.2), told(0.9)
    assert all('last' not in [c.name for c in each.untried] for each in (refuted, confirmed))
    assert cause_of(confirmed, by_batch=False).why.startswith('outlying gradients')
    assert not cause_of(refuted, by_batch=False).why.startswith('outlying gradients')


def test_another_start_is_replayed_from_the_start(tmp_path):
    """With the window's horizon; where it averts, it does so when switched on at step 0. Not where the budget doesn't
    reach so far, nor where there is no state to start from."""
    subject = subject_of(growing(RATE), no_batch, first, tmp_path)
    smaller = change('smaller', growing(RATE), convert=lambda x: x / 50, initial=True)
    larger = change('larger', growing(RATE), convert=lambda x: x * 50, initial=True)
    told = run(experiments(subject), [smaller, larger, change('slower', growing(1.099))])
    found = {o.change.name: o for o in told.outcomes}
    assert found['smaller'].verdict == 'delayed' and found['smaller'].symptom.step == SYMPTOM + 41
    assert found['larger'].verdict == 'worse' and found['larger'].symptom.step == SYMPTOM - 41
    still = change('still', growing(1.0), initial=True)
    told = run(experiments(subject), [still])
    assert told.outcomes[0].verdict == AVERTED and told.outcomes[0].point_of_no_return == 0
    assert told.steps_replayed >= SYMPTOM + 51
    told = run(experiments(subject, budget=400), [still])
    assert [each.name for each in told.untried] == ['still']


def test_the_budget_where_none_is_given():
    """Twice what the symptom took to come, within bounds."""
    found = {step: budget_for(step) for step in (0, 999, 1001, 3999, 4001, 10**6)}
    assert found == {0: 2000, 999: 2000, 1001: 2002, 3999: 7998, 4001: 8000, 10**6: 8000}


def test_a_budget_grows_with_the_steps_of_a_change_within_bounds():
    """From 8,000 steps, of a symptom at step 10,000; a symptom at step 100 may take four times what it began with."""
    found = {}
    for symptom, times in ((10_000, 1.5), (10_000, 5), (100, 3), (100, 10)):
        budget = Budget(budget_for(symptom))
        budget.spent = 70
        budget.extend(times, most_for(symptom))
        found[symptom, times] = budget.steps - 70
    assert found == {(10_000, 1.5): 12_000, (10_000, 5): 20_000, (100, 3): 6000, (100, 10): 8000}
    budget = Budget(300)
    budget.extend(1.0, 200)
    assert budget.steps == 300


@pytest.mark.parametrize('given', [None, 2000])
def test_a_budget_that_nobody_gave_is_for_changes_and_grows_with_the_time_they_are_judged_over(
    tmp_path, given
):
    """A nudge puts the symptom off by 200 steps, through which each change must be judged then."""

    def step(state, batch):
        late = jnp.where(state['exact'] == 1, 200, 400)
        return {**state, 'count': state['count'] + 1}, {'loss': jnp.float32(state['count'] >= late)}

    def still(number):
        return change(f'still {number}', lambda state, batch: (state, {'loss': jnp.float32(0)}))

    first = {'count': jnp.int32(0), 'exact': jnp.float32(1)}
    subject = subject_of(step, no_batch, lambda: first, tmp_path)
    diagnosis, _ = replay.bisect(subject, (rule := detect.custom('loss > .5'),))
    changes = [still(number) for number in range(20)]
    _, report = explain(subject, diagnosis, lambda window, bad: changes, (rule,), budget=given)
    length = report.nudge.symptom.step + 1 + AFTER - report.window.start
    assert report.nudge.verdict == 'delayed' and report.nudge.symptom.step == 400
    before = report.control.reached + report.nudge.reached - 2 * report.window.start
    # A third is held back, and then half of that.
    allowed = 2000 * length / report.window.length if given is None else 2000 - before
    assert abs(len(report.outcomes) - 0.65 * allowed // length) <= 1, (len(report.outcomes), allowed, length)
    assert (report.steps_replayed > 2000) == (given is None)


def overshooting(rate, noise=0.0, leaves=700, lasts=100):
    """Descent on log cosh(5 x), whose minimum bears no step longer than .4: x jumps from side to side of it. From a
    step on what isn't at the minimum grows, for some steps."""

    def step(x, batch):
        moved = x - rate * jnp.tanh(5 * x) + rate * noise * batch['noise']
        return jnp.where(batch['late'], 1.1 * x, moved), {'loss': x * x}

    def batch_at(number):
        return {
            'late': np.bool_(leaves <= number < leaves + lasts),
            'noise': np.float32(np.random.default_rng(number).normal()),
        }

    return step, batch_at


@pytest.mark.parametrize(
    'rate, noise, held_up',
    [
        (0.5, 0, True),  # at a tenth it falls to the minimum
        (0.5, 0.01, True),
        (0.1, 1, False),  # the noise of the batches, which falls as the steps do
        (0.02, 1, False),
    ],
)
def test_a_loss_that_the_length_of_the_steps_held_up(tmp_path, rate, noise, held_up):
    """Is told from one that the noise of the batches did: it falls farther than the steps are shortened."""
    step, batch_at = overshooting(rate, noise)
    subject = subject_of(step, batch_at, lambda: jnp.float32(0.3), tmp_path, steps=760)
    level = float(np.max(subject.columns()['loss'][200:700]))
    rule = detect.custom(f'loss > {16 * level}')
    diagnosis, _ = replay.bisect(subject, (rule,))
    tenth = in_slow_motion(subject, 0.1, 'a tenth of each step')
    found, report = explain(subject, diagnosis, lambda window, bad: [tenth], (rule,))
    assert report.stood is not None and report.stood.steps == 3 * report.window.length
    (outcome,) = report.outcomes
    if held_up:
        assert outcome.verdict == 'averted' and found.cause.why.startswith('steps too long (for ')
        assert f'it falls to {outcome.loss:.1e}' in found.cause.why
    else:
        assert 'too long' not in found.cause.why


def test_a_loss_that_was_still_falling_was_held_up_by_nothing(tmp_path):
    """Shorter steps make it fall less, or more: nobody knows why."""

    def step(state, batch):
        x, left = state['x'], state['left']
        grown = jnp.where(batch, 1.1 * x, x - 0.5 * left * jnp.tanh(5 * x / left))
        return {'x': grown, 'left': left * 0.998}, {'loss': x * x}

    first = {'x': jnp.float32(0.3), 'left': jnp.float32(1)}
    subject = subject_of(step, lambda number: np.bool_(number >= 700), lambda: first, tmp_path, steps=760)
    rule = detect.custom(f'loss > {16 * float(subject.columns()["loss"][690])} and step > 690')
    diagnosis, _ = replay.bisect(subject, (rule,))
    tenth = in_slow_motion(subject, 0.1, 'a tenth of each step')
    found, report = explain(subject, diagnosis, lambda window, bad: [tenth], (rule,))
    assert report.stood is None and 'too long' not in found.cause.why


def test_of_equal_margins_what_goes_on_making_steps_shorter_comes_first():
    """Though it leaves a higher loss: a landscape that sharpens on breaks the other later."""
    still = change('still', growing(1.0))
    alone = Outcome(still, 'averted', None, 1e-6, 300, margin=4)
    decaying = Outcome(still._replace(name='decaying', decays=True), 'averted', None, 1e-3, 300, margin=4)
    nearer = Outcome(still._replace(name='nearer', decays=True), 'averted', None, 1e-9, 300, margin=2)
    assert [o.change.name for o in ranked([alone, nearer, decaying])] == ['decaying', 'still', 'nearer']
