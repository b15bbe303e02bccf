"""Of one step: what broke in it, or what it did otherwise than an earlier one."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text

from jaxrnn import trace
from jaxrnn.bisect import inspection
from jaxrnn.escaping import all_visible
from jaxrnn.report.text import count, number, pair, percent, short, some, table

MOST = 6
"""Rows shown of each list."""

SCORES = ('loss', 'accuracy', 'cosine', 'variance_ratio', 'gradient_norm', 'update_norm')
"""Records shown of a change, where there are such; else the first of those that there are."""


def render_inspection(inspected: inspection.Inspection, words: Sequence[str] = ()) -> RenderableType:
    """What looking into one step found.

    Args:
        inspected: of `inspection.inspect`.
        words: of the step's batch.
    """
    inspected, words = all_visible((inspected, words))
    parts: list[RenderableType] = []
    if inspected.compiled is not None:
        parts += _compiled(inspected.compiled, inspected.step)
    elif inspected.trace_report is not None:
        parts += _findings(inspected.trace_report, inspected.step, words)
    if inspected.comparison is not None:
        parts += [Text(), *_changed(inspected, words)]
    if inspected.precision is not None:
        parts += _precision(inspected.precision, words)
    return Group(*parts, *(check(one) for one in inspected.screens))


def in_short(inspected: inspection.Inspection, words: Sequence[str] = ()) -> list[RenderableType]:
    """A change in a few lines."""
    change = inspected.comparison
    assert change is not None
    lines: list[RenderableType] = [] if inspected.set_off is None else [_set_off(inspected.set_off)]
    lines.append(_heading(inspected))
    if change.absurd is not None:
        lines.append(_leap(change.absurd, words))
    if change.layers:
        lines.append(Text('  parameters: ' + ', '.join(_layer(layer) for layer in change.layers[:2])))
    lines += [
        Text(f'  saturated: {_gate(g)}') for g in change.gates[:1] if g.saturated.now > g.saturated.before
    ]
    if change.time_steps:
        first = change.time_steps[0]
        lines.append(
            Text(f'  backward: {first.layer}, most at time step {first.time_step}, {pair(first.gradient)}')
        )
    named = inspection.leading(change.examples)
    if named:
        names = _named(named, words) or list(map(str, named))
        many = f'{len(named)} of {count(len(change.examples), "example")}'
        lines.append(Text(f'  half of it by {many}: {some(names, 6)}'))
    return lines


def inspection_json(inspected: inspection.Inspection, words: Sequence[str] = ()) -> dict[str, Any]:
    """The machine-readable form of `render_inspection`."""
    traced, change = inspected.trace_report, inspected.comparison
    finding = None if traced is None or traced.finding is None else _finding_json(traced.finding, words)
    return {
        'step': inspected.step,
        'finding': finding,
        'compiled': None if inspected.compiled is None else _compiled_json(inspected.compiled),
        'harmless': [] if traced is None else [_finding_json(finding, words) for finding in traced.harmless],
        'equations': None if traced is None else traced.equations,
        'against': inspected.against,
        'change': None if change is None else _change_json(change, words),
        'checks': list(inspected.screens),
        'float64': None if inspected.precision is None else _precision_json(inspected.precision, words),
    }


def check(check: Mapping[str, Any]) -> Text:
    """One check of a diagnosis, on a line."""
    style = {True: 'dim', False: 'red'}.get(check['ok'], 'yellow')
    return Text(f'{check["name"]}: {check["why"]}', style=style)


def place(where: Mapping[str, Any]) -> Text:
    """Where in a step, as a diagnosis states it; no word of what isn't known."""
    is_input = where['op'] == 'input'
    parts: list[Any] = [where['source'] if is_input else _at(where['op'], where['source'])]
    if where['layer'] and not is_input:
        parts.append(f'layer {where["layer"]}')
    if where['time_step'] is not None:
        parts.append(f'time step {where["time_step"]}')
    if where['examples']:
        words = f' ({some(where["words"])})' if where['words'] else ''
        many = 'examples' if len(where['examples']) > 1 else 'example'
        parts.append(f'{many} {", ".join(map(str, where["examples"]))}{words}')
    said = Text.assemble('' if parts[0] == '' else (parts[0], 'bold'))
    for part in parts[1:]:
        said.append(f', {part}' if said else part)
    name = where['pass'] if where['pass'] in ('data', 'state', '') else f'{where["pass"]} pass'
    return Text(f'{name}: ' if name and said else name).append_text(said)


