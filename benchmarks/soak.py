"""Does a long training stay as it is? Memory, open files, threads and the time of a step, over hours.

    python benchmarks/soak.py --minutes=120

Trains a small stacked network in a process of its own, with records, signals, a digest in each record and a checkpoint
every 500 steps, and looks at the process twice a minute. It is ended by --max_minutes, and the run is diagnosed. Prints
the medians of each quarter, and exits with 1 where the last is higher than the second by more than a tenth (memory,
time of a step) or at all (files, threads).
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent
sys.path[0] = str(ROOT)

import numpy as np
from absl import flags

from jaxrnn import environment
from jaxrnn.cli import common

FLAGS = (
    '--network=stacked', '--hidden=32', '--num_words=64', '--batch_size=16', '--signals', '--checkpoint_every=500',
    '--keep_latest=5', '--keep_every=100000', '--max_steps=1000000000', '--learning_rate=1e-3',
)  # fmt: skip

LOOK_EVERY = 30
"""Seconds."""


class Look(NamedTuple):
    """What a process is like."""

    megabytes: float
    files: int
    threads: int
    megabytes_of_run: float


def look(process: int, directory: Path) -> Look:
    status = dict(
        line.split(':', 1) for line in Path(f'/proc/{process}/status').read_text().splitlines() if ':' in line
    )
    size = sum(path.stat().st_size for path in directory.glob('*') if path.is_file())
    return Look(
        int(status['VmRSS'].split()[0]) / 1024,
        len(os.listdir(f'/proc/{process}/fd')),
        int(status['Threads']),
        size / 1e6,
    )


def watched(process: subprocess.Popen, directory: Path) -> list[tuple[float, int, Look]]:
    """Seconds, steps done and a look, twice a minute until it ends."""
    found, start = [], time.monotonic()
    while process.poll() is None:
        time.sleep(LOOK_EVERY)
        records = directory / 'records.jsonl'
        if process.poll() is None and records.exists():
            found.append((time.monotonic() - start, _last_step(records), look(process.pid, directory)))
    return found


def _last_step(records: Path) -> int:
    """Of the last whole line, found from the file's end."""
    with open(records, 'rb') as file:
        file.seek(max(records.stat().st_size - 65536, 0))
        *lines, _ = file.read().split(b'\n')
    return json.loads(lines[-1])['step'] if lines else 0


def quarters(found: Sequence[tuple[float, int, Look]]) -> list[dict[str, float]]:
    """Medians of each quarter of the time; of steps their milliseconds."""
    rows = []
    for part in np.array_split(np.arange(len(found)), 4):
        looks = [found[place][2] for place in part]
        (first, a, _), (last, b, _) = found[part[0]], found[part[-1]]
        row = {
            name: float(np.median([getattr(each, name) for each in looks]))
            for name in ('megabytes', 'files', 'threads')
        }
        rows.append({**row, 'ms a step': 1e3 * (last - first) / max(b - a, 1), 'steps': b})
    return rows


def main(arguments: list[str]) -> int:
    del arguments
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder, 'run')
        command = [sys.executable, '-m', 'jaxrnn', 'train', f'--run_dir={directory}', *FLAGS]
        command.append(f'--max_minutes={flags.FLAGS.minutes}')
        environ = {**os.environ, 'PYTHONPATH': str(ROOT)}
        with subprocess.Popen(command, env=environ, stdout=subprocess.DEVNULL) as process:
            found = watched(process, directory)
        if not found:
            raise SystemExit(f'training ended at once, with exit code {process.returncode}')
        rows = quarters(found)
        start = time.monotonic()
        done = subprocess.run(
            [sys.executable, '-m', 'jaxrnn', 'diagnose', f'--run_dir={directory}'],
            env=environ,
            capture_output=True,
        )
        for row in rows:
            print({name: round(value, 3) for name, value in row.items()})
        print(f'trained: exit code {process.returncode}; {found[-1][2].megabytes_of_run:.0f} MB of records')
        print(f'diagnosed: exit code {done.returncode}, {time.monotonic() - start:.0f} s')
        print(environment.describe())
    second, last = rows[1], rows[3]
    grows = [name for name in ('megabytes', 'ms a step') if last[name] > 1.1 * second[name]]
    grows += [name for name in ('files', 'threads') if last[name] > second[name]]
    print(f'grows: {", ".join(grows) or "nothing"}')
    return (
        common.FAILED if grows or done.returncode not in (common.HEALTHY, common.DIVERGED) else common.HEALTHY
    )


flags.DEFINE_float('minutes', 120, 'Minutes to train.', lower_bound=2)

if __name__ == '__main__':
    common.main(main, __doc__)
