"""flax.nnx layers over the pure cells and the recurrence."""

import functools

import jax.numpy as jnp
from flax import nnx

from jaxrnn import cells, scan
from jaxrnn.types import Array


class LSTM(nnx.Module):
    """An LSTM over time-major input; parameters in Keras' layout, gates i, f, g, o.

    Args:
        in_features: D, or the number of letters V.
        hidden: H.
        preset: initialisers and gate.
        rngs: of the initial weights.
    """

    def __init__(self, in_features: int, hidden: int, *, preset: cells.Preset, rngs: nnx.Rngs):
        self.kernel = nnx.Param(preset.kernel(rngs.params(), (in_features, 4 * hidden), 4))
        self.recurrent_kernel = nnx.Param(preset.recurrent_kernel(rngs.params(), (hidden, 4 * hidden), 4))
        bias = jnp.zeros(4 * hidden).at[hidden : 2 * hidden].set(preset.forget_bias)
        self.bias = nnx.Param(bias)
        self.gate = preset.gate

    def __call__(self, xs: Array, *, sequences: bool = False) -> Array:
        """xs: [T, B, D], or letters [T, B]. Returns outputs [T, B, H], or the last, [B, H]."""
        recurrent_kernel = self.recurrent_kernel[...]
        cell = functools.partial(cells.lstm, recurrent_kernel, gate=self.gate)
        zeros = jnp.zeros((xs.shape[1], recurrent_kernel.shape[0]))
        carry = cells.LSTMCarry(c=zeros, h=zeros)
        projected = scan.project(self.kernel[...], self.bias[...], xs)
        return scan.unroll(cell, lambda carry: carry.h, projected, carry, sequences=sequences)


class GRU(nnx.Module):
    """A GRU over time-major input, in the preset's variant; gates z, r, n. Arguments as for `LSTM`."""

    def __init__(self, in_features: int, hidden: int, *, preset: cells.Preset, rngs: nnx.Rngs):
        self.kernel = nnx.Param(preset.kernel(rngs.params(), (in_features, 3 * hidden), 3))
        self.recurrent_kernel = nnx.Param(preset.recurrent_kernel(rngs.params(), (hidden, 3 * hidden), 3))
        self.bias = nnx.Param(jnp.zeros(3 * hidden))
        widths = {'all': 3 * hidden, 'candidate': hidden}
        if preset.reset_after:
            self.recurrent_bias = nnx.Param(jnp.zeros(widths[preset.recurrent_bias]))
        self.reset_after = preset.reset_after
        self.gate = preset.gate

    def __call__(self, xs: Array, *, sequences: bool = False) -> Array:
        """As for `LSTM`."""
        recurrent_kernel = self.recurrent_kernel[...]
        if self.reset_after:
            bias = self.recurrent_bias[...]
            cell = functools.partial(cells.gru_reset_after, recurrent_kernel, bias, gate=self.gate)
        else:
            cell = functools.partial(cells.gru_reset_before, recurrent_kernel, gate=self.gate)
        carry = jnp.zeros((xs.shape[1], recurrent_kernel.shape[0]))
        projected = scan.project(self.kernel[...], self.bias[...], xs)
        return scan.unroll(cell, lambda carry: carry, projected, carry, sequences=sequences)


class Dense(nnx.Module):
    """x W + b on the last axis, bias starting at 0."""

    def __init__(self, in_features: int, features: int, *, preset: cells.Preset, rngs: nnx.Rngs):
        self.kernel = nnx.Param(preset.dense_kernel(rngs.params(), (in_features, features), jnp.float32))
        self.bias = nnx.Param(jnp.zeros(features))

    def __call__(self, x: Array) -> Array:
        """x: [..., D]. Returns [..., features]."""
        y = x @ self.kernel[...]
        return y + jnp.broadcast_to(self.bias[...], y.shape)
