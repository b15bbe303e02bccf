"""A run of jaxrnn's own networks: made from a configuration, opened from its directory, bisected."""

import contextlib
import dataclasses
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxrnn import (
    checks,
    data,
    detect,
    experiment,
    inside,
    loop,
    optim,
    outcome,
    remedy,
    replay,
    telemetry,
    train,
)
from jaxrnn.checkpoint import Checkpoints
from jaxrnn.config import Config
from jaxrnn.detect import Detector
from jaxrnn.diagnosis import Cause, Diagnosis, Symptom
from jaxrnn.telemetry import Row
from jaxrnn.types import Tree, UserError

AFTERMATH = 100
"""Steps to train on after a symptom under --on_divergence=stop, so that its records show what became of it."""


class Trained(NamedTuple):
    """What `train_run` leaves."""

    ended: loop.Ended
    diagnosis: Diagnosis  # of the records alone; nothing replayed
    evaluation: Mapping[str, Mapping[str, float]]  # split -> score -> value


class Bisected(NamedTuple):
    """What `bisect_run` found."""

    diagnosis: Diagnosis
    rows: list[Row]  # records around the first bad step
    look: inside.Look | None  # into that step
    opened: 'Opened'


class Diagnosed(NamedTuple):
    """What `diagnose_run` found."""

    diagnosis: Diagnosis
    bisected: Bisected
    told: outcome.Told | None  # None where there was no symptom, or it isn't reproducible


class Opened(NamedTuple):
    """A run read back from its directory."""

    config: Config
    dataset: data.Dataset
    program: train.Program
    checkpoints: Checkpoints
    records: list[Row]
    make_program: train.Make


def train_run(
    config: Config,
    directory: str | os.PathLike,
    *,
    make_program: train.Make = train.make_program,
    say: Callable[[str], None] = lambda line: None,
    on_row: Callable[[Row], None] = lambda row: None,
) -> Trained:
    """Trains a configuration into a directory, or goes on with the run that is there.

    Args:
        config: of the run.
        directory: its home.
        make_program: what the configuration and its data are made into. Whatever looks into the run later must be
            given the same.
        say: gets a line before slow work.
        on_row: sees every record, a step late.

    Raises:
        UserError: bad data, a directory that can't be used, or one that holds a run of another configuration.
    """
    paths = loop.Paths(Path(directory))
    _check_same_config(paths, config)
    optim.learning_rate(config.optimiser)  # refuses what contradicts itself before any slow work
    with _directory(paths.root):
        dataset = _dataset(paths, config, say)
    program = make_program(config, dataset)
    _describe(paths, config, dataset)
    stop = _Stop(config.loop.on_divergence == 'stop')
    stop.see_all(telemetry.RecordFile(paths.records).read())

    def see(row: Row) -> bool:
        on_row(row)
        return stop(row)

    ended = loop.run(
        program.step,
        program.batch_at,
        program.init,
        directory,
        _loop_options(config, most=stop.at),
        identity={'config': config.digest(), 'data': dataset.digest},
        on_row=see,
    )
    found = detect.symptoms(telemetry.series(telemetry.RecordFile(paths.records).read()))
    diagnosis = _of_records(found, ended)
    evaluation = train.evaluate(program.predict, ended.state.params, dataset)
    loop.write_json(paths.evaluation, evaluation)
    loop.write_json(paths.diagnosis, diagnosis.to_json())
    return Trained(ended, diagnosis, evaluation)


def open_run(directory: str | os.PathLike, make_program: train.Make = train.make_program) -> Opened:
    """Reads a run back. Raises UserError where the directory holds none, or not a whole one."""
    paths = loop.Paths(Path(directory))
    config = read_config(paths)
    dataset = _dataset(paths, config, say=lambda line: None)
    program = make_program(config, dataset)
    checkpoints = Checkpoints(paths.checkpoints, like=jax.eval_shape(program.init))
    records = telemetry.RecordFile(paths.records).read()
    return Opened(config, dataset, program, checkpoints, records, make_program)


def newest_params(opened: Opened) -> Tree:
    """The parameters of the newest checkpoint."""
    steps = opened.checkpoints.steps()
    if not steps:
        raise UserError(f'--run_dir: {opened.checkpoints.directory} holds no checkpoint; train first')
    return opened.checkpoints.restore(steps[-1]).params


