"""What does a recorder cost somebody's loop?

    python benchmarks/recorder_overhead.py --widths=128,1024 --rounds=9

The same loop with and without `jaxrnn.Recorder`, in turns in one process: an LSTM over 16 letters, batch 32, Adam in a
compiled step that consumes its state, a new batch for each step. Each round is a number of steps that takes some
seconds; the loop waits for the last. Kinds: `records` (with signals and as many digests as the recorder chooses), and
beside that the batches, and as it comes: with as many checkpoints as it chooses. Prints the medians, and what a step
costs more.
"""

import json
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path[0] = str(ROOT)

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import flags

import jaxrnn
from jaxrnn import environment
from jaxrnn.cli import common
from jaxrnn.rnn import cells, scan

LETTERS, TIME, BATCH, SIZE = 28, 16, 32, 300
OPTIMISER = optax.adam(1e-3)
NEVER = 10**9


def start(width: int):
    glorot, keys = jax.nn.initializers.glorot_uniform(), jax.random.split(jax.random.key(0), 3)
    lstm = scan.Weights(
        kernel=glorot(keys[0], (LETTERS, 4 * width)),
        bias=jnp.zeros(4 * width),
        recurrent_kernel=glorot(keys[1], (width, 4 * width)),
    )
    params = {'lstm': lstm, 'output': glorot(keys[2], (width, SIZE))}
    return params, OPTIMISER.init(params)


def train_step(state, batch):
    params, moments = state

    def loss_of(params):
        _, last = scan.run(cells.lstm(cells.SIGMOID), params['lstm'], batch['letters'], sequences=False)
        return jnp.mean((last.h @ params['output'] - batch['targets']) ** 2)

    loss, gradients = jax.value_and_grad(loss_of)(params)
    updates, moments = OPTIMISER.update(gradients, moments)
    return (optax.apply_updates(params, updates), moments), {'loss': loss}


def batches() -> Iterator[dict[str, np.ndarray]]:
    rng = np.random.default_rng(0)
    while True:
        yield {
            'letters': rng.integers(0, LETTERS, (TIME, BATCH), np.int32),
            'targets': rng.normal(size=(BATCH, SIZE)).astype(np.float32),
        }


KINDS = {
    'records': {'most_bytes': 0, 'checkpoint_every': NEVER},
    'records, batches': {'checkpoint_every': NEVER},
    'as it comes': {'keep_latest': 3, 'keep_every': NEVER},
}


def loops(width: int, home: Path) -> dict[str, Callable[[int], None]]:
    """Each takes a number of steps, and goes on where it was."""
    compiled = jax.jit(train_step, donate_argnums=0)

    def bare() -> Callable[[int], None]:
        state, loader = start(width), batches()

        def go(steps: int) -> None:
            nonlocal state
            for _ in range(steps):
                state, _ = compiled(state, next(loader))
            jax.block_until_ready(state)

        return go

    def recorded(kind: str) -> Callable[[int], None]:
        state, loader = start(width), batches()
        recorder = jaxrnn.Recorder(home / kind.replace(', ', '-'), state, **KINDS[kind])

        def go(steps: int) -> None:
            nonlocal state
            for _ in range(steps):
                batch = next(loader)
                state, metrics = compiled(state, batch)
                recorder(state, metrics, batch)
            jax.block_until_ready(state)

        return go

    return {'bare': bare(), **{kind: recorded(kind) for kind in KINDS}}


def measured(width: int, rounds: int, seconds: float, home: Path) -> dict[str, float]:
    """Median seconds of a step, by loop."""
    running = loops(width, home)
    for go in running.values():
        go(12)
    begin = time.perf_counter()
    running['bare'](10)
    steps = 100 * max(1, round(seconds / (time.perf_counter() - begin) * 10 / 100))
    times: dict[str, list[float]] = {name: [] for name in running}
    for number in range(rounds):
        order = list(running)
        for name in order[number % len(order) :] + order[: number % len(order)]:
            begin = time.perf_counter()
            running[name](steps)
            times[name].append((time.perf_counter() - begin) / steps)
    # Of each round the difference: what else the machine does is in both.
    return {name: statistics.median(found) for name, found in times.items()} | {
        f'{name}, more': statistics.median(a - b for a, b in zip(times[name], times['bare'], strict=True))
        for name in KINDS
    }


def main(arguments: list[str]) -> int:
    del arguments
    results = {}
    for width in map(int, flags.FLAGS.widths):
        home = Path(tempfile.mkdtemp(prefix='jaxrnn-'))
        try:
            found = results[width] = measured(width, flags.FLAGS.rounds, flags.FLAGS.seconds, home)
        finally:
            shutil.rmtree(home, ignore_errors=True)
        print(f'width {width}: a step takes {1e3 * found["bare"]:.3f} ms')
        for kind in KINDS:
            more = found[f'{kind}, more']
            print(f'  {kind:32} {1e3 * more:+.3f} ms, {more / found["bare"]:+.1%}')
    print(json.dumps({'results': results, 'environment': environment.describe()}))
    return 0


flags.DEFINE_list('widths', ['128', '1024'], 'Of the LSTM.')
flags.DEFINE_integer('rounds', 9, 'Turns that each loop has.')
flags.DEFINE_float('seconds', 6.0, 'About how long a turn takes.')

if __name__ == '__main__':
    common.main(main, __doc__)
