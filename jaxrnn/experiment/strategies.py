"""What to try next. Each strategy is a function of `Experiments`, which replays, and of what is known so far.

A new one, as several changes at once or a search for a number, is a function here and its place in `explain.run`.
"""

import itertools
from collections.abc import Callable, Sequence

import numpy as np

from jaxrnn.detect import rule_language
from jaxrnn.experiment.cause import evidence_of, mechanism_of, ranked
from jaxrnn.experiment.engine import Experiments
from jaxrnn.experiment.outcome import (
    AVERTED,
    MARGINS,
    NOT_POSSIBLE,
    OTHER_BATCHES,
    Beginning,
    Change,
    Outcome,
)
from jaxrnn.experiment.verdict import LEAST_OTHERS, NONFINITE, SETTLED, final_loss, outstanding, stands_out

FARTHER = 400
"""Steps after a symptom through which the best is replayed on, as far as the budget reaches."""

Tried = list[tuple[Change, Outcome | None]]
"""Changes with their outcomes; None where the budget did not reach."""

Combine = Callable[[Change], Change | None]
"""A change -> it and another as one; None where there is no such."""


def in_turn(experiments: Experiments, changes: Sequence[Change]) -> Tried:
    """Each change in the order given; while one is replayed, the next is compiled."""
    following = [changes[place + 1 : place + 2] for place in range(len(changes))]
    return [
        (change, experiments.outcome_of(change, ahead=ahead))
        for change, ahead in zip(changes, following, strict=True)
    ]


def confirm(experiments: Experiments, tried: Tried, by_batch: bool | None) -> Tried:
    """Tries what the budget did not reach and would take away the very mechanism that is named so far, until one of
    these refutes it, or all have averted the symptom: what one change says of a mechanism may be chance."""
    tried = list(tried)
    while True:
        outcomes = [outcome for _, outcome in tried if outcome is not None]
        named = mechanism_of(outcomes, evidence_of(outcomes, by_batch))
        place = next(
            (n for n, (change, o) in enumerate(tried) if o is None and named and change.removes == named),
            None,
        )
        outcome = None if place is None else experiments.outcome_of(tried[place][0])
        if place is None or outcome is None:
            return tried
        tried[place] = (tried[place][0], outcome)


def with_margins(
    experiments: Experiments, outcomes: Sequence[Outcome], by_batch: bool | None, combine: Combine
) -> list[Outcome]:
    """Outcomes with their margins, measured one after the other from the strongest evidence on, until one has the
    largest; and the outcomes of what they were combined into."""
    evidence = evidence_of(outcomes, by_batch)
    found = ranked(outcomes, by_batch=by_batch)
    for place, outcome in enumerate(tuple(found)):
        if experiments.window.lasting or outcome not in evidence:
            break
        if outcome.change.stressed is None:
            if outcome.change.removes:  # for good
                break
            continue
        found[place] = outcome = margin_of(experiments, outcome)
        more = combine(outcome.change) if (outcome.margin or 0) > MARGINS[0] else None
        combined = None if more is None else experiments.outcome_of(more)
        if combined is not None:
            found.append(margin_of(experiments, combined) if combined.verdict == AVERTED else combined)
        if max(o.margin or 0 for o in found) == MARGINS[-1]:
            break
    return found


def margin_of(experiments: Experiments, outcome: Outcome) -> Outcome:
    """An averting outcome with the largest of MARGINS by which steps may be longer. Its margin is None where the
    budget doesn't reach the first of them."""
    assert outcome.change.stressed is not None
    for margin, times in itertools.pairwise(MARGINS):
        change = outcome.change.stressed(times)
        under = None if change is None else experiments.outcome_of(change)
        if change is not None and under is None:
            return outcome._replace(margin=margin if margin > MARGINS[0] else None)
        if under is None or under.verdict != AVERTED:
            return outcome._replace(margin=margin)
    return outcome._replace(margin=MARGINS[-1])


def prove_best(experiments: Experiments, outcomes: Sequence[Outcome], by_batch: bool | None) -> list[Outcome]:
    """Outcomes in their order, of which the first still averts the symptom when it is replayed on, and has its point
    of no return."""
    window, found = experiments.window, ranked(outcomes, by_batch=by_batch)
    for _ in range(len(found)):
        best = found[0]
        # Shorter steps take as many more to go as far.
        farther = FARTHER * (1 if best.change.decays else max(round(best.change.shortens), 1))
        horizon = min(window.symptom + farther, window.start + experiments.budget.free - 2 * window.length)
        if best.verdict != AVERTED or best.change.name == OTHER_BATCHES:
            break
        if best.change.initial:
            found[0] = best._replace(point_of_no_return=0)
            break
        if horizon > best.reached:
            again = experiments.attempt(best.change, horizon=horizon)
            assert again is not None
            if again.verdict != AVERTED:
                found = ranked([again, *found[1:]], by_batch=by_batch)
                continue
            best = again._replace(margin=best.margin, loss=best.loss)  # over equal horizons
        found[0] = best._replace(point_of_no_return=point_of_no_return(experiments, best.change))
        break
    return found


