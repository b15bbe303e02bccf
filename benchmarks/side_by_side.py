"""Variants of one train step, timed side by side: what the benchmarks of its extras share."""

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
from absl import flags
from rich.console import Console
from rich.table import Table

from jaxrnn import config, environment
from jaxrnn.types import BatchAt, Tree
from scripts import common

WARM = 2
"""Rounds that aren't counted: the first compiles."""


def define_flags(repeats: int) -> None:
    common.define('run', 'network', 'lstm', 'The network.', ('lstm', 'gru', 'stacked'))
    common.define('run', 'hidden', 0, 'Width; 0: stock.')
    common.define('run', 'batch_size', 32, 'Words in a batch.')
    common.define('run', 'repeats', repeats, 'Measured rounds.')
    common.define(
        'run', 'json', False, 'Print the machine-readable result as the last line of standard output.'
    )


def configuration(**training: Any) -> config.Config:
    """That of the flags."""
    values = flags.FLAGS
    return config.Config(
        model=config.Model(network=values.network, hidden=values.hidden),
        training=config.Training(batch_size=values.batch_size, **training),
    )


def compare(
    variants: Mapping[str, Callable[[Tree, Tree], tuple[Tree, Any]]],
    states: Mapping[str, Tree],
    batch_at: BatchAt,
) -> int:
    """Times each variant in each round, in an order that turns, so that what else runs on the machine strikes all
    alike; prints a table, of which the first variant is the base.

    Args:
        variants: name -> (state, batch) -> (state, anything).
        states: what each starts from.
        batch_at: the batch of each round.
    """
    values = flags.FLAGS
    states, times = dict(states), {name: [] for name in variants}
    for repeat in range(values.repeats + WARM):
        batch = batch_at(repeat)
        for name in list(variants)[:: -1 if repeat % 2 else 1]:
            start = time.perf_counter()
            states[name], out = variants[name](states[name], batch)
            jax.block_until_ready((states[name], out))
            if repeat >= WARM:
                times[name].append(1e3 * (time.perf_counter() - start))
    base = next(iter(times.values()))
    rows = [
        {
            'variant': name,
            'median_ms': round(statistics.median(found), 2),
            'lowest_ms': round(min(found), 2),
            'added_ms': round(statistics.median(a - b for a, b in zip(found, base, strict=True)), 2),
            'median_ratio': round(statistics.median(a / b for a, b in zip(found, base, strict=True)), 4),
            'lowest_ratio': round(min(found) / min(base), 4),
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
