"""LSTM and GRU cells as pure functions, and the presets that start and gate them as libraries do.

A cell takes the input's share of its pre-activations, `x_t` (made for all time steps at once outside
the loop, bias included), and the carry, and returns the next carry. Gates stand side by side on the
last axis, in Keras' order: i, f, g, o for the LSTM, z, r, n for the GRU.
"""

from collections.abc import Callable
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax.nn import initializers

from jaxrnn.types import Array

Gate = Callable[[Array], Array]


class LSTMCarry(NamedTuple):
    """Named, never unpacked by place: libraries disagree on the order."""

    c: Array  # cell state [B, H]
    h: Array  # output [B, H]


def hard_sigmoid(x: Array) -> Array:
    """clip(0.2 x + 0.5, 0, 1), as in Keras 1 and 2; jax.nn.hard_sigmoid has slope 1/6 instead.

    The gradient is exactly 0 for |x| > 2.5.
    """
    return jnp.clip(0.2 * x + 0.5, 0.0, 1.0)


def lstm(recurrent_kernel: Array, x_t: Array, tm1: LSTMCarry, *, gate: Gate) -> LSTMCarry:
    """One time step of an LSTM (Hochreiter & Schmidhuber 1997; forget gate: Gers et al. 2000).

        i_t, f_t, o_t = gate(x_t + h_tm1 R)        g_t = tanh(x_t + h_tm1 R)
        c_t = f_t c_tm1 + i_t g_t                  h_t = o_t tanh(c_t)

    Args:
        recurrent_kernel: R, [H, 4H].
        x_t: the input's share, x W + b, [B, 4H].
        tm1: carry of the time step before, each [B, H].
        gate: the gates' squashing function, with values in [0, 1].

    Returns:
        The carry of this time step.
    """
    i, f, g, o = jnp.split(x_t + tm1.h @ recurrent_kernel, 4, axis=-1)
    c_t = gate(f) * tm1.c + gate(i) * jnp.tanh(g)
    return LSTMCarry(c=c_t, h=gate(o) * jnp.tanh(c_t))


def gru_reset_after(
    recurrent_kernel: Array, recurrent_bias: Array | None, x_t: Array, h_tm1: Array, *, gate: Gate
) -> Array:
    """One time step of a GRU whose reset gate follows the product (Keras 3, flax, cuDNN).

        z_t = gate(x_z + h_tm1 R_z + b_z)          r_t = gate(x_r + h_tm1 R_r + b_r)
        n_t = tanh(x_n + r_t (h_tm1 R_n + b_n))    h_t = z_t h_tm1 + (1 - z_t) n_t

    1 - z_t is computed as gate(-a_z): both gates are symmetric, and so it loses no digits near z_t = 1.

    Args:
        recurrent_kernel: R, [H, 3H].
        recurrent_bias: b, [3H], or [H] for the candidate n alone, or None.
        x_t: the input's share, [B, 3H].
        h_tm1: output of the time step before, [B, H].
        gate: the gates' squashing function.

    Returns:
        The output of this time step, [B, H].
    """
    width = h_tm1.shape[-1]
    recurrent = h_tm1 @ recurrent_kernel
    if recurrent_bias is not None:
        missing = 3 * width - recurrent_bias.shape[-1]
        bias = jnp.pad(recurrent_bias, (missing, 0))
        recurrent += jnp.broadcast_to(bias, recurrent.shape)
    x_z, x_r, x_n = jnp.split(x_t, 3, axis=-1)
    u_z, u_r, u_n = jnp.split(recurrent, 3, axis=-1)
    n_t = jnp.tanh(x_n + gate(x_r + u_r) * u_n)
    return gate(x_z + u_z) * h_tm1 + gate(-x_z - u_z) * n_t


def gru_reset_before(recurrent_kernel: Array, x_t: Array, h_tm1: Array, *, gate: Gate) -> Array:
    """One time step of a GRU whose reset gate precedes the product (Cho et al. 2014; Keras 1).

    n_t = tanh(x_n + (r_t h_tm1) R_n); all else as in `gru_reset_after`.
    """
    width = h_tm1.shape[-1]
    x_zr, x_n = x_t[..., : 2 * width], x_t[..., 2 * width :]
    a_z, a_r = jnp.split(x_zr + h_tm1 @ recurrent_kernel[:, : 2 * width], 2, axis=-1)
    n_t = jnp.tanh(x_n + (gate(a_r) * h_tm1) @ recurrent_kernel[:, 2 * width :])
    return gate(a_z) * h_tm1 + gate(-a_z) * n_t


class Initialiser(Protocol):
    def __call__(self, key: Array, shape: tuple[int, ...], gates: int, /) -> Array:
        """A float32 kernel of `shape`, whose last axis holds `gates` blocks side by side."""
        ...


def joint(init: initializers.Initializer) -> Initialiser:
    """Draws all gates as one matrix, so that fan-out and orthogonality span them."""
    return lambda key, shape, gates: init(key, shape, jnp.float32)


def per_gate(init: initializers.Initializer) -> Initialiser:
    """Draws a matrix for each gate."""

    def make(key: Array, shape: tuple[int, ...], gates: int) -> Array:
        block = (*shape[:-1], shape[-1] // gates)
        return jnp.concatenate([init(k, block, jnp.float32) for k in jax.random.split(key, gates)], axis=-1)

    return make


class Preset(NamedTuple):
    """How a library starts and gates its networks, and which epsilon its Adam has."""

    kernel: Initialiser
    recurrent_kernel: Initialiser
    dense_kernel: initializers.Initializer
    gate: Gate
    forget_bias: float  # initial bias of the LSTM's forget gate
    reset_after: bool  # GRU variant
    recurrent_bias: str  # GRU, reset after: 'all' gates, or the 'candidate' alone
    epsilon: float  # Adam's
    epsilon_hat: bool  # whether it is added before bias correction (Kingma & Ba 2015, end of section 2)


PRESETS = {
    # Keras 1.0.7 (August 2016): keras/layers/recurrent.py, initializations.py, optimizers.py
    'keras1': Preset(
        kernel=per_gate(initializers.glorot_uniform()),
        recurrent_kernel=per_gate(initializers.orthogonal(1.1)),
        dense_kernel=initializers.glorot_uniform(),
        gate=hard_sigmoid,
        forget_bias=1.0,
        reset_after=False,
        recurrent_bias='',
        epsilon=1e-8,
        epsilon_hat=True,
    ),
    # Keras 3: keras/src/layers/rnn/{lstm,gru}.py, optimizers/adam.py
    'keras3': Preset(
        kernel=joint(initializers.glorot_uniform()),
        recurrent_kernel=joint(initializers.orthogonal()),
        dense_kernel=initializers.glorot_uniform(),
        gate=jax.nn.sigmoid,
        forget_bias=1.0,
        reset_after=True,
        recurrent_bias='all',
        epsilon=1e-7,
        epsilon_hat=True,
    ),
    # flax: linen/recurrent.py (LSTMCell, GRUCell), with optax.adam
    'flax': Preset(
        kernel=per_gate(initializers.lecun_normal()),
        recurrent_kernel=per_gate(initializers.orthogonal()),
        dense_kernel=initializers.lecun_normal(),
        gate=jax.nn.sigmoid,
        forget_bias=0.0,
        reset_after=True,
        recurrent_bias='candidate',
        epsilon=1e-8,
        epsilon_hat=False,
    ),
}
