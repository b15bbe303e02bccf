"""What became of a run after a rule held: what passed is a note, the rest is a symptom; and when it began."""

import numpy as np
import pytest
from detectors_test import healthy

from jaxrnn import detect
from jaxrnn.detect import course
from jaxrnn.diagnosis import Symptom
from jaxrnn.types import UserError

STEPS = np.arange(600.0)
NOISE = np.exp(0.1 * np.random.default_rng(5).normal(size=600))


def judged(columns, loss='loss', **bounds):
    return detect.judged(columns, detect.bound(detect.DETECTORS, columns, loss), loss, **bounds)


def of_losses(losses, **more):
    return {'step': np.arange(float(len(losses))), 'loss': np.asarray(losses, float), **more}


def began(columns):
    found = judged(columns)
    own = next(d for d in detect.bound(detect.DETECTORS, columns, 'loss') if d.kind == found.symptom.kind)
    return detect.began(own, columns, found.symptom)


@pytest.mark.parametrize('size, kind', [(3.4, None), (8, None), (40, 'spike')])
def test_a_leap_of_one_batch_is_a_note_unless_it_is_large(size, kind):
    columns = healthy()
    columns['loss'][700] *= size
    found = judged(columns)
    assert (None if found.symptom is None else found.symptom.kind) == kind
    said = found.notes if kind is None else [found.event]
    if size > 3.4:
        assert [event.step for event in said] == [700] and 'back after 1 step' in said[0].why


def test_at_its_floor_a_leap_of_one_batch_is_a_note_of_any_size():
    """A loss of 4e-14 in a run that began with 1."""
    losses = np.maximum(0.9**STEPS, 4e-14) * NOISE
    losses[500] *= 1000
    found = judged(of_losses(losses))
    assert found.symptom is None and [note.step for note in found.notes] == [500]


def test_what_a_run_comes_back_from_at_a_cost_is_a_symptom_and_the_cost_is_said():
    losses = 0.995**STEPS * NOISE
    losses[300:345] *= np.linspace(30, 1, 45)
    found = judged(of_losses(losses))
    assert found.symptom == Symptom('spike', 300)
    assert 35 <= found.event.back - 300 <= 48 and 'back after' in found.event.why
    losses[300:] = 30 * losses[299]
    found = judged(of_losses(losses))
    assert found.symptom == Symptom('spike', 300) and found.event.back is None
    assert 'did not come back' in found.event.why


def test_a_leap_while_the_loss_falls():
    """By a factor of 300 in 300 steps: far below the median of the last 200."""
    losses = 0.981**STEPS * NOISE
    losses[330:336] *= 50
    assert judged(of_losses(losses)).symptom == Symptom('spike', 330)
    assert judged(of_losses(0.981**STEPS * NOISE)).symptom is None


@pytest.mark.parametrize('seed', range(20))
def test_a_loss_that_bends_or_scatters_is_no_leap(seed):
    rng = np.random.default_rng(seed)
    bend = np.maximum(rng.uniform(0.7, 0.99) ** STEPS, 10.0 ** -rng.integers(1, 14))
    noise = np.exp(rng.choice([0.0, 0.03, 0.3, 1.0]) * rng.normal(size=600))
    assert judged(of_losses(bend * noise)).symptom is None
    assert judged(of_losses(2.3 + 0.1 * bend * noise)).symptom is None


def test_many_small_leaps_are_a_symptom():
    losses = 0.998**STEPS * NOISE
    losses[np.arange(100, 600, 40)] *= 7
    found = judged(of_losses(losses))
    assert found.symptom == Symptom('spike', 100) and '13 leaps' in found.event.why
    # One among them that the run did not come back from is the symptom.
    losses[510:] *= 60
    assert judged(of_losses(losses)).symptom == Symptom('spike', 510)


def test_worse_than_at_first_for_good():
    """Grown from the first step on; leapt within the first steps, before there is a history; and by 2 to 9,500."""
    grown = of_losses(2 * 1.058 ** STEPS[:150])
    assert judged(grown).symptom.kind == 'diverged' and began(grown) <= 3
    leapt = of_losses(np.r_[0.03, 0.03, 165000 * 0.8 ** STEPS[:400] + 0.08] * NOISE[:402])
    assert judged(leapt).symptom == Symptom('spike', 2)
    leapt['loss'] = np.minimum(leapt['loss'], 0.2)
    assert judged(leapt).symptom.kind == 'diverged' and began(leapt) in (1, 2)
    # From where the loss was: below is well, and so is above for a while.
    assert (
        judged(of_losses(np.r_[np.full(100, 3.0), 0.99**STEPS] * np.r_[NOISE[:100], NOISE])).symptom is None
    )
    hill = of_losses(np.r_[1.0, 4 * 0.97 ** STEPS[:400]] * NOISE[:401])
    assert judged(hill).symptom is None and [note.kind for note in judged(hill).notes] == ['diverged']


