"""A run's records as files that other programs read. It needs no JAX, so that flags are read before that is imported.

A format is a file in this folder, of its name, and a line of FORMATS. Such a file has

    write(run: Recorded, path: Path) -> None    makes a file or a folder at a path where nothing is

and imports its library where it is loaded, which is when it is asked for. `names` makes names that a format can hold.
"""

import importlib
import os
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, NamedTuple

from jaxrnn import files
from jaxrnn.errors import UserError
from jaxrnn.escaping import visible

if TYPE_CHECKING:
    from jaxrnn.record.records import Records


class Format(NamedTuple):
    """Something that records can be exported to."""

    library: str  # that it needs, as pip calls it; '' for none
    opened_by: str  # what a person types to look at it, with {out} for its path


FORMATS = {
    'csv': Format('', ''),
    'parquet': Format('pyarrow', ''),
    'tensorboard': Format('tensorboard', 'tensorboard --logdir={out}'),
    'mlflow': Format('mlflow', 'mlflow ui --backend-store-uri=sqlite:///{out}/mlflow.db'),
    'wandb': Format('wandb', 'wandb sync {out}/wandb/offline-run-*'),
}
"""Each in the file of its name."""


class Recorded(NamedTuple):
    """What is exported of a run."""

    records: 'Records'
    name: str  # of the run's directory
    time: float  # when the last of them was written, seconds since 1970
    out: Path  # where the export comes to stand in the end; absolute


class Exported(NamedTuple):
    """What an export has."""

    records: int
    fields: int
    out: Path


def export(directory: str | os.PathLike, *, to: str, out: str | os.PathLike) -> Exported:
    """Writes the records of a run in a format of other programs: all fields and all steps.

    Nothing is computed, and nothing is sent anywhere. The run is read, and not written to; it may still be training.

    Args:
        directory: of a run, whoever recorded it.
        to: a name of `FORMATS`.
        out: of the new file (csv, parquet) or folder (tensorboard, mlflow, wandb). It appears when it is whole.

    Returns:
        How much was written, and where.

    Raises:
        UserError: an unknown format, a library that isn't installed, a directory without records, records that are
            damaged, something that is at `out` already, or a full disk.

    >>> import tempfile
    >>> def step(x, batch):
    ...     return x * batch, {'loss': x}
    >>> with tempfile.TemporaryDirectory() as directory:
    ...     _ = jaxrnn.record(step, lambda k: 0.5, lambda: 1.0, directory, max_steps=4)
    ...     written = jaxrnn.export(directory, to='csv', out=f'{directory}/records.csv')
    ...     with open(written.out) as file:
    ...         print(written.records, 'loss' in file.readline().split(','))
    4 True
    """
    if to not in FORMATS:
        raise UserError(f'--to: {to!r} found, one of {", ".join(FORMATS)} expected')
    path = _free(os.fsdecode(out))
    writer = _loaded(to)
    run = _read(Path(directory), path)
    try:
        with files.appearing(path) as temporary:
            writer.write(run, temporary)
    except OSError as error:
        raise UserError(
            f'--out: {path} can not be written ({error.strerror or error}); make room or choose another path'
        ) from error
    return Exported(len(run.records), len(run.records.stored), path)


def _free(out: str) -> Path:
    """Where an export is to come to stand. Raises UserError where something is there."""
    if not out:
        raise UserError('--out: nothing found, the path of a new file or folder expected')
    if '\0' in out:
        raise UserError(f'--out: {out} found, a name without zero bytes expected')
    path = Path(os.path.abspath(out))
    try:
        files.check_free(path)
    except UserError as error:
        raise UserError(f'--out: {error}') from None
    return path


def _loaded(to: str) -> ModuleType:
    """What writes a format. Raises UserError where its library can't be imported."""
    try:
        return importlib.import_module(f'jaxrnn.exports.{to}')
    except ImportError as error:
        library = FORMATS[to].library
        missing = isinstance(error, ModuleNotFoundError) and error.name == library
        why = 'is not installed' if missing else f'can not be imported ({error})'
        raise UserError(f'--to={to}: {library} {why}; install it: pip install {library}') from error


def _read(root: Path, out: Path) -> Recorded:
    from jaxrnn.record import layout
    from jaxrnn.record.record_file import RecordFile

    paths = layout.Paths(root)
    records = RecordFile(paths.records).read()
    if not records:
        raise UserError(
            f'--run_dir: {root} holds no records ({paths.records.name}); name the directory that training was given'
        )
    name = visible(os.path.basename(os.path.abspath(root)))
    return Recorded(records, name, os.stat(paths.records).st_mtime, out)
