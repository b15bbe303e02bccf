"""As acts.py, of a run of words: all of its files, and going back from a symptom; and outcomes of experiments."""

import functools
import sys
from pathlib import Path

import acts
import numpy as np
import small
from acts import Act, Found

from jaxrnn.diagnosis import Symptom
from jaxrnn.experiment.cache import CachedOutcome, OutcomeCache
from jaxrnn.record import layout, rewind
from jaxrnn.words import data, run, train
from jaxrnn.words.config import Config

AT = 3
"""The step whose batch is bad: the run goes back to the first checkpoint, and does so again without that batch."""

STOP = 6


def configuration() -> Config:
    made = small.configuration(hidden=2, batch_size=2)
    return made.changed(max_steps=STOP, checkpoint_every=100, on_divergence='rewind')


@functools.lru_cache
def program() -> train.Program:
    made = train.make_program(configuration(), small.dataset())

    def batch_at(step: int):
        batch = made.batch_at(step)
        return batch._replace(targets=np.where(step == AT, np.float32('nan'), batch.targets))

    return made._replace(batch_at=batch_at)


def prepare(directory: Path) -> None:
    directory.mkdir()
    data.write_dataset(layout.Paths(directory).data, small.dataset())


def trains(directory: Path) -> None:
    run.train_run(configuration(), directory, make_program=lambda *_: program())


@functools.lru_cache
def straight() -> dict[str, bytes]:
    """The files of the run that never stopped, but for its checkpoints."""
    with acts.folder() as home:
        prepare(home / 'run')
        trains(home / 'run')
        return _files(home / 'run')


def _files(directory: Path) -> dict[str, bytes]:
    return {
        path.name: path.read_bytes()
        for path in directory.iterdir()
        if path.suffix in ('.json', '.jsonl', '.npz')
    }


def goes_on(directory: Path, found: Found) -> list[str]:
    """With the same command it becomes the run that never stopped, whatever it has gone back from."""
    if not layout.Paths(directory).data.exists():
        return ['its data is gone']
    trains(directory)
    return is_whole(directory)


def is_whole(directory: Path) -> list[str]:
    got, expected = _files(directory), straight()
    wrong = [f'{name} is another' for name in expected if got.get(name) != expected[name]]
    if not all(each.done for each in rewind.read(layout.Paths(directory).rewinds)):
        wrong.append('going back is not done')
    return wrong


KNOWN = {
    (change, start, 9): CachedOutcome('averted', symptom, 0.5, 9, True, 4)
    for start, (change, symptom) in enumerate(
        {'a': None, 'b': Symptom('spike', 3), 'c': Symptom('plateau', 5)}.items()
    )
}


def remembers(directory: Path) -> None:
    cache = OutcomeCache(layout.Paths(directory).experiments, 'scope')
    for key, outcome in KNOWN.items():
        if cache.get(*key) is None:
            cache.put(*key, outcome)


def knows_nothing_false(directory: Path, found: Found) -> list[str]:
    """What it knows is so, and what was lost is put there again."""
    directory.mkdir(exist_ok=True)
    cache = OutcomeCache(layout.Paths(directory).experiments, 'scope')
    wrong = [f'{key[0]} is another' for key, known in KNOWN.items() if cache.get(*key) not in (None, known)]
    remembers(directory)
    again = OutcomeCache(layout.Paths(directory).experiments, 'scope')
    return wrong + [f'{key[0]} is lost' for key, known in KNOWN.items() if again.get(*key) != known]


ACTS = {
    'words': Act(prepare, trains, goes_on, is_whole),
    'experiments': Act(lambda directory: directory.mkdir(), remembers, knows_nothing_false, acts.nothing),
}

if __name__ == '__main__':
    ACTS[sys.argv[1]].do(Path(sys.argv[2]))
