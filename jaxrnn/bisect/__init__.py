"""The first bad step of a run, proven by replay; and one step inspected.

replay       the first bad step, by bisection
replayer     any step again, bit for bit, held against what the run left
agreement    whether two states are the same, but for rounding, or not
another_run  what it says of a run that its replay is another
flipped_bits the bit of a state that made it another
inspection   one step evaluated equation by equation, or compared with an earlier one

The package is callable: `jaxrnn.bisect(...)` is `jaxrnn.bisect.bisect(...)`.
"""

import functools
import inspect
import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import jax

from jaxrnn import detect
from jaxrnn.bisect import inspection, replay
from jaxrnn.diagnosis import Diagnosis
from jaxrnn.package import make_callable
from jaxrnn.record import equations, kept_batches, layout, parts, recorder, telemetry
from jaxrnn.record.checkpoint import Checkpoints
from jaxrnn.record.record_file import RecordFile
from jaxrnn.record.records import Row
from jaxrnn.types import BatchAt, Step, Tree, UserError

log = logging.getLogger('jaxrnn')


def bisect(
    step: Step,
    batch_at: BatchAt | None,
    directory: str | os.PathLike,
    *,
    like: Tree | Callable[[], Tree] = None,
    when: str = '',
    symptom: str = '',
    good: int | None = None,
    bad: int | None = None,
    digest_every: int = 1,
    alarms: Sequence[detect.Detector] | None = None,
    loss: str = '',
    verify: bool = False,
    batch_like: Tree = None,
) -> tuple[Diagnosis, list[Row]]:
    """Names the first bad step of a run, proves it by replay, and says where in it.

    Args:
        step: as in the run.
        batch_at: as in the run; None for the batches that a `Recorder` kept.
        directory: of a run that was recorded, or of orbax checkpoints, k being the state that step k starts from.
        like: a state, or what makes one, for the structure of the state; not needed for nested dictionaries.
        when: a rule, as 'loss > 3 * median(loss, 200)'; else the built-in symptoms are looked for.
        symptom: look for this one only.
        good: a step before it.
        bad: a step after it began.
        digest_every: as in the run.
        alarms: which date the first sign of a symptom, of `detect.alarms_of`; those of an optimiser if not given.
        loss: the field of a record that is the loss; found by its name if not given, as train_loss is.
        verify: replay the whole run, symptom or not: finds a bit that flipped in memory, though nothing shows of it.
        batch_like: a batch, for the structure of kept ones, where they are of classes of your own.

    Returns:
        The diagnosis, and the rows that were replayed.

    Raises:
        UserError: no checkpoints, damaged ones, a rule that can't be read, or several fields that may be the loss.

    >>> import tempfile
    >>> def step(x, batch):
    ...     return x - 0.1 * batch, {'loss': x**2}
    >>> def batch_at(k):
    ...     return float('nan') if k == 7 else 1.0
    >>> with tempfile.TemporaryDirectory() as directory:
    ...     _ = jaxrnn.record(step, batch_at, lambda: 1.0, directory, max_steps=20, checkpoint_every=5)
    ...     diagnosis, rows = jaxrnn.bisect(step, batch_at, directory, like=lambda: 1.0)
    >>> diagnosis.symptom, diagnosis.where['pass'], diagnosis.replay.bit_identical
    (Symptom(kind='nonfinite', step=7), 'data', True)
    """
    detectors = detectors_of(when, symptom)
    subject = subject_of(step, batch_at, directory, like, digest_every, loss, batch_like)
    alarms = detect.ALARMS if alarms is None else alarms
    diagnosis, rows = replay.bisect(subject, detectors, good=good, bad=bad, alarms=alarms, verify=verify)
    diagnosis, _ = inspection.locate(subject, diagnosis)
    return inspection.with_numbers(subject, diagnosis), rows


