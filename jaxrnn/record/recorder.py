"""A recorder for a loop that somebody has: it sees each step when it was taken, and leaves a run as `loop` does."""

import collections
import contextlib
import logging
import os
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np

from jaxrnn import files
from jaxrnn.record import (
    checkpoint,
    drawn,
    equations,
    gaps,
    kept_batches,
    layout,
    parts,
    resume,
    telemetry,
    writing,
)
from jaxrnn.record.record_file import RecordFile
from jaxrnn.record.records import Records, Row
from jaxrnn.record.steps import Late
from jaxrnn.types import Step, Tree, UserError

log = logging.getLogger('jaxrnn')

SHARE = 0.005
"""Of a training's time, that digests take at most if nothing else is said; and that checkpoints take."""

LEAST = 100
"""Steps between checkpoints, if nothing else is said."""

TIMED = range(4, 9)
"""Steps, counted from where a process begins, that say what a step takes: the first ones compile."""

FORMAT = 1
"""Of recorder.json."""


class Recorder:
    """Records a training that somebody else's loop runs, so that it can be bisected, traced and diagnosed.

    The loop, the step and the data loader stay as they are. A run that is there already is gone on with: take its
    state and its step from the recorder.

    Args:
        directory: of the run, made if it isn't there.
        state: what the first step starts from: any tree that has all that a step changes. It is copied.
        checkpoint_every: steps between checkpoints; 0: multiples of a hundred, as many as cost half a hundredth of the
            time.
        keep_latest: how many of the newest are kept.
        keep_every: those at multiples of it are kept for ever, the first (step 0) always.
        digest_every: steps between digests, for which every number of the state is read; 0: as many as cost half
            a hundredth of the training's time. A digest proves a replay; each checkpoint has one.
        most_bytes: of all batches that are kept on disk; the oldest go first. 0: none is kept.
        on_row: sees every record, one step late; if it has a `close`, that is called at the end, as of `jaxrnn.Alerts`.
        step: the train step, as it is to be replayed: its equations are kept, so that a replay by another program says
            which equation differs.
        checkpoints: an orbax CheckpointManager of one item in `directory`/checkpoints, which then saves the states, by
            its own policies: checkpoint k is what step k starts from. Don't save them in the loop, too.

    Raises:
        UserError: a directory that can't be used, is in use, or holds a run of another program.

    >>> import tempfile
    >>> import jax
    >>> train_step = jax.jit(lambda x, batch: (x - 0.1 * batch, {'loss': x**2}))
    >>> state = jax.numpy.float32(1)
    >>> with tempfile.TemporaryDirectory() as directory:
    ...     with jaxrnn.Recorder(directory, state) as recorder:
    ...         for batch in [1.0, 1.0, float('nan'), 1.0]:
    ...             state, metrics = train_step(state, batch)
    ...             recorder(state, metrics, batch)
    ...     diagnosis, rows = jaxrnn.bisect(train_step, None, directory, like=state)
    >>> diagnosis.symptom, diagnosis.replay.bit_identical
    (Symptom(kind='nonfinite', step=2), True)
    """

    def __init__(
        self,
        directory: str | os.PathLike,
        state: Tree,
        *,
        checkpoint_every: int = 0,
        keep_latest: int = 100,
        keep_every: int = 1000,
        digest_every: int = 0,
        most_bytes: int = kept_batches.MOST_BYTES,
        on_row: Callable[[Row], Any] = lambda row: None,
        step: Step | None = None,
        checkpoints: Any = None,
    ):
        keep = _Keep(checkpoint_every, digest_every, most_bytes, keep_latest, keep_every, checkpoints)
        keep.check()
        self.paths = layout.Paths(Path(directory))
        with contextlib.ExitStack() as opening:
            layout.make_directory(self.paths.root)
            opening.enter_context(layout.locked(self.paths))
            records = RecordFile(self.paths.records)
            self._start = _start(self.paths, state, records)
            self._output = opening.enter_context(_Output(self.paths, records, keep, self._start.step, on_row))
            self._open = opening.pop_all()
        self._parts = self._start.parts
        # Of a new run all, until a step was taken; then what is no array, as a state takes memory.
        self._like = jax.tree.map(_copied, state) if self._parts is None else self._parts.settings(state)
        self._next = self._first = self._start.step
        self._beside = telemetry.Beside(self._start.arrays)  # now, as the first step may consume it
        self._pace = _Pace(digest_every)
        self._taken: Tree = None  # the batch of the next step, in a tuple
        self._last: Tree = None
        self._asked = self._parts is None
        self._step = step
        self._loader: drawn.Counted | None = None

    @property
    def step(self) -> int:
        """The number of the next step: how many were taken, in all."""
        return self._next

    @property
    def resumed(self) -> bool:
        """Whether a run was there already, be it of no steps."""
        return self._start.parts is not None

    @property
    def state(self) -> Tree:
        """What the next step starts from: of a run that is there already, its newest intact checkpoint."""
        self._asked = True
        if self._parts is None:
            return jax.tree.map(_copied, self._like)  # which a step may consume
        return self._parts.whole(self._last if self._next > self._first else self._start.arrays, self._like)

    def batches(self, source: Iterable[Any] | Callable[[], Iterable[Any]]) -> Iterator[Any]:
        """The batches of a loader, each kept before the step that it is for. A run that is gone on with begins where it
        ended: a loader that knows its place (`get_state`, `set_state`, as Grain's) is set there, and of another the
        batches of the steps that were taken are drawn and left out.

        Args:
            source: an iterable, or what makes one.
        """
        place = None if self._next > self._first else drawn.unwritten(self._start.loader)
        self._loader = drawn.Counted(drawn.after(source, self._next, place), self._next)
        for batch in self._loader:
            self._keep(batch)
            yield batch

    def around(self, train_step: Callable[..., tuple[Tree, Tree]]) -> Callable[..., tuple[Tree, Tree]]:
        """A train step that records itself, for a loop that can't be changed.

        Args:
            train_step: `(state, batch) -> (state, metrics)`; more arguments are kept with the batch.
        """

        def recorded(state: Tree, *batch: Any) -> tuple[Tree, Tree]:
            self._keep(batch[0] if len(batch) == 1 else batch)
            state, metrics = train_step(state, *batch)
            self(state, metrics)
            return state, metrics

        return recorded

    def replayed_by(self, step: Step) -> None:
        """Names the step that a replay is to take, as the argument `step` does; before the first step. It is traced."""
        self._step = step

    def __call__(self, state: Tree, metrics: Tree, batch: Tree = None) -> None:
        """Records a step that was just taken.

        Args:
            state: after it.
            metrics: what it says of itself: any tree of scalars, or the loss alone.
            batch: that it was taken on, if `batches` didn't give it. Everything that a replay can't have from the state
                belongs to it, as a random key that the loop draws.

        Raises:
            UserError: a state of another structure, metrics that are no scalars, a full disk.
        """
        if not self._asked:
            raise _is_there(self.paths, self._first)
        if self._next == self._first:
            _check_computed((state, metrics))
        number = self._next
        known = self._begun(state)
        arrays = known.arrays(state)
        due = self._output.due(number + 1)
        self._pace.at(number, lambda: self._beside.seconds(arrays))
        observation = self._beside(arrays, metrics, whole=due or self._pace.due(number))
        if batch is not None:
            self._keep(batch, before=False)
        if self._step is not None and self._taken is not None:
            pure, self._step = parts.on_arrays(self._step, known, self._like), None
            _note_equations(self.paths.equations, pure, arrays, *self._taken)
        self._output.put(number, observation, self._taken)
        self._next, self._last, self._taken = number + 1, arrays, None
        if due:
            self._save()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: Any, error: BaseException | None, where: Any) -> None:
        try:
            self.close()
        except UserError as failure:
            if error is None:
                raise
            log.warning('%s', failure)  # what ended the loop is what is to be said

    def close(self) -> None:
        """Writes what is still to be written, and a last checkpoint. The run can be gone on with."""
        last = self._last
        with self._open:
            self._output.flush()
            if last is not None and not _is_gone(last):
                self._save()

    def _begun(self, state: Tree) -> parts.Parts:
        """Which leaves of a state are arrays: known once a step was taken. What the run began with is saved then."""
        self._start = self._start._replace(arrays=None)
        if self._parts is None:
            self._parts = parts.Parts.of(self._like, state)
            first = jax.tree.map(_owned, self._parts.arrays(self._like))
            self._like = self._parts.settings(self._like)
            _write_notes(self.paths, self._parts)
            self._output.save(0, first, {})
            self._beside.start(first)
        return self._parts

    def _save(self) -> None:
        self._output.save(
            self._next, self._last, {} if self._loader is None else self._loader.place_at(self._next)
        )

    def _keep(self, batch: Tree, *, before: bool = True) -> None:
        """Notes the batch of the next step, mostly before the step, which may consume it."""
        if self._output.batches is not None:
            self._taken = (kept_batches.taken(batch, before=before),)


