"""Do a recurrent gain of 2, and moments in bfloat16, break a network?

    python benchmarks/harmless_plants.py --seeds=3

Small networks with the preset of 2016, each as it is, with a larger gain, and with moments in bfloat16: how many of the
runs show a symptom within some steps. Spikes that are recovered from don't count.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path[0] = str(ROOT)
sys.path.insert(1, str(ROOT / 'tests'))

import json

import small
from absl import flags
from rich.console import Console
from rich.table import Table

from jaxrnn import detect, environment
from jaxrnn.cli import common
from jaxrnn.diagnosis import Symptom
from jaxrnn.words import train

PLANTS = {
    'none (gain 1.1)': {},
    'gain 2': {'recurrent_gain': 2.0},
    'gain 4': {'recurrent_gain': 4.0},
    'bfloat16 moments': {'moment_dtype': 'bfloat16'},
}
NETWORKS = (('gru', 32), ('gru', 64), ('lstm', 32), ('stacked', 32))
RATES = (3e-3, 6e-3)


def symptom_of(network: str, hidden: int, rate: float, seed: int, plant: dict) -> Symptom | None:
    values = flags.FLAGS
    made = small.configuration(network, hidden=hidden, preset='keras1', seed=seed)
    program = train.make_program(made.changed(learning_rate=rate, **plant), small.dataset(values.pad_to))
    grave = [
        symptom
        for symptom in detect.symptoms(small.series_of(program, values.steps))
        if symptom.kind != 'spike'
    ]
    return grave[0] if grave else None


def main(arguments: list[str]) -> int:
    del arguments
    values = flags.FLAGS
    rows = []
    for network, hidden in NETWORKS:
        for rate in RATES:
            row = {'network': f'{network} {hidden}', 'rate': rate}
            for name, plant in PLANTS.items():
                found = [symptom_of(network, hidden, rate, seed, plant) for seed in range(values.seeds)]
                row[name] = [None if symptom is None else str(symptom) for symptom in found]
            rows.append(row)
            print(json.dumps(row), file=sys.stderr, flush=True)
    table = Table('network', 'rate', *PLANTS)
    for row in rows:
        broke = [f'{sum(s is not None for s in row[name])} of {values.seeds}' for name in PLANTS]
        table.add_row(row['network'], str(row['rate']), *broke)
    console = Console(stderr=values.json)
    console.print(table)
    if values.json:
        common.print_json({'machine': environment.describe(), 'pad_to': values.pad_to, 'rows': rows})
    return common.HEALTHY


common.define('run', 'seeds', 3, 'Runs of each.')
common.define('run', 'steps', 1500, 'Steps of each.')
common.define('run', 'pad_to', 20, 'Time steps of a word.')
common.define('run', 'threads', 0, 'Processors to use; 0: all.')
common.define('run', 'json', False, 'Print the machine-readable result as the last line of standard output.')

if __name__ == '__main__':
    common.main(main, __doc__)
