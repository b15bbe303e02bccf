"""A function evaluated equation by equation: which one's result first goes bad, and where in it.

JAX's own tools stop at a loop, and name neither the iteration nor the example. Here the jaxpr of any function is
evaluated with its real arguments. An equation that holds others (a loop, a call, a branch) is computed whole, and
opened only where something bad comes out of it: of a loop only the iterations in which another of its values goes
bad. Each value knows from which equations it came, and what its axes mean (`axes`). At the end the bad outputs
are followed back to where the first bad value was born; what was bad but reached no output is harmless.

A step in which all is finite is compared with an earlier one instead: every equation's size in both. Computed in
float64 beside itself, it shows where digits are lost.

The one module that reads jaxprs, through `jax.extend.core` alone. A file each:

findings    what a trace tells            values      values and where they came from
equations   what is inside of one         births      what was born bad, and of what kind
naming      pass, layer, line of code     evaluate    the evaluation
retrace     a step compiled once more, with what is noticed of each value
probe       a step that measures itself   change      what a finite step did otherwise than an earlier one
shadow      a step in float64 beside itself
sharded     values that differ by device      times       which time step a value is of
"""

from jaxrnn.trace.comparison import (
    ABSURD,
    Comparison,
    Example,
    Layer,
    Leap,
    Pair,
    Saturation,
    TimeStepGradient,
    compare,
)
from jaxrnn.trace.evaluate import first_bad
from jaxrnn.trace.findings import KINDS, LEAK, MOST_EXAMPLES, WRITTEN, Finding, Link, Range, TraceReport
from jaxrnn.trace.shadow import LOST, PrecisionLoss, PrecisionReport, lost_precision

__all__ = [
    'ABSURD',
    'KINDS',
    'LEAK',
    'LOST',
    'MOST_EXAMPLES',
    'WRITTEN',
    'Comparison',
    'Example',
    'Finding',
    'Layer',
    'Leap',
    'Link',
    'Pair',
    'PrecisionLoss',
    'PrecisionReport',
    'Range',
    'Saturation',
    'TimeStepGradient',
    'TraceReport',
    'compare',
    'first_bad',
    'lost_precision',
]