class _Keep(NamedTuple):
    """What a run keeps; see `Recorder`."""

    checkpoint_every: int
    digest_every: int
    most_bytes: int
    keep_latest: int
    keep_every: int
    manager: Any  # somebody's own, or None

    def check(self) -> None:
        """Raises UserError for a number that is too small."""
        least = {'checkpoint_every': 0, 'digest_every': 0, 'most_bytes': 0, 'keep_latest': 1, 'keep_every': 1}
        for name, number in least.items():
            if getattr(self, name) < number:
                raise UserError(f'{name}: {getattr(self, name)} found, at least {number} expected')


class _Output:
    """What a recorder leaves: records, batches and checkpoints, in an order that a power loss keeps.

    Args:
        paths: of the run.
        records: of the run.
        keep: how much of it.
        first: the step that it begins with; what is there of later ones is of another course.
        on_row: sees every record.
    """

    _clock = staticmethod(time.monotonic)

    def __init__(
        self,
        paths: layout.Paths,
        records: RecordFile,
        keep: _Keep,
        first: int,
        on_row: Callable[[Row], Any],
    ):
        self._keep, self._records, self._on_row = keep, records, on_row
        self._records.keep_before(first)
        self.batches: kept_batches.BatchWriter | None = None
        if keep.most_bytes:
            self.batches = kept_batches.BatchWriter(paths.batches, keep.most_bytes)
            self.batches.keep_before(first)
        self._writer: checkpoint.Writer | checkpoint.ManagersWriter
        if keep.manager is not None:
            self._writer = checkpoint.ManagersWriter(keep.manager, paths.checkpoints)
        else:
            self._writer = checkpoint.Writer(
                paths.checkpoints, keep_latest=keep.keep_latest, keep_every=keep.keep_every
            )

        def seen(row: Row) -> bool:
            on_row(row)
            return False  # the loop is not ours to be ended

        sink = writing.Sink(self._records, Records.of(()), seen)
        self._late = Late(sink.put, lambda what, number: None)
        self._saver = writing.Saver(self._writer, sink, {})
        self._saved: collections.deque[int] = collections.deque(maxlen=keep.keep_latest)
        self._next_at: float | None = None  # by the clock; None where no checkpoint was timed yet

    def due(self, number: int) -> bool:
        """Whether there is a checkpoint of what a step starts from."""
        if isinstance(self._writer, checkpoint.ManagersWriter):
            return self._writer.due(number)
        if every := self._keep.checkpoint_every:
            return number % every == 0
        if number % LEAST:
            return False
        full = self.batches is not None and self.batches.nearly_full
        return full or self._next_at is None or self._clock() >= self._next_at

    def put(self, number: int, observation: telemetry.Observation, taken: tuple[Tree] | None) -> None:
        """A record, a step late, and its batch if there is one."""
        if self.batches is not None and taken is not None:
            self.batches.put(number, *taken)
        self._late.put(number, observation)

    def flush(self) -> None:
        """Every record there is."""
        self._late.flush()

    def save(self, number: int, arrays: Tree, beside: Mapping[str, Any]) -> None:
        """A checkpoint, after the records and the batches of all steps before it."""
        self.flush()
        if self.batches is not None:
            self.batches.begin()
            if len(self._saved) == self._keep.keep_latest:
                self.batches.drop_before(self._saved[0])
        begun = self._clock()
        self._saver(number, arrays, beside)
        if self._next_at is None:
            self._writer.wait()
            self._seconds = self._clock() - begun
        self._next_at = self._clock() + self._seconds / SHARE
        self._saved.append(number)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: Any) -> None:
        with contextlib.ExitStack() as closing:
            closing.callback(writing.close, self._on_row)
            closing.callback(self._records.close)
            closing.callback(self._writer.close)
            if self.batches is not None:
                closing.callback(self.batches.close)


