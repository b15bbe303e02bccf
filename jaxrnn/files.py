"""Files that somebody else may have made: read within bounds, and written where nobody has laid a link.

The one way to a run's own files. A link leads out of the run, a FIFO or a device waits or never ends: none is opened.
What is written is on the disk then, and not only in the system's memory, which a power loss empties.
"""

import contextlib
import errno
import itertools
import json
import os
import re
import shutil
import stat
import uuid
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from jaxrnn.errors import UserError

MOST_BYTES = 4 << 20
"""Of a JSON file of a run. A configuration has 3 kB, a note of going back some 100 bytes a time."""

MOST_DEPTH = 16
"""Lists and dictionaries within each other; what we write has 3."""

SEAL = 'crc32'
"""The field in which a checksum of all others is."""

AGAIN = 'it is damaged or was altered: copy the run again'
TOKEN = re.compile(r'"(?:[^"\\]|\\.)*"?|[\[\]{}]')  # a string, whose brackets don't count; or a bracket


def check_regular(path: Path) -> None:
    """Raises UserError for what is there and is no regular file, as a link, a directory, a FIFO or a device."""
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        _check(path, os.lstat(path).st_mode)


def check_within(root: Path) -> None:
    """Raises UserError for anything below a directory that leads out of it, or is neither file nor directory; and
    where something else than a directory is at `root`."""
    if os.path.lexists(root) and not stat.S_ISDIR(mode := os.lstat(root).st_mode):
        raise UserError(f'{root}: {_kind(mode)} found, a directory expected; {AGAIN}')
    for folder, folders, files in os.walk(root):
        for name in (*folders, *files):
            path = Path(folder, name)
            with contextlib.suppress(FileNotFoundError):  # a checkpoint that training just thinned out
                if not stat.S_ISDIR(mode := os.lstat(path).st_mode):
                    _check(path, mode)


def open_regular(path: str | os.PathLike) -> BinaryIO:
    """A regular file, to read. Raises UserError for anything else, and OSError where it can't be opened."""
    try:
        # Not to wait for a FIFO's other end; of no meaning for a file.
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        check_regular(Path(path))
        raise
    try:
        _check(Path(path), os.fstat(handle).st_mode)
        return os.fdopen(handle, 'rb')
    except BaseException:
        os.close(handle)
        raise


def read_bytes(path: Path, most: int = MOST_BYTES) -> bytes:
    """All of a regular file. Raises UserError for another kind, or a larger one; OSError where it can't be read."""
    with open_regular(path) as file:
        content = file.read(most + 1)
    if len(content) > most:
        raise UserError(f'{path}: more than {most:,} bytes found, at most so many expected; {AGAIN}')
    return content


def read_text(path: Path, most: int = MOST_BYTES) -> str:
    """As `read_bytes`. Raises UserError for what isn't UTF-8, too."""
    try:
        return read_bytes(path, most).decode()
    except UnicodeDecodeError as error:
        raise UserError(f'{path}: byte {error.start} is not UTF-8 text, which is expected; {AGAIN}') from None


def read_json(path: Path, most: int = MOST_BYTES) -> Any:
    """As `read_text`. Raises UserError for what isn't JSON, or has more within each other than anything we write."""
    return parse_json(read_text(path, most), str(path))


def parse_json(text: str, name: str) -> Any:
    """What a JSON text says; `name` stands in front of an error. Raises UserError as `read_json`."""
    if depth(text) > MOST_DEPTH:
        raise UserError(f'{name}: more than {MOST_DEPTH} levels found, JSON of fewer expected; {AGAIN}')
    try:
        return json.loads(text)
    except ValueError as error:
        raise UserError(f'{name}: not JSON, which is expected ({error}); {AGAIN}') from None


def depth(text: str) -> int:
    """The most brackets that are open at once in a JSON text; found without descending into them."""
    deepest = now = 0
    for found in TOKEN.finditer(text):
        now += (found[0] in '[{') - (found[0] in ']}')
        deepest = max(deepest, now)
    return deepest


