"""One bit by which a state differs from a digest: which.

A digest is a sum of what each word of 32 bits adds (`tree.digest`). So what a flipped bit would change in it is known
without computing the digest anew, and each bit of each number can be asked. A bit that is found agrees with all 64 bits
of the digest: by chance that happens once in 2^64 bits asked.
"""

import functools
import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxrnn import tree
from jaxrnn.types import Tree


class BitFlip(NamedTuple):
    """A bit of a state."""

    path: str  # of the leaf
    place: tuple[int, ...]  # of the number in it
    bit: int  # 0 the lowest
    right: float  # the number with it as the replay has it
    wrong: float  # as the run had it

    @property
    def leaf(self) -> str:
        """With the place in it, as `params/kernel[3, 5]`."""
        return f'{self.path}[{", ".join(map(str, self.place))}]' if self.place else self.path

    def __str__(self) -> str:
        return f'bit {self.bit} of {self.leaf} ({self.right:.6g} became {self.wrong:.6g})'


def of_state(state: Tree, digest: str) -> BitFlip | None:
    """The bit by which a state differs from one of another digest; None if it isn't one, or that is no digest."""
    if not re.fullmatch('[0-9a-f]{16}', digest):
        return None
    return _in(state, words_of_digest(digest) - np.asarray(tree.digest(state)))


def with_flipped(leaf: Any, mask: Any) -> jax.Array:
    """A leaf with bits of its words flipped.

    Args:
        leaf: of any type; a random key stays one.
        mask: uint32, a word for each of `tree.words_of`.
    """
    leaf = jnp.asarray(leaf)
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        raw = with_flipped(jax.random.key_data(leaf), mask)
        return jax.random.wrap_key_data(raw, impl=jax.random.key_impl(leaf))
    words = tree.words_of(leaf) ^ jnp.asarray(mask)
    if leaf.dtype == jnp.bool:
        return (words != 0).reshape(leaf.shape)
    size = leaf.dtype.itemsize
    if size <= 4:
        narrow = words.astype(jnp.dtype(f'uint{8 * size}'))
        return jax.lax.bitcast_convert_type(narrow, leaf.dtype).reshape(leaf.shape)
    two = np.asarray(words)  # of a number, the lower first
    if jnp.issubdtype(leaf.dtype, jnp.complexfloating):
        part = np.dtype(f'float{4 * size}')
        real, imaginary = two[: two.size // 2].view(part), two[two.size // 2 :].view(part)
        return jnp.asarray((real + 1j * imaginary).astype(leaf.dtype)).reshape(leaf.shape)
    return jnp.asarray(two.view(leaf.dtype)).reshape(leaf.shape)


def _in(state: Tree, wanted: np.ndarray) -> BitFlip | None:
    """The bit whose flip adds something to a digest."""
    for number, (path, leaf) in enumerate(tree.named_leaves(state).items()):
        words = tree.words_of(jnp.asarray(leaf))
        if not words.size:
            continue
        found, places = jax.device_get(_asked(words, number, bits_of(leaf), wanted))
        for bit in np.flatnonzero(found).tolist():
            return named(path or 'state', leaf, int(places[bit]), bit)
    return None


@functools.partial(jax.jit, static_argnums=(1, 2))
def _asked(words: jax.Array, number: int, bits: int, wanted: jax.Array) -> tuple[jax.Array, jax.Array]:
    """For each bit: whether some word has it, and which, bool and int32 [bits]."""
    now = tree.mixed(words, number)

    def ask(bit: jax.Array) -> tuple[jax.Array, jax.Array]:
        adds = tree.mixed(words ^ (jnp.uint32(1) << bit), number) - now
        hits = (adds == wanted[:, None]).all(axis=0)
        return hits.any(), jnp.argmax(hits)

    return jax.lax.map(ask, jnp.arange(bits, dtype=jnp.uint32))


def words_of_digest(digest: str) -> np.ndarray:
    """A digest's two words, uint32 [2]."""
    return np.array([int(digest[:8], 16), int(digest[8:], 16)], np.uint32)


def bits_of(leaf: Any) -> int:
    """Bits of a word of a leaf."""
    dtype = jnp.asarray(leaf).dtype
    if jnp.issubdtype(dtype, jax.dtypes.prng_key):
        return 32
    return 1 if dtype == jnp.bool else min(8 * dtype.itemsize, 32)


def named(path: str, leaf: Any, word: int, bit: int) -> BitFlip:
    """A bit of a word of a leaf, as a bit of a number."""
    leaf = jnp.asarray(leaf)
    mask = jnp.zeros(tree.words_of(leaf).shape, jnp.uint32).at[word].set(1 << bit)
    right, wrong = (_numbers(each) for each in (leaf, with_flipped(leaf, mask)))
    words = tree.words_of(leaf).size // max(right.size, 1)
    part = 0
    if np.iscomplexobj(right):  # all real parts, then all imaginary ones
        words //= 2
        part, word = divmod(word, right.size * words)
    place, within = divmod(word, max(words, 1))
    index = tuple(int(at) for at in np.unravel_index(place, right.shape)) if right.shape else ()
    with np.errstate(invalid='ignore'):  # a signalling NaN can't be cast in silence
        values = [float((each.imag if part else each.real).reshape(-1)[place]) for each in (right, wrong)]
    return BitFlip(path, index, bit + 32 * within, *values)


def _numbers(leaf: jax.Array) -> np.ndarray:
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.random.key_data(leaf)
    found = np.asarray(leaf)
    return found if found.dtype.kind in 'biufc' else found.astype(np.float32)
