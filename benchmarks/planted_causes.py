"""Is the cause of a planted fault named, and does what is advised avert it in a fresh run with another seed?

    python benchmarks/planted_causes.py --seeds=3 --json

Every cause of tests/causes.py: a run with seed 0 is trained until it breaks, and diagnosed. Then whole runs with other
seeds, the fault still planted, with the advised flags and without.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path[0] = str(ROOT)
sys.path.insert(1, str(ROOT / 'tests'))

import json
import tempfile
import time

import causes
from absl import flags
from rich.console import Console
from rich.table import Table

from jaxrnn import environment, report
from jaxrnn.cli import common


def ask(cause: causes.Cause, seeds: int) -> dict:
    with tempfile.TemporaryDirectory() as directory:
        start = time.perf_counter()
        found = causes.diagnosed(cause, Path(directory))
        seconds = time.perf_counter() - start
    advice = report.advised_flags(found)
    told = {
        'cause': cause.name,
        'symptom': found.symptom and found.symptom.kind,
        'planted': cause.kind,
        'named': found.cause.kind,
        'why': found.cause.why.split(':')[0] if ' (' in found.cause.why else '',
        'advice': advice,
        'seconds': round(seconds, 1),  # training included
        'broken_without': 0,
        'broken_with': 0,
        'seeds': seeds,
    }
    for seed in range(1, seeds + 1):
        told['broken_without'] += causes.fresh(cause, seed=seed, flags='') is not None
        told['broken_with'] += causes.fresh(cause, seed=seed, flags=advice) is not None
    return told


def main(arguments: list[str]) -> int:
    del arguments
    values = flags.FLAGS
    chosen = values.causes.split(',') if values.causes else list(causes.CAUSES)
    found = []
    for name in chosen:
        found.append(ask(causes.CAUSES[name], values.seeds))
        print(json.dumps(found[-1]), file=sys.stderr, flush=True)
    table = Table(*found[0])
    for row in found:
        table.add_row(*(str(value) for value in row.values()))
    console = Console(stderr=values.json)
    console.print(table)
    right = sum(row['planted'] == row['named'] for row in found)
    console.print(
        f'{right} of {len(found)} causes named; under the advice {sum(row["broken_with"] for row in found)} of '
        f'{sum(row["seeds"] for row in found)} fresh runs broke, without {sum(row["broken_without"] for row in found)}'
    )
    if values.json:
        common.print_json({'machine': environment.describe(), 'causes': found})
    return common.HEALTHY


common.define('run', 'causes', '', 'Which, by name with commas; all if not given.')
common.define('run', 'seeds', 3, 'Fresh runs of each.')
common.define('run', 'json', False, 'Print the machine-readable result as the last line of standard output.')

if __name__ == '__main__':
    common.main(main, __doc__)
