"""The networks of the question: a word's letters to the word's vector (design, section 5)."""

import jax
from flax import nnx

from jaxrnn import cells, config, layers
from jaxrnn.types import Array, UserError

WIDTHS = {'lstm': 1024, 'gru': 1024, 'stacked': 512}
"""Stock hidden widths."""


class Last(nnx.Module):
    """LSTM(H) or GRU(H), last output -> Dense(E)."""

    def __init__(self, recurrent, letters, hidden, vector_size, *, preset, rngs, reference):
        self.recurrent = recurrent(letters, hidden, preset=preset, rngs=rngs, reference=reference)
        self.output = layers.Dense(hidden, vector_size, preset=preset, rngs=rngs)

    def __call__(self, letters: Array) -> Array:
        """letters: [T, B]. Returns vectors [B, E]."""
        return self.output(self.recurrent.last(letters))


class Stacked(nnx.Module):
    """LSTM(H, sequences) -> Dense(H, sigmoid) at each time step -> LSTM(H) -> Dense(H/2, tanh) -> Dense(E)."""

    def __init__(self, letters, hidden, vector_size, *, preset, rngs, reference):
        narrow = max(hidden // 2, 1)
        self.lower = layers.LSTM(letters, hidden, preset=preset, rngs=rngs, reference=reference)
        self.between = layers.Dense(hidden, hidden, preset=preset, rngs=rngs)
        self.upper = layers.LSTM(hidden, hidden, preset=preset, rngs=rngs, reference=reference)
        self.narrow = layers.Dense(hidden, narrow, preset=preset, rngs=rngs)
        self.output = layers.Dense(narrow, vector_size, preset=preset, rngs=rngs)

    def __call__(self, letters: Array) -> Array:
        """letters: [T, B]. Returns vectors [B, E]."""
        between = jax.nn.sigmoid(self.between(self.lower(letters, time_major=True)))
        return self.output(jax.numpy.tanh(self.narrow(self.upper.last(between))))


def build(options: config.Model, *, letters: int, vector_size: int, key: Array) -> nnx.Module:
    """The network of a configuration, with the initial weights that `key` decides.

    Args:
        options: network, preset and width.
        letters: V, size of the alphabet.
        vector_size: E.
        key: PRNG key.
    """
    hidden = options.hidden or WIDTHS[options.network]
    made = {
        'preset': cells.PRESETS[options.preset],
        'rngs': nnx.Rngs(key),
        'reference': options.recurrence == 'reference',
    }
    match options.network:
        case 'lstm':
            return Last(layers.LSTM, letters, hidden, vector_size, **made)
        case 'gru':
            return Last(layers.GRU, letters, hidden, vector_size, **made)
        case 'stacked':
            return Stacked(letters, hidden, vector_size, **made)
    raise UserError(f'--network: no network {options.network!r}')
