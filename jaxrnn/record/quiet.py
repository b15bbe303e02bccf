"""What orbax's threads print of a failed write that is also raised, and said in one line. All else is printed as ever.

When one of the things that it does at once fails, the others are still being done. They end a little later, in threads
of their own, where nobody waits for them any more. Three places print what becomes of them: see `Quiet`.
"""

import logging
import re
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

ABSL, ASYNCIO = logging.getLogger('absl'), logging.getLogger('asyncio')


class Quiet:
    """Keeps quiet, from `begin` to `end`, what is raised anyway of failed writes below a folder.

    1. orbax logs each failure with its traceback, once a thread.
    2. asyncio logs a failure that nobody asked for. It has the name of the folder, as tensorstore's have, or comes from
       orbax.
    3. tensorstore calls back into the loop of events that waited for it. It is closed by then, and Python prints that
       through sys.unraisablehook. It has no name of anything; all its frames are asyncio's.
    """

    def __init__(self, folder: Path):
        self._folder = str(folder)
        self._printed: Callable[[Any], Any] = sys.unraisablehook
        # One object, not a new one each time that it is asked for.
        self._hook = self._unraisable

    def begin(self) -> None:
        ABSL.addFilter(_is_no_traceback)
        ASYNCIO.addFilter(self._is_of_others)
        self._printed, sys.unraisablehook = sys.unraisablehook, self._hook

    def end(self) -> None:
        ABSL.removeFilter(_is_no_traceback)
        ASYNCIO.removeFilter(self._is_of_others)
        if sys.unraisablehook is self._hook:  # else somebody has put theirs over it, and may put ours back
            sys.unraisablehook = self._printed

    def _is_of_others(self, record: logging.LogRecord) -> bool:
        if not record.exc_info:
            return True
        _, error, found = record.exc_info
        return self._folder not in str(error) and not any('orbax' in file.parts for file in _files(found))

    def _unraisable(self, found: Any) -> None:
        if not (found.object is None and _is_of_closed_loop(found.exc_value, found.exc_traceback)):
            self._printed(found)


def _is_no_traceback(record: logging.LogRecord) -> bool:
    return not (record.exc_info and 'orbax' in Path(record.pathname).parts)


def _is_of_closed_loop(error: Any, found: Any) -> bool:
    """Whether something was to be told to a loop of events that is closed, from outside of Python."""
    closed = isinstance(error, RuntimeError) and str(error) == 'Event loop is closed'
    return closed and all('asyncio' in file.parts for file in _files(found))


def _files(found: TracebackType | None) -> Iterator[Path]:
    """Where the frames of a traceback are from."""
    return (Path(frame.f_code.co_filename) for frame, _ in traceback.walk_tb(found))


class Aside:
    """Does things in threads that keep no process alive; and so do those that are begun there.

    When Python ends it stops such threads wherever they are; one that is in C++ then aborts the process. So where they
    should be about to end, they are waited for: see `settle`.
    """

    def __init__(self) -> None:
        self._begun: list[threading.Thread] = []

    def __call__(self, action: Callable[[], Any], most: float | None = None) -> Any:
        """Does one thing, and waits for it.

        Args:
            action: what to do.
            most: seconds to wait; None for no end.

        Returns:
            What it returns. Raises what it raises, and TimeoutError where it takes longer.
        """
        done: list[Any] = []
        failed: list[BaseException] = []

        def run() -> None:
            before = threading.enumerate()
            try:
                done.append(action())
            except BaseException as error:
                failed.append(error)
            finally:
                self._begun += [each for each in threading.enumerate() if each not in before and _ends(each)]

        thread = threading.Thread(target=run, name='jaxrnn checkpoint', daemon=True)
        self._begun = [thread, *(each for each in self._begun if each.is_alive())]
        thread.start()
        thread.join(most)
        if failed:
            raise failed[0]
        if not done:
            raise TimeoutError(f'it takes more than {most:g} seconds')
        return done[0]

    def settle(self, most: float) -> None:
        """Waits for the threads that were begun, in all so many seconds at most."""
        until = time.monotonic() + most
        for thread in list(self._begun):
            threading.Thread.join(
                thread, max(until - time.monotonic(), 0)
            )  # orbax's own raises what failed in it


OF_POOL = re.compile(r'_\d+$')
"""How concurrent.futures calls its threads. They wait for work until Python ends, which waits for them by itself."""


def _ends(thread: threading.Thread) -> bool:
    return thread.daemon and not OF_POOL.search(thread.name)
