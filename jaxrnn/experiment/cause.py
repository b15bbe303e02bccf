"""What the outcomes of experiments say: which of them count as evidence, for which cause, and of which mechanism."""

from collections.abc import Sequence

import numpy as np

from jaxrnn.diagnosis import Cause
from jaxrnn.experiment.mechanisms import Mechanism
from jaxrnn.experiment.outcome import (
    AVERTED,
    DELAYED,
    MARGINS,
    NOT_POSSIBLE,
    OTHER_BATCHES,
    UNCHANGED,
    VERDICTS,
    WORSE,
    ExperimentReport,
    Outcome,
)


def ranked(outcomes: Sequence[Outcome], *, by_batch: bool | None = None) -> list[Outcome]:
    """Outcomes, the best advice first: what averts the symptom; of that what is evidence of the cause, or, where a
    batch is bad, what averts it on that batch itself before what keeps away from it; then what tolerates longer steps;
    what goes on making steps shorter, as a landscape sharpens on (from the start, ε = 1e-4, of the largest margin,
    broke the demo at step 4,144; benchmarks/README.md); what takes away the mechanism that broke the run; then by the
    loss at the end.

    Args:
        outcomes: of experiments.
        by_batch: as in `cause_of`.
    """
    by_batch = still_by_batch(outcomes, by_batch)
    evidence = evidence_of(outcomes, by_batch)
    mechanism = mechanism_of(outcomes, evidence)

    def rank(outcome: Outcome) -> tuple:
        loss = outcome.loss if np.isfinite(outcome.loss) else np.inf
        takes_away = mechanism is not None and outcome.change.removes == mechanism
        return (
            VERDICTS.index(outcome.verdict),
            _advice(outcome, evidence, by_batch),
            -_tolerated(outcome, takes_away=takes_away),
            not outcome.change.decays,
            not takes_away,
            loss,
        )

    return sorted(outcomes, key=rank)


ONLY_SHORTER = 3 / 8
"""Share of its margin at which what only makes steps shorter counts: its largest lies between 1 and 2 of all else. From
the start an eighth of the rate puts a collapse off to three times the steps, as what tolerates twice the rate does, and
no further (benchmarks/README.md, benchmarks/study)."""


def _tolerated(outcome: Outcome, *, takes_away: bool) -> float:
    """The margin of an outcome as it counts: times that steps may be longer, and the symptom still be averted."""
    change, margin = outcome.change, outcome.margin or MARGINS[0]
    if takes_away and change.stressed is None:
        return MARGINS[-1]  # what takes the mechanism away for good has no edge to keep away from
    only_shorter = change.shortens > 1 and not (takes_away or change.decays)
    return margin * ONLY_SHORTER if only_shorter else margin


def _advice(outcome: Outcome, evidence: Sequence[Outcome], by_batch: bool | None) -> int:
    """How good an advice it is, by what kind of change it is; the lower the better."""
    change = outcome.change
    if change.name == OTHER_BATCHES or change.unjudged:
        return 9
    if not by_batch:
        # What somebody can switch on comes before what only shows that shorter steps help.
        shows_only = change.shortens and not change.flags
        return (1 if shows_only else 0) if outcome in evidence else 2
    # What generalises: the next batch like it will come.
    if change.avoids:
        return 2
    if change.shortens:
        return 3
    return 0 if outcome in evidence else 1


def cause_of(report: ExperimentReport, *, by_batch: bool | None = None) -> Cause:
    """The cause that the pattern of outcomes names; of kind 'none' where it is undecided.

    Args:
        report: of `explain.run`.
        by_batch: whether the symptom is the batch's doing rather than the state's, if that is known: what isn't
            finite was born in the data, or an ordinary state, too, fares badly on the batch.
    """
    undecided = _why_undecided(report)
    if undecided:
        kind = 'none' if report.control is None or report.identical else 'nondeterminism'
        return Cause(kind, undecided)
    by_batch = still_by_batch(report.outcomes, by_batch, report.nudge)
    outcomes = ranked(report.outcomes, by_batch=by_batch)
    averting = [outcome for outcome in outcomes if outcome.verdict == AVERTED]
    failed = [o.change.name for o in outcomes if o.verdict not in (AVERTED, NOT_POSSIBLE)]
    fails = f'; not so {_listed(failed)}' if failed else ''
    evidence = evidence_of(outcomes, by_batch)
    if not evidence:
        only = _listed([outcome.change.name for outcome in averting])
        return Cause('none', f'undecided: {only} averts it, but {NO_EVIDENCE[by_batch]}{fails}')
    mechanism = mechanism_of(outcomes, evidence)
    best, *others = averting
    kind = next(
        (o.change.points_to for o in evidence if mechanism is not None and o.change.removes == mechanism),
        evidence[0].change.points_to,
    )
    also = f'; so does {_listed([outcome.change.name for outcome in others])}' if others else ''
    named = _held_up(report) if mechanism is None else f'{_named(mechanism)}: '
    if evidence[0].change.unjudged:
        named = f'{evidence[0].change.means}: '
    return Cause(kind, f'{named}{best.change.name} averts it{also}{fails}')


HELD_UP = 10
"""Times that a loss falls farther than its steps were shortened. What chance in the batches adds to a loss that stands
still is, to first order, in proportion to the length of the steps; ten times that is ours."""