def _at(op: str, source: str) -> str:
    """An operation and its line, or that of the two which is known."""
    return ' at '.join(filter(None, (op, short(source) if source else '')))


# What isn't finite.


def _findings(traced: trace.TraceReport, step: int, words: Sequence[str]) -> list[RenderableType]:
    parts: list[RenderableType] = []
    finding = traced.finding
    if finding is None:
        parts.append(Text(f'step {step}: every output is finite', style='bold green'))
    else:
        parts.append(Text(f'step {step}: {finding.kind}', style='bold red'))
        parts.append(Text(trace.KINDS[finding.kind], style='dim'))
        parts.append(place(inspection.of_finding(finding) | {'words': _named(finding.examples, words)}))
        if finding.code:
            parts.append(Text(f'  {finding.code}', style='cyan'))
        if finding.detail:
            parts.append(Text(f'  {finding.detail}'))
        if finding.devices:
            parts.append(Text(f'  born on {some([_device(at) for at in finding.devices], 6)}'))
        parts.append(_ranges(finding))
        if finding.chain:
            parts.append(Text(f'computed just before: {_chain(finding.chain)}', style='dim'))
    for kind, findings in _grouped(traced.harmless):
        parts.append(
            Text(f'harmless, since no output has it: {kind} ({count(findings, "element")})', style='dim')
        )
    parts.append(Text(f'{count(traced.equations, "equation")} evaluated', style='dim'))
    return parts


def _compiled(found: trace.CompiledDifference, step: int) -> list[RenderableType]:
    """What isn't finite in the compiled program alone."""
    parts: list[RenderableType] = [
        Text(f'step {step}: the compiled program differs from its own equations', style='bold red'),
        Text(inspection.of_compiler(found), style='dim'),
    ]
    if (where := inspection.of_compiled(found)) is not None:
        parts.append(place(where))
    if found.code:
        parts.append(Text(f'  {found.code}', style='cyan'))
    return parts


def _compiled_json(found: trace.CompiledDifference) -> dict[str, Any]:
    ranges = {name: [one._asdict() for one in getattr(found, name)] for name in ('alone', 'compiled')}
    return {**found._asdict(), **ranges, 'why': inspection.of_compiler(found)}


def _named(examples: Sequence[int], words: Sequence[str]) -> list[str]:
    return [words[place] for place in examples if place < len(words)]


def _chain(links: Sequence[trace.Link]) -> str:
    """Operations by line, the latest first; of one line together."""
    lines: dict[str, list[str]] = {}
    for link in links:
        lines.setdefault(link.source, []).append(link.op)
    return '; '.join(f'{", ".join(dict.fromkeys(ops))} at {short(at)}' for at, ops in lines.items())


def _device(at: Mapping[str, int]) -> str:
    """Its place in the mesh."""
    return '(' + ', '.join(f'{axis} {place}' for axis, place in at.items()) + ')'


def _finding_json(finding: trace.Finding, words: Sequence[str]) -> dict[str, Any]:
    said = inspection.of_finding(finding) | {'words': _named(finding.examples, words)}
    ranges = {name: [one._asdict() for one in getattr(finding, name)] for name in ('operands', 'results')}
    return {
        **said,
        'kind': finding.kind,
        'detail': finding.detail,
        'code': finding.code,
        'library': finding.library,
        'iterations': finding.iterations,
        'elements': finding.elements,
        'chain': [link._asdict() for link in finding.chain],
        'devices': [dict(at) for at in finding.devices],
        **ranges,
    }


def _grouped(findings: Sequence[trace.Finding]) -> list[tuple[str, int]]:
    counts: dict[str, int] = {}
    for finding in findings:
        name = f'{finding.op} at {short(finding.source)}'
        counts[name] = counts.get(name, 0) + finding.elements
    return list(counts.items())


