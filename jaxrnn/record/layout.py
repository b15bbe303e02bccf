"""Where things lie in a run's directory, and who may write there."""

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from jaxrnn import files
from jaxrnn.escaping import as_json
from jaxrnn.types import UserError


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
    def evidence(self) -> Path:
        return self.root / 'evidence.json'

    @property
    def page(self) -> Path:
        return self.root / 'report.html'

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
    def branch(self) -> Path:
        return self.root / 'branch.json'

    @property
    def recorder(self) -> Path:
        return self.root / 'recorder.json'

    @property
    def equations(self) -> Path:
        return self.root / 'equations.txt'

    @property
    def batches(self) -> Path:
        return self.root / 'batches'

    @property
    def alerts(self) -> Path:
        return self.root / 'alerts.jsonl'

    @property
    def lock(self) -> Path:
        return self.root / 'lock'


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
def locked(paths: Paths) -> Iterator[None]:
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
