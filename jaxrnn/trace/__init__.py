"""A function evaluated equation by equation: which one's result goes bad first, and where in it.

JAX's own tools stop at a loop. They name neither the iteration nor the example. Here the jaxpr of any function is
evaluated with its real arguments. An equation that holds others (a loop, a call, a branch) is computed whole. It is
opened only if something bad comes out of it, and of a loop only those iterations in which another of its values goes
bad. For each value it is known from which equations it came, and what its axes mean. At the end the bad outputs are
followed back to where the first bad value was born. What was bad but reached no output is harmless.

A step whose values are all finite can be compared with an earlier one: how large each equation's result is in both.
Or it is computed in float64, too: then it shows where digits are lost.

No other package reads jaxprs, and this one reads them through `jax.extend.core` alone. Its files, from the ground up:

What every file knows:
    findings    the report of a trace, and the kinds of findings
    axes        what the axes of a value mean, from one equation to the next
    values      values and where they came from: nodes, and the tape that holds them
    equations   what is inside an equation, and one equation as a function
    devices     on which devices an equation is computed, inside a shard_map and outside

`first_bad`, the first NaN or infinity:
    tracing     the function as a jaxpr, its arguments, and which axes run over examples
    evaluate    the evaluation: equation by equation; loops, calls and branches are opened
    meaning     what axes mean, followed through a whole jaxpr
    sharded     what axes mean inside a shard_map
    times       which axis is time, and which time step a value belongs to
    births      rules: which elements were born bad, and of what kind
    judging     those rules applied to each result of an evaluation
    culprits    which examples a bad value is due to, found out by putting others in their place
    naming      pass, layer, line of code, and the equations that led there
    reporting   from all that was born bad to the first of it that reached an output

`compiled_otherwise`, a step whose equations are finite, but not compiled together:
    compiled    the smallest piece of a program whose compiled form differs from its equations

`averages.decay`, an optimiser's constants:
    averages    by what a step multiplies the averages in its state

`listing`, whether a function is another than it was:
    listing     its equations as lines of text

`compare` and `lost_precision`, a step whose values are finite:
    retrace     a step compiled once more, which also returns measurements of its values
    measure     how large each value is
    comparison  how a step differs from an earlier one
    widening    a step that computes in float64 whatever types are written in it
    float64     a step computed in float64 beside itself: where it loses digits

>>> import jax.numpy as jnp
>>> report = trace.first_bad(lambda x: jnp.sqrt(jnp.log(x)), jnp.array([1.0, 0.5, 2.0]), names=['x'])
>>> report.finding.op, report.finding.kind, report.finding.elements
('sqrt', 'invalid argument', 1)
"""

from jaxrnn.trace.comparison import (
    ABSURD,
    LARGE,
    Comparison,
    Example,
    Layer,
    Leap,
    Outlying,
    OverTime,
    Pair,
    Saturation,
    TimeStepGradient,
    compare,
    leading,
)
from jaxrnn.trace.compiled import CompiledDifference, compiled_otherwise
from jaxrnn.trace.evaluate import first_bad
from jaxrnn.trace.findings import (
    KINDS,
    LEAK,
    MOST_EXAMPLES,
    OUT_OF_RANGE,
    WRITTEN,
    ZERO_BY_ZERO,
    Finding,
    Link,
    Range,
    TraceReport,
)
from jaxrnn.trace.float64 import LOST, PrecisionLoss, PrecisionReport, lost_precision
from jaxrnn.trace.widening import widened

__all__ = [
    'ABSURD',
    'KINDS',
    'LARGE',
    'LEAK',
    'LOST',
    'MOST_EXAMPLES',
    'OUT_OF_RANGE',
    'WRITTEN',
    'ZERO_BY_ZERO',
    'Comparison',
    'CompiledDifference',
    'Example',
    'Finding',
    'Layer',
    'Leap',
    'Link',
    'Outlying',
    'OverTime',
    'Pair',
    'PrecisionLoss',
    'PrecisionReport',
    'Range',
    'Saturation',
    'TimeStepGradient',
    'TraceReport',
    'compare',
    'compiled_otherwise',
    'first_bad',
    'leading',
    'lost_precision',
    'widened',
]
