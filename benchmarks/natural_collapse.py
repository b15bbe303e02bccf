"""How often, and at which step, does the demo's setting break by itself; and does a remedy keep it from that?

    python benchmarks/natural_collapse.py --seeds=10
    python benchmarks/natural_collapse.py --seeds=10 --steps=6400 --flags=--learning_rate=3e-3

The first stops each seed soon after its collapse. The second trains each for 6,400 steps, whatever comes, with a flag
added. One process a seed on one thread, as many at once as there are processors: two to five minutes each.
"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).parent.parent)

import concurrent.futures
import itertools
import json
import os
import queue
import shlex
import subprocess
import tempfile

import numpy as np
from absl import flags
from rich.console import Console
from rich.table import Table

from jaxrnn import detect, environment
from jaxrnn.cli import common, demo
from jaxrnn.record.record_file import RecordFile
from jaxrnn.record.records import series
from jaxrnn.words.signals import ALARMS

GRAVE = ('nonfinite', 'collapse', 'constant')
"""Symptoms that lose what was learnt; a spike recovers, or ends as one of these."""

LAST = 160
"""Steps over which the final accuracy is averaged: twenty epochs of the demo's 256 words."""


def run(seed: int, processors: queue.SimpleQueue[int]) -> dict:
    """Trains one seed on a free processor; its gravest symptom, and the accuracy around it, of 16 steps each."""
    values = flags.FLAGS
    script = str(Path(__file__).parent.parent / 'scripts' / 'train.py')
    more = [f'--max_steps={values.steps}', '--on_divergence=continue'] if values.steps else []
    more += shlex.split(values.flags)
    with tempfile.TemporaryDirectory() as directory:
        arguments = [*demo.SETTING.split(), f'--seed={seed}', '--threads=1', '--keep_latest=1', *more]
        processor = processors.get()
        with subprocess.Popen(
            [sys.executable, script, *arguments, f'--run_dir={directory}', '--json'],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        ) as child:
            os.sched_setaffinity(child.pid, {processor})  # before JAX starts its threads
            _, said = child.communicate()
        processors.put(processor)
        if child.returncode not in (common.HEALTHY, common.DIVERGED):
            raise SystemExit(said)
        columns = series(RecordFile(Path(directory, 'records.jsonl')).read())
    grave = [symptom for symptom in detect.symptoms(columns) if symptom.kind in GRAVE]
    accuracy = np.convolve(columns['accuracy'], np.full(16, 1 / 16), 'valid')
    symptom = min(grave, key=lambda symptom: symptom.step, default=None)
    warned = detect.onset(columns, symptom, ALARMS) if symptom else None
    step = symptom.step if symptom else accuracy.size
    found = {
        'seed': seed,
        'steps': columns['step'].size,
        'symptom': symptom and symptom.kind,
        'step': symptom and symptom.step,
        'first_sign': warned and warned.step,
        'accuracy_before': float(max(accuracy[:step], default=0.0)),
        'lowest_after': float(min(accuracy[step:])) if symptom else None,
        'best_accuracy': float(max(accuracy)),
        'final_accuracy': float(np.mean(columns['accuracy'][-LAST:])),
    }
    print(json.dumps(found), file=sys.stderr, flush=True)
    return found


def main(arguments: list[str]) -> int:
    del arguments
    values = flags.FLAGS
    first = values.first_seed
    processors: queue.SimpleQueue[int] = queue.SimpleQueue()
    for processor in os.sched_getaffinity(0):
        processors.put(processor)
    with concurrent.futures.ThreadPoolExecutor(processors.qsize()) as pool:
        found = list(pool.map(run, range(first, first + values.seeds), itertools.repeat(processors)))
    table = Table(*found[0])
    for row in found:
        table.add_row(*(f'{v:.3f}' if isinstance(v, float) else str(v) for v in row.values()))
    console = Console(stderr=values.json)
    console.print(table)
    broken = sum(row['symptom'] is not None for row in found)
    console.print(f'{broken} of {len(found)} seeds broke')
    if values.json:
        setting = f'{demo.SETTING} {values.flags}'.strip()
        common.print_json({'setting': setting, 'machine': environment.describe(), 'seeds': found})
    return common.HEALTHY


common.define('run', 'seeds', 10, 'How many seeds.')
common.define('run', 'first_seed', 0, 'The first of them.')
common.define('run', 'steps', 0, 'Train each seed for so many steps; 0: until it has broken.')
common.define('run', 'flags', '', 'Flags to add to the setting, as a diagnosis advises them.')
common.define('run', 'json', False, 'Print the machine-readable result as the last line of standard output.')

if __name__ == '__main__':
    common.main(main, __doc__)