def bisect_run(
    directory: str | os.PathLike,
    detectors: Sequence[Detector] = detect.DETECTORS,
    *,
    good: int | None = None,
    bad: int | None = None,
    use_records: bool = True,
    make_program: train.Make = train.make_program,
) -> Bisected:
    """Bisects a run of jaxrnn's own (see `replay.bisect`), looks into the step, and writes the diagnosis."""
    opened = open_run(directory, make_program)
    options = opened.config.training
    subject = _subject(opened, opened.records if use_records else ())
    with jax.debug_nans(options.debug_nans):
        diagnosis, replayed = replay.bisect(subject, detectors, good=good, bad=bad)
    screens = [name for name in inside.SCREENS if getattr(options, name)]
    diagnosis, look = inside.into(subject, diagnosis, screens=screens)
    diagnosis = _with_words(diagnosis, opened)
    rows = {row['step']: row for row in opened.records if use_records} | {
        row['step']: row for row in replayed
    }
    loop.write_json(loop.Paths(Path(directory)).diagnosis, diagnosis.to_json())
    return Bisected(diagnosis, [rows[step] for step in sorted(rows)], look, opened)


def diagnose_run(
    directory: str | os.PathLike,
    detectors: Sequence[Detector] = detect.DETECTORS,
    *,
    budget: int = experiment.BUDGET,
    good: int | None = None,
    bad: int | None = None,
    make_program: train.Make = train.make_program,
    say: Callable[[str], None] = lambda line: None,
) -> Diagnosed:
    """Bisects a run, looks into the step, makes the seven checks and, where there is a symptom, experiments; writes the
    diagnosis.

    Args:
        directory: of the run.
        detectors: as in `replay.bisect`.
        budget: steps that may be replayed, those of the bisection included.
        good, bad: as in `replay.bisect`.
        make_program: as in `train_run`; it is given the changed configurations, too.
        say: gets a line before slow work.
    """
    bisected = bisect_run(directory, detectors, good=good, bad=bad, make_program=make_program)
    diagnosis, opened = bisected.diagnosis, bisected.opened
    subject = _subject(opened, opened.records)

    def changes(window: outcome.Window, bad_batches: Sequence[int]) -> list[outcome.Change]:
        symptom = diagnosis.symptom
        assert symptom is not None
        remedies = [
            remedy.change(opened.config, opened.dataset, each, make_program)
            for each in remedy.suspects(opened.config, symptom.kind, lasting=window.lasting)
        ]
        say(f'replaying the steps from {window.start} on, under one change at a time')
        return experiment.in_order(subject, window, bad_batches, remedies)

    diagnosis, told = experiment.explain(subject, diagnosis, changes, detectors, budget=budget)
    step = diagnosis.first_bad_step
    evidence = checks.Evidence(
        opened.dataset,
        telemetry.series(opened.records),
        opened.program.init().params,
        None if step is None else opened.program.batch_at(step),
        diagnosis.where,
        told,
        diagnosis.symptom is not None,
    )
    diagnosis = dataclasses.replace(diagnosis, checks=(*checks.seven(evidence), *diagnosis.checks))
    loop.write_json(loop.Paths(Path(directory)).diagnosis, diagnosis.to_json())
    return Diagnosed(diagnosis, bisected, told)


def look_into_run(
    directory: str | os.PathLike,
    step: int,
    *,
    against: int | None = None,
    screens: Sequence[str] = (),
    float64: bool = False,
    make_program: train.Make = train.make_program,
) -> tuple[inside.Look, list[str]]:
    """Looks into one step of a run (see `inside.look`).

    Returns:
        What was found, and the words of the step's batch.

    Raises:
        UserError: no run, no such step, or no checkpoint before it.
    """
    opened = open_run(directory, make_program)
    for flag, value in (('--step', step), ('--against', against)):
        if value is None:
            continue
        if value < 0:
            raise UserError(f'{flag}: {value} found, at least 0 expected')
        if opened.records and value > opened.records[-1]['step']:
            raise UserError(f'{flag}: {value} found, but the run has steps 0 to {opened.records[-1]["step"]}')
    if against == step:
        raise UserError(f'--against: {against} found, another step than --step expected')
    look = inside.look(
        _subject(opened, opened.records), step, against=against, screens=screens, float64=float64
    )
    return look, words_of(opened, step)


def _subject(opened: Opened, records: Sequence[Row]) -> replay.Subject:
    options = opened.config.training
    return replay.subject(
        opened.program.step,
        opened.program.batch_at,
        opened.checkpoints,
        records,
        digest_every=options.digest_every,
        checkify=options.checkify,
    )


