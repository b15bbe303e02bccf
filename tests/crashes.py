"""Every place where an act of a run can be cut short: by a kill, or by a power loss, at each call in turn.

A kill leaves what all calls before it did. A power loss leaves what was synced, and of the rest none, some, or the
wrong half. Acts are recorded once (shim.py); what a disk may hold at each call follows from that (disk.py), and the run
goes on from it in this process. Real kills are there to show that it does follow.
"""

import collections
import functools
import hashlib
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import acts
import disk
import numpy as np
import shim
import words_acts
from acts import Act, Found
from shim import Call

from jaxrnn.types import UserError

ROOT = Path(__file__).parent.parent
RUN = 'run'
"""The directory of the run; watched is the one around it, in which it gets its name."""

CHECKPOINTS = f'{RUN}/checkpoints/'


ACTS = {**acts.ACTS, **words_acts.ACTS}


class Recorded(NamedTuple):
    """An act, call by call."""

    name: str
    start: disk.Image  # of the directory around the run
    calls: Sequence[Call]
    wholes: Mapping[int, disk.Image]  # the files of each checkpoint, as they were when it got its name


class Outcome(NamedTuple):
    """What became of one place."""

    at: int = 0  # calls before it
    loss: str = ''
    wrong: Sequence[str] = ()
    refused: str = ''  # what a person is told who has to do something first
    known: bool = False  # whether the same files were gone on from before


def command(name: str, directory: Path) -> list[str]:
    program = acts.__file__ if name in acts.ACTS else words_acts.__file__
    return [sys.executable, program, name, str(directory)]


def environ() -> dict[str, str]:
    """Of what is killed: it shares no compiled programs with anybody."""
    shared = {name: value for name, value in os.environ.items() if name != 'JAX_COMPILATION_CACHE_DIR'}
    return {**shared, 'PYTHONPATH': str(ROOT), 'JAX_PLATFORMS': 'cpu'}


def prepared(name: str, folder: Path) -> Path:
    """A directory in which the act is the next to happen; the run's is in it."""
    folder.mkdir()
    ACTS[name].prepare(folder / RUN)
    return folder


def record(name: str, folder: Path) -> Recorded:
    """Does an act once under the shim. `folder` is empty, and has no link in its path."""
    root = prepared(name, folder / 'recorded')
    start, log = disk.read(root), folder / 'log'
    done = shim.run(command(name, root / RUN), root, log=log, environ=environ())
    assert done.returncode == 0, done.stderr
    calls = shim.read(log, root)
    wholes: dict[int, disk.Image] = {}
    there: set[int] = set()
    for at, model in disk.states(start, calls):
        if at and calls[at - 1].kind != 'rename':  # by which a checkpoint gets its name
            continue
        now = _checkpoints(model.after(disk.KEPT))
        wholes |= {step: files for step, files in now.items() if step not in there}
        there = set(now)
    # The record is whole if it leads to what is there.
    assert model.after(disk.KEPT) == disk.read(root)
    return Recorded(name, start, calls, wholes)


def _checkpoints(image: disk.Image) -> dict[int, disk.Image]:
    """The files of each checkpoint."""
    found: dict[int, dict[str, bytes | None]] = collections.defaultdict(dict)
    for path, content in image.items():
        step, _, name = path.removeprefix(CHECKPOINTS).partition('/')
        if path.startswith(CHECKPOINTS) and step.isdecimal() and name:
            found[int(step)][name] = content
    return dict(found)


def found_in(image: disk.Image, recorded: Recorded, named: disk.Image) -> Found:
    """Which checkpoints of an image lack no byte, by the image alone."""
    there = _checkpoints(image)
    whole = [step for step, files in recorded.wholes.items() if files.items() <= there.get(step, {}).items()]
    return Found(whole, list(_checkpoints(named)))


class Place(NamedTuple):
    """A place at which an act is cut short, and what is lost there."""

    at: int  # calls before it
    loss: str
    image: Callable[[], disk.Image]  # what is found then; to be asked before the next place
    seen: Callable[[], disk.Image]  # what the process saw


FIXED = {
    'killed': disk.KEPT,
    'dropped': disk.DROPPED,
    'bytes dropped': disk.BYTES_DROPPED,
    'names dropped': disk.NAMES_DROPPED,
}


def places(recorded: Recorded, garbled: int = 1) -> Iterator[Place]:
    """Every place, with every loss."""
    for at, model in disk.states(recorded.start, recorded.calls):
        seen = functools.partial(model.after, disk.KEPT)
        random = [('garbled', disk.garbled(np.random.default_rng((at, turn)))) for turn in range(garbled)]
        for name, loss in [*FIXED.items(), *random]:
            yield Place(at, name, functools.partial(model.after, loss), seen)
        call = recorded.calls[at] if at < len(recorded.calls) else None
        if call is not None and call.kind == 'write' and len(call.data) > 1:
            half = call._replace(data=call.data[: len(call.data) // 2])
            yield Place(at, 'half a write', functools.partial(_after_one_more, model, half), seen)


def _after_one_more(model: disk.Disk, call: Call) -> disk.Image:
    halfway = model.copy()
    halfway.do(call)
    return halfway.after(disk.KEPT)


def outcomes(recorded: Recorded, folder: Path, share: float = 1, garbled: int = 1) -> Iterator[Outcome]:
    """What becomes of each place, or of a share of them and the last; images that were seen before aren't gone on from
    again."""
    known: dict[str, Outcome] = {}
    last, rng = len(recorded.calls), np.random.default_rng(0)
    for place in places(recorded, garbled):
        done = place.at == last
        if not done and rng.random() >= share:
            continue
        image = place.image()
        found = found_in(image, recorded, place.seen())._replace(garbled=place.loss == 'garbled')
        key = _digest((sorted(image.items()), found, done))
        new = key not in known
        if new:
            known[key] = examined(ACTS[recorded.name], image, found, folder, done=done)
        yield known[key]._replace(at=place.at, loss=place.loss, known=not new)


def _digest(value: object) -> str:
    return hashlib.sha256(repr(value).encode()).hexdigest()


def examined(act: Act, image: disk.Image, found: Found, folder: Path, *, done: bool) -> Outcome:
    """What becomes of an image."""
    with tempfile.TemporaryDirectory(dir=folder) as home:
        disk.write(image, Path(home))
        directory = Path(home, RUN)
        return _outcome(lambda: [*(act.done(directory) if done else ()), *act.afterwards(directory, found)])


def _outcome(look: Callable[[], list[str]]) -> Outcome:
    try:
        return Outcome(wrong=look())
    except UserError as error:
        return Outcome(refused=str(error))
    except Exception as error:
        return Outcome(wrong=[f'{type(error).__name__}: {error}'])


def kills(name: str, folder: Path, start: int = 1, every: int = 1) -> Iterator[Outcome]:
    """A real process killed at one call after the other, until none is left."""
    template, at, killed = prepared(name, folder / 'template'), start, True
    while killed:
        with tempfile.TemporaryDirectory(dir=folder) as home:
            root = Path(home, 'root').resolve()
            shutil.copytree(template, root)
            done = shim.run(command(name, root / RUN), root, kill_at=at, environ=environ())
            killed = done.returncode == -signal.SIGKILL
            if done.returncode and not killed:
                yield Outcome(at, 'killed', [done.stderr[-500:]])
            elif killed:
                directory = root / RUN
                found = _outcome(lambda directory=directory: ACTS[name].afterwards(directory, Found((), ())))
                yield found._replace(at=at, loss='killed')
            at += every