@pytest.mark.parametrize('scatter', [0.05, 0.2, 0.5, 1.0])
def test_a_first_loss_by_luck_is_not_the_measure(scatter):
    """Nothing is learnt, nothing is lost: losses that scatter about the same level, and a first one that is low."""
    for seed in range(25):
        losses = np.exp(scatter * np.random.default_rng(seed).normal(size=600))
        losses[0] = np.exp(-2 * scatter)
        assert judged(of_losses(losses)).symptom is None


def test_a_leap_is_where_a_divergence_begins():
    losses = 0.99**STEPS * NOISE
    losses[250:] = 80 * NOISE[250:]
    assert judged(of_losses(losses)).symptom == Symptom('spike', 250)
    # One long before the leap is another matter.
    losses = 1.02**STEPS * NOISE
    losses[500:] *= 50
    assert judged(of_losses(losses)).symptom.kind == 'diverged'


def dead(losses, since, steps=600):
    moved = np.where(np.arange(steps) < since, 1e-3, 0.0)
    return of_losses(losses, state_moved=moved, state_rms=np.ones(steps), finite_state=np.ones(steps))


def test_nothing_moves_although_the_loss_is_not_at_its_best():
    falls = np.r_[0.97 ** STEPS[:100], np.full(500, 0.5)] * NOISE
    found = judged(dead(falls, 100))
    assert (
        found.symptom.kind == 'dead' and 100 <= found.symptom.step <= 117 and began(dead(falls, 100)) == 100
    )
    assert judged(dead(np.full(600, 0.7) * NOISE, 0)).symptom.kind == 'dead'
    # At the end of a schedule, and at a floor, it may.
    floor = np.maximum(0.97**STEPS, 1e-4) * NOISE
    assert judged(dead(floor, 420)).symptom is None
    assert judged(dead(np.maximum(0.5**STEPS - 1e-20, 0), 80)).symptom is None
    # Not for most of a run that has not learnt all: its rate fell to 0 too soon.
    early = np.r_[0.98 ** STEPS[:150], np.full(450, 0.98**150)] * NOISE
    assert judged(dead(early, 150)).symptom.kind == 'dead' and began(dead(early, 150)) == 150
    assert judged(dead(early, 400)).symptom is None
    # For a while, too; and where there is no loss nothing is claimed.
    paused = dead(np.r_[0.97 ** STEPS[:100], np.full(500, 0.08)] * NOISE, 100)
    assert judged(paused).symptom.kind == 'dead'
    paused['state_moved'][200:] = 1e-3
    assert judged(paused).symptom is None
    no_loss = {name: values for name, values in dead(falls, 100).items() if name != 'loss'}
    assert judged(no_loss, None).symptom is None


def test_at_the_floor_of_rounding_nothing_moves_and_no_loss_is_the_best():
    floor = np.where((STEPS > 300) & (STEPS < 340), 1e-14, 5e-14) * NOISE
    assert judged(dead(np.exp(-STEPS / 8) + floor, 420)).symptom is None
    risen = np.where(STEPS < 420, np.exp(-STEPS / 12), 1e-3) * NOISE
    assert judged(dead(risen, 420)).symptom is not None


def test_gradients_of_exactly_zero_while_momentum_moves_on():
    losses = np.r_[0.97 ** STEPS[:100], np.full(500, 0.5)] * NOISE
    columns = dead(losses, 600) | {'moments_fading': (STEPS >= 100).astype(float)}
    assert judged(columns).symptom.kind == 'dead' and began(columns) == 100


