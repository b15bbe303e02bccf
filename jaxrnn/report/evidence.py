"""What a diagnosis found beside its fields, kept with the run: a page can be made of it without replaying a step.

`evidence.json` has the sections that the terminal printed, as plain data, and the numbers of figures that aren't
records. It is read as all of a run is: it may be a stranger's.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jaxrnn import files, trace
from jaxrnn.bisect.inspection import Inspection
from jaxrnn.diagnosis import Diagnosis, Symptom
from jaxrnn.escaping import all_visible, visible
from jaxrnn.experiment.outcome import ExperimentReport
from jaxrnn.record import layout
from jaxrnn.report import figures, sections, steps
from jaxrnn.report.diagnoses import diagnosis_sections

FORMAT = 1
"""Of evidence.json."""


class Way(NamedTuple):
    """How a value that isn't finite came to be: each link as a person reads it, the first operation first."""

    links: list[str]
    broke: str


class PageEvidence(NamedTuple):
    """All that a page has of a diagnosis."""

    diagnosis: Diagnosis  # its steps and versions alone
    sections: list[dict[str, Any]]  # as `sections.plain` makes them
    experiments: figures.Panel | None
    heat_maps: list[figures.HeatMap]
    way: Way | None
    command: str  # that trains as advised; '' where there is none
    size: int = 0  # of the records' file, in bytes, when it was diagnosed


def of(
    diagnosis: Diagnosis,
    report: ExperimentReport | None,
    inspected: Inspection | None = None,
    words: Sequence[str] = (),
    *,
    command: str = '',
) -> PageEvidence:
    """The evidence of a diagnosis. Arguments as of `diagnosis_sections`; `command` trains as advised."""
    made = [sections.plain(each) for each in diagnosis_sections(diagnosis, report, inspected, words)]
    comparison = None if inspected is None else inspected.comparison
    return PageEvidence(
        diagnosis,
        [section for section in made if section['body']],
        figures.of_experiments(report),
        figures.of_comparison(comparison),
        _way(inspected),
        visible(command),
    )


def write(directory: Path, evidence: PageEvidence) -> None:
    """Keeps it with a run. Raises UserError where nothing can be written."""
    fields = {
        'format': FORMAT,
        'diagnosis': _as_steps(evidence.diagnosis),
        'sections': evidence.sections,
        'experiments': figures.to_json(evidence.experiments),
        'heat_maps': figures.to_json(evidence.heat_maps),
        'way': None if evidence.way is None else evidence.way._asdict(),
        'command': evidence.command,
        'size': size_of(directory),
    }
    layout.write_json(layout.Paths(directory).evidence, files.sealed(fields))


def size_of(directory: Path) -> int:
    """Of a run's records, in bytes; 0 where there are none."""
    try:
        return layout.Paths(directory).records.stat().st_size
    except OSError:
        return 0


def read(directory: Path) -> PageEvidence | None:
    """That of a run; None where there is none. Raises UserError for what can't be read, or is of a newer release."""
    path = layout.Paths(directory).evidence
    found = files.read_notes(path, FORMAT)
    if found is None:
        return None
    try:
        if not all(map(sections.is_plain, found['sections'])):
            raise ValueError('sections of lines and tables expected')
        return PageEvidence(
            _of_steps(found['diagnosis']),
            all_visible(list(found['sections'])),
            figures.panel_of(found['experiments']),
            figures.heat_maps_of(found['heat_maps']),
            _way_of(found['way']),
            figures.text_of(found['command']),
            *figures.whole([found['size']]),
        )
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise files.not_as_written(path, error) from None


def _as_steps(diagnosis: Diagnosis) -> dict[str, Any]:
    symptom = diagnosis.symptom
    return {
        'symptom': None if symptom is None else [symptom.kind, symptom.step],
        'first_bad_step': diagnosis.first_bad_step,
        'onset_step': diagnosis.onset_step,
        'versions': diagnosis.versions,
    }


def _of_steps(found: Any) -> Diagnosis:
    symptom = None if found['symptom'] is None else Symptom(*found['symptom'])
    steps = [found['first_bad_step'], found['onset_step'], symptom.step if symptom else None]
    figures.whole([step for step in steps if step is not None])
    texts = [*([symptom.kind] if symptom else []), *found['versions'], *found['versions'].values()]
    if not all(isinstance(text, str) for text in texts):
        raise TypeError('texts expected')
    return Diagnosis(
        symptom=symptom,
        first_bad_step=found['first_bad_step'],
        onset_step=found['onset_step'],
        versions=dict(found['versions']),
    )


def _way(inspected: Inspection | None) -> Way | None:
    finding = None if inspected is None or inspected.trace_report is None else inspected.trace_report.finding
    if finding is None:
        return None
    links = [f'{link.op} at {steps.short(link.source)}' for link in reversed(finding.chain)]
    given = '; '.join(steps.in_words(operand) for operand in finding.operands)
    links += [given] if given else []
    at = f'{finding.op} at {steps.short(finding.source)}' if finding.source else finding.op
    if finding.op == 'input':  # it was there from the beginning
        at = '; '.join(steps.in_words(result) for result in finding.results)
    made = all_visible((links, f'{at}: {trace.KINDS[finding.kind]}'))
    return Way(list(made[0]), made[1])


def _way_of(found: Any) -> Way | None:
    if found is None:
        return None
    return Way([figures.text_of(link) for link in found['links']], figures.text_of(found['broke']))
