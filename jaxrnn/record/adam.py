"""The signals of an Adam step, of the state before and after it alone: for anybody's step, without a line in it.

The gradient follows from the two means of gradients, m_t = b1 m_tm1 + (1-b1) g, with the constants that are written in
the step's program. Where they aren't, or where Adam isn't updated in every call (`optax.MultiSteps`, a guard), nothing
is said.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxrnn import tree
from jaxrnn.optim import signals
from jaxrnn.trace import averages
from jaxrnn.types import Array, Record, Step, Tree, UserError

SAMPLE = 256
"""Numbers of a tensor that are looked at, evenly spread."""

RATE = 'estimated_rate'
"""The learning rate as a state shows it: how far the parameters moved along Adam's direction, by least squares."""

FIELDS = (*(signal.name for signal in signals.OF_ADAM), *signals.NORMS, RATE)
"""Names that a record has them by, unless the step has fields of these names."""


class Constants(NamedTuple):
    """What Adam's step is made with, as far as its program says so."""

    b1: float
    b2: float
    eps: float | None


class SampledMoments(NamedTuple):
    """SAMPLE numbers of each tensor that Adam moves, [tensors, SAMPLE]."""

    m: Array
    v: Array
    params: Array | None  # None where it isn't clear which leaves of the state they are


class _Leaves(NamedTuple):
    """Which leaves of a state are what, by their numbers."""

    steps: int  # that Adam has made
    m: Sequence[int]
    v: Sequence[int]
    params: Sequence[int] | None


def constants_of(step: Step, state: Tree, batch: Tree) -> Constants | None:
    """Of a step whose state has one Adam in it, as `optax.scale_by_adam` keeps it; None for any other.

    Args:
        step: is traced once.
        state: and `batch`, of which types alone are read.
    """
    found = _leaves(state)
    if found is None:
        return None
    leaves = jax.tree.leaves(state)
    program = jax.make_jaxpr(step)(state, batch)
    if len(program.out_avals) < len(leaves):
        return None
    decays = [{averages.decay(program, n, n) for n in numbers} for numbers in (found.m, found.v)]
    (b1, *others), (b2, *more) = decays
    if others or more or b1 is None or b2 is None or not (0 <= b1 < 1 and 0 < b2 < 1):
        return None
    eps = averages.added_to_roots(program, [jnp.shape(leaves[n]) for n in found.v])
    return Constants(b1, b2, eps)


def sampled(state: Tree) -> SampledMoments | None:
    """What `of_step` needs of the state before a step; None where there isn't one Adam in it."""
    found = _leaves(state)
    if found is None:
        return None
    leaves = jax.tree.leaves(state)

    def of(numbers: Sequence[int]) -> Array:
        return tree.spread([leaves[n] for n in numbers], SAMPLE)

    return SampledMoments(of(found.m), of(found.v), None if found.params is None else of(found.params))


def of_step(constants: Constants, before: SampledMoments, after: Tree) -> Record:
    """The signals of `signals.OF_ADAM`, and norms, estimated from samples; of the same state after the step."""
    found, now = _leaves(after), sampled(after)
    if found is None or now is None or jax.tree.map(jnp.shape, before) != jax.tree.map(jnp.shape, now):
        return {}
    leaves, moved = jax.tree.leaves(after), None
    if now.params is not None and before.params is not None:
        moved = now.params - before.params
    gradients = (now.m - constants.b1 * before.m) / (1 - constants.b1)
    sizes = np.array([jnp.size(leaves[n]) for n in found.m])
    record = signals.of_samples(
        gradients,
        now.m,
        now.v,
        before.v,
        count=leaves[found.steps],
        sizes=sizes,
        params=now.params,
        moved=moved,
        b1=constants.b1,
        b2=constants.b2,
        eps=constants.eps,
    )
    if moved is None:
        return record
    direction = signals.direction(
        now.m, now.v, count=leaves[found.steps], b1=constants.b1, b2=constants.b2, eps=constants.eps
    )
    return {
        **record,
        RATE: _rate(
            jnp.sum(direction * moved, axis=1), jnp.sum(direction * direction, axis=1), sizes / moved.shape[1]
        ),
    }


