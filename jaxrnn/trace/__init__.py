"""A function evaluated equation by equation: which one's result first goes bad, and where in it.

JAX's own tools stop at a loop, and name neither the iteration nor the example. Here the jaxpr of any function is
evaluated with its real arguments. An equation that holds others (a loop, a call, a branch) is computed whole, and
opened only where something bad comes out of it: of a loop only the iterations in which another of its values goes
bad. Each value knows from which equations it came, and what its axes mean (`axes`). At the end the bad outputs
are followed back to where the first bad value was born; what was bad but reached no output is harmless.

The one module that reads jaxprs, through `jax.extend.core` alone. A file each:

findings    what a trace tells            values      values and where they came from
equations   what is inside of one         births      what was born bad, and of what kind
naming      pass, layer, line of code     evaluate    the evaluation
"""

from jaxrnn.trace.evaluate import first_bad
from jaxrnn.trace.findings import KINDS, LEAK, WRITTEN, Finding, Link, Range, Story

__all__ = ['KINDS', 'LEAK', 'WRITTEN', 'Finding', 'Link', 'Range', 'Story', 'first_bad']
