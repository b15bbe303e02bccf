"""What is shown while something takes long: a bar on a terminal, a line now and then elsewhere; on standard error,
which leaves the result its place."""

import time
from typing import IO, Any, Self, cast

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeRemainingColumn,
)

from jaxrnn import progress
from jaxrnn.cli import common
from jaxrnn.escaping import visible

LINE_EVERY = 15.0
"""Seconds between lines where the output isn't a terminal."""

PER_SECOND = 8
"""Times that a bar is drawn anew: a step may take a tenth of a millisecond."""


def bar(console: Console) -> Progress:
    """A bar with the time that is left; nothing where the console is no terminal."""
    columns = (BarColumn(), MofNCompleteColumn(), TextColumn('{task.description}'), TimeRemainingColumn())
    return Progress(*columns, console=console, disable=not console.is_terminal)


class Progressing:
    """Shows what `jaxrnn.progress` tells, while it is entered; on a terminal it is gone afterwards."""

    def __init__(self, console: Console | None = None):
        self._console = console or common.console(file=cast(IO[str], common.Lasting()))
        columns = (
            SpinnerColumn(),
            TextColumn('{task.description}'),
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
        )
        self._bar = Progress(
            *columns, console=self._console, transient=True, disable=not self._console.is_terminal
        )
        self._task = self._bar.add_task('', total=None)
        self._doing = ''
        self._drawn = 0.0
        self._spoke = time.monotonic()

    def __enter__(self) -> Self:
        self._bar.start()
        self._heard = progress.heard_by(self._told)
        self._heard.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._heard.__exit__(None, None, None)
        self._bar.stop()

    def _told(self, doing: str, done: int, total: int) -> None:
        now = time.monotonic()
        if doing != self._doing:
            self._doing = doing
            self._bar.reset(self._task, total=total or None, completed=done, description=visible(doing))
        elif now - self._drawn >= 1 / PER_SECOND:
            self._bar.update(self._task, total=total or None, completed=done)
        else:
            return
        self._drawn = now
        if not self._console.is_terminal and now - self._spoke > LINE_EVERY:
            self._spoke = now
            common.say(f'{doing}: {done:,} of {total:,} steps' if total else doing)
