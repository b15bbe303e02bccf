"""A run: the loop that trains, the records and checkpoints that it leaves, and going back to one.

loop         a run, from its start or on   steps        the loop proper, of training and replay
checkpoint   states on disk, through orbax telemetry    records, made in the step
record_file  records on disk               records      in memory, by columns
resume       the checkpoint to go on from  gaps         records that are missing, computed again
rewind       going back while training     ending       signals, the time, steps that hang
recorder     a run of somebody else's loop parts        the arrays of such a loop's state
kept_batches its batches, on disk          outline      how a tree is made, as data
drawn        batches of a loader, counted  equations    a step as text
layout       where things lie in a run     writing      records and checkpoints, in their order
bit_flips    a bit of a state that is not what its digest says

The package is callable: `jaxrnn.record(...)` is `jaxrnn.record.record(...)`.
"""

import os
from collections.abc import Callable
from typing import Any

from jaxrnn.package import make_callable
from jaxrnn.record import loop, writing
from jaxrnn.record.drawn import Drawn as Drawn
from jaxrnn.record.recorder import Recorder as Recorder
from jaxrnn.record.records import Row
from jaxrnn.types import BatchAt, Step, Tree


def record(
    step: Step,
    batch_at: BatchAt,
    init: Callable[[], Tree],
    directory: str | os.PathLike,
    *,
    on_row: Callable[[Row], Any] = lambda row: None,
    **options: Any,
) -> loop.RunResult:
    """Trains with any pure step, and leaves a run that can be bisected; the same call again resumes it.

    Args:
        step: `(state, batch) -> (state, record)`; the record may be any tree of scalars.
        batch_at: step number -> batch; a pure function.
        init: makes the initial state.
        directory: of the run.
        on_row: sees every record, one step late; if it has a `close`, that is called at the end, as of `jaxrnn.Alerts`.
        **options: of `loop.LoopOptions`: max_steps, checkpoint_every, …; for a run that nobody watches max_minutes
            (ends it with a checkpoint) and step_timeout (seconds; ends the process where no step finishes).

    Returns:
        How it ended, with the final state.

    Raises:
        UserError: a directory that can't be used, or one that holds another run.

    >>> import tempfile
    >>> def step(x, batch):
    ...     return x * batch, {'loss': x}
    >>> with tempfile.TemporaryDirectory() as directory:
    ...     result = jaxrnn.record(step, lambda k: 0.5, lambda: 1.0, directory, max_steps=4)
    >>> result.step, float(result.state)
    (4, 0.0625)
    """

    def seen(row: Row) -> bool:
        on_row(row)
        return False  # which ends nothing

    try:
        return loop.run(step, batch_at, init, directory, loop.LoopOptions(**options), on_row=seen)
    finally:
        writing.close(on_row)


make_callable(__name__, record)
