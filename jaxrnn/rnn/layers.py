"""flax.nnx layers over the pure cells and the recurrence.

`LSTM` and `GRU` take the place of `nnx.RNN(nnx.OptimizedLSTMCell(...))` and `nnx.RNN(nnx.GRUCell(...))`, also within
`nnx.Bidirectional` and `nnx.Sequential`.
"""

import contextlib
import contextvars
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxrnn.rnn import cells, scan
from jaxrnn.rnn.probe import Probe, new_probe
from jaxrnn.types import Array, Tree

_next_probe: contextvars.ContextVar[Callable[[cells.Cell], tuple[Probe | None, Array | None]]] = (
    contextvars.ContextVar('next_probe', default=lambda cell: (None, None))
)


def probes(network: Callable, *args: Any) -> list[Probe]:
    """A probe for each call of a recurrent layer in a function, in their order. args: of the function."""
    found: list[Probe] = []

    def count(cell: cells.Cell) -> tuple[None, None]:
        found.append(new_probe(cell))
        return None, None

    with _probing(count):
        jax.eval_shape(
            lambda *args: network(*args), *args
        )  # a new function each time, as JAX would not trace it again
    return found


@contextlib.contextmanager
def probed(probes: Sequence[Probe], ends: Array | None = None) -> Iterator[None]:
    """Gives the probes to the recurrent layers called within, in their order; `ends` as `scan.run` has it."""
    left = iter(probes)
    with _probing(lambda cell: (next(left, None), ends)):
        yield


@contextlib.contextmanager
def _probing(take: Callable[[cells.Cell], tuple[Probe | None, Array | None]]) -> Iterator[None]:
    token = _next_probe.set(take)
    try:
        yield
    finally:
        _next_probe.reset(token)


class _Recurrent(nnx.Module):
    """What LSTM and GRU share: options, and the call.

    Args:
        in_features: D, or the number of letters V.
        hidden_features: H.
        preset: initialisers, gate, GRU variant.
        time_major: whether inputs are [T, B, D] instead of [B, T, D].
        return_carry: whether a call also returns the last carry.
        reverse: whether time runs backwards, from each sequence's own end.
        keep_order: with `reverse`, whether outputs stay at their inputs' places.
        dtype: of products and outputs, as in `scan.run`; float32 if not given.
        reference: whether to take the plain scan, which JAX differentiates (see `scan.run`).
        rngs: of the initial weights.
    """

    kernel: nnx.Param
    bias: nnx.Param
    recurrent_kernel: nnx.Param

    def __init__(
        self,
        in_features: int,
        hidden_features: int,
        *,
        preset: cells.Preset = cells.PRESETS['flax'],
        time_major: bool = False,
        return_carry: bool = False,
        reverse: bool = False,
        keep_order: bool = False,
        dtype: Any = None,
        reference: bool = False,
        rngs: nnx.Rngs,
    ):
        self.cell = self._make_cell(preset)
        gates = sum(self.cell.blocks)
        width = gates * hidden_features
        self.kernel = nnx.Param(preset.kernel(rngs.params(), (in_features, width), gates))
        self.recurrent_kernel = nnx.Param(
            preset.recurrent_kernel(rngs.params(), (hidden_features, width), gates)
        )
        self._make_biases(preset, hidden_features)
        self.time_major = time_major
        self.return_carry = return_carry
        self.reverse = reverse
        self.keep_order = keep_order
        self.dtype = dtype
        self.reference = reference

    def __call__(
        self,
        inputs: Array,
        *,
        initial_carry: Tree | None = None,
        seq_lengths: Array | None = None,
        return_carry: bool | None = None,
        time_major: bool | None = None,
        reverse: bool | None = None,
        keep_order: bool | None = None,
        rngs: Any = None,
    ) -> Any:
        """Outputs of all time steps; as `nnx.RNN`'s call, whose options these are.

        Differs from nnx.RNN in: 1. beyond a sequence's length outputs repeat its last one (reversed: the initial
        carry's), and whatever lies there, NaN too, moves nothing. 2. Carries are named, and float32. 3. Letters
        may stand for one-hot rows.

        Args:
            inputs: [B, T, D], or letters int [B, T]; [T, B, ..] if `time_major`.
            initial_carry: `cells.LSTMCarry` or `cells.GRUCarry`, [B, H] each; zeros if not given.
            seq_lengths: int [B], valid time steps of each sequence; T if not given.
            return_carry, time_major, reverse, keep_order: in place of the layer's own, where given.
            rngs: not used; initial carries are zeros.

        Returns:
            Outputs [B, T, H], or [T, B, H]; with `return_carry` (carry, outputs).
        """
        del rngs
        time_major = self.time_major if time_major is None else time_major
        reverse = self.reverse if reverse is None else reverse
        xs = inputs if time_major else inputs.swapaxes(0, 1)
        outputs, carry = self._run(xs, initial_carry, seq_lengths, reverse=reverse)
        if reverse and not (self.keep_order if keep_order is None else keep_order):
            outputs = _as_run(outputs, seq_lengths)
        outputs = outputs if time_major else outputs.swapaxes(0, 1)
        return (carry, outputs) if (self.return_carry if return_carry is None else return_carry) else outputs

    def last(self, xs: Array, *, seq_lengths: Array | None = None) -> Array:
        """The output after the last valid time step alone, [B, H]. xs: [T, B, D] or letters [T, B]."""
        return self._run(xs, None, seq_lengths, reverse=self.reverse, sequences=False)[1].h

    def _run(
        self, xs: Array, carry: Tree | None, seq_lengths: Array | None, **options: Any
    ) -> tuple[Any, Tree]:
        mask = None if seq_lengths is None else jnp.arange(xs.shape[0])[:, None] < seq_lengths[None, :]
        bias = getattr(self, 'recurrent_bias', None)
        weights = scan.Weights(
            self.kernel[...], self.bias[...], self.recurrent_kernel[...], None if bias is None else bias[...]
        )
        probe, ends = (None, None) if self.reference else _next_probe.get()(self.cell)
        return scan.run(
            self.cell, weights, xs, carry, mask=mask, dtype=self.dtype, reference=self.reference, probe=probe,
            ends=ends, **options,
        )  # fmt: skip

    def _make_cell(self, preset: cells.Preset) -> cells.Cell:
        raise NotImplementedError

    def _make_biases(self, preset: cells.Preset, hidden: int) -> None:
        raise NotImplementedError


