"""Files as strangers hand them over: missing, compressed, cut short, or a bomb."""

import bz2
import contextlib
import gzip
import io
import os
import stat
import zlib
from collections.abc import Iterator
from typing import Any, NamedTuple

from jaxrnn.types import UserError

GZIP, BZIP2 = b'\x1f\x8b', b'BZh'

# Word vectors shrink 1 to 5 times and text 3 to 10 times; a bomb, up to 1032 (gzip) or more (bzip2).
MOST_EXPANSION = 100
# What any compressed file may unpack to: no danger, however well it shrank.
ALWAYS_ALLOWED = 16 << 20
BUFFER = 1 << 20


class OpenFile(NamedTuple):
    """A file to read, unpacked on the fly. Reading raises UserError only."""

    stream: io.BufferedReader
    most: int  # bytes that can come out of it


def raw(path: str) -> io.BufferedReader:
    """The bytes of a regular file as they are. Raises UserError where it can't be opened."""
    try:
        if not stat.S_ISREG(mode := os.stat(path).st_mode):
            found = 'a directory' if stat.S_ISDIR(mode) else 'no regular file'
            raise UserError(f'{path}: {found} found, a file expected; check the path')
        return open(path, 'rb')
    except (OSError, ValueError) as error:
        raise _complaint(path, error) from error


@contextlib.contextmanager
def opened(path: str) -> Iterator[OpenFile]:
    """The bytes of a file, unpacked if it begins as gzip or bzip2 do, whatever its name."""
    with raw(path) as file:
        size = os.fstat(file.fileno()).st_size
        magic = file.read(3)
        file.seek(0)
        packed = magic.startswith((GZIP, BZIP2))
        most = max(ALWAYS_ALLOWED, MOST_EXPANSION * size) if packed else size
        guarded: Any = _Guarded(path, _unpacked(file, magic), most)
        with io.BufferedReader(guarded, BUFFER) as stream:
            if not stream.peek(1):
                raise UserError(f'{path}: an empty file found; give one with words')
            yield OpenFile(stream, most)


class _Guarded(io.RawIOBase):
    """Turns what goes wrong while reading into UserError, and stops a decompression bomb."""

    def __init__(self, path: str, stream: io.BufferedIOBase, most: int):
        self._path, self._stream, self._most, self._read = path, stream, most, 0

    def readable(self) -> bool:
        return True

    def close(self) -> None:
        self._stream.close()
        super().close()

    def readinto(self, buffer) -> int:
        try:
            count = self._stream.readinto(buffer)
        except EOFError as error:
            raise UserError(f'{self._path}: cut short in its compressed data; fetch it again') from error
        except (OSError, zlib.error) as error:
            raise _complaint(self._path, error) from error
        self._read += count
        if self._read > self._most:
            raise UserError(
                f'{self._path}: unpacks to more than {self._most:,} bytes, {MOST_EXPANSION} times its size,'
                ' as a decompression bomb does; if you trust it, unpack it and give the unpacked file'
            )
        return count


def _unpacked(file: io.BufferedReader, magic: bytes) -> io.BufferedIOBase:
    if magic.startswith(GZIP):
        return gzip.GzipFile(fileobj=file)
    return bz2.BZ2File(file) if magic.startswith(BZIP2) else file


def _complaint(path: str, error: Exception) -> UserError:
    match error:
        case FileNotFoundError() | NotADirectoryError():
            return UserError(f'{path}: no such file; check the path')
        case PermissionError():
            return UserError(f'{path}: permission denied; make it readable, as chmod +r does')
        case gzip.BadGzipFile() | zlib.error():
            return UserError(f'{path}: damaged gzip data ({error}); fetch it again')
        case OSError(strerror=None):
            return UserError(f'{path}: damaged compressed data ({error}); fetch it again')
    return UserError(f'{path}: cannot be read ({getattr(error, "strerror", None) or error}); check the file')
