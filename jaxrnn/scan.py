"""The recurrence: a cell unrolled over time with `lax.scan`."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from jaxrnn.types import Array, Tree


def project(kernel: Array, bias: Array, xs: Array) -> Array:
    """The input's share of the pre-activations for all time steps at once.

    Args:
        kernel: [D, G].
        bias: [G].
        xs: inputs float [T, B, D], or letters int [T, B], which stand for one-hot rows.

    Returns:
        xs W + b, [T, B, G].
    """
    if jnp.issubdtype(xs.dtype, jnp.integer):
        # One-hot times kernel picks rows; at the highest precision it does so exactly on every platform,
        # and its transpose is a product too, where a gather's would be a slow scatter.
        one_hot = jax.nn.one_hot(xs, kernel.shape[0], dtype=kernel.dtype)
        projected = jnp.matmul(one_hot, kernel, precision=lax.Precision.HIGHEST)
    else:
        projected = xs @ kernel
    return projected + jnp.broadcast_to(bias, projected.shape)


def unroll(
    cell: Callable[[Array, Tree], Tree],
    output: Callable[[Tree], Array],
    xs: Array,
    carry: Tree,
    *,
    sequences: bool,
) -> Array:
    """Runs `carry = cell(x_t, carry)` over the leading axis of `xs`.

    Args:
        cell: one time step.
        output: picks the output [B, H] from the carry.
        xs: [T, B, G].
        carry: before the first time step.
        sequences: whether the outputs of all time steps are wanted, or of the last alone.

    Returns:
        [T, B, H] or [B, H].
    """

    def body(tm1: Tree, x_t: Array) -> tuple[Tree, Array | None]:
        t = cell(x_t, tm1)
        return t, output(t) if sequences else None

    last, outputs = lax.scan(body, carry, xs)
    return output(last) if outputs is None else outputs
