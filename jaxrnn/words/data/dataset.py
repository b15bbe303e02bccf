"""A data set: from options to arrays, and the batch of any step."""

import functools
import hashlib
import os
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import numpy as np

from jaxrnn import environment
from jaxrnn.types import Array, UserError
from jaxrnn.words import config
from jaxrnn.words.data.corpus import sample_path, trained_on
from jaxrnn.words.data.formats import VectorRow, VectorTable
from jaxrnn.words.data.letters import alphabet_of, encode, split, steps_for
from jaxrnn.words.data.vectors import Vectors, gather, normalised, read_vectors


class Batch(NamedTuple):
    """The examples of one step, time-major."""

    letters: Array  # int32 [T, B], 0 is the pad letter `$`
    targets: Array  # float32 [B, E]
    index: Array  # type: ignore[assignment]  # int32 [B], row of each example's word in the data set


class Dataset(NamedTuple):
    """Words, as integers, and their vectors. Every array is read-only."""

    words: tuple[str, ...]  # N, the most frequent first
    alphabet: str  # the letter of each integer; the first is `$`
    letters: np.ndarray  # int32 [T, N]
    vectors: np.ndarray  # float32 [N, E]
    train: np.ndarray  # int32, rows of the words to train on, ascending; so the next two
    validation: np.ndarray  # int32
    test: np.ndarray  # int32
    dropped: Mapping[str, int]  # reason -> count of words
    digest: str  # 16 hex digits over the words, alphabet, letters, vectors and split
    source: str  # where it came from, on one line


def load(
    options: config.Data,
    seed: int,
    cache_dir: str | os.PathLike | None = None,
    progress: Callable[[str], None] = lambda line: None,
) -> Dataset:
    """The data set that the options describe; the same options, seed and file give the same bits.

    Args:
      seed: of the split, and of Word2Vec where a corpus is trained on.
      cache_dir: for vectors trained on a corpus; None: $JAXRNN_CACHE, $XDG_CACHE_HOME/jaxrnn or
        ~/.cache/jaxrnn.
      progress: gets one line before slow work.

    Raises:
      UserError: for options that contradict each other or don't suit the file, or a bad file.
    """
    name, source, found = _vectors(options, seed, cache_dir, progress)
    if not found.words:
        reasons = ', '.join(f'{count} {reason}' for reason, count in found.dropped.items())
        raise UserError(f'{name}: no usable word found (dropped: {reasons or "none"}); see --max_length')
    if options.normalise:
        found = normalised(name, found)
    alphabet = alphabet_of(found.words)
    steps = steps_for(found.words, options.pad_to)
    if (need := 4 * steps * len(found.words)) > environment.memory():
        raise UserError(
            f'--pad_to: {steps} time steps of {len(found.words):,} words found, which need {need >> 30:,} GiB, more '
            'than the memory; give a smaller one, or fewer --num_words'
        )
    letters = encode(found.words, alphabet, steps)
    parts = split(found.words, seed=seed, validation=options.validation_share, test=options.test_share)
    arrays = (letters, found.vectors, *parts)
    for array in arrays:
        array.flags.writeable = False
    digest = digest_of(found.words, alphabet, arrays)
    return Dataset(found.words, alphabet, *arrays, found.dropped, digest, source)


def batch_at(data: Dataset, step: int, *, batch_size: int, seed: int) -> Batch:
    """The batch of a step, counted from 0: a pure function of its arguments.

    The training words follow each other in a new order each epoch; a batch goes on into the next epoch,
    so that its shape never changes.

    Returns:
      Batch of NumPy arrays, B = `batch_size`.
    """
    n, start = len(data.train), int(step) * batch_size
    stop = start + batch_size
    orders = (
        _order(seed, epoch, n)[max(0, start - epoch * n) : stop - epoch * n]
        for epoch in range(start // n, (stop - 1) // n + 1)
    )
    index = data.train[np.concatenate(list(orders))]
    return Batch(data.letters[:, index], data.vectors[index], index)  # type: ignore[arg-type]


@functools.lru_cache(maxsize=4)
def _order(seed: int, epoch: int, n: int) -> np.ndarray:
    """The order of an epoch: int32 [n], every integer below n once."""
    # The generator in full and on the CPU: the order must not depend on flags or the accelerator.
    with jax.default_device(_cpu()), jax.threefry_partitionable(True):
        key = jax.random.fold_in(jax.random.key(seed % 2**32, impl='threefry2x32'), epoch)
        order = np.array(jax.random.permutation(key, n), np.int32)
    order.flags.writeable = False
    return order


def _cpu() -> jax.Device | None:
    try:
        return jax.local_devices(backend='cpu')[0]
    except RuntimeError:  # JAX_PLATFORMS leaves it out; the bits are the same on any device
        return None


def _vectors(
    options: config.Data, seed: int, cache_dir: str | os.PathLike | None, progress: Callable[[str], None]
) -> tuple[str, str, Vectors]:
    """The name for messages, the source, and the usable words, of the file or the corpus."""
    limits = {'max_length': options.max_length, 'num_words': options.num_words}
    if options.vectors and options.corpus:
        raise UserError(
            f'--vectors {options.vectors} and --corpus {options.corpus}: both found, at most one expected;'
            ' leave one out'
        )
    if options.vectors:
        found = read_vectors(options.vectors, allow_pickle=options.allow_pickle, **limits)
        return options.vectors, f'{_one_line(options.vectors)} ({found.kind})', found
    path = options.corpus or sample_path()
    trained = trained_on(path, options, seed, cache_dir, progress)
    corpus = _one_line(options.corpus) if options.corpus else "gensim's sample of the English Wikipedia"
    rows = (VectorRow(n, *pair) for n, pair in enumerate(zip(trained.words, trained.vectors, strict=True), 1))
    table = VectorTable('Word2Vec', 'rank', options.word2vec_size, rows)
    return path, f'Word2Vec on {corpus} ({trained.tokens:,} words)', gather(path, table, **limits)


def digest_of(words: tuple[str, ...], alphabet: str, arrays: tuple[np.ndarray, ...]) -> str:
    digest = hashlib.sha256()
    texts = (np.frombuffer(text.encode(), np.uint8) for text in ('\n'.join(words), alphabet))
    for part in (*texts, *arrays):
        digest.update(f'{part.dtype.str} {part.shape}\n'.encode())  # so that no two parts can run together
        digest.update(np.ascontiguousarray(part).data)
    return digest.hexdigest()[:16]


def _one_line(text: str) -> str:
    return ' '.join(text.split())
