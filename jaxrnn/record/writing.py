"""What a run leaves while it goes on: records, and checkpoints after the records of all steps before them."""

from collections.abc import Callable, Mapping
from typing import Any

from jaxrnn import environment
from jaxrnn.record import checkpoint
from jaxrnn.record.checkpoint import state_digest
from jaxrnn.record.record_file import RecordFile
from jaxrnn.record.records import Records, Row, same
from jaxrnn.types import Tree, UserError


class Sink:
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


def close(on_row: Callable[[Row], Any]) -> None:
    """Tells an observer that no more records come; one that is a mere function isn't told."""
    if callable(closing := getattr(on_row, 'close', None)):
        closing()


class Saver:
    """Saves checkpoints, each after the records of all steps before it: both survive a power loss, in this order. The
    first is read back before the next step."""

    def __init__(
        self, writer: checkpoint.Writer | checkpoint.ManagersWriter, sink: Sink, identity: Mapping[str, str]
    ):
        self._writer, self._sink, self._identity = writer, sink, identity
        self._read_back = False

    def __call__(self, number: int, state: Tree, beside: Mapping[str, Any] | None = None) -> None:
        """What is noted `beside` a state must be JSON."""
        self._sink.sync()
        meta = {**meta_of(number, state, self._identity), **(beside or {})}
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


def meta_of(step: int, state: Tree, identity: Mapping[str, str]) -> dict[str, Any]:
    around = environment.describe()
    return {
        **identity,
        'step': step,
        'state': state_digest(state),
        'environment': environment.digest(around),
        'environment_details': around,
    }
