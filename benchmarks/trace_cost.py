"""What does it cost to look for a NaN in a train step, and what does each tool name?

    python benchmarks/trace_cost.py --json

LSTM(1024), T=20, batch 32, by plain jit, jax_debug_nans, checkify, jax_disable_jit (with jax_debug_nans) and jaxrnn's
trace. A process each. Time and memory are those of a healthy step; then one with a fault: at time step 7 example 11's
output is the logarithm of a negative number (tests/faulty.py). The comparison with an earlier step, for what is
finite, is given a batch in which example 11's targets are a hundred times as large; the step in float64 is given the
healthy one.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path[0] = str(ROOT)
sys.path.insert(1, str(ROOT / 'tests'))

import json
import resource
import statistics
import subprocess
import time
from collections.abc import Callable
from typing import Any

import faulty
import jax
from absl import flags
from jax.experimental import checkify
from rich.console import Console
from rich.table import Table

from jaxrnn import environment, trace
from jaxrnn.cli import common

TIME_STEP, EXAMPLE = 7, 11


def plain(step: Callable) -> Callable:
    compiled = jax.jit(step)
    return lambda state, batch: jax.block_until_ready(compiled(state, batch)) and 'nothing'


def debug_nans(step: Callable) -> Callable:
    jax.config.update('jax_debug_nans', True)
    compiled = jax.jit(step)

    def run(state: Any, batch: Any) -> str:
        try:
            jax.block_until_ready(compiled(state, batch))
        except FloatingPointError as error:
            return str(error).splitlines()[0]
        return 'nothing'

    return run


def disable_jit(step: Callable) -> Callable:
    jax.config.update('jax_disable_jit', True)
    return debug_nans(step)


def checked(step: Callable) -> Callable:
    compiled = jax.jit(checkify.checkify(step, errors=checkify.float_checks))

    def run(state: Any, batch: Any) -> str:
        error, _ = jax.block_until_ready(compiled(state, batch))
        return (error.get() or 'nothing').splitlines()[0]

    return run


def traced(step: Callable) -> Callable:
    def run(state: Any, batch: Any) -> str:
        found = trace.first_bad(step, state, batch).finding
        if found is None:
            return 'nothing'
        place = f'{found.op} at {Path(found.source).name}, {found.pass_} pass, layer {found.layer}'
        return f'{place}, time step {found.time_step}, example {found.examples[0]}'

    return run


def compared(step: Callable) -> Callable:
    earlier: list[Any] = []

    def run(state: Any, batch: Any) -> str:
        before = earlier[0] if earlier else (state, batch)
        earlier[:] = [(state, batch)]
        change = trace.compare(step, before, (state, batch))
        if change.scores['loss'][0] == change.scores['loss'][2]:
            return 'nothing'
        first, layer = change.examples[0], change.layers[0]
        brought = 'batch' if change.by_batch else 'state'
        return f'by the {brought}, example {first.place} ({first.share:.0%}), layer {layer.path} ({layer.share:.0%})'

    return run


def shadowed(step: Callable) -> Callable:
    def run(state: Any, batch: Any) -> str:
        report = trace.lost_precision(step, state, batch)
        path = max(report.outputs, key=lambda path: report.outputs[path])
        if report.lost is None:
            return f'nothing lost; error at most {report.outputs[path]:.1e}, of {path}'
        return f'{report.lost.op} at {Path(report.lost.source).name}'

    return run


TOOLS = {
    'plain jit': plain,
    'jax_debug_nans': debug_nans,
    'checkify': checked,
    'jax_disable_jit': disable_jit,
    'jaxrnn trace': traced,
    'jaxrnn comparison': compared,
    'jaxrnn float64': shadowed,
}


def work(tool: str, rounds: int) -> dict[str, Any]:
    """What one tool costs, and what it says."""
    faulty.H, faulty.T, faulty.B, faulty.E = flags.FLAGS.hidden, 20, 32, 100
    subject = faulty.SUBJECTS['lstm']()
    state, healthy, bad = jax.block_until_ready(
        (subject.init(), subject.batch(0, 0), subject.batch(TIME_STEP, EXAMPLE))
    )
    healthy = healthy._replace(letters=healthy.letters % faulty.V)  # without the letter that marks the fault
    if tool == 'jaxrnn float64':
        bad = healthy
    if tool == 'jaxrnn comparison':
        targets = healthy.targets.copy()
        targets[EXAMPLE] *= 100
        bad = healthy._replace(targets=targets)
    times = []
    with faulty.strike_at('cell', 'log of a negative'):
        run = TOOLS[tool](subject.step)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        for _ in range(1 if tool == 'jax_disable_jit' else rounds + 1):
            start = time.perf_counter()
            run(state, healthy)
            times.append(time.perf_counter() - start)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        # Compiled anew: jax_debug_nans overlooks a NaN in a function whose first calls were healthy.
        anew = TOOLS[tool](lambda state, batch: subject.step(state, batch))
        if tool == 'jaxrnn comparison':
            anew(state, healthy)  # what it is held against
        named = anew(state, bad)
    return {
        'tool': tool,
        'first_seconds': round(times[0], 2),
        'seconds': round(statistics.median(times[1:] or times), 3),
        'peak_mb': round((peak - before) / 1e3),
        'names': named,
    }


def main(arguments: list[str]) -> int:
    del arguments
    values = flags.FLAGS
    if values.worker:
        common.print_json(work(values.worker, values.rounds))
        return common.HEALTHY
    rows = []
    for tool in TOOLS:
        command = [
            sys.executable,
            __file__,
            f'--worker={tool}',
            f'--rounds={values.rounds}',
            f'--hidden={values.hidden}',
        ]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            print(f'{tool}: {done.stderr}', file=sys.stderr)
            return common.FAILED
        rows.append(json.loads(done.stdout.splitlines()[-1]))
    table = Table('tool', 'first call, s', 'then, s', 'peak memory, MB', 'names')
    for row in rows:
        table.add_row(*map(str, row.values()))
    Console(stderr=values.json).print(table)
    if values.json:
        common.print_json({'machine': environment.describe(), 'hidden': values.hidden, 'rows': rows})
    return common.HEALTHY


common.define('run', 'rounds', 5, 'Steps measured after the first.')
common.define('run', 'hidden', 1024, 'Width.')
common.define('run', 'worker', '', 'Used by the benchmark itself: run this tool.')
common.define('run', 'json', False, 'Print the machine-readable result as the last line of standard output.')

if __name__ == '__main__':
    common.main(main, __doc__)
