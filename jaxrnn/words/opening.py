"""What is asked of a run's directory before anything in it is believed: it may be a stranger's."""

import reprlib
from typing import NamedTuple

from jaxrnn import files
from jaxrnn.escaping import as_shell_word
from jaxrnn.record import layout
from jaxrnn.record.checkpoint import Checkpoints
from jaxrnn.types import UserError
from jaxrnn.words import data
from jaxrnn.words.config import Config


class Source(NamedTuple):
    """What a person lets a run's data be read from where the run has no copy of it. None of it is the run's word."""

    vectors: str = ''
    corpus: str = ''
    allow_pickle: bool = False


def check_files(paths: layout.Paths) -> None:
    """Raises UserError for a run that leads out of its directory, or has a FIFO, a device or the like in it."""
    for path in (
        paths.config, paths.data, paths.records, paths.rewinds, paths.experiments, paths.evaluation,
        paths.diagnosis, paths.flags, paths.alerts, paths.branch, paths.lock,
    ):  # fmt: skip
        files.check_regular(path)
        # By this name earlier versions wrote; a link under it is somebody's, to have what it leads to overwritten.
        files.check_regular(path.with_name(f'{path.name}.part'))
    files.check_within(paths.checkpoints)


def begins(paths: layout.Paths) -> int:
    """The first step of a run; not 0 for one that was branched. Raises UserError where its note is damaged."""
    if not paths.branch.exists():
        return 0
    try:
        found = files.read_json(paths.branch)
    except OSError as error:
        raise UserError(f"{paths.branch}: it can't be read ({error.strerror})") from error
    step = found.get('step') if isinstance(found, dict) else None
    if type(step) is not int or step < 0:
        raise UserError(
            f'{paths.branch}: {reprlib.repr(found)} found, the run and the step branched from expected'
        )
    if not Checkpoints(paths.checkpoints).steps():
        raise UserError(
            f'--run_dir: {paths.root} was to be branched from another run, which was cut short; give the same '
            '--branch_from and --branch_at again'
        )
    return step


def check_allowed(paths: layout.Paths, config: Config, source: Source) -> None:
    """Raises UserError for a run whose data would be read from where the run says, and not the user."""
    if source.vectors or source.corpus:
        return
    for name in ('vectors', 'corpus'):
        if path := getattr(config.data, name):
            shown = as_shell_word(path)
            raise UserError(
                f'--run_dir: {paths.root} has no data.npz, and a file that its config.json names is not opened on the '
                f"run's word ({shown}); if you trust that file, give it yourself: --{name}={shown}"
            )


def check_identity(paths: layout.Paths, config: Config, dataset: data.Dataset, source: Source) -> None:
    """Raises UserError for a configuration or data that the run's checkpoints were not trained with: what follows from
    them would be said of the machine."""
    found = {
        'config': (f'--run_dir: {paths.config}', config.digest()),
        'data': (_origin(paths, source), dataset.digest),
    }
    checkpoints = Checkpoints(paths.checkpoints)
    steps = checkpoints.steps()
    for step in {*steps[:1], *steps[-1:]}:
        meta = checkpoints.meta(step)
        for name, (file, digest) in found.items():
            if meta.get(name, digest) != digest:
                raise UserError(
                    f'{file} is not the one that the run was trained with (its digest is {digest}, and '
                    f'{str(meta[name])[:16]!a} in checkpoint {step}); put the original back, or copy the run again'
                )


def _origin(paths: layout.Paths, source: Source) -> str:
    """Where the data is from, as an error begins."""
    if paths.data.exists():
        return f'--run_dir: {paths.data}'
    if source.vectors or source.corpus:
        return f'--vectors: {source.vectors}' if source.vectors else f'--corpus: {source.corpus}'
    return f"--run_dir: {paths.root} has no data.npz, and gensim's sample of Wikipedia"
