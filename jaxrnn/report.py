"""What a person reads: a diagnosis, the records around the step, what to type next."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from jaxrnn import detect
from jaxrnn.diagnosis import Diagnosis
from jaxrnn.telemetry import Row

COLUMNS = ('loss', 'accuracy', 'cosine', 'variance_ratio', 'gradient_norm', 'update_norm', 'parameter_norm')
"""Fields shown of each record, where it has them."""

AROUND = (-100, -50, -20, -10, -5, -2, -1, 0, 1, 2, 5, 10, 20, 50, 100)
"""Steps shown around the first bad one."""


def bisected(diagnosis: Diagnosis, rows: Sequence[Row], words: Sequence[str] = ()) -> RenderableType:
    """One screen on what a bisect found.

    Args:
        diagnosis: of replay.bisect.
        rows: records of the run, any steps.
        words: of the first bad step's batch.
    """
    parts: list[RenderableType] = [_verdict(diagnosis), _proof(diagnosis)]
    if diagnosis.symptom is not None:
        parts += [Text(), _around(diagnosis.symptom.step, rows)]
    if words:
        parts.append(Text(f'words of the batch: {_some(words)}', style='dim'))
    return Group(*parts)


def trained(diagnosis: Diagnosis, evaluation: Mapping[str, Mapping[str, float]]) -> RenderableType:
    """What training ended with."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column('split')
    names = list(next(iter(evaluation.values()), {}))
    for name in names:
        table.add_column(name, justify='right')
    for split, scores in evaluation.items():
        table.add_row(split, *(_number(scores[name]) for name in names))
    return Group(_verdict(diagnosis), table)


def _verdict(diagnosis: Diagnosis) -> Text:
    symptom, mismatch = diagnosis.symptom, diagnosis.replay.first_mismatch
    if mismatch is not None:
        return Text(f'not reproducible: {diagnosis.cause.why}', style='bold yellow')
    if symptom is None:
        return Text('healthy: no rule holds at any step', style='bold green')
    rule = _rule(symptom.kind)
    lines = Text.assemble((f'{symptom.kind} at step {symptom.step}', 'bold red'), f': {rule[0]}')
    if rule[1]:
        lines.append(f'\nrule: {rule[1]}', style='dim')
    return lines


def _rule(kind: str) -> tuple[str, str]:
    found = [detector for detector in detect.DETECTORS if detector.kind == kind]
    return (found[0].means, found[0].rule.text) if found else ('your rule holds', '')


def _proof(diagnosis: Diagnosis) -> Text:
    replay = diagnosis.replay
    effort = f'{_count(replay.steps_replayed, "step")} replayed from {_count(replay.checkpoints_probed, "checkpoint")}'
    if not replay.steps_replayed:
        return Text('nothing replayed', style='dim')
    if replay.first_mismatch is not None:
        return Text(f'{effort}; the first to differ from its record is step {replay.first_mismatch}')
    if replay.bit_identical:
        return Text(f'proven: {effort}, bit for bit as recorded', style='green')
    return Text(f'{effort}; there was no record to hold them against', style='yellow')


def _around(step: int, rows: Sequence[Row]) -> Table:
    by_step = {row['step']: row for row in rows}
    steps = [step + distance for distance in AROUND if step + distance in by_step]
    names = [name for name in COLUMNS if any(name in by_step[at] for at in steps)]
    if not names:  # somebody's own step
        names = (
            [name for name, value in by_step[steps[0]].items() if isinstance(value, float)][:7]
            if steps
            else []
        )
    # Two spaces between columns: all of it fits on 80.
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 0, 0, 1))
    table.add_column('step', justify='right')
    for name in names:
        table.add_column(name.replace('_', ' '), justify='right')
    for at in steps:
        style = 'bold red' if at == step else None
        table.add_row(str(at), *(_number(by_step[at].get(name)) for name in names), style=style)
    return table


def _number(value: Any) -> str:
    if value is None:
        return ''
    return f'{value:.3g}' if isinstance(value, float) else str(value)


def _count(number: int, noun: str) -> str:
    return f'{number:,} {noun}{"" if number == 1 else "s"}'


def _some(words: Sequence[str], most: int = 12) -> str:
    return ' '.join(words[:most]) + (f' … ({len(words)})' if len(words) > most else '')
