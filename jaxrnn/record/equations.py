"""The equations of a step as text, kept with a run: whether a replay is of the program that trained.

Text, not code: nothing of it is ever run.
"""

import itertools
import logging
from collections.abc import Callable, Iterable
from pathlib import Path

import jax

from jaxrnn import files
from jaxrnn.trace.listing import listing
from jaxrnn.types import Step, Tree, UserError

log = logging.getLogger('jaxrnn')

MOST_BYTES = 16 << 20
"""Of a step's equations. Those of a network of a hundred layers have 300 kB."""

SHOWN = 100
"""Characters of an equation."""


def written(step: Step, state: Tree, batch: Tree) -> str | None:
    """A step's equations for values of these shapes, which stand in the first line; None where it can't be traced."""
    try:
        found = listing(step, state, batch)
    except Exception as error:  # what isn't traced as a whole; JAX raises whatever it likes
        log.debug('no equations of the step: %s', error)
        return None
    text = '\n'.join([shapes_of(batch), *found, ''])
    return text if len(text.encode()) <= MOST_BYTES else None


def shapes_of(batch: Tree) -> str:
    """Of its arrays, as `float32[16,8] int32[16]`."""
    return ' '.join(
        f'{leaf.dtype}[{",".join(map(str, leaf.shape))}]'
        for leaf in jax.tree.leaves(jax.eval_shape(lambda: batch))
    )


def read(path: Path) -> str | None:
    """What was kept; None where nothing was. Raises UserError for what can't be read."""
    try:
        return files.read_text(path, MOST_BYTES)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise UserError(f'{path} can not be read ({error.strerror})') from error


def difference(was: str, step: Step, state: Tree, batches: Iterable[Callable[[], Tree]]) -> str:
    """What is said where a step has other equations than those that were kept; '' where not, or where that can't be
    known.

    Args:
        was: what was kept.
        step: that a replay would take.
        state: that it takes.
        batches: of which one has the shapes that stand in it.
    """
    shapes = was.partition('\n')[0]
    for made in batches:
        batch = made()
        if shapes_of(batch) == shapes:
            break
    else:
        return ''
    now = written(step, state, batch)
    if now is None or now == was:
        return ''
    lines = itertools.zip_longest(was.splitlines(), now.splitlines(), fillvalue='nothing')
    number, old, new = next((n, a, b) for n, (a, b) in enumerate(lines) if a != b)
    return f'equation {number} is `{_short(new)}`, and was `{_short(old)}` when it was recorded'


def _short(line: str) -> str:
    line = line.strip()
    return line if len(line) <= SHOWN else f'{line[:SHOWN]}…'
