"""Whether a replay led to the state that was saved: bit for bit, but for rounding, or not.

Checkpoints of ours have a digest. Those of somebody else's loop are held against the replay by value, as nothing else
is known of them.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxrnn import tree
from jaxrnn.types import Tree

MARGIN = 8
"""How much farther apart than ROUNDINGS two compilations may be. Both distances are made of one rounding error an
operation, and grow alike. Measured over 50 steps, op by op against compiled: up to 5 times under Adam, below 1 under
momentum; a rate 5 % larger is 50 to 70,000
times, as long as the run moves."""

CLOSE = 3e-4
"""Largest distance between two compilations, as a share of a leaf's largest number: half the digits of float32. Where
rounding leads farther than that, as in a chaotic run or in bfloat16, another program does not lead farther, and the two
can't be told apart."""

ROUNDINGS = (0, 1)
"""Seeds of the replays whose every number is moved by a rounding error at each step."""

ASKED = 3
"""Intervals that are asked whether another compilation shows in them."""


class LeafDifference(NamedTuple):
    """One leaf of two states that differ."""

    path: str
    size: float  # largest difference over the largest number; inf where one isn't finite, or they can't be compared


class Agreement(NamedTuple):
    """What became of a replay from one checkpoint to the next."""

    start: int
    stop: int
    leaves: tuple[LeafDifference, ...]  # that differ by a bit; the farthest apart first
    telling: bool = True  # False for a state without a finite number, which agrees with any other such
    rounding: bool = False  # whether no more than rounding is between them
    undecided: bool = False  # whether rounding alone leads this run as far off, but that is far
    reached: str = ''  # digest of the state that the replay led to

    @property
    def exact(self) -> bool:
        return not self.leaves

    @property
    def broken(self) -> bool:
        """Whether the replay is another run than the one that saved the checkpoint."""
        return bool(self.leaves) and not self.rounding

    @property
    def digits(self) -> int:
        """Decimal digits to which the leaf that is farthest apart agrees."""
        farthest = self.leaves[0].size if self.leaves else 0.0
        return 0 if farthest >= 1 else 99 if farthest == 0 else math.floor(-math.log10(farthest))


def differences(saved: Tree, reached: Tree) -> tuple[LeafDifference, ...]:
    """The leaves that differ by a bit, the farthest apart first. A NaN is like any other NaN."""
    old, new = jax.tree.leaves(saved), tree.named_leaves(reached)
    if len(old) != len(new):
        return (LeafDifference('the structure of the state', math.inf),)
    found = [(path, _host(a), _host(b)) for a, (path, b) in zip(old, new.items(), strict=True)]
    apart = [LeafDifference(path or 'state', _apart(a, b)) for path, a, b in found if not _same(a, b)]
    return tuple(sorted(apart, key=lambda leaf: -leaf.size))


def is_telling(state: Tree) -> bool:
    """Whether a state has a finite number: a state of NaNs alone is reached from anywhere."""
    floats = [leaf for leaf in map(_host, jax.tree.leaves(state)) if _is_float(leaf)]
    return not floats or any(np.isfinite(_wide(leaf)).any() for leaf in floats)


def apart_by_rounding(saved: Tree, reached: Tree, moved: list[Tree]) -> tuple[bool, bool]:
    """Whether two states are no farther apart than rounding leads, and whether that is near.

    Args:
        saved: the state in the checkpoint.
        reached: by a replay.
        moved: by replays of which each number was moved by a rounding error at each step.
    """
    within = close = True
    leaves = [[_host(leaf) for leaf in jax.tree.leaves(state)] for state in (saved, reached, *moved)]
    for old, new, *others in zip(*leaves, strict=True):
        if _same(old, new):
            continue
        if not _is_float(new) or old.shape != new.shape:
            return False, False
        wide = _wide(new)
        between = np.abs(_wide(old) - wide).max()
        noise = max(np.abs(_wide(other) - wide).max() for other in others)
        within = within and bool(between <= MARGIN * noise)  # not so where one of them is NaN
        close = close and bool(between <= CLOSE * np.abs(wide).max())
    return within, close


def moved(values: Tree, seed: int, step: int) -> Tree:
    """The floating-point numbers of a tree each moved up or down by one rounding error, or left."""
    rng = np.random.default_rng((seed, step))

    def move(leaf: Any) -> Any:
        if not jnp.issubdtype(jnp.result_type(leaf), jnp.floating):
            return leaf
        leaf = jnp.asarray(leaf)
        signs = jnp.asarray(rng.integers(-1, 2, leaf.shape), leaf.dtype)
        return leaf * (1 + signs * jnp.finfo(leaf.dtype).eps)

    return jax.tree.map(move, values)


def _host(leaf: Any) -> np.ndarray:
    if jnp.issubdtype(jnp.result_type(leaf), jax.dtypes.prng_key):
        leaf = jax.random.key_data(leaf)
    return np.asarray(leaf)


def _is_float(leaf: np.ndarray) -> bool:
    return jnp.issubdtype(leaf.dtype, jnp.inexact)


def _wide(leaf: np.ndarray) -> np.ndarray:
    return leaf.astype(np.complex128 if np.iscomplexobj(leaf) else np.float64)


def _same(a: np.ndarray, b: np.ndarray) -> bool:
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    if a.tobytes() == b.tobytes():
        return True
    if not _is_float(a):
        return False
    bits = np.dtype(f'V{a.dtype.itemsize}')
    alike = a.reshape(-1).view(bits) == b.reshape(-1).view(bits)
    return bool(np.all(alike | (np.isnan(_wide(a)) & np.isnan(_wide(b))).reshape(-1)))


def _apart(a: np.ndarray, b: np.ndarray) -> float:
    if a.shape != b.shape:
        return math.inf
    wide, other = _wide(a), _wide(b)
    both = ~(np.isnan(wide) & np.isnan(other))
    with np.errstate(invalid='ignore'):
        distance, size = (
            np.abs(wide - other)[both].max(),
            max(np.abs(wide)[both].max(), np.abs(other)[both].max()),
        )
        share = float(distance / size) if size else 0.0
    return share if math.isfinite(share) else math.inf
