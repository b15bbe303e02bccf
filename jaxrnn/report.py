"""What a person reads: a diagnosis, the records around the step, what to type next."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from jaxrnn import detect, replay, trace
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
    if diagnosis.where is not None:
        parts.append(_where(diagnosis.where))
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


def told(story: trace.Story, step: int, words: Sequence[str] = ()) -> RenderableType:
    """What the trace of one step found.

    Args:
        story: of trace.first_bad.
        step: its number.
        words: of its batch.
    """
    parts: list[RenderableType] = []
    finding = story.finding
    if finding is None:
        parts.append(Text(f'step {step}: every output is finite', style='bold green'))
    else:
        named = [words[place] for place in finding.examples if place < len(words)]
        parts.append(Text(f'step {step}: {finding.kind}', style='bold red'))
        parts.append(Text(trace.KINDS[finding.kind], style='dim'))
        parts.append(_where(replay.where(finding) | {'words': named}))
        if finding.code:
            parts.append(Text(f'  {finding.code}', style='cyan'))
        parts.append(_ranges(finding))
    for kind, findings in _grouped(story.harmless):
        parts.append(
            Text(f'harmless, since no output has it: {kind} ({_count(findings, "element")})', style='dim')
        )
    parts.append(Text(f'{_count(story.equations, "equation")} evaluated', style='dim'))
    return Group(*parts)


def story_json(story: trace.Story, step: int, words: Sequence[str] = ()) -> dict[str, Any]:
    """The machine-readable form of `told`."""

    def plain(finding: trace.Finding) -> dict[str, Any]:
        named = [words[place] for place in finding.examples if place < len(words)]
        said = {**replay.where(finding), 'words': named, 'kind': finding.kind, 'code': finding.code}
        ranges = {name: [one._asdict() for one in getattr(finding, name)] for name in ('operands', 'results')}
        return {
            **said,
            'library': finding.library,
            'iterations': finding.iterations,
            'elements': finding.elements,
            **ranges,
        }

    return {
        'step': step,
        'finding': None if story.finding is None else plain(story.finding),
        'harmless': [plain(finding) for finding in story.harmless],
        'equations': story.equations,
    }


def _grouped(findings: Sequence[trace.Finding]) -> list[tuple[str, int]]:
    counts: dict[str, int] = {}
    for finding in findings:
        name = f'{finding.op} at {_short(finding.source)}'
        counts[name] = counts.get(name, 0) + finding.elements
    return list(counts.items())


def _ranges(finding: trace.Finding) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ('', 'from', 'shape', 'type', 'lowest', 'highest', 'NaN', 'infinite'):
        justify: Any = 'left' if name in ('', 'from', 'shape', 'type') else 'right'
        table.add_column(name, justify=justify, overflow='fold')
    for title, ranges in (('operand', finding.operands), ('result', finding.results)):
        for one in ranges:
            shape = 'x'.join(map(str, one.shape)) or 'scalar'
            numbers = (one.low, one.high, one.nans or None, one.infinities or None)
            table.add_row(title, one.name, shape, one.dtype, *(_number(number) for number in numbers))
    return table


def _where(where: Mapping[str, Any]) -> Text:
    place = f'{where["op"]} at {_short(where["source"])}' if where['op'] != 'input' else where['source']
    lines = Text.assemble(f'{where["pass"]} pass: ' if where['pass'] != 'data' else 'data: ', (place, 'bold'))
    if where['layer'] and where['op'] != 'input':
        lines.append(f', layer {where["layer"]}')
    if where['time_step'] is not None:
        lines.append(f', time step {where["time_step"]}')
    if where['examples']:
        words = f' ({_some(where["words"])})' if where['words'] else ''
        many = 'examples' if len(where['examples']) > 1 else 'example'
        lines.append(f', {many} {", ".join(map(str, where["examples"]))}{words}')
    return lines


def _short(source: str) -> str:
    """A path from the working directory, where it lies below."""
    file, _, line = source.rpartition(':')
    path = Path(file)
    return f'{path.relative_to(Path.cwd())}:{line}' if path.is_relative_to(Path.cwd()) else source


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
