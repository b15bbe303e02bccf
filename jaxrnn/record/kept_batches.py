"""The batches of a run on disk, where they are no pure function of the step: kept as they came, within a bound.

A file holds the batches from one checkpoint to the next, in frames. When there are too many bytes the oldest file goes.

    frame    MAGIC, crc32 of all that follows, step, bytes of the packed batch; then the packed batch
    packed   by zstandard: bytes of the outline, the outline in JSON, then the arrays one after the other, each raw
"""

import functools
import json
import logging
import math
import os
import queue
import struct
import threading
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, Self

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import zstandard  # packs 500 MB a second; well kept, BSD

from jaxrnn import files
from jaxrnn.record import gaps, layout, outline
from jaxrnn.record.records import Records
from jaxrnn.types import BatchAt, Tree, UserError

log = logging.getLogger('jaxrnn')

MOST_BYTES = 1 << 30
"""Of all batches that are kept, if nothing else is said."""

PARTS = 8
"""A file has at most so small a share of them: the oldest goes whole."""

MOST_UNPACKED = 1 << 30
"""Bytes of one batch, as it is in memory."""

LEVEL = 1
"""Of zstandard: the fastest."""

WAITING = 8
"""Batches that wait to be written; then training waits."""

SUFFIX = '.batches'
MAGIC = b'JXB1'
HEAD = struct.Struct('<4sIQQ')
SIZE = struct.Struct('<I')


class KeptBatches:
    """Reads them: called with a step's number it gives its batch, as `batch_at` does.

    Of steps after the run's last they come again from the first: of those any batch is as good as another.

    Args:
        directory: of the files.
        like: a batch, for the structure of the others; only needed where that isn't made of dictionaries, lists, tuples
            and named tuples.
        steps: of the run.
    """

    def __init__(self, directory: str | os.PathLike, like: Tree = None, steps: int | None = None):
        self.directory, self.like, self._end = Path(directory), like, steps
        self._places: dict[int, _Place] | None = None
        self._known = functools.lru_cache(maxsize=64)(self._read)

    @classmethod
    def of_run(cls, paths: layout.Paths, records: Records, like: Tree = None) -> Self:
        """Those of a run with these records."""
        return cls(paths.batches, like, int(records.steps[-1]) + 1 if len(records) else None)

    def __call__(self, step: int) -> Tree:
        """Raises UserError for one that isn't kept, or is damaged."""
        return self._known(step)

    def given_at(self, step: int) -> int:
        """The step of the run whose batch a step is given."""
        known = self._index()
        if known and self._end is not None and step >= self._end > (first := min(known)):
            return first + (step - self._end) % (self._end - first)
        return step

    def steps(self) -> list[int]:
        """Whose batches are kept, ascending."""
        return sorted(self._index())

    def _index(self) -> 'dict[int, _Place]':
        if self._places is None:
            files.check_within(self.directory)
            self._places = {place.step: place for path in _paths(self.directory) for place in _places(path)}
        return self._places

    def _read(self, step: int) -> Tree:
        known, step = self._index(), self.given_at(step)
        place = known.get(step)
        if place is None:
            there = f'there are those of {gaps.named(sorted(known))}' if known else 'there is none'
            raise UserError(f'{self.directory}: no batch of step {step} is kept; {there}')
        try:
            content = _content(place)
        except _DamagedError as error:
            raise UserError(
                f'{place.path}: the batch of step {step} {error}; copy the run again, or ask for steps of another '
                'checkpoint'
            ) from None
        return _unpacked(content, place, self.like)


def given_at(batch_at: BatchAt, step: int) -> int:
    """The step of the run whose batch a step is given: its own, but for kept ones that come again."""
    return batch_at.given_at(step) if isinstance(batch_at, KeptBatches) else step


