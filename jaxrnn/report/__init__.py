"""What a person reads: a diagnosis, one step inspected, the records around it; on a terminal, or on a page.

runs        of whole runs             steps       of one step
diagnoses   of a whole diagnosis      text        numbers, places, tables
sections    of what both are made     evidence    what a page needs, kept with the run
figures     what is drawn, as data    sampling    many points as few
plots       drawn by Bokeh            page        report.html, by templates/
images      drawn for papers          watching    a run that still trains
"""

import io
import os
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from jaxrnn import detect, diagnosis
from jaxrnn.bisect.inspection import Inspection
from jaxrnn.experiment.outcome import ExperimentReport
from jaxrnn.package import make_callable
from jaxrnn.record import layout
from jaxrnn.report import evidence, sections
from jaxrnn.report.diagnoses import advised_flags, diagnosis_sections, render_diagnosis
from jaxrnn.report.runs import render_bisection, render_neighbours, render_training
from jaxrnn.report.steps import inspection_json, render_inspection

__all__ = [
    'advised_flags',
    'inspection_json',
    'render_bisection',
    'render_diagnosis',
    'render_inspection',
    'render_neighbours',
    'render_training',
    'report',
]


def report(
    directory: str | os.PathLike,
    diagnosis: diagnosis.Diagnosis | None = None,
    experiments: ExperimentReport | None = None,
    *,
    inspected: Inspection | None = None,
    words: Sequence[str] = (),
    command: str = '',
    alarms: Sequence[detect.Detector] = detect.ALARMS,
) -> Path:
    """Makes the page of a run, `report.html` in its directory: what broke, when it began, why, and what to do. It is
    one file that asks nobody for anything.

    Args:
        directory: of the run.
        diagnosis, experiments: of `jaxrnn.diagnose`. They are kept with the run; without them the page has what was
            kept before, if anything, beside the records.
        inspected: the first bad step, if that isn't among the experiments.
        words: what the examples of the first bad step's batch are called.
        command: trains as is advised.
        alarms: of the run's signals, as `jaxrnn.diagnose` had them.

    Returns:
        Where the page is.

    Raises:
        UserError: there is no run, its files can't be read, or nothing can be written.

    >>> import tempfile
    >>> import numpy as np
    >>> def step(x, batch):
    ...     return x * batch, {'loss': x}
    >>> with tempfile.TemporaryDirectory() as directory:
    ...     _ = jaxrnn.record(step, lambda k: np.float32(1.1), lambda: 1.0, directory, max_steps=100)
    ...     page = jaxrnn.report(directory)
    ...     print(page.name, page.stat().st_size < 2e6)
    report.html True
    """
    from jaxrnn.report import page  # Bokeh takes its time

    if diagnosis is not None:
        if inspected is None and experiments is not None:
            inspected = experiments.inspected
        found = evidence.of(diagnosis, experiments, inspected, words, command=command)
        layout.write_json(layout.Paths(Path(directory)).diagnosis, diagnosis.to_json())
        evidence.write(Path(directory), found)
    return page.write(directory, alarms)


def _as_text(found: diagnosis.Diagnosis) -> str:
    """The screen, without colours."""
    console = Console(file=io.StringIO(), width=100, color_system=None, markup=False, emoji=False)
    console.print(render_diagnosis(found, None), highlight=False)
    return console.file.getvalue().rstrip()  # type: ignore[attr-defined]


def _as_html(found: diagnosis.Diagnosis) -> str:
    from jaxrnn.report import page  # Jinja and Bokeh take their time

    return page.fragment([sections.plain(section) for section in diagnosis_sections(found, None)])


diagnosis.as_text = _as_text  # type: ignore[assignment]
diagnosis.as_html = _as_html  # type: ignore[assignment]
make_callable(__name__, report)