def test_what_is_not_finite_and_left_the_state_so_was_skipped():
    columns = healthy()
    columns['loss'][321] = np.nan
    found = judged(columns)
    assert found.symptom is None and [(n.kind, n.step) for n in found.notes] == [('nonfinite', 321)]
    columns['loss'][321:340] = np.nan  # of too many in a row
    assert judged(columns).symptom == Symptom('nonfinite', 321)
    columns['loss'][325:] = 1e-3
    columns['finite_state'][323] = 0
    assert judged(columns).symptom == Symptom('nonfinite', 321)
    columns = healthy()
    columns['loss'][990:] = np.inf  # to the end
    assert judged(columns).symptom == Symptom('nonfinite', 990)


def test_another_number_that_is_not_finite_is_no_symptom():
    columns = healthy() | {'precision': np.where(np.arange(1000) % 7 == 0, np.nan, 0.5)}
    assert judged(columns).symptom is None


def test_a_collapse_began_where_the_loss_left_its_best():
    columns = healthy(2000)
    columns['accuracy'][1500:] = 0
    columns['loss'][1440:] *= np.minimum(np.exp(np.arange(560) / 20), 100)
    found = judged(columns)
    assert found.symptom.kind == 'collapse' and 1500 < found.symptom.step < 1516
    assert 1440 <= began(columns) <= 1475
    # A rule of one's own holds where it holds.
    own = detect.custom('accuracy < .1 and step > 1000')
    assert detect.began(own, columns, Symptom('when', 1500)) == 1500


def test_the_loss_by_any_name():
    columns = healthy()
    columns['train_loss'] = columns.pop('loss')
    columns['train_loss'][600:] *= 50
    field = detect.loss_of(columns).field
    assert field == 'train_loss' and judged(columns, field).symptom == Symptom('spike', 600)
    for names, expected in (
        (['loss', 'val_loss'], 'loss'),
        (['actor_loss', 'critic_loss', 'total_loss'], 'total_loss'),
        (['metrics_loss', 'accuracy'], 'metrics_loss'),
        (['Loss', 'grad_norm'], 'Loss'),
        (['nll', 'lr'], 'nll'),
        (['step', 'finite_state', 'state_rms', 'objective_value'], 'objective_value'),
        (['reconstruction_loss', 'learning_rate'], 'reconstruction_loss'),
        (['actor_loss', 'critic_loss'], None),
        (['grad_norm', 'lr'], None),
        (['loss_scale', 'ce'], None),
    ):
        assert detect.loss_of(names).field == expected, names
    assert detect.loss_of(['actor_loss', 'critic_loss'], 'critic_loss').field == 'critic_loss'
    with pytest.raises(UserError, match="loss: no field 'los'"):
        detect.loss_of(['actor_loss'], 'los')


def test_what_can_not_be_looked_for_is_said():
    columns = {'step': STEPS, 'grad_norm': STEPS}
    bound = detect.with_numbers(detect.DETECTORS, columns, None)
    missing = detect.unjudged(columns, bound)
    assert 'loss' in missing['spike'] and missing['collapse'] == ['accuracy'] and 'nonfinite' not in missing
    with pytest.raises(UserError, match='did you mean grad_norm'):
        detect.bound([detect.custom('gradnorm > 3')], columns, None)


def test_a_loss_below_zero():
    """A log-likelihood that falls through zero, and leaps."""
    losses = 3 - STEPS / 100 + 0.1 * np.random.default_rng(0).normal(size=600)
    assert judged(of_losses(losses)).symptom is None
    losses[500:] += 4000
    assert judged(of_losses(losses)).symptom == Symptom('spike', 500)
    losses[510:] -= 4000
    assert judged(of_losses(losses)).event.back == 510


def test_a_stall_without_a_cosine():
    steps = np.arange(3000.0)
    noise = np.exp(0.1 * np.random.default_rng(0).normal(size=3000))
    stuck = {'step': steps, 'loss': noise}
    assert judged(stuck).symptom.kind == 'stall'
    assert judged({'step': steps, 'loss': np.maximum(0.999**steps, 0.3) * noise}).symptom is None


def test_still_as_good():
    assert 0.28 < course.still_as_good(np.full(50, 0.2) * NOISE[:50]) < 0.35
    assert course.still_as_good(np.array([])) is None
    assert course.still_as_good(np.array([np.nan, -2.0])) == pytest.approx(-1.0)


