"""The arrays of a state that somebody's loop carries, and what else is in it: functions, names, settings.

A state is recorded without what is no array. A replay is given a state like it, and takes the rest from there.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxrnn.types import Step, Tree, UserError


class Parts(NamedTuple):
    """Which leaves of a state are arrays that a step changes.

    Args:
        paths: of these leaves, in their order.
        mask: of all leaves.
    """

    paths: tuple[str, ...]
    mask: tuple[bool, ...]

    @classmethod
    def of(cls, state: Tree, later: Tree) -> 'Parts':
        """Of a state, and of that after a step. A Python number is an array if the step makes it one, as it does of a
        count of steps that begins at 0; else it is a setting, as the rate of a dropout."""
        leaves, structure = jax.tree_util.tree_flatten_with_path(state)
        after, other = jax.tree.flatten(later)
        if other != structure:  # type: ignore[operator]
            raise UserError(
                'state: a step leaves another structure than it begins with '
                f'({_difference(state, later)}); give the recorder the state that the step takes and gives'
            )
        mask = tuple(_is_array(a) or _is_array(b) for (_, a), b in zip(leaves, after, strict=True))
        names = tuple(_name(path) for path, _ in leaves)
        return cls(tuple(n for n, m in zip(names, mask, strict=True) if m), mask)

    @classmethod
    def named(cls, state: Tree, paths: Sequence[str], argument: str = 'like') -> 'Parts':
        """Those leaves of a state whose paths are given. Raises UserError where it has no such, by the argument's
        name."""
        names = [_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(state)]
        known, there = set(paths), set(names)
        if missing := [path for path in paths if path not in there]:
            raise UserError(
                f'{argument}: no {missing[0]!r} found, which the state of the run has; give a state of the same model '
                'and optimiser'
            )
        return cls(tuple(paths), tuple(name in known for name in names))

    def arrays(self, state: Tree) -> Tree:
        """A state with nothing but its arrays: None in place of all else."""
        leaves, structure = jax.tree.flatten(state)
        self._check(leaves)
        return jax.tree.unflatten(
            structure, [leaf if m else None for leaf, m in zip(leaves, self.mask, strict=True)]
        )

    def settings(self, state: Tree) -> Tree:
        """A state with nothing in place of its arrays, as `whole` takes one: it holds no memory."""
        leaves, structure = jax.tree.flatten(state)
        self._check(leaves)
        return jax.tree.unflatten(
            structure, [_ARRAY if m else leaf for leaf, m in zip(leaves, self.mask, strict=True)]
        )

    def whole(self, arrays: Tree, like: Tree) -> Tree:
        """A state of these arrays, with all else as another has it."""
        leaves, structure = jax.tree.flatten(like)
        self._check(leaves)
        given = iter(jax.tree.leaves(arrays))
        return jax.tree.unflatten(
            structure, [next(given) if m else leaf for leaf, m in zip(leaves, self.mask, strict=True)]
        )

    @property
    def all_arrays(self) -> bool:
        return all(self.mask)

    def _check(self, leaves: Sequence[Any]) -> None:
        if len(leaves) != len(self.mask):
            raise UserError(
                f'state: {len(leaves)} leaves found, {len(self.mask)} expected, as the run began with'
            )


def on_arrays(step: Step, known: Parts, like: Tree) -> Step:
    """A step on the arrays of a state, all else as it is in `like`."""
    if known.all_arrays:
        return step

    def of_arrays(arrays: Tree, batch: Tree) -> tuple[Tree, Tree]:
        after, record = step(known.whole(arrays, like), batch)
        return known.arrays(after), record

    return of_arrays


_ARRAY = object()


def _is_array(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array | np.ndarray | np.generic | jax.ShapeDtypeStruct)


def _name(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator='/')


def _difference(state: Tree, later: Tree) -> str:
    """The first thing in which two states differ."""
    before = [_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(state)]
    after = [_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(later)]
    for name in before:
        if name not in after:
            return f'{name} is gone'
    for name in after:
        if name not in before:
            return f'{name} is new'
    return 'of the same leaves'
