"""The loop: runs any pure train step from its newest checkpoint on, and leaves records and checkpoints."""

import functools
import logging
import os
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxrnn import environment, files
from jaxrnn.record import checkpoint, ending, gaps, kept_batches, layout, resume, telemetry
from jaxrnn.record.checkpoint import check_digest as check_digest
from jaxrnn.record.checkpoint import state_digest as state_digest
from jaxrnn.record.record_file import RecordFile
from jaxrnn.record.records import Records, Row
from jaxrnn.record.steps import advance as advance
from jaxrnn.record.steps import unshared as unshared
from jaxrnn.record.writing import Saver, Sink
from jaxrnn.types import BatchAt, Step, Tree, UserError

log = logging.getLogger('jaxrnn')


class RunResult(NamedTuple):
    """How a run ended."""

    step: int  # steps done
    state: Tree
    interrupted: int | None  # the signal that ended it
    first_mismatch: int | None  # the first step that a resumed run computed otherwise than before
    resumed_from: int | None
    timed_out: bool = False  # max_minutes ended it

    @property
    def cut_short(self) -> bool:
        """Whether it is to be gone on with."""
        return self.timed_out or self.interrupted is not None


class LoopOptions(NamedTuple):
    """How to run; none of it changes what a step computes."""

    max_steps: int
    checkpoint_every: int = 100
    keep_latest: int = 100
    keep_every: int = 1000
    digest_every: int = 1
    checkify: bool = False
    debug_nans: bool = False
    max_minutes: float = 0  # from now on, after which the run ends with a checkpoint; 0: no limit
    step_timeout: float = 0  # seconds without a finished step, after which the process is ended; 0: no limit
    begins: int = 0  # the run's first step, where `begin_at` was given another


def run(
    step: Step,
    batch_at: BatchAt,
    init: Callable[[], Tree],
    directory: str | os.PathLike,
    options: LoopOptions,
    *,
    identity: Mapping[str, str] | None = None,
    on_row: Callable[[Row], bool] = lambda row: False,
) -> RunResult:
    """Trains from the newest intact checkpoint in `directory`, or from `init`, and leaves a run there.

    Checkpoint k is the state that step k starts from; there is one at 0, at every multiple of
    checkpoint_every and at the end. SIGTERM, SIGHUP, Ctrl-C and max_minutes end the run after the step they fall
    into, with a checkpoint; a second Ctrl-C ends it at once. SIGUSR1 has a checkpoint saved before the next step. The
    same call again goes on where the last one ended. (Signals only in the main thread.)

    With step_timeout a second process watches: where no step finishes for so many seconds (ten times as many for the
    first, which compiles) it says in one line what hangs, and ends this process by SIGALRM, exit code 142.

    Args:
        step: a pure train step.
        batch_at: the batch of each step.
        init: makes the initial state; only called for a new run, and for the structure of the state.
        directory: of the run, made if it isn't there.
        options: see `LoopOptions`.
        identity: digests by name (of config and data), which must be those of the run that is continued.
        on_row: sees every record, one step late; training ends when it returns True.

    Raises:
        UserError: an unwritable or full directory, a run of another identity, one in use, or one without an intact
            checkpoint; a first checkpoint that can't be read back.
    """
    paths = layout.Paths(Path(directory))
    layout.make_directory(paths.root)
    with (
        layout.locked(paths),
        ending.signals() as signals,
        ending.watch(options.step_timeout) as watch,
        jax.debug_nans(options.debug_nans),
    ):
        observed = telemetry.instrument(step, checks=options.checkify)
        checkpoints = checkpoint.Checkpoints(paths.checkpoints, like=jax.eval_shape(init))
        records = RecordFile(paths.records)
        known = records.read_intact()
        first, state, resumed = _start(paths, checkpoints, known, init, identity or {})
        sink = Sink(records, records.keep_before(first), on_row)
        clock = ending.Clock(options.max_minutes, first)

        def going(number: int, state: Tree) -> bool:
            return not (signals.caught or sink.ended or clock(number))

        _heal(records, known, checkpoints, first, observed, batch_at, options, going, watch)
        del known  # there may be many
        steps = functools.partial(
            advance, observed, batch_at, state, first, options.max_steps, digest_every=options.digest_every,
            before=going, doing=watch,
        )  # fmt: skip
        done, state = _trained(steps, paths, options, sink, identity or {}, signals, watch)
    return RunResult(done, state, signals.caught, sink.first_mismatch, first if resumed else None, clock.over)


