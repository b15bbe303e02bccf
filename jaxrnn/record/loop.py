"""The loop: runs any pure train step from its newest checkpoint on, and leaves records and checkpoints."""

import contextlib
import fcntl
import functools
import logging
import os
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxrnn import environment, files
from jaxrnn.escaping import as_json
from jaxrnn.record import checkpoint, ending, gaps, resume, telemetry
from jaxrnn.record.checkpoint import check_digest as check_digest
from jaxrnn.record.checkpoint import state_digest as state_digest
from jaxrnn.record.record_file import RecordFile
from jaxrnn.record.records import Records, Row, same
from jaxrnn.record.steps import advance as advance
from jaxrnn.record.steps import unshared as unshared
from jaxrnn.types import BatchAt, Step, Tree, UserError

log = logging.getLogger('jaxrnn')


class Paths(NamedTuple):
    """Where things lie in a run's directory."""

    root: Path

    @property
    def config(self) -> Path:
        return self.root / 'config.json'

    @property
    def records(self) -> Path:
        return self.root / 'records.jsonl'

    @property
    def checkpoints(self) -> Path:
        return self.root / 'checkpoints'

    @property
    def diagnosis(self) -> Path:
        return self.root / 'diagnosis.json'

    @property
    def experiments(self) -> Path:
        return self.root / 'experiments.jsonl'

    @property
    def flags(self) -> Path:
        return self.root / 'flags.txt'

    @property
    def data(self) -> Path:
        return self.root / 'data.npz'

    @property
    def evaluation(self) -> Path:
        return self.root / 'evaluation.json'

    @property
    def rewinds(self) -> Path:
        return self.root / 'rewinds.json'

    @property
    def lock(self) -> Path:
        return self.root / 'lock'


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
    paths = Paths(Path(directory))
    make_directory(paths.root)
    with (
        _locked(paths),
        ending.signals() as signals,
        ending.watch(options.step_timeout) as watch,
        jax.debug_nans(options.debug_nans),
    ):
        observed = telemetry.instrument(step, checks=options.checkify)
        checkpoints = checkpoint.Checkpoints(paths.checkpoints, like=jax.eval_shape(init))
        records = RecordFile(paths.records)
        known = records.read_intact()
        first, state, resumed = _start(paths, checkpoints, known, init, identity or {})
        sink = _Sink(records, records.keep_before(first), on_row)
        clock = ending.Clock(options.max_minutes, first)

        def going(number: int, state: Tree) -> bool:
            return not (signals.caught or sink.ended or clock(number))

        _heal(records, known, checkpoints, first, observed, batch_at, options.digest_every, going, watch)
        del known  # there may be many
        steps = functools.partial(
            advance, observed, batch_at, state, first, options.max_steps, digest_every=options.digest_every,
            before=going, doing=watch,
        )  # fmt: skip
        done, state = _trained(steps, paths, options, sink, identity or {}, signals, watch)
    return RunResult(done, state, signals.caught, sink.first_mismatch, first if resumed else None, clock.over)


