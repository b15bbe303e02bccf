"""How often do detectors, and the alarms of the signals, speak up in runs that are healthy?

    python benchmarks/false_alarms.py --seeds=8

Small runs of each network under each preset at stock settings, for 2,500 steps, all with signals. A detector that
speaks is a false alarm; an alarm is evidence of what came before a symptom, once there is one, and may go on now and
then.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path[0] = str(ROOT)
sys.path.insert(1, str(ROOT / 'tests'))

import numpy as np
import small
from absl import flags
from rich.console import Console
from rich.table import Table

from jaxrnn import detect, environment
from jaxrnn.cli import common
from jaxrnn.detect import rule_language
from jaxrnn.types import Series
from jaxrnn.words import config, train
from jaxrnn.words.signals import ALARMS

PRESETS = ('keras1', 'keras3', 'flax')


def columns_of(network: str, preset: str, seed: int, steps: int) -> Series:
    """The records of a run."""
    values = flags.FLAGS
    made = config.Config(
        model=config.Model(network=network, preset=preset, hidden=values.hidden),
        optimiser=config.Optimiser(learning_rate=values.learning_rate),
        training=config.Training(batch_size=values.batch_size, seed=seed, signals=True),
    )
    return small.series_of(train.make_program(made, small.dataset()), steps)


def main(arguments: list[str]) -> int:
    del arguments
    values = flags.FLAGS
    runs = {
        (network, preset, seed): columns_of(network, preset, seed, values.steps)
        for network in small.NETWORKS
        for preset in PRESETS
        for seed in range(values.seeds)
    }
    rows = []
    for what, table in (('detector', detect.DETECTORS), ('alarm', ALARMS)):
        for each in table:
            held = [
                rule_language.holds(each.rule, columns)
                for columns in runs.values()
                if detect.applicable(columns, [each])
            ]
            if held:
                spoke = sum(bool(h.any()) for h in held)
                rows.append(
                    {
                        'what': what,
                        'kind': each.kind,
                        'runs': len(held),
                        'runs_with_it': spoke,
                        'share_of_steps': float(np.mean([h.mean() for h in held])),
                    }
                )
    console = Console(stderr=values.json)
    table = Table(*rows[0])
    for row in rows:
        table.add_row(*(f'{v:.4%}' if isinstance(v, float) else str(v) for v in row.values()))
    console.print(table)
    fitted = [float(np.mean(columns['cosine'][-100:])) for columns in runs.values()]
    console.print(f'cosine at the end: {min(fitted):.2f} to {max(fitted):.2f}')
    if values.json:
        common.print_json({'machine': environment.describe(), 'steps': values.steps, 'rows': rows})
    return common.HEALTHY


common.define('run', 'seeds', 8, 'Runs of each network and preset.')
common.define('run', 'steps', 2500, 'Steps of each.')
common.define('run', 'hidden', 8, 'Width.')
common.define('run', 'batch_size', 8, 'Words in a batch.')
common.define('run', 'learning_rate', 1e-3, 'Learning rate.')
common.define('run', 'threads', 0, 'Processors to use; 0: all.')
common.define('run', 'json', False, 'Print the machine-readable result as the last line of standard output.')

if __name__ == '__main__':
    common.main(main, __doc__)
