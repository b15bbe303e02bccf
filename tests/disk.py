"""A disk as it may be after a power loss: what was synced is there, all else may be, or may not, or in part.

Files and folders are as POSIX promises and no more. A file's bytes are on the disk once the file was synced, a name
once its folder was: also that of a new file, whatever was done to the file. Real file systems promise more, each
something else (Pillai et al. 2014, "All file systems are not created equal").
"""

import copy
import dataclasses
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from shim import Call

BLOCK = 512
"""Bytes that are written whole or not at all."""

Image = Mapping[str, bytes | None]
"""Path -> bytes of a file, None of a folder."""


@dataclasses.dataclass(eq=False)
class File:
    synced: bytes = b''
    now: bytes = b''


@dataclasses.dataclass(eq=False)
class Folder:
    synced: dict[str, 'File | Folder'] = dataclasses.field(default_factory=dict)
    now: dict[str, 'File | Folder'] = dataclasses.field(default_factory=dict)
    changes: list[dict[str, 'File | Folder | None']] = dataclasses.field(default_factory=list)  # likewise


class Loss(NamedTuple):
    """What becomes of what was not synced."""

    names: Callable[[Folder], Mapping[str, File | Folder]]
    content: Callable[[File], bytes]


KEPT = Loss(lambda folder: folder.now, lambda file: file.now)
"""As when only the process is killed."""

DROPPED = Loss(lambda folder: folder.synced, lambda file: file.synced)

BYTES_DROPPED = Loss(lambda folder: folder.now, lambda file: file.synced)
"""As some file systems do: the file has its name, and is empty."""

NAMES_DROPPED = Loss(lambda folder: folder.synced, lambda file: file.now)


def garbled(rng: np.random.Generator) -> Loss:
    """Each change of a name happened or not, each block of a file is new, old, zero or anything."""

    def names(folder: Folder) -> Mapping[str, File | Folder]:
        found = dict(folder.synced)
        for change in folder.changes:
            if rng.random() < 0.5:
                _apply(found, change)
        return found

    def content(file: File) -> bytes:
        if file.now == file.synced:
            return file.now
        length = int(rng.choice([len(file.synced), len(file.now), rng.integers(len(file.now) + 1)]))
        old, new = (each[:length].ljust(length, b'\0') for each in (file.synced, file.now))
        blocks = [range(at, min(at + BLOCK, length)) for at in range(0, length, BLOCK)]
        return b''.join(_block(old[b.start : b.stop], new[b.start : b.stop], rng) for b in blocks)

    return Loss(names, content)


def _block(old: bytes, new: bytes, rng: np.random.Generator) -> bytes:
    return new if old == new else [old, new, bytes(len(new)), rng.bytes(len(new))][rng.integers(4)]


class Disk:
    """What a directory goes through, call by call."""

    def __init__(self, start: Image):
        """start: what is there, and on the disk, before the first call."""
        self.root = Folder()
        for path, content in sorted(start.items()):
            folder, name = self._home(path)
            node = Folder() if content is None else File(content, content)
            folder.now[name] = folder.synced[name] = node

    def copy(self) -> 'Disk':
        return copy.deepcopy(self)

    def after(self, loss: Loss) -> Image:
        """What is found there after a power loss."""
        found: dict[str, bytes | None] = {}

        def look(folder: Folder, home: str) -> None:
            for name, node in sorted(loss.names(folder).items()):
                path = os.path.join(home, name)
                found[path] = None if isinstance(node, Folder) else loss.content(node)
                if isinstance(node, Folder):
                    look(node, path)

        look(self.root, '')
        return found

    def do(self, call: Call) -> None:
        if not call.failed and '(deleted)' not in call.path:
            getattr(self, f'_{call.kind}')(call)

    def _home(self, path: str) -> tuple[Folder, str]:
        *folders, name = path.split('/')
        folder = self.root
        for each in folders:
            found = folder.now[each]
            assert isinstance(found, Folder), path
            folder = found
        return folder, name

    def _node(self, path: str) -> File | Folder:
        if not path:
            return self.root
        folder, name = self._home(path)
        return folder.now[name]

    def _open(self, call: Call) -> None:
        folder, name = self._home(call.path)
        if name not in folder.now:
            _change(folder, {name: File()})
        if call.flags & os.O_TRUNC:
            self._truncate(call._replace(at=0))

    def _write(self, call: Call) -> None:
        file = self._node(call.path)
        assert isinstance(file, File), call.path
        file.now = (
            file.now[: call.at].ljust(call.at, b'\0') + call.data + file.now[call.at + len(call.data) :]
        )

    def _truncate(self, call: Call) -> None:
        file = self._node(call.path)
        assert isinstance(file, File), call.path
        file.now = file.now[: call.at].ljust(call.at, b'\0')

    def _sync(self, call: Call) -> None:
        node = self._node(call.path)
        if isinstance(node, File):
            node.synced = node.now
        else:
            node.synced, node.changes = dict(node.now), []

    def _mkdir(self, call: Call) -> None:
        folder, name = self._home(call.path)
        _change(folder, {name: Folder()})

    def _unlink(self, call: Call) -> None:
        folder, name = self._home(call.path)
        _change(folder, {name: None})

    def _rename(self, call: Call) -> None:
        (folder, old), (other, new) = self._home(call.path), self._home(call.to)
        node = folder.now[old]
        if folder is other:
            _change(folder, {old: None, new: node})  # both or neither
        else:
            _change(other, {new: node})
            _change(folder, {old: None})


def _change(folder: Folder, change: dict[str, File | Folder | None]) -> None:
    folder.changes.append(change)
    _apply(folder.now, change)


def _apply(names: dict[str, File | Folder], change: Mapping[str, File | Folder | None]) -> None:
    for name, node in change.items():
        if node is None:
            names.pop(name, None)
        else:
            names[name] = node


def states(start: Image, calls: Sequence[Call]) -> Iterable[tuple[int, Disk]]:
    """The disk before the first call, and after each; it goes on changing."""
    disk = Disk(start)
    yield 0, disk
    for number, call in enumerate(calls, 1):
        disk.do(call)
        yield number, disk


def read(root: Path) -> Image:
    """What is in a directory."""
    found = {}
    for path in sorted(root.rglob('*')):
        found[str(path.relative_to(root))] = None if path.is_dir() else path.read_bytes()
    return found


def write(image: Image, root: Path) -> None:
    """Puts an image into an empty directory."""
    for path, content in image.items():
        if content is None:
            (root / path).mkdir()
        else:
            (root / path).write_bytes(content)
