"""One bit of a state that was another in the run than in its replay: which.

The record of a step has a digest of the state after it, by which a bit is known (`record.bit_flips`).

A bit flips while a state lies in memory. It is looked for in the state after the step, and in the state before it. What
follows from a bit before the step is computed by the step itself: the numbers of an optimiser's moments act on their
own parameter alone, so that the same bit of all of them is tried in one step. A weight acts on everything. Which one it
is, the next checkpoint shows, where it stands out.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxrnn import tree
from jaxrnn.bisect.replayer import Replayer
from jaxrnn.record.bit_flips import BitFlip, bits_of, named, of_state, with_flipped, words_of_digest
from jaxrnn.record.telemetry import DIGEST
from jaxrnn.types import Tree, UserError

MOST_STEPS = 1000
"""That may be computed to find one."""

FEW = 4
"""Numbers of a leaf, such as a count, that are tried one by one."""

STANDING_OUT = 4
"""Numbers of each leaf that the next checkpoint is asked for, those farthest from the replay."""

LIKELY = 4
"""Bits of such a number that are tried: those that would bring it nearest to what the checkpoint has."""


class FlippedBit(NamedTuple):
    """Where the bit was another."""

    flip: BitFlip
    before: bool  # in the state that the step starts from; else in the one after it


def of_step(replayer: Replayer, step: int) -> FlippedBit | None:
    """The bit that made a run another at a step, whose record has a digest; None where it is not found.

    Args:
        replayer: of the run.
        step: the first whose record differs.
    """
    recorded = (replayer.recorded.at(step) or {}).get(DIGEST)
    if recorded is None:
        return None
    search = _Search(replayer, step, recorded)
    after = of_state(search.after, recorded)
    if after is not None:
        return FlippedBit(after, before=False)
    for way in (search.of_few, search.of_moments, search.of_checkpoint):
        before = way()
        if before is not None:
            return FlippedBit(before, before=True)
    return None


class _Search:
    """A bit of the state that a step starts from.

    Args:
        replayer, step: as in `of_step`.
        recorded: the digest in the step's record.
    """

    def __init__(self, replayer: Replayer, step: int, recorded: str):
        self._replayer, self._step, self._recorded = replayer, step, recorded
        self._left = MOST_STEPS
        self._batch = replayer.subject.batch_at(step)
        self.before = replayer.state(step)
        self.after, self._digest = self._computed(self.before)
        self._leaves, self._structure = jax.tree.flatten(self.before)
        self._paths = [path or 'state' for path in tree.named_leaves(self.before)]
        self._wanted = words_of_digest(recorded) - words_of_digest(self._digest)

    def of_few(self) -> BitFlip | None:
        """Of leaves of few numbers, as counts and keys."""
        for number, leaf in enumerate(self._leaves):
            words = tree.words_of(leaf)
            if words.size <= FEW:
                for word in range(words.size):
                    for bit in range(bits_of(leaf)):
                        if self._gives(number, word, bit):
                            return self._named(number, word, bit)
        return None

    def of_moments(self) -> BitFlip | None:
        """Of leaves each of whose numbers acts on others of its own place alone."""
        for number, leaf in enumerate(self._leaves):
            if tree.words_of(leaf).size != np.size(leaf) or np.size(leaf) <= FEW:
                continue
            # The highest bit of a fraction: it shows everywhere, and overflows nowhere.
            if self._left < bits_of(leaf) or not self._acts_in_place(number, _fraction(leaf)):
                continue
            for bit in range(bits_of(leaf)):
                changed = self._with_all(number, bit)
                if changed is None:
                    return None
                places = np.flatnonzero(_adds(self.after, changed, leaf.shape, self._wanted))
                if places.size:
                    return self._named(number, int(places[0]), bit)
        return None

    def of_checkpoint(self) -> BitFlip | None:
        """Of those numbers that the next checkpoint has far from the replay."""
        for number, word, bit in self._standing_out():
            if self._left < 1:
                break
            if self._gives(number, word, bit):
                return self._named(number, word, bit)
        return None

    def _gives(self, number: int, word: int, bit: int) -> bool:
        """Whether the step gives its record from the state with a bit flipped."""
        mask = jnp.zeros(tree.words_of(self._leaves[number]).shape, jnp.uint32).at[word].set(1 << bit)
        return self._digest_of(number, mask) == self._recorded

    def _digest_of(self, number: int, mask: Any) -> str | None:
        if self._left < 1:
            return None
        return self._computed(self._flipped(number, mask))[1]

    def _acts_in_place(self, number: int, bit: int) -> bool:
        """Whether only leaves of the same shape change if all of a leaf do."""
        changed = self._with_all(number, bit)
        if changed is None:
            return False
        shape = np.shape(self._leaves[number])
        pairs = zip(jax.tree.leaves(self.after), jax.tree.leaves(changed), strict=True)
        return all(np.shape(a) == shape or _same(a, b) for a, b in pairs)

    def _with_all(self, number: int, bit: int) -> Tree | None:
        """The state after the step where a bit of all numbers of a leaf was another before it."""
        if self._left < 1:
            return None
        mask = jnp.full(tree.words_of(self._leaves[number]).shape, 1 << bit, jnp.uint32)
        return self._computed(self._flipped(number, mask))[0]

    def _flipped(self, number: int, mask: Any) -> Tree:
        leaves = list(self._leaves)
        leaves[number] = with_flipped(leaves[number], mask)
        return jax.tree.unflatten(self._structure, leaves)

    def _computed(self, state: Tree) -> tuple[Tree, str]:
        """The state after the step from one before it, and its digest."""
        self._left -= 1
        with jax.debug_nans(False):
            after, observation = self._replayer.subject.observed(
                jax.tree.map(jnp.copy, state), self._batch, True
            )
        return after, tree.hex_digest(np.asarray(observation.record[DIGEST]))

    def _standing_out(self) -> Iterator[tuple[int, int, int]]:
        """Leaf, word and bit, the likeliest first."""
        steps = self._replayer.subject.checkpoints.steps()
        following = next((at for at in steps if at > self._step), None)
        start = self._replayer.checkpoint_before(self._step)
        if following is None or following - start > self._left:
            return
        self._left -= following - start
        try:
            saved = jax.tree.leaves(self._replayer.subject.checkpoints.restore(following))
        except UserError:  # it is damaged, which is another matter
            return
        reached = jax.tree.leaves(self._replayer.reached(start, following))
        ranked = []
        for number, leaf in enumerate(self._leaves):
            whole = tree.words_of(leaf).size == np.size(leaf)
            if whole and jnp.issubdtype(jnp.result_type(leaf), jnp.floating):
                ranked += _far(number, leaf, saved[number], reached[number])
        for _, number, word, bit in sorted(ranked):
            yield number, word, bit

    def _named(self, number: int, word: int, bit: int) -> BitFlip:
        return named(self._paths[number], self._leaves[number], word, bit)


def _far(number: int, before: Any, saved: Any, reached: Any) -> list[tuple[float, int, int, int]]:
    """Bits of the numbers of a leaf that stand out in a checkpoint; each with how unlikely it is."""
    wide = [np.asarray(each, np.float64).reshape(-1) for each in (before, saved, reached)]
    with np.errstate(all='ignore'):
        apart = np.abs(wide[1] - wide[2])
        apart = np.where(np.isnan(apart), np.inf, apart)
        usual = float(np.median(apart[np.isfinite(apart)])) if np.isfinite(apart).any() else 0.0
    found = []
    for place in np.argsort(-apart)[:STANDING_OUT].tolist():
        if apart[place] <= usual:
            continue
        errors = []
        for bit in range(bits_of(before)):
            with np.errstate(all='ignore'):  # a signalling NaN can't be cast in silence
                flipped = float(np.asarray(_element(before, place, bit), np.float64))
                # What the number was changed by has stayed; or, where it decays, a part of it.
                error = abs(np.log(abs(flipped - wide[0][place])) - np.log(apart[place]))
            errors.append((float(error) if np.isfinite(error) else np.inf, bit))
        unlikely = usual / apart[place] if np.isfinite(apart[place]) else 0.0
        found += [
            (float(unlikely) + 1e-3 * rank, number, place, bit)
            for rank, (_, bit) in enumerate(sorted(errors)[:LIKELY])
        ]
    return found


def _adds(after: Tree, changed: Tree, shape: tuple[int, ...], wanted: np.ndarray) -> np.ndarray:
    """The places at which the leaves of a shape together add something to a digest, bool [numbers]."""
    total: Any = 0
    for number, (a, b) in enumerate(zip(jax.tree.leaves(after), jax.tree.leaves(changed), strict=True)):
        if np.shape(a) == shape and tree.words_of(a).size == np.size(a):
            total += tree.mixed(tree.words_of(b), number) - tree.mixed(tree.words_of(a), number)
    return np.asarray((total == wanted[:, None]).all(axis=0))


def _fraction(leaf: Any) -> int:
    """The highest bit of a number that isn't of its exponent or its sign."""
    dtype = jnp.asarray(leaf).dtype
    return jnp.finfo(dtype).nmant - 1 if jnp.issubdtype(dtype, jnp.floating) else 0


def _same(a: Any, b: Any) -> bool:
    return bool((tree.words_of(a) == tree.words_of(b)).all())


def _element(leaf: Any, word: int, bit: int) -> Any:
    """The number of a word, with a bit flipped; both of one word a number."""
    one = jnp.asarray(leaf).reshape(-1)[word : word + 1]
    return with_flipped(one, jnp.array([1 << bit], jnp.uint32))[0]