class _Started(NamedTuple):
    """Where a recorder begins."""

    step: int
    parts: parts.Parts | None  # None for a new run
    arrays: Tree  # what the step starts from; None for a new run
    loader: Any = None  # the place of the loader, if it was noted


def _start(paths: layout.Paths, state: Tree, file: RecordFile) -> _Started:
    notes = read_notes(paths)
    if not checkpoint.Checkpoints(paths.checkpoints).steps():
        return _Started(0, None, None)
    if notes is None:
        raise UserError(
            f'{paths.root} holds a run that no recorder made; choose another directory, or go on as it was begun'
        )
    known = parts.Parts.named(state, notes, 'state')
    saved = checkpoint.Checkpoints(paths.checkpoints, like=known.arrays(state))
    records = file.read_intact()

    def recorded(step: int) -> str | None:
        return (records.at(step - 1) or {}).get(telemetry.DIGEST)

    found = resume.newest_intact(saved, recorded)
    resume.set_aside(saved, found)
    if found is None:
        return _Started(0, None, None)
    if lost := np.setdiff1d(np.arange(found.step), records.steps).tolist():
        log.warning(
            '%s: the records of %s are lost; a bisect goes by the checkpoints',
            paths.records,
            gaps.named(lost),
        )
    return _Started(found.step, known, found.state, found.meta.get(drawn.LOADER))


