"""What do records and digests cost a train step at its real size?

    python benchmarks/telemetry_overhead.py --network=lstm --repeats=30

Three compilations of the same step, interleaved: bare (state and loss alone come out), recorded, recorded with the
digest of the state.
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


def main(arguments: list[str]) -> int:
    del arguments
    values = flags.FLAGS
    made = config.Config(
        model=config.Model(network=values.network, hidden=values.hidden),
        training=config.Training(batch_size=values.batch_size),
    )
    program = train.make_program(made, dataset())

    def bare(state, batch):
        state, record = program.step(state, batch)
        return state, record['loss']

    plain, observed = jax.jit(bare, donate_argnums=0), telemetry.instrument(program.step)
    variants = {
        'bare': plain,
        'record': lambda state, batch: observed(state, batch, False),
        'record and digest': lambda state, batch: observed(state, batch, True),
    }
    states = {name: program.init() for name in variants}
    times: dict[str, list[float]] = {name: [] for name in variants}
    for repeat in range(values.repeats + 2):
        for name, step in variants.items():
            batch = program.batch_at(repeat)
            start = time.perf_counter()
            states[name], out = step(states[name], batch)
            jax.block_until_ready((states[name], out))
            if repeat >= 2:  # the first compile
                times[name].append(1e3 * (time.perf_counter() - start))
    base = times['bare']
    rows = [
        {
            'variant': name,
            'median_ms': round(statistics.median(found), 2),
            'lowest_ms': round(min(found), 2),
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
common.define('run', 'repeats', 30, 'Measured rounds.')
common.define('run', 'json', False, 'Print the machine-readable result as the last line of standard output.')

if __name__ == '__main__':
    common.main(main, __doc__)
