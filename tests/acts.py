"""What a run does to its directory, each as an act that can be cut short at any call, and what must be so afterwards.

As a program it does one act in a directory where it is prepared:

    python tests/acts.py save /tmp/run
"""

import contextlib
import functools
import gc
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxrnn.record import checkpoint, kept_batches, layout, loop, recorder, telemetry
from jaxrnn.record.record_file import RecordFile
from jaxrnn.record.records import Row
from jaxrnn.types import UserError

STOP = 8
"""Steps of a whole run."""


def step(state, batch):
    w = state['w'] * np.float32(0.9) + batch
    return {'w': w}, {'loss': jnp.sum(w * w)}


def init():
    return {'w': jnp.arange(3, dtype=jnp.float32)}


def run(
    directory: Path, stop: int = STOP, keep_latest: int = 2, identity: Mapping[str, str] | None = None
) -> loop.RunResult:
    options = loop.LoopOptions(max_steps=stop, checkpoint_every=2, keep_latest=keep_latest)
    return loop.run(step, lambda k: np.float32(k % 5), init, directory, options, identity=identity)


def checkpoints(directory: Path) -> checkpoint.Checkpoints:
    return checkpoint.Checkpoints(layout.Paths(directory).checkpoints, like=jax.eval_shape(init))


def records(directory: Path) -> RecordFile:
    return RecordFile(layout.Paths(directory).records)


class Straight(NamedTuple):
    """The run that never stopped."""

    rows: list[Row]
    digest: str  # of its last state


@functools.lru_cache
def straight() -> Straight:
    instrumented = telemetry.instrument(step)
    rows: list[Row] = []
    batch_at = lambda k: np.float32(k % 5)  # noqa: E731
    _, state = loop.advance(instrumented, batch_at, init(), 0, STOP, digest_every=1, put=rows.append)
    return Straight(rows, loop.state_digest(state))


class Found(NamedTuple):
    """What there was before a run went on."""

    whole: Collection[int]  # steps of the checkpoints that lack no byte
    named: Collection[int]  # of those that there were, as the process that ended saw it
    garbled: bool = False  # whether what was synced may be gone, too


class Act(NamedTuple):
    """Something a run does."""

    prepare: Callable[[Path], object]  # what there is before it
    do: Callable[[Path], object]
    afterwards: Callable[[Path, Found], list[str]]  # goes on; what is wrong then
    done: Callable[[Path], list[str]]  # what is wrong once it was done, whatever was lost then


@contextlib.contextmanager
def folder() -> Iterator[Path]:
    """A new one, in memory where it can be: to sync it takes no time there."""
    home = next((each for each in (Path('/dev/shm'),) if os.access(each, os.W_OK)), None)
    with tempfile.TemporaryDirectory(prefix='jaxrnn-', dir=home) as made:
        yield Path(made).resolve()


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without what Python says of the coroutines that orbax drops where an array can't be read."""
    before, sys.unraisablehook = sys.unraisablehook, lambda found: None
    try:
        yield
        gc.collect()  # later they would be another test's
    finally:
        sys.unraisablehook = before


# Of any step


def all_count(directory: Path, found: Found) -> list[str]:
    """As `goes_on`; and before that, whatever counts as a checkpoint is one: a bisect may need any."""
    return _are_whole(directory) + goes_on(directory, found)


def _are_whole(directory: Path) -> list[str]:
    saved, wrong = checkpoints(directory), []
    for at in saved.steps():
        try:
            if at and loop.state_digest(saved.restore(at)) != straight().rows[at - 1]['digest']:
                wrong.append(f'checkpoint {at} counts, and is another')
        except UserError:
            wrong.append(f"checkpoint {at} counts, and can't be read")
    return wrong


def goes_on(directory: Path, found: Found) -> list[str]:
    """The newest checkpoint that is whole is gone on from, the records have no gap, and the bits are those of the run
    that never stopped."""
    wrong = []
    ended = run(directory)
    least, newest = max(found.whole, default=0), max(found.named, default=0)
    if (ended.resumed_from or 0) < least:
        wrong.append(f'went on from {ended.resumed_from}, and {least} is whole')
    if newest - least > 2:
        wrong.append(f'the newest whole checkpoint is {least}, and there was {newest}')
    return wrong + _is_whole(directory) + _ends(ended)


def _is_whole(directory: Path, rows: list[Row] | None = None) -> list[str]:
    wrong = []
    expected, got = straight().rows if rows is None else rows, records(directory).read()
    if got != expected:
        wrong.append(f'the records are those of steps {[row["step"] for row in got]}, or others')
    return wrong + _are_whole(directory)


def _ends(ended: loop.RunResult) -> list[str]:
    wrong = [] if loop.state_digest(ended.state) == straight().digest else ['it ended with other bits']
    return wrong + (['a step came out otherwise'] if ended.first_mismatch is not None else [])


def reaches(stop: int) -> Callable[[Path], list[str]]:
    def done(directory: Path) -> list[str]:
        """All of it is there."""
        newest = max(checkpoints(directory).steps(), default=None)
        wrong = [] if newest == stop else [f'the newest checkpoint is {newest}']
        return wrong + _is_whole(directory, straight().rows[:stop])

    return done