def sealed(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Fields with a checksum, so that a bit that flips on the disk is noticed. It keeps nobody from altering them."""
    return {**fields, SEAL: _checksum(fields)}


def unsealed(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Fields without their checksum, if they have one. Raises ValueError where they aren't what was sealed."""
    found = {name: value for name, value in fields.items() if name != SEAL}
    if fields.get(SEAL, (right := _checksum(found))) != right:
        raise ValueError(f'its checksum is {right}, and {fields[SEAL]!r:.20} when it was written')
    return found


def read_notes(path: Path, newest: int) -> dict[str, Any] | None:
    """The fields of a sealed JSON file of ours that says its `format`; None where there is none.

    Raises:
        UserError: it can't be read, isn't what was sealed, or is of a format later than `newest`.
    """
    try:
        found = unsealed(read_json(path))
        made = found['format']
        if type(made) is not int:
            raise TypeError(f'format: {made!r:.20} found')
    except FileNotFoundError:
        return None
    except OSError as error:
        raise UserError(f'{path} can not be read ({error.strerror})') from error
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise not_as_written(path, error) from None
    if made > newest:
        raise UserError(
            f'{path}: format {made} found, at most {newest} expected; it is of a newer release of jaxrnn: update it'
        )
    return found


def not_as_written(path: Path, error: Exception) -> UserError:
    """That a file of ours has something else in it than we wrote."""
    return UserError(f'{path}: not as a recorder wrote it ({error}); {AGAIN}')


def _checksum(fields: Mapping[str, Any]) -> str:
    return f'{zlib.crc32(json.dumps(fields, sort_keys=True).encode()):08x}'


@contextlib.contextmanager
def replacing(path: str | os.PathLike) -> Iterator[BinaryIO]:
    """A file to write that takes its place at `path` only when all is written, and on the disk.

    Raises UserError where something other than a regular file is there; OSError where nothing can be written.
    """
    check_regular(Path(path))
    # Not tempfile's, whose files are for the owner's eyes only. A new name, which must not be there yet.
    temporary = f'{os.fspath(path)}.{uuid.uuid4().hex[:8]}.tmp'
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        with os.fdopen(os.open(temporary, flags, 0o666), 'wb') as file:
            yield file
        sync(Path(temporary))
        check_regular(Path(path))
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise
    sync(Path(path).absolute().parent)


@contextlib.contextmanager
def appearing(path: Path) -> Iterator[Path]:
    """A name for a file or a folder that comes to stand at `path` only when all of it is written, and on the disk. What
    is at `path` already is left as it is; folders above it are made.

    Raises UserError where something is there; OSError where nothing can be written.
    """
    check_free(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f'.{uuid.uuid4().hex}.tmp')
    try:
        yield temporary
        (sync_tree if temporary.is_dir() else sync)(temporary)
        _move(temporary, path)
    except BaseException:
        if temporary.is_dir():
            shutil.rmtree(temporary, ignore_errors=True)
        temporary.unlink(missing_ok=True)
        raise
    sync(path.absolute().parent)


def check_free(path: Path) -> None:
    """Raises UserError where something is at a path already, be it a link that leads nowhere."""
    if os.path.lexists(path):
        raise UserError(f'{path}: {_kind(os.lstat(path).st_mode)} found, nothing expected; name a new path')


def _move(temporary: Path, path: Path) -> None:
    """Where something came to be at `path` in the meantime, that stays, unless it is an empty directory."""
    try:
        if temporary.is_dir():
            os.rename(temporary, path)
        else:
            os.link(temporary, path)  # which replaces nothing, as os.rename does
            temporary.unlink()
    except (FileExistsError, NotADirectoryError):
        check_free(path)
        raise
    except OSError as error:
        if error.errno == errno.ENOTEMPTY:
            check_free(path)
        if error.errno not in (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS):  # a file system without links
            raise
        check_free(path)
        os.rename(temporary, path)


def write_bytes(path: Path, content: bytes) -> None:
    """Writes whole or not at all, whatever happens. Raises UserError where the disk refuses, or as `replacing`."""
    try:
        with replacing(path) as file:
            file.write(content)
    except OSError as error:
        raise UserError(f'{path}: {error.strerror}; make room or choose another directory') from error


def sync(path: Path) -> None:
    """Waits until a file's bytes, or a folder's names, are on the disk. Raises OSError where they can't be written."""
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    except OSError as error:
        # Not every file system takes it of a folder.
        if error.errno in (errno.EIO, errno.ENOSPC) or not stat.S_ISDIR(os.fstat(number).st_mode):
            raise
    finally:
        os.close(number)


def sync_tree(root: Path) -> None:
    """As `sync`, of everything in a folder and then of itself. Raises OSError."""
    for folder, _, names in os.walk(root, topdown=False):
        for name in names:
            sync(Path(folder, name))
        sync(Path(folder))


def unused(path: Path) -> Path:
    """The path, or one like it with a number, at which nothing is yet."""
    for number in itertools.count(1):
        found = path if number == 1 else path.with_name(f'{path.stem}.{number}{path.suffix}')
        if not os.path.lexists(found):
            return found
    raise AssertionError


def open_appending(path: Path, *, anew: bool) -> BinaryIO:
    """A regular file, to write on at its end; emptied first if it is begun `anew`. Raises as `open_regular`."""
    check_regular(path)
    flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    file = os.fdopen(os.open(path, flags, 0o666), 'ab')
    if anew:
        file.truncate(0)
    return file


def _check(path: Path, mode: int) -> None:
    if not stat.S_ISREG(mode):
        raise UserError(
            f'{path}: {_kind(mode)} found, a regular file expected; remove it, or name another path'
        )


def _kind(mode: int) -> str:
    kinds = {
        stat.S_IFREG: 'a file',
        stat.S_IFDIR: 'a directory',
        stat.S_IFLNK: 'a link',
        stat.S_IFIFO: 'a FIFO',
    }
    return kinds.get(stat.S_IFMT(mode), 'a device or socket')
