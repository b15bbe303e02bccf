"""How often, and at which step, does the demo's setting break by itself?

    python benchmarks/natural_collapse.py --seeds=10

One process a seed, one after the other; takes one to five minutes each on 2 cores.
"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).parent.parent)

import json
import subprocess
import tempfile

from absl import flags
from rich.console import Console
from rich.table import Table

from jaxrnn import environment
from scripts import common, demo


def run(seed: int, directory: str) -> dict:
    """Trains one seed; its symptom, and the accuracy before and after."""
    script = str(Path(demo.__file__).with_name('train.py'))
    arguments = [
        *demo.SETTING.split(),
        f'--seed={seed}',
        '--keep_latest=1',
        f'--run_dir={directory}',
        '--json',
    ]
    done = subprocess.run([sys.executable, script, *arguments], capture_output=True, text=True)
    if done.returncode not in (common.HEALTHY, common.DIVERGED):
        raise SystemExit(done.stderr)
    symptom = json.loads(done.stdout.splitlines()[-1])['symptom']
    rows = [json.loads(line) for line in Path(directory, 'records.jsonl').read_text().splitlines()]
    accuracy = [sum(row['accuracy'] for row in rows[n : n + 16]) / 16 for n in range(0, len(rows) - 15, 16)]
    step = symptom['step'] if symptom else len(rows)
    before = max(accuracy[: step // 16], default=0.0)
    return {
        'seed': seed,
        'steps': len(rows),
        'symptom': symptom and symptom['kind'],
        'step': symptom and symptom['step'],
        'accuracy_before': round(before, 3),
        'accuracy_lowest_after': round(min(accuracy[step // 16 :], default=before), 3),
    }


def main(arguments: list[str]) -> int:
    del arguments
    table = Table('seed', 'steps', 'symptom', 'at step', 'best accuracy before', 'lowest after')
    found = []
    for seed in range(flags.FLAGS.seeds):
        with tempfile.TemporaryDirectory() as directory:
            found.append(run(seed, directory))
        table.add_row(*(str(value) for value in found[-1].values()))
        print(json.dumps(found[-1]), file=sys.stderr, flush=True)
    Console(stderr=flags.FLAGS.json).print(table)
    if flags.FLAGS.json:
        common.print_json({'setting': demo.SETTING, 'machine': environment.describe(), 'seeds': found})
    return common.HEALTHY


common.define('run', 'seeds', 10, 'How many seeds, from 0.')
common.define('run', 'json', False, 'Print the machine-readable result as the last line of standard output.')

if __name__ == '__main__':
    common.main(main, __doc__)
