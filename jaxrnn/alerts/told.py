"""What a run's alerts were: one JSON line each, which a scheduler can read, and by which none is told twice."""

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxrnn import files
from jaxrnn.record.record_file import encoded
from jaxrnn.types import UserError

log = logging.getLogger('jaxrnn')

SIGN, SYMPTOM = 'sign', 'symptom'
"""Kinds of alerts."""


class Told:
    """The alerts of a run so far.

    Args:
        path: of their file, which need not be there.

    Raises:
        UserError: something else than a file of some lines is there.
    """

    def __init__(self, path: Path):
        self._path = path
        content = b''
        try:
            content = files.read_bytes(path)
        except (FileNotFoundError, NotADirectoryError):
            pass
        except OSError as error:
            raise UserError(f'{path} can not be read ({error.strerror})') from error
        self._known = {key for line in content.splitlines() if (key := _key_of(line)) is not None}
        self._torn = bool(content) and not content.endswith(b'\n')

    def has(self, kind: str, symptom: str) -> bool:
        """Whether a symptom of a name, or any sign, was told."""
        return _key(kind, symptom) in self._known

    def note(self, alert: Mapping[str, Any]) -> None:
        """Writes an alert down, before it is told: who is killed between the two tells nobody twice."""
        self._known.add(_key(alert['kind'], alert['symptom']))
        line = f'{json.dumps(encoded(alert))}\n'.encode()
        try:
            with files.open_appending(self._path, anew=False) as file:
                file.write(b'\n' + line if self._torn else line)
        except (OSError, UserError) as error:
            log.warning('%s: an alert can not be written down: %s', self._path, error)
        else:
            self._torn = False


def _key(kind: str, symptom: str) -> tuple[str, str]:
    return (kind, '' if kind == SIGN else symptom)


def _key_of(line: bytes) -> tuple[str, str] | None:
    """Of a line that was written whole; somebody else may have written it."""
    try:
        found = files.parse_json(line.decode(), 'alert')
        kind, symptom = found['kind'], found['symptom']
    except (UserError, ValueError, KeyError, TypeError):
        return None
    return _key(kind, symptom) if isinstance(kind, str) and isinstance(symptom, str) else None
