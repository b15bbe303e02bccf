"""How long does it take to export a run's records, and what do alerts cost a step?

    python benchmarks/export_cost.py --records=100000
    python benchmarks/export_cost.py --records=1000000 --formats=csv,parquet

Records of ten fields: a noisy loss that falls, signals, a digest in each. Each export has a process of its own, whose
largest memory is printed, too; a format whose library is not installed is skipped. Then the same records are shown to
`jaxrnn.Alerts` one by one, several times, with a look each 100 and each 25 steps. Prints the median.

    python benchmarks/export_cost.py --alerts_on=runs/demo

instead shows the records of a run to alerts, and prints when each is told.
"""

import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path[0] = str(ROOT)

import numpy as np
from absl import flags

import jaxrnn
from jaxrnn import environment
from jaxrnn.cli import common
from jaxrnn.exports import FORMATS
from jaxrnn.record import record_file
from jaxrnn.record.record_file import RecordFile
from jaxrnn.types import UserError

SIGNALS = ('update_rms', 'step_rms', 'momentum_cosine', 'gradient_norm', 'update_norm', 'parameter_norm')


def rows(count: int, seed: int = 0) -> Iterator[dict[str, Any]]:
    noise = np.random.default_rng(seed).standard_normal((65536, len(SIGNALS) + 1)).astype(np.float32)
    for step in range(count):
        at = noise[step * 7 % len(noise)]
        loss = np.float32(np.exp(0.1 * at[0]) / (1 + 1e-4 * step))
        others = {name: float(str(np.exp(0.05 * value))) for name, value in zip(SIGNALS, at[1:], strict=True)}
        yield {
            'step': step,
            'loss': float(str(loss)),
            **others,
            'finite_state': True,
            'digest': f'{step * 2654435761 % 2**64:016x}',
        }


def exported(run: Path, to: str) -> None:
    """In this process: seconds, and megabytes of it."""
    with tempfile.TemporaryDirectory() as temporary:
        begun = time.perf_counter()
        try:
            jaxrnn.export(run, to=to, out=Path(temporary) / 'out')
        except UserError as error:
            print(f'{to:12} skipped: {error}')
            return
        seconds = time.perf_counter() - begun
    print(f'{to:12} {seconds:.1f} s, {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10} MB')


def alerts_cost(every: int, given: list[dict[str, Any]]) -> float:
    """Microseconds a record."""
    with tempfile.TemporaryDirectory() as temporary:
        alerts = jaxrnn.Alerts(temporary, every=every)
        begun = time.perf_counter()
        for row in given:
            alerts(row)
        seconds = time.perf_counter() - begun
        alerts.close()
    return 1e6 * seconds / len(given)


def told(run: Path, every: int) -> None:
    """When each alert on a run's records is told."""
    now = 0

    def say(alert: dict[str, Any]) -> None:
        print(f'every={every}: {alert["kind"]} {alert["symptom"]} of step {alert["step"]}, told at {now}')

    with (
        tempfile.TemporaryDirectory() as temporary,
        jaxrnn.Alerts(temporary, every=every, callback=say) as alerts,
    ):
        for row in RecordFile(run / 'records.jsonl').read():
            now = row['step']
            alerts(row)


def main(arguments: list[str]) -> int:
    del arguments
    if flags.FLAGS.alerts_on:
        for every in (100, 25):
            told(Path(flags.FLAGS.alerts_on), every)
        return 0
    if flags.FLAGS.run:
        exported(Path(flags.FLAGS.run), flags.FLAGS.formats[0])
        return 0
    with tempfile.TemporaryDirectory() as temporary:
        with open(Path(temporary) / 'records.jsonl', 'wb') as file:
            file.writelines(record_file.as_line(row) for row in rows(flags.FLAGS.records))
        for to in flags.FLAGS.formats:
            subprocess.run([sys.executable, __file__, f'--run={temporary}', f'--formats={to}'], check=True)
    given = list(rows(20_000))
    for every in (100, 25):
        costs = [alerts_cost(every, given) for _ in range(flags.FLAGS.rounds)]
        print(
            f'alerts, every={every}: {statistics.median(costs):.1f} µs a step ({min(costs):.1f} to {max(costs):.1f})'
        )
    print(environment.describe())
    return 0


flags.DEFINE_integer('records', 100_000, 'How many are exported.')
flags.DEFINE_integer('rounds', 5, 'How often alerts are timed.')
flags.DEFINE_list('formats', [*FORMATS], 'Those that are timed.')
flags.DEFINE_string('alerts_on', '', 'A run: when would its alerts be told?')
flags.DEFINE_string('run', '', 'For a process of its own: the run.')

if __name__ == '__main__':
    common.main(main, __doc__)
