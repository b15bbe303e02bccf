"""Trains an LSTM or GRU that maps a word, letter by letter, to its vector.

    jaxrnn train --network=stacked --hidden=128 --run_dir=runs/first

Leaves a run in --run_dir: config.json, flags.txt, data.npz, records.jsonl (one line a step), checkpoints/,
evaluation.json, diagnosis.json. The same command again resumes it. Then jaxrnn diagnose says at which step it broke
and why, and jaxrnn embed asks it for vectors.
"""

import contextlib
import signal
import time
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any, cast

from absl import flags
from rich.console import Console

from jaxrnn.cli import common, invocation
from jaxrnn.cli.showing import LINE_EVERY, bar


def define_flags() -> None:
    common.define_run('Where the run lives; made if need be.', default='runs/default')
    common.define('run', 'branch_from', '', BRANCH_FROM)
    common.define('run', 'branch_at', None, BRANCH_AT, at_least=0, at_most=common.MOST)
    common.define_config()
    common.define('alerts', 'on_symptom', '', ON_SYMPTOM)


BRANCH_FROM = 'A run to go on from, in a directory of its own, under other flags: its state at --branch_at.'
BRANCH_AT = (
    'The first step that is made under the other flags; any that the checkpoints of --branch_from reach to.'
)

ON_SYMPTOM = (
    'A command that is run at the first sign of trouble, and at each kind of symptom: {run}, {symptom}, {step} and '
    '{kind} (sign or symptom) in it are filled in. Without a shell. Also writes alerts.jsonl.'
)


def _branch():
    """Where the run begins, if not at its own start. Raises UserError where only half of it is said."""
    from jaxrnn.types import UserError
    from jaxrnn.words import branching

    run, step = flags.FLAGS.branch_from, flags.FLAGS.branch_at
    if bool(run) != (step is not None):
        raise UserError('--branch_from and --branch_at: one of them found, both or none expected')
    return branching.Branch(run, step) if run else None


class Display:
    """A bar on a terminal, a line now and then elsewhere; on standard error, which leaves the result its place."""

    def __init__(self, console: Console, total: int):
        self.console, self.total = console, total
        self.first: tuple[int, float] | None = None
        self.spoke = time.monotonic()
        self.progress = bar(console)
        self.task = self.progress.add_task('compiling', total=total)

    def __call__(self, row: Mapping[str, Any]) -> None:
        step, now = row['step'], time.monotonic()
        self.first = self.first or (step, now)
        rate = (step - self.first[0]) / max(now - self.first[1], 1e-9)
        seen = f'loss {row["loss"]:.3g} accuracy {row.get("accuracy", float("nan")):.2f} {rate:.1f} steps/s'
        self.progress.update(self.task, completed=step + 1, description=seen)
        if not self.console.is_terminal and now - self.spoke > LINE_EVERY:
            self.spoke = now
            common.say(f'step {step + 1:,} of {self.total:,}: {seen}')


def main(arguments: list[str]) -> int:
    from jaxrnn import environment
    from jaxrnn.alerts import Alerts
    from jaxrnn.report import render_training
    from jaxrnn.types import UserError
    from jaxrnn.words import branching, run

    if arguments:
        raise UserError(f'{arguments[0]!r} found, flags only expected; see --help')
    signal.signal(
        signal.SIGUSR1, signal.SIG_IGN
    )  # it asks for a checkpoint: while none can be made, for nothing
    config, directory = common.config_from_flags(), common.run_dir()
    branch = _branch()
    command = common.typed('on_symptom')
    alerts = Alerts(directory, command=command) if command else None
    environment.keep_compiled()
    if branch is not None:
        branching.begin(branch, Path(directory), config)
    console = common.console(file=cast(IO[str], common.Lasting()))
    display = Display(console, config.loop.max_steps)
    with display.progress, alerts or contextlib.nullcontext():
        trained = run.train_run(
            config,
            directory,
            allow_pickle=common.pickle_allowed(),
            say=common.say,
            on_row=display,
            alerts=alerts,
        )
    result, diagnosis = trained.result, trained.diagnosis
    if flags.FLAGS.json:
        common.print_json(diagnosis.to_json())
    else:
        console.print(render_training(diagnosis, trained.evaluation))
    if result.interrupted is not None:
        common.say(f'saved at step {result.step:,}; run the same command again to resume')
        return 128 + result.interrupted
    if result.timed_out:
        common.say(
            f'saved at step {result.step:,}: --max_minutes are over; run the same command again to resume'
        )
        return common.OUT_OF_TIME
    if result.first_mismatch is not None:
        return common.IRREPRODUCIBLE
    if diagnosis.symptom is None:
        return common.HEALTHY
    common.say(invocation.following('diagnose', f'--run_dir={directory}'))
    return common.DIVERGED