def in_words(one: trace.Range) -> str:
    """A range in one line."""
    shape = 'x'.join(map(str, one.shape)) or 'scalar'
    between = 'no finite number' if one.low is None else f'from {number(one.low)} to {number(one.high)}'
    bad = [f', {count} {name}' for name, count in (('NaN', one.nans), ('infinite', one.infinities)) if count]
    return f'{one.name or "operand"} ({shape} {one.dtype}): {between}{"".join(bad)}'


def _ranges(finding: trace.Finding) -> RenderableType:
    left = ('', 'from', 'shape', 'type')
    made = table(*left, 'lowest', 'highest', 'NaN', 'infinite', left=left)
    for title, ranges in (('operand', finding.operands), ('result', finding.results)):
        for one in ranges:
            shape = 'x'.join(map(str, one.shape)) or 'scalar'
            numbers = (one.low, one.high, one.nans or None, one.infinities or None)
            made.add_row(title, one.name, shape, one.dtype, *map(number, numbers))
    return made


# What float64 says.


def _precision(precision: trace.PrecisionReport, words: Sequence[str]) -> list[RenderableType]:
    lost = precision.lost
    lines: list[RenderableType] = []
    if lost is not None:
        said = Text(f'digits lost, error {pair((lost.of_operands, lost.error))}; ', style='bold red')
        lines.append(said.append_text(place(_lost_place(lost, words))))
        if lost.code:
            lines.append(Text(f'  {lost.code}', style='cyan'))
    worst = sorted(precision.outputs, key=lambda path: -precision.outputs[path])[:MOST]
    made = table('record or update', 'error beside float64', left=('record or update',))
    for path in worst:
        made.add_row(path, number(precision.outputs[path]))
    lines.append(made)
    if precision.restarted:
        lines.append(Text(f'not computed in float64: {", ".join(precision.restarted)}', style='dim'))
    return lines


def _lost_place(lost: trace.PrecisionLoss, words: Sequence[str]) -> dict[str, Any]:
    return {
        'pass': lost.pass_,
        'op': lost.op,
        'source': lost.source,
        'layer': lost.layer,
        'time_step': lost.time_step,
        'examples': list(lost.examples),
        'words': _named(lost.examples, words),
    }


def _precision_json(precision: trace.PrecisionReport, words: Sequence[str]) -> dict[str, Any]:
    lost = precision.lost
    place = None
    if lost is not None:
        place = _lost_place(lost, words) | {
            'code': lost.code,
            'error': lost.error,
            'of_operands': lost.of_operands,
        }
    return {'lost': place, 'outputs': precision.outputs, 'restarted': list(precision.restarted)}


# What changed.


def _changed(inspected: inspection.Inspection, words: Sequence[str]) -> list[RenderableType]:
    change = inspected.comparison
    assert change is not None
    parts: list[RenderableType] = [_heading(inspected), _scores(change, inspected)]
    if change.absurd is not None:
        parts.append(_leap(change.absurd, words))
    if change.layers:
        parts.append(_layers(change))
    if change.gates:
        parts.append(_gates(change))
    if change.time_steps:
        parts.append(_time_steps(change))
    if change.examples:
        parts.append(_examples(change, words))
        if not change.additive:
            parts.append(
                Text(
                    "the examples' losses don't add up to the batch's: they depend on one another",
                    style='yellow',
                )
            )
    if change.leaps:
        parts.append(_leaps(change))
    return parts


def _set_off(set_off: inspection.SetOff) -> Text:
    return Text(f'set off at step {set_off.step}, {set_off.times:.2g} times as long as the one before it')


def _heading(inspected: inspection.Inspection) -> Text:
    change = inspected.comparison
    assert change is not None
    lines = Text(f'step {inspected.step} against step {inspected.against}: ', style='bold')
    scores = change.scores.get('loss')
    if scores is None:
        return lines.append('records without a loss', style='not bold')
    before, crossed, now = scores
    parts = abs(crossed - before), abs(now - crossed)
    whole = sum(parts) or 1
    shares = f'{percent(parts[0] / whole)} by the batch, {percent(parts[1] / whole)} by the state'
    return lines.append(f'loss {pair((before, now))}, {shares}', style='not bold')


