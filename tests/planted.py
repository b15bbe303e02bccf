"""Faults planted into a train step at a step of one's choice, as somebody's bug or cosmic ray would be."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxrnn import detect
from jaxrnn.types import Array, Step, Tree
from jaxrnn.words import train
from jaxrnn.words.data import Batch


class Fault(NamedTuple):
    """What goes wrong at one step."""

    kind: str  # of KINDS
    step: int
    place: int  # of the leaf or example it strikes, modulo their number


class Planted(NamedTuple):
    """A batch, and which fault strikes at its step: 0 for none."""

    batch: Batch
    code: np.int32
    place: np.int32


def _strike(tree: Tree, place: Array, change: Callable[[Array], Array]) -> Tree:
    """Changes one leaf of a tree, the one numbered `place`, at its first element."""
    leaves, structure = jax.tree.flatten(tree)
    struck = [
        leaf.at[(0,) * leaf.ndim].set(
            jnp.where(place % len(leaves) == n, change(leaf[(0,) * leaf.ndim]), leaf[(0,) * leaf.ndim])
        )
        for n, leaf in enumerate(leaves)
    ]
    return jax.tree.unflatten(structure, struck)


def _targets(change: Callable[[Array], Array]):
    def strike(state: train.TrainState, batch: Batch, place: Array):
        row = place % batch.targets.shape[0]
        return state, batch._replace(targets=batch.targets.at[row].set(change(batch.targets[row])))

    return strike


def _weights(change: Callable[[Array], Array]):
    return lambda state, batch, place: (state._replace(params=_strike(state.params, place, change)), batch)


def _moments(name: str, change: Callable[[Array], Array]):
    def strike(state: train.TrainState, batch: Batch, place: Array):
        clip, adam, rate = state.opt_state
        struck = adam._replace(**{name: _strike(getattr(adam, name), place, change)})
        return state._replace(opt_state=(clip, struck, rate)), batch

    return strike


def _output_bias(change: Callable[[Array], Array]):
    """The last layer's bias: the one weight whose every change shows in the loss at once."""

    def strike(state: train.TrainState, batch: Batch, place: Array):
        output = {**state.params['output'], 'bias': change(state.params['output']['bias'])}
        return state._replace(params={**state.params, 'output': output}), batch

    return strike


def _flip(bit: int) -> Callable[[Array], Array]:
    def flip(x: Array) -> Array:
        words = jax.lax.bitcast_convert_type(x, jnp.uint32) ^ np.uint32(1 << bit)
        return jax.lax.bitcast_convert_type(words, jnp.float32)

    return flip


NOT_A_NUMBER, TOO_LARGE = (lambda x: x * jnp.nan), (lambda x: x * 0 + jnp.inf)

KINDS = {
    'NaN in a target': _targets(NOT_A_NUMBER),
    'infinite target': _targets(TOO_LARGE),
    'NaN in a weight': _weights(NOT_A_NUMBER),
    'infinite weight': _weights(TOO_LARGE),
    'NaN in the first moment': _moments('mu', NOT_A_NUMBER),
    'NaN in the second moment': _moments('nu', NOT_A_NUMBER),
    'negative second moment': _moments('nu', lambda x: x * 0 - 1),
    'bit 30 of a bias flips': _output_bias(_flip(30)),
    'targets a hundred times too large': _targets(lambda x: 100 * x),
    'bias jumps': _output_bias(lambda x: x + 3),
    'first moment jumps': _moments('mu', lambda x: x + 1e3),
}
"""The first eight leave a non-finite state; the others a finite one that training may recover from."""

RULES = {
    'first moment jumps': detect.custom('update_norm > 5 * median(update_norm, 20)'),
}
"""What tells a jump that the loss doesn't show at its own step."""


def detectors(fault: Fault) -> tuple[detect.Detector, ...]:
    """What somebody would look for."""
    return (RULES[fault.kind],) if fault.kind in RULES else detect.DETECTORS


def plant(step: Step) -> Step:
    """A train step that takes `Planted` batches. One compilation serves all faults."""

    def planted(state: train.TrainState, batch: Planted):
        branches = [lambda state, batch, place: (state, batch), *KINDS.values()]
        state, real = jax.lax.switch(batch.code, branches, state, batch.batch, batch.place)
        return step(state, real)

    return planted


def batches(batch_at: Callable[[int], Batch], fault: Fault) -> Callable[[int], Planted]:
    """The batches of a run that the fault strikes."""
    code = np.int32(1 + tuple(KINDS).index(fault.kind))

    def at(step: int) -> Planted:
        return Planted(batch_at(step), code if step == fault.step else np.int32(0), np.int32(fault.place))

    return at