def point_of_no_return(experiments: Experiments, change: Change) -> int:
    """The last step at which a change, switched on, still averts the symptom: by bisection, as far as the budget
    reaches; what averts it from one step on is taken to do so from every earlier one."""
    window = experiments.window
    averts, fails = window.start, window.symptom + 1
    while fails - averts > 1:
        middle = (averts + fails) // 2
        later = middle - window.start if window.lasting else 0
        outcome = experiments.attempt(change, start=middle, horizon=window.horizon + later)
        if outcome is None:
            break
        averts, fails = (middle, fails) if outcome.verdict == AVERTED else (averts, middle)
    return averts


EARLY = 1000
"""Steps of a run's beginning through which the best is replayed, at most."""

EARLY_SHARE = 0.25
"""Of the budget that this may take, at most."""


def early_steps(experiments: Experiments) -> int:
    """How many steps of the run's beginning the best is to be replayed through; 0 where that says nothing: where the
    steps before the symptom are that beginning, or no loss is recorded."""
    first = experiments.subject.checkpoints.steps()[0]
    steps = min(experiments.window.start - first, EARLY, int(EARLY_SHARE * experiments.budget.steps))
    known = experiments.subject.loss is not None and len(
        experiments.subject.recorded.between(first, first + steps)
    )
    return steps if known and steps >= 2 * SETTLED else 0


def from_start(experiments: Experiments, best: Outcome, steps: int) -> Beginning | None:
    """How far training comes under the best on from the run's first step: what averts a symptom late may keep a
    network from learning, or only hold it up. None where that isn't known.

    Args:
        experiments: on the symptom.
        best: an outcome.
        steps: of `early_steps`.
    """
    change, subject = best.change, experiments.subject
    if not steps or best.verdict != AVERTED or change.initial or change.avoids or change.unjudged:
        return None
    first = subject.checkpoints.steps()[0]
    outcome = experiments.attempt(change, start=first, horizon=first + steps)
    if outcome is None or outcome.verdict == NOT_POSSIBLE:
        return None
    own = final_loss(list(subject.recorded.between(first, outcome.reached)), subject.loss)
    return Beginning(outcome.reached, outcome.loss, own, outcome.symptom)


def bad_batches(experiments: Experiments, most: int = 4) -> tuple[int, ...]:
    """Steps in the window on whose batch an ordinary state does badly beside what it does on others: among the
    symptom's own and those whose loss or gradient is farthest above the others. One state on many batches is measured,
    the last before the symptom began, so that it is as good at the run's first step as anywhere."""
    window, subject = experiments.window, experiments.subject
    start, symptom = window.start, experiments.judge.symptom.step
    inside = list(subject.recorded.between(start, symptom + 1))
    found = outstanding(inside, subject.loss) if inside else []
    steps = list(dict.fromkeys([symptom, *found]))[:most]
    every = max((symptom - start) // COMPARED, 1)
    count = min(COMPARED, max(LEAST_OTHERS, experiments.budget.left // PROBED))
    near = [step for step in range(symptom, max(start - every, -1), -every) if step not in steps][:count]
    beyond = [symptom + n for n in range(1, count - len(near) + 1)]
    others = [row for row in map(experiments.on_batch, [*near, *beyond]) if row is not None]
    rows = {step: experiments.on_batch(step) for step in steps}
    return tuple(
        sorted(
            step for step, row in rows.items() if row is not None and stands_out(row, others, subject.loss)
        )
    )


def batches_changed(experiments: Experiments) -> bool:
    """Whether the batches from when the symptom began on are others than those before: an ordinary state does worse on
    nearly all of them, by four standard deviations of those, as where labels are shuffled from a step on."""
    window, loss, began = experiments.window, experiments.subject.loss, experiments.began
    before = _spread_over(range(window.start, began))
    after = _spread_over(range(began, window.horizon))
    nonfinite = experiments.judge.symptom.kind == NONFINITE  # which one batch makes, or none
    if nonfinite or loss is None or min(len(before), len(after)) < COMPARED // 2:
        return False
    ours, theirs = (
        np.array([row[loss] for row in map(experiments.on_batch, steps) if row is not None and loss in row])
        for steps in (after, before)
    )
    if not (ours.size and theirs.size and np.isfinite(theirs).all()):
        return False
    middle = np.median(theirs)
    scattered = rule_language.GAUSSIAN_MAD * np.median(np.abs(theirs - middle))
    worse = ~(ours <= middle + 4 * scattered)  # what isn't finite is worse
    return bool(scattered > 0 and np.mean(worse) >= NEARLY_ALL)


def _spread_over(steps: range) -> list[int]:
    """Up to COMPARED of them, evenly."""
    if len(steps) <= COMPARED:
        return list(steps)
    return [steps[n * len(steps) // COMPARED] for n in range(COMPARED)]


NEARLY_ALL = 0.75
"""Share of the later batches; when it began is known to some steps only."""

PROBED = 20
"""A small budget is not spent on batches alone: of so many steps one may be."""

COMPARED = 12
"""Other batches that one state is tried on."""
