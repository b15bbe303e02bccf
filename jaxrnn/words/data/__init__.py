"""Words and their vectors, from a file or a corpus, to the batch of any step.

The only user of gensim, which is imported where it is needed: that takes a second.

files      files opened, whatever they are packed in     letters    words as integers, the alphabet, the split
formats    word2vec, GloVe and KeyedVectors, by row      dataset    all of it together, and the batch of a step
vectors    rows gathered, nearest neighbours, writing    store      a data set on disk
corpus     word vectors trained on a text
"""

from jaxrnn.words.data.dataset import Batch, Dataset, batch_at, load
from jaxrnn.words.data.letters import decode, encode
from jaxrnn.words.data.store import read_dataset, write_dataset
from jaxrnn.words.data.vectors import nearest, read_vectors, unit_length, write_vectors

__all__ = [
    'Batch',
    'Dataset',
    'batch_at',
    'decode',
    'encode',
    'load',
    'nearest',
    'read_dataset',
    'read_vectors',
    'unit_length',
    'write_dataset',
    'write_vectors',
]
