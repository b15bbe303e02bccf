"""Records on disk: one JSON line a step, written as it is known, and read in blocks."""

import contextlib
import errno
import io
import itertools
import json
import logging
import math
import operator
import os
import re
import shutil
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import orjson  # in half the standard library's time; it refuses what is nested too deeply

from jaxrnn import files
from jaxrnn.record.records import BLOCK, STEP, Builder, Records, Row
from jaxrnn.types import UserError

log = logging.getLogger('jaxrnn')

CHUNK = 256 << 10
"""Bytes read at once: what a processor keeps near. Of 4 MB, reading takes a sixth longer."""

MOST_LINE = 4 << 20
"""Bytes of a record; one of 30 fields has 600."""

MOST_STEP = 2**53
"""Of a step's number: what a column of float64 holds exactly."""

FREE_CELLS = 32 << 20
"""Values that the columns may have, and as many more as the file has bytes. If every row had a field of its own, they
would need the square of its size."""

# JSON has no NaN and no infinities; a file with Python's own spellings can't be read by other languages.
SPELLINGS = {'NaN': math.nan, 'Infinity': math.inf, '-Infinity': -math.inf}

SEAL = re.compile(rb', "(.{5})": "(.{8})"}')
"""How a line ends: `"crc32": "01234567"`, a checksum of all before it, so that a bit that flips on the disk is noticed,
be it one of the checksum or of its name. Older runs have none."""

SEAL_SIZE = len(b', "crc32": "01234567"}')

KINDS = (bool, int, float, str)
"""Of a value."""


class RecordFile:
    """The records of a run, one JSON line a step, in ascending order of steps.

    A line that a killed process left half written is dropped, and with it nothing else.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        self._file: io.FileIO | None = None
        self._named = False  # whether its name is on the disk
        self._known: _Known | None = None

    def read(self) -> Records:
        """All whole rows. Raises UserError where a line in the middle is damaged, or the file is none."""
        return _read(self.path).records

    def read_intact(self) -> Records:
        """As `read`, without the lines that are damaged."""
        return self._read().found.records

    def keep_before(self, step: int) -> Records:
        """Drops the rows of `step` and later, which a resumed run computes again, and returns them. Lines that are
        damaged are dropped, too; the file as it was is kept beside it then.

        Raises UserError where the disk refuses, or the file is none.
        """
        self.close()
        self._mend()
        found, self._known = self._read().found, None
        place = int(np.searchsorted(found.records.steps, step))
        end = found.end if place == len(found.records) else int(found.starts[place])
        if self.path.exists() and end < self.path.stat().st_size:
            os.truncate(self.path, end)
            files.sync(
                self.path
            )  # before anything is appended: else a power loss may take what is before it, too
        return found.records[place:]

    def _read(self) -> '_Known':
        """What is intact, and what isn't; read again if the file has changed."""
        now = _state_of(self.path)
        if self._known is None or self._known.state != now:
            damaged: list[_Damage] = []
            self._known = _Known(_read(self.path, damaged), damaged, now)
        return self._known

    def _mend(self) -> None:
        """Leaves damaged lines out of the file, and keeps it as it was beside it."""
        found, damaged, _ = self._read()
        if not damaged:
            return
        aside = self._copy_aside()
        kept = set(found.starts.tolist())
        self._replace(line for start, line in _lines(self.path) if start in kept)
        first, more = damaged[0], '' if len(damaged) == 1 else f', and {len(damaged) - 1} more'
        log.warning(
            '%s: line %d is not a record (%s)%s: left out; the file as it was is kept as %s',
            self.path, first.number, first.why, more, aside.name,
        )  # fmt: skip

    def append(self, row: Row) -> None:
        """Writes a row straight to the system: a process killed a moment later has lost nothing.

        Raises OSError where the system takes less than all of it.
        """
        if self._file is None:
            self._file = io.FileIO(self.path, 'a')
        written = as_line(row)
        if self._file.write(written) != len(written):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def sync(self) -> None:
        """Waits until what was appended is on the disk. Raises OSError where it can't be written."""
        if self._file is not None:
            os.fsync(self._file.fileno())
            if not self._named:
                files.sync(self.path.absolute().parent)
                self._named = True

    def insert(self, rows: Mapping[int, Row]) -> None:
        """Puts rows of steps that have none in their places, all or none. Raises UserError where the disk refuses."""
        self.close()
        steps = _read(self.path).records.steps.tolist()
        lines = (line for _, line in _lines(self.path))
        self._replace(_merged(zip(steps, lines, strict=True), rows))

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def _copy_aside(self) -> Path:
        """The file under a name of its own. Raises UserError where the disk refuses."""
        aside = files.unused(self.path.with_name(f'{self.path.stem}.damaged{self.path.suffix}'))
        with _said(aside), files.replacing(aside) as copy, files.open_regular(self.path) as file:
            shutil.copyfileobj(file, copy, CHUNK)
        return aside

    def _replace(self, lines: Iterable[bytes]) -> None:
        """Puts other lines in their place, all or none. Raises UserError where the disk refuses."""
        with _said(self.path), files.replacing(self.path) as file:
            file.writelines(lines)


