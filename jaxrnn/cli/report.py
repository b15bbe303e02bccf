"""Makes a page of a run: what broke, when it began, why, and what to type.

    jaxrnn report --run_dir=runs/first

One file, report.html in the run's directory, that opens from the disk and can be sent to others. It is made of the
run's records, and of what `jaxrnn diagnose` found, if it was asked.
"""

import sys
from pathlib import Path

from absl import flags

from jaxrnn.cli import common, own_runs


def define_flags() -> None:
    common.define_run('The directory of the run.')
    common.define('report', 'out', '', 'Where the page is put; report.html in the run if not given.')
    common.define(
        'report', 'images', '', 'A folder: no page is made, and each figure is saved there, for a paper.'
    )
    common.define('report', 'format', 'png', 'Of these: png or svg.', choices=('png', 'svg'))


def main(arguments: list[str]) -> int:
    from jaxrnn.report import page
    from jaxrnn.types import UserError

    if arguments:
        raise UserError(f'{arguments[0]!r} found, flags only expected; see --help')
    alarms = own_runs.alarms_of(common.run_dir())
    if folder := flags.FLAGS.images:
        from jaxrnn.report import images

        drawn, _ = page.figures_of(page.read(Path(common.run_dir())), alarms)
        for path in images.save(drawn, Path(folder), flags.FLAGS.format):
            common.say(str(path), file=sys.stdout)
        return common.HEALTHY
    made = page.write(common.run_dir(), alarms, path=flags.FLAGS.out)
    common.say(str(made), file=sys.stdout)
    return common.HEALTHY
