"""Trees of arrays: named leaves, norms, finite flags, digests."""

from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxrnn.types import Array, Tree


def named_leaves(tree: Tree) -> dict[str, Array]:
    """The leaves by path, as `params/lstm/kernel`."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator='/'): leaf for path, leaf in leaves}


def norm(tree: Tree) -> Array:
    """Euclidean norm over all leaves, accumulated in float32; inf beyond 1.8e19, NaN where any leaf has one."""
    squares = [jnp.sum(jnp.square(leaf.astype(jnp.float32))) for leaf in jax.tree.leaves(tree)]
    return jnp.sqrt(sum(squares, jnp.float32(0)))


def all_finite(tree: Tree) -> Array:
    """Whether every floating-point number in the tree is finite."""
    kinds: dict[jnp.dtype, list[Array]] = {}
    for leaf in jax.tree.leaves(tree):
        if _is_float(leaf):
            kinds.setdefault(jnp.result_type(leaf), []).append(jnp.asarray(leaf))
    flags = [
        jnp.all(jnp.isfinite(_joined([leaves[n] for n in group])))
        for leaves in kinds.values()
        for group in _groups(leaves)
    ]
    return jnp.all(jnp.array(flags)) if flags else jnp.array(True)


def spread(leaves: Sequence[Array], count: int) -> Array:
    """So many numbers of each leaf, evenly spread, float32 [leaves, count]; some several times where it has fewer."""
    leaves = [jnp.asarray(leaf) for leaf in leaves]
    order: list[int] = []
    rows = []
    for group in _groups(leaves):
        few = [leaves[n] for n in group]
        joined = few[0] if len(few) == 1 else _joined([leaf.astype(jnp.float32) for leaf in few])
        sizes = np.array([[leaf.size] for leaf in few])
        places = np.arange(count) * sizes // count + np.cumsum(sizes)[:, None] - sizes
        rows.append(jnp.ravel(joined)[places].astype(jnp.float32))
        order += group
    return rows[0] if len(rows) == 1 else jnp.concatenate(rows)[np.argsort(order)]


def digest(tree: Tree) -> Array:
    """Two uint32 over every bit of every leaf, equal for equal trees.

    Each 32-bit word is keyed with its leaf and place and sent through a mixing function whose results
    are added modulo 2^32. Integer addition commutes exactly, so the digest doesn't depend on threads,
    devices or the order of the reduction. A difference of one bit goes unnoticed with probability 2^-64.
    The mixing is MurmurHash3's finaliser (Appleby, public domain).
    """
    total = jnp.zeros(2, jnp.uint32)
    words = [words_of(leaf) for leaf in jax.tree.leaves(tree)]
    for group in _groups(words):
        # One sum a word: XLA's loop over both together takes eight times as long.
        added = _mixed([words[n] for n in group], group)
        total += jnp.stack([jnp.sum(word, dtype=jnp.uint32) for word in added])
    return total


def mixed(words: Array, number: int) -> Array:
    """What each word adds to a digest, uint32 [2, words].

    Args:
        words: of a leaf (`words_of`).
        number: of the leaf, in the order of leaves.
    """
    return _mixed([words], [number])


def _mixed(leaves: list[Array], numbers: list[int]) -> Array:
    """What each word of several leaves adds, one leaf after the other."""
    starts = np.cumsum([0, *(leaf.size for leaf in leaves)])
    firsts = [
        np.uint32((number * _LEAF - int(start) * _PLACE) & 0xFFFFFFFF)
        for number, start in zip(numbers, starts, strict=False)
    ]
    place = lax.iota(jnp.uint32, int(starts[-1])) * np.uint32(_PLACE)
    key = place + jnp.concatenate(
        [jnp.full(leaf.size, first) for leaf, first in zip(leaves, firsts, strict=True)]
    )
    low = _mix(_joined(leaves) ^ key)
    return jnp.stack([low, _mix(low + key)])


_PLACE, _LEAF = 0x9E3779B1, 0x85EBCA77
"""What a word's key grows by from one to the next, and from leaf to leaf."""

FEW = 16_384
"""Numbers of a leaf that is looked at together with other such. A loop for each takes long to compile: a digest of 39
takes a fifth of the time so, and no longer to run."""


def _groups(leaves: Sequence[Array]) -> Iterator[list[int]]:
    """The numbers of leaves that are looked at together. Each is by itself where there are several devices, over which
    it may be spread, and so is one that says how it is spread: what is joined has to lie alike."""
    together = []
    for number, leaf in enumerate(leaves):
        if leaf.size <= FEW and jax.device_count() == 1 and jax.typeof(leaf).sharding.mesh.empty:
            together.append(number)
        else:
            yield [number]
    if together:
        yield together


def _joined(leaves: list[Array]) -> Array:
    """All numbers of a group. Without the barrier XLA makes a loop for each leaf again."""
    if len(leaves) == 1:
        return leaves[0]
    return lax.optimization_barrier(jnp.concatenate([jnp.ravel(leaf) for leaf in leaves]))


def hex_digest(words: np.ndarray) -> str:
    """A digest as 16 hex digits."""
    return f'{int(words[0]):08x}{int(words[1]):08x}'


def nbytes(tree: Tree) -> int:
    """Bytes the leaves take; they may be shapes alone."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def _is_float(leaf: Array) -> bool:
    return jnp.issubdtype(jnp.result_type(leaf), jnp.inexact)


def words_of(leaf: Array) -> Array:
    """The bits of a leaf as uint32 [words]; a number of 64 bits has two words, one of 16 one."""
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.random.key_data(leaf)
    leaf = jnp.ravel(jnp.asarray(leaf))
    if leaf.dtype == jnp.bool:
        return leaf.astype(jnp.uint32)
    if jnp.issubdtype(leaf.dtype, jnp.complexfloating):
        leaf = jnp.concatenate([leaf.real, leaf.imag])
    bits = lax.bitcast_convert_type(leaf, jnp.dtype(f'uint{min(leaf.dtype.itemsize * 8, 32)}'))
    return jnp.ravel(bits).astype(jnp.uint32)


def _mix(x: Array) -> Array:
    x = (x ^ (x >> 16)) * np.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * np.uint32(0xC2B2AE35)
    return x ^ (x >> 16)
