"""How do time and memory of the recurrence grow with time steps, batch and width?

    python benchmarks/scaling.py --json --plot=scaling.png

The gradient of a layer's last output, from letters, in all weights. Each axis is swept by itself from the stock size;
sizes of an axis take turns, one measurement a round. `exponent`: the slope between this size and the one before it
on logarithmic axes; 1 is linear.
"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).parent.parent)

import math
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from absl import flags
from rich.console import Console
from rich.table import Table

from benchmarks.peers import LETTERS
from jaxrnn import environment
from jaxrnn.cli import common
from jaxrnn.rnn import cells, scan
from jaxrnn.types import Array, UserError

CELLS = {'lstm': cells.lstm(cells.SIGMOID), 'gru': cells.gru_reset_after(cells.SIGMOID)}

STOCK = {'T': 20, 'B': 32, 'H': 1024}
SWEEPS = {
    'T': (10, 20, 40, 80, 160, 320),
    'B': (8, 16, 32, 64, 128, 256),
    'H': (128, 256, 512, 1024, 2048),
}
NAMES = {'T': 'time steps', 'B': 'words in a batch', 'H': 'width'}
EXPECTED = {'T': 1, 'B': 1, 'H': 2}
LONG_ENOUGH = 0.1  # seconds of one measurement


def gradient(network: str, size: dict[str, int]) -> tuple[Callable[[], Any], int]:
    """A compiled gradient, and the bytes of its temporary memory."""
    cell = CELLS[network]
    steps, batch, width = size['T'], size['B'], size['H']
    gates = sum(cell.blocks) * width
    keys = jax.random.split(jax.random.key(0), 4)
    weights = scan.Weights(
        jax.random.normal(keys[0], (LETTERS, gates)),
        jnp.zeros(gates),
        jax.random.normal(keys[1], (width, gates)) / math.sqrt(width),
        jnp.zeros(gates) if cell.takes_recurrent_bias else None,
    )
    letters = jax.random.randint(keys[2], (steps, batch), 0, LETTERS)
    towards = jax.random.normal(keys[3], (batch, width))

    def loss(weights: scan.Weights) -> Array:
        _, carry = scan.run(cell, weights, letters, sequences=False)
        return jnp.vdot(carry.h, towards)

    compiled = jax.jit(jax.grad(loss)).lower(weights).compile()
    return lambda: jax.block_until_ready(compiled(weights)), compiled.memory_analysis().temp_size_in_bytes


def sweep(network: str, axis: str, rounds: int) -> list[dict[str, Any]]:
    """A row for each size along an axis."""
    sizes = [STOCK | {axis: value} for value in SWEEPS[axis]]
    ready = [gradient(network, size) for size in sizes]
    counts = []
    for run, _ in ready:
        run()
        start = time.perf_counter()
        run()
        counts.append(max(1, math.ceil(LONG_ENOUGH / (time.perf_counter() - start))))
    times: list[list[float]] = [[] for _ in ready]
    for _ in range(rounds):
        for (run, _), count, found in zip(ready, counts, times, strict=True):
            start = time.perf_counter()
            for _ in range(count):
                run()
            found.append((time.perf_counter() - start) / count)
    rows: list[dict[str, Any]] = []
    for size, (_, taken), found in zip(sizes, ready, times, strict=True):
        row = {'network': network, 'axis': axis, **size, 'median_ms': 1e3 * statistics.median(found),
               'lowest_ms': 1e3 * min(found), 'temp_mb': taken / 1e6}  # fmt: skip
        if rows:
            longer = math.log(size[axis] / rows[-1][axis])
            for name, what in (('time_exponent', 'lowest_ms'), ('memory_exponent', 'temp_mb')):
                row[name] = round(math.log(row[what] / rows[-1][what]) / longer, 3)
        rows.append(row)
    return rows


def plot(rows: list[dict[str, Any]], path: str) -> None:
    """Time above, memory below, a column for each axis; dashed: the growth that is allowed."""
    import matplotlib

    matplotlib.use('agg')
    from matplotlib import pyplot, ticker

    figure, panels = pyplot.subplots(2, len(SWEEPS), figsize=(13, 7), sharey='row', layout='constrained')
    for column, axis in enumerate(SWEEPS):
        for panel, what in zip(panels[:, column], ('median_ms', 'temp_mb'), strict=True):
            for network in dict.fromkeys(row['network'] for row in rows):
                found = [row for row in rows if (row['network'], row['axis']) == (network, axis)]
                drawn = panel.plot(
                    [row[axis] for row in found], [row[what] for row in found], 'o-', label=network
                )
                last = found[-1]
                allowed = [last[what] * (row[axis] / last[axis]) ** EXPECTED[axis] for row in found]
                power = f'{axis}²' if EXPECTED[axis] == 2 else axis
                panel.plot([row[axis] for row in found], allowed, '--', color=drawn[0].get_color(), linewidth=0.8,
                           label=f'in proportion to {power}')  # fmt: skip
            panel.set(xscale='log', yscale='log', xlabel=NAMES[axis])
            panel.set_xticks(SWEEPS[axis], [str(value) for value in SWEEPS[axis]])
            panel.xaxis.set_minor_locator(ticker.NullLocator())
            panel.yaxis.set_major_formatter(ticker.FormatStrFormatter('%g'))
            panel.grid(alpha=0.3)
        panels[0][column].legend(fontsize='small')
    panels[0][0].set_ylabel('gradient, ms')
    panels[1][0].set_ylabel('temporary memory, MB')
    figure.savefig(path, dpi=130)


def main(arguments: list[str]) -> int:
    del arguments
    values = flags.FLAGS
    if values.rounds < 1:
        raise UserError(f'--rounds: {values.rounds} found, at least 1 expected')
    rows = [row for network in CELLS for axis in SWEEPS for row in sweep(network, axis, values.rounds)]
    table = Table('network', *STOCK, 'ms', 'exponent', 'temporary MB', 'exponent')
    for row in rows:
        table.add_row(
            row['network'],
            *(str(row[axis]) for axis in STOCK),
            f'{row["median_ms"]:.2f}',
            str(row.get('time_exponent', '')),
            f'{row["temp_mb"]:.2f}',
            str(row.get('memory_exponent', '')),
            end_section=row is rows[-1] or rows[rows.index(row) + 1]['axis'] != row['axis'],
        )
    Console(stderr=values.json).print(table)
    if values.plot:
        plot(rows, values.plot)
    if values.json:
        common.print_json({'machine': environment.describe(), 'rounds': values.rounds, 'rows': rows})
    return common.HEALTHY


common.define('run', 'rounds', 7, 'Measurements of each.')
common.define('run', 'plot', '', 'Draw the growth into this file.')
common.define('run', 'json', False, 'Print the machine-readable result as the last line of standard output.')

if __name__ == '__main__':
    common.main(main, __doc__)