def at_rate(constants: Constants, before: Tree, after: Tree, rate: float) -> Tree:
    """The state after a step as at another learning rate: what the step did along Adam's direction is replaced.

    Raises:
        UserError: it isn't clear which leaves of the state the parameters are.
    """
    found = _leaves(after)
    if found is None or found.params is None:
        raise UserError("it isn't clear which leaves of the state are Adam's parameters")
    old, (new, structure) = jax.tree.leaves(before), jax.tree.flatten(after)
    directions = [
        signals.direction(
            new[m], new[v], count=new[found.steps], b1=constants.b1, b2=constants.b2, eps=constants.eps
        )
        for m, v in zip(found.m, found.v, strict=True)
    ]
    moved = [new[n] - old[n] for n in found.params]
    along = [jnp.sum(d * by) for d, by in zip(directions, moved, strict=True)]
    squares = [jnp.sum(d * d) for d in directions]
    seen = _rate(jnp.stack(along), jnp.stack(squares))
    for n, direction in zip(found.params, directions, strict=True):
        new[n] = (new[n] + (rate - seen) * direction).astype(jnp.result_type(new[n]))
    return jax.tree.unflatten(structure, new)


def _rate(along: Array, squares: Array, weights: np.ndarray | float = 1.0) -> Array:
    """By least squares over all tensors; 0 where no direction is known yet.

    Args:
        along: of each tensor the product of Adam's direction with what it moved by [tensors].
        squares: of the directions.
        weights: of the tensors.
    """
    whole, moved = jnp.sum(weights * squares), jnp.sum(weights * along)
    return jnp.where(whole == 0, 0, moved / jnp.where(whole == 0, 1, whole))


def _leaves(state: Tree) -> _Leaves | None:
    """None unless there is one Adam, whose means are kept in float32 or wider: of narrower ones no gradient follows.
    Nor where each device has its own, as under jax.pmap: it has a count for each."""
    leaves, structure = jax.tree.flatten(state)
    numbered = jax.tree.unflatten(structure, range(len(leaves)))
    adams = [n for n in jax.tree.leaves(numbered, is_leaf=_is_adam) if _is_adam(n)]
    if len(adams) != 1 or jnp.ndim(leaves[adams[0].count]):
        return None
    m, v = jax.tree.leaves(adams[0].mu), jax.tree.leaves(adams[0].nu)
    kept = [n for n in zip(m, v, strict=False) if _is_wide(leaves[n[0]]) and _is_wide(leaves[n[1]])]
    if not kept or len(m) != len(v) or len(kept) != len(m):
        return None
    return _Leaves(adams[0].count, m, v, _parameters(numbered, adams[0].mu, leaves))


def _parameters(numbered: Tree, means: Tree, leaves: Sequence[Any]) -> Sequence[int] | None:
    """The leaves that are called and shaped as the means are, outside of any optimiser's state, if they are one set."""
    wanted: dict[str, int] = _numbers(means)
    kept = [n for n in jax.tree.leaves(numbered, is_leaf=_is_kept) if _is_kept(n)]
    there = {path: n for path, n in _numbers(numbered).items() if n not in {*_numbers(kept).values()}}
    starts = {start for path in there for name in wanted if (start := _start(path, name)) is not None}
    found = []
    for start in starts:
        pairs = [(there.get(start + name), mean) for name, mean in wanted.items()]
        numbers = [
            n for n, mean in pairs if n is not None and jnp.shape(leaves[n]) == jnp.shape(leaves[mean])
        ]
        found += [numbers] if len(numbers) == len(pairs) else []
    return found[0] if len(found) == 1 else None


def _numbers(numbered: Tree) -> dict[str, int]:
    """Those of leaves, by path."""
    return tree.named_leaves(numbered)  # type: ignore[return-value]


def _start(path: str, name: str) -> str | None:
    """What is before a name at the end of a path."""
    if path == name or not name or path.endswith('/' + name):
        return path[: len(path) - len(name)]
    return None


def _is_adam(node: Any) -> bool:
    return isinstance(node, optax.ScaleByAdamState)


def _is_kept(node: Any) -> bool:
    """Whether it is a state of an optimiser, as optax has them: a named tuple."""
    return isinstance(node, tuple) and hasattr(node, '_fields') and type(node).__module__.startswith('optax')


def _is_wide(leaf: Any) -> bool:
    dtype = jnp.result_type(leaf)
    return jnp.issubdtype(dtype, jnp.floating) and dtype.itemsize >= 4 and bool(jnp.size(leaf))