def _trained(
    steps: Callable[..., tuple[int, Tree]],
    paths: Paths,
    options: LoopOptions,
    sink: '_Sink',
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
    save = _Saver(writer, sink, identity)
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
    """The batches of some steps left out, each replaced by that of the last step before it that isn't one of them."""

    def at(step: int) -> Tree:
        while step in steps:
            step -= 1
        return batch_at(step)

    return at


def rewind(directory: str | os.PathLike, step: int) -> None:
    """Takes a run back to one of its checkpoints: what was recorded and saved from there on is gone for good, and `run`
    goes on from it. Done twice it is the same as done once."""
    paths = Paths(Path(directory))
    with _locked(paths):
        checkpoint.Checkpoints(paths.checkpoints).drop_after(step)
        RecordFile(paths.records).keep_before(step)
        if paths.records.exists():
            files.sync(paths.records)


class _Sink:
    """Where records go: the file, the comparison with what a killed run had computed, the observer."""

    def __init__(self, records: RecordFile, before: Records, on_row: Callable[[Row], bool]):
        self.records, self.on_row = records, on_row
        self.before = {row['step']: row for row in before}
        self.first_mismatch: int | None = None
        self.ended = False

    def put(self, row: Row) -> None:
        self._guard(lambda: self.records.append(row))
        old = self.before.pop(row['step'], None)
        if old is not None and self.first_mismatch is None and not same(old, row):
            self.first_mismatch = row['step']
        self.ended = bool(self.on_row(row)) or self.ended

    def sync(self) -> None:
        """Waits until every record is on the disk."""
        self._guard(self.records.sync)

    def _guard(self, write: Callable[[], None]) -> None:
        try:
            write()
        except OSError as error:
            raise UserError(
                f'{self.records.path}: {error.strerror}; make room or check the disk, then run the same command '
                'again to resume'
            ) from error


class _Saver:
    """Saves checkpoints, each after the records of all steps before it: both survive a power loss, in this order. The
    first is read back before the next step."""

    def __init__(self, writer: checkpoint.Writer, sink: _Sink, identity: Mapping[str, str]):
        self._writer, self._sink, self._identity = writer, sink, identity
        self._read_back = False

    def __call__(self, number: int, state: Tree) -> None:
        self._sink.sync()
        meta = _meta(number, state, self._identity)
        if self._writer.save(number, state, meta) and not self._read_back:
            self._writer.wait()
            self._check(number, state, meta['state'])
            self._read_back = True

    def _check(self, number: int, state: Tree, digest: str) -> None:
        """Raises UserError where a checkpoint doesn't give back what was saved."""
        directory = self._writer.directory
        why = None
        try:
            found = state_digest(checkpoint.Checkpoints(directory, like=state).restore(number))
        except UserError as error:
            why = str(error).partition('; ')[0]
        else:
            if found != digest:
                why = f'{directory / str(number)}: the checkpoint holds another state (digest {found}, not {digest})'
        if why is not None:
            raise UserError(f'{why}, and has just been written; check the disk, or choose another directory')


def _start(
    paths: Paths,
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
    digest_every: int,
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
            digest_every=digest_every,
            put=put,
            before=going,
            doing=watch,
        )
        return gaps.Replayed(again, state_digest(state))

    def digest_of(step: int) -> str | None:
        return checkpoints.meta(step).get('state')

    healed = gaps.healed(gaps.Known(known.between(0, first), digest_of), first, checkpoints.steps(), replay)
    if healed:
        records.insert(healed)


def _owned(leaf: Any) -> jax.Array:
    """A leaf as it will come back from a checkpoint: an array, even where flax starts with a Python number, and in a
    buffer that nobody else has. The first step donates it; what made the state may still hold it, or have put it in the
    state twice."""
    return jnp.copy(leaf) if isinstance(leaf, jax.Array) else jnp.array(leaf, jnp.result_type(leaf))


def _meta(step: int, state: Tree, identity: Mapping[str, str]) -> dict[str, Any]:
    around = environment.describe()
    return {
        **identity,
        'step': step,
        'state': state_digest(state),
        'environment': environment.digest(around),
        'environment_details': around,
    }


def make_directory(root: Path) -> None:
    """Makes a run's directory, whose name a power loss doesn't take. Raises UserError where nothing can be written."""
    try:
        made = [path for path in (root, *root.parents) if not path.exists()]
        root.mkdir(parents=True, exist_ok=True)
        for path in made:
            with contextlib.suppress(PermissionError):  # of a folder that may be written to and not read
                files.sync(path.parent)
    except (OSError, ValueError) as error:  # ValueError of a name with a zero byte
        why = error.strerror if isinstance(error, OSError) else error
        raise UserError(
            f'--run_dir: {root} can not be made ({why}); choose a directory you may write to'
        ) from error
    if not os.access(root, os.W_OK | os.X_OK):
        raise UserError(f'--run_dir: {root} is not writable; choose a directory you may write to')


@contextlib.contextmanager
def _locked(paths: Paths) -> Iterator[None]:
    """Keeps a second process from training into the same directory; the lock goes with the process."""
    try:
        file = open(paths.lock, 'a', encoding='utf-8')
    except OSError as error:
        raise UserError(
            f'--run_dir: {paths.root} is not writable ({error.strerror}); choose another'
        ) from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(
                f'--run_dir: {paths.root} is in use by another process; wait for it, or choose another directory'
            ) from None
        yield


def write_json(path: Path, value: Any) -> None:
    """Writes whole or not at all; NaN and infinities, which JSON lacks, as null."""
    write_text(path, as_json(value, indent=1) + '\n')


def write_text(path: Path, text: str) -> None:
    """Writes whole or not at all, and to the disk. Raises UserError where it refuses."""
    files.write_bytes(path, text.encode())
