"""What the outcomes of experiments say: which of them count as evidence, for which cause, and of which mechanism."""

from collections.abc import Sequence

import numpy as np

from jaxrnn.diagnosis import Cause
from jaxrnn.experiment.mechanisms import Mechanism
from jaxrnn.experiment.outcome import AVERTED, MARGINS, UNCHANGED, VERDICTS, ExperimentReport, Outcome


def ranked(outcomes: Sequence[Outcome], *, by_batch: bool | None = None) -> list[Outcome]:
    """Outcomes, the strongest evidence first: what averts the symptom; of that what tolerates longer steps; then what
    takes away the mechanism that broke the run; then by the loss at the end.

    Args:
        outcomes: of experiments.
        by_batch: as in `cause_of`.
    """
    evidence = evidence_of(outcomes, by_batch)
    mechanism = mechanism_of(outcomes, evidence)

    def rank(outcome: Outcome) -> tuple[int, bool, int, bool, float]:
        loss = outcome.loss if np.isfinite(outcome.loss) else np.inf
        takes_away = mechanism is not None and outcome.change.removes == mechanism
        # What takes the mechanism away for good has no edge to keep away from.
        margin = (
            MARGINS[-1] if takes_away and outcome.change.stressed is None else outcome.margin or MARGINS[0]
        )
        return VERDICTS.index(outcome.verdict), outcome not in evidence, -margin, not takes_away, loss

    return sorted(outcomes, key=rank)


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
    outcomes = ranked(report.outcomes, by_batch=by_batch)
    averting = [outcome for outcome in outcomes if outcome.verdict == AVERTED]
    failed = [outcome.change.name for outcome in outcomes if outcome.verdict != AVERTED]
    fails = f'; not so {_listed(failed)}' if failed else ''
    evidence = evidence_of(outcomes, by_batch)
    if not evidence:
        only = _listed([outcome.change.name for outcome in averting])
        return Cause('none', f'undecided: {only} averts it, but an earlier state bears the batch{fails}')
    mechanism = mechanism_of(outcomes, evidence)
    best, *others = averting
    kind = next(
        (o.change.points_to for o in evidence if mechanism is not None and o.change.removes == mechanism),
        best.change.points_to,
    )
    also = f'; so does {_listed([outcome.change.name for outcome in others])}' if others else ''
    named = '' if mechanism is None else f'{_named(mechanism)}: '
    return Cause(kind, f'{named}{best.change.name} averts it{also}{fails}')


def evidence_of(outcomes: Sequence[Outcome], by_batch: bool | None) -> list[Outcome]:
    """Averting outcomes that may name the cause."""
    averting = [outcome for outcome in outcomes if outcome.verdict == AVERTED]
    of_data = [outcome for outcome in averting if outcome.change.points_to == 'data']
    if by_batch is False:
        # From a state at the edge any other batch averts a spike, too.
        return [outcome for outcome in averting if outcome not in of_data]
    return of_data or averting if by_batch else averting


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
        return f'undecided: nothing tried averts it: {_listed([o.change.name for o in report.outcomes])}'
    return ''


def _listed(names: Sequence[str]) -> str:
    return ', '.join(names)
