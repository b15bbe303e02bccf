"""The debugger for anybody's train step: record a run, bisect a run.

jaxrnn.record(step, batch_at, init, 'runs/mine', max_steps=1000)
diagnosis, rows = jaxrnn.bisect(step, batch_at, 'runs/mine', like=init)
diagnosis, told = jaxrnn.diagnose(step, batch_at, 'runs/mine', changes, like=init)
"""

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax

from jaxrnn import detect, experiment, inside, loop, outcome, replay, telemetry
from jaxrnn.changes import in_order
from jaxrnn.checkpoint import Checkpoints
from jaxrnn.diagnosis import Diagnosis
from jaxrnn.telemetry import Row
from jaxrnn.types import BatchAt, Step, Tree, UserError


def record(
    step: Step, batch_at: BatchAt, init: Callable[[], Tree], directory: str | os.PathLike, **options: Any
) -> loop.Ended:
    """Trains with any pure step, and leaves a run that can be bisected; the same call again resumes it.

    Args:
        step: `(state, batch) -> (state, record)`; the record may be any tree of scalars.
        batch_at: step number -> batch; a pure function.
        init: makes the initial state.
        directory: of the run.
        **options: of `loop.Options`: max_steps, checkpoint_every, …

    Returns:
        How it ended, with the final state.
    """
    return loop.run(step, batch_at, init, directory, loop.Options(**options))


def bisect(
    step: Step,
    batch_at: BatchAt,
    directory: str | os.PathLike,
    *,
    like: Tree | Callable[[], Tree] = None,
    when: str = '',
    symptom: str = '',
    good: int | None = None,
    bad: int | None = None,
    digest_every: int = 1,
) -> tuple[Diagnosis, list[Row]]:
    """Names the first bad step of a run, proves it by replay, and says where in it.

    Args:
        step: as in the run.
        batch_at: as in the run.
        directory: of a run that `record` left, or of an orbax CheckpointManager whose checkpoint k is the state
            that step k starts from.
        like: a state, or what makes one, for the structure of the state; not needed for nested dictionaries.
        when: a rule, as 'loss > 3 * median(loss, 200)'; else the built-in symptoms are looked for.
        symptom: look for this one only.
        good: a step before it.
        bad: a step after it began.
        digest_every: as in the run.

    Returns:
        The diagnosis, and the rows that were replayed.

    Raises:
        UserError: no checkpoints, damaged ones, or a rule that can't be read.
    """
    detectors = _detectors(when, symptom)
    subject = _subject(step, batch_at, directory, like, digest_every)
    diagnosis, rows = replay.bisect(subject, detectors, good=good, bad=bad)
    return inside.into(subject, diagnosis)[0], rows


def diagnose(
    step: Step,
    batch_at: BatchAt,
    directory: str | os.PathLike,
    changes: Sequence[outcome.Change] = (),
    *,
    budget: int = experiment.BUDGET,
    like: Tree | Callable[[], Tree] = None,
    when: str = '',
    symptom: str = '',
    good: int | None = None,
    bad: int | None = None,
    digest_every: int = 1,
) -> tuple[Diagnosis, outcome.Told | None]:
    """As `bisect`, and experiments: the steps before the symptom again under one change at a time.

    Args:
        step, batch_at, directory: as in `bisect`.
        changes: what is tried beside other batches, in this order; see `outcome.Change`.
        budget: steps that may be replayed, those of the bisection included.
        like, when, symptom, good, bad, digest_every: as in `bisect`.

    Returns:
        The diagnosis with cause and remedies, and what the experiments gave, None where there was nothing to explain.

    Raises:
        UserError: as `bisect`.
    """
    detectors = _detectors(when, symptom)
    subject = _subject(step, batch_at, directory, like, digest_every)
    diagnosis, _ = replay.bisect(subject, detectors, good=good, bad=bad)
    diagnosis, _ = inside.into(subject, diagnosis)

    def tried(window: outcome.Window, bad_batches: Sequence[int]) -> list[outcome.Change]:
        return in_order(subject, window, bad_batches, changes)

    return experiment.explain(subject, diagnosis, tried, detectors, budget=budget)


def _detectors(when: str, symptom: str) -> Sequence[detect.Detector]:
    if when and symptom:
        raise UserError('when and symptom: both found, one expected')
    return [detect.custom(when)] if when else [detect.by_name(symptom)] if symptom else detect.DETECTORS


def _subject(
    step: Step,
    batch_at: BatchAt,
    directory: str | os.PathLike,
    like: Tree | Callable[[], Tree],
    digest_every: int,
) -> replay.Subject:
    structure = jax.eval_shape(like) if callable(like) else like
    paths = loop.Paths(Path(directory))
    ours = paths.checkpoints.is_dir()
    return replay.subject(
        step,
        batch_at,
        Checkpoints(paths.checkpoints if ours else paths.root, like=structure),
        telemetry.RecordFile(paths.records).read() if ours else (),
        digest_every=digest_every,
    )
