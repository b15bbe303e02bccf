"""A user's command, started beside a training. What comes of it is a warning at most."""

import contextlib
import logging
import os
import re
import shlex
import signal
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Self

from jaxrnn.types import UserError

log = logging.getLogger('jaxrnn')

PLACEHOLDERS = ('run', 'symptom', 'step', 'kind', 'value', 'time', 'means')
"""Fields of an alert."""

PATIENCE = 10.0
"""Seconds that commands may take when the training is over."""

_PLACE = re.compile(r'\{(\w+)\}')


class Command(NamedTuple):
    """A command as words, with places for what an alert says."""

    words: tuple[str, ...]

    @classmethod
    def parsed(cls, text: str) -> Self:
        """Splits as a shell does, and does nothing else of what it does. Raises UserError for what can't be read."""
        try:
            words = shlex.split(text)
        except ValueError as error:
            raise UserError(f'--on_symptom: {text!r} can not be split into words ({error})') from None
        if not words or '\0' in text:
            raise UserError(f'--on_symptom: {text!r} found, a command expected')
        for place in _PLACE.findall(text):
            if place not in PLACEHOLDERS:
                known = ', '.join(f'{{{name}}}' for name in PLACEHOLDERS)
                raise UserError(f'--on_symptom: {{{place}}} found, one of {known} expected')
        return cls(tuple(words))

    def filled(self, alert: Mapping[str, Any]) -> list[str]:
        """The words of one alert: what it says stays within the word that it stands in, whatever it is.

        >>> Command.parsed('mail -s "{symptom} at {step}" me').filled({'symptom': 'a; b', 'step': 3})
        ['mail', '-s', 'a; b at 3', 'me']
        """
        return [_PLACE.sub(lambda place: str(alert[place[1]]), word) for word in self.words]


class Runner:
    """Starts commands, each waited for by a thread, so that none is left over when it has ended."""

    def __init__(self) -> None:
        self._waiting: list[_Started] = []

    def start(self, words: Sequence[str]) -> None:
        """Starts a command and returns."""
        self._waiting = [started for started in self._waiting if started.thread.is_alive()]
        started = _Started(words)
        self._waiting.append(started)
        started.thread.start()

    def close(self, patience: float = PATIENCE) -> None:
        """Waits for all, and ends those that take longer."""
        until = time.monotonic() + patience
        for started in self._waiting:
            started.thread.join(max(until - time.monotonic(), 0))
            if started.thread.is_alive():
                started.end(patience)
        self._waiting = []


class _Started:
    """One command that was started."""

    def __init__(self, words: Sequence[str]):
        self._words = words
        self._process: subprocess.Popen | None = None
        self._ended = False
        self.thread = threading.Thread(target=self._run, name='jaxrnn-alert', daemon=True)

    def end(self, patience: float) -> None:
        self._ended = True
        log.warning('--on_symptom: %s did not end within %g s, and is ended', self._words[0], patience)
        if self._process is not None:
            with contextlib.suppress(OSError):
                os.killpg(self._process.pid, signal.SIGKILL)  # with what it has started
        self.thread.join(1)

    def _run(self) -> None:
        try:
            self._process = subprocess.Popen(
                self._words, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                start_new_session=True,  # Ctrl-C ends the training, and not what tells of it
            )  # fmt: skip
        except (OSError, ValueError) as error:
            why = getattr(error, 'strerror', None) or error
            log.warning('--on_symptom: %s can not be started (%s)', self._words[0], why)
            return
        code = self._process.wait()
        if code and not self._ended:
            log.warning('--on_symptom: %s ended with exit code %d', self._words[0], code)
