"""Makes a page of a run: what broke, when it began, why, and what to type.

    jaxrnn report --run_dir=runs/first

One file, report.html in the run's directory, that opens from the disk and can be sent to others. It is made of the
run's records, and of what `jaxrnn diagnose` found, if it was asked.
"""

import sys

from absl import flags

from jaxrnn.cli import common, own_runs


def define_flags() -> None:
    common.define_run('The directory of the run.')
    common.define('report', 'out', '', 'Where the page is put; report.html in the run if not given.')


def main(arguments: list[str]) -> int:
    from jaxrnn.report import page
    from jaxrnn.types import UserError

    if arguments:
        raise UserError(f'{arguments[0]!r} found, flags only expected; see --help')
    made = page.write(common.run_dir(), own_runs.alarms_of(common.run_dir()), path=flags.FLAGS.out)
    common.say(str(made), file=sys.stdout)
    return common.HEALTHY
