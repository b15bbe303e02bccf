"""What does a diagnosis cost: of a run with nothing wrong, and of one of 10,000 steps that breaks near its end?

    python benchmarks/diagnosis_cost.py --json

The healthy run is the demo's network on its words at a quarter of its learning rate, diagnosed as a user would, from
the command line. The long runs are causes of tests/causes.py that strike at step 9,350, with a checkpoint every 100.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path[0] = str(ROOT)
sys.path.insert(1, str(ROOT / 'tests'))

import dataclasses
import json
import subprocess
import tempfile
import time
from typing import Any

import causes
from absl import flags
from rich.console import Console
from rich.table import Table

from jaxrnn import environment
from jaxrnn.cli import common, demo
from jaxrnn.diagnosis import Diagnosis
from jaxrnn.record import layout
from jaxrnn.words import investigation

STEPS, STRIKES = 10_000, 9_350


def healthy(steps: int) -> dict[str, Any]:
    """From the command line, the start of Python and JAX included."""
    with tempfile.TemporaryDirectory() as directory:
        setting = [
            *demo.SETTING.split(),
            '--learning_rate=1.5e-3',
            f'--max_steps={steps}',
            '--on_divergence=continue',
        ]
        _call('train', *setting, f'--run_dir={directory}')
        start = time.perf_counter()
        _call('diagnose', f'--run_dir={directory}')
        seconds = time.perf_counter() - start
        found = json.loads(layout.Paths(Path(directory)).diagnosis.read_text(encoding='utf-8'))
    return _row('healthy', seconds, found)


def _call(name: str, *arguments: str) -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / 'scripts' / f'{name}.py'), *arguments], capture_output=True, text=True
    )
    if done.returncode not in (common.HEALTHY, common.DIVERGED):
        raise SystemExit(done.stderr)


def late(name: str) -> dict[str, Any]:
    """In this process, as the fault is in the program and not in the flags."""
    causes.AT = STRIKES
    cause = causes.CAUSES[name]._replace(steps=STEPS)
    with tempfile.TemporaryDirectory() as directory:
        causes.trained(cause, Path(directory))
        start = time.perf_counter()
        found: Diagnosis = investigation.diagnose_run(
            directory, make_program=cause.make(later=True)
        ).diagnosis
        seconds = time.perf_counter() - start
    return _row(name, seconds, dataclasses.asdict(found))


def _row(name: str, seconds: float, found: dict[str, Any]) -> dict[str, Any]:
    symptom = found['symptom'] or {}
    return {
        'run': name,
        'symptom': symptom.get('kind'),
        'step': symptom.get('step'),
        'cause': found['cause']['kind'],
        'remedies': len(found['remedies']),
        'steps_replayed': found['replay']['steps_replayed'],
        'seconds': round(seconds, 1),
    }


def main(arguments: list[str]) -> int:
    del arguments
    values = flags.FLAGS
    found = [healthy(values.steps), *(late(name) for name in values.causes.split(',') if name)]
    table = Table(*found[0])
    for row in found:
        table.add_row(*map(str, row.values()))
    Console(stderr=values.json).print(table)
    if values.json:
        common.print_json({'machine': environment.describe(), 'runs': found})
    return common.HEALTHY


common.define('run', 'steps', 2000, 'Of the healthy run.')
common.define(
    'run',
    'causes',
    'corrupt batch,learning rate jumps,moments reset',
    'Which strike late, by name with commas.',
)
common.define('run', 'json', False, 'Print the machine-readable result as the last line of standard output.')

if __name__ == '__main__':
    common.main(main, __doc__)
