"""A small data set and program for tests: 40 words of 2 to 6 letters, vectors of 8."""

import functools
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxrnn.record.record_file import RecordFile
from jaxrnn.record.records import series
from jaxrnn.types import Series
from jaxrnn.words import config, data, train

NETWORKS = ('lstm', 'gru', 'stacked')


@functools.lru_cache
def dataset(pad_to: int = 0) -> data.Dataset:
    rng = np.random.default_rng(0)
    words: dict[str, None] = {}
    while len(words) < 40:
        words[''.join(rng.choice(list('abcdefgh'), rng.integers(2, 7)))] = None
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / 'vectors.txt'
        data.write_vectors(path, list(words), rng.normal(size=(40, 8)).astype(np.float32))
        options = config.Data(vectors=str(path), validation_share=0.0, test_share=0.0, pad_to=pad_to)
        return data.load(options, seed=0)


def configuration(
    network: str = 'lstm', *, hidden: int = 8, preset: str = 'keras3', **training
) -> config.Config:
    return config.Config(
        model=config.Model(network=network, preset=preset, hidden=hidden),
        optimiser=config.Optimiser(learning_rate=3e-3),
        training=config.Training(**{'batch_size': 8, **training}),
    )


def series_of(program: train.Program, steps: int) -> Series:
    """The records of a run of so many steps, as columns."""
    step, state, records = jax.jit(program.step), program.init(), []
    for number in range(steps):
        state, record = step(state, program.batch_at(number))
        records.append(record)
    return series(
        {'step': number, **{name: float(value) for name, value in record.items()}}
        for number, record in enumerate(jax.device_get(records))
    )


@functools.lru_cache
def program(
    network: str = 'lstm', hidden: int = 8, preset: str = 'keras3', batch_size: int = 8
) -> train.Program:
    made = configuration(network, hidden=hidden, preset=preset, batch_size=batch_size)
    return train.make_program(made, dataset())


def read_records(path: Path) -> list[dict[str, Any]]:
    """The rows of a file, to be altered."""
    return [dict(row) for row in RecordFile(path).read()]


def write_records(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Rows as a run would have written them."""
    path.unlink()
    file = RecordFile(path)
    for row in rows:
        file.append(row)
    file.close()
