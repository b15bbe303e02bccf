"""How often do detectors, and the alarms of the signals, speak up in runs that are healthy?

    python benchmarks/false_alarms.py --seeds=8

Small runs of each network under each preset at stock settings, for 2,500 steps, all with signals. A symptom is a false
alarm; a rule that held and was judged to have passed is a note. An alarm is evidence of what came before a symptom,
once there is one, and may go on now and then.
"""

import sys
from collections.abc import Sequence
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
from jaxrnn.words import config, symptoms, train
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


def _of_detectors(runs: list[Series]) -> list[dict]:
    """Each kind, with the rules of a run of ours: how often its rule held, and how often it was no note."""
    found: dict[str, list] = {}
    for columns in runs:
        detectors = detect.bound(symptoms.detectors_for(detect.DETECTORS, small.dataset()), columns)
        for each in detectors:
            told = detect.judged(columns, [each]).symptom is not None
            found.setdefault(each.kind, []).append((rule_language.holds(each.rule, columns), told))
    return [_row('detector', kind, *zip(*seen, strict=True)) for kind, seen in found.items()]


def _of_alarms(runs: list[Series]) -> list[dict]:
    rows = []
    for each in ALARMS:
        held = [
            rule_language.holds(each.rule, columns) for columns in runs if detect.applicable(columns, [each])
        ]
        if held:
            rows.append(_row('alarm', each.kind, held, [False] * len(held)))
    return rows


def _row(what: str, kind: str, held: Sequence[np.ndarray], told: Sequence[bool]) -> dict:
    return {
        'what': what,
        'kind': kind,
        'runs': len(held),
        'runs_with_it': sum(bool(each.any()) for each in held),
        'symptoms': sum(told),
        'share_of_steps': float(np.mean([each.mean() for each in held])),
    }


def main(arguments: list[str]) -> int:
    del arguments
    values = flags.FLAGS
    runs = {
        (network, preset, seed): columns_of(network, preset, seed, values.steps)
        for network in small.NETWORKS
        for preset in PRESETS
        for seed in range(values.seeds)
    }
    rows = [*_of_detectors(list(runs.values())), *_of_alarms(list(runs.values()))]
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
