"""Steps of a run replayed under one change: the change compiled, the state to start from, and the steps counted."""

import concurrent.futures
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import NamedTuple

import jax

from jaxrnn import progress
from jaxrnn.bisect.replay import Replayer, Subject
from jaxrnn.experiment.outcome import Change, Changed
from jaxrnn.record import loop, telemetry
from jaxrnn.record.records import Row
from jaxrnn.types import BatchAt, Tree

LOOK_EVERY = 16
"""Steps between looks for a symptom."""

SNAPSHOTS = 8
"""States of the control that are kept, from which experiments start later."""


class Budget:
    """Steps that may be replayed in all; a share of them can be held back for later.

    Args:
        steps: all of them.
    """

    def __init__(self, steps: int):
        self.steps = steps
        self.spent = 0
        self._limit: float = steps

    @property
    def left(self) -> int:
        """Steps that are left of all."""
        return self.steps - self.spent

    @property
    def free(self) -> int:
        """Steps that may be replayed now: of what is left, what is not held back."""
        return int(self._limit) - self.spent

    def hold_back(self, share: float) -> None:
        """From now on, holds back this share of all steps, and no more."""
        self._limit = self.steps * (1 - share)

    def set_aside(self, steps: int) -> None:
        """Adds steps that are held back until `hold_back` says otherwise."""
        self.steps += steps

    def ensure(self, steps: int) -> None:
        """Adds what is missing to so many that are left."""
        self.steps = max(self.steps, self.spent + steps)

    def extend(self, times: float, most: int) -> None:
        """From now on, so many times as many steps as there were at first, up to `most`, and never fewer; what is spent
        does not count."""
        self.steps = self.spent + max(self.steps, min(round(self.steps * times), most))

    def allows(self, steps: int) -> bool:
        """Whether so many more may be replayed now."""
        return self.spent + steps <= self._limit


class CompiledChange(NamedTuple):
    """A change that can be replayed."""

    changed: Changed
    observed: telemetry.CompiledStep


class ChangeReplayer:
    """Replays a run's steps under changes.

    Args:
        subject: the run, with its step.
        start: the step from which on most experiments are replayed; a checkpoint.
        budget: counts the steps.
    """

    def __init__(self, subject: Subject, start: int, budget: Budget):
        self._subject, self._start, self._budget = subject, start, budget
        self._snapshots: dict[int, Tree] = {}
        self.doing = 'replaying the run'  # as progress is told
        self._compiler = concurrent.futures.ThreadPoolExecutor(1)
        self._compiled: dict[str, Future[CompiledChange]] = {}  # by name, so that each is compiled once

    def rows_before(self, step: int, count: int) -> list[Row]:
        """Records of the `count` steps before a step: the run's, else replayed."""
        first = step - count
        if self._subject.records:
            return list(self._subject.recorded.between(first, step))
        replayer = Replayer(self._subject)
        rows = replayer.replay(max(first, self._subject.checkpoints.steps()[0]), step)
        self._budget.spent += replayer.steps_replayed
        return rows

    def load(self) -> None:
        """Restores the state to start from: changes are compiled for its types."""
        self._snapshots[self._start] = Replayer(self._subject).state(self._start)

    def control(self, stop: int) -> list[Row]:
        """Replays the steps up to `stop` as they were, and keeps some states on the way. Needs `load`."""
        every = max(1, (stop - self._start) // SNAPSHOTS)

        def keep(number: int, state: Tree) -> None:
            if (number - self._start) % every == 0:
                self._snapshots[number] = _copied(state)

        state = _copied(self._snapshots[self._start])
        rows, _ = self._advance(
            self._subject.observed, self._subject.batch_at, state, self._start, stop, keep
        )
        return rows

    def on_batch(self, step: int, at: int) -> Row:
        """The record of the state that step `at` starts from on the batch of another step."""
        if at not in self._snapshots:
            self._snapshots[at] = self.state(at)
        rows, _ = self._advance(
            self._subject.observed, lambda number: self._subject.batch_at(step), self.state(at), at, at + 1
        )
        return {**rows[0], 'step': step}

    def compiled(self, change: Change) -> 'Future[CompiledChange]':
        """A change compiled, or being compiled by another thread."""
        if change.name not in self._compiled:
            wide = jax.config.values['jax_enable_x64']
            self._compiled[change.name] = self._compiler.submit(self._compile, change, wide)
        return self._compiled[change.name]

    def under(
        self, compiled: CompiledChange, start: int, horizon: int, ended: Callable[[Sequence[Row], int], bool]
    ) -> list[Row]:
        """The records of steps under a change, up to the horizon or until `ended`.

        Args:
            compiled: the change.
            start: the first step.
            horizon: the step after the last.
            ended: is asked every LOOK_EVERY steps with all records so far and the first of the new steps.
        """
        changed, observed = compiled
        begin = self.state(start)
        rows: list[Row] = []
        with jax.enable_x64(changed.wide or jax.config.values['jax_enable_x64']):
            state = _copied(changed.state(begin))  # of which a step may consume what `convert` keeps
            for first in range(start, horizon, LOOK_EVERY):
                stop = min(first + LOOK_EVERY, horizon)
                more, state = self._advance(observed, changed.batch_at, state, first, stop)
                rows += more
                if ended(rows, first):
                    break
        return rows

    def state(self, step: int) -> Tree:
        """What `step` of the run starts from, from the newest state that is kept."""
        newest = max((at for at in self._snapshots if at <= step), default=None)
        if newest is None:
            return Replayer(self._subject).state(step)
        state = _copied(self._snapshots[newest])
        _, state = self._advance(self._subject.observed, self._subject.batch_at, state, newest, step)
        return state

    def _compile(self, change: Change, wide: bool) -> CompiledChange:
        """In another thread, which doesn't know whether there are 64-bit types (`wide`). Whatever else JAX's contexts
        hold for one thread alone costs another compilation, and no more."""
        with jax.enable_x64(wide):
            changed, ours = change.make(), self._subject
        if changed.step is ours.step and not changed.wide:
            return CompiledChange(changed, ours.observed)
        with jax.enable_x64(wide or changed.wide):
            compiled = CompiledChange(changed, telemetry.PlainStep(changed.step))
            state = changed.state(_copied(self._snapshots[self._start]))
            compiled.observed.prepare(state, changed.batch_at(self._start))
        return compiled

    def _advance(
        self,
        observed: telemetry.CompiledStep,
        batch_at: BatchAt,
        state: Tree,
        start: int,
        stop: int,
        see: Callable[[int, Tree], None] = lambda number, state: None,
    ) -> tuple[list[Row], Tree]:
        rows: list[Row] = []

        def before(number: int, state: Tree) -> bool:
            see(number, state)
            progress.told(self.doing, self._budget.spent + number - start, self._budget.steps)
            return True

        number, state = loop.advance(
            observed, batch_at, state, start, stop, digest_every=self._subject.digest_every, put=rows.append,
            before=before,
        )  # fmt: skip
        self._budget.spent += number - start
        return rows, state


def _copied(state: Tree) -> Tree:
    """Which may be consumed, as a step does."""
    return jax.tree.map(lambda x: x.copy() if isinstance(x, jax.Array) else x, state)
