"""Compiled programs that are kept: with the user whose machine ran them, in a folder that nobody else can write to.

A compiled program is machine code. Whoever can lay one where it is looked for decides what is run.
"""

import atexit
import contextlib
import hashlib
import os
import pathlib
import stat

MOST_BYTES = 256 << 20
"""Of all that is kept; beyond it the oldest go first. The demo's are some 2 MB."""

ENTRY, SUM = '-cache', '.sha256'


def folder(root: pathlib.Path, name: str) -> pathlib.Path | None:
    """The folder for programs of one environment, made if need be, and put in order.

    Entries without a sum, or with another, are gone: they were damaged, or half written. JAX itself sees damage only
    where it packs with zlib. Entries that this process adds get their sums when it ends.

    Args:
        root: of all that is kept.
        name: of the environment.

    Returns:
        None where it can't be made, or where it, or the folder around it, is not this user's alone to write to.
    """
    path = root / name
    try:
        root.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        for made in (root, path):
            made.mkdir(mode=0o700, exist_ok=True)
        if not (_is_mine(root.parent, 0o022) and _is_mine(root, 0o077) and _is_mine(path, 0o077)):
            return None
        if not os.access(path, os.W_OK | os.X_OK):
            return None
        _drop_oldest(root)
        _drop_damaged(path)
    except OSError:
        return None
    atexit.register(_sum_up, path)
    return path


def _is_mine(path: pathlib.Path, closed: int) -> bool:
    """Whether it is a folder of this user's, no link to one, and nobody else has any of the rights in `closed`."""
    found = os.lstat(path)
    return stat.S_ISDIR(found.st_mode) and found.st_uid == os.geteuid() and not found.st_mode & closed


def _drop_oldest(root: pathlib.Path) -> None:
    """Deletes what was kept first, of every environment, until half of the room is free."""
    found = [(path.stat(), path) for path in root.glob(f'*/*{ENTRY}')]
    size = sum(each.st_size for each, _ in found)
    if size <= MOST_BYTES:
        return
    for each, path in sorted(found, key=lambda pair: pair[0].st_mtime):
        if size <= MOST_BYTES // 2:
            return
        _drop(path)
        size -= each.st_size


def _drop_damaged(path: pathlib.Path) -> None:
    for entry in path.glob(f'*{ENTRY}'):
        if _recorded(entry) != _sum(entry):
            _drop(entry)


def _sum_up(path: pathlib.Path) -> None:
    """Writes the sums of entries that have none yet."""
    with contextlib.suppress(OSError):
        for entry in path.glob(f'*{ENTRY}'):
            if not _recorded(entry):
                _sum_of(entry).write_text(_sum(entry), encoding='utf-8')


def _recorded(entry: pathlib.Path) -> str:
    try:
        return _sum_of(entry).read_text(encoding='utf-8', errors='replace')
    except FileNotFoundError:
        return ''


def _sum(entry: pathlib.Path) -> str:
    with contextlib.suppress(FileNotFoundError), open(entry, 'rb') as file:
        return hashlib.file_digest(file, 'sha256').hexdigest()
    return 'gone'


def _sum_of(entry: pathlib.Path) -> pathlib.Path:
    return entry.with_name(entry.name + SUM)


def _drop(entry: pathlib.Path) -> None:
    for path in (entry, _sum_of(entry)):
        path.unlink(missing_ok=True)
