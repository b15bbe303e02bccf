"""Is a diagnosis right on runs that nobody here made: symptom, step, place, cause, each by itself?

    python benchmarks/foreign_runs.py
    python benchmarks/foreign_runs.py --held_out --json=held_out.json
    python benchmarks/foreign_runs.py --healthy

Programs in the style of public training code (benchmarks/foreign), each with five faults or none, drawn at random in
kind, step, place and size. What is true of a run is found from the run and its twin without the fault, not from the
debugger. Programs that are held out are asked with --held_out alone, and nobody looks at what is said of them while
building. Each miss is printed with what is true and what was said.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path[0] = str(ROOT)

import dataclasses
import json
import logging
import warnings

import jax
from absl import flags
from rich.console import Console
from rich.table import Table

from benchmarks.foreign import faults, healthy, scoring
from benchmarks.foreign.common import Program
from benchmarks.foreign.programs import ALL
from jaxrnn import environment
from jaxrnn.cli import common
from jaxrnn.errors import UserError


def chosen() -> list[Program]:
    values = flags.FLAGS
    kept = {name: program for name, program in ALL.items() if program.held_out == values.held_out}
    names = values.only.split(',') if values.only else list(kept)
    for name in names:
        if name not in kept:
            raise UserError(f'--only: {name!r} found, some of {", ".join(kept)} expected')
    return [kept[name] for name in names]


def planted(program: Program):
    values = flags.FLAGS
    if values.healthy:
        return healthy.runs(program, values.seed, values.number)
    return faults.battery(program, values.seed, values.number)


def say(score: scoring.Score, every: bool) -> None:
    if not (every or score.missed):
        return
    what = f'{score.program}, {score.fault} {score.size} at {score.at} of {score.steps}'
    marks = [
        f'{name} {value}'
        for name in ('detected', 'step', 'place', 'cause')
        if (value := getattr(score, name))
    ]
    marks += [] if score.same else ['replay differs']
    print(
        f'{what}: {", ".join(marks) or score.error}\n   true: {score.truth}\n   said: {score.said}',
        flush=True,
    )


def main(arguments: list[str]) -> int:
    del arguments
    values = flags.FLAGS
    warnings.simplefilter('ignore')
    logging.disable()
    scores, rows = [], []
    for program in chosen():
        of_it = []
        for each in planted(program):
            if values.fault and each.fault not in values.fault.split(','):
                continue
            of_it.append(scoring.ask(each))
            say(of_it[-1], values.all)
            jax.clear_caches()
        rows.append(scoring.summary(program.name, of_it))
        scores += of_it
        print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    table = Table(*scoring.COLUMNS)
    for row in [*rows, scoring.summary('all', scores)]:
        table.add_row(*row.values())
    Console(width=130).print(table)
    if values.json:
        found = {
            'machine': environment.describe(),
            'seed': values.seed,
            'runs': list(map(dataclasses.asdict, scores)),
        }
        Path(values.json).write_text(json.dumps(found, indent=1) + '\n')
    return common.HEALTHY


common.define('run', 'only', '', 'Programs, by name with commas; all if not given.')
common.define('run', 'fault', '', 'Of the runs that are drawn, those with these faults alone.')
common.define('run', 'held_out', False, 'The programs that are kept apart, and no others.')
common.define(
    'run', 'healthy', False, 'Runs without a fault: other seeds, rates, batch sizes, schedules, lengths.'
)
common.define('run', 'number', 5, 'Runs of each program; of healthy ones 7 make a hundred.')
common.define('run', 'seed', 0, 'Of what is drawn.')
common.define('run', 'all', False, 'Print what is said of each run, right or not.')
common.define('run', 'json', '', 'Write all scores to this file.')
common.define('run', 'threads', 0, 'Processors to use; 0: all.')

if __name__ == '__main__':
    common.main(main, __doc__)
