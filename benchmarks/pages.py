"""How large is the page of a run, and how soon is it drawn?

    python benchmarks/pages.py --rounds=5
    python benchmarks/pages.py --run_dir=runs/demo --shots=docs/images

Pages of five runs, in Chromium: of 100,000 steps with six metrics; of a NaN in a program of flax.nnx; of a training by
`jaxrnn.record` that is healthy, and of one that another program can't reproduce; and of --run_dir, if one is given.
Each is opened anew in each round. Prints the size of the file, the seconds that it took to make it, and the median
seconds from the call for the page until all is drawn. --shots saves pictures of each at two widths, in light and dark.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path[0] = str(ROOT)
sys.path.insert(1, str(ROOT / 'tests'))

import itertools
import statistics
import tempfile
import time
from collections.abc import Callable

import browsing
import jax
import jax.numpy as jnp
import looping
import numpy as np
import optax
from absl import flags
from playwright import sync_api

import jaxrnn
from jaxrnn import environment
from jaxrnn.cli import common, own_runs
from jaxrnn.record.record_file import RecordFile
from jaxrnn.report import page

WIDTHS, SCHEMES = (1100, 380), ('light', 'dark')


def long(directory: Path) -> None:
    """100,000 records."""
    rng = np.random.default_rng(0)
    values = np.exp(rng.normal(size=(100_000, 6)).cumsum(axis=0) * 0.01)
    values[66_666] *= 100
    file = RecordFile(directory / 'records.jsonl')
    for first in range(0, len(values), 1000):
        rows = enumerate(values[first : first + 1000], first)
        for step, row in rows:
            file.append({'step': step, **{f'metric_{n}': float(value) for n, value in enumerate(row)}})
    file.close()


def nnx(directory: Path) -> None:
    """A batch of which a number is a NaN."""
    program = looping.load('nnx_rnn')
    given = list(itertools.islice(program.batches(), 60))
    looping.nan_in_batch(None, given, 41)
    program.main(given, directory)
    step, like = program.replayed()
    jaxrnn.report(directory, *jaxrnn.diagnose(step, None, directory, like=like))


def linear(rate: float) -> Callable:
    def step(state, batch):
        x, y = batch
        weights, moments = state
        loss, gradient = jax.value_and_grad(lambda weights: jnp.mean((x @ weights - y) ** 2))(weights)
        updates, moments = optax.adam(rate).update(gradient, moments)
        return (optax.apply_updates(weights, updates), moments), {'loss': loss}

    return step


def batch_at(number: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(number)
    x = rng.normal(size=(32, 8)).astype(np.float32)
    return x, x @ np.arange(8, dtype=np.float32) + rng.normal(size=32).astype(np.float32)


def start():
    weights = jnp.zeros(8)
    return weights, optax.adam(1e-2).init(weights)


def healthy(directory: Path) -> None:
    jaxrnn.record(linear(3e-2), batch_at, start, directory, max_steps=1000)
    found = jaxrnn.diagnose(linear(3e-2), batch_at, directory, like=start)
    jaxrnn.report(directory, *found)


def irreproducible(directory: Path) -> None:
    """Recorded with another learning rate than is replayed."""
    jaxrnn.record(linear(3e-2), batch_at, start, directory, max_steps=1000)
    found = jaxrnn.diagnose(linear(2e-2), batch_at, directory, like=start, when='step == 900')
    jaxrnn.report(directory, *found)


RUNS = {'long': long, 'nnx': nnx, 'healthy': healthy, 'irreproducible': irreproducible}


def main(arguments: list[str]) -> int:
    del arguments
    with tempfile.TemporaryDirectory() as temporary, sync_api.sync_playwright() as playwright:
        browser = browsing.launched(playwright)
        made = {}
        for name, make in RUNS.items():
            directory = Path(temporary) / name
            directory.mkdir()
            make(directory)
            made[name] = directory
        if given := flags.FLAGS.run_dir:
            made[Path(given).name] = Path(given)
        for name, directory in made.items():
            target = Path(temporary) / f'{name}.html'
            begun = time.perf_counter()
            page.write(directory, own_runs.alarms_of(str(directory)), path=target)
            written = time.perf_counter() - begun
            drawn = [_drawn(browser, target) for _ in range(flags.FLAGS.rounds)]
            size = target.stat().st_size / 1e6
            print(
                f'{name:16} {size:.2f} MB, made in {written:.1f} s, drawn in {statistics.median(drawn):.2f} s',
                flush=True,
            )
            if flags.FLAGS.shots:
                _picture(browser, target, Path(flags.FLAGS.shots))
        print(environment.describe(), f'Chromium {browser.version}')
        browser.close()
    return 0


def _drawn(browser, target: Path) -> float:
    opened = browsing.opened(browser, target)
    assert not opened.said and len(opened.asked) == 1, (opened.said, opened.asked)
    opened.page.context.close()
    return opened.seconds


def _picture(browser, target: Path, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for width, scheme in itertools.product(WIDTHS, SCHEMES):
        opened = browsing.opened(browser, target, width=width, scheme=scheme)
        opened.page.screenshot(path=folder / f'{target.stem}-{width}-{scheme}.png', full_page=True)
        opened.page.context.close()


if __name__ == '__main__':
    common.define('pages', 'rounds', 5, 'How often each page is opened.', at_least=1, at_most=100)
    common.define('pages', 'shots', '', 'A folder for pictures of the pages.')
    common.define('pages', 'run_dir', '', 'A run whose page is measured, too.')
    common.main(main, __doc__)
