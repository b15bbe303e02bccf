"""Trees of arrays: named leaves, norms, finite flags, digests."""

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
    flags = [jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(tree) if _is_float(leaf)]
    return jnp.all(jnp.array(flags)) if flags else jnp.array(True)


def digest(tree: Tree) -> Array:
    """Two uint32 over every bit of every leaf, equal for equal trees.

    Each 32-bit word is keyed with its leaf and place and sent through a mixing function whose results
    are added modulo 2^32. Integer addition commutes exactly, so the digest doesn't depend on threads,
    devices or the order of the reduction. A difference of one bit goes unnoticed with probability 2^-64.
    The mixing is MurmurHash3's finaliser (Appleby, public domain).
    """
    total = jnp.zeros(2, jnp.uint32)
    for number, leaf in enumerate(jax.tree.leaves(tree)):
        # One sum a word: XLA's loop over both together takes eight times as long.
        total += jnp.stack([jnp.sum(word, dtype=jnp.uint32) for word in mixed(words_of(leaf), number)])
    return total


def mixed(words: Array, number: int) -> Array:
    """What each word adds to a digest, uint32 [2, words].

    Args:
        words: of a leaf (`words_of`).
        number: of the leaf, in the order of leaves.
    """
    place = lax.iota(jnp.uint32, words.size) * np.uint32(0x9E3779B1)
    key = place + np.uint32(number * 0x85EBCA77 & 0xFFFFFFFF)
    low = _mix(words ^ key)
    return jnp.stack([low, _mix(low + key)])


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
