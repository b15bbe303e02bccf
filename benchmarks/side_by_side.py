"""Variants of one train step, timed side by side: what the benchmarks of its extras share."""

import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from absl import flags
from rich.console import Console
from rich.table import Table

from jaxrnn import environment
from jaxrnn.cli import common
from jaxrnn.types import BatchAt, Tree
from jaxrnn.words import config

WARM = 2
"""Rounds that aren't counted: the first compiles."""


def define_flags(repeats: int) -> None:
    common.define('run', 'network', 'lstm', 'The network.', ('lstm', 'gru', 'stacked'))
    common.define('run', 'hidden', 0, 'Width; 0: stock.')
    common.define('run', 'batch_size', 32, 'Words in a batch.')
    common.define('run', 'repeats', repeats, 'Measured rounds.')
    # With it, memory is kept as where a run is trained (common.start).
    common.define('run', 'threads', 0, 'Processors to use; 0: all.')
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
    alike; prints a table of medians, and of ratios of medians and of lower quartiles to the first variant's. Time on
    the processors, all threads together, is less at the mercy of other processes than time on the clock.

    Args:
        variants: name -> (state, batch) -> (state, anything).
        states: what each starts from.
        batch_at: the batch of each round.
    """
    values = flags.FLAGS
    states, walls, cpus = dict(states), {name: [] for name in variants}, {name: [] for name in variants}
    names = list(variants)
    for repeat in range(values.repeats + WARM):
        batch = batch_at(repeat)
        for name in names[repeat % len(names) :] + names[: repeat % len(names)]:
            wall, cpu = time.perf_counter(), time.process_time()
            states[name], out = variants[name](states[name], batch)
            jax.block_until_ready((states[name], out))
            if repeat >= WARM:
                walls[name].append(1e3 * (time.perf_counter() - wall))
                cpus[name].append(1e3 * (time.process_time() - cpu))

    def row(name: str) -> dict[str, Any]:
        found: dict[str, Any] = {'variant': name}
        for kind, times in (('wall', walls), ('cpu', cpus)):
            base, own = (np.quantile(times[each], (0.25, 0.5)) for each in (names[0], name))
            found[f'{kind}_ms'] = round(own[1], 2)
            found[f'{kind}_ratio'] = round(own[1] / base[1], 4)
            found[f'{kind}_ratio_q1'] = round(own[0] / base[0], 4)
        return found

    rows = [row(name) for name in names]
    table = Table(*rows[0])
    for row in rows:
        table.add_row(*(str(value) for value in row.values()))
    Console(stderr=values.json).print(table)
    if values.json:
        shape = {name: values[name].value for name in ('network', 'hidden', 'batch_size', 'repeats')}
        common.print_json({**shape, 'machine': environment.describe(), 'rows': rows})
    return common.HEALTHY
