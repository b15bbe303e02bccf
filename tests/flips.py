"""Every bit of every file of a run flipped, one at a time: what does the reader of that file say?

A flip is noticed (refused, or gone around, by name), or it changes nothing of what is read: a byte that nobody looks
at, another spelling of the same. What remains is a change that nobody notices, and a reader that fails.
"""

import functools
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import acts
import numpy as np
import words_acts

from jaxrnn.experiment.cache import OutcomeCache
from jaxrnn.record import layout, loop, resume, rewind
from jaxrnn.types import UserError
from jaxrnn.words import data, opening, run

IDENTITY = {'config': 'c0ffee5c0ffee5c0', 'data': '0123456789abcdef'}


class NoticedError(Exception):
    """What is damaged is named."""


class Counts(NamedTuple):
    """What became of flips."""

    flips: int
    noticed: int
    same: int  # nothing that is read is another
    changed: tuple[int, ...]  # the bits whose flip changed what was read, and nobody noticed
    failed: tuple[str, ...]  # what isn't a user's error


class Target(NamedTuple):
    """A file to be damaged."""

    path: Path
    read: Callable[[], Any]  # what is made of it; raises NoticedError or UserError


def flips(target: Target, bits: Iterator[int] | range) -> Counts:
    """Flips bits one by one; the file is whole again afterwards."""
    whole, expected = target.path.read_bytes(), target.read()
    flipped = noticed = same = 0
    changed, failed = [], []
    try:
        for bit in bits:
            flipped += 1
            byte = whole[bit >> 3] ^ 1 << (bit & 7)
            with open(target.path, 'r+b') as file:
                file.seek(bit >> 3)
                file.write(bytes([byte]))
            try:
                found = target.read()
            except (NoticedError, UserError):
                noticed += 1
            except Exception as error:
                failed.append(f'bit {bit}: {type(error).__name__}: {error}')
            else:
                if found == expected:
                    same += 1
                else:
                    changed.append(bit)
            with open(target.path, 'r+b') as file:
                file.seek(bit >> 3)
                file.write(whole[bit >> 3 : (bit >> 3) + 1])
    finally:
        target.path.write_bytes(whole)
    return Counts(flipped, noticed, same, tuple(changed), tuple(failed))


def bits_of(target: Target, most: int | None = None, seed: int = 0) -> range | Iterator[int]:
    """All of a file's, or some."""
    count = 8 * target.path.stat().st_size
    if most is None or count <= most:
        return range(count)
    return iter(sorted(np.random.default_rng(seed).choice(count, most, replace=False).tolist()))


# A run of any step


def any_run(directory: Path) -> None:
    acts.run(directory, 4, identity=IDENTITY)


def checkpoint_targets(directory: Path, *, recorded: bool) -> dict[str, Target]:
    """The files of the newest checkpoint; held against the records, or against their own digest alone."""
    saved = acts.checkpoints(directory)
    digests = {row['step'] + 1: row['digest'] for row in acts.records(directory).read()} if recorded else {}
    newest = saved.steps()[-1]

    def read() -> str:
        resume.check_identity(directory, saved, IDENTITY)
        found = resume.newest_intact(saved, digests.get)
        assert found is not None
        if found.damaged:
            raise NoticedError(found.damaged)
        return loop.state_digest(found.state)

    home = saved.directory / str(newest)
    return {
        str(path.relative_to(home)): Target(path, read) for path in sorted(home.rglob('*')) if path.is_file()
    }


def records_target(directory: Path) -> Target:
    file = acts.records(directory)
    whole = list(file.read())

    def read() -> list[Any]:
        found = list(file.read())
        if found == whole[:-1]:
            raise NoticedError('the last line has no end: as one that a kill cut short, it is computed again')
        return found

    return Target(layout.Paths(directory).records, read)


# A run of words


def words_run(directory: Path) -> None:
    words_acts.prepare(directory)
    words_acts.trains(directory)
    words_acts.remembers(directory)


def words_targets(directory: Path) -> dict[str, Target]:
    """The files that decide what a run was."""
    paths = layout.Paths(directory)
    config, dataset = run.read_config(paths), data.read_dataset(paths.data)

    def of_config() -> Any:
        found = run.read_config(paths)
        opening.check_identity(paths, found, dataset, opening.Source())
        return found.digest()  # of all options that decide a bit

    def of_data() -> Any:
        found = data.read_dataset(paths.data)
        opening.check_identity(paths, config, found, opening.Source())
        return [each.tolist() if isinstance(each, np.ndarray) else each for each in found]

    def of_experiments() -> Any:
        cache = OutcomeCache(paths.experiments, 'scope')
        found = {key: cache.get(*key) for key in words_acts.KNOWN}
        if {key: known for key, known in found.items() if known} == words_acts.KNOWN:
            return found
        if all(known in (None, words_acts.KNOWN[key]) for key, known in found.items()):
            raise NoticedError('an outcome is computed again')
        return found

    readers = {
        paths.config: of_config,
        paths.data: of_data,
        paths.rewinds: functools.partial(rewind.read, paths.rewinds),
        paths.experiments: of_experiments,
    }
    return {path.name: Target(path, read) for path, read in readers.items()}


def opened_by(look: Callable[[], object], directory: Path) -> set[str]:
    """The files of a run that are opened to be read."""
    found, watching = set(), True

    def watch(event: str, arguments: tuple) -> None:
        if watching and event == 'open' and isinstance(arguments[0], str | os.PathLike):
            path = Path(arguments[0])
            if (
                path.suffix != '.tmp'
                and directory in path.parents
                and not (arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR)
            ):
                found.add(str(path.relative_to(directory)))

    sys.addaudithook(watch)  # which can't be taken away again
    try:
        look()
    finally:
        watching = False
    return found
