"""LSTM and GRU cells as pure functions, and the presets that start and gate them as libraries do.

A cell is the equations of one time step and of its backward pass, both without the loop and without the layout:
gates come and go as lists of arrays, one a gate, and the products with the recurrent kernel are functions. So
`scan` may hold states as [B, H] or as [H, B]. Gates lie in Keras' order: i, f, g, o for the LSTM, z, r, n for
the GRU. Scopes name the gates to whoever reads a compiled step, `trace` among them.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax.nn import initializers

from jaxrnn.types import Array

Product = Callable[[Array], Sequence[Array]]
"""h -> h R_k [+ b], gate by gate; R_k holds the columns of some gates of the recurrent kernel."""

Transposed = Callable[[Sequence[Array]], Array]
"""Cotangents d of the gates of a product -> d R_k'."""


class LSTMCarry(NamedTuple):
    """Named, never unpacked by place: libraries disagree on the order."""

    c: Array  # cell state [B, H]
    h: Array  # output [B, H]


class GRUCarry(NamedTuple):
    h: Array  # output [B, H]


class Gate(NamedTuple):
    """A squashing function with values in [0, 1], symmetric: gate(-a) = 1 - gate(a)."""

    value: Callable[[Array], Array]
    slope: Callable[[Array], Array]  # its derivative, from its value

    def __call__(self, a: Array) -> Array:
        return self.value(a)


def hard_sigmoid(x: Array) -> Array:
    """clip(0.2 x + 0.5, 0, 1), as in Keras 1 and 2; jax.nn.hard_sigmoid has slope 1/6 instead.

    The gradient is 0 where it is clipped, |x| > 2.5.
    """
    return jnp.clip(0.2 * x + 0.5, 0.0, 1.0)


SIGMOID = Gate(jax.nn.sigmoid, lambda y: y * (1 - y))
HARD_SIGMOID = Gate(hard_sigmoid, lambda y: jnp.where((y > 0) & (y < 1), 0.2, 0.0))
GATES = {'sigmoid': SIGMOID, 'hard_sigmoid': HARD_SIGMOID}


INPUT, FORGET, OUTPUT = 'input gate', 'forget gate', 'output gate'
UPDATE, RESET, CANDIDATE = 'update gate', 'reset gate', 'candidate'
"""Scopes of what is computed for one gate, forward and backward."""


class Cell(NamedTuple):
    """One time step, forward and backward.

    forward(products, x_t, tm1) -> (t, saved)
        x_t: the input's share of the pre-activations, x W + b, gate by gate. tm1, t: the carries before and
        after. saved: what the backward pass needs beside tm1.
    backward(transposed, saved, tm1, d_t) -> (d, d_tm1)
        d_t, d_tm1: cotangents of the carries. d: those of the pre-activations that differ from one another;
        `d_inputs` and `d_products` say which of them belong to the gates of x_t, and of each product.
    operands(saved, tm1)
        What each product multiplied: the weights' gradients are operand' d, over all time steps and examples.
    gates: name and place in `saved` of what squashes to [0, 1].
    """

    carry: type[Any]
    blocks: tuple[int, ...]  # gates of each product; together those of the cell
    d_inputs: tuple[int, ...]
    d_products: tuple[tuple[int, ...], ...]
    takes_recurrent_bias: bool
    forward: Callable
    backward: Callable
    operands: Callable
    gates: tuple[tuple[str, int], ...]


