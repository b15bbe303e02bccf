"""tf.data: an iterator over a dataset that knows its place, so that a run goes on there.

Without this door a dataset is a loader like any other: the batches of the steps that were taken are drawn and left out.
"""

import io
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tensorflow as tf

from jaxrnn.types import Tree, UserError

NAME = 'place'
"""Of TensorFlow's files of a place."""


class Places:
    """A dataset, for `Recorder.batches` and `Drawn`. Each iterator over it can say where it is, and be set there.

    Args:
        dataset: one whose order comes out the same again, as `shuffle(..., seed=3)`.

    >>> dataset = tf.data.Dataset.range(100).shuffle(10, seed=3).batch(4)
    >>> iterator = iter(Places(dataset))
    >>> _, place = next(iterator), iterator.get_state()
    >>> expected, again = next(iterator), iter(Places(dataset))
    >>> again.set_state(place)
    >>> bool((next(again) == expected).all())
    True
    """

    def __init__(self, dataset: tf.data.Dataset):
        self._dataset = dataset

    def __iter__(self) -> 'PlacedIterator':
        return PlacedIterator(iter(self._dataset))


class PlacedIterator(Iterator[Tree]):
    """Batches, as trees of NumPy's arrays.

    Args:
        iterator: over a dataset.
    """

    def __init__(self, iterator: Any):
        self._iterator = iterator

    def __next__(self) -> Tree:
        return jax.tree.map(np.asarray, next(self._iterator))

    def get_state(self) -> bytes:
        """Where it is, with what is in the buffers of shuffling. A dataset that can't say it raises what TensorFlow
        raises."""
        with tempfile.TemporaryDirectory() as directory:
            tf.train.Checkpoint(iterator=self._iterator).write(str(Path(directory) / NAME))
            packed = io.BytesIO()
            with zipfile.ZipFile(packed, 'w', zipfile.ZIP_DEFLATED) as archive:
                for path in sorted(Path(directory).iterdir()):
                    archive.write(path, path.name)
        return packed.getvalue()

    def set_state(self, place: bytes) -> None:
        """Goes to where `get_state` was called. Raises UserError for a place of another dataset."""
        with tempfile.TemporaryDirectory() as directory:
            try:
                with zipfile.ZipFile(io.BytesIO(place)) as archive:
                    for name in archive.namelist():
                        (Path(directory) / Path(name).name).write_bytes(archive.read(name))
                found = tf.train.Checkpoint(iterator=self._iterator).read(str(Path(directory) / NAME))
                found.assert_consumed()
            except (zipfile.BadZipFile, tf.errors.OpError, AssertionError) as error:
                first = str(error).strip().splitlines()[:1]
                raise UserError(f'tf.data: a place found that is none in this dataset: {first}') from error
