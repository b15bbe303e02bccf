"""The recurrence: a cell over time with `lax.scan`, and its hand-written backward pass.

Differentiating a plain scan accumulates the gradient of each weight inside the backward loop: it reads and
writes a matrix as large as the weights at every time step, for a product of a few rows. Here, as in cuDNN and
oneDNN, both loops carry states alone. The forward loop keeps what the gates were; the backward loop makes the
cotangents of the pre-activations; and one product over all time steps and examples makes each weight's gradient.
"""

import contextlib
import contextvars
import functools
import operator
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxrnn.rnn import cells
from jaxrnn.rnn.probe import Probe, measure
from jaxrnn.types import Array, Tree


class Plan(NamedTuple):
    """How the loops are laid out. Every plan computes the same function."""

    features_first: bool
    """States [H, B] and weights [G, H] instead of [B, H] and [H, G]."""
    unroll: int
    """Most time steps in one iteration of the compiled loop."""
    scatter_from: int
    """Smallest alphabet whose gradient is scattered; that of a smaller one is a product with one-hot rows."""


CPU = Plan(features_first=True, unroll=1, scatter_from=256)
"""XLA:CPU multiplies [4H, H] by [H, B] faster than [B, H] by [H, 4H], the more so the fewer examples there are
(docs/decisions/0004-recurrence.md)."""

CPU_LARGE_BATCH = CPU._replace(features_first=False)
"""From 256 examples on both products are as fast, and the transposes after the loop cost more."""

ACCELERATOR = Plan(features_first=False, unroll=32, scatter_from=2**31)
"""A loop's counter and its stores are launches of their own; unrolled, a time step is one product and one fused
kernel each way. A GPU scatters in no fixed order: a replay would not be bit for bit."""

_platform: contextvars.ContextVar[str | None] = contextvars.ContextVar('platform', default=None)


@contextlib.contextmanager
def compiled_for(platform: str) -> Iterator[None]:
    """Plans for a platform that isn't here ('cpu', 'gpu', 'tpu'), while a step is traced to be compiled for it."""
    token = _platform.set(platform)
    try:
        yield
    finally:
        _platform.reset(token)


def best_plan(examples: int) -> Plan:
    """The plan that was measured to be fastest for a batch, on the platform that JAX runs on or is compiling for."""
    if (_platform.get() or jax.default_backend()) != 'cpu':
        return ACCELERATOR
    return CPU if examples < 256 else CPU_LARGE_BATCH


class Weights(NamedTuple):
    """Of one layer. G is 4H for the LSTM, 3H for the GRU; gates side by side in the cell's order."""

    kernel: Array  # [D, G], or [V, G] for letters
    bias: Array  # [G]
    recurrent_kernel: Array  # [H, G]
    recurrent_bias: Array | None = None  # GRU, reset after: [3H], or [H] for the candidate alone


def run(
    cell: cells.Cell,
    weights: Weights,
    xs: Array,
    carry: Tree | None = None,
    *,
    mask: Array | None = None,
    reverse: bool = False,
    sequences: bool = True,
    dtype: Any = None,
    reference: bool = False,
    plan: Plan | None = None,
    probe: Probe | None = None,
    ends: Array | None = None,
) -> tuple[Any, Tree]:
    """Runs a cell over time.

    Args:
        cell: `cells.lstm(gate)`, `cells.gru_reset_after(gate)` or `cells.gru_reset_before(gate)`.
        weights: of the layer, floating point.
        xs: inputs [T, B, D], or letters int [T, B], which stand for one-hot rows (a letter outside the alphabet
            for a row of zeros).
        carry: before the first time step, in the cell's own form, [B, H] each; zeros if not given.
        mask: bool [T, B]; where it is False the carry stays as it is, whatever the input, even NaN.
        reverse: whether time runs from the last step to the first. Outputs stay at their inputs' places.
        sequences: whether the outputs of all time steps are wanted, beside the last carry.
        dtype: of the products' operands, and of the outputs; the weights' dtype if not given. Carries, sums and
            everything that isn't a product are in float32, or in the weights' dtype where that is wider.
        reference: whether to take the plain scan, which JAX differentiates: slower, but open to forward mode
            (`jax.jvp`). Hessian-vector products as `jax.jvp` of `jax.grad` need it not.
        plan: layout of the loops; the platform's best if not given.
        probe: of `new_probe`, to measure the layer; the plain scan gives it no gradient.
        ends: int [B], time steps up to which an example says something, for `Probe.memory`; T if not given.

    Returns:
        Outputs [T, B, H], or None without `sequences`, and the carry after the last time step.

    Raises:
        ValueError: shapes don't agree.
    """
    weights, xs, mask = jax.tree.map(jnp.asarray, (weights, xs, mask))
    dtype = jnp.dtype(dtype or weights.kernel.dtype)
    carry = _start(cell, weights, xs, carry)
    _check(cell, weights, xs, carry, mask)
    if mask is not None and xs.ndim == 3:
        # Not only the carry must be spared what is masked: a NaN in xs times a cotangent of 0 is NaN.
        xs = jnp.where(mask[:, :, None], xs, 0)
    if reference:
        return _reference(cell, weights, xs, carry, mask, reverse=reverse, sequences=sequences, dtype=dtype)
    static = _Static(cell, plan or best_plan(xs.shape[1]), reverse, sequences, dtype)
    watched = None
    if probe is not None:
        watched = probe, jnp.full(xs.shape[1], xs.shape[0]) if ends is None else ends
    return _fast(static, weights, xs, carry, mask, watched)


