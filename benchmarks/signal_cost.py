"""What do the early-warning signals cost a train step at its real size?

    python benchmarks/signal_cost.py --network=lstm --repeats=60

Both compilations of the same step, interleaved, in an order that turns each round, so that what else runs on the
machine strikes both alike: recorded as by default, and with --signals.
"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).parent.parent)

import statistics
import time

import jax
from absl import flags
from rich.console import Console
from rich.table import Table

from benchmarks.random_words import dataset
from jaxrnn import config, environment, telemetry, train
from scripts import common


def program(signals: bool) -> train.Program:
    values = flags.FLAGS
    made = config.Config(
        model=config.Model(network=values.network, hidden=values.hidden),
        training=config.Training(batch_size=values.batch_size, signals=signals),
    )
    return train.make_program(made, dataset())


def main(arguments: list[str]) -> int:
    del arguments
    values = flags.FLAGS
    programs = {'record': program(False), 'record and signals': program(True)}
    steps = {name: telemetry.instrument(made.step) for name, made in programs.items()}
    states = {name: made.init() for name, made in programs.items()}
    times: dict[str, list[float]] = {name: [] for name in programs}
    for repeat in range(values.repeats + 2):
        batch = programs['record'].batch_at(repeat)
        for name in sorted(programs, reverse=bool(repeat % 2)):
            start = time.perf_counter()
            states[name], out = steps[name](states[name], batch, False)
            jax.block_until_ready((states[name], out))
            if repeat >= 2:  # the first compile
                times[name].append(1e3 * (time.perf_counter() - start))
    base = times['record']
    rows = [
        {
            'variant': name,
            'median_ms': round(statistics.median(found), 2),
            'lowest_ms': round(min(found), 2),
            'added_ms': round(statistics.median(a - b for a, b in zip(found, base, strict=True)), 2),
            'median_ratio': round(statistics.median(a / b for a, b in zip(found, base, strict=True)), 4),
        }
        for name, found in times.items()
    ]
    table = Table(*rows[0])
    for row in rows:
        table.add_row(*(str(value) for value in row.values()))
    Console(stderr=values.json).print(table)
    if values.json:
        shape = {name: values[name].value for name in ('network', 'hidden', 'batch_size', 'repeats')}
        common.print_json({**shape, 'machine': environment.describe(), 'rows': rows})
    return common.HEALTHY


common.define('run', 'network', 'lstm', 'The network.', ('lstm', 'gru', 'stacked'))
common.define('run', 'hidden', 0, 'Width; 0: stock.')
common.define('run', 'batch_size', 32, 'Words in a batch.')
common.define('run', 'repeats', 60, 'Measured rounds.')
common.define('run', 'json', False, 'Print the machine-readable result as the last line of standard output.')

if __name__ == '__main__':
    common.main(main, __doc__)