def _as_run(outputs: Array, seq_lengths: Array | None) -> Array:
    """Outputs of a reversed run in the order in which they were made; those beyond a length stay. [T, B, H]."""
    if seq_lengths is None:
        return outputs[::-1]
    t = jnp.arange(outputs.shape[0])[:, None]
    lengths = seq_lengths[None, :]
    source = jnp.where(t < lengths, lengths - 1 - t, t)
    return jnp.take_along_axis(outputs, source[:, :, None], axis=0)


class LSTM(_Recurrent):
    """An LSTM. Arguments as in `_Recurrent`; parameters in Keras' layout, gates i, f, g, o."""

    def _make_cell(self, preset: cells.Preset) -> cells.Cell:
        return cells.lstm(preset.gate)

    def _make_biases(self, preset: cells.Preset, hidden: int) -> None:
        bias = jnp.zeros(4 * hidden).at[hidden : 2 * hidden].set(preset.forget_bias)
        if preset.memory:
            forget = cells.chrono_biases(preset.memory, hidden)
            bias = bias.at[: 2 * hidden].set(jnp.concatenate([-forget, forget]))
        self.bias = nnx.Param(bias)


class GRU(_Recurrent):
    """A GRU in the preset's variant. Arguments as in `_Recurrent`; parameters in Keras' layout, gates z, r, n."""

    def _make_cell(self, preset: cells.Preset) -> cells.Cell:
        return (cells.gru_reset_after if preset.reset_after else cells.gru_reset_before)(preset.gate)

    def _make_biases(self, preset: cells.Preset, hidden: int) -> None:
        bias = jnp.zeros(3 * hidden)
        if preset.memory:  # z is the share that is kept
            bias = bias.at[:hidden].set(cells.chrono_biases(preset.memory, hidden))
        self.bias = nnx.Param(bias)
        if preset.reset_after:
            widths = {'all': 3 * hidden, 'candidate': hidden}
            self.recurrent_bias = nnx.Param(jnp.zeros(widths[preset.recurrent_bias]))


class Dense(nnx.Module):
    """x W + b on the last axis, bias starting at 0. dtype: of the product's operands; float32 if not given."""

    def __init__(
        self, in_features: int, features: int, *, preset: cells.Preset, dtype: Any = None, rngs: nnx.Rngs
    ):
        self.kernel = nnx.Param(preset.dense_kernel(rngs.params(), (in_features, features), jnp.float32))
        self.bias = nnx.Param(jnp.zeros(features))
        self.dtype = dtype

    def __call__(self, x: Array) -> Array:
        """x: [..., D]. Returns [..., features], float32."""
        return scan.project(self.kernel[...], self.bias[...], x, dtype=self.dtype)
