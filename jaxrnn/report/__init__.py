"""What a person reads: a diagnosis, one step inspected, the records around it.

runs        of whole runs             steps   of one step
diagnoses   of a whole diagnosis      text    numbers, places, tables
"""

from jaxrnn.report.diagnoses import advised_flags, render_diagnosis
from jaxrnn.report.runs import render_bisection, render_training
from jaxrnn.report.steps import inspection_json, render_inspection

__all__ = [
    'advised_flags',
    'inspection_json',
    'render_bisection',
    'render_diagnosis',
    'render_inspection',
    'render_training',
]