def _trained(
    steps: Callable[..., tuple[int, Tree]],
    paths: layout.Paths,
    options: LoopOptions,
    sink: Sink,
    identity: Mapping[str, str],
    signals: ending.Signals,
    watch: ending.Watchdog,
) -> tuple[int, Tree]:
    """Trains, and saves a checkpoint where one is due, and at the end; the number of the next step, and its state."""

    def put(row: Row) -> None:
        sink.put(row)
        watch.finished()

    def due(number: int) -> bool:
        return signals.save() or number % options.checkpoint_every == 0

    writer = checkpoint.Writer(
        paths.checkpoints, keep_latest=options.keep_latest, keep_every=options.keep_every
    )
    save = Saver(writer, sink, identity)
    try:
        done, state = steps(put=put, save=save, due=due)
        watch(ending.CHECKPOINT, done)
        save(done, state)
        writer.wait()
    finally:
        sink.records.close()
        writer.close()
    return done, state


def without(batch_at: BatchAt, steps: Collection[int]) -> BatchAt:
    """The batches of some steps left out, each replaced by that of the last step before it that isn't one of them; also
    where kept batches come again."""

    def at(step: int) -> Tree:
        while kept_batches.given_at(batch_at, step) in steps:
            step -= 1
        return batch_at(step)

    return at


def rewind(directory: str | os.PathLike, step: int) -> None:
    """Takes a run back to one of its checkpoints: what was recorded and saved from there on is gone for good, and `run`
    goes on from it. Done twice it is the same as done once."""
    paths = layout.Paths(Path(directory))
    with layout.locked(paths):
        checkpoint.Checkpoints(paths.checkpoints).drop_after(step)
        RecordFile(paths.records).keep_before(step)
        if paths.records.exists():
            files.sync(paths.records)


def begin_at(directory: str | os.PathLike, step: int, state: Tree, identity: Mapping[str, str]) -> None:
    """Gives a run that has none its first checkpoint: `run` begins with that step, and records begin there.

    Args:
        directory: of the run.
        step: the first that it makes.
        state: what that starts from.
        identity: as in `run`.

    Raises UserError as `run`.
    """
    paths = layout.Paths(Path(directory))
    layout.make_directory(paths.root)
    with layout.locked(paths):
        records = RecordFile(paths.records)
        writer = checkpoint.Writer(paths.checkpoints, keep_latest=1, keep_every=1)
        sink = Sink(records, records.keep_before(step), lambda row: False)
        try:
            Saver(writer, sink, identity)(step, state)
        finally:
            records.close()
            writer.close()


def _start(
    paths: layout.Paths,
    checkpoints: checkpoint.Checkpoints,
    known: Records,
    init: Callable[[], Tree],
    identity: Mapping[str, str],
) -> tuple[int, Tree, bool]:
    """The step to begin with, its state, and whether it comes from a checkpoint."""
    resume.check_identity(paths.root, checkpoints, identity)
    found = resume.newest_intact(checkpoints, lambda step: _recorded(known, step))
    resume.set_aside(checkpoints, found)
    if found is None:
        return 0, jax.tree.map(_owned, init()), False
    recorded = found.meta.get('environment_details')
    if recorded and (changed := environment.differences(recorded, environment.describe())):
        log.warning(
            'going on in another environment (%s): from step %d on, bits may differ',
            ', '.join(changed),
            found.step,
        )
    return found.step, found.state, True


def _recorded(known: Records, step: int) -> str | None:
    """The digest of the state that a step starts from, as the record before it has it."""
    return (known.at(step - 1) or {}).get(telemetry.DIGEST)


def _heal(
    records: RecordFile,
    known: Records,
    checkpoints: checkpoint.Checkpoints,
    first: int,
    observed: telemetry.CompiledStep,
    batch_at: BatchAt,
    options: LoopOptions,
    going: Callable[[int, Tree], bool],
    watch: ending.Watchdog,
) -> None:
    """Computes again what records lack before the step that a run goes on with."""

    def replay(start: int, stop: int) -> gaps.Replayed:
        again: list[Row] = []

        def put(row: Row) -> None:
            again.append(row)
            watch.finished()

        try:
            state = checkpoints.restore(start)
            check_digest(checkpoints, start, state)
        except UserError as error:
            return gaps.Replayed(again, '', str(error))
        _, state = advance(
            observed,
            batch_at,
            state,
            start,
            stop,
            digest_every=options.digest_every,
            put=put,
            before=going,
            doing=watch,
        )
        return gaps.Replayed(again, state_digest(state))

    def digest_of(step: int) -> str | None:
        return checkpoints.meta(step).get('state')

    before = gaps.Known(known.between(0, first), digest_of)
    healed = gaps.healed(before, first, checkpoints.steps(), replay, begins=options.begins)
    if healed:
        records.insert(healed)


def _owned(leaf: Any) -> jax.Array:
    """A leaf as it will come back from a checkpoint: an array, even where flax starts with a Python number, and in a
    buffer that nobody else has. The first step donates it; what made the state may still hold it, or have put it in the
    state twice."""
    return jnp.copy(leaf) if isinstance(leaf, jax.Array) else jnp.array(leaf, jnp.result_type(leaf))