class BatchWriter:
    """Writes them in a thread of its own, as they come.

    Args:
        directory: made if it isn't there.
        most_bytes: that the files have in all.
    """

    def __init__(self, directory: str | os.PathLike, most_bytes: int = MOST_BYTES):
        self.directory, self.most_bytes = Path(directory), most_bytes
        self.directory.mkdir(parents=True, exist_ok=True)
        self._file: BinaryIO | None = None
        self._files = [_File(int(path.stem), path, path.stat().st_size) for path in _paths(self.directory)]
        self._lock = threading.Lock()
        self._begin_anew, self._since = True, 0
        self._error: Exception | None = None
        self._waiting: queue.Queue[tuple[int, Tree] | None] = queue.Queue(WAITING)
        self._thread = threading.Thread(target=self._write_all, name='jaxrnn-batches', daemon=True)
        self._thread.start()

    def keep_before(self, step: int) -> None:
        """Those of this step and later ones are gone: the run goes on from there with others."""
        kept = []
        for file in self._files:
            places = [place for place in _places(file.path) if place.step < step]
            if not places:
                file.path.unlink()
                continue
            if (end := places[-1].end) < file.size:
                os.truncate(file.path, end)
                files.sync(file.path)
            kept.append(file._replace(size=end))
        self._files = kept
        files.sync(self.directory)

    def drop_before(self, step: int) -> None:
        """Deletes the files whose batches are all of steps before it."""
        with self._lock:
            while len(self._files) > 1 and self._files[1].first <= step:
                self._drop_oldest()

    def put(self, step: int, batch: Tree) -> None:
        """Writes a batch that was `taken`. Raises UserError where one before it couldn't be written."""
        self._raise()
        self._waiting.put((step, batch))

    @property
    def nearly_full(self) -> bool:
        """Whether those since `begin` take so much that a later checkpoint might have lost some of them."""
        return self._since > self.most_bytes // 2

    def begin(self) -> None:
        """From the next on in a new file; all before are on the disk."""
        self._waiting.join()
        self._raise()
        try:
            if self._file is not None:
                self._file.flush()
                os.fsync(self._file.fileno())
                files.sync(self.directory)
        except OSError as error:
            raise self._said(error) from error
        self._begin_anew, self._since = True, 0

    def close(self) -> None:
        """Waits for what was put. Raises UserError where it couldn't be written."""
        self._waiting.put(None)
        self._thread.join()
        if self._file is not None:
            self._file.close()
        self._raise()

    def _write_all(self) -> None:
        while True:
            found = self._waiting.get()
            try:
                if found is None:
                    return
                if self._error is None:
                    self._write(*found)
            except Exception as error:  # raised where the next batch is put
                self._error = error
            finally:
                self._waiting.task_done()

    def _write(self, step: int, batch: Tree) -> None:
        frame = frame_of(step, packed(batch))
        with self._lock:
            if self._begin_anew or self._files[-1].size + len(frame) > self.most_bytes // PARTS:
                self._open(step)
            self._make_room(len(frame))
            assert self._file is not None
            self._file.write(frame)
            self._file.flush()
            self._files[-1] = self._files[-1]._replace(size=self._files[-1].size + len(frame))
            self._since += len(frame)

    def _open(self, step: int) -> None:
        if self._file is not None:
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
        path = self.directory / f'{step}{SUFFIX}'
        self._file = files.open_appending(path, anew=True)
        self._files.append(_File(step, path, 0))
        self._begin_anew = False

    def _make_room(self, size: int) -> None:
        """Deletes the oldest files until so many bytes more are within the bound."""
        while len(self._files) > 1 and sum(file.size for file in self._files) + size > self.most_bytes:
            self._drop_oldest()
        if self._files[0].size + size > self.most_bytes:
            raise UserError(
                f'{self.directory}: a batch has {size:,} bytes, and {self.most_bytes:,} are allowed in all; allow more '
                '(most_bytes=)'
            )

    def _drop_oldest(self) -> None:
        self._files.pop(0).path.unlink(missing_ok=True)

    def _raise(self) -> None:
        if self._error is not None:
            raise self._said(self._error) from self._error

    def _said(self, error: Exception) -> UserError:
        if isinstance(error, UserError):
            return error
        why = error.strerror if isinstance(error, OSError) else str(error).split('\n')[0]
        return UserError(
            f"{self.directory}: a batch couldn't be kept ({why}); make room or check the disk, then run the same "
            'command again to resume'
        )