def _start(cell: cells.Cell, weights: Weights, xs: Array, carry: Tree | None) -> Tree:
    wide = _wide(weights.recurrent_kernel.dtype)
    if carry is None:
        zeros = jnp.zeros((xs.shape[1], weights.recurrent_kernel.shape[0]), wide)
        return cell.carry(*[zeros] * len(cell.carry._fields))
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, wide), carry)


def _check(cell: cells.Cell, weights: Weights, xs: Array, carry: Tree, mask: Array | None) -> None:
    gates = sum(cell.blocks)
    width = weights.recurrent_kernel.shape[0]
    expected = {
        'recurrent_kernel': (weights.recurrent_kernel.shape, (width, gates * width)),
        'kernel': (weights.kernel.shape[1:], (gates * width,)),
        'bias': (weights.bias.shape, (gates * width,)),
        'xs': (xs.shape, (*xs.shape[:2], *(() if _are_letters(xs) else weights.kernel.shape[:1]))),
        **{f'carry.{name}': (leaf.shape, (xs.shape[1], width)) for name, leaf in carry._asdict().items()},
    }
    if mask is not None:
        expected['mask'] = (mask.shape, xs.shape[:2])
    for name, (found, wanted) in expected.items():
        if tuple(found) != tuple(wanted):
            raise ValueError(f'{name}: shape {tuple(found)} found, {tuple(wanted)} expected')
    bias = weights.recurrent_bias
    if bias is not None and (not cell.takes_recurrent_bias or bias.shape not in ((width,), (gates * width,))):
        raise ValueError(
            f'recurrent_bias: shape {bias.shape} found; only a GRU whose reset comes after takes one'
        )


def _recurrent_bias(cell: cells.Cell, weights: Weights) -> Array | None:
    """Of all gates, [G]."""
    bias = weights.recurrent_bias
    if bias is None:
        return None
    return jnp.pad(bias, (weights.bias.shape[0] - bias.shape[0], 0))


# The reference: equations as they stand, one time step after the other, differentiated by JAX.


def _reference(
    cell: cells.Cell,
    weights: Weights,
    xs: Array,
    carry: Tree,
    mask: Array | None,
    *,
    reverse: bool,
    sequences: bool,
    dtype: Any,
) -> tuple[Array | None, Tree]:
    layout = _Layout(features_first=False, dtype=dtype, wide=carry.h.dtype)

    def body(tm1: Tree, x: tuple[Array, Array | None]) -> tuple[Tree, Array | None]:
        x_t, mask_t = x
        # Narrowed within the loop, the kernel's gradient is summed over time as wide as the kernel is.
        blocks = layout.blocks(cell, weights.recurrent_kernel)
        products = layout.products(blocks, _recurrent_bias(cell, weights))
        t, _ = cell.forward(products, layout.split(x_t, sum(cell.blocks)), tm1)
        if mask_t is not None:
            t = jax.tree.map(lambda new, old: jnp.where(mask_t[:, None], new, old), t, tm1)
        return t, t.h.astype(dtype) if sequences else None

    projected = project(weights.kernel, weights.bias, xs, dtype=dtype)
    last, outputs = lax.scan(body, carry, (projected, mask), reverse=reverse)
    return outputs, last


