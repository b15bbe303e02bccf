"""Says what a run suffers from, since which step, why, and which flags avert it.

    jaxrnn diagnose --run_dir=runs/first
    jaxrnn diagnose --run_dir=runs/question --model=my_module:make     # a training by Keras
    jaxrnn diagnose --run_dir=runs/mine --program=my_module:replay     # a loop of your own

Bisects the run as jaxrnn bisect does, makes seven checks, and replays the steps before the symptom under one change
at a time, beside a control without a change: what averts the symptom there is what it advises.
"""

import sys

from absl import flags

from jaxrnn.cli import common, invocation, own_runs


def define_flags() -> None:
    common.define_run('The directory of the run.')
    common.define_source()
    own_runs.define_flags()
    common.define_detectors('diagnose')
    common.define(
        'diagnose',
        'fresh_runs',
        0,
        'How many of the remedies that avert the symptom are trained with from the start, too, with another seed.',
        at_least=0,
        at_most=common.MOST,
    )
    common.define(
        'diagnose', 'budget_steps', None,
        'Steps that may be replayed in all; if not given, 2000 beside those that find the step.',
        at_least=1, at_most=common.MOST,
    )  # fmt: skip


def main(arguments: list[str]) -> int:
    from jaxrnn import environment
    from jaxrnn.cli import showing
    from jaxrnn.report import advised_flags, render_diagnosis, report
    from jaxrnn.types import UserError
    from jaxrnn.words import investigation, signals

    if arguments:
        raise UserError(f'{arguments[0]!r} found, flags only expected; see --help')
    directory, detectors = common.run_dir(), common.detectors()
    environment.keep_compiled()
    if own_runs.is_one('diagnose', directory):
        return own_runs.diagnose(directory)
    with showing.Progressing():
        found = investigation.diagnose_run(
            directory,
            detectors,
            budget=flags.FLAGS.budget_steps,
            fresh_runs=flags.FLAGS.fresh_runs,
            good=flags.FLAGS.good,
            bad=flags.FLAGS.bad,
            source=common.source(),
            say=lambda line: common.say(f'{line} …'),
        )
    diagnosis, opened = found.diagnosis, found.bisected.opened
    inspected = found.bisected.inspected
    words = () if inspected is None else investigation.words_of(opened, inspected.step)
    added = advised_flags(diagnosis)
    command, following = _advised(added, directory.rstrip('/'))
    if not flags.FLAGS.json:  # before the page, for which there may be no room on the disk
        common.console().print(render_diagnosis(diagnosis, found.report, found.bisected.inspected, words))
        common.say(*(['', following] if following else []), file=sys.stdout)
        if following and (start := _switched_on_at(added, found.report)) is not None:
            common.say(_branched(added, directory.rstrip('/'), start), file=sys.stdout)
    page = report(
        directory, diagnosis, found.report, inspected=found.bisected.inspected, words=words, command=command,
        alarms=signals.ALARMS,
    )  # fmt: skip
    if flags.FLAGS.json:
        common.print_json(diagnosis.to_json())
    else:
        common.say(f'page: {page}', file=sys.stdout)
    if diagnosis.replay.first_mismatch is not None:
        return common.IRREPRODUCIBLE
    return common.HEALTHY if diagnosis.symptom is None else common.DIVERGED


def _switched_on_at(added, report) -> int | None:
    """The step at which what is advised was switched on, and averted the symptom; None of what a run starts from."""
    tried = () if report is None else report.outcomes
    initial = any(outcome.change.initial for outcome in tried if outcome.change.flags == added)
    return None if report is None or report.window is None or initial else report.window.start


def _branched(added: str, directory: str, start: int) -> str:
    """The line that says how to go on from where it was proven, without training what was good again."""
    typed = f'--flagfile={directory}/flags.txt', f'--branch_from={directory}', f'--branch_at={start}'
    line = f'{invocation.line("train", *typed, f"--run_dir={directory}-2")} {added}'
    return f'or from step {start} on, where it was replayed: {line}'


def _advised(added: str, directory: str) -> tuple[str, str]:
    """The command that trains as is advised, and what says so on a terminal; '' where nothing is advised."""
    if not added:
        return '', ''
    typed = f'--flagfile={directory}/flags.txt', f'--run_dir={directory}-2'
    return f'{invocation.line("train", *typed)} {added}', f'{invocation.following("train", *typed)} {added}'
