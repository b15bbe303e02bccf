"""One page on a run, `report.html`: a single file that asks nobody for anything."""

import functools
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import numpy as np

from jaxrnn import detect, environment, files
from jaxrnn.bisect import replay
from jaxrnn.detect import Detector, rule_language
from jaxrnn.diagnosis import Diagnosis
from jaxrnn.escaping import visible
from jaxrnn.record import checkpoint, layout
from jaxrnn.record.record_file import RecordFile
from jaxrnn.record.records import Records, series
from jaxrnn.report import evidence as kept
from jaxrnn.report import figures, plots
from jaxrnn.report.text import number
from jaxrnn.types import UserError

LEVEL = 16
"""Steps of which the median is the level of a loss."""

MOST_REACHED = 8
"""Fields of a record that are named."""

SIDE = ('verdict', 'place', 'advice')
"""Sections at the top, without a heading of their own."""


class Contents(NamedTuple):
    """What a page is made of; see `read`."""

    title: str
    records: Records
    evidence: kept.PageEvidence | None
    checkpoints: Sequence[int]
    went_on: bool = False  # whether there are records that the diagnosis didn't see

    @property
    def diagnosis(self) -> Diagnosis | None:
        return None if self.evidence is None else self.evidence.diagnosis


def write(
    directory: str | os.PathLike, alarms: Sequence[Detector] = detect.ALARMS, *, path: str | os.PathLike = ''
) -> Path:
    """Makes the page of a run, from its records and from what `diagnose` left there, if anything.

    Args:
        directory: of the run.
        alarms: of the run's signals.
        path: where the page is put; `report.html` in the run if not given.

    Returns:
        Where it is.

    Raises:
        UserError: there is no run, or its files can't be read, or nothing can be written there.
    """
    paths = layout.Paths(Path(directory))
    made = of(read(paths.root), alarms)
    target = Path(path) if path else paths.page
    try:
        files.write_bytes(target, made.encode())
    except OSError as error:
        raise UserError(f'{target} can not be written ({error.strerror})') from error
    return target


def read(root: Path) -> Contents:
    """What there is of a run. Raises UserError where there is none, or it can't be read."""
    paths = layout.Paths(root)
    files.check_within(root)
    records = RecordFile(paths.records).read()
    steps = checkpoint.Checkpoints(paths.checkpoints).steps()
    if not len(records) and not steps:
        raise UserError(f'--run_dir: {root} holds no run: it has no records and no checkpoints')
    evidence = kept.read(root)
    went_on = evidence is not None and kept.size_of(root) > evidence.size
    return Contents(root.resolve().name, records, evidence, steps, went_on)


def figures_of(
    contents: Contents, alarms: Sequence[Detector] = detect.ALARMS
) -> tuple[figures.Figures, list[str]]:
    """What is drawn of a run, and the signals that did not warn."""
    diagnosis, evidence = contents.diagnosis, contents.evidence
    columns = series(contents.records) if len(contents.records) else {}
    metrics, signals, silent = figures.of_records(columns, diagnosis, alarms)
    made = figures.Figures(
        metrics,
        signals,
        figures.of_marks(diagnosis, contents.checkpoints),
        None if evidence is None else figures.with_run(evidence.experiments, columns),
        [] if evidence is None else evidence.heat_maps,
    )
    return made, silent