class _Found(NamedTuple):
    """What a file of records holds."""

    records: Records
    starts: np.ndarray  # where the line of each starts, int64 [S]
    end: int  # of the last whole line


class _Damage(NamedTuple):
    """A line that is no record."""

    number: int  # counted from 1
    why: str


class _Known(NamedTuple):
    """What was read of a file."""

    found: _Found
    damaged: list[_Damage]
    state: tuple[int, int]  # of the file then, see `_state_of`


class _Chunk(NamedTuple):
    """Some whole lines of a file."""

    start: int  # where the first starts
    lines: Sequence[bytes]  # each without its end
    spelled: bool  # whether a NaN or an infinity may be in them
    nested: bool  # whether a value may be in them that is neither number nor text


def _read(path: Path, damaged: list[_Damage] | None = None) -> _Found:
    """All whole lines as records. Raises UserError for one that is damaged; if there is a list, it is noted there."""
    building, starts, end, number, last = Builder(), [np.zeros(0, np.int64)], 0, 0, -1
    for chunk in _chunks(path):
        ends = chunk.start + np.cumsum([len(line) + 1 for line in chunk.lines])
        for place in range(0, len(chunk.lines), BLOCK):
            lines = chunk.lines[place : place + BLOCK]
            rows, kept, bad = _parsed(lines, chunk, last)
            for at, why in bad:
                _note(path, damaged, _Damage(number + at + 1, why))
            if rows:
                _add(building, rows, int(ends[-1]), path)
                last = rows[-1][STEP]
                starts.append((ends[place : place + BLOCK] - [len(line) + 1 for line in lines])[kept])
            number += len(lines)
        end = int(ends[-1])
    return _Found(building.built(), np.concatenate(starts), end)


def _state_of(path: Path) -> tuple[int, int]:
    """When it was written last, and its size."""
    if not os.path.lexists(path):
        return 0, 0
    now = os.lstat(path)
    return now.st_mtime_ns, now.st_size


def _add(building: Builder, rows: Sequence[Row], read: int, path: Path) -> None:
    try:
        building.add(rows, FREE_CELLS + read)
    except OverflowError as error:
        raise UserError(
            f'{path}: {error} found, of which each row has few; it is damaged or of no run: delete the file to bisect '
            'from the checkpoints alone'
        ) from None


def _note(path: Path, damaged: list[_Damage] | None, found: _Damage) -> None:
    if damaged is None:
        raise UserError(
            f'{path}: line {found.number} is not a record ({found.why}); resume the run, which computes it again, or '
            'delete the file to bisect from the checkpoints alone'
        )
    damaged.append(found)


