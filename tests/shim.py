"""The calls by which a process changes a directory, seen from below: recorded, or the process killed at the n-th.

The shim is C (shim.c), as tensorstore writes from threads of C++ that no patch of Python's sees.
"""

import functools
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

SOURCE = Path(__file__).with_name('shim.c')
COMPILER = shutil.which('cc') or shutil.which('gcc') or shutil.which('clang')
MISSING = '' if COMPILER and sys.platform == 'linux' else 'the shim needs Linux and a C compiler (cc)'
"""Why there can be no shim here."""


class Call(NamedTuple):
    """One that changes something, or syncs it."""

    kind: str  # open, write, truncate, sync, mkdir, rename, unlink, link, symlink
    path: str  # below the directory that is watched; '' is itself
    to: str  # where a rename or link leads
    failed: bool
    at: int  # the offset of a write, the new length of truncate
    flags: int  # of open
    data: bytes


@functools.lru_cache
def built() -> Path:
    """The compiled shim."""
    assert COMPILER and not MISSING, MISSING
    path = Path(_folder().name) / 'shim.so'
    command = [COMPILER, '-O1', '-shared', '-fPIC', '-o', str(path), str(SOURCE), '-ldl', '-lpthread']
    subprocess.run(command, check=True)
    return path


@functools.lru_cache
def _folder() -> tempfile.TemporaryDirectory:
    return tempfile.TemporaryDirectory(prefix='jaxrnn-shim-')


def run(
    command: Sequence[str],
    root: Path,
    environ: Mapping[str, str],
    *,
    log: Path | None = None,
    kill_at: int = 0,
) -> subprocess.CompletedProcess:
    """Runs a command under the shim.

    Args:
        command: a program and its arguments.
        root: the directory that is watched.
        environ: variables of the environment.
        log: where calls are written down.
        kill_at: the call before which it is killed, from 1 on; 0 for none.
    """
    ours = {'LD_PRELOAD': str(built()), 'SHIM_ROOT': str(root), 'SHIM_KILL': str(kill_at)}
    if log is not None:
        ours['SHIM_LOG'] = str(log)
    return subprocess.run(command, env={**environ, **ours}, capture_output=True, text=True)


def read(log: Path, root: Path) -> list[Call]:
    """The calls that were written down."""
    return list(_calls(log.read_bytes(), str(root)))


def _calls(content: bytes, root: str) -> Iterator[Call]:
    at = 0
    while at < len(content):
        end = content.index(b'\n', at)
        kind, result, where, flags, length, path, to = content[at:end].decode().split('\t')
        at = end + 1 + int(length)
        paths = [os.path.normpath(each).removeprefix(root).lstrip('/') for each in (path, to)]
        yield Call(kind, *paths, int(result) < 0, int(where), int(flags), content[end + 1 : at])
