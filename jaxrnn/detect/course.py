"""What became of a run after a rule held: whether it came back, after how many steps; and when it began.

A rule says that something showed. Whether the run suffers from it is seen afterwards: what passed within some steps, in
a run that went on to its best, is a note. A symptom is what a run did not come back from, or came back from at a cost.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from jaxrnn.detect import rule_language
from jaxrnn.detect.detectors import WHEN, Detector
from jaxrnn.diagnosis import Symptom
from jaxrnn.types import Series

SHORT = 4
"""Steps within which a leap of the loss is gone that one batch made, and not the state: it touched nothing that an
optimiser remembers for longer."""

SMALL, SLIGHT = 20, 0.01
"""A leap that is gone at once is no more than a note if it is smaller than so many times the level, or to a loss of
less than this share of the first: an optimiser forgets it. A larger one is a batch that ought to be looked at."""

ORDINARY = 6
"""Standard deviations of what batches scatter within which a leap that is gone at once is no more than a note, too."""

OFTEN, OFTEN_SHARE = 5, 0.01
"""Leaps that are each gone at once, but of so many, and in so large a share of the steps, that they are a symptom."""

BACK = 1.5
"""Times the level before it at which a loss is back; or two standard deviations of what batches scatter."""

SMOOTHED = 8
"""Losses of which the median is taken: a median of eight is blind to three outliers in a row."""

AS_GOOD = 1.1
"""Times its best that a loss is still at its best: what batches scatter of a mean of 16."""

MOST_STILL, CONVERGED = 0.4, 1e-3
"""Share of a run in which nothing may move at its end, as a schedule ends; and the share of the first loss below which
there is nothing more to learn."""

FLOOR = 1e-6
"""Share of the first loss at which steps are shorter than the rounding of what they move, and losses are rounding."""

LEAPT = 5
"""Times all losses before it, by which a divergence has begun."""

DEPARTED = 1.5
"""Times its best that a loss has left it; or three standard deviations of what batches scatter."""

FARTHEST = 2000
"""Steps before a symptom within which it is taken to have begun."""


class Event(NamedTuple):
    """One time that a rule held."""

    kind: str
    step: int  # at which it was recognised
    back: int | None  # the step by which it was over; None where that never came
    harmless: bool
    why: str  # what became of it


class Judgement(NamedTuple):
    """What a run suffers from, and what it got over."""

    symptom: Symptom | None
    event: Event | None  # the symptom's
    notes: tuple[Event, ...]


def judged(
    columns: Series,
    detectors: Sequence[Detector],
    loss: str | None = 'loss',
    *,
    good: int | None = None,
    bad: int | None = None,
) -> Judgement:
    """The gravest symptom of a run, and what passed.

    Args:
        columns: of the run.
        detectors: bound to it (`detectors.bound`), gravest first.
        loss: what it calls its loss; None where that isn't known.
        good, bad: the symptom is looked for after the one, and up to the other.
    """
    if not columns or not columns[rule_language.STEP].size:
        return Judgement(None, None, ())
    losses = columns.get(loss) if loss else None
    found, notes = [], []
    for detector in detectors:
        events = _events(detector, columns, losses, good, bad)
        harmful = [event for event in events if not event.harmless]
        notes += [event for event in events if event.harmless]
        found += harmful[:1]
    # A leap that is the beginning of it comes before what is seen of it later: they are one.
    ordered = sorted(found, key=lambda event: _rank(event, found, detectors, columns))
    event = ordered[0] if ordered else None
    symptom = None if event is None else Symptom(event.kind, event.step)
    return Judgement(symptom, event, tuple(sorted(notes, key=lambda note: note.step)))


def _rank(event: Event, found: Sequence[Event], detectors: Sequence[Detector], columns: Series) -> tuple:
    kinds = [detector.kind for detector in detectors]
    if event.kind == 'spike' and any(other.kind == 'diverged' for other in found):
        other = next(other for other in found if other.kind == 'diverged')
        own = next(detector for detector in detectors if detector.kind == 'diverged')
        if lasted_since(own, columns, other.step) + SHORT < event.step:
            return kinds.index('diverged') + 0.5, event.step
    if event.kind in ('spike', 'diverged') and any(
        _is_partial(other, columns) and event.step <= other.step for other in found
    ):
        return kinds.index('dead') - 0.5, event.step
    return kinds.index(event.kind), event.step


def _is_partial(event: Event, columns: Series) -> bool:
    """Whether it is that a part of the state moves no more."""
    steps = columns[rule_language.STEP]
    return event.kind == 'dead' and not _wholly_still(columns)[steps == event.step].any()


def _events(
    detector: Detector, columns: Series, losses: np.ndarray | None, good: int | None, bad: int | None
) -> list[Event]:
    """The times that a rule held, each up to where it was over."""
    steps = columns[rule_language.STEP]
    held = rule_language.holds(detector.rule, columns)
    low, high = -1 if good is None else good, np.inf if bad is None else bad
    places = np.flatnonzero(held & (steps > low) & (steps <= high))
    end_of = _ENDS.get(detector.kind, _never)
    found: list[Event] = []
    after = -1
    for place in places:
        if place < after:
            continue
        event, after = end_of(detector, columns, losses, held, int(place))
        found.append(event)
        if not event.harmless:
            break
    passed = all(event.harmless for event in found)
    if detector.kind == 'spike' and passed and len(found) >= max(OFTEN, OFTEN_SHARE * steps.size):
        why = f'{len(found)} leaps, each gone within {SHORT} steps'
        found = [found[0]._replace(harmless=False, why=why), *found[1:]]
    return found


def _never(
    detector: Detector, columns: Series, losses: np.ndarray | None, held: np.ndarray, place: int
) -> tuple[Event, int]:
    step = int(columns[rule_language.STEP][place])
    return Event(detector.kind, step, None, False, ''), held.size


def _after_skips(
    detector: Detector, columns: Series, losses: np.ndarray | None, held: np.ndarray, place: int
) -> tuple[Event, int]:
    """What isn't finite and left the state finite was skipped: by a guard, or because the loss alone was touched."""
    steps = columns[rule_language.STEP]
    good = np.flatnonzero(~held[place:])
    end = place + int(good[0]) if good.size else held.size
    state = columns.get('finite_state', np.zeros(held.size))[place:end]
    harmless = bool(good.size) and bool((state == 1).all()) and end - place <= rule_language.MOST_SKIPPED
    back = int(steps[end]) if good.size else None
    why = f'not finite for {_many(end - place)}, skipped: the state stayed finite' if harmless else ''
    return Event(detector.kind, int(steps[place]), back, harmless, why), end