def project(kernel: Array, bias: Array, xs: Array, *, dtype: Any = None) -> Array:
    """The input's share of the pre-activations for all time steps at once; also a dense layer.

    Args:
        kernel: [D, G].
        bias: [G].
        xs: inputs float [..., D], or letters int [...], which stand for one-hot rows.
        dtype: of the product's operands; the kernel's if not given.

    Returns:
        xs W + b, [..., G], float32 or wider.
    """
    dtype, wide = dtype or kernel.dtype, _wide(kernel.dtype)
    if _are_letters(xs):
        return _look_up(_table(kernel, bias, dtype), bias, xs)
    projected = jnp.matmul(xs.astype(dtype), kernel.astype(dtype), preferred_element_type=wide)
    return projected + jnp.broadcast_to(bias, projected.shape)


def _are_letters(xs: Array) -> bool:
    return jnp.issubdtype(xs.dtype, jnp.integer)


def _wide(dtype: Any) -> Any:
    """Of carries and sums, where weights or products are of `dtype`."""
    return jnp.promote_types(dtype, jnp.float32)


def _table(kernel: Array, bias: Array, dtype: Any) -> Array:
    """A letter's share of the pre-activations: W + b. A gather of its rows is exact, and a NaN in one letter's
    row strikes the words that have the letter, where a product with one-hot rows would strike them all."""
    rows = kernel.astype(dtype).astype(_wide(kernel.dtype))
    return rows + jnp.broadcast_to(bias, rows.shape)


def _look_up(table: Array, bias: Array, letters: Array) -> Array:
    """Rows of the table [V, G]; the bias alone for a letter that isn't in it."""
    known = (letters >= 0) & (letters < table.shape[0])
    found = jnp.take(table, letters, axis=0, mode='clip')
    return jnp.where(known[..., None], found, jnp.broadcast_to(bias, found.shape))


# The fast path.


class _Static(NamedTuple):
    """What is known when the loops are traced."""

    cell: cells.Cell
    plan: Plan
    reverse: bool
    sequences: bool
    dtype: Any


