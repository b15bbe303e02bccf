"""A data set as one file: a run keeps its own, so that it can be diagnosed where its source is missing."""

import os
from pathlib import Path

import numpy as np

from jaxrnn.record import durable
from jaxrnn.types import UserError
from jaxrnn.words.data.dataset import Dataset, digest_of

ARRAYS = ('letters', 'vectors', 'train', 'validation', 'test')


def write_dataset(path: str | os.PathLike, data: Dataset) -> None:
    """Writes whole or not at all. Raises UserError where the disk refuses."""
    path = Path(path)
    texts = {'words': '\n'.join(data.words), 'alphabet': data.alphabet, 'source': data.source}
    encoded = {name: np.frombuffer(text.encode(), np.uint8) for name, text in texts.items()}
    temporary = path.with_name(path.name + '.part')
    try:
        with open(temporary, 'wb') as file:
            np.savez(file, **encoded, **{name: getattr(data, name) for name in ARRAYS})  # type: ignore[arg-type]
        durable.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise UserError(f'{path}: {error.strerror}; make room or choose another --run_dir') from error


def read_dataset(path: str | os.PathLike) -> Dataset:
    """Reads what `write_dataset` wrote; `dropped` isn't kept. Raises UserError for a damaged file."""
    try:
        with np.load(path, allow_pickle=False) as file:
            texts = {name: file[name].tobytes().decode() for name in ('words', 'alphabet', 'source')}
            arrays = {name: file[name] for name in ARRAYS}
    except Exception as error:  # zipfile, zlib and NumPy each have their own
        raise UserError(
            f"{path}: the run's copy of its data can't be read ({error}); delete it to read the data from its "
            'source again'
        ) from error
    for array in arrays.values():
        array.flags.writeable = False
    words = tuple(texts['words'].split('\n'))
    digest = digest_of(words, texts['alphabet'], tuple(arrays[name] for name in ARRAYS))
    return Dataset(words, texts['alphabet'], **arrays, dropped={}, digest=digest, source=texts['source'])
