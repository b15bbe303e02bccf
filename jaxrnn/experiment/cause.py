"""What the outcomes of experiments say: which of them count as evidence, for which cause, and of which mechanism."""

from collections.abc import Sequence

import numpy as np

from jaxrnn.diagnosis import Cause
from jaxrnn.experiment.outcome import AVERTED, MARGINS, UNCHANGED, VERDICTS, ExperimentReport, Outcome

MECHANISMS = {
    'low precision': 'rounding takes digits that training needs',
    'missing bias correction': 'means that start at zero make the first steps too long',
    'excessive recurrent gain': 'the recurrent weights start several times larger than any library has them',
    'vanishing steps': 'steps are too short to learn anything more',
    'second-moment decay': "Adam's v decays in quiet steps until the next ones are too long",
    'outrun second moment': 'gradients grow faster than v, their squared mean, follows',
    'outlying gradients': 'single gradients far above the others throw the weights off',
    'shut gates': 'hard gates pass no gradient where they are shut',
    'short memory': 'gates forget a word before it ends',
    'recurrent gain': 'the recurrent weights amplify the state from step to step',
    'padding': 'what follows the last letter overwrites the state',
}
"""What makes a run break, the narrowest first: what takes one of these away hardly touches those after it. A change
that makes all steps shorter takes away none in particular."""

WIDE = ('shut gates', 'short memory', 'recurrent gain', 'padding')
"""Of another network: not named where shorter steps avert the symptom, too, since they change less."""


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
        takes_away = bool(mechanism) and outcome.change.removes == mechanism
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
        (o.change.points_to for o in evidence if mechanism and o.change.removes == mechanism),
        best.change.points_to,
    )
    also = f'; so does {_listed([outcome.change.name for outcome in others])}' if others else ''
    means = f' ({MECHANISMS[mechanism]})' if mechanism in MECHANISMS else ''
    named = f'{mechanism}{means}: ' if mechanism else ''
    return Cause(kind, f'{named}{best.change.name} averts it{also}{fails}')


def evidence_of(outcomes: Sequence[Outcome], by_batch: bool | None) -> list[Outcome]:
    """Averting outcomes that may name the cause."""
    averting = [outcome for outcome in outcomes if outcome.verdict == AVERTED]
    of_data = [outcome for outcome in averting if outcome.change.points_to == 'data']
    if by_batch is False:
        # From a state at the edge any other batch averts a spike, too.
        return [outcome for outcome in averting if outcome not in of_data]
    return of_data or averting if by_batch else averting


def mechanism_of(outcomes: Sequence[Outcome], evidence: Sequence[Outcome]) -> str:
    """The narrowest mechanism that a change in evidence takes away, and that no change takes away without averting the
    symptom; '' where there is none, or where it is a wide one and a change that takes away none averts it, too."""
    refuted = {o.change.removes for o in outcomes if o.verdict != AVERTED and o.acted}
    if any(o.change.removes == '' for o in evidence):
        refuted |= set(WIDE)
    left = dict.fromkeys(o.change.removes for o in evidence if o.change.removes not in {'', *refuted})
    order = [*MECHANISMS, *left]
    return min(left, key=order.index, default='')


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
