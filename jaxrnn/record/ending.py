"""What ends a run before its last step: a signal, its time, or that it hangs. And what has it save in between.

SIGTERM, SIGINT, SIGHUP     it ends after the step into which they fall, with a checkpoint
SIGUSR1                     a checkpoint before the next step, and on
max_minutes                 as SIGTERM, by the clock
step_timeout                the process is ended where it hangs, by another one
"""

import contextlib
import logging
import mmap
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from types import FrameType

from jaxrnn.record import watchdog

log = logging.getLogger('jaxrnn')

ENDING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
SAVING = signal.SIGUSR1


class Signals:
    """Which signals came."""

    caught: int | None = None
    """The one that ends the run."""

    _save = False

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if number == SAVING:
            self._save = True
            return
        if self.caught is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.caught = number

    def save(self) -> bool:
        """Whether a checkpoint was asked for since this was last asked."""
        asked, self._save = self._save, False
        return asked


@contextlib.contextmanager
def signals() -> Iterator[Signals]:
    """Signals noted rather than obeyed; left alone outside the main thread, where Python has no say. A SIGHUP that is
    ignored stays ignored: so `nohup` has it."""
    noted, before = Signals(), {}
    try:
        for number in (*ENDING, SAVING):
            if number == signal.SIGHUP and signal.getsignal(number) is signal.SIG_IGN:
                continue
            before[number] = signal.signal(number, noted)
    except ValueError:
        pass
    try:
        yield noted
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Clock:
    """Whether a run's time is over.

    Args:
        minutes: that it has from now on; 0 for no end.
        first: the step that it begins with, which is done whatever the time: else it would never get on.
    """

    over = False

    def __init__(self, minutes: float, first: int):
        self._until = time.monotonic() + 60 * minutes if minutes else float('inf')
        self._first = first

    def __call__(self, number: int) -> bool:
        """Before step `number`."""
        self.over = self.over or (number > self._first and time.monotonic() >= self._until)
        return self.over


OPENING, BATCH, STEP, RECORD, CHECKPOINT = range(len(watchdog.DOING))
"""What a run can be doing when it hangs."""


class Watchdog:
    """Has the process ended where no step finishes, by a process beside it: see `watchdog`.

    Args:
        timeout: seconds; 0 for no end, and no other process.
    """

    def __init__(self, timeout: float):
        self._finished = 0
        self._process: subprocess.Popen | None = None
        self._shared: mmap.mmap | bytearray = bytearray(watchdog.STATE.size)
        if timeout:
            self._start(timeout)

    def __call__(self, doing: int, step: int) -> None:
        """Notes what is being done, and for which step."""
        watchdog.STATE.pack_into(self._shared, 0, self._finished, step, doing)

    def finished(self) -> None:
        """Notes that a step has finished."""
        self._finished += 1

    def close(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def _start(self, timeout: float) -> None:
        try:
            memory = os.memfd_create('jaxrnn')
            try:
                os.truncate(memory, watchdog.STATE.size)
                self._shared = mmap.mmap(memory, watchdog.STATE.size)
                words = [os.path.abspath(watchdog.__file__), os.getpid(), memory, timeout]
                # Isolated, and without site-packages: it starts in a fiftieth of a second.
                self._process = subprocess.Popen(
                    [sys.executable, '-I', '-S', *map(str, words)], stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL, pass_fds=[memory], cwd='/',
                )  # fmt: skip
            finally:
                os.close(memory)
        except (OSError, AttributeError) as error:
            log.warning('--step_timeout: nothing watches this run, as no process could be started: %s', error)


@contextlib.contextmanager
def watch(timeout: float) -> Iterator[Watchdog]:
    """A `Watchdog`, closed at the end."""
    watching = Watchdog(timeout)
    try:
        yield watching
    finally:
        watching.close()