def test_what_was_learnt_and_is_lost_again_by_the_loss_alone():
    losses = np.r_[np.exp(-STEPS[:300] / 50), np.full(300, 0.3)] * NOISE
    found = judged(of_losses(losses))
    assert found.symptom.kind in ('collapse', 'spike')  # it leaps
    slowly = np.exp(np.r_[-STEPS[:200] / 40, -5 + STEPS[:400] / 100]) * np.exp(0.5 * np.log(NOISE) * 10)
    found = judged(of_losses(slowly))
    assert found.symptom.kind == 'collapse' and began(of_losses(slowly)) < found.symptom.step
    # Not where next to nothing is left to learn, nor where little was learnt, nor where it comes of itself.
    assert (
        judged(of_losses(np.exp(np.r_[-STEPS[:200] / 20, -10 + STEPS[:400] / 100]) * NOISE)).symptom is None
    )
    for scatter in (0.3, 1.0):
        for seed in range(25):
            falling = np.exp(-STEPS / 200 + scatter * np.random.default_rng(seed).normal(size=600))
            assert judged(of_losses(falling)).symptom is None, (scatter, seed)
    curved = (1 + np.cos(STEPS / 30)) / 4 + 0.4
    assert judged(of_losses(curved * NOISE)).symptom is None


def test_leaps_among_scattered_losses():
    """One that stays, or many; not one that batches give now and then."""
    scattered = np.exp(-3 + 0.9 * np.random.default_rng(3).normal(size=600))
    scattered[:40] += np.linspace(1, 0, 40)
    assert judged(of_losses(scattered)).symptom is None
    stays = scattered.copy()
    stays[500:] = 3
    found = judged(of_losses(stays))
    assert (found.symptom.kind, found.symptom.step) == ('spike', 500)
    many = np.where(np.random.default_rng(1).random(600) < 0.1, 2.5, 1e-4) * NOISE
    many[:20] = 0.7
    assert judged(of_losses(many)).symptom.kind == 'spike'
    # Hardly a loss or a large one, so that no leap stands out: of a perceptron whose steps are far too long.
    rng = np.random.default_rng(2)
    either = np.where(rng.random(600) < 0.3, rng.uniform(0.1, 4, 600), np.exp(rng.uniform(-16, -3, 600)))
    either[:10] = np.linspace(0.7, 0.5, 10)
    assert judged(of_losses(either)).symptom.kind == 'spike'


def partly_still(losses, since, share=0.3, moved=1e-3):
    still = np.where(since <= STEPS, share, 0.0)
    return of_losses(losses, state_still=still, state_moved=np.full(600, moved), moments_fading=np.zeros(600))


def test_a_part_that_moves_no_more():
    """It counts where the loss isn't as good any more, and the rest moves on."""
    good = np.exp(-STEPS / 60) + 0.2
    worse = np.where(STEPS < 200, good, 0.4)
    found = judged(partly_still(worse * NOISE, 180))
    assert found.symptom.kind == 'dead' and began(partly_still(worse * NOISE, 180)) == 180
    assert judged(partly_still(good * NOISE, 180)).symptom is None
    columns = partly_still(worse * NOISE, 180)
    columns['state_moved'][150:] = 1e-6  # as where a schedule ends
    assert judged(columns).symptom is None
    columns = partly_still(worse * NOISE, 0)  # frozen from the first step on
    assert judged(columns).symptom is None
    found = judged(partly_still(np.where(STEPS < 400, worse, 0.21) * NOISE, 180))
    assert found.symptom is None and any('came to its best without them' in note.why for note in found.notes)


def test_a_leap_comes_before_the_part_that_died_of_it():
    losses = (np.exp(-STEPS / 60) + 0.2) * NOISE
    losses[200:] = 0.5 * NOISE[200:]
    losses[200:230] = 9
    found = judged(partly_still(losses, 220))
    assert (found.symptom.kind, found.symptom.step) == ('spike', 200)


def test_who_was_worse_than_at_first_before_a_part_died_has_diverged():
    """As at a learning rate of 30: the loss is a million times as high from step 1 on, and gates are shut for good."""
    losses = np.r_[0.02, np.full(399, 2e4), np.full(200, 4e4)] * NOISE
    columns = partly_still(losses, 400, share=0.67)
    assert judged(columns).symptom.kind == 'diverged' and began(columns) == 1
    # What dies first is what is wrong.
    good = np.exp(-STEPS / 60) + 0.2
    columns = partly_still(np.select([STEPS < 200, STEPS < 400], [good, 0.4], 4.0) * NOISE, 180)
    assert judged(columns).symptom.kind == 'dead' and began(columns) == 180