def state(
    step: Step,
    batch_at: BatchAt | None,
    directory: str | os.PathLike,
    number: int,
    *,
    like: Tree | Callable[[], Tree] = None,
    digest_every: int = 1,
    batch_like: Tree = None,
) -> Tree:
    """The state that step `number` of a run starts from, replayed from the checkpoint before it.

    Args:
        step, batch_at, directory, like, digest_every, batch_like: as in `bisect`.
        number: of the step.

    Returns:
        The state, with its batch, `batch_at(number)`, all that the step has seen.

    Raises:
        UserError: no checkpoint before the step, a damaged one, or a replay that is another run than the one recorded.

    >>> import tempfile
    >>> def step(x, batch):
    ...     return x * batch, {'loss': x}
    >>> def batch_at(k):
    ...     return 0.5
    >>> with tempfile.TemporaryDirectory() as directory:
    ...     _ = jaxrnn.record(step, batch_at, lambda: 1.0, directory, max_steps=20, checkpoint_every=5)
    ...     state = jaxrnn.state(step, batch_at, directory, 7, like=lambda: 1.0)
    >>> float(state), float(step(state, batch_at(7))[1]['loss'])
    (0.0078125, 0.0078125)
    """
    replayer = replay.Replayer(
        subject_of(step, batch_at, directory, like, digest_every, batch_like=batch_like)
    )
    found = replayer.state(number)
    if replayer.first_mismatch is not None:
        raise UserError(
            f'{directory}: step {replayer.first_mismatch} comes out otherwise than it was recorded, so that the state '
            f'of step {number} is not known; jaxrnn.bisect says more'
        )
    return found


def detectors_of(when: str, symptom: str) -> Sequence[detect.Detector]:
    """What is to be looked for. Raises UserError where the two contradict each other."""
    if when and symptom:
        raise UserError('when and symptom: both found, one expected')
    return [detect.custom(when)] if when else detect.named(symptom) if symptom else detect.DETECTORS


def subject_of(
    step: Step,
    batch_at: BatchAt | None,
    directory: str | os.PathLike,
    like: Tree | Callable[[], Tree],
    digest_every: int,
    loss: str = '',
    batch_like: Tree = None,
) -> replay.Subject:
    """Anybody's run in a directory. Arguments as `bisect` has them."""
    paths = layout.Paths(Path(directory))
    if (recorded := recorder.read_notes(paths)) is not None:
        return _recorded(step, batch_at, paths, recorded, like, batch_like, loss)
    if batch_at is None:
        raise UserError(
            f'batch_at: None found, and no recorder kept the batches of {directory}; give the function that makes them'
        )
    structure = jax.eval_shape(like) if callable(like) else like
    ours = paths.checkpoints.is_dir()
    return replay.subject(
        step,
        batch_at,
        Checkpoints(paths.checkpoints if ours else paths.root, like=structure),
        RecordFile(paths.records).read() if ours else (),
        digest_every=digest_every,
        loss=loss,
    )


def _recorded(
    step: Step,
    batch_at: BatchAt | None,
    paths: layout.Paths,
    notes: Sequence[str],
    like: Tree | Callable[[], Tree],
    batch_like: Tree,
    loss: str,
) -> replay.Subject:
    """A recorder's run: its steps are replayed by the function that trained, and its batches are those that it kept if
    no others are given."""
    if like is None:
        raise UserError('like: None found, a state like that which the run began with expected')
    state = like() if inspect.isroutine(like) or isinstance(like, functools.partial) else like
    known = parts.Parts.named(state, notes)
    pure = parts.on_arrays(step, known, state)
    rows, since = RecordFile(paths.records).read(), 0
    if batch_at is None:
        kept = kept_batches.KeptBatches.of_run(paths, rows, batch_like)
        batch_at, since = kept, min(kept.steps(), default=0)
    saved = Checkpoints(paths.checkpoints, like=known.arrays(state), since=since)
    found = replay.subject(pure, batch_at, saved, rows, loss=loss, observed=telemetry.CalledStep(pure))
    return found._replace(other_program=_other_program(paths, found, known.arrays(state)))


MOST_SHAPES = 100
"""Batches among which one of the shapes of a run's first is looked for."""


def _other_program(paths: layout.Paths, subject: replay.Subject, arrays: Tree) -> str:
    """What is said where a run was recorded with another program than is given."""
    was = equations.read(paths.equations)
    steps = subject.checkpoints.steps()
    if was is None or subject.step is None or not steps:
        return ''
    numbers = range(steps[0], min(steps[-1], steps[0] + MOST_SHAPES))
    batches = (functools.partial(subject.batch_at, number) for number in numbers)
    found = equations.difference(was, subject.step, arrays, batches)
    if found:
        log.warning('%s: the step is another program than the one that trained: %s', paths.equations, found)
    return found


make_callable(__name__, bisect)