class _Layout(NamedTuple):
    """Where features lie in the arrays of a loop, and the products that go with it."""

    features_first: bool
    dtype: Any  # of the products' operands
    wide: Any  # of everything else

    @property
    def axis(self) -> int:
        return -2 if self.features_first else -1

    def turned(self, x: Array) -> Array:
        """[..., B, H] to the layout, and back."""
        return x.swapaxes(-1, -2) if self.features_first else x

    def flat(self, x: Array) -> Array:
        """[T, B, ..] as the products after the loop want it: as rows [T B, ..] on CPU; as it is elsewhere, since
        rows of examples that are split between devices would have to be gathered first."""
        return x.reshape(-1, x.shape[-1]) if self.features_first else x

    def split(self, x: Array, gates: int) -> list[Array]:
        return jnp.split(x, gates, self.axis)

    def join(self, parts: Sequence[Array]) -> Array:
        return jnp.concatenate(parts, self.axis)

    def per_example(self, mask: Array) -> Array:
        """[B] to what broadcasts against a state."""
        return mask[None, :] if self.features_first else mask[:, None]

    def blocks(self, cell: cells.Cell, recurrent_kernel: Array) -> list[Array]:
        """The recurrent kernel's columns for each of the cell's products, [H, G_k]."""
        width = recurrent_kernel.shape[0]
        ends = [width * sum(cell.blocks[: k + 1]) for k in range(len(cell.blocks) - 1)]
        return jnp.split(recurrent_kernel.astype(self.dtype), ends, axis=1)

    def products(self, blocks: Sequence[Array], bias: Array | None) -> list[cells.Product]:
        """h -> h R_k, gate by gate; the first with the recurrent bias."""

        def product(k: int, block: Array, h: Array) -> Sequence[Array]:
            h = h.astype(self.dtype)
            pair = (block, h) if self.features_first else (h, block)
            u = jnp.matmul(*pair, preferred_element_type=self.wide)
            if bias is not None and k == 0:
                u += jnp.broadcast_to(bias[:, None] if self.features_first else bias, u.shape)
            return self.split(u, u.shape[self.axis] // h.shape[self.axis])

        if self.features_first:
            blocks = [lax.optimization_barrier(block.T) for block in blocks]
        return [functools.partial(product, k, block) for k, block in enumerate(blocks)]

    def transposed(self, blocks: Sequence[Array]) -> list[cells.Transposed]:
        """d -> d R_k'."""

        def product(block: Array, d: Sequence[Array]) -> Array:
            joined = self.join(d).astype(self.dtype)
            operands, contracted = (
                ((block, joined), (1, 0)) if self.features_first else ((joined, block), (1, 1))
            )
            return _dot(*operands, contracted, self.wide)

        return [functools.partial(product, block) for block in blocks]


def _over_examples(a: Array, d: Array, wide: Any) -> Array:
    """a' d, summed over all axes but the last."""
    axes = tuple(range(d.ndim - 1))
    return lax.dot_general(a, d, ((axes, axes), ((), ())), preferred_element_type=wide)


def _dot(a: Array, b: Array, contracted: tuple[int, int], wide: Any) -> Array:
    """Product of two matrices over the axes `contracted`."""
    over = (((contracted[0],), (contracted[1],)), ((), ()))
    return lax.dot_general(a, b, over, preferred_element_type=wide)


_Watched = tuple[Probe, Array] | None
"""The probe, and `ends`."""


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _fast(
    static: _Static, weights: Weights, xs: Array, carry: Tree, mask: Array | None, watched: _Watched
) -> tuple[Array | None, Tree]:
    return _forward(static, weights, xs, carry, mask, watched)[0]


class _Residuals(NamedTuple):
    weights: Weights
    xs: Array
    mask: Array | None
    saved: tuple[Any, ...]  # as `_pieces`: what the cell saved at each time step
    tm1: tuple[Tree, ...]  # the carry before it
    watched: _Watched
    last: Array  # h after the last time step


def _forward(
    static: _Static, weights: Weights, xs: Array, carry: Tree, mask: Array | None, watched: _Watched
) -> tuple[tuple[Array | None, Tree], _Residuals]:
    cell = static.cell
    layout = _Layout(static.plan.features_first, static.dtype, carry.h.dtype)
    products = layout.products(layout.blocks(cell, weights.recurrent_kernel), _recurrent_bias(cell, weights))
    inputs, share = _inputs(layout, weights, xs)
    unroll = _unroll(static.plan, xs.shape[0])

    def step(tm1: Tree, at: tuple[Array, Array | None]) -> tuple[Tree, tuple]:
        x, mask_t = at
        t, saved = cell.forward(products, layout.split(share(x), sum(cell.blocks)), tm1)
        if mask_t is not None:
            valid = layout.per_example(mask_t)
            t = jax.tree.map(lambda new, old: jnp.where(valid, new, old), t, tm1)
        if unroll == 1:
            saved = layout.join(saved)  # one wide store an iteration
        else:
            # Else the compiler makes the gates again for each of their users, the next steps among them.
            t, saved = lax.optimization_barrier((t, saved))
        output = layout.turned(t.h).astype(static.dtype) if static.sequences else None
        return t, (saved, tm1, output)

    start = jax.tree.map(layout.turned, carry)
    last, kept = _scan(step, start, _pieces((inputs, mask), unroll), reverse=static.reverse)
    saved, tm1, outputs = zip(*kept, strict=True)
    results = _stack(outputs) if static.sequences else None, jax.tree.map(layout.turned, last)
    return results, _Residuals(weights, xs, mask, saved, tm1, watched, last.h)


def _backward(static: _Static, residuals: _Residuals, cotangents: tuple[Array | None, Tree]) -> tuple:
    cell = static.cell
    weights, xs, mask, saved, tm1, watched, last = residuals
    d_outputs, d_last = cotangents
    layout = _Layout(static.plan.features_first, static.dtype, d_last.h.dtype)
    transposed = layout.transposed(layout.blocks(cell, weights.recurrent_kernel))
    unroll = len(saved)
    width = weights.recurrent_kernel.shape[0]

    def apart(saved: Any) -> Sequence[Array]:
        return layout.split(saved, saved.shape[layout.axis] // width) if unroll == 1 else saved

    def step(d_t: Tree, at: tuple) -> tuple[Tree, tuple[Array, ...]]:
        saved, tm1, mask_t, d_output = at
        if d_output is not None:
            d_t = d_t._replace(h=d_t.h + layout.turned(d_output.astype(layout.wide)))
        active = d_t
        if mask_t is not None:
            valid = layout.per_example(mask_t)
            active = jax.tree.map(lambda d: jnp.where(valid, d, 0), d_t)
        d, d_tm1 = cell.backward(transposed, apart(saved), tm1, active)
        if mask_t is not None:
            d_tm1 = jax.tree.map(lambda d, stays: jnp.where(valid, d, stays), d_tm1, d_t)
        return d_tm1, tuple(layout.join([d[k] for k in group]) for group in _groups(cell))

    at = tuple(zip(saved, tm1, _pieces(mask, unroll), _pieces(d_outputs, unroll), strict=True))
    d_start, d = _scan(step, jax.tree.map(layout.turned, d_last), at, reverse=not static.reverse)
    operands = [cell.operands(apart(s), c) for s, c in zip(saved, tm1, strict=True)]
    stacked = [_stack(of_each) for of_each in zip(*operands, strict=True)]
    groups = [_stack(of_each) for of_each in zip(*d, strict=True)]
    d_weights, d_xs = _gradients(static, layout, weights, xs, groups, stacked)
    d_watched = None
    if watched is not None:
        gates = {name: _stack([apart(s)[k] for s in saved]) for name, k in cell.gates}
        states = jax.tree.map(lambda *pieces: _stack(pieces), *tm1)
        start, ends = watched
        measured = measure(
            start, gates, states, last, groups[0], ends=ends, mask=mask, reverse=static.reverse,
            features_first=layout.features_first,
        )  # fmt: skip
        d_watched = measured, None
    return d_weights, d_xs, jax.tree.map(layout.turned, d_start), None, d_watched


_fast.defvjp(_forward, _backward)


def _inputs(layout: _Layout, weights: Weights, xs: Array) -> tuple[Array, Callable[[Array], Array]]:
    """What the loop is given of the inputs at each time step, and what makes their share x W + b of it."""
    if not _are_letters(xs):
        return project(weights.kernel, weights.bias, xs, dtype=layout.dtype), layout.turned
    # Gathered within the loop, the share is never stored.
    table = lax.optimization_barrier(_table(weights.kernel, weights.bias, layout.dtype))
    return xs, lambda letters: layout.turned(_look_up(table, weights.bias, letters))


def _groups(cell: cells.Cell) -> tuple[tuple[int, ...], ...]:
    """How the cotangents of the pre-activations are stored: side by side those of each product, which need them so,
    then those that the inputs alone have."""
    shared = {k for which in cell.d_products for k in which}
    rest = tuple(k for k in cell.d_inputs if k not in shared)
    return (*cell.d_products, rest) if rest else cell.d_products


def _gradients(
    static: _Static,
    layout: _Layout,
    weights: Weights,
    xs: Array,
    groups: Sequence[Array],
    operands: Sequence[Array],
) -> tuple[Weights, Array | None]:
    """The products after the loop: gradients of the weights and of the inputs.

    Args:
        static, layout, weights, xs: of the layer.
        groups: cotangents of the pre-activations as `_groups` has them, [T, B, ..] or [T, .., B].
        operands: what each R_k multiplied, [T, B, H] or [T, H, B].
    """
    cell, wide = static.cell, layout.wide
    # A plain product of two matrices as they lie in memory is the fast one: hence the barriers.
    rows = [lax.optimization_barrier(layout.flat(layout.turned(group))) for group in groups]

    def against(operand: Array, d: Array) -> Array:
        operand = operand.astype(static.dtype)
        if layout.features_first:
            columns = operand.swapaxes(0, 1).reshape(operand.shape[1], -1)
            return _dot(lax.optimization_barrier(columns), d, (1, 0), wide)
        return _over_examples(operand, d, wide)

    d_products = [d.astype(static.dtype) for d in rows[: len(operands)]]
    d_recurrent = jnp.concatenate([against(o, d) for o, d in zip(operands, d_products, strict=True)], axis=1)
    examples = tuple(range(rows[0].ndim - 1))
    d_bias = _of_inputs(cell, rows, lambda d: jnp.sum(d, axis=examples))
    d_recurrent_bias = None
    if weights.recurrent_bias is not None:
        of_candidate = rows[0][..., -weights.recurrent_bias.shape[0] :]
        d_recurrent_bias = jnp.sum(of_candidate, axis=examples)
    d_kernel, d_xs = _input_gradients(static, layout, weights.kernel, xs, rows)
    made = Weights(d_kernel, d_bias, d_recurrent, d_recurrent_bias)
    return jax.tree.map(lambda g, w: g.astype(w.dtype), made, weights), d_xs


def _of_inputs(cell: cells.Cell, rows: Sequence[Array], make: Callable[[Array], Array]) -> Array:
    """What `make` makes of the cotangents of x_t's gates, whose last axis it keeps; nothing large is copied for it."""
    groups = _groups(cell)
    if groups[0] == cell.d_inputs:
        return make(rows[0])
    parts: dict[int, Array] = {}
    for group, d in zip(groups, rows, strict=True):
        parts |= zip(group, jnp.split(make(d), len(group), axis=-1), strict=True)
    return jnp.concatenate([parts[k] for k in cell.d_inputs], axis=-1)


def _input_gradients(
    static: _Static, layout: _Layout, kernel: Array, xs: Array, rows: Sequence[Array]
) -> tuple[Array, Array | None]:
    """Of the kernel and of the inputs, which letters have none. rows: [T B, ..] or [T, B, ..], see `flat`."""
    cell, wide = static.cell, layout.wide
    if not _are_letters(xs):
        d = _of_inputs(cell, rows, lambda d: d.astype(static.dtype))
        d_xs = _dot(d, kernel.astype(static.dtype), (d.ndim - 1, 1), wide)
        d_kernel = _over_examples(layout.flat(xs.astype(static.dtype)), d, wide)
        return d_kernel, d_xs.reshape(xs.shape).astype(xs.dtype)
    if kernel.shape[0] < static.plan.scatter_from:
        one_hot = layout.flat(jax.nn.one_hot(xs, kernel.shape[0], dtype=static.dtype))
        return _of_inputs(cell, rows, lambda d: _over_examples(one_hot, d.astype(static.dtype), wide)), None
    known = jnp.where(xs < 0, kernel.shape[0], xs).reshape(rows[0].shape[:-1])

    def scatter(d: Array) -> Array:
        return jnp.zeros((kernel.shape[0], d.shape[-1]), wide).at[known].add(d, mode='drop')

    return _of_inputs(cell, rows, scatter), None


# Time in pieces: a tree of [T, ...] as a tuple of U trees of [T / U, ...], one for each place in an iteration.


def _unroll(plan: Plan, steps: int) -> int:
    """U: the largest divisor of T that the plan allows."""
    return max(u for u in range(1, plan.unroll + 1) if steps % u == 0)


def _pieces(tree: Tree, unroll: int) -> tuple[Tree, ...]:
    split = jax.tree.map(lambda x: x.reshape(len(x) // unroll, unroll, *x.shape[1:]), tree)
    return tuple(jax.tree.map(operator.itemgetter((slice(None), u)), split) for u in range(unroll))


def _stack(pieces: Sequence[Array]) -> Array:
    """The inverse of `_pieces`."""
    if len(pieces) == 1:
        return pieces[0]
    stacked = jnp.stack(pieces, axis=1)
    return stacked.reshape(len(stacked) * len(pieces), *stacked.shape[2:])


def _scan(
    step: Callable[[Tree, Tree], tuple[Tree, Tree]], carry: Tree, xs: tuple[Tree, ...], *, reverse: bool
) -> tuple[Tree, tuple[Tree, ...]]:
    """`lax.scan` over pieces: outputs stay in pieces, and where one iteration is all, there is no loop."""

    def body(carry: Tree, at: tuple[Tree, ...]) -> tuple[Tree, tuple[Tree, ...]]:
        outputs = [None] * len(at)
        for u in reversed(range(len(at))) if reverse else range(len(at)):
            carry, outputs[u] = step(carry, at[u])
        return carry, tuple(outputs)

    if len(xs) > 1 and len(jax.tree.leaves(xs)[0]) == 1:
        carry, outputs = body(carry, jax.tree.map(lambda x: x[0], xs))
        return carry, jax.tree.map(lambda x: x[None], outputs)
    return lax.scan(body, carry, xs, reverse=reverse)
