"""A process that ends another one in which no step finishes; `ending.Watchdog` starts it.

It is a process of its own, so that nothing need work in the one that hangs, and imports next to nothing, so that it
costs next to nothing. It shares the memory of a few numbers with the other: see `STATE`.
"""

import contextlib
import mmap
import os
import select
import signal
import struct
import sys
import time

STATE = struct.Struct('<QQQ')
"""Steps finished; the step that is worked at; at what, as a place in DOING."""

DOING = (
    'the run is still being opened, at step {}',
    'the batch of step {} is still being made',
    'step {} is still being computed',
    'the record of step {} is still being written',
    'a checkpoint is still being written, at step {}',
)

FIRST = 10
"""How many times as long the first step may take: it compiles."""

TICK = 1.0
"""Seconds between looks; of shorter limits a twentieth."""

PATIENCE = 5.0
"""Seconds after which a process that SIGALRM doesn't end is killed."""


def message(waited: float, doing: int, step: int) -> str:
    """The line that is said."""
    what = DOING[doing].format(f'{step:,}')
    return (
        f'jaxrnn: --step_timeout: no step finished in {round(waited, 1):,g} s: {what}; the process is ended, and all '
        'records and checkpoints so far are kept: run the same command again to resume'
    )


def watch(parent: int, shared: mmap.mmap, timeout: float) -> None:
    """Looks until the other process ends or is to be ended. Counts its own time, in which it is awake: another's would
    go on while both are stopped."""
    tick, waited, seen = min(TICK, timeout / 20), 0.0, 0
    while os.getppid() == parent:
        time.sleep(tick)
        finished, step, doing = STATE.unpack_from(shared)
        if finished != seen:
            seen, waited = finished, 0.0
        elif not _stopped(parent):
            waited += tick
        if waited >= timeout * (1 if finished else FIRST):
            _say(message(waited, doing, step))
            _end(parent)
            return


def _stopped(process: int) -> bool:
    """Whether it is stopped, or held by a debugger."""
    try:
        with open(f'/proc/{process}/stat', 'rb') as file:
            return file.read().rpartition(b')')[2].split()[0] in (b'T', b't')
    except (OSError, IndexError):
        return False


def _say(line: str) -> None:
    """Unless nobody takes it: what doesn't end must be ended all the same."""
    # A bar that a terminal shows has hidden the cursor.
    around = ('\r\x1b[K', '\x1b[?25h') if os.isatty(2) else ('', '')
    waiting = select.poll()
    waiting.register(2, select.POLLOUT)
    if waiting.poll(1000):
        with contextlib.suppress(OSError):
            os.write(2, f'{around[0]}{line}\n{around[1]}'.encode())


def _end(process: int) -> None:
    os.kill(process, signal.SIGALRM)
    until = time.monotonic() + PATIENCE
    while time.monotonic() < until and os.getppid() == process:
        time.sleep(0.05)
    if os.getppid() == process:
        os.kill(process, signal.SIGKILL)


def main() -> None:
    # What a scheduler or a terminal sends to all processes of a job is meant for the other one.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    parent, memory, timeout = int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])
    watch(parent, mmap.mmap(memory, STATE.size, prot=mmap.PROT_READ), timeout)


if __name__ == '__main__':
    main()
