"""flax.nnx layers over the pure cells and the recurrence."""

import jax.numpy as jnp
from flax import nnx

from jaxrnn import cells, scan
from jaxrnn.types import Array


class _Recurrent(nnx.Module):
    """What LSTM and GRU share: the call."""

    kernel: nnx.Param
    bias: nnx.Param
    recurrent_kernel: nnx.Param
    cell: cells.Cell
    reference: bool

    def _weights(self) -> scan.Weights:
        bias = getattr(self, 'recurrent_bias', None)
        return scan.Weights(
            self.kernel[...], self.bias[...], self.recurrent_kernel[...], None if bias is None else bias[...]
        )

    def __call__(self, xs: Array, *, sequences: bool = False) -> Array:
        """xs: [T, B, D], or letters [T, B]. Returns outputs [T, B, H], or the last, [B, H]."""
        outputs, last = scan.run(
            self.cell, self._weights(), xs, sequences=sequences, reference=self.reference
        )
        return outputs if sequences else last.h


class LSTM(_Recurrent):
    """An LSTM over time-major input; parameters in Keras' layout, gates i, f, g, o.

    Args:
        in_features: D, or the number of letters V.
        hidden: H.
        preset: initialisers and gate.
        rngs: of the initial weights.
        reference: whether to take the plain scan, which JAX differentiates (see `scan.run`).
    """

    def __init__(
        self,
        in_features: int,
        hidden: int,
        *,
        preset: cells.Preset,
        rngs: nnx.Rngs,
        reference: bool = False,
    ):
        self.kernel = nnx.Param(preset.kernel(rngs.params(), (in_features, 4 * hidden), 4))
        self.recurrent_kernel = nnx.Param(preset.recurrent_kernel(rngs.params(), (hidden, 4 * hidden), 4))
        bias = jnp.zeros(4 * hidden).at[hidden : 2 * hidden].set(preset.forget_bias)
        self.bias = nnx.Param(bias)
        self.cell = cells.lstm(preset.gate)
        self.reference = reference


class GRU(_Recurrent):
    """A GRU over time-major input, in the preset's variant; gates z, r, n. Arguments as for `LSTM`."""

    def __init__(
        self,
        in_features: int,
        hidden: int,
        *,
        preset: cells.Preset,
        rngs: nnx.Rngs,
        reference: bool = False,
    ):
        self.kernel = nnx.Param(preset.kernel(rngs.params(), (in_features, 3 * hidden), 3))
        self.recurrent_kernel = nnx.Param(preset.recurrent_kernel(rngs.params(), (hidden, 3 * hidden), 3))
        self.bias = nnx.Param(jnp.zeros(3 * hidden))
        widths = {'all': 3 * hidden, 'candidate': hidden}
        if preset.reset_after:
            self.recurrent_bias = nnx.Param(jnp.zeros(widths[preset.recurrent_bias]))
        self.cell = (cells.gru_reset_after if preset.reset_after else cells.gru_reset_before)(preset.gate)
        self.reference = reference


class Dense(nnx.Module):
    """x W + b on the last axis, bias starting at 0."""

    def __init__(self, in_features: int, features: int, *, preset: cells.Preset, rngs: nnx.Rngs):
        self.kernel = nnx.Param(preset.dense_kernel(rngs.params(), (in_features, features), jnp.float32))
        self.bias = nnx.Param(jnp.zeros(features))

    def __call__(self, x: Array) -> Array:
        """x: [..., D]. Returns [..., features]."""
        y = x @ self.kernel[...]
        return y + jnp.broadcast_to(self.bias[...], y.shape)
