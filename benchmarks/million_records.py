"""How long does it take to read a million records and to judge them, and how much memory?

    python benchmarks/million_records.py --records=1000000

Records of 30 fields as a long training leaves them: a noisy loss that falls, an accuracy that rises, signals, a digest
in each. One in a hundred thousand has a leap of the loss. The process reads the file, judges the run as a bisect
would, and looks at it as a resumed run does; a process for each of several repeats.
"""

import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path[0] = str(ROOT)

import numpy as np
from absl import flags

from jaxrnn import detect, environment
from jaxrnn.bisect import replay
from jaxrnn.cli import common
from jaxrnn.record import record_file
from jaxrnn.record.record_file import RecordFile

SIGNALS = 24


def lines(count: int, seed: int = 0) -> Iterator[bytes]:
    """The records of a run, as they stand in its file."""
    random = np.random.default_rng(seed)
    noise = random.standard_normal((65536, SIGNALS + 1)).astype(np.float32)
    for step in range(count):
        at = noise[step * 7 % len(noise)]
        loss = np.exp(0.1 * at[0]) / (1 + 1e-4 * step) * (15 if step % 100_000 == 70_000 else 1)
        row = {
            'step': step,
            'loss': float(str(np.float32(loss))),
            'accuracy': float(str(np.float32(1 - 0.99 / (1 + 1e-4 * step)))),
            **{f'signal_{place}': float(str(value)) for place, value in enumerate(at[1:])},
            'state_moved': float(str(np.float32(1e-3))),
            'finite_state': True,
            'digest': f'{step * 2654435761 % 2**64:016x}',
        }
        yield record_file.as_line(row)


def measured(path: Path) -> dict[str, float]:
    """Seconds of CPU time, of one thread, and megabytes of this process."""
    before = _megabytes()
    start = time.process_time()
    records = RecordFile(path).read()
    read = time.process_time()
    diagnosis = replay.of_records(records.columns)
    judged = time.process_time()
    detect.Watch().see_all(records)
    watched = time.process_time()
    assert diagnosis.symptom is None, diagnosis
    return {
        'records': len(records),
        'fields': len(records[0]),
        'read_s': read - start,
        'judge_s': judged - read,
        'watch_s': watched - judged,
        'MB': _megabytes() - before,
        'MB of the process': _megabytes(),
    }


def _megabytes() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main(arguments: list[str]) -> int:
    if arguments:
        print(json.dumps(measured(Path(arguments[0]))))
        return 0
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory, 'records.jsonl')
        with path.open('wb') as file:
            file.writelines(lines(flags.FLAGS.records))
        print(f'{path.stat().st_size / 1e6:.0f} MB of lines', environment.describe())
        for _ in range(flags.FLAGS.repeats):
            subprocess.run([sys.executable, __file__, str(path)], check=True)
    return 0


flags.DEFINE_integer('records', 1_000_000, 'records', lower_bound=1)
flags.DEFINE_integer('repeats', 3, 'processes', lower_bound=1)

if __name__ == '__main__':
    common.main(main, __doc__)