def _scores(change: trace.Comparison, inspected: inspection.Inspection) -> RenderableType:
    names = [name for name in SCORES if name in change.scores] or list(change.scores)[:MOST]
    made = table('state', 'batch', *(name.replace('_', ' ') for name in names), left=('state', 'batch'))
    steps = (
        (inspected.against, inspected.against),
        (inspected.against, inspected.step),
        (inspected.step, inspected.step),
    )
    for number_of, (state, batch) in enumerate(steps):
        made.add_row(str(state), str(batch), *(number(change.scores[name][number_of]) for name in names))
    return made


def _leap(leap: trace.Leap, words: Sequence[str]) -> Text:
    where = {
        'pass': leap.pass_ or 'state',
        'op': leap.op,
        'source': leap.source,
        'layer': leap.layer,
        'time_step': leap.time_step,
        'examples': leap.examples,
        'words': _named(leap.examples, words),
    }
    said = Text(f'absurd: largest element {pair(leap.largest)}; ', style='bold red')
    return said.append_text(place(where))


def _layer(layer: trace.Layer) -> str:
    return f'{layer.path.removeprefix("state/").removeprefix("params/")} {percent(layer.share)}'


def _gate(gate: trace.Saturation) -> str:
    at = '' if gate.time_step is None else f' (most at time step {gate.time_step})'
    return f'{gate.layer} {pair(gate.saturated)}{at}'


def _layers(change: trace.Comparison) -> RenderableType:
    made = table('parameter', 'of the change', 'gradient norm', 'update / parameter', left=('parameter',))
    for layer in change.layers[:MOST]:
        gradient = '' if layer.gradient is None else pair(layer.gradient)
        path = layer.path.removeprefix('state/').removeprefix('params/')
        made.add_row(path, percent(layer.share), gradient, pair(layer.relative_step))
    return made


def _gates(change: trace.Comparison) -> RenderableType:
    made = table('gate', 'by', 'saturated', 'most at time step', left=('gate', 'by'))
    for gate in change.gates[:MOST]:
        made.add_row(gate.layer, gate.op, pair(gate.saturated), number(gate.time_step))
    return made


def _time_steps(change: trace.Comparison) -> RenderableType:
    made = table(
        'backward through', 'time step', 'of its change', 'gradient norm', left=('backward through',)
    )
    for each in change.time_steps[:MOST]:
        made.add_row(each.layer, str(each.time_step), percent(each.share), pair(each.gradient))
    return made


def _examples(change: trace.Comparison, words: Sequence[str]) -> RenderableType:
    made = table('example', 'word', 'of the change', 'loss', 'of the gradient', left=('word',))
    for example in change.examples[:MOST]:
        word = words[example.place] if example.place < len(words) else ''
        gradient = '' if example.gradient != example.gradient else percent(example.gradient)
        made.add_row(str(example.place), word, percent(example.share), pair(example.loss), gradient)
    return made


def _leaps(change: trace.Comparison) -> RenderableType:
    made = table('grew most', 'at', 'times', 'largest', left=('grew most', 'at'))
    for leap in change.leaps[:MOST]:
        at = short(leap.source)
        made.add_row(f'{leap.pass_} {leap.op}'.strip(), at, number(float(leap.ratio)), pair(leap.largest))
    return made


def _change_json(change: trace.Comparison, words: Sequence[str]) -> dict[str, Any]:
    def plain(value: Any) -> Any:
        if isinstance(value, tuple) and hasattr(value, '_asdict'):
            return {name.rstrip('_'): plain(one) for name, one in value._asdict().items()}
        if isinstance(value, tuple | list):
            return [plain(one) for one in value]
        if isinstance(value, dict):
            return {name: plain(one) for name, one in value.items()}
        return None if isinstance(value, float) and value - value != 0 else value  # JSON has no NaN

    made = plain(change)
    for example in made['examples']:
        example['word'] = words[example['place']] if example['place'] < len(words) else ''
    made['leaps'] = made['leaps'][: trace.MOST_EXAMPLES]
    made['moments'] = made.pop('time_steps')  # the key that programs know
    return made
