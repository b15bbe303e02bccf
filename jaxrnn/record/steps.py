"""The loop proper: steps one after the other, each record read while the device computes the next step."""

import contextlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxrnn.record import ending, telemetry
from jaxrnn.record.records import Row
from jaxrnn.types import BatchAt, Tree


def advance(
    observed: telemetry.CompiledStep,
    batch_at: BatchAt,
    state: Tree,
    first: int,
    stop: int,
    *,
    digest_every: int,
    put: Callable[[Row], None],
    before: Callable[[int, Tree], bool] = lambda number, state: True,
    save: Callable[[int, Tree], None] = lambda number, state: None,
    due: Callable[[int], bool] = lambda number: False,
    doing: Callable[[int, int], None] = lambda what, number: None,
) -> tuple[int, Tree]:
    """The loop proper, of training and of every replay: steps `first` up to `stop`, which isn't done.

    The record of a step is read while the device computes the next one; before a save, and whatever ends the loop,
    every record there is has been put.

    Args:
        observed: the compiled step; it consumes `state`.
        batch_at: the batch of each step.
        state: what step `first` starts from.
        first: number of the first step.
        stop: number of the step to stop at.
        digest_every: steps between digests; the states at its multiples have one.
        put: takes each record.
        before: called with the number and the state before each step; False ends the loop.
        save: called likewise, after it, where one is due.
        due: says so of a step's number.
        doing: told what is begun, of `ending`, and of which step.

    Returns:
        The number of the next step, and its state.
    """
    late, number, state = Late(put, doing), first, unshared(state)
    try:
        while number < stop and before(number, state):
            if due(number):
                late.flush()
                doing(ending.CHECKPOINT, number)
                save(number, state)
            doing(ending.BATCH, number)
            batch = batch_at(number)
            doing(ending.STEP, number)
            try:
                state, observation = observed(state, batch, (number + 1) % digest_every == 0)
            except FloatingPointError as error:  # of debug_nans, which keeps the state
                late.flush()
                put({'step': number, 'loss': float('nan'), 'debug_nans': str(error).splitlines()[0]})
                break
            late.put(number, observation)
            number += 1
    except BaseException:
        with contextlib.suppress(Exception):  # what ended the loop is what is to be said
            late.flush()
        raise
    late.flush()
    return number, state


class Late:
    """Puts the record of a step when the next one has been started."""

    def __init__(self, put: Callable[[Row], None], doing: Callable[[int, int], None]):
        self._put, self._doing = put, doing
        self._pending: list[tuple[int, telemetry.Observation]] = []

    def put(self, number: int, observation: telemetry.Observation) -> None:
        self._pending.append((number, observation))
        if len(self._pending) > 1:
            self._pop()

    def flush(self) -> None:
        while self._pending:
            self._pop()

    def _pop(self) -> None:
        """After one that fails none is put: it must be there once, and none after it without it."""
        (number, observation), *later = self._pending
        self._pending = []
        self._doing(ending.STEP, number)
        row = telemetry.row(number, observation)
        self._doing(ending.RECORD, number)
        self._put(row)
        self._pending = later


def unshared(state: Tree) -> Tree:
    """A state in which no two leaves share a buffer, as each can be donated once; copies only those that do."""
    seen: set[Any] = set()

    def own(leaf: Any) -> Any:
        if not isinstance(leaf, jax.Array):
            return leaf
        held = _buffers(leaf)
        if held is None or held & seen:
            return jnp.copy(leaf)
        seen.update(held)
        return leaf

    return jax.tree.map(own, state)


def _buffers(leaf: jax.Array) -> set[tuple[Any, int]] | None:
    """Where its parts lie; None where that can't be asked."""
    if jnp.issubdtype(leaf.dtype, jax.dtypes.extended):
        return None  # of random keys only a view can be asked
    try:
        shards = [shard.data for shard in leaf.addressable_shards]
        return {(device, shard.unsafe_buffer_pointer()) for shard in shards for device in shard.devices()}
    except Exception:  # a backend without addresses says so in its own way
        return None
