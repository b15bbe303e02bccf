"""A data set as one file: a run keeps its own, so that it can be diagnosed where its source is missing."""

import os
import zipfile
from collections.abc import Mapping

import numpy as np

from jaxrnn.files import open_regular, replacing
from jaxrnn.types import UserError
from jaxrnn.words.data.dataset import Dataset, digest_of

SPLIT = ('train', 'validation', 'test')
ARRAYS = ('letters', 'vectors', *SPLIT)
TEXTS = ('words', 'alphabet', 'source')
TYPES = {'letters': np.int32, 'vectors': np.float32, **dict.fromkeys(SPLIT, np.int32)}
AXES = {'letters': 2, 'vectors': 2, **dict.fromkeys(SPLIT, 1)}


def write_dataset(path: str | os.PathLike, data: Dataset) -> None:
    """Writes whole or not at all. Raises UserError where the disk refuses, or no regular file is at `path`."""
    texts = {'words': '\n'.join(data.words), 'alphabet': data.alphabet, 'source': data.source}
    encoded = {name: np.frombuffer(text.encode(), np.uint8) for name, text in texts.items()}
    try:
        with replacing(path) as file:
            np.savez(file, **encoded, **{name: getattr(data, name) for name in ARRAYS})  # type: ignore[arg-type]
    except OSError as error:
        raise UserError(f'{path}: {error.strerror}; make room or choose another --run_dir') from error


def read_dataset(path: str | os.PathLike) -> Dataset:
    """Reads what `write_dataset` wrote; `dropped` isn't kept. Raises UserError for a damaged file."""
    try:
        with open_regular(path) as file:
            _check_stored(file)
            with np.load(file, allow_pickle=False) as opened:
                texts = {name: opened[name].tobytes().decode() for name in TEXTS}
                arrays = {name: opened[name] for name in ARRAYS}
        _check(texts, arrays)
    except UserError:
        raise
    except Exception as error:  # zipfile, zlib and NumPy each have their own
        said = ' '.join(str(error).split())[:200]
        raise UserError(
            f"{path}: the run's copy of its data can't be read ({said}); copy the run again, or delete this file to "
            'read the data from its source again'
        ) from error
    for array in arrays.values():
        array.flags.writeable = False
    words = tuple(texts['words'].split('\n'))
    digest = digest_of(words, texts['alphabet'], tuple(arrays[name] for name in ARRAYS))
    return Dataset(words, texts['alphabet'], **arrays, dropped={}, digest=digest, source=texts['source'])


def _check_stored(file) -> None:
    """Raises ValueError for an archive that is packed, as ours never is: it may unpack to any size."""
    with zipfile.ZipFile(file) as archive:
        if packed := [each for each in archive.infolist() if each.compress_type != zipfile.ZIP_STORED]:
            raise ValueError(f'{packed[0].filename!r} is packed')
        size = os.fstat(file.fileno()).st_size
        for each in archive.infolist():
            with archive.open(each) as member:
                if _claimed(member) > size:
                    raise ValueError(f'{each.filename!r} claims to be larger than the file')
    file.seek(0)


def _claimed(member) -> int:
    """The bytes that the header of an array claims. Raises ValueError for objects."""
    version = np.lib.format.read_magic(member)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, _, dtype = read(member)
    if dtype.hasobject:
        raise ValueError('an array of objects')
    count = 1
    for length in shape:
        count *= int(length)  # which has no bound, as NumPy's own has
    return count * dtype.itemsize


def _check(texts: Mapping[str, str], arrays: Mapping[str, np.ndarray]) -> None:
    """Raises ValueError for arrays that don't belong together."""
    for name, array in arrays.items():
        if array.dtype != TYPES[name] or array.ndim != AXES[name]:
            raise ValueError(f'{name}: {array.dtype} of {array.ndim} axes')
    count = len(texts['words'].split('\n'))
    letters, vectors = arrays['letters'], arrays['vectors']
    if letters.shape[1] != count or len(vectors) != count or not letters.size or not vectors.size:
        raise ValueError(f'{count} words, letters of {letters.shape[1]} and vectors of {len(vectors)}')
    if letters.min() < 0 or letters.max() >= len(texts['alphabet']):
        raise ValueError('letters beyond the alphabet')
    if not arrays['train'].size:
        raise ValueError('no word to train on')
    for name in SPLIT:
        if arrays[name].size and (arrays[name].min() < 0 or arrays[name].max() >= count):
            raise ValueError(f'{name}: rows beyond the last word')
