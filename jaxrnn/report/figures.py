"""What is drawn of a run, as plain data: panels over its steps, the experiments' curves, maps over time steps.

Nothing here knows how it is drawn: `plots` does so for a page, `images` for papers.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxrnn import detect, trace
from jaxrnn.detect import Detector, rule_language
from jaxrnn.diagnosis import Diagnosis
from jaxrnn.escaping import visible
from jaxrnn.experiment.outcome import ExperimentReport, Outcome
from jaxrnn.optim import signals
from jaxrnn.record import telemetry
from jaxrnn.report import sampling
from jaxrnn.types import Series

METRICS = ('loss', 'accuracy', 'cosine', 'variance_ratio')
"""Of ours, in this order; before them what somebody's own step records."""

NORMS = ('gradient_norm', 'update_norm', 'parameter_norm', 'state_rms', 'state_moved', 'learning_rate')
"""Shown of a run, beside the signals that warned."""

BESIDE = frozenset(
    (*NORMS, *telemetry.OURS, *(signal.name for signal in (*signals.OF_ADAM, *signals.OTHERS)))
)
"""What is no metric of the training."""

MOST_METRICS, MOST_SIGNALS, MOST_CURVES = 6, 6, 40
"""Panels, and curves of experiments."""

POINTS, CURVE_POINTS = 2000, 300
"""Of a line at most."""

MOST_ROWS, MOST_PLACES = 48, 128
"""Of a map. Of more time steps some are shown, evenly spread, the first and the last among them."""

TIMES = 8
"""That the largest of a line of positive numbers is as large as its smallest, for a logarithmic axis; both without the
hundredth of all that lies farthest out."""


class Line(NamedTuple):
    """Points, joined."""

    name: str
    steps: list[int]
    values: list[float]  # NaN where there is none
    kind: str = ''  # 'alarm' of a threshold; of experiments the verdict, or 'control'


class Panel(NamedTuple):
    """Lines over the same steps."""

    name: str
    lines: list[Line]
    log: bool
    means: str = ''
    bands: tuple[tuple[int, int], ...] = ()  # steps from, to, in which an alarm was on


class Mark(NamedTuple):
    """A step that is marked in every panel."""

    step: int
    kind: str  # 'began', 'bad', 'recognised', 'checkpoint'
    label: str


class HeatMap(NamedTuple):
    """A quantity by layer or gate, and by time step, in an ordinary step and in the bad one."""

    name: str
    rows: list[str]
    places: list[int]
    before: list[list[float]]  # NaN for what isn't finite
    now: list[list[float]]
    log: bool


class Figures(NamedTuple):
    """All of a run."""

    metrics: list[Panel]
    signals: list[Panel]
    marks: list[Mark]
    experiments: Panel | None
    heat_maps: list[HeatMap]


def of_records(
    columns: Series, diagnosis: Diagnosis | None, alarms: Sequence[Detector]
) -> tuple[list[Panel], list[Panel], list[str]]:
    """Panels of what a run records: its metrics, and what warned, with norms; and the signals that did not warn.

    Args:
        columns: of the run.
        diagnosis: of the run; None where there is none.
        alarms: of the run's signals.
    """
    if not columns:
        return [], [], []
    names = [name for name in columns if name != rule_language.STEP and not _is_flag(name, columns[name])]
    alarm_names = {alarm.kind for alarm in alarms}
    own = [name for name in names if name not in alarm_names and name not in BESIDE]
    own = [name for name in own if name in METRICS] if set(METRICS) <= {*own} else own  # of a run of ours
    loss = detect.loss_of(columns).field
    order = [*dict.fromkeys(n for n in (loss, *METRICS, *own) if n in own)]
    metrics = [_panel(name, columns) for name in _with_validation(order)[:MOST_METRICS]]
    warned, silent = _warned(columns, diagnosis, alarms)
    panels = [_alarm_panel(alarm, columns) for alarm in warned[:MOST_SIGNALS]]
    shown = {panel.name for panel in panels}
    more = [name for name in NORMS if name in names and name not in shown]
    panels += [_panel(name, columns) for name in more[: MOST_SIGNALS - len(panels)]]
    return metrics, panels, [alarm.kind for alarm in silent]


def of_marks(diagnosis: Diagnosis | None, checkpoints: Sequence[int]) -> list[Mark]:
    """Steps that are marked. Of one that is several things the gravest counts."""
    found: dict[int, Mark] = {step: Mark(step, 'checkpoint', 'checkpoint') for step in checkpoints}
    if diagnosis is not None and diagnosis.symptom is not None:
        symptom, onset, bad = diagnosis.symptom, diagnosis.onset_step, diagnosis.first_bad_step
        if onset is not None:
            found[onset] = Mark(onset, 'began', f'began at step {onset}')
        if bad is not None:
            found[bad] = Mark(bad, 'bad', f'first bad step {bad}')
        kind = 'your rule' if symptom.kind == detect.WHEN else shown(symptom.kind)
        found[symptom.step] = Mark(symptom.step, 'recognised', f'{kind} at step {symptom.step}')
    return [found[step] for step in sorted(found)]