def _held_up(report: ExperimentReport) -> str:
    """That a loss that had stood still for long fell at once when steps were shortened, and by far more than they were:
    it was their length that held it up, long before anything showed. '' where that isn't so."""
    if report.stood is None:
        return ''
    fell = [
        (report.stood.loss / outcome.loss, outcome)
        for outcome in report.outcomes
        if outcome.verdict == AVERTED and outcome.change.shortens > 1 and outcome.loss > 0
    ]
    fell = [(times, outcome) for times, outcome in fell if times >= HELD_UP * outcome.change.shortens]
    if not fell:
        return ''
    _, outcome = max(fell, key=lambda each: each[0] / each[1].change.shortens)
    return (
        f'steps too long (for {report.stood.steps:,} steps the loss had stood at {report.stood.loss:.1e}; under '
        f'{outcome.change.name} it falls to {outcome.loss:.1e}): '
    )


NO_EVIDENCE = {
    False: 'an earlier state does no worse on that batch than on others',
    None: 'that says nothing of the cause',
    True: 'that says nothing of the batch, which stands out',
}


def evidence_of(outcomes: Sequence[Outcome], by_batch: bool | None) -> list[Outcome]:
    """Averting outcomes that may name the cause."""
    by_batch = still_by_batch(outcomes, by_batch)
    averting = [outcome for outcome in outcomes if outcome.verdict == AVERTED]
    of_data = [outcome for outcome in averting if outcome.change.points_to == 'data']
    of_step = [outcome for outcome in averting if outcome.change.unjudged]
    averting = [outcome for outcome in averting if outcome not in of_step]
    of_batch = by_batch or any(outcome.change.avoids for outcome in of_data)
    if of_step and not of_batch and (not averting or any(o.change.decides for o in of_step)):
        return of_step  # not its batch, and nothing else that it computes: the step did it
    if by_batch is False:
        # From a state at the edge any other batch averts a spike, too.
        others = [outcome for outcome in averting if outcome not in of_data]
        # That steps of any length below, and any other batch, avert it says nothing of either.
        both = bool(of_data) and all(o.change.shortens and not o.change.flags for o in others)
        return [] if both else others
    if not by_batch:
        return averting
    # Where the batch leaves nothing finite, code that bears it says more than that the batch can be left out.
    mended = [o for o in averting if o.change.points_to == 'model' and o.change.removes is None]
    return (mended if _nonfinite(outcomes) else []) or of_data


def still_by_batch(
    outcomes: Sequence[Outcome], by_batch: bool | None, nudge: Outcome | None = None
) -> bool | None:
    """A batch that stands out, but without which the symptom comes all the same, and no later, is not the cause; that
    others avert it says nothing where a nudge puts it off, too, for all the time that is replayed."""
    avoiding = [outcome for outcome in outcomes if outcome.change.avoids and outcome.verdict != NOT_POSSIBLE]
    by_chance = nudge is not None and nudge.verdict in (AVERTED, DELAYED) and nudge.symptom is None
    asked = [outcome for outcome in avoiding if not (by_chance and outcome.change.name == OTHER_BATCHES)]
    innocent = len(avoiding) > 1 and bool(asked) and all(o.verdict in (UNCHANGED, WORSE) for o in asked)
    return False if by_batch and innocent else by_batch


def _nonfinite(outcomes: Sequence[Outcome]) -> bool:
    """Whether what isn't averted ends in numbers that aren't finite."""
    shown = [outcome.symptom.kind for outcome in outcomes if outcome.symptom is not None]
    return bool(shown) and all(kind == 'nonfinite' for kind in shown)


def mechanism_of(outcomes: Sequence[Outcome], evidence: Sequence[Outcome]) -> Mechanism | None:
    """The narrowest mechanism that a change in evidence takes away, and that no change takes away without averting the
    symptom; None where there is none, or where it is a wide one and a change that takes away none averts it, too."""
    refuted = {o.change.removes for o in outcomes if o.verdict != AVERTED and o.acted}
    narrow_only = any(o.change.removes is None for o in evidence)
    left = [
        mechanism
        for mechanism in dict.fromkeys(o.change.removes for o in evidence)
        if mechanism is not None and mechanism not in refuted and not (narrow_only and mechanism.wide)
    ]
    return min(left, key=lambda mechanism: mechanism.breadth, default=None)


def _named(mechanism: Mechanism) -> str:
    return f'{mechanism.name} ({mechanism.means})' if mechanism.means else mechanism.name


def _why_undecided(report: ExperimentReport) -> str:
    if report.window is None or report.control is None:
        return 'undecided: no checkpoint before the symptom, so nothing can be tried'
    if not report.identical:
        return 'not reproducible: the steps before the symptom came out otherwise than they were recorded'
    if report.control.verdict != UNCHANGED:
        return 'undecided: the same steps did not show the symptom again'
    if report.nudge is not None and report.nudge.verdict == AVERTED:
        return 'undecided: the symptom depends on chance; a state moved by a millionth averts it, too'
    if not report.outcomes:
        return 'undecided: the budget of steps allowed no experiment'
    if all(outcome.verdict != AVERTED for outcome in report.outcomes):
        tried = [o.change.name for o in report.outcomes if o.verdict != NOT_POSSIBLE]
        return f'undecided: nothing tried averts it: {_listed(tried)}'
    return ''


def _listed(names: Sequence[str]) -> str:
    return ', '.join(names)