def nothing(directory: Path) -> list[str]:
    """That nothing is asked for."""
    return []


def put_record(directory: Path) -> None:
    with_file = records(directory)
    with_file.append(straight().rows[4])
    with_file.sync()
    with_file.close()


def recorded(directory: Path) -> list[str]:
    return _is_whole(directory, straight().rows[:5])


def damage(directory: Path) -> None:
    """A run that ended by itself, and then was damaged: its newest checkpoint, two records and the last line; and with
    what a killed process leaves."""
    run(directory)
    for path in (directory / 'checkpoints' / str(STOP) / 'state').rglob('d/*'):
        path.write_bytes(path.read_bytes()[:-40])
    file = layout.Paths(directory).records
    lines = file.read_bytes().splitlines(keepends=True)
    file.write_bytes(b''.join([lines[0], *lines[2:4], *lines[5:], b'{"step": 8, "lo']))
    (directory / 'checkpoints' / '9.orbax-checkpoint-tmp' / 'state').mkdir(parents=True)


def go_back(directory: Path) -> None:
    loop.rewind(directory, 4)


def went_back(directory: Path) -> list[str]:
    later = [at for at in checkpoints(directory).steps() if at > 4]
    wrong = [f'checkpoints {later} are there again'] if later else []
    rows = [row['step'] for row in records(directory).read() if row['step'] >= 4]
    return wrong + ([f'records {rows} are there again'] if rows else []) + reaches(4)(directory)


def goes_back_on(directory: Path, found: Found) -> list[str]:
    """Asked to go back once more, it has gone back; and without that the run goes on as ever."""
    copied = directory.with_name('copied')
    shutil.copytree(directory, copied)
    wrong = all_count(copied, found._replace(named=()))
    shutil.rmtree(copied)
    go_back(directory)
    if (newest := max(checkpoints(directory).steps(), default=0)) > 4:
        wrong.append(f'went back to {newest}')
    return wrong + goes_on(directory, found._replace(whole=[at for at in found.whole if at <= 4], named=()))


# Of somebody's own loop


compiled = jax.jit(step)


def record(directory: Path, stop: int = STOP) -> loop.RunResult:
    """As `run`, in a loop that has a recorder."""
    with recorder.Recorder(directory, init(), checkpoint_every=2, keep_latest=2, digest_every=1) as recording:
        first, state = recording.step, recording.state
        for number in range(first, stop):
            batch = np.float32(number % 5)
            state, metrics = compiled(state, batch)
            recording(state, metrics, batch)
    return loop.RunResult(stop, state, None, None, first)


@functools.lru_cache
def straight_recorded() -> list[Row]:
    with folder() as directory:
        record(directory)
        return list(records(directory).read())


def recorder_goes_on(directory: Path, found: Found) -> list[str]:
    """As `goes_on`; and the batches are kept of all steps that a checkpoint leads to."""
    known = records(directory).read_intact().steps.tolist()
    wrong, ended = _are_whole(directory), record(directory)
    least = max(found.whole, default=0)
    if (ended.resumed_from or 0) < least:
        wrong.append(f'went on from {ended.resumed_from}, and {least} is whole')
    # Nobody can compute again what was lost: without the step.
    lost = {*range(ended.resumed_from or 0)} - {*known} if found.garbled else ()
    return wrong + recorder_is_whole(directory, lost=lost) + _ends(ended)


def recorder_is_whole(directory: Path, stop: int = STOP, lost: Collection[int] = ()) -> list[str]:
    wrong = _is_whole(directory, [row for row in straight_recorded()[:stop] if row['step'] not in lost])
    kept = kept_batches.KeptBatches(directory / 'batches')
    known, saved = kept.steps(), [at for at in checkpoints(directory).steps() if at]
    if known != [*range(known[0] if known else 0, stop)] or (
        saved and known[0] > saved[0] and saved[0] < stop
    ):
        wrong.append(f'the batches of {known} are kept, and there are checkpoints {saved}')
    if any(kept(number) != number % 5 for number in known):
        wrong.append('a batch is another')
    return wrong


ACTS = {
    'first save': Act(nothing, lambda directory: run(directory, 2), all_count, reaches(2)),
    'save': Act(
        lambda directory: run(directory, 4), lambda directory: run(directory, 6), all_count, reaches(6)
    ),
    'record': Act(lambda directory: run(directory, 4), put_record, all_count, recorded),
    'resume': Act(damage, run, goes_on, reaches(8)),
    'rewind': Act(lambda directory: run(directory, keep_latest=3), go_back, goes_back_on, went_back),
    'first recorded': Act(
        nothing,
        lambda directory: record(directory, 3),
        recorder_goes_on,
        lambda path: recorder_is_whole(path, 3),
    ),
    'recorder goes on': Act(
        lambda directory: record(directory, 5),
        lambda directory: record(directory, 7),
        recorder_goes_on,
        lambda path: recorder_is_whole(path, 7),
    ),
}


if __name__ == '__main__':
    ACTS[sys.argv[1]].do(Path(sys.argv[2]))
