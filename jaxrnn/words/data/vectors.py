"""Words and their vectors: gathered from rows, scaled, compared, written."""

import os
from array import array
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from jaxrnn.files import replacing
from jaxrnn.types import UserError
from jaxrnn.words.data.formats import VectorTable, shown, vector_table
from jaxrnn.words.data.letters import composed, why_unusable

BLOCK = 1 << 22  # numbers worked on at once, in float64 32 MiB
EQUAL = 'equal to another word after NFC'


class Vectors(NamedTuple):
    """The usable words of a file and their vectors."""

    words: tuple[str, ...]  # in the order of the file, NFC
    vectors: np.ndarray  # float32 [N, E], finite
    dropped: Mapping[str, int]  # reason -> count, of the rows that were read
    kind: str  # of the file
    unit: str  # what `numbers` count: line or row
    numbers: Sequence[int]  # [N], where in the file each word is


def read_vectors(
    path: str | os.PathLike, *, max_length: int, num_words: int = 0, allow_pickle: bool = False
) -> Vectors:
    """Reads a file of word vectors, whatever its format, no further than `num_words` usable words need.

    Args:
      max_length: drop words of more letters.
      num_words: keep so many; 0 keeps all.
      allow_pickle: read pickled KeyedVectors, which can run any code.

    Raises:
      UserError: for all that a file can have wrong.
    """
    path = os.fspath(path)
    with vector_table(path, allow_pickle=allow_pickle) as table:
        return gather(path, table, max_length=max_length, num_words=num_words)


def gather(name: str, table: VectorTable, *, max_length: int, num_words: int = 0) -> Vectors:
    """Keeps the usable words of a table, the first of those that NFC makes equal."""
    kept: dict[str, int] = {}  # word -> its number
    written: dict[str, str] = {}  # the kept words that NFC changed -> as they were
    dropped: Counter[str] = Counter()
    values = bytearray()  # grows as rows arrive: what a header claims allocates nothing
    for number, raw, vector in table.rows:
        word = composed(raw)
        if word in kept and written.get(word, word) == raw:
            raise _twice(name, table.unit, raw, kept[word], number)
        if reason := why_unusable(word, max_length) or (EQUAL if word in kept else ''):
            dropped[reason] += 1
            continue
        kept[word] = number
        if word != raw:
            written[word] = raw
        values += vector.data
        if len(kept) == num_words:
            break
    vectors = np.frombuffer(values, np.float32).reshape(-1, table.size)
    numbers = array('q', kept.values())
    found = Vectors(tuple(kept), vectors, dict(dropped), table.kind, table.unit, numbers)
    _check_finite(name, found)
    return found


def normalised(name: str, found: Vectors) -> Vectors:
    """Every vector scaled to length 1. Raises UserError for one of length 0."""
    zero = np.flatnonzero(~found.vectors.any(axis=1))
    if len(zero):
        raise UserError(
            f'{name}: {_place(found, zero[0])} has length 0 and no direction; remove it or give --nonormalise'
        )
    return found._replace(vectors=unit_length(found.vectors))


def unit_length(vectors: np.ndarray) -> np.ndarray:
    """float32 [N, E], every row scaled to length 1; zeros stay, what isn't finite becomes NaN."""
    scaled = np.empty(vectors.shape, np.float32)
    for rows in _blocks(*vectors.shape):
        block = vectors[rows].astype(np.float64)  # squares of float32 leave its range
        length = np.linalg.norm(block, axis=1, keepdims=True)
        with np.errstate(invalid='ignore'):
            scaled[rows] = block / np.where(length == 0, 1, length)
    return scaled


def nearest(vectors: np.ndarray, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The k rows of `vectors` of the largest cosine to each query.

    Args:
      vectors: [N, E].
      queries: [Q, E]; a query that isn't finite gets cosines of NaN.
      k: 1 to N.

    Returns:
      Index [Q, k] and cosine float32 [Q, k], the largest first. Of equals the lower index comes first.

    Raises:
      ValueError: for k out of its range.
    """
    if not 1 <= k <= len(vectors):
        raise ValueError(f'k: {k} found, 1 to {len(vectors)} expected')
    units, queries = unit_length(vectors), unit_length(queries)
    index = np.empty((len(queries), k), np.int64)
    cosine = np.empty((len(queries), k), np.float32)
    for rows in _blocks(len(queries), len(vectors)):
        block = queries[rows] @ units.T
        top = np.argpartition(-block, k - 1, axis=1)[:, :k]  # sorts NaN last
        order = np.lexsort((top, -np.take_along_axis(block, top, 1)))
        index[rows] = np.take_along_axis(top, order, 1)
        cosine[rows] = np.take_along_axis(block, index[rows], 1)
    return index, cosine


def write_vectors(path: str | os.PathLike, words: Sequence[str], vectors: np.ndarray) -> None:
    """Writes word2vec text; `read_vectors` and gensim read back the same bits.

    Args:
      words: N, each once and without whitespace.
      vectors: finite, [N, E]; written as float32.

    Raises:
      UserError: for words or vectors that the format can't hold, or a path that can't be written.
    """
    vectors = np.asarray(vectors, np.float32)
    if len(words) != len(vectors):
        raise ValueError(f'{len(words)} words but {len(vectors)} vectors')
    _check_writable(path, words, vectors)
    try:
        with replacing(path) as file:
            file.write(f'{len(words)} {vectors.shape[1]}\n'.encode())
            for word, vector in zip(words, vectors, strict=True):
                file.write(f'{word} {" ".join(map(str, vector))}\n'.encode())
    except OSError as error:
        raise UserError(f'{path}: cannot be written ({error.strerror}); give another path') from error


def _check_writable(path: str | os.PathLike, words: Sequence[str], vectors: np.ndarray) -> None:
    for word in words:
        if not word or any(letter.isspace() for letter in word):
            raise UserError(
                f'{path}: the word {shown(word)} has whitespace or no letter; word2vec has no room'
            )
    if len(set(words)) < len(words):
        word = Counter(words).most_common(1)[0][0]
        raise UserError(f'{path}: the word {shown(word)} is there twice; word2vec text needs each word once')
    if not np.isfinite(vectors).all():
        word = words[int(np.argmin(np.isfinite(vectors).all(axis=1)))]
        raise UserError(f'{path}: the vector of {shown(word)} is not finite; finite numbers expected')


def _check_finite(name: str, found: Vectors) -> None:
    # The extremes of a row are NaN if any of it is; isfinite of all would need an array as large.
    extremes = found.vectors.max(axis=1), found.vectors.min(axis=1)
    bad = np.flatnonzero(~np.isfinite(extremes).all(axis=0))
    if len(bad):
        raise UserError(
            f'{name}: {_place(found, bad[0])} is not finite (NaN, infinite, or beyond float32); finite'
            ' numbers expected: remove the word or make the file again'
        )


def _place(found: Vectors, row: int) -> str:
    return f'{found.unit} {found.numbers[row]}: the vector of {shown(found.words[row])}'


def _twice(name: str, unit: str, word: str, first: int, second: int) -> UserError:
    return UserError(
        f'{name}: the word {shown(word)} is there twice, in {unit} {first} and {unit} {second}; each word'
        ' once expected: remove one'
    )


def _blocks(rows: int, width: int) -> Iterator[slice]:
    """Slices of rows that hold about BLOCK numbers each."""
    height = max(1, BLOCK // max(1, width))
    return (slice(start, start + height) for start in range(0, rows, height))
