"""Any step of a run again, bit for bit, held against what the run left: its records, and the states it saved.

Knows nothing of networks: it takes a train step, the batch of each step, and checkpoints.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax

from jaxrnn import detect, progress
from jaxrnn.bisect import agreement
from jaxrnn.bisect.agreement import Agreement
from jaxrnn.diagnosis import Replay
from jaxrnn.record import loop, telemetry
from jaxrnn.record.checkpoint import Checkpoints
from jaxrnn.record.records import Records, Row, same, series
from jaxrnn.types import BatchAt, Series, Step, Tree, UserError


class Subject(NamedTuple):
    """What the debugger is given: enough to go back anywhere."""

    observed: telemetry.CompiledStep  # the step as training compiled it
    batch_at: BatchAt
    checkpoints: Checkpoints
    records: Sequence[Row] = ()  # of the run, if there are any
    digest_every: int = 1
    step: Step | None = None  # to be evaluated equation by equation
    loss: str | None = 'loss'  # the field of a record that is the loss; None where that isn't known
    other_program: str = ''  # in what the step is another program than the one that trained, if that is known

    @property
    def recorded(self) -> Records:
        """Its records."""
        return Records.of(self.records)

    def columns(self) -> Series:
        """Of its records."""
        return self.recorded.columns


def subject(
    step: Step,
    batch_at: BatchAt,
    checkpoints: Checkpoints,
    records: Sequence[Row] = (),
    *,
    digest_every: int = 1,
    checkify: bool = False,
    loss: str = '',
    observed: telemetry.CompiledStep | None = None,
) -> Subject:
    """Anybody's run, ready to be debugged.

    Args:
        step: the train step, `(state, batch) -> (state, record)`; the record may be any tree of scalars.
        batch_at: step number -> batch.
        checkpoints: where checkpoint k is the state that step k starts from.
        records: rows of the run; without them a bisect finds its way by checkpoints alone.
        digest_every: as in the run.
        checkify: as in the run.
        loss: the field of a record that is the loss; found by its name if not given.
        observed: the step as training called it, where that isn't `telemetry.instrument`'s doing.

    Raises:
        UserError: the records don't have the field.
    """
    observed = observed or telemetry.instrument(step, checks=checkify)
    found = Subject(observed, batch_at, checkpoints, Records.of(records), digest_every, step)
    fields = found.columns() or _first_columns(found)
    return found._replace(loss=detect.loss_of(fields, loss).field) if fields else found


def _first_columns(subject: Subject) -> Series:
    """Those of a step of a run without records; of none, where nothing can be replayed."""
    steps = subject.checkpoints.steps()
    return series(Replayer(subject).replay(steps[0], steps[0] + 1)) if steps else {}


class Replayer:
    """Replays steps, each at most once, and counts.

    Every replayed step that has a record is compared with it, and every checkpoint that is reached with the state
    reached. After the first record that differs the replay is another run, and nothing it shows counts. From a
    checkpoint that holds another state, the replay goes on from what it holds: that is what the run had.
    """

    def __init__(self, subject: Subject):
        self.subject = subject
        self.recorded = subject.recorded
        self.rows: dict[int, Row] = {}
        self.probed: set[int] = set()
        self.steps_replayed = 0
        self.agreements: dict[int, Agreement] = {}  # by the checkpoint that was reached
        self._first_other: int | None = None  # step whose record differs

    @property
    def first_mismatch(self) -> int | None:
        """The first step known to have come out otherwise than in the run: by its record, or as the last of those that
        lead to a checkpoint."""
        steps = [each.stop - 1 for each in self.broken]
        return min([*steps, *([] if self._first_other is None else [self._first_other])], default=None)

    @property
    def broken(self) -> list[Agreement]:
        """The intervals between checkpoints whose replay led to another state than the one saved, in their order."""
        return [self.agreements[at] for at in sorted(self.agreements) if self.agreements[at].broken]

    @property
    def verified(self) -> bool:
        """Whether something replayed was held against something that the run left, and could have differed."""
        return any(self.recorded.at(step) is not None for step in self.rows) or any(
            each.telling for each in self.agreements.values()
        )

    def outcome(self) -> Replay:
        exact = self.first_mismatch is None and all(each.exact for each in self.agreements.values())
        return Replay(self.verified and exact, self.first_mismatch, self.steps_replayed, len(self.probed))

    def state(self, step: int) -> Tree:
        """The state that `step` starts from, replayed from the newest checkpoint before it.

        Raises UserError when there is none, or when it was altered on disk.
        """
        return self._replay(self.checkpoint_before(step), step)

    def replay(self, start: int, stop: int) -> list[Row]:
        """The rows of steps start … stop - 1, computed now or earlier."""
        missing = [step for step in range(start, stop) if step not in self.rows]
        if missing:
            self._replay(self.checkpoint_before(missing[0]), missing[-1] + 1)
        return [self.rows[step] for step in range(start, stop) if step in self.rows]

    def agreement(self, start: int, stop: int) -> Agreement | None:
        """Whether the replay from a checkpoint leads to the next one; None where that is known by records."""
        if stop not in self.agreements:
            self._replay(start, stop)
        return self.agreements.get(stop)

    def reached(self, start: int, stop: int, shift: int = 0) -> Tree:
        """The state after steps start … stop - 1 from the checkpoint `start`, whatever is saved in between; each on the
        batch `shift` steps later."""
        at = self.subject.batch_at
        return self._advance(start, stop, self._restored(start), lambda step: at(step + shift))[1]

    def checkpoint_before(self, step: int) -> int:
        """The newest at or before a step. Raises UserError where there is none."""
        steps = self.subject.checkpoints.steps()
        before = [at for at in steps if at <= step]
        if not before:
            there = f'the first is of step {steps[0]}' if steps else 'there is none'
            raise UserError(
                f'{self.subject.checkpoints.directory}: no checkpoint at or before step {step} ({there}); '
                'steps before it can not be replayed'
            )
        return before[-1]

    def _restored(self, checkpoint: int) -> Tree:
        state = self.subject.checkpoints.restore(checkpoint)
        loop.check_digest(self.subject.checkpoints, checkpoint, state)
        return state

    def _replay(self, checkpoint: int, stop: int) -> Tree:
        state = self._restored(checkpoint)
        self.probed.add(checkpoint)
        marks = [at for at in self.subject.checkpoints.steps() if checkpoint < at <= stop]
        first = checkpoint
        for mark in dict.fromkeys((*marks, stop)):
            done, state = self._advance(first, mark, state, self.subject.batch_at, self._put)
            if done < mark:  # debug_nans ended it
                break
            if mark in marks:
                state = self._met(first, mark, state)
            first = mark
        return state

    def _advance(
        self, first: int, stop: int, state: Tree, batch_at: BatchAt, put: Callable[[Row], None] | None = None
    ) -> tuple[int, Tree]:
        every = self.subject.digest_every if put else stop + 1

        def before(number: int, state: Tree) -> bool:
            progress.told('replaying the run', number - first, stop - first)
            return True

        done, state = loop.advance(
            self.subject.observed, batch_at, state, first, stop, digest_every=every,
            put=put or (lambda row: None), before=before,
        )  # fmt: skip
        self.steps_replayed += done - first
        return done, state

    def _put(self, row: Row) -> None:
        step = row['step']
        self.rows[step] = row
        recorded = self.recorded.at(step)
        if recorded is not None and not same(recorded, row):
            self._first_other = step if self._first_other is None else min(step, self._first_other)

    def _met(self, start: int, stop: int, state: Tree) -> Tree:
        """What to go on with from a checkpoint that a replay reached: its own state where that is the one saved."""
        if telemetry.DIGEST in (self.recorded.at(stop - 1) or {}):
            return state  # the record of the step before knows
        reached, saved = loop.state_digest(state), self.subject.checkpoints.meta(stop).get('state')
        if saved == reached:
            self.agreements[stop] = Agreement(start, stop, (), reached=reached)
            return state
        restored = self._restored(stop)
        leaves = agreement.differences(restored, state)
        found = Agreement(start, stop, leaves, agreement.is_telling(restored), reached=reached)
        if leaves and saved is None:
            found = self._compiled_otherwise(found, restored, state)
        self.agreements[stop] = found
        if found.exact:
            return state
        self.probed.add(stop)
        return restored

    def _compiled_otherwise(self, found: Agreement, saved: Tree, reached: Tree) -> Agreement:
        """Whether it is only that somebody's own loop compiled the step otherwise than we did: with nothing beside it,
        or not at all, or in a way that isn't known."""
        step = self.subject.step
        if step is None:
            return found
        for way in (jax.jit(step), step):
            if not agreement.differences(saved, self._by(way, found.start, found.stop)):
                return found._replace(leaves=())
        first, second = self.subject.checkpoints.steps()[:2]
        if found.stop != second:
            self.agreement(first, second)
        exact = [each for each in self.agreements.values() if each.exact and each.telling][: agreement.ASKED]
        for each in exact:
            if loop.state_digest(self._by(step, each.start, each.stop)) != each.reached:
                return found  # the run's compilation is known, as no other gives its bits there: nor does it here
        moved = [self._with_rounding(found.start, found.stop, seed) for seed in agreement.ROUNDINGS]
        within, close = agreement.apart_by_rounding(saved, reached, moved)
        return found._replace(rounding=within and close, undecided=within and not close)

    def _by(self, step: Callable[[Tree, Tree], tuple[Tree, object]], start: int, stop: int) -> Tree:
        """As `reached`, by the step as another loop would call it."""
        state = self._restored(start)
        with jax.debug_nans(False):
            for number in range(start, stop):
                state, _ = step(state, self.subject.batch_at(number))
        self.steps_replayed += stop - start
        return state

    def _with_rounding(self, start: int, stop: int, seed: int) -> Tree:
        """As `reached`, each number of state and batch moved by a rounding error at each step."""
        state = self._restored(start)
        for step in range(start, stop):
            state, batch = agreement.moved((state, self.subject.batch_at(step)), seed, step)
            _, state = self._advance(step, step + 1, state, lambda _, batch=batch: batch)
        return state
