"""A run of jaxrnn's own networks: made from a configuration, opened from its directory, bisected."""

import concurrent.futures
import contextlib
import dataclasses
import json
import multiprocessing
import os
import pickle
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxrnn import (
    checks,
    data,
    detect,
    environment,
    experiment,
    inside,
    loop,
    optim,
    outcome,
    remedy,
    replay,
    rewind,
    signals,
    telemetry,
    train,
)
from jaxrnn.checkpoint import Checkpoints
from jaxrnn.config import Config
from jaxrnn.detect import Detector
from jaxrnn.diagnosis import Cause, Diagnosis, Symptom
from jaxrnn.outcome import AVERTED, UNCHANGED, VERDICTS
from jaxrnn.telemetry import Row
from jaxrnn.types import Batch, Tree, UserError

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
    identity = {'config': config.digest(), 'data': dataset.digest}
    while True:
        rewinds = _rewound(paths)
        stop = _Stop(config.loop.on_divergence)
        stop.see_all(telemetry.RecordFile(paths.records).read())

        def see(row: Row, stop: _Stop = stop) -> bool:
            on_row(row)
            return stop(row)

        ended = loop.run(
            program.step,
            loop.without(program.batch_at, rewind.skipped(rewinds)),
            program.init,
            directory,
            _loop_options(config, most=stop.at),
            identity=identity,
            on_row=see,
        )
        if ended.interrupted is not None or not _goes_back(paths, stop, rewinds, say):
            break
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
    program = program._replace(
        batch_at=loop.without(program.batch_at, rewind.skipped(rewind.read(paths.rewinds)))
    )
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
    fresh_runs: int = 0,
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
        fresh_runs: how many of the remedies that avert are also trained with from the start, with another seed, as far
            again as the symptom took to come.
        make_program: as in `train_run`; it is given the changed configurations, too.
        say: gets a line before slow work.
    """
    bisected = bisect_run(directory, detectors, good=good, bad=bad, make_program=make_program)
    diagnosis, opened = bisected.diagnosis, bisected.opened
    subject = _subject(opened, opened.records)

    read = frozenset().union(*(detector.rule.fields for detector in detectors))
    signals_too = bool(read & {signal.name for signal in signals.OF_ADAM})

    def change(each: remedy.Remedy) -> outcome.Change:
        return remedy.change(opened.config, opened.dataset, each, make_program, signals=signals_too)

    def combine(first: outcome.Change) -> outcome.Change | None:
        found = remedy.combined(opened.config, first.name)
        return None if found is None else change(found)

    def changes(window: outcome.Window, bad_batches: Sequence[int]) -> list[outcome.Change]:
        symptom = diagnosis.symptom
        assert symptom is not None
        remedies = [
            change(each) for each in remedy.suspects(opened.config, symptom.kind, lasting=window.lasting)
        ]
        say(f'replaying the steps from {window.start} on, under one change at a time')
        return experiment.in_order(subject, window, bad_batches, remedies)

    diagnosis, told = experiment.explain(
        subject, diagnosis, changes, detectors, budget=budget, combine=combine
    )
    if diagnosis.cause.kind == 'nondeterminism' and environment.threads() > 1:
        say('computing the step that differs twice more, on one thread')
        diagnosis = _on_one_thread(diagnosis, directory, make_program)
    step = diagnosis.first_bad_step
    batch = None if step is None else opened.program.batch_at(step)
    evidence = checks.Evidence(
        opened.dataset,
        telemetry.series(opened.records),
        opened.program.init().params,
        batch if isinstance(batch, Batch) else None,
        diagnosis.where,
        told,
        diagnosis.symptom is not None,
    )
    diagnosis = dataclasses.replace(diagnosis, checks=(*checks.seven(evidence), *diagnosis.checks))
    if told is not None and told.identical:
        diagnosis = _in_fresh_runs(diagnosis, opened, fresh_runs, say)
    loop.write_json(loop.Paths(Path(directory)).diagnosis, diagnosis.to_json())
    return Diagnosed(diagnosis, bisected, told)


def _in_fresh_runs(diagnosis: Diagnosis, opened: Opened, count: int, say: Callable[[str], None]) -> Diagnosis:
    """Trains anew with the first remedies that avert, each beside a run without any; those that hold come first, and
    those that break last."""
    named = {each.name: each for each in remedy.REMEDIES}
    tried = [r for r in diagnosis.remedies if r['outcome'] == AVERTED and r['name'] in named][:count]
    if not tried:
        return diagnosis
    found = [_fresh_run(opened, 'no change', opened.config, diagnosis, say)]
    for each in tried:
        changed = remedy.applied(opened.config, named[each['name']])
        found.append(_fresh_run(opened, each['name'], changed, diagnosis, say))
    holds = {each['name']: check['ok'] for each, check in zip(tried, found[1:], strict=True)}
    order = {True: 0, None: 1, False: 2}
    remedies = sorted(
        diagnosis.remedies,
        key=lambda r: (VERDICTS.index(r['outcome']), order[holds.get(r['name'])]),
    )
    return dataclasses.replace(diagnosis, remedies=tuple(remedies), checks=(*diagnosis.checks, *found))


def _fresh_run(
    opened: Opened, name: str, config: Config, diagnosis: Diagnosis, say: Callable[[str], None]
) -> checks.Check:
    """Whether a run of a configuration with another seed, on the same data, suffers the symptom or a graver one within
    twice the steps."""
    assert diagnosis.symptom is not None
    steps = min(2 * (diagnosis.symptom.step + 1), config.loop.max_steps)
    changed = config.changed(
        seed=config.training.seed + 1, max_steps=steps, on_divergence='stop', checkpoint_every=steps
    )
    say(f'training anew for {steps:,} steps: {name}')
    with tempfile.TemporaryDirectory() as directory:
        data.write_dataset(loop.Paths(Path(directory)).data, opened.dataset)
        symptom = train_run(changed, directory, make_program=opened.make_program).diagnosis.symptom
    broke = symptom is not None and (symptom.kind != 'spike' or diagnosis.symptom.kind == 'spike')
    if symptom is None:
        said = f'with seed {changed.training.seed} it went {steps:,} steps without a symptom'
    else:
        said = f'with seed {changed.training.seed}: {symptom.kind} at step {symptom.step}'
    return {
        'name': f'{name}, in a fresh run',
        'ok': not broke,
        'value': float(symptom.step if symptom else steps),
        'why': said,
    }


def _on_one_thread(diagnosis: Diagnosis, directory: str | os.PathLike, make_program: train.Make) -> Diagnosis:
    """Whether a step that comes out differently each time does so on one thread, too: asked of a process that has no
    other, as XLA starts its threads once."""
    step = diagnosis.replay.first_mismatch
    assert step is not None
    with concurrent.futures.ProcessPoolExecutor(
        1, multiprocessing.get_context('spawn'), environment.use_threads, (1,)
    ) as pool:
        try:
            agree = pool.submit(_repeats, directory, make_program, step).result()
        except (
            pickle.PicklingError,
            AttributeError,
        ):  # a maker of programs that another process can't be given
            return diagnosis
    cause = Cause(
        'nondeterminism', f'{diagnosis.cause.why}; on one thread they {"agree" if agree else "do not"}'
    )
    remedy = {
        'name': 'one thread',
        'flags': '--threads=1',
        'outcome': AVERTED if agree else UNCHANGED,
        'loss_at_horizon': None,
        'point_of_no_return': None,
    }
    return dataclasses.replace(diagnosis, cause=cause, remedies=(*diagnosis.remedies, remedy))


def _repeats(directory: str | os.PathLike, make_program: train.Make, step: int) -> bool:
    """Whether two replays up to a step agree."""
    opened = open_run(directory, make_program)
    subject = _subject(opened, ())
    start = max(at for at in subject.checkpoints.steps() if at <= step)
    first, second = (replay.Replayer(subject).replay(start, step + 1) for _ in range(2))
    return all(telemetry.same(a, b) for a, b in zip(first, second, strict=True))


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
    """The words of a step's batch; none of one that isn't jaxrnn's own."""
    batch = opened.program.batch_at(step)
    if not isinstance(batch, Batch):
        return []
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


