"""Words and their vectors, from a file or a corpus, to the batch of any step.

The only user of gensim, which is imported where it is needed: that takes a second.
"""

from jaxrnn.data.dataset import Dataset as Dataset
from jaxrnn.data.dataset import batch_at as batch_at
from jaxrnn.data.dataset import load as load
from jaxrnn.data.letters import decode as decode
from jaxrnn.data.letters import encode as encode
from jaxrnn.data.store import read_dataset as read_dataset
from jaxrnn.data.store import write_dataset as write_dataset
from jaxrnn.data.vectors import nearest as nearest
from jaxrnn.data.vectors import read_vectors as read_vectors
from jaxrnn.data.vectors import unit_length as unit_length
from jaxrnn.data.vectors import write_vectors as write_vectors