def _chunks(path: Path) -> Iterator[_Chunk]:
    """The whole lines of a file, some at a time. Raises UserError for one that is too long."""
    if not os.path.lexists(path):
        return
    with _said(path), files.open_regular(path) as file:
        start, rest = 0, b''
        while content := file.read(CHUNK):
            whole, end, rest_of = (rest + content).rpartition(b'\n')
            if end:
                lines = whole.split(b'\n')
                spelled = b'"NaN"' in whole or b'nfinity"' in whole
                nested = whole.count(b'{') != len(lines) or b'[' in whole or b'null' in whole
                yield _Chunk(start, lines, spelled, nested)
                start += len(whole) + 1
            rest = rest_of
            if len(rest) > MOST_LINE:
                raise UserError(
                    f'{path}: a line of more than {MOST_LINE:,} bytes found, records expected; delete the file to '
                    'bisect from the checkpoints alone'
                )


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Where each whole line starts, and it with its end."""
    for chunk in _chunks(path):
        start = chunk.start
        for line in chunk.lines:
            yield start, line + b'\n'
            start += len(line) + 1


def _merged(lines: Iterable[tuple[int, bytes]], rows: Mapping[int, Row]) -> Iterator[bytes]:
    """Lines of ascending steps, and those of other rows between them."""
    more = sorted(rows)
    place = 0
    for step, line in lines:
        while place < len(more) and more[place] < step:
            yield as_line(rows[more[place]])
            place += 1
        yield line
    yield from (as_line(rows[step]) for step in more[place:])


def _parsed(
    lines: Sequence[bytes], chunk: _Chunk, last: int
) -> tuple[list[Row], list[int], list[tuple[int, str]]]:
    """The records of some lines of a chunk after step `last`, the places of their lines, and those of damaged lines,
    each with what is wrong with it."""
    with contextlib.suppress(ValueError, KeyError, TypeError, IndexError):
        rows = list(map(orjson.loads, map(_unsealed, lines)))
        if _are_records(rows, last) and not (chunk.nested and _are_nested(rows)):
            return [_decoded(row) for row in rows] if chunk.spelled else rows, list(range(len(rows))), []
    rows, kept, bad = [], [], []
    for place, line in enumerate(lines):
        try:
            row = _record(line, last)
        except ValueError as error:
            bad.append((place, str(error)))
        else:
            rows.append(_decoded(row))
            kept.append(place)
            last = row[STEP]
    return rows, kept, bad


def _are_records(rows: Sequence[Any], last: int) -> bool:
    """Whether each is one, but for its values; may raise TypeError, KeyError or IndexError where one isn't."""
    steps = [last, *(row[STEP] for row in rows)]
    return (
        set(map(type, rows)) == {dict}
        and set(map(type, steps)) == {int}
        and all(map(operator.lt, steps, steps[1:]))
        and steps[-1] < MOST_STEP
    )


def _are_nested(rows: Sequence[Row]) -> bool:
    """Whether a value is neither number nor text."""
    return not set(map(type, itertools.chain.from_iterable(row.values() for row in rows))) <= set(KINDS)


def _unsealed(line: bytes) -> bytes:
    """A line without its checksum, if it has one. Raises ValueError where it isn't what was written."""
    end = len(line) - SEAL_SIZE
    found = SEAL.match(line, end) if end > 0 else None
    if found is None:
        return line
    content = line[:end]
    if found[1] != files.SEAL.encode() or found[2] != b'%08x' % zlib.crc32(content):
        raise ValueError('its checksum is that of another')
    return content + b'}'


def _record(line: bytes, last: int) -> dict[str, Any]:
    """Raises ValueError with what is wrong."""
    whole = _unsealed(line)
    try:
        row = orjson.loads(whole)
    except ValueError as error:
        raise ValueError(f'not JSON: {str(error).partition(": line")[0]}') from None
    if type(row) is not dict:
        raise ValueError(f'a {type(row).__name__}')
    step = row.get(STEP)
    if type(step) is not int or not 0 <= step < MOST_STEP:
        raise ValueError('without a step' if step is None else 'its step is no number of a step')
    if step <= last:
        raise ValueError(f'of step {step}, after that of step {last}')
    strange = next((name for name, value in row.items() if type(value) not in KINDS), None)
    if strange is not None:
        raise ValueError(f'{strange[:40]!r} is neither number nor text')
    return row


def as_line(row: Row) -> bytes:
    """A row as it stands in the file."""
    # Not `files.sealed`, whose checksum is of the values: to ask for it would take longer than to read the line.
    content = json.dumps(encoded(row)).encode().removesuffix(b'}')
    return content + f', "{files.SEAL}": "{zlib.crc32(content):08x}"}}\n'.encode()


def encoded(row: Row) -> Row:
    """A row whose NaNs and infinities are spelled as JSON can hold them."""
    return {name: _spell(value) if isinstance(value, float) else value for name, value in row.items()}


def _spell(value: float) -> float | str:
    if math.isfinite(value):
        return value
    return 'NaN' if math.isnan(value) else 'Infinity' if value > 0 else '-Infinity'


def _decoded(row: Row) -> dict[str, Any]:
    return {n: SPELLINGS.get(v, v) if isinstance(v, str) else v for n, v in row.items()}


@contextlib.contextmanager
def _said(path: Path) -> Iterator[None]:
    """What the system says in a user's words."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f'{path}: {error.strerror}; make room or check the disk, then run the same command again'
        ) from error
