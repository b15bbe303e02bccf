"""How often does a trace raise a false alarm, in steps that look alarming and are healthy, or blame them for a fault
that stands beside?

    python benchmarks/trace_healthy.py --json

Every ingredient of tests/healthy.py in each of its places, with whose step it is going round; with --everywhere in the
steps of all. First it is seen that each output of the compiled step is finite. Then, with --beside, a fault is
planted in another place of the same step, and must be named. checkify is asked for comparison.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path[0] = str(ROOT)
sys.path.insert(1, str(ROOT / 'tests'))

import collections
import time
from typing import Any

import healthy
import jax
from absl import flags
from jax.experimental import checkify
from rich.console import Console
from rich.progress import track
from rich.table import Table

from jaxrnn import environment
from jaxrnn.cli import common
from jaxrnn.types import UserError


def checkify_alarms(step: healthy.Healthy) -> bool:
    with healthy.made(step) as subject:
        state, batch = subject.init(), subject.batch(healthy.TIME_STEP, healthy.EXAMPLE)
        checked = checkify.checkify(subject.step, errors=checkify.float_checks)
        error, _ = jax.jit(checked)(state, batch)
    return error.get() is not None


def main(arguments: list[str]) -> int:
    del arguments
    values = flags.FLAGS
    if values.every < 1 or values.others_every < 0:
        raise UserError('--every: at least 1 expected; --others_every: at least 0')
    every = healthy.everywhere_steps() if values.everywhere else healthy.STEPS
    steps = dict(list(every.items())[:: values.every])
    counts = collections.Counter[str]()
    kinds = collections.Counter[str]()
    wrong: list[dict[str, Any]] = []
    console = Console(stderr=True)
    start = time.perf_counter()
    for number, (name, step) in enumerate(track(steps.items(), console=console, description='healthy')):
        unhealthy, story = healthy.told(step)
        counts['steps'] += 1
        counts['with something bad inside'] += bool(story.harmless)
        kinds.update(finding.kind for finding in story.harmless)
        if unhealthy:
            counts['not healthy'] += 1
            wrong.append({'name': name, 'not finite': unhealthy})
        if story.finding is not None:
            counts['alarms'] += 1
            wrong.append({'name': name, 'alarm': str(story.finding)})
        if values.others_every and number % values.others_every == 0:
            counts['given to checkify'] += 1
            counts['alarms of checkify'] += checkify_alarms(step)
    beside = healthy.faults_beside(steps) if values.beside else {}
    for name, fault in track(beside.items(), console=console, description='beside a fault'):
        missed = healthy.missed_beside(steps[name], fault)
        counts['faults beside'] += 1
        counts['faults not named'] += 'finding' in missed or 'source' in missed
        if missed:
            counts['faults not told wholly'] += 1
            told = {what: str(pair) for what, pair in missed.items()}
            wrong.append({'name': name, 'fault': fault._asdict(), 'missed': told})
    seconds = round(time.perf_counter() - start, 1)
    table = Table('what', 'how many', title='Steps that look alarming and are healthy')
    for what in ('steps', 'not healthy', 'alarms', 'with something bad inside', 'given to checkify',
                 'alarms of checkify', 'faults beside', 'faults not named', 'faults not told wholly'):  # fmt: skip
        table.add_row(what, f'{counts[what]}')
    console = Console(stderr=values.json)
    console.print(table)
    for one in wrong:
        console.print(one)
    if values.json:
        common.print_json(
            {
                'machine': environment.describe(),
                **dict(counts),
                'alarms': counts['alarms'],
                'harmless': dict(kinds),
                'seconds': seconds,
                'wrong': wrong,
            }
        )
    return common.HEALTHY


common.define('run', 'every', 1, 'Run each n-th step.')
common.define('run', 'everywhere', False, 'Put each ingredient into the steps of all networks.')
common.define('run', 'beside', False, 'Plant a fault beside each ingredient, too.')
common.define('run', 'others_every', 8, 'Give each n-th step to checkify; 0: none.')
common.define('run', 'json', False, 'Print the machine-readable result as the last line of standard output.')

if __name__ == '__main__':
    common.main(main, __doc__)
