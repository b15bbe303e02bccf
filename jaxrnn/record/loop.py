"""The loop: runs any pure train step from its newest checkpoint on, and leaves records and checkpoints."""

import contextlib
import fcntl
import logging
import os
import signal
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxrnn import environment, files
from jaxrnn.escaping import as_json
from jaxrnn.record import checkpoint, gaps, resume, telemetry
from jaxrnn.record.checkpoint import check_digest as check_digest
from jaxrnn.record.checkpoint import state_digest as state_digest
from jaxrnn.record.telemetry import Row
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


class LoopOptions(NamedTuple):
    """How to run; none of it changes what a step computes."""

    max_steps: int
    checkpoint_every: int = 100
    keep_latest: int = 100
    keep_every: int = 1000
    digest_every: int = 1
    checkify: bool = False
    debug_nans: bool = False


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
    checkpoint_every and at the end. SIGTERM and Ctrl-C end the run after the step they fall into, with a
    checkpoint; a second Ctrl-C ends it at once. The same call again goes on where the last one ended.

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
    with _locked(paths), _signals() as signals, jax.debug_nans(options.debug_nans):
        observed = telemetry.instrument(step, checks=options.checkify)
        checkpoints = checkpoint.Checkpoints(paths.checkpoints, like=jax.eval_shape(init))
        records = telemetry.RecordFile(paths.records)
        rows = records.read()
        first, state, resumed = _start(paths, checkpoints, rows, init, identity or {})
        sink = _Sink(records, records.keep_before(first), on_row)

        def going(number: int, state: Tree) -> bool:
            return not (signals.caught or sink.ended)

        _heal(records, rows, checkpoints, first, observed, batch_at, options.digest_every, going)
        del rows  # there may be many
        writer = checkpoint.Writer(
            paths.checkpoints, keep_latest=options.keep_latest, keep_every=options.keep_every
        )

        save = _Saver(writer, sink, identity or {})
        try:
            done, state = advance(
                observed, batch_at, state, first, options.max_steps, digest_every=options.digest_every,
                put=sink.put, before=going, save=save, save_every=options.checkpoint_every,
            )  # fmt: skip
            save(done, state)
            writer.wait()
        finally:
            records.close()
            writer.close()
    return RunResult(done, state, signals.caught, sink.first_mismatch, first if resumed else None)


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
    save_every: int = 0,
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
        save: called likewise before the steps at multiples of `save_every`, after it.
        save_every: steps between saves; 0 for none.

    Returns:
        The number of the next step, and its state.
    """
    late, number, state = _Late(put), first, unshared(state)
    try:
        while number < stop and before(number, state):
            if save_every and number % save_every == 0:
                late.flush()
                save(number, state)
            batch = batch_at(number)
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


class _Late:
    """Puts the record of a step when the next one has been started."""

    def __init__(self, put: Callable[[Row], None]):
        self._put = put
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
        self._put(telemetry.row(number, observation))
        self._pending = later


def without(batch_at: BatchAt, steps: Collection[int]) -> BatchAt:
    """The batches of some steps left out, each replaced by that of the last step before it that isn't one of them."""

    def at(step: int) -> Tree:
        while step in steps:
            step -= 1
        return batch_at(step)

    return at


def rewind(directory: str | os.PathLike, step: int) -> None:
    """Takes a run back to one of its checkpoints: what was recorded and saved from there on is gone, and `run` goes on
    from it. Done twice it is the same as done once."""
    paths = Paths(Path(directory))
    with _locked(paths):
        checkpoint.Checkpoints(paths.checkpoints).drop_after(step)
        telemetry.RecordFile(paths.records).keep_before(step)


class _Sink:
    """Where records go: the file, the comparison with what a killed run had computed, the observer."""

    def __init__(self, records: telemetry.RecordFile, before: list[Row], on_row: Callable[[Row], bool]):
        self.records, self.on_row = records, on_row
        self.before = {row['step']: row for row in before}
        self.first_mismatch: int | None = None
        self.ended = False

    def put(self, row: Row) -> None:
        self._guard(lambda: self.records.append(row))
        old = self.before.pop(row['step'], None)
        if old is not None and self.first_mismatch is None and not telemetry.same(old, row):
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
    rows: Sequence[Row],
    init: Callable[[], Tree],
    identity: Mapping[str, str],
) -> tuple[int, Tree, bool]:
    """The step to begin with, its state, and whether it comes from a checkpoint."""
    resume.check_identity(paths.root, checkpoints, identity)
    found = resume.newest_intact(checkpoints, _recorded(rows))
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


def _recorded(rows: Sequence[Row]) -> dict[int, str]:
    """Digests of states by the step that starts from them."""
    return {row['step'] + 1: row[telemetry.DIGEST] for row in rows if telemetry.DIGEST in row}


def _heal(
    records: telemetry.RecordFile,
    rows: Sequence[Row],
    checkpoints: checkpoint.Checkpoints,
    first: int,
    observed: telemetry.CompiledStep,
    batch_at: BatchAt,
    digest_every: int,
    going: Callable[[int, Tree], bool],
) -> None:
    """Computes again what records lack before the step that a run goes on with."""

    def replay(start: int, stop: int) -> gaps.Replayed:
        again: list[Row] = []
        try:
            state = checkpoints.restore(start)
            check_digest(checkpoints, start, state)
        except UserError as error:
            return gaps.Replayed(again, '', str(error))
        _, state = advance(
            observed, batch_at, state, start, stop, digest_every=digest_every, put=again.append, before=going
        )
        return gaps.Replayed(again, state_digest(state))

    def digest_of(step: int) -> str | None:
        return checkpoints.meta(step).get('state')

    earlier = {row['step']: row for row in rows if row['step'] < first}
    healed = gaps.healed(gaps.Known(earlier, digest_of), first, checkpoints.steps(), replay)
    if len(healed) > len(earlier):
        records.rewrite(healed)


def _owned(leaf: Any) -> jax.Array:
    """A leaf as it will come back from a checkpoint: an array, even where flax starts with a Python number, and in a
    buffer that nobody else has. The first step donates it; what made the state may still hold it, or have put it in the
    state twice."""
    return jnp.copy(leaf) if isinstance(leaf, jax.Array) else jnp.array(leaf, jnp.result_type(leaf))


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


def _meta(step: int, state: Tree, identity: Mapping[str, str]) -> dict[str, Any]:
    around = environment.describe()
    return {
        **identity,
        'step': step,
        'state': state_digest(state),
        'environment': environment.digest(around),
        'environment_details': around,
    }


class _Signals:
    """Which signal came."""

    caught: int | None = None

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if self.caught is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.caught = number


@contextlib.contextmanager
def _signals() -> Iterator[_Signals]:
    """SIGTERM and SIGINT noted rather than obeyed; left alone outside the main thread, where Python has no say."""
    signals = _Signals()
    try:
        before = {number: signal.signal(number, signals) for number in (signal.SIGTERM, signal.SIGINT)}
    except ValueError:
        before = {}
    try:
        yield signals
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def make_directory(root: Path) -> None:
    """Makes a run's directory. Raises UserError where nothing can be written."""
    try:
        root.mkdir(parents=True, exist_ok=True)
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
