"""What is written is on the disk, and not only in the system's memory, which a power loss empties."""

import errno
import os
import stat
from pathlib import Path

from jaxrnn.types import UserError


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
    for folder, _, files in os.walk(root, topdown=False):
        for name in files:
            sync(Path(folder, name))
        sync(Path(folder))


def write_bytes(path: Path, content: bytes) -> None:
    """Writes whole or not at all, whatever happens. Raises UserError where the disk refuses."""
    temporary = path.with_name(path.name + '.part')
    try:
        temporary.write_bytes(content)
        replace(temporary, path)
    except OSError as error:
        raise UserError(f'{path}: {error.strerror}; make room or choose another directory') from error


def replace(temporary: Path, path: Path) -> None:
    """Gives a file its name when it is on the disk. Raises OSError."""
    sync(temporary)
    os.replace(temporary, path)
    sync(path.parent)
