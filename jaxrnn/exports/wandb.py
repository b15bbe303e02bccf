"""A folder with an offline run of Weights & Biases, which `wandb sync` sends when its owner wants it sent."""

import secrets
from pathlib import Path

from jaxrnn.errors import UserError
from jaxrnn.exports import Recorded, environ, names, numbers

OFFLINE = {'WANDB_ERROR_REPORTING': 'false'}
"""W&B reports its own errors to its makers, unless it is told not to before it is imported."""

with environ.variables(**OFFLINE):
    import wandb

PROJECT = 'jaxrnn'


def write(run: Recorded, path: Path) -> None:
    """Nothing of the machine is noted: no name, no source, no measurements. Raises UserError where W&B refuses."""
    path.mkdir()
    with environ.variables(**OFFLINE):
        try:
            _write(run, path)
        except wandb.Error as error:
            raise UserError(f'--to=wandb: W&B refuses: {error}') from error
    _tidy(path)


def _write(run: Recorded, path: Path) -> None:
    settings = wandb.Settings(
        console='off', disable_code=True, disable_git=True, disable_job_creation=True, silent=True,
        x_disable_machine_info=True, x_disable_meta=True, x_disable_stats=True, host='',
    )  # fmt: skip
    made = wandb.init(
        project=PROJECT, name=run.name, id=secrets.token_hex(4), dir=path, mode='offline', settings=settings,
        reinit='create_new',  # the process may have a run of its own
    )  # fmt: skip
    try:
        for row in numbers.rows(run, _as_key):
            made.log({name: _number(value) for name, value in row.values.items()}, step=row.step)
    finally:
        made.finish()


def _as_key(name: str) -> str:
    """W&B has a use of its own for names that begin with an underscore."""
    word = names.as_word(name)
    return word if word[0].isalpha() else f'field{word}'


def _number(value: float | int | bool) -> float | int:
    return int(value) if isinstance(value, bool) else value


def _tidy(path: Path) -> None:
    """Takes away its logs, and links to them, which name the folder that it was written in."""
    for left in (*(path / 'wandb').iterdir(), *(path / 'wandb').glob('offline-run-*/logs/*')):
        if left.is_symlink() or left.suffix == '.log':
            left.unlink()