def _with_words(diagnosis: Diagnosis, opened: Opened) -> Diagnosis:
    """Says whose examples they are."""
    if diagnosis.where is None or diagnosis.first_bad_step is None:
        return diagnosis
    words = words_of(opened, diagnosis.first_bad_step)
    named = [words[place] for place in diagnosis.where['examples'] if place < len(words)]
    return dataclasses.replace(diagnosis, where={**diagnosis.where, 'words': named})


def words_of(opened: Opened, step: int) -> list[str]:
    """The words of a step's batch."""
    batch = opened.program.batch_at(step)
    return [opened.dataset.words[place] for place in np.asarray(batch.index)]


def read_config(paths: loop.Paths) -> Config:
    """The configuration of a run. Raises UserError where there is none."""
    try:
        return Config.from_json(json.loads(paths.config.read_text(encoding='utf-8')))
    except OSError as error:
        raise UserError(
            f'--run_dir: {paths.root} holds no run (config.json: {error.strerror}); '
            'name the directory that train.py was given'
        ) from error
    except (ValueError, TypeError) as error:
        raise UserError(f'--run_dir: {paths.config} is not a configuration of jaxrnn ({error})') from error


def _loop_options(config: Config, most: float) -> loop.Options:
    shared = {
        field: getattr(config.loop, field)
        for field in ('max_steps', 'checkpoint_every', 'keep_latest', 'keep_every')
    }
    checks = {field: getattr(config.training, field) for field in ('digest_every', 'checkify', 'debug_nans')}
    shared['max_steps'] = int(min(shared['max_steps'], most + 1))
    return loop.Options(**shared, **checks)


def _check_same_config(paths: loop.Paths, config: Config) -> None:
    if not paths.config.exists():
        return
    before = read_config(paths)
    if different := config.differences(before):
        more = f' and {len(different) - 1} more' if len(different) > 1 else ''
        raise UserError(
            f'--run_dir: {paths.root} holds a run of other flags ({different[0]} there{more}); choose another '
            f'directory, or go on with that run by --flagfile={paths.flags}'
        )


@contextlib.contextmanager
def _directory(root: Path) -> Iterator[None]:
    """A directory that can be written to, before the slow work; gone again if that fails."""
    made = not root.exists()
    loop.make_directory(root)
    try:
        yield
    except BaseException:
        if made:
            root.rmdir()
        raise


def _dataset(paths: loop.Paths, config: Config, say: Callable[[str], None]) -> data.Dataset:
    """The run's own copy of its data, so that it can be diagnosed anywhere; else made from its source."""
    if paths.data.exists():
        return data.read_dataset(paths.data)
    dataset = data.load(config.data, config.training.seed, progress=say)
    dropped = ', '.join(f'{count:,} {reason}' for reason, count in dataset.dropped.items())
    say(f'{len(dataset.words):,} words from {dataset.source}; dropped: {dropped or "none"}')
    return dataset


def _describe(paths: loop.Paths, config: Config, dataset: data.Dataset) -> None:
    """Writes configuration, flags and data, each whole or not at all."""
    loop.write_json(paths.config, config.to_json())
    flags = [
        f'--{name}={_flag(value)}' for group in config.to_json().values() for name, value in group.items()
    ]
    loop.write_text(paths.flags, '\n'.join(flags) + '\n')
    if not paths.data.exists():
        data.write_dataset(paths.data, dataset)


def _flag(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _of_records(found: list[Symptom], ended: loop.Ended) -> Diagnosis:
    if ended.first_mismatch is not None:
        why = (
            f'steps computed again on resuming differ from their records, from step {ended.first_mismatch} on'
        )
        cause = Cause('nondeterminism', why)
        return Diagnosis(symptom=found[0] if found else None, cause=cause)
    if not found:
        return Diagnosis(cause=Cause('none', 'no rule holds at any step'))
    return Diagnosis(symptom=found[0], cause=Cause('none', 'not looked for: run diagnose.py'))


@dataclasses.dataclass
class _Stop:
    """Ends training some steps after a symptom, where it is to end."""

    on: bool
    watch: detect.Watch = dataclasses.field(default_factory=detect.Watch)
    at: float = float('inf')

    def see_all(self, rows: Sequence[Row]) -> None:
        """The rows of a run that is continued: it may have had its symptom, and then goes no further."""
        for row in rows:
            self(row)

    def __call__(self, row: Row) -> bool:
        if not self.on:
            return False
        for symptom in self.watch(row):
            if symptom.kind != 'spike':  # most spikes recover; those that don't end as another symptom
                self.at = min(self.at, symptom.step + AFTERMATH)
        return row['step'] >= self.at
