"""Random letters and unit vectors, at the shapes of the embedded default."""

import numpy as np

from jaxrnn.words import data

LETTERS, STEPS, SIZE = 27, 20, 100


def dataset(words: int = 512) -> data.Dataset:
    """Random letters and unit vectors, at the shapes of the embedded default."""
    rng = np.random.default_rng(0)
    letters = rng.integers(0, LETTERS, (STEPS, words), np.int32)
    vectors = rng.normal(size=(words, SIZE)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    none = np.empty(0, np.int32)
    names = tuple(str(n) for n in range(words))
    everyone = np.arange(words, dtype=np.int32)
    alphabet = '$abcdefghijklmnopqrstuvwxyz'
    return data.Dataset(names, alphabet, letters, vectors, everyone, none, none, {}, '', 'random')
