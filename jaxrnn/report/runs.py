"""Of whole runs: what training ended with, what a bisect found, the records around the step."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text

from jaxrnn import detect
from jaxrnn.bisect import inspection
from jaxrnn.diagnosis import Diagnosis
from jaxrnn.escaping import all_visible
from jaxrnn.record.records import Records, Row
from jaxrnn.report import steps
from jaxrnn.report.text import count, number, some, table

COLUMNS = ('loss', 'accuracy', 'cosine', 'variance_ratio', 'gradient_norm', 'update_norm', 'parameter_norm')
"""Fields shown of each record, where it has them."""

AROUND = (-100, -50, -20, -10, -5, -2, -1, 0, 1, 2, 5, 10, 20, 50, 100)
"""Steps shown around the first bad one."""


MOST_RULE = 200
"""Characters of a rule that can be read at a glance; longer ones are in docs/bisecting.md."""


def render_bisection(
    diagnosis: Diagnosis,
    rows: Sequence[Row],
    words: Sequence[str] = (),
    inspected: inspection.Inspection | None = None,
) -> RenderableType:
    """One screen on what a bisect found.

    Args:
        diagnosis: of replay.bisect.
        rows: records of the run, any steps.
        words: of the batch of the step that was inspected.
        inspected: what of it, if anything.
    """
    diagnosis, words, inspected = all_visible((diagnosis, words, inspected))
    parts: list[RenderableType] = [verdict(diagnosis), proof(diagnosis)]
    if inspected is not None and inspected.comparison is not None:
        parts += [Text(), *steps.in_short(inspected, words)]
    elif diagnosis.where is not None:
        parts.append(steps.place(diagnosis.where))
    parts += [steps.check(check) for check in diagnosis.checks]
    if diagnosis.symptom is not None:
        parts += [Text(), _around(diagnosis.symptom.step, rows)]
    if words:
        parts.append(Text(f'words of the batch{_of_step(inspected)}: {some(words)}', style='dim'))
    return Group(*parts)


def render_training(diagnosis: Diagnosis, evaluation: Mapping[str, Mapping[str, float]]) -> RenderableType:
    """What training ended with."""
    diagnosis, evaluation = all_visible((diagnosis, evaluation))
    names = list(next(iter(evaluation.values()), {}))
    scored = table('split', *names, left=('split',))
    for split, scores in evaluation.items():
        scored.add_row(split, *(number(scores[name]) for name in names))
    return Group(verdict(diagnosis), scored)


def render_neighbours(found: Sequence[Mapping[str, Any]]) -> RenderableType:
    """Words, whether they were learnt, and their nearest neighbours.

    Args:
        found: one a word: `word`, `known`, and `nearest`, each of which has `word` and `cosine`.
    """
    columns = ('word', 'learnt', 'nearest by cosine')
    made = table(*columns, left=columns)
    for entry in all_visible(found):
        near = '  '.join(f'{near["word"]} {near["cosine"]:.2f}' for near in entry['nearest'])
        made.add_row(entry['word'], 'yes' if entry['known'] else 'no', near)
    return made


def verdict(diagnosis: Diagnosis, *, rule: bool = True) -> Text:
    """What a run suffers from."""
    symptom, mismatch = diagnosis.symptom, diagnosis.replay.first_mismatch
    if mismatch is not None:
        why = diagnosis.cause.why
        said = why if why.startswith('not reproducible') else f'not reproducible: {why}'
        return Text(said, style='bold yellow')
    if symptom is None:
        return _without_symptom(diagnosis)
    means, text = _rule(symptom.kind)
    lines = Text.assemble((f'{symptom.kind} at step {symptom.step}', 'bold red'), f': {means}')
    if diagnosis.onset_step is not None and diagnosis.onset_step < symptom.step:
        lines.append(f'\nit began at step {diagnosis.onset_step}, and was recognised at step {symptom.step}')
    if rule and text and len(text) <= MOST_RULE:
        lines.append(f'\nrule: {text}', style='dim')
    return lines


def _without_symptom(diagnosis: Diagnosis) -> Text:
    """A failed check, or steps too few to tell, are no health."""
    why = diagnosis.cause.why
    if why.startswith('too short'):
        return Text(why, style='bold yellow')
    failed = [f'{check["name"]}: {check["why"]}' for check in diagnosis.checks if check['ok'] is False]
    if failed:
        return Text(f'no symptom, but not all is well ({"; ".join(failed)})', style='bold yellow')
    return Text(f'healthy: {why}', style='bold green')


def _rule(kind: str) -> tuple[str, str]:
    found = [detector for detector in detect.DETECTORS if detector.kind == kind]
    return (found[0].means, found[0].rule.text) if found else ('your rule holds', '')


def proof(diagnosis: Diagnosis) -> Text:
    """What was replayed, and whether it came out as recorded."""
    replay = diagnosis.replay
    effort = f'{count(replay.steps_replayed, "step")} replayed from {count(replay.checkpoints_probed, "checkpoint")}'
    if not replay.steps_replayed:
        return Text('nothing replayed', style='dim')
    if replay.first_mismatch is not None:
        return Text(f'{effort}; the first to differ from the run is step {replay.first_mismatch}')
    if replay.bit_identical:
        return Text(f'proven: {effort}, bit for bit as recorded', style='green')
    return Text(f'{effort}; there was no record to hold them against', style='yellow')


def _around(step: int, rows: Sequence[Row]) -> RenderableType:
    found = {step + distance: Records.of(rows).at(step + distance) for distance in AROUND}
    by_step = {at: all_visible(row) for at, row in found.items() if row is not None}
    shown = list(by_step)
    names = [name for name in COLUMNS if any(name in by_step[at] for at in shown)]
    if not names and shown:  # somebody's own step
        names = [name for name, value in by_step[shown[0]].items() if isinstance(value, float)][:7]
    made = table('step', *(name.replace('_', ' ') for name in names))
    for at in shown:
        style = 'bold red' if at == step else None
        made.add_row(str(at), *(number(by_step[at].get(name)) for name in names), style=style)
    return made


def _of_step(inspected: inspection.Inspection | None) -> str:
    return '' if inspected is None else f' of step {inspected.step}'
