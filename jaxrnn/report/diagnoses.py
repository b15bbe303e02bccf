"""Of a whole diagnosis: what, where, why, and what to add to the flags; on one screen."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from jaxrnn.bisect import inspection
from jaxrnn.diagnosis import Diagnosis
from jaxrnn.experiment.outcome import AVERTED, DELAYED, MARGINS, UNCHANGED, WORSE, Outcome, Told
from jaxrnn.report import runs, steps
from jaxrnn.report.text import number, table

STYLES = {
    AVERTED: 'green',
    DELAYED: 'yellow',
    UNCHANGED: 'dim',
    WORSE: 'red',
}


def diagnosed(
    diagnosis: Diagnosis,
    told: Told | None,
    look: inspection.Look | None = None,
    words: Sequence[str] = (),
) -> RenderableType:
    """One screen on a diagnosis.

    Args:
        diagnosis: of investigation.diagnose_run.
        told: of its experiments.
        look: into the first bad step.
        words: of the first bad step's batch.
    """
    parts: list[RenderableType] = [runs.verdict(diagnosis, rule=False)]
    if look is not None and look.change is not None:
        parts += steps.in_short(look, words)
    elif diagnosis.where is not None:
        parts.append(steps.place(diagnosis.where))
    if diagnosis.onset_step is not None:
        parts.append(Text(f'its first sign: step {diagnosis.onset_step}'))
    if told is not None or diagnosis.remedies:
        parts += [Text(), _why(diagnosis), _advice(diagnosis, told)]
    if told is not None:
        parts += [Text(), _experiments(told), _baselines(told)]
    parts += [Text(), _checks(diagnosis.checks), runs.proof(diagnosis)]
    return Group(*parts)


def _why(diagnosis: Diagnosis) -> Text:
    cause = diagnosis.cause
    if cause.kind == 'none':
        return Text(cause.why, style='bold yellow')
    named = Text.assemble(('cause: ', 'bold'), (cause.kind, 'bold red'))
    # Why a run can't be reproduced is its verdict.
    return named if diagnosis.replay.first_mismatch is not None else named.append(f': {cause.why}')


def advised(diagnosis: Diagnosis) -> str:
    """The flags that avert the symptom, of what speaks for the cause before others; '' where there are none."""
    best = _best(diagnosis)
    return '' if best is None else best['flags']


def _best(diagnosis: Diagnosis) -> Mapping[str, Any] | None:
    averting = (remedy for remedy in diagnosis.remedies if remedy['outcome'] == AVERTED and remedy['flags'])
    return next(averting, None)


def _advice(diagnosis: Diagnosis, told: Told | None) -> Text:
    """What to do, where something averts the symptom."""
    best = _best(diagnosis)
    if best is None:
        return Text()
    changes = () if told is None else (outcome.change for outcome in told.outcomes)
    means = next((f' ({change.means})' for change in changes if change.name == best['name']), '')
    lines = Text.assemble(('do: ', 'bold'), f'train again with {best["flags"]}', means)
    if best['point_of_no_return'] is not None:
        lines.append(
            f'\nit still averts the symptom when it is switched on at step {best["point_of_no_return"]}'
        )
    return lines


def _experiments(told: Told) -> RenderableType:
    window = told.window
    if window is None or not told.outcomes:
        return Text()
    made = table('change', 'outcome', 'up to', 'loss', left=('change', 'outcome'))
    for outcome in told.outcomes:
        made.add_row(
            outcome.change.name,
            Text(_outcome(outcome), style=STYLES[outcome.verdict]),
            str(outcome.reached - 1),
            number(outcome.loss),
        )
    return Group(Text(f'the steps from {window.start} on, again, each under one change', style='dim'), made)


def _outcome(outcome: Outcome) -> str:
    if outcome.symptom is None:
        return outcome.verdict + _bears(outcome)
    return f'{outcome.verdict}, {outcome.symptom.kind} at {outcome.symptom.step}'


def _bears(outcome: Outcome) -> str:
    match outcome.margin:
        case None:
            return ''
        case 1:
            return f', not at {MARGINS[1]} x the rate'
        case times:
            return f', even at {times} x the rate'


def _baselines(told: Told) -> Text:
    said = []
    if told.control is not None and told.control.symptom is not None:
        said.append(f'without a change: {told.control.symptom.kind} at {told.control.symptom.step}')
    if told.nudge is not None:
        said.append(f'nudged by a millionth: {_outcome(told.nudge)}')
    if told.drawn is not None:
        said.append(f'one drawn at random ({told.drawn.change.name}): {told.drawn.verdict}')
    if told.untried:
        said.append(f'the budget did not reach to: {", ".join(change.name for change in told.untried)}')
    return Text('; '.join(said), style='dim')


def _checks(checks: Sequence[Any]) -> RenderableType:
    lines = Table.grid(padding=(0, 1))
    for check in checks:
        mark, style = {True: ('ok', 'green'), False: ('no', 'red')}.get(check['ok'], ('?', 'yellow'))
        said = Text(f'{check["name"]}: ').append(check['why'], style='dim')
        lines.add_row(Text(mark.rjust(3), style=style), said)
    return lines
