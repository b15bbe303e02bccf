"""Of a whole diagnosis: what, where, why, and what to add to the flags; on one screen."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from jaxrnn.bisect import inspection
from jaxrnn.diagnosis import Diagnosis
from jaxrnn.escaping import all_visible
from jaxrnn.experiment.outcome import (
    AVERTED,
    DELAYED,
    MARGINS,
    NOT_POSSIBLE,
    OTHER_BATCHES,
    UNCHANGED,
    WORSE,
    Beginning,
    Change,
    ExperimentReport,
    Outcome,
)
from jaxrnn.report import runs, steps
from jaxrnn.report.sections import Section, on_a_screen
from jaxrnn.report.text import number, table

STYLES = {
    AVERTED: 'green',
    DELAYED: 'yellow',
    UNCHANGED: 'dim',
    WORSE: 'red',
    NOT_POSSIBLE: 'yellow',
}


def render_diagnosis(
    diagnosis: Diagnosis,
    report: ExperimentReport | None,
    inspected: inspection.Inspection | None = None,
    words: Sequence[str] = (),
) -> RenderableType:
    """One screen on a diagnosis. Arguments as of `diagnosis_sections`."""
    return on_a_screen(diagnosis_sections(diagnosis, report, inspected, words))


def diagnosis_sections(
    diagnosis: Diagnosis,
    report: ExperimentReport | None,
    inspected: inspection.Inspection | None = None,
    words: Sequence[str] = (),
) -> list[Section]:
    """All that a person reads of a diagnosis.

    Args:
        diagnosis: of investigation.diagnose_run.
        report: of its experiments.
        inspected: the first bad step.
        words: of the first bad step's batch.
    """
    diagnosis, report, inspected, words = all_visible((diagnosis, report, inspected, words))
    place: list[RenderableType] = []
    if inspected is not None and inspected.comparison is not None:
        place += steps.in_short(inspected, words)
    elif diagnosis.where is not None:
        place.append(steps.place(diagnosis.where))
    advice: list[RenderableType] = []
    if report is not None or diagnosis.remedies:
        advice += [_why(diagnosis), _advice(diagnosis, report)]
    tried: list[RenderableType] = []
    if report is not None:
        tried += [_experiments(report), _baselines(report)]
    elif diagnosis.remedies:
        tried.append(_remedies(diagnosis))
    in_full = () if inspected is None else (steps.render_inspection(inspected, words),)
    return [
        Section('verdict', 'What happened', (runs.verdict(diagnosis, rule=False),)),
        Section('place', 'Where', tuple(place), apart=False),
        Section('advice', 'Why, and what to do', tuple(advice)),
        Section('experiments', 'The same steps, under one change at a time', tuple(tried)),
        Section('step', 'The step in full', in_full, in_full=True),
        Section('checks', 'Checks', (_checks(diagnosis.checks),)),
        Section('proof', 'Proof', (runs.proof(diagnosis),), apart=False),
    ]


def _why(diagnosis: Diagnosis) -> Text:
    cause = diagnosis.cause
    if cause.kind == 'none':
        return Text(cause.why, style='bold yellow')
    named = Text.assemble(('cause: ', 'bold'), (cause.kind, 'bold red'))
    # Why a run can't be reproduced is its verdict.
    return named if diagnosis.replay.first_mismatch is not None else named.append(f': {cause.why}')


def advised_flags(diagnosis: Diagnosis) -> str:
    """The flags that avert the symptom, of what is evidence for the cause before others; '' where there are none."""
    return next((remedy['flags'] for remedy in _averting(diagnosis) if remedy['flags']), '')


def _averting(diagnosis: Diagnosis) -> list[Mapping[str, Any]]:
    """Remedies that can be advised, the best first."""
    averting = [remedy for remedy in diagnosis.remedies if remedy['outcome'] == AVERTED]
    return [remedy for remedy in averting if remedy['name'] != OTHER_BATCHES]


def _best(diagnosis: Diagnosis) -> Mapping[str, Any] | None:
    """The first that has flags; of a step that has none, the first."""
    averting = _averting(diagnosis)
    return next((remedy for remedy in averting if remedy['flags']), averting[0] if averting else None)


def _advice(diagnosis: Diagnosis, report: ExperimentReport | None) -> Text:
    """What to do, where something averts the symptom."""
    best = _best(diagnosis)
    if best is None:
        return Text()
    changes = () if report is None else (outcome.change for outcome in report.outcomes)
    change = next((change for change in changes if change.name == best['name']), None)
    means = '' if change is None else f' ({change.means}{_not_for_good(change)})'
    # Where the cause isn't known, what averts the symptom may avert it by chance.
    verb = 'try: ' if diagnosis.cause.kind == 'none' else 'do: '
    said = f'train again with {best["flags"]}' if best['flags'] else f'{best["name"]} averts it'
    lines = Text.assemble((verb, 'bold'), _to_mend(diagnosis), said, means)
    if best['point_of_no_return'] is not None:
        lines.append(
            f'\nit still averts the symptom when it is switched on at step {best["point_of_no_return"]}'
        )
    beginning = None if report is None else report.beginning
    if beginning is not None and report is not None and report.outcomes[0].change.name == best['name']:
        lines.append(f'\n{_from_start(beginning)}')
    return lines


def _from_start(beginning: Beginning) -> str:
    """How far training comes under what is advised."""
    shown = '' if beginning.symptom is None else f', and shows: {beginning.symptom.kind}'
    return (
        f'on from the start it has a loss of {number(beginning.loss)} by step {beginning.step}{shown}; the run had '
        f'{number(beginning.own)}{": it holds up the beginning" if beginning.held_up else ""}'
    )


def _not_for_good(change: Change) -> str:
    """What is to be said of shorter steps that take nothing away: four of five seeds collapsed all the same, later, at
    an eighth of the rate from the start (benchmarks/study)."""
    only_shorter = change.shortens > 1 and not change.decays and change.removes is None
    return '; it may come later all the same' if only_shorter else ''


def _to_mend(diagnosis: Diagnosis) -> str:
    """What comes before everything else where the data is the cause."""
    where, step = diagnosis.where or {}, diagnosis.first_bad_step
    if diagnosis.cause.kind != 'data' or step is None:
        return ''
    named = f' ({where["source"]})' if where.get('op') == 'input' else ''
    return f'look at the batch of step {step}{named}, and mend the data\nelse: '


def _experiments(report: ExperimentReport) -> RenderableType:
    window = report.window
    if window is None or not report.outcomes:
        return Text()
    made = table('change', 'outcome', 'up to', 'loss', left=('change', 'outcome'))
    for outcome in report.outcomes:
        made.add_row(
            _named(outcome.change),
            Text(_outcome(outcome), style=STYLES[outcome.verdict]),
            str(outcome.reached - 1),
            number(outcome.loss),
        )
    return Group(Text(f'the steps from {window.start} on, again, each under one change', style='dim'), made)


def _named(change: Change) -> str:
    return f'{change.name} ({change.here})' if change.here else change.name


def _remedies(diagnosis: Diagnosis) -> RenderableType:
    """As `_experiments`, of what a diagnosis keeps of them."""
    made = table('change', 'outcome', 'loss', left=('change', 'outcome'))
    for remedy in diagnosis.remedies:
        style = STYLES.get(remedy['outcome'].split(':')[0], '')
        made.add_row(remedy['name'], Text(remedy['outcome'], style=style), number(remedy['loss_at_horizon']))
    return made


def _outcome(outcome: Outcome) -> str:
    if outcome.why:
        return f'{outcome.verdict}: {outcome.why}'
    if outcome.symptom is None:
        return outcome.verdict + _tolerates(outcome)
    return f'{outcome.verdict}, {outcome.symptom.kind} at {outcome.symptom.step}'


def _tolerates(outcome: Outcome) -> str:
    match outcome.margin:
        case None:
            return ''
        case 1:
            return f', not at {MARGINS[1]} x the rate'
        case times:
            return f', even at {times} x the rate'


def _baselines(report: ExperimentReport) -> Text:
    said = []
    if report.control is not None and report.control.symptom is not None:
        said.append(f'without a change: {report.control.symptom.kind} at {report.control.symptom.step}')
    if report.nudge is not None:
        said.append(f'nudged by a millionth: {_outcome(report.nudge)}')
    if report.chosen_at_random is not None:
        said.append(
            f'one chosen at random ({report.chosen_at_random.change.name}): {report.chosen_at_random.verdict}'
        )
    if report.untried:
        said.append(f'the budget did not reach to: {", ".join(change.name for change in report.untried)}')
    return Text('; '.join(said), style='dim')


def _checks(checks: Sequence[Any]) -> RenderableType:
    lines = Table.grid(padding=(0, 1))
    for check in checks:
        mark, style = {True: ('ok', 'green'), False: ('no', 'red')}.get(check['ok'], ('?', 'yellow'))
        said = Text(f'{check["name"]}: ').append(check['why'], style='dim')
        lines.add_row(Text(mark.rjust(3), style=style), said)
    return lines
