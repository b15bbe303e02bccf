"""What a person reads: a diagnosis, one step inspected, the records around it.

runs        of whole runs             steps   of one step
diagnoses   of a whole diagnosis      text    numbers, places, tables
"""

import io

from rich.console import Console

from jaxrnn import diagnosis
from jaxrnn.report.diagnoses import advised_flags, render_diagnosis
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
]


def _as_text(found: diagnosis.Diagnosis) -> str:
    """The screen, without colours."""
    console = Console(file=io.StringIO(), width=100, color_system=None, markup=False, emoji=False)
    console.print(render_diagnosis(found, None), highlight=False)
    return console.file.getvalue().rstrip()  # type: ignore[attr-defined]


diagnosis.as_text = _as_text  # type: ignore[assignment]
