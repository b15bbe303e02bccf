"""Does anything but a user's error leave record, bisect or diagnose, whatever pure step they are handed?

    python benchmarks/random_steps.py --count=500 --seed=0
    python benchmarks/random_steps.py --only=17

Each seed is a small program of its own (benchmarks/foreign/random_programs.py). It is run by itself first: what JAX
refuses is no program, and isn't counted. Then it is recorded for 40 steps, bisected and diagnosed. What left them is
grouped by its last line; with --only there is the whole traceback. Texts for users are printed too: each must be about
something that its reader can put right.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path[0] = str(ROOT)

import collections
import json
import logging
import re
import tempfile
import time
import traceback
import warnings
from typing import Any

import jax
import numpy as np
from absl import flags

import jaxrnn
from benchmarks.foreign import random_programs
from jaxrnn import environment
from jaxrnn.cli import common

STEPS = 40
SLOW = 20.0
"""Seconds; a program of this size that takes longer is named."""


def is_program(run) -> bool:
    """Whether JAX takes it, and its state keeps its form; and whether the loop can be jitted again with it."""
    try:
        state = run.init()
        advance = jax.jit(run.step)
        for k in range(2):
            after, _ = advance(state, run.batch_at(k))
            if jax.tree.structure(after) != jax.tree.structure(state):
                return False
            if [jax.numpy.shape(x) for x in jax.tree.leaves(after)] != [
                np.shape(x) for x in jax.tree.leaves(state)
            ]:
                return False
            state = after
    except Exception:
        return False
    return True


def changes_of(drawn: random_programs.Drawn, rng: np.random.Generator) -> list:
    """None, one that works, one that can't be made, one that can't be traced, or one whose state has another form."""
    half = drawn.faster(0.5)

    def broken(state, batch):
        return half.step(state['no such thing'], batch)

    def unmade():
        raise RuntimeError('a change of the user, which raises where it is made')

    kinds = {
        'half the rate': lambda: jaxrnn.Changed(half.step, half.batch_at),
        'mistyped': lambda: jaxrnn.Changed(broken, half.batch_at),
        'unmade': unmade,
        'another form': lambda: jaxrnn.Changed(half.step, half.batch_at, lambda state: (state, 1)),
        'no batches': lambda: jaxrnn.Changed(half.step, lambda k: None),
    }
    names = [str(name) for name in rng.choice([*kinds], size=rng.integers(0, 3), replace=False)]
    return [jaxrnn.Change(name, 'optimiser', kinds[name]) for name in names]


def asked(drawn: random_programs.Drawn) -> list[tuple[str, Exception]]:
    """What left the debugger, by where."""
    rng = np.random.default_rng([drawn.words['seed'], 6])
    run, found = drawn.run, []
    options = (
        {} if rng.random() < 0.7 else {'when': str(rng.choice(['loss > 3 * median(loss, 16)', 'losss > 2']))}
    )
    every = int(rng.choice([5, 10, 20, 50]))
    changes = changes_of(drawn, rng)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as directory:
        ask = (run.step, run.batch_at, directory)
        calls = {
            'record': lambda: jaxrnn.record(
                run.step, run.batch_at, run.init, directory, max_steps=STEPS, checkpoint_every=every
            ),
            'bisect': lambda: jaxrnn.bisect(*ask, like=run.init, **options),
            'diagnose': lambda: jaxrnn.diagnose(*ask, changes, like=run.init, budget=150, **options),
        }
        for name, call in calls.items():
            try:
                call()
            except Exception as error:
                found.append((name, error))
                if name == 'record':
                    break
    return found


def last_line(error: Exception) -> str:
    """What it says, without what is each program's own; and where in the package it came from."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if '/jaxrnn/' in frame.filename]
    said = re.sub(r'/[^ :]*/tmp\w+', 'DIRECTORY', ' '.join(str(error).split()))[:150]
    at = f' ({Path(frames[-1].filename).name}:{frames[-1].lineno})' if frames else ''
    return f'{type(error).__name__}: {re.sub(r"[0-9]+", "#", said)}{at}'


def say(title: str, groups: dict[str, list[tuple[int, str]]]) -> None:
    print(f'{title}: {len(groups)} kinds')
    for text, programs in sorted(groups.items(), key=lambda item: -len(item[1])):
        where = ', '.join(f'{seed} {call}' for seed, call in programs[:6])
        print(f'  {len(programs):4d}  {text}\n        {where}{" …" if len(programs) > 6 else ""}', flush=True)


def one(seed: int) -> int:
    drawn = random_programs.draw(seed)
    print(drawn.words)
    if not is_program(drawn.run):
        print('JAX refuses it, or its state changes its form: no program')
    for call, error in asked(drawn):
        print(call)
        traceback.print_exception(error)
    return common.HEALTHY


def main(arguments: list[str]) -> int:
    del arguments
    values = flags.FLAGS
    warnings.simplefilter('ignore')
    logging.disable()  # what is said in passing, and what goes on in threads of a record that was refused
    if values.only >= 0:
        return one(values.only)
    died: dict[str, list[Any]] = collections.defaultdict(list)
    refused: dict[str, list[Any]] = collections.defaultdict(list)
    programs, slow, seed = 0, [], values.seed
    while programs < values.count:
        drawn = random_programs.draw(seed)
        if is_program(drawn.run):
            programs += 1
            start = time.perf_counter()
            for call, error in asked(drawn):
                (refused if isinstance(error, jaxrnn.UserError) else died)[last_line(error)].append(
                    (seed, call)
                )
            if (took := time.perf_counter() - start) > SLOW:
                slow.append((seed, round(took)))
            jax.clear_caches()
        seed += 1
        if seed % 20 == 0:
            print(f'{programs} programs, {len(died)} kinds of exception', file=sys.stderr, flush=True)
    say('exceptions', died)
    say("users' errors", refused)
    broken = {seed for group in died.values() for seed, _ in group}
    print(
        f'{len(broken)} of {programs} programs failed, of {seed - values.seed} drawn; slow: {slow or "none"}'
    )
    if values.json:
        found = {'machine': environment.describe(), 'programs': programs, 'died': died, 'refused': refused}
        Path(values.json).write_text(json.dumps(found, indent=1) + '\n')
    return common.FAILED if broken else common.HEALTHY


common.define('run', 'count', 500, 'Programs.')
common.define('run', 'seed', 0, 'Of the first program; the next has the next.')
common.define('run', 'only', -1, 'One program, with whole tracebacks.')
common.define('run', 'json', '', 'Write what was found to this file.')
common.define('run', 'threads', 0, 'Processors to use; 0: all.')

if __name__ == '__main__':
    common.main(main, __doc__)
