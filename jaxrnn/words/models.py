"""The networks of the question: a word's letters to the word's vector (design, section 5).

Scopes name the layers to whoever reads a compiled step, `trace` among them.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from jaxrnn.rnn import cells, layers
from jaxrnn.types import Array, UserError
from jaxrnn.words import config, presets

WIDTHS = {'lstm': 1024, 'gru': 1024, 'stacked': 512}
"""Stock hidden widths."""


def lengths_of(letters: Array) -> Array:
    """Time steps up to a word's last letter, its leading $ included; [T, B] -> int32 [B]."""
    return letters.shape[0] - jnp.argmax(letters[::-1] != 0, axis=0)


class Last(nnx.Module):
    """LSTM(H) or GRU(H), last output -> Dense(E)."""

    def __init__(self, recurrent, letters, hidden, vector_size, *, masked, reference, **made):
        self.masked = masked
        self.recurrent = recurrent(letters, hidden, reference=reference, **made)
        self.output = layers.Dense(hidden, vector_size, **made)

    def __call__(self, letters: Array) -> Array:
        """letters: [T, B]. Returns vectors [B, E]."""
        with jax.named_scope('recurrent'):
            h = self.recurrent.last(letters, seq_lengths=lengths_of(letters) if self.masked else None)
        with jax.named_scope('output'):
            return self.output(h)


class Stacked(nnx.Module):
    """LSTM(H, sequences) -> Dense(H, sigmoid) at each time step -> LSTM(H) -> Dense(H/2, tanh) -> Dense(E)."""

    def __init__(self, letters, hidden, vector_size, *, masked, reference, **made):
        self.masked = masked
        narrow = max(hidden // 2, 1)
        self.lower = layers.LSTM(letters, hidden, reference=reference, **made)
        self.between = layers.Dense(hidden, hidden, **made)
        self.upper = layers.LSTM(hidden, hidden, reference=reference, **made)
        self.narrow = layers.Dense(hidden, narrow, **made)
        self.output = layers.Dense(narrow, vector_size, **made)

    def __call__(self, letters: Array) -> Array:
        """letters: [T, B]. Returns vectors [B, E]."""
        lengths = lengths_of(letters) if self.masked else None
        with jax.named_scope('lower'):
            x = self.lower(letters, time_major=True, seq_lengths=lengths)
        with jax.named_scope('between'):
            x = jax.nn.sigmoid(self.between(x))
        with jax.named_scope('upper'):
            x = self.upper.last(x, seq_lengths=lengths)
        with jax.named_scope('narrow'):
            x = jnp.tanh(self.narrow(x))
        with jax.named_scope('output'):
            return self.output(x)


def width(options: config.Model) -> int:
    """H."""
    return options.hidden or WIDTHS[options.network]


def build(options: config.Model, *, letters: int, vector_size: int, key: Array) -> nnx.Module:
    """The network of a configuration, with the initial weights that `key` decides.

    Args:
        options: network, preset, width, recurrence and dtype.
        letters: V, size of the alphabet.
        vector_size: E.
        key: PRNG key.
    """
    hidden = width(options)
    preset = cells.drawn_as(presets.network_of(options.preset), presets.weights_of(options))
    if options.gate != 'preset':
        preset = preset._replace(gate=cells.GATES[options.gate])
    if options.recurrent_gain:
        preset = cells.with_gain(preset, options.recurrent_gain)
    preset = preset._replace(memory=options.chrono_steps)
    made = {
        'preset': preset,
        'masked': options.mask_padding,
        # None is the weights' own, which are float64 where an experiment has made them so.
        'dtype': None if options.dtype == 'float32' else options.dtype,
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