def _after_leap(
    detector: Detector, columns: Series, losses: np.ndarray | None, held: np.ndarray, place: int
) -> tuple[Event, int]:
    """A leap of the loss is over when it is back at its level before."""
    steps = columns[rule_language.STEP]
    step = int(steps[place])
    if losses is None:
        return Event(detector.kind, step, None, False, ''), held.size
    limit, (level, scatter) = still_as_good(losses[:place]), _level(losses[:place])
    after = losses[place:]
    end = _settled(after, np.inf if limit is None else limit)
    risen = float(after[0])
    leapt = np.isfinite(level) and risen > 0
    times = (
        f'{np.exp(min(np.log(risen) - level, 80.0)):.3g} times its level before' if leapt else f'{risen:.3g}'
    )
    if end is None:
        return Event(detector.kind, step, None, False, f'{times}, and did not come back'), held.size
    following = np.flatnonzero(held[place + max(end, 1) :])  # what comes of that is another matter
    until = place + max(end, 1) + int(following[0]) if following.size else held.size
    left = losses[place + end : until]
    went_on = left.size < 2 * rule_language.LEAST_HISTORY or _as_good(
        _best(left), _best(losses[:place]), scatter
    )
    ordinary = max(np.log(SMALL), ORDINARY * scatter) + level  # of its logarithm
    slight = (leapt and np.log(risen) < ordinary) or abs(risen) < SLIGHT * abs(_first_of(losses))
    harmless = end <= SHORT and went_on and slight
    why = f'{times}, back after {_many(max(end, 1))}' + ('' if went_on else ', and never as good again')
    return Event(detector.kind, step, int(steps[place + end]), harmless, why), place + max(end, 1)


def _after_climb(
    detector: Detector, columns: Series, losses: np.ndarray | None, held: np.ndarray, place: int
) -> tuple[Event, int]:
    """Who is better than at first, later, was not lost."""
    steps = columns[rule_language.STEP]
    step = int(steps[place])
    holds = np.flatnonzero(held[place:])
    last = place + int(holds[-1])
    assert losses is not None
    worst_end = last + rule_language.LEAST_HISTORY >= held.size
    improved = _as_good(_best(losses[last:]), _best(losses[:place]), _level(losses[:place])[1])
    harmless = not worst_end and improved
    back = None if worst_end else int(steps[min(last + 1, held.size - 1)])
    why = f'worse than at first for {_many(last - place + 1)}, then better' if harmless else ''
    return Event(detector.kind, step, back, harmless, why), last + 1


