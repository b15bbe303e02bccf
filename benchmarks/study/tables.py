"""The results as tables of Markdown.

    python benchmarks/study/tables.py
    python benchmarks/study/tables.py --only=creeping

Nothing is run: they are made of what is in results/.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
sys.path[0] = str(ROOT)

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from absl import flags
from scipy import stats

from benchmarks.study import plan, tasks
from benchmarks.study.run import RESULTS
from jaxrnn.cli import common

Rows = Iterator[Sequence[str]]
Results = Mapping[str, Mapping[str, Any]]


def by_setting(results: Results) -> Rows:
    """Every whole run, its seeds together: how many collapsed, when, and what was learnt."""
    yield (
        'network',
        'variant',
        'seeds',
        'collapsed',
        'at step',
        'first sign',
        'accuracy, loss before',
        'and after',
        'drops',
        f'accuracy of {LEARNT} by step',
    )
    for (network, variant), runs in _grouped(results, lambda result: result.get('branch') is None):
        fell = [run['collapse'] for run in runs if run['collapse']]
        yield (
            network, variant, str(len(runs)), str(len(fell)),
            ', '.join(str(fall['step']) for fall in fell) or f'none in {_range([run["steps"] for run in runs])}',
            _range([fall['step'] - fall['first_sign'] for fall in fell if fall['first_sign'] is not None], 'before'),
            _range([fall['accuracy_before'] for fall in fell]) + ', ' + _range([fall['loss_before'] for fall in fell])
            if fell
            else ', '.join(_range([run['evaluation']['train'][name] for run in runs]) for name in ('accuracy', 'loss')),
            _range([fall['accuracy_after'] for fall in fell]) + ', ' + _range([fall['loss_after'] for fall in fell])
            if fell
            else '',
            _range([len(run['drops']) for run in runs]),
            _range([step for run in runs if (step := _learnt_by(run['curve'])) is not None]),
        )  # fmt: skip


LEARNT = 0.8
"""Accuracy of a network that has learnt most of its words."""


def _learnt_by(curve: Mapping[str, Sequence[float]]) -> int | None:
    """The last step of the first stretch of a curve with that accuracy."""
    pairs = zip(curve['step'], curve['accuracy'], strict=True)
    return next((int(step) for step, accuracy in pairs if accuracy >= LEARNT), None)


LEVELS = (6e-3, 4e-3, 2e-3, 1e-3, 1e-4, 1e-6)
"""Losses on the way; that of the mean of the targets is 8.3e-3."""


def by_speed(results: Results) -> Rows:
    """How soon every whole run learns: the median of the steps by which a loss is reached, and how many seeds do."""
    yield 'network', 'variant', 'seeds', *(f'{level:g}' for level in LEVELS), f'accuracy of {LEARNT}'
    for (network, variant), runs in _grouped(results, lambda result: result.get('branch') is None):
        reached = [[_below(run['curve'], level) for run in runs] for level in LEVELS]
        reached.append([_learnt_by(run['curve']) for run in runs])
        yield network, variant, str(len(runs)), *(_median_of(steps) for steps in reached)


def _below(curve: Mapping[str, Sequence[float]], level: float) -> int | None:
    """The last step of the first stretch of a curve with a loss below a level."""
    pairs = zip(curve['step'], curve['loss'], strict=True)
    return next((int(step) for step, loss in pairs if loss < level), None)


def _median_of(steps: Sequence[int | None]) -> str:
    known = [step for step in steps if step is not None]
    if not known:
        return ''
    return f'{np.median(known):.0f}' + (f' ({len(known)})' if len(known) < len(steps) else '')


def by_date(results: Results) -> Rows:
    """Each remedy, switched on at each date: of so many runs that would have collapsed, those that did all the same."""
    dates = list(plan.DATES)
    yield ('network', 'remedy', *(f'{date} ({share:.2g})' for date, share in plan.DATES.items()))
    found: dict[tuple[str, str], dict[str, list]] = {}
    for name, result in results.items():
        match = re.fullmatch(r'([^-]+)-([^@]+)@([^-]+)-(\d+)', name)
        if match and 'collapse' in result:
            network, remedy, date, _ = match.groups()
            found.setdefault((network, remedy), {}).setdefault(date, []).append(result['collapse'])
    for (network, remedy), at in sorted(found.items()):
        cells = []
        for date in dates:
            falls = at.get(date, [])
            fell = ', '.join(str(fall['step']) for fall in falls if fall)
            cells.append(f'{sum(map(bool, falls))} of {len(falls)}{fell and f": {fell}"}' if falls else '')
        yield network, remedy, *cells


AHEAD = (3000, 1000, 300, 100, 30)
"""Steps before a collapse."""


def creeping(results: Results) -> Rows:
    """Signals that rose or fell all the way to a collapse: how they order with time over the second half of the steps
    before it (Kendall's tau), and what they were."""
    yield ('run', 'signal', 'tau', *(f'{ahead} before' for ahead in AHEAD))
    for name, result in results.items():
        collapse = result.get('collapse')
        if not collapse or 'step_rms' not in result['curve'] or result.get('branch') is not None:
            continue
        steps = np.array(result['curve']['step'])
        until = collapse['step'] - AHEAD[-1]
        inside = (steps <= until) & (steps >= until / 2)
        ranked = []
        for signal, values in result['curve'].items():
            if signal == 'step' or inside.sum() < 8:
                continue
            levels = np.array(values, float)
            tau = stats.kendalltau(steps[inside], levels[inside]).statistic
            if np.isfinite(tau):  # not of one that stood still
                ranked.append((float(tau), signal, levels))
        for tau, signal, levels in sorted(ranked, key=lambda each: -abs(each[0]))[:12]:
            at = [levels[np.argmin(abs(steps - (collapse['step'] - ahead)))] for ahead in AHEAD]
            yield (name, signal, f'{tau:+.2f}', *(f'{value:.3g}' for value in at))


def causes(results: Results) -> Rows:
    """Every diagnosis."""
    yield 'run', 'symptom', 'cause', 'averted by', 'not by'
    for name, result in results.items():
        if 'diagnosis' not in result:
            continue
        found = result['diagnosis']
        averting = [r['name'] for r in found['remedies'] if r['outcome'] == 'averted']
        rest = [f'{r["name"]} ({r["outcome"]})' for r in found['remedies'] if r['outcome'] != 'averted']
        symptom = found['symptom'] and f'{found["symptom"]["kind"]} at {found["symptom"]["step"]}'
        why = found['cause']['why'].split(':')[0]
        yield name.removesuffix('-diagnosis'), str(symptom), why, ', '.join(averting), ', '.join(rest)


TABLES: Mapping[str, Callable[[Results], Rows]] = {
    'settings': by_setting, 'speed': by_speed, 'dates': by_date, 'creeping': creeping, 'causes': causes,
}  # fmt: skip


def _grouped(
    results: Results, wanted: Callable[[Mapping[str, Any]], bool]
) -> Iterator[tuple[tuple[str, str], list]]:
    found: dict[tuple[str, str], list] = {}
    for name, result in results.items():
        if 'collapse' in result and wanted(result):
            network, variant, _ = name.split('-')
            found.setdefault((network, variant), []).append(result)
    yield from sorted(found.items())


def _range(values: Sequence[float], unit: str = '') -> str:
    if not values:
        return ''
    least, most = f'{min(values):.3g}', f'{max(values):.3g}'
    if all(isinstance(value, int) for value in values):
        least, most = str(min(values)), str(max(values))
    return (least if least == most else f'{least} to {most}') + (f' {unit}' if unit else '')


def markdown(rows: Rows) -> Iterator[str]:
    head, *body = rows
    yield f'| {" | ".join(head)} |'
    yield f'| {" | ".join("---" for _ in head)} |'
    yield from (f'| {" | ".join(row)} |' for row in body)


def main(arguments: list[str]) -> int:
    del arguments
    results = tasks.read(RESULTS)
    for name, rows in TABLES.items():
        if flags.FLAGS.only in ('', name):
            print(f'\n## {name}\n', *markdown(rows(results)), sep='\n')
    return common.HEALTHY


if __name__ == '__main__':
    common.define('run', 'only', '', 'One table.', choices=('', *TABLES))
    common.main(main, __doc__)
