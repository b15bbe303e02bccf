"""Evaluates one step of a run equation by equation, and tells where in it the first NaN or infinity was born.

    python scripts/trace.py --run_dir=runs/first --step=1302

It names the operation with its source line, the pass, the layer, the time step and the words, and what went in and
came out. What was bad but reached no output is listed as harmless. bisect.py does the same for the step it names.
"""

import sys

sys.path[0] = sys.path[0].removesuffix('scripts')  # else this folder's trace.py hides Python's own

from absl import flags
from rich.console import Console

from scripts import common


def main(arguments: list[str]) -> int:
    from jaxrnn import report, run
    from jaxrnn.types import UserError

    if arguments:
        raise UserError(f'{arguments[0]!r} found, flags only expected; see --help')
    directory, step = common.run_dir(), flags.FLAGS.step
    if step is None:
        raise UserError(
            '--step: nothing found, the number of a step expected; bisect.py finds the first bad one'
        )
    story, words = run.trace_run(directory, step)
    if flags.FLAGS.json:
        common.print_json(report.story_json(story, step, words))
    else:
        Console(soft_wrap=True).print(report.told(story, step, words))
    return common.HEALTHY if story.finding is None else common.DIVERGED


common.define_run('The directory of the run.')
common.define('trace', 'step', None, 'The step to look into.')

if __name__ == '__main__':
    common.main(main, __doc__)