def _after_stillness(
    detector: Detector, columns: Series, losses: np.ndarray | None, held: np.ndarray, place: int
) -> tuple[Event, int]:
    """Nothing moves: harmless where the loss is as good as it ever was, as at the end of a schedule or at its floor."""
    steps = columns[rule_language.STEP]
    moves = np.flatnonzero(~held[place:])
    end = place + int(moves[0]) if moves.size else held.size
    step = int(steps[place])
    if losses is None:
        return Event(detector.kind, step, None, True, 'nothing moved; there is no loss to judge it by'), end
    if not _wholly_still(columns)[place]:
        return _after_partial_stillness(detector, columns, losses, end, place)
    still = losses[max(place - rule_language.LEAST_HISTORY, 0) : end]
    best, now = _best(losses[: max(place - rule_language.LEAST_HISTORY, 1)]), _middle(still)
    first = losses[np.isfinite(losses)][:1]
    learnt = first.size and best < 0.9 * first[0]
    converged = first.size and now < CONVERGED * first[0]
    at_best = bool(learnt) and _as_good(now, best) and (converged or end - place < MOST_STILL * held.size)
    at_floor = first.size and 0 <= now < FLOOR * first[0]
    harmless = at_best or bool(at_floor) or bool(moves.size)
    why = f'nothing moved for {_many(end - place)}' if harmless else ''
    return Event(detector.kind, step, int(steps[end]) if moves.size else None, harmless, why), end


def _after_partial_stillness(
    detector: Detector, columns: Series, losses: np.ndarray, end: int, place: int
) -> tuple[Event, int]:
    """A part of the state doesn't move: harmless where the loss comes to its best again without it."""
    steps = columns[rule_language.STEP]
    good = _as_good(_best(losses[place:]), _best(losses[:place]), _level(losses[:place])[1])
    back = int(steps[end]) if good and end < steps.size else None
    share = columns['state_still'][place]
    why = f'{share:.0%} of the tensors moved no more' + (
        '; the loss came to its best without them' if good else ''
    )
    return Event(detector.kind, int(steps[place]), back, good, why), end if good else steps.size


_ENDS = {
    'nonfinite': _after_skips,
    'spike': _after_leap,
    'diverged': _after_climb,
    'dead': _after_stillness,
}
"""How it is seen that a symptom of a kind is over; the others have no end but the run's."""


def lasted_since(detector: Detector, columns: Series, step: int) -> int:
    """The step from which on the state that a detector waits for lasted until a step; the step itself for one that
    doesn't wait, and without records of it. What breaks it for SHORT steps doesn't end it."""
    lasting = detector.lasting
    if lasting is None or not columns or not lasting.fields <= columns.keys():
        return step
    until = columns[rule_language.STEP] <= step
    steps, held = columns[rule_language.STEP][until], rule_language.holds(lasting, columns)[until]
    places = np.flatnonzero(held)
    if not places.size:
        return step
    breaks = np.flatnonzero(np.diff(places) - 1 > SHORT)
    return int(steps[places[breaks[-1] + 1] if breaks.size else places[0]])


def began(detector: Detector, columns: Series, symptom: Symptom, loss: str | None = 'loss') -> int:
    """When a symptom began: when the state set in that its rule waited for, or when the loss left its best, if it did
    before the rule held."""
    since = lasted_since(detector, columns, symptom.step)
    if symptom.kind == 'dead' and columns:
        return _still_since(columns, symptom.step)
    if symptom.kind == 'diverged' and columns and loss and loss in columns:
        return _leapt_at(columns[rule_language.STEP], columns[loss], since, symptom.step)
    if detector.lasting is not None or symptom.kind == WHEN or not columns or not loss or loss not in columns:
        return since
    return min(since, _left_its_best(columns[rule_language.STEP], columns[loss], symptom.step))


def _leapt_at(steps: np.ndarray, losses: np.ndarray, since: int, step: int) -> int:
    """The first step of a stretch at which the loss leapt far above all before; its beginning where it didn't."""
    highest = np.fmax.accumulate(np.where(np.isfinite(losses), losses, 0))
    leaps = (
        np.flatnonzero((losses[1:] > LEAPT * highest[:-1]) & (steps[1:] >= since) & (steps[1:] <= step)) + 1
    )
    return int(steps[leaps[0]]) if leaps.size else since


