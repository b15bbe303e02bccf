"""How often does a trace name the operation, line, layer, pass, time step and example of a planted fault, and what
do jax_debug_nans and checkify name of it?

    python benchmarks/trace_faults.py --json

Every kind of fault (tests/breaks.py) in each of its places in eleven train steps (tests/faulty.py): those written
around the cells of plain JAX, nnx, linen, haiku and equinox, and jaxrnn's networks, with a loop over time and unrolled.
Time steps and examples, one or two, are random; each has its turn.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path[0] = str(ROOT)
sys.path.insert(1, str(ROOT / 'tests'))

import collections
import re
import time
import traceback
from typing import Any

import faulty
import jax
from absl import flags
from jax.experimental import checkify
from rich.console import Console
from rich.progress import track
from rich.table import Table

from jaxrnn import environment
from jaxrnn.cli import common
from jaxrnn.types import UserError

CLEAR_EVERY = 40
"""Faults after which compiled programs are dropped: each takes mappings of memory, of which a process has 65,530."""

ASKED = ('finding', 'op', 'source', 'kind', 'pass_', 'layer', 'time_step', 'examples')


def by_debug_nans(fault: faulty.Fault) -> dict[str, bool]:
    """Whether jax_debug_nans names the primitive and the line."""
    kind = faulty.KINDS[fault.kind]
    step, state, batch, source = faulty.planted(fault)
    with faulty.strike_at(fault.place, fault.kind), jax.debug_nans(True), jax.debug_infs(True):
        try:
            jax.block_until_ready(jax.jit(step)(state, batch))
        except Exception as error:
            # Of a function that is jitted within another, jax 0.10.2 may let an internal error of this name through.
            if 'FloatingPointError' not in type(error).__name__:
                raise
            named = re.search(r'encountered in (\S+?)\.?\s', f'{error} ')
            op = bool(named) and named[1] in kind.ops
            return {'finding': True, 'op': op, 'source': source in _lines(error)}
    return {'finding': False, 'op': False, 'source': False}


def by_checkify(fault: faulty.Fault) -> dict[str, bool]:
    """Whether checkify.float_checks names the primitive and, when thrown, the line."""
    kind = faulty.KINDS[fault.kind]
    step, state, batch, source = faulty.planted(fault)
    with faulty.strike_at(fault.place, fault.kind):
        error, _ = jax.jit(checkify.checkify(step, errors=checkify.float_checks))(state, batch)
    said = error.get()
    if said is None:
        return {'finding': False, 'op': False, 'source': False}
    named = re.search(r'primitive: (\w+)', said)
    op = (bool(named) and named[1] in kind.ops) or ('division by zero' in said and 'div' in kind.ops)
    try:
        error.throw()
    except Exception as thrown:
        return {'finding': True, 'op': op, 'source': source in _lines(thrown)}
    raise AssertionError('an error that does not throw')


def _lines(error: BaseException | None) -> set[str]:
    """All that the tracebacks of an error, and of what caused it, name."""
    found: set[str] = set()
    while error is not None:
        found |= {f'{frame.filename}:{frame.lineno}' for frame in traceback.extract_tb(error.__traceback__)}
        error = error.__cause__ or error.__context__
    return found


def main(arguments: list[str]) -> int:
    del arguments
    values = flags.FLAGS
    if values.repeats < 1 or values.others_every < 0:
        raise UserError('--repeats: at least 1 expected; --others_every: at least 0')
    networks = values.networks.split(',') if values.networks else list(faulty.SUBJECTS)
    if unknown := set(networks) - set(faulty.SUBJECTS):
        raise UserError(f'--networks: {min(unknown)!r} found, of {", ".join(faulty.SUBJECTS)} expected')
    planted = faulty.spread(
        [fault for fault in faulty.FAULTS if fault[0] in networks] * values.repeats, values.seed
    )
    wrong: list[dict[str, Any]] = []
    right = collections.Counter[str]()
    others = {'jax_debug_nans': by_debug_nans, 'checkify': by_checkify}
    counts = {name: collections.Counter[str]() for name in others}
    seconds, compared = 0.0, 0
    for number, fault in enumerate(track(planted, console=Console(stderr=True), description='faults')):
        start = time.perf_counter()
        missed = faulty.missed(fault)
        seconds += time.perf_counter() - start
        if 'finding' not in missed:
            right.update(name for name in ASKED if name not in missed)
        if missed:
            wrong.append({**fault._asdict(), 'missed': {name: str(pair) for name, pair in missed.items()}})
            print(wrong[-1], file=sys.stderr, flush=True)
        if number % CLEAR_EVERY == CLEAR_EVERY - 1:
            jax.clear_caches()
        # What is given is no operation of the step: only the trace looks at it.
        if values.others_every and number % values.others_every == 0 and fault.place != 'input':
            compared += 1
            for name, ask in others.items():
                counts[name].update(what for what, is_right in ask(fault).items() if is_right)
    table = Table(
        'names', 'jaxrnn', *others, title=f'{len(planted)} faults, {compared} of them given to the others'
    )
    for what in ASKED:
        shares = [f'{counter[what] / compared:.1%}' if compared else '' for counter in counts.values()]
        table.add_row(what.rstrip('_'), f'{right[what] / len(planted):.1%}', *shares)
    console = Console(stderr=values.json)
    console.print(table)
    if values.json:
        common.print_json(
            {
                'machine': environment.describe(),
                'faults': len(planted),
                'right': {name: right[name] for name in ASKED},
                'compared': compared,
                **{name: dict(counter) for name, counter in counts.items()},
                'seconds': round(seconds, 1),
                'wrong': wrong,
            }
        )
    return common.HEALTHY


common.define(
    'run', 'repeats', 1, 'How often to plant each kind in each place, at other time steps and examples.'
)
common.define('run', 'networks', '', 'Only these, comma-separated.')
common.define('run', 'seed', 0, 'Of the time steps and examples.')
common.define('run', 'others_every', 8, "Give every n-th fault to JAX's own tools; 0: none.")
common.define('run', 'json', False, 'Print the machine-readable result as the last line of standard output.')

if __name__ == '__main__':
    common.main(main, __doc__)