@functools.cache
def lstm(gate: Gate) -> Cell:
    """LSTM (Hochreiter & Schmidhuber 1997; forget gate: Gers, Schmidhuber & Cummins 2000).

    i_t, f_t, o_t = gate(x_t + h_tm1 R)        g_t = tanh(x_t + h_tm1 R)
    c_t = f_t c_tm1 + i_t g_t                  h_t = o_t tanh(c_t)
    """

    def forward(products: Sequence[Product], x_t: Sequence[Array], tm1: LSTMCarry) -> tuple[LSTMCarry, tuple]:
        x_i, x_f, x_g, x_o = x_t
        u_i, u_f, u_g, u_o = products[0](tm1.h)
        with jax.named_scope(INPUT):
            i = gate(x_i + u_i)
        with jax.named_scope(FORGET):
            f = gate(x_f + u_f)
        with jax.named_scope(CANDIDATE):
            g = jnp.tanh(x_g + u_g)
        with jax.named_scope(OUTPUT):
            o = gate(x_o + u_o)
        c_t = f * tm1.c + i * g
        return LSTMCarry(c=c_t, h=o * jnp.tanh(c_t)), (i, f, g, o)

    def backward(transposed: Sequence[Transposed], saved: tuple, tm1: LSTMCarry, d_t: LSTMCarry) -> tuple:
        i, f, g, o = saved
        tanh_c = jnp.tanh(f * tm1.c + i * g)
        d_c = d_t.c + d_t.h * o * (1 - jnp.square(tanh_c))
        with jax.named_scope(INPUT):
            d_i = d_c * g * gate.slope(i)
        with jax.named_scope(FORGET):
            d_f = d_c * tm1.c * gate.slope(f)
        with jax.named_scope(CANDIDATE):
            d_g = d_c * i * (1 - jnp.square(g))
        with jax.named_scope(OUTPUT):
            d_o = d_t.h * tanh_c * gate.slope(o)
        d = (d_i, d_f, d_g, d_o)
        return d, LSTMCarry(c=d_c * f, h=transposed[0](d))

    return Cell(
        carry=LSTMCarry,
        blocks=(4,),
        d_inputs=(0, 1, 2, 3),
        d_products=((0, 1, 2, 3),),
        takes_recurrent_bias=False,
        forward=forward,
        backward=backward,
        operands=lambda saved, tm1: (tm1.h,),
        gates=((INPUT, 0), (FORGET, 1), (OUTPUT, 3)),
    )


@functools.cache
def gru_reset_after(gate: Gate) -> Cell:
    """GRU whose reset gate follows the product (Cho et al. 2014, arXiv 1406.1078v1; Keras 3, flax, cuDNN).

        z_t = gate(x_z + h_tm1 R_z + b_z)          r_t = gate(x_r + h_tm1 R_r + b_r)
        n_t = tanh(x_n + r_t (h_tm1 R_n + b_n))    h_t = z_t h_tm1 + (1 - z_t) n_t

    1 - z_t is computed as gate(-a_z): gates are symmetric, and so it loses no digits near z_t = 1.
    """

    def forward(products: Sequence[Product], x_t: Sequence[Array], tm1: GRUCarry) -> tuple[GRUCarry, tuple]:
        x_z, x_r, x_n = x_t
        u_z, u_r, u_n = products[0](tm1.h)
        with jax.named_scope(UPDATE):
            z = gate(x_z + u_z)
        with jax.named_scope(RESET):
            r = gate(x_r + u_r)
        with jax.named_scope(CANDIDATE):
            n = jnp.tanh(x_n + r * u_n)
        return GRUCarry(z * tm1.h + gate(-x_z - u_z) * n), (z, r, n, u_n)

    def backward(transposed: Sequence[Transposed], saved: tuple, tm1: GRUCarry, d_t: GRUCarry) -> tuple:
        z, r, n, u_n = saved
        with jax.named_scope(UPDATE):
            d_z = d_t.h * (tm1.h - n) * gate.slope(z)
        with jax.named_scope(CANDIDATE):
            d_n = d_t.h * (1 - z) * (1 - jnp.square(n))
            d_u = d_n * r
        with jax.named_scope(RESET):
            d_r = d_n * u_n * gate.slope(r)
        return (d_z, d_r, d_n, d_u), GRUCarry(d_t.h * z + transposed[0]((d_z, d_r, d_u)))

    return Cell(
        carry=GRUCarry,
        blocks=(3,),
        d_inputs=(0, 1, 2),
        d_products=((0, 1, 3),),
        takes_recurrent_bias=True,
        forward=forward,
        backward=backward,
        operands=lambda saved, tm1: (tm1.h,),
        gates=((UPDATE, 0), (RESET, 1)),
    )