def of(contents: Contents, alarms: Sequence[Detector] = detect.ALARMS, *, live: str = '') -> str:
    """The page, as HTML; one that is served, and looks whether it is still as it was `live`, if that is given."""
    diagnosis, evidence = contents.diagnosis, contents.evidence
    drawn, silent = figures_of(contents, alarms)
    script, places = plots.drawn(drawn)
    sections = {} if evidence is None else {section['name']: section for section in evidence.sections}
    return (
        _templates()
        .get_template('page.html')
        .render(
            title=visible(contents.title),
            live=live,
            went_on=contents.went_on,
            undiagnosed=undiagnosed(contents),
            side=[sections[name] for name in SIDE if name in sections],
            sections=sections,
            command='' if evidence is None else evidence.command,
            way=None if evidence is None else evidence.way,
            marks=[mark for mark in drawn.marks if mark.kind != 'checkpoint'],
            mark_colours={kind: colour for kind, (colour, *_) in plots.MARKS.items()},
            signals=drawn.signals,
            silent=silent,
            warned=sum(bool(panel.means) for panel in drawn.signals),
            course=_course(contents),
            bad_step=None if diagnosis is None else diagnosis.first_bad_step,
            reached=_reached(contents),
            heat_maps=[
                (each.name, places['heat_maps'][plots.OF_A_MAP * n : plots.OF_A_MAP * (n + 1)])
                for n, each in enumerate(drawn.heat_maps)
            ],
            places=places,
            script=script,
            bokeh=plots.script_of_bokeh() if script else '',
            versions={visible(name): visible(value) for name, value in _versions(diagnosis).items()},
            steps=len(contents.records),
        )
    )


def _course(contents: Contents) -> str:
    """What became of the loss."""
    symptom = None if contents.diagnosis is None else contents.diagnosis.symptom
    if contents.diagnosis is None or symptom is None or not len(contents.records):
        return ''
    columns = series(contents.records)
    loss = detect.loss_of(columns).field
    if loss is None:
        return ''
    steps, values = columns[rule_language.STEP], columns[loss]
    began = symptom.step if contents.diagnosis.onset_step is None else contents.diagnosis.onset_step
    windows = (steps >= began - LEVEL) & (steps < began), steps > steps[-1] - LEVEL
    levels = [float(np.median(values[window])) for window in windows if window.any()]
    at = values[steps == symptom.step]
    if len(levels) < 2 or not at.size:
        return ''
    before, end = map(number, levels)
    there = f'{number(float(at[0]))} at step {symptom.step}'
    return f'{visible(loss)}: {before} before that, {there}, {end} at the end of the records'


def _reached(contents: Contents) -> list[str]:
    """What isn't finite in the record of the first bad step."""
    step = None if contents.diagnosis is None else contents.diagnosis.first_bad_step
    row = None if step is None else contents.records.at(step)
    bad = (
        name for name, value in (row or {}).items() if isinstance(value, float) and not math.isfinite(value)
    )
    return [visible(name) for name in bad][:MOST_REACHED]


def _versions(diagnosis: Diagnosis | None) -> dict[str, str]:
    """Those that a diagnosis was made with; else those that make the page."""
    return environment.versions() if diagnosis is None else diagnosis.versions


def fragment(sections: Sequence[Mapping[str, Any]]) -> str:
    """Sections for a notebook: a piece of HTML, without a script."""
    return (
        _templates()
        .get_template('fragment.html')
        .render(sections=[each for each in sections if each['body']])
    )


@functools.cache
def _templates() -> jinja2.Environment:
    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).with_name('templates')),
        autoescape=True,
        auto_reload=False,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def verdict(contents: Contents) -> str:
    """What is known of a run, as text."""
    sections = [] if contents.evidence is None else contents.evidence.sections
    lines = [
        ''.join(text for text, _ in line)
        for section in sections
        if section['name'] == 'verdict'
        for part in section['body']
        for line in part.get('lines', ())
    ]
    return '\n'.join(lines) or undiagnosed(contents)


def undiagnosed(contents: Contents) -> str:
    """What is said of a run that nobody diagnosed yet; '' of one that is."""
    if contents.evidence is not None:
        return ''
    columns = series(contents.records) if len(contents.records) else {}
    symptom = replay.of_records(columns, loss=detect.loss_of(columns).field).symptom
    if symptom is not None:
        return f'{symptom.kind} at step {symptom.step}, by the records; not diagnosed yet'
    return 'no symptom in the records; not diagnosed yet'
