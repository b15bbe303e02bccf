"""Which words are lost first, and what a step for one of them does to the others.

    python benchmarks/study/lost_words.py --run_dir=runs/study/lstm-stock-0 --first=7214 --last=7224 --threads=1

Replays a run's steps, and asks after each of them for the error of every word that it is trained on.
"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).parent.parent.parent)

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from rich.console import Console
from rich.table import Table

from jaxrnn.bisect import replay
from jaxrnn.cli import common
from jaxrnn.words import run

SHOWN = 2
"""Words of a batch, those with the largest errors."""

SEEN = 128
"""Steps before the first, in which it is looked for when a word was last in a batch."""


def main(arguments: list[str]) -> int:
    del arguments
    values = flags.FLAGS
    opened = run.open_run(values.run_dir)
    dataset, program = opened.dataset, opened.program
    step, predict = jax.jit(program.step), jax.jit(program.predict)
    letters, targets = jnp.asarray(dataset.letters[:, dataset.train]), dataset.vectors[dataset.train]
    place = {int(word): n for n, word in enumerate(dataset.train)}

    def words_of(number: int) -> np.ndarray:
        return np.array([place[int(word)] for word in np.asarray(program.batch_at(number).index)])

    def errors(state) -> np.ndarray:
        return np.mean((np.asarray(predict(state.params, letters)) - targets) ** 2, axis=1)

    subject = replay.subject(program.step, program.batch_at, opened.checkpoints, opened.records)
    replayer = replay.Replayer(subject)
    state = replayer.state(values.first)
    last = {
        n: number for number in range(max(values.first - SEEN, 0), values.first) for n in words_of(number)
    }
    followed = [n for n, word in enumerate(dataset.train) if dataset.words[word] == values.word]
    table = Table(
        'step', 'largest errors in the batch (steps unseen)', 'step norm', 'median of all', 'mean of the others',
        values.word,
    )  # fmt: skip
    before = errors(state)
    for number in range(values.first, values.last + 1):
        batch = words_of(number)
        worst = batch[np.argsort(-before[batch])][:SHOWN]
        named = ', '.join(
            f'{dataset.words[dataset.train[n]]} {before[n]:.1e} ({number - last[n] if n in last else "?"})'
            for n in worst
        )
        state, record = step(state, program.batch_at(number))
        after = errors(state)
        others = np.setdiff1d(np.arange(len(before)), batch)
        moved = f'{before[others].mean():.2e} -> {after[others].mean():.2e}'
        length, median = f'{float(record["update_norm"]):.2f}', f'{np.median(before):.1e}'
        of_word = ', '.join(f'{before[n]:.1e}' + ' in the batch' * (n in batch) for n in followed)
        table.add_row(str(number), named, length, median, moved, of_word)
        last |= dict.fromkeys(map(int, batch), number)
        before = after
    Console(width=140).print(table)
    same = replayer.first_mismatch is None
    print(
        'replayed up to there bit for bit as recorded'
        if same
        else 'NOT as recorded: give --threads as in training'
    )
    return common.HEALTHY if same else common.IRREPRODUCIBLE


if __name__ == '__main__':
    common.define_run('The directory of the run.')
    common.define('run', 'first', 0, 'The first step that is looked at.')
    common.define('run', 'last', 0, 'The last.')
    common.define('run', 'word', '', 'A word whose error is to be shown at each step.')
    common.main(main, __doc__)