def still_as_good(losses: np.ndarray) -> float | None:
    """The highest loss that is as good as the last of these, as where a run has come back; None without any."""
    level, scatter = _level(losses)
    if np.isfinite(level):
        return float(np.exp(level + max(np.log(BACK), 2 * scatter)))
    finite = losses[np.isfinite(losses)][-16:]
    if not finite.size:
        return None
    middle = float(np.median(finite))
    return middle + max((BACK - 1) * abs(middle), 3 * float(np.std(finite)))


def _still_since(columns: Series, step: int) -> int:
    """The first step of the stretch up to a step in which nothing moves, or the same part of the state doesn't."""
    steps = columns[rule_language.STEP]
    until = steps <= step
    still = _wholly_still(columns)
    if not still[until][-1]:
        still = columns.get('state_still', np.zeros(steps.size)) > 0
    moved = np.flatnonzero(~still[until])
    place = int(moved[-1]) + 1 if moved.size else 0
    return int(steps[until][min(place, int(until.sum()) - 1)])


def _wholly_still(columns: Series) -> np.ndarray:
    """The steps in which nothing moves, or no gradient comes to any tensor."""
    size = columns[rule_language.STEP].size
    no_gradient = columns.get('moments_fading', np.zeros(size)) == 1
    return np.logical_or(columns.get('state_moved', np.ones(size)) == 0, no_gradient)


def _left_its_best(steps: np.ndarray, losses: np.ndarray, step: int) -> int:
    """The first step of the stretch, up to a symptom, in which the loss is above its best so far."""
    near = (steps <= step) & (steps >= step - FARTHEST)
    steps, logs = steps[near], _logs(losses[near])
    if not (np.isfinite(logs).sum() > 2 * SMOOTHED):
        return step
    middles = rule_language.over_window(logs, SMOOTHED, rule_language.median, ends_with_step=True)
    best = np.fmin.accumulate(middles)
    scatter = _scatter_of(logs[:-1])
    limit = best + max(np.log(DEPARTED), 3 * scatter)
    ordinary = np.flatnonzero(~(middles > limit))
    place = int(ordinary[-1]) + 1 if ordinary.size else 0
    if place >= steps.size:
        return step
    level = limit[place]
    while place > 0 and logs[place - 1] > level:  # a median of eight is four steps late
        place -= 1
    return min(int(steps[place]), step)


def _logs(losses: np.ndarray) -> np.ndarray:
    with np.errstate(all='ignore'):
        logs = np.log(losses)
    return np.where(np.isnan(losses), np.nan, logs)


def _level(losses: np.ndarray) -> tuple[float, float]:
    """The logarithm of the level of the last losses, and what they scatter about their trend."""
    logs = _logs(losses)[-64:]
    logs = logs[np.isfinite(logs)]
    if not logs.size or (losses[-64:] < 0).any():
        return np.inf, 0.0
    return float(np.median(logs[-16:])), _scatter_of(logs)


def _scatter_of(logs: np.ndarray) -> float:
    """Standard deviation of neighbours' differences, by their median, over √2: a trend is hardly in them."""
    differences = np.diff(logs[np.isfinite(logs)])
    if differences.size < SMOOTHED:
        return 0.0
    return float(rule_language.GAUSSIAN_MAD * np.median(np.abs(differences)) / np.sqrt(2))


def _settled(losses: np.ndarray, limit: float) -> int | None:
    """The place from which on the median of SMOOTHED losses is at a limit or below."""
    for place in np.flatnonzero(losses <= limit):
        if np.nanmedian(losses[place : place + SMOOTHED]) <= limit:
            return int(place)
    return None


def _best(losses: np.ndarray) -> float:
    """The lowest mean of 16 losses; their mean where there are fewer."""
    finite = losses[np.isfinite(losses)]
    if not finite.size:
        return float('inf')
    n = min(16, finite.size)
    return float(np.min(np.convolve(finite, np.full(n, 1 / n), 'valid')))


def _as_good(loss: float, best: float, scatter: float = 0.0) -> bool:
    """scatter: of the logarithms of single losses; the lowest mean of 16 is off by half of it."""
    return bool(loss <= best + max(AS_GOOD - 1, np.expm1(min(scatter, 2.0) / 2)) * abs(best))


def _first_of(losses: np.ndarray) -> float:
    finite = losses[np.isfinite(losses)]
    return float(finite[0]) if finite.size else 0.0


def _middle(losses: np.ndarray) -> float:
    finite = losses[np.isfinite(losses)]
    return float(np.median(finite)) if finite.size else float('inf')


def _many(steps: int) -> str:
    return '1 step' if steps == 1 else f'{steps:,} steps'