def _rewound(paths: loop.Paths) -> list[rewind.Rewind]:
    """How often a run has gone back; finishes a time that was cut short."""
    rewinds = rewind.read(paths.rewinds)
    if rewinds and not rewinds[-1].done:
        loop.rewind(paths.root, rewinds[-1].to)
        rewinds[-1] = rewinds[-1]._replace(done=True)
        rewind.write(paths.rewinds, rewinds)
    return rewinds


def _goes_back(
    paths: loop.Paths, stop: '_Stop', rewinds: Sequence[rewind.Rewind], say: Callable[[str], None]
) -> bool:
    """Decides whether a run that ended goes back, and writes it down."""
    if stop.found is None or stop.on != 'rewind':
        return False
    planned = rewind.plan(stop.found, Checkpoints(paths.checkpoints).steps(), rewinds)
    symptom = f'{stop.found.kind} at step {stop.found.step}'
    if planned is None:
        say(f'{symptom}: went back {rewind.TRIES} times, to no avail')
        return False
    left_out = (
        f', without the batches of steps {planned.skipped[0]} to {planned.skipped[1]}'
        if planned.skipped
        else ''
    )
    say(f'{symptom}: going back to step {planned.to}{left_out}')
    rewind.write(paths.rewinds, [*rewinds, planned])
    return True


@dataclasses.dataclass
class _Stop:
    """Ends training at a symptom, where it is to go back, or some steps after it, where it is to end."""

    on: str  # of --on_divergence
    watch: detect.Watch = dataclasses.field(default_factory=detect.Watch)
    at: float = float('inf')
    found: Symptom | None = None

    def see_all(self, rows: Sequence[Row]) -> None:
        """The rows of a run that is continued: it may have had its symptom, and then goes no further."""
        for row in rows:
            self(row)

    def __call__(self, row: Row) -> bool:
        if self.on == 'continue':
            return False
        for symptom in self.watch(row):
            if symptom.kind != 'spike':  # most spikes recover; those that don't end as another symptom
                self.found = symptom if self.found is None or symptom.step < self.found.step else self.found
                self.at = self.found.step + (AFTERMATH if self.on == 'stop' else 0)
        return row['step'] >= self.at
