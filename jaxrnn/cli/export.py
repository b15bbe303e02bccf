"""Writes a run's records as CSV, Parquet, TensorBoard events, an MLflow store or a W&B run.

    jaxrnn export --run_dir=runs/first --to=csv --out=first.csv
    jaxrnn export --run_dir=runs/first --to=tensorboard --out=logs/first

All fields and all steps, of any run: also of a loop of your own, and of a training by Keras. Nothing is sent anywhere.
"""

from absl import flags

from jaxrnn import exports
from jaxrnn.cli import common
from jaxrnn.errors import UserError
from jaxrnn.escaping import as_shell_word


def define_flags() -> None:
    common.define_run('The directory of the run.')
    common.define('export', 'to', 'csv', 'The format.', tuple(exports.FORMATS))
    common.define(
        'export', 'out', '', 'The new file (csv, parquet) or folder (the others); nothing may be there yet.'
    )


def main(arguments: list[str]) -> int:
    if arguments:
        raise UserError(f'{arguments[0]!r} found, flags only expected; see --help')
    made = exports.export(common.run_dir(), to=flags.FLAGS.to, out=flags.FLAGS.out)
    common.say(f'{made.records:,} records of {made.fields:,} fields written to {made.out}')
    if flags.FLAGS.json:
        common.print_json({'records': made.records, 'fields': made.fields, 'out': str(made.out)})
    elif opened_by := exports.FORMATS[flags.FLAGS.to].opened_by:
        common.say(f'next: {opened_by.format(out=as_shell_word(str(made.out)))}')
    return common.HEALTHY