class _File(NamedTuple):
    """Of the files that are there."""

    first: int
    path: Path
    size: int


class _Place(NamedTuple):
    """Where a batch lies."""

    path: Path
    step: int
    begin: int
    end: int


class _DamagedError(Exception):
    """What is wrong with a frame."""


def _paths(directory: Path) -> list[Path]:
    """The files, by their first steps."""
    if not directory.is_dir():
        return []
    found = [path for path in directory.iterdir() if path.suffix == SUFFIX and path.stem.isdecimal()]
    return sorted(found, key=lambda path: int(path.stem))


def _places(path: Path) -> Iterator[_Place]:
    """Of the whole frames of a file, up to the first that isn't one: a killed process leaves half of its last."""
    with files.open_regular(path) as file:
        size, begin = os.fstat(file.fileno()).st_size, 0
        while begin + HEAD.size <= size:
            file.seek(begin)
            magic, _, step, length = HEAD.unpack(file.read(HEAD.size))
            end = begin + HEAD.size + length
            if magic != MAGIC or end > size:
                return
            yield _Place(path, step, begin, end)
            begin = end


def _content(place: _Place) -> bytes:
    """Raises _DamagedError."""
    with files.open_regular(place.path) as file:
        file.seek(place.begin)
        frame = file.read(place.end - place.begin)
    _, checksum, step, length = HEAD.unpack(frame[: HEAD.size])
    if len(frame) != HEAD.size + length or step != place.step or zlib.crc32(frame[8:]) != checksum:
        raise _DamagedError('is damaged: it has another checksum than when it was written')
    small = frame[HEAD.size :]
    size = zstandard.frame_content_size(small)
    if not 0 <= size <= MOST_UNPACKED:
        raise _DamagedError(f'has {size:,} bytes when unpacked, at most {MOST_UNPACKED:,} expected')
    try:
        return zstandard.ZstdDecompressor().decompress(small, max_output_size=MOST_UNPACKED)
    except zstandard.ZstdError as error:
        raise _DamagedError(f"can't be unpacked ({error})") from None


def taken(batch: Tree, *, before: bool = False) -> Tree:
    """A batch that nobody else writes to; what is on a device is fetched later.

    Args:
        batch: any tree of arrays and numbers.
        before: whether its step is still to be taken, and may consume it.

    Raises:
        UserError: one that a step has consumed, or of something else than arrays and numbers.
    """
    return jax.tree.map(lambda leaf: _taken(leaf, before), batch)


def _taken(leaf: Any, before: bool) -> Any:
    if isinstance(leaf, jax.Array):
        if leaf.is_deleted():
            raise UserError(
                'a batch was consumed by the step that it was given to (donate_argnums); take it from '
                'recorder.batches(loader), which keeps it before the step'
            )
        leaf = jnp.copy(leaf) if before else leaf
        leaf.copy_to_host_async() if not _is_key(leaf) else None
        return leaf
    if isinstance(leaf, bool | int | float | complex):
        return leaf
    found = np.asarray(leaf).copy()
    if found.dtype.name not in _PLAIN and found.dtype.name not in _SMALL:
        raise UserError(f'a batch: a {type(leaf).__name__} found, arrays and numbers expected')
    return found