@functools.cache
def gru_reset_before(gate: Gate) -> Cell:
    """GRU whose reset gate precedes the product (Cho et al. 2014, arXiv 1406.1078v3, equations 5-8; Keras 1).

    n_t = tanh(x_n + (r_t h_tm1) R_n); all else as in `gru_reset_after`, without biases of its own.
    """

    def forward(products: Sequence[Product], x_t: Sequence[Array], tm1: GRUCarry) -> tuple[GRUCarry, tuple]:
        x_z, x_r, x_n = x_t
        u_z, u_r = products[0](tm1.h)
        with jax.named_scope(UPDATE):
            z = gate(x_z + u_z)
        with jax.named_scope(RESET):
            r = gate(x_r + u_r)
        with jax.named_scope(CANDIDATE):
            (u_n,) = products[1](r * tm1.h)
            n = jnp.tanh(x_n + u_n)
        return GRUCarry(z * tm1.h + gate(-x_z - u_z) * n), (z, r, n)

    def backward(transposed: Sequence[Transposed], saved: tuple, tm1: GRUCarry, d_t: GRUCarry) -> tuple:
        z, r, n = saved
        with jax.named_scope(UPDATE):
            d_z = d_t.h * (tm1.h - n) * gate.slope(z)
        with jax.named_scope(CANDIDATE):
            d_n = d_t.h * (1 - z) * (1 - jnp.square(n))
            d_rh = transposed[1]((d_n,))
        with jax.named_scope(RESET):
            d_r = d_rh * tm1.h * gate.slope(r)
        return (d_z, d_r, d_n), GRUCarry(d_t.h * z + d_rh * r + transposed[0]((d_z, d_r)))

    return Cell(
        carry=GRUCarry,
        blocks=(2, 1),
        d_inputs=(0, 1, 2),
        d_products=((0, 1), (2,)),
        takes_recurrent_bias=False,
        forward=forward,
        backward=backward,
        operands=lambda saved, tm1: (tm1.h, saved[1] * tm1.h),
        gates=((UPDATE, 0), (RESET, 1)),
    )


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
    recurrent_gain: float  # that the recurrent kernel is orthogonal times
    dense_kernel: initializers.Initializer
    gate: Gate
    forget_bias: float  # initial bias of the LSTM's forget gate
    reset_after: bool  # GRU variant
    recurrent_bias: str  # GRU, reset after: 'all' gates, or the 'candidate' alone
    epsilon: float  # Adam's
    epsilon_hat: bool  # whether it is added before bias correction (Kingma & Ba 2015, end of section 2)
    memory: int = 0  # time steps of the longest memory that chrono biases are for; 0: forget_bias instead


def with_gain(preset: Preset, gain: float) -> Preset:
    """A preset whose recurrent kernels start with another gain."""

    def make(key: Array, shape: tuple[int, ...], gates: int) -> Array:
        return preset.recurrent_kernel(key, shape, gates) * (gain / preset.recurrent_gain)

    return preset._replace(recurrent_kernel=make, recurrent_gain=gain)


def drawn_as(preset: Preset, other: Preset) -> Preset:
    """A preset with the initial weights of another one; biases and all else stay."""
    return preset._replace(
        kernel=other.kernel,
        recurrent_kernel=other.recurrent_kernel,
        recurrent_gain=other.recurrent_gain,
        dense_kernel=other.dense_kernel,
    )


def chrono_biases(memory: int, hidden: int) -> Array:
    """log U of a forget gate, U in [1, T - 1], T the longest memory in time steps: units start with memories of all
    lengths up to T; the input gate gets their negative. [H], float32.

    Differs from Tallec & Ollivier 2018 (1804.11188, section 2) in: U is evenly spread, not random, so that all other
    weights stay the same.
    """
    return jnp.log(jnp.linspace(1.0, max(memory - 1.0, 1.0), hidden))


PRESETS = {
    # Keras 1.0.7 (August 2016): keras/layers/recurrent.py, initializations.py, optimizers.py
    'keras1': Preset(
        kernel=per_gate(initializers.glorot_uniform()),
        recurrent_kernel=per_gate(initializers.orthogonal(1.1)),
        recurrent_gain=1.1,
        dense_kernel=initializers.glorot_uniform(),
        gate=HARD_SIGMOID,
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
        recurrent_gain=1.0,
        dense_kernel=initializers.glorot_uniform(),
        gate=SIGMOID,
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
        recurrent_gain=1.0,
        dense_kernel=initializers.lecun_normal(),
        gate=SIGMOID,
        forget_bias=0.0,
        reset_after=True,
        recurrent_bias='candidate',
        epsilon=1e-8,
        epsilon_hat=False,
    ),
}