def of_experiments(report: ExperimentReport | None) -> Panel | None:
    """The loss over the same steps, under one change at a time, beside the control."""
    if report is None or report.control is None:
        return None
    outcomes = [(report.control, 'control'), *((outcome, outcome.verdict) for outcome in report.outcomes)]
    outcomes += [(report.nudge, 'nudge')] if report.nudge is not None else []
    lines = [_curve(outcome, kind) for outcome, kind in outcomes if outcome.losses][:MOST_CURVES]
    if len(lines) < 2:
        return None
    return Panel('loss', lines, _is_log([value for line in lines for value in line.values]))


def with_run(panel: Panel | None, columns: Series) -> Panel | None:
    """Experiments with the run's own records in place of the control, which ends where the symptom shows."""
    control = next((line for line in panel.lines if line.kind == 'control'), None) if panel else None
    loss = detect.loss_of(columns).field if columns else None
    if panel is None or control is None or loss is None or not control.steps:
        return panel
    last = max(step for line in panel.lines for step in line.steps)
    steps = columns[rule_language.STEP]
    within = (steps >= control.steps[0]) & (steps <= last)
    if not within.any():
        return panel
    run = _line(
        'the run', steps[within], np.asarray(columns[loss], np.float64)[within], 'control', CURVE_POINTS
    )
    return panel._replace(lines=[run, *(line for line in panel.lines if line is not control)])


def of_comparison(comparison: trace.Comparison | None) -> list[HeatMap]:
    """Maps over time steps; one for each length, as layers may run over different ones."""
    if comparison is None:
        return []
    groups: dict[tuple[str, tuple[int, ...]], list[trace.OverTime]] = {}
    for one in comparison.over_time:
        groups.setdefault((one.kind, one.places), []).append(one)
    titles = {
        'saturated': 'Saturated gates, share of values',
        'gradient': 'Gradient that arrives from later time steps, norm',
    }
    made = []
    for (kind, places), found in groups.items():
        found = found[:MOST_ROWS]
        seen = np.unique(np.linspace(0, len(places) - 1, min(len(places), MOST_PLACES)).astype(int))
        before = [_or_nan(np.array(one.before)[seen]) for one in found]
        now = [_or_nan(np.array(one.now)[seen]) for one in found]
        names = [one.name for one in found]
        made.append(HeatMap(titles[kind], names, [places[n] for n in seen], before, now, kind == 'gradient'))
    return made


def _panel(name: str, columns: Series) -> Panel:
    steps = columns[rule_language.STEP]
    values = np.asarray(columns[name], np.float64)
    lines = [_line(name, steps, values)]
    validation = f'val_{name}'
    if validation in columns:
        known = np.isfinite(np.asarray(columns[validation], np.float64))
        lines.append(_line(validation, steps[known], np.asarray(columns[validation], np.float64)[known]))
    return Panel(shown(name), lines, _is_log(values, every='loss' in name))


def _with_validation(names: Sequence[str]) -> list[str]:
    """Without those that are drawn beside what they validate."""
    return [name for name in names if not (name.startswith('val_') and name.removeprefix('val_') in names)]


def _line(name: str, steps: np.ndarray, values: np.ndarray, kind: str = '', most: int = POINTS) -> Line:
    places = sampling.kept(values, most)
    return Line(shown(name), [int(step) for step in steps[places]], _or_nan(values[places]), kind)


def _or_nan(values: Sequence[float] | np.ndarray) -> list[float]:
    """A NaN where there is nothing to draw."""
    return [float(value) if math.isfinite(value) else math.nan for value in values]


def _curve(outcome: Outcome, kind: str) -> Line:
    losses = np.array(outcome.losses, np.float64)
    steps = np.arange(outcome.reached - losses.size, outcome.reached)
    return _line(outcome.change.name, steps, losses, kind, CURVE_POINTS)


def _is_log(values: Any, *, every: bool = False) -> bool:
    """every: whether the farthest out count, too, as of a loss, whose first values are far above the rest."""
    found = np.asarray(values, np.float64)
    found = found[np.isfinite(found)]
    if not found.size or found.min() <= 0:
        return False
    low, high = (found.min(), found.max()) if every else np.quantile(found, (0.01, 0.99))
    return bool(high >= TIMES * low)


def _is_flag(name: str, values: np.ndarray) -> bool:
    return (
        name.startswith('finite_')
        or values.dtype == bool
        or values.dtype.kind not in 'iuf'
        or not np.isfinite(values).any()
    )