def _is_key(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def frame_of(step: int, content: bytes) -> bytes:
    """What stands in a file for a batch that is `packed`."""
    small = zstandard.ZstdCompressor(level=LEVEL).compress(content)
    head = HEAD.pack(b'', 0, step, len(small))[8:]
    return MAGIC + struct.pack('<I', zlib.crc32(small, zlib.crc32(head))) + head + small


def packed(batch: Tree) -> bytes:
    """A batch as bytes. Raises UserError for one that is too large, or too deep."""
    notes, raw = [], []
    for leaf in jax.tree.leaves(batch):
        note, content = _note(leaf)
        notes.append(note)
        raw.append(content)
    written = json.dumps({'leaves': notes, 'tree': outline.of(batch)})
    if files.depth(written) > files.MOST_DEPTH:
        raise UserError('a batch: more levels of dictionaries and tuples found than a run keeps; flatten it')
    content = b''.join([SIZE.pack(len(written.encode())), written.encode(), *raw])
    if len(content) > MOST_UNPACKED:
        raise UserError(
            f'a batch: {len(content):,} bytes found, at most {MOST_UNPACKED:,} are kept of one; record without '
            'batches (most_bytes=0)'
        )
    return content


def _note(leaf: Any) -> tuple[list[Any], bytes]:
    """What kind of leaf it is, and its bytes."""
    if isinstance(leaf, bool | int | float):  # which a step may take for a constant
        return ['number', type(leaf).__name__, repr(leaf)], b''
    if isinstance(leaf, complex):
        return ['number', 'complex', repr(leaf)], b''
    if _is_key(leaf):
        data = np.asarray(jax.random.key_data(leaf))
        return ['key', str(jax.random.key_impl(leaf)), [*data.shape]], data.tobytes()
    array = np.asarray(leaf)
    return ['array', array.dtype.name, [*array.shape]], np.ascontiguousarray(array).tobytes()


def _unpacked(content: bytes, place: _Place, like: Tree) -> Tree:
    """Raises UserError for what isn't one that `packed` made."""
    try:
        (size,) = SIZE.unpack_from(content)
        written = files.parse_json(content[SIZE.size : SIZE.size + size].decode(), str(place.path))
        leaves, at = [], SIZE.size + size
        for note in written['leaves']:
            leaf, at = _leaf(note, content, at)
            leaves.append(leaf)
        if at != len(content):
            raise ValueError(f'{len(content) - at} bytes left over')
        structure = written['tree']
    except (KeyError, IndexError, TypeError, ValueError, AttributeError, struct.error) as error:
        raise UserError(
            f'{place.path}: the batch of step {place.step} is not one that was kept here ({error})'
        ) from None
    if like is not None:
        if (found := len(jax.tree.leaves(like))) != len(leaves):
            raise UserError(
                f'batch_like: {found} arrays found, {len(leaves)} expected, as a batch of the run has'
            )
        return jax.tree.unflatten(jax.tree.structure(like), leaves)
    return outline.made(structure, leaves, f'{place.path}: the batch of step {place.step}')


def _leaf(note: Sequence[Any], content: bytes, at: int) -> tuple[Any, int]:
    kind, name, what = note
    if kind == 'number':
        return _NUMBERS[name](what), at
    dtype = np.dtype(np.uint32) if kind == 'key' else _dtype(name)
    if not all(type(n) is int and n >= 0 for n in what):
        raise ValueError(f'{what} is no shape')
    end = at + math.prod(what) * dtype.itemsize
    if end > len(content):
        raise ValueError(f'{end - len(content)} bytes missing')
    array = np.frombuffer(content, dtype, math.prod(what), at).reshape(what).copy()
    return (jax.random.wrap_key_data(jnp.asarray(array), impl=name) if kind == 'key' else array), end


_NUMBERS: dict[str, Callable[[str], Any]] = {
    'bool': lambda text: text == 'True',
    'int': int,
    'float': float,
    'complex': complex,
}


def _dtype(name: str) -> np.dtype:
    """By its name; of the names that JAX's arrays have."""
    return np.dtype(getattr(ml_dtypes, name)) if name in _SMALL else np.dtype(_PLAIN[name])


_PLAIN = {
    name: name
    for name in (
        'bool', 'int8', 'int16', 'int32', 'int64', 'uint8', 'uint16', 'uint32', 'uint64', 'float16', 'float32',
        'float64', 'complex64', 'complex128',
    )
}  # fmt: skip
_SMALL = frozenset(
    ('bfloat16', 'float8_e4m3fn', 'float8_e5m2', 'float8_e4m3b11fnuz', 'float8_e4m3fnuz', 'float8_e5m2fnuz',
     'float8_e3m4', 'float8_e4m3', 'float8_e8m0fnu', 'float4_e2m1fn', 'int4', 'uint4', 'int2', 'uint2')
)  # fmt: skip
