"""What a person reads: a diagnosis, one step looked into, the records around it.

runs        of whole runs             steps   of one step
diagnoses   of a whole diagnosis      text    numbers, places, tables
"""

from jaxrnn.report.diagnoses import advised, diagnosed
from jaxrnn.report.runs import bisected, trained
from jaxrnn.report.steps import look_json, looked

__all__ = ['advised', 'bisected', 'diagnosed', 'look_json', 'looked', 'trained']
