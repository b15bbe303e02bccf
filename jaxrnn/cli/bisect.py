"""Finds the exact step at which a run broke, and proves it by replaying the run bit for bit.

    jaxrnn bisect --run_dir=runs/first
    jaxrnn bisect --run_dir=runs/first --when='loss > 3 * median(loss, 200)'
    jaxrnn bisect --run_dir=runs/question --model=my_module:make     # a training by Keras
    jaxrnn bisect --run_dir=runs/mine --program=my_module:replay     # a loop of your own

A rule for --when compares fields of the records (see the first line of records.jsonl; also step, all_finite) with
+ - * / **, and, or, not, and these functions: median, mean, max, min, std, spread (x, n) over the n steps before;
smooth (x, n) over the n steps up to this one; prev (x, n); abs, log, sqrt, finite (x).
"""

import sys

from absl import flags

from jaxrnn.cli import common, invocation, own_runs


def define_flags() -> None:
    common.define_run('The directory of the run.')
    common.define_source()
    own_runs.define_flags()
    common.define_detectors('bisect')
    common.define(
        'bisect', 'records', True, "Use the run's records; else bisect its checkpoints, as if they were lost."
    )
    common.define(
        'bisect',
        'verify',
        False,
        'Replay the whole run, symptom or not: finds what was silently computed wrongly.',
    )


def main(arguments: list[str]) -> int:
    from jaxrnn import environment
    from jaxrnn.cli import showing
    from jaxrnn.report import render_bisection
    from jaxrnn.types import UserError
    from jaxrnn.words import investigation

    if arguments:
        raise UserError(f'{arguments[0]!r} found, flags only expected; see --help')
    directory, detectors = common.run_dir(), common.detectors()
    environment.keep_compiled()
    if own_runs.is_one('bisect', directory):
        return own_runs.bisect(directory)
    bounds = {'good': flags.FLAGS.good, 'bad': flags.FLAGS.bad}
    with showing.Progressing():
        found = investigation.bisect_run(
            directory,
            detectors,
            use_records=flags.FLAGS.records,
            verify=flags.FLAGS.verify,
            source=common.source(),
            **bounds,
        )
    diagnosis, opened = found.diagnosis, found.opened
    step, inspected = diagnosis.first_bad_step, found.inspected
    if flags.FLAGS.json:
        common.print_json(diagnosis.to_json())
    else:
        words = () if inspected is None else investigation.words_of(opened, inspected.step)
        common.console().print(render_bisection(diagnosis, found.rows, words, found.inspected))
        if step is not None:
            common.say(invocation.following('diagnose', f'--run_dir={directory}'), file=sys.stdout)
    if diagnosis.replay.first_mismatch is not None:
        return common.IRREPRODUCIBLE
    return common.HEALTHY if diagnosis.symptom is None else common.DIVERGED