def _warned(
    columns: Series, diagnosis: Diagnosis | None, alarms: Sequence[Detector]
) -> tuple[list[Detector], list[Detector]]:
    """Alarms of which the run has the fields: those that were on before the symptom, the earliest first, and the
    others; without a symptom the second are none."""
    known = [alarm for alarm in detect.applicable(columns, alarms) if alarm.kind in columns]
    if diagnosis is None or diagnosis.symptom is None:
        return [alarm for alarm in known if rule_language.holds(alarm.rule, columns).any()], []
    since = {alarm.signal: alarm.step for alarm in detect.onsets(columns, diagnosis.symptom, alarms)}
    on = [alarm for alarm in known if alarm.kind in since]
    return sorted(on, key=lambda alarm: since[alarm.kind]), [a for a in known if a.kind not in since]


def _alarm_panel(alarm: Detector, columns: Series) -> Panel:
    panel = _panel(alarm.kind, columns)
    steps = columns[rule_language.STEP]
    threshold = rule_language.threshold(alarm.rule, columns)
    lines = panel.lines
    if threshold is not None:
        lines = [*lines, _line('alarm', steps, threshold, 'alarm')]
    return panel._replace(lines=lines, means=alarm.means, bands=_stretches(alarm, columns))


def _stretches(alarm: Detector, columns: Series) -> tuple[tuple[int, int], ...]:
    """Steps in which it was on, without breaks that still count as on."""
    steps = columns[rule_language.STEP]
    places = np.flatnonzero(rule_language.holds(alarm.rule, columns))
    if not places.size:
        return ()
    ends = np.flatnonzero(np.diff(places) - 1 > detect.HYSTERESIS)
    starts, stops = places[[0, *(ends + 1)]], places[[*ends, -1]]
    return tuple((int(steps[a]), int(steps[b])) for a, b in zip(starts, stops, strict=True))


def to_json(figures: 'Panel | Sequence[HeatMap] | None') -> Any:
    """The experiments' curves, or maps, as JSON has them; a NaN is null there."""
    if figures is None:
        return None
    if isinstance(figures, Panel):
        return {
            'name': figures.name,
            'log': figures.log,
            'lines': [_finite(line._asdict()) for line in figures.lines],
        }
    return [_finite(each._asdict()) for each in figures]


def panel_of(found: Any) -> Panel | None:
    """What `to_json` made of a panel. Raises KeyError, TypeError or ValueError for anything else."""
    if found is None:
        return None
    lines = [
        Line(text_of(one['name']), whole(one['steps']), _numbers(one['values']), text_of(one['kind']))
        for one in found['lines']
    ]
    if any(len(line.steps) != len(line.values) for line in lines):
        raise ValueError('a line has as many steps as values')
    if len(lines) > MOST_CURVES or any(len(line.steps) > 2 * CURVE_POINTS for line in lines):
        raise ValueError(f'up to {MOST_CURVES} lines of {2 * CURVE_POINTS} points expected')
    return Panel(text_of(found['name']), lines, bool(found['log']))


def heat_maps_of(found: Any) -> list[HeatMap]:
    """Likewise of maps."""
    made = [
        HeatMap(
            text_of(one['name']),
            [text_of(row) for row in one['rows']],
            whole(one['places']),
            [_numbers(row) for row in one['before']],
            [_numbers(row) for row in one['now']],
            bool(one['log']),
        )
        for one in found
    ]
    for one in made:
        sizes = {len(row) for row in (*one.before, *one.now)} | {len(one.places)}
        if len(sizes) != 1 or {len(one.before), len(one.now)} != {len(one.rows)}:
            raise ValueError('a map has a number for each row and time step')
        if not (0 < len(one.rows) <= MOST_ROWS and 0 < len(one.places) <= MOST_PLACES):
            raise ValueError(f'a map has up to {MOST_ROWS} rows and {MOST_PLACES} time steps')
    return made


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {name: _finite(each) for name, each in value.items()}
    return [_finite(each) for each in value] if isinstance(value, list | tuple) else value


def text_of(found: Any) -> str:
    """A text, as it is shown. Raises TypeError for anything else."""
    if not isinstance(found, str):
        raise TypeError(f'{type(found).__name__} found, a text expected')
    return shown(found)


def shown(name: str) -> str:
    """A name as it is drawn: all of it can be seen, and no two dollars, for which Bokeh would ask for MathJax."""
    return visible(name).replace('$$', '$ $')


def whole(found: Any) -> list[int]:
    """Whole numbers that a float holds. Raises TypeError for anything else."""
    if any(type(each) is not int or abs(each) > 2**53 for each in found):
        raise TypeError('whole numbers expected')
    return list(found)


def _numbers(found: Any) -> list[float]:
    return [math.nan if each is None else float(each) for each in found]