def _note_equations(path: Path, step: Step, state: Tree, batch: Tree) -> None:
    """Keeps a step's equations, if none are kept. Of state and batch the shapes are looked at."""
    if equations.read(path) is None and (text := equations.written(step, state, batch)) is not None:
        layout.write_text(path, text)


def _write_notes(paths: layout.Paths, known: parts.Parts) -> None:
    """Those of a new run. What was begun there before, and saved nothing, may have left its equations."""
    paths.equations.unlink(missing_ok=True)
    layout.write_json(paths.recorder, files.sealed({'format': FORMAT, 'state': [*known.paths]}))


def read_notes(paths: layout.Paths) -> tuple[str, ...] | None:
    """The paths of the arrays in a recorder's run; None for a run of `loop`. Raises UserError for what can't be read,
    or is of a newer release."""
    found = files.read_notes(paths.recorder, FORMAT)
    if found is None:
        return None
    try:
        if not all(type(path) is str for path in found['state']):
            raise TypeError('state: a path is no text')
        return tuple(found['state'])
    except (KeyError, TypeError) as error:
        raise files.not_as_written(paths.recorder, error) from None


class _Pace:
    """When every number of the state is read: so seldom that it takes a SHARE of the training's time."""

    def __init__(self, every: int):
        self._every = every
        self._ask = not every
        self._begun: int | None = None
        self._last: float | None = None
        self._times: list[float] = []

    def at(self, number: int, seconds: Callable[[], float]) -> None:
        """Told of each step. Asks once what reading takes."""
        if not self._ask:
            return
        self._begun = number if self._begun is None else self._begun
        now = time.perf_counter()
        if self._last is not None and number - self._begun in TIMED:
            self._times.append(now - self._last)
        self._last = now
        if number - self._begun == TIMED[-1]:
            share = seconds() / (SHARE * max(statistics.median(self._times), 1e-9))
            self._every = int(share) + 1
            self._ask = False

    def due(self, number: int) -> bool:
        """Whether it is read after step `number`; also while that isn't known yet."""
        return self._ask or (number + 1) % self._every == 0


def _is_there(paths: layout.Paths, steps: int) -> UserError:
    return UserError(
        f'{paths.root}: a run of {steps} steps is there already; go on with recorder.state, which step {steps} starts '
        'from, or choose another directory'
    )


def _check_computed(values: Tree) -> None:
    if any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(values)):
        raise UserError(
            'recorder: values found that are not computed yet; give it a step after its call, outside of jax.jit'
        )


def _copied(leaf: Any) -> Any:
    return jnp.copy(leaf) if isinstance(leaf, jax.Array) else leaf


def _owned(leaf: Any) -> jax.Array:
    return leaf if isinstance(leaf, jax.Array) else jnp.array(leaf, jnp.result_type(leaf))


def _is_gone(state: Tree) -> bool:
    """Whether a step consumed it."""
    return any(leaf.is_deleted() for leaf in jax.tree.leaves(state) if isinstance(leaf, jax.Array))
