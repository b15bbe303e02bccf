"""A folder with a file of TensorBoard's events, a scalar a field.

Written by TensorBoard's own record writer and messages, as they are the format, and whoever wants to look has them:
tensorboardX and torch would be another library, and TensorFlow is 600 MB. Its EventFileWriter queues for a thread,
whose errors are lost.
"""

import os
from collections.abc import Iterator
from pathlib import Path

from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter

from jaxrnn.escaping import visible
from jaxrnn.exports import Recorded, numbers

VERSION = 'brain.Event:2'
"""What the first event of a file says."""


def write(run: Recorded, path: Path) -> None:
    """Values are float32, as TensorBoard's are."""
    path.mkdir()
    unfinished = path / 'unfinished'  # which TensorBoard doesn't take for its own: it looks into every folder
    with open(unfinished, 'wb') as file:
        records = RecordWriter(file)
        for event in _events(run):
            records.write(event.SerializeToString())
    os.rename(unfinished, path / f'events.out.tfevents.{int(run.time):010d}.jaxrnn')


def _events(run: Recorded) -> Iterator[Event]:
    yield Event(wall_time=run.time, file_version=VERSION)
    for row in numbers.rows(run, visible):
        values = [Summary.Value(tag=tag, simple_value=value) for tag, value in row.values.items()]
        yield Event(wall_time=row.time, step=row.step, summary=Summary(value=values))
