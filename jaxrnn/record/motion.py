"""What a step did to its state: signals for anybody's step, of the state before and after it alone.

They are read from SAMPLE numbers of each tensor. Those of the state before a step are taken when it comes out of the
step before: a step that read the state which it overwrites would have to copy it.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxrnn import tree
from jaxrnn.types import Array, Tree

SAMPLE = 64
"""Numbers of a tensor that are looked at, evenly spread."""

FIELDS = ('state_rms', 'state_moved', 'state_still', 'moments_fading', 'moments_lost')
"""Names that a record has them by."""

FIRST_MOMENTS = ('mu', 'trace')
"""Fields by which optax's states keep a mean of gradients: of Adam and its kin, of momentum."""

MEANS = (*FIRST_MOMENTS, 'nu', 'acc_grads')
"""And those by which they keep whatever else of gradients."""

FADES = 1 - 1e-5
"""Most that a mean of gradients can be multiplied by in a step without a gradient; 1 is a step that was not taken."""

FALLS = 0.4
"""Share of itself to which a mean square can't fall within a step: by b2, which is .9 and more."""

FEWEST = 4
"""Numbers of which it says something that all were multiplied by the same."""


class SampledState(NamedTuple):
    """SAMPLE numbers of each tensor of a state, float32 [tensors, SAMPLE]; None where it has no such tensors."""

    moving: Array | None  # beside an optimiser's bookkeeping
    first_moments: Array | None
    squares: Array | None


def sampled(state: Tree) -> SampledState:
    """What `of_step` needs of the state before a step."""
    moving = [leaf for leaf in _without_means(state) if _is_float(leaf) and jnp.size(leaf)]
    leaves = moving, _means(state, FIRST_MOMENTS), _means(state, ('nu',))
    return SampledState(*(tree.spread(kind, SAMPLE) if kind else None for kind in leaves))


def of_step(before: SampledState, after: Tree) -> dict[str, Array]:
    """Signals of one step.

        state_rms       root mean square of the state's floating-point numbers, after the step
        state_moved     that of their change; exactly 0 where nothing moved
        state_still     share of the tensors in which nothing moved

    The three are of the tensors beside an optimiser's own bookkeeping, where optax's is found: means of gradients move
    on when nothing else does, as at a rate of 0, and so does the scale of a loss.

        moments_fading  1 where every mean of gradients that optax keeps was multiplied by the same number below 1, as
                        by a gradient of exactly zero; only where there are such means
        moments_lost    share of the mean squares of gradients that optax keeps that fell below FALLS of what they were:
                        they decay by a few hundredths a step, unless they are set back

    Args:
        before: of the state that the step starts from.
        after: the state; of the same structure, or else there are no signals.
    """
    now = sampled(after)
    if now.moving is None or jax.tree.map(jnp.shape, before) != jax.tree.map(jnp.shape, now):
        return {}
    assert before.moving is not None  # as they have the same shapes
    sizes = [jnp.size(leaf) for leaf in _without_means(after) if _is_float(leaf) and jnp.size(leaf)]
    weights = jnp.asarray(np.array(sizes, np.float32) / sum(sizes))
    moved = now.moving - before.moving
    record = {
        'state_rms': _rms(now.moving, weights),
        'state_moved': _rms(moved, weights),
        'state_still': jnp.mean((jnp.max(jnp.abs(moved), axis=1) == 0).astype(jnp.float32)),
    }
    first_moments = _means(after, FIRST_MOMENTS)
    if sum(leaf.size for leaf in first_moments) >= FEWEST:
        rounding = np.array([2 * float(jnp.finfo(leaf.dtype).eps) for leaf in first_moments], np.float32)
        fading = _fading(before.first_moments, now.first_moments, rounding)
        record['moments_fading'] = fading.astype(jnp.float32)
    if before.squares is not None and now.squares is not None:
        record['moments_lost'] = jnp.mean((now.squares < FALLS * before.squares).astype(jnp.float32))
    return record


def _rms(rows: Array, weights: Array) -> Array:
    """Root mean square of samples [K, SAMPLE], of tensors that weigh so much; scaled, so that it overflows last."""
    largest = jnp.max(jnp.abs(rows))
    scale = jnp.where((largest > 0) & jnp.isfinite(largest), largest, 1)
    return scale * jnp.sqrt(jnp.sum(weights * jnp.mean(jnp.square(rows / scale), axis=1)))


def _fading(before: Any, after: Any, rounding: np.ndarray) -> Array:
    """Of samples [K, SAMPLE], of tensors whose numbers are rounded by so much [K]."""
    place = jnp.argmax(jnp.abs(before))
    largest = before.ravel()[place]
    factor = after.ravel()[place] / jnp.where(largest == 0, 1, largest)
    alike = jnp.abs(after - factor * before) <= rounding[:, None] * jnp.abs(before)
    return jnp.all(alike) & (factor > 0) & (factor < FADES)


def moving(state: Tree) -> list[int]:
    """Which leaves of a state, by their numbers, are floating-point tensors beside an optimiser's bookkeeping."""
    leaves = jax.tree.leaves(state)
    beside = {id(leaf) for leaf in _without_means(state)}
    return [n for n, leaf in enumerate(leaves) if id(leaf) in beside and _is_float(leaf) and jnp.size(leaf)]


def _without_means(state: Tree) -> list[Array]:
    """The leaves of a state beside those of optax's means and sums of gradients; all, where there are none beside."""

    def is_bookkeeping(node: Any) -> bool:
        return isinstance(node, tuple) and bool({*getattr(node, '_fields', ())} & {*MEANS})

    leaves = [n for n in jax.tree.leaves(state, is_leaf=is_bookkeeping) if not is_bookkeeping(n)]
    # Single numbers beside tensors are a rate or a scale of the loss, more often than a weight.
    tensors = [leaf for leaf in leaves if jnp.size(leaf) > 1]
    for found in (tensors, leaves):
        if any(_is_float(leaf) for leaf in found):
            return found
    return jax.tree.leaves(state)


def _means(state: Tree, names: Sequence[str]) -> list[Array]:
    """The leaves that optax's states keep in fields of these names."""

    def keeps_means(node: Any) -> bool:
        return isinstance(node, tuple) and bool({*getattr(node, '_fields', ())} & {*names})

    nodes = [n for n in jax.tree.leaves(state, is_leaf=keeps_means) if keeps_means(n)]
    means = [getattr(node, name) for node in nodes for name in names if hasattr(node, name)]
    return [leaf for leaf in jax.tree.leaves(means) if _is_float(leaf) and leaf.size]


def _is_float(leaf: Any) -> bool:
    return jnp.issubdtype(jnp.result_type(leaf), jnp.floating)
