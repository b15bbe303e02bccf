"""A run of jaxrnn's own networks: made from a configuration, and opened from its directory."""

import contextlib
import dataclasses
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax

from jaxrnn import detect, files
from jaxrnn.alerts import Alerts
from jaxrnn.bisect import replay
from jaxrnn.diagnosis import Cause, Diagnosis, Symptom
from jaxrnn.escaping import as_shell_word
from jaxrnn.record import layout, loop, rewind
from jaxrnn.record.checkpoint import Checkpoints
from jaxrnn.record.record_file import RecordFile
from jaxrnn.record.records import Records, Row
from jaxrnn.types import Series, Tree, UserError
from jaxrnn.words import data, opening, optimisers, train
from jaxrnn.words.config import Config, Data
from jaxrnn.words.opening import Source
from jaxrnn.words.signals import ALARMS
from jaxrnn.words.symptoms import detectors_for

PART = 'state_still'
"""The share of the tensors in which nothing moves."""

AFTERMATH = 100
"""Steps to train on after a symptom under --on_divergence=stop, so that its records show what became of it."""


LEAST = 1e-9
"""Minutes that a time which is over counts as: 0 is no limit."""


class TrainingResult(NamedTuple):
    """What `train_run` leaves."""

    result: loop.RunResult
    diagnosis: Diagnosis  # of the records alone; nothing replayed
    evaluation: Mapping[str, Mapping[str, float]]  # split -> score -> value


class LoadedRun(NamedTuple):
    """A run read back from its directory."""

    config: Config
    dataset: data.Dataset
    program: train.Program
    checkpoints: Checkpoints
    records: Records
    make_program: train.MakeProgram


def train_run(
    config: Config,
    directory: str | os.PathLike,
    *,
    make_program: train.MakeProgram = train.make_program,
    allow_pickle: bool | None = None,
    say: Callable[[str], None] = lambda line: None,
    on_row: Callable[[Row], None] = lambda row: None,
    alerts: Alerts | None = None,
) -> TrainingResult:
    """Trains a configuration into a directory, or goes on with the run that is there.

    Args:
        config: of the run.
        directory: its home.
        make_program: what the configuration and its data are made into. Whatever opens the run later must be
            given the same.
        allow_pickle: whether vectors may be unpickled; None: as the caller's configuration says.
        say: gets a line before slow work.
        on_row, alerts: see every record, a step late; alerts, too, what the run's own watch finds.

    Raises:
        UserError: bad data, a directory that can't be used, or one that holds a run of another configuration.
    """
    began, paths = time.monotonic(), layout.Paths(Path(directory))
    opening.check_files(paths)
    _check_same_config(paths, config)
    optimisers.learning_rate(config.optimiser)  # refuses what contradicts itself before any slow work
    with _directory(paths.root):
        options = config.data if allow_pickle is None else config.changed(allow_pickle=allow_pickle).data
        dataset = _dataset(paths, options, config.training.seed, say)
        program = _fitting(config, dataset, make_program)
    _describe(paths, config, dataset)
    while True:
        rewinds = _rewound(paths)
        stop = _stop(config, dataset, alerts)
        stop.see_all(RecordFile(paths.records).read_intact())

        def see(row: Row, stop: _Stop = stop) -> bool:
            on_row(row)
            return stop(row)

        result = loop.run(
            program.step,
            loop.without(program.batch_at, rewind.skipped(rewinds)),
            program.init,
            directory,
            _loop_options(config, paths, most=stop.at, began=began),
            identity={'config': config.digest(), 'data': dataset.digest},
            on_row=see,
        )
        stop.look_last()
        if result.cut_short or not _goes_back(paths, stop, rewinds, say):
            break
    columns = RecordFile(paths.records).read().columns
    diagnosis = _of_records(columns, dataset, result)
    evaluation = train.evaluate(program.predict, result.state.params, dataset)
    layout.write_json(paths.evaluation, evaluation)
    layout.write_json(paths.diagnosis, diagnosis.to_json())
    return TrainingResult(result, diagnosis, evaluation)


def open_run(
    directory: str | os.PathLike,
    make_program: train.MakeProgram = train.make_program,
    *,
    source: Source | None = None,
) -> LoadedRun:
    """Reads a run back: within its directory, and nothing else but what `source` says.

    Args:
        directory: of the run, which may be a stranger's.
        make_program: as in `train_run`.
        source: what its data may be read from where its own copy is gone.

    Raises:
        UserError: no run, not a whole one, one whose configuration or data isn't what its checkpoints were trained
            with, or one that leads out of its directory.
    """
    paths = layout.Paths(Path(directory))
    opening.check_files(paths)
    config = read_config(paths)
    source = source or Source()
    if not paths.data.exists():
        opening.check_allowed(paths, config, source)
    options = dataclasses.replace(config.data, **source._asdict())
    dataset = _dataset(paths, options, config.training.seed, say=lambda line: None)
    opening.check_identity(paths, config, dataset, source)
    program = make_program(config, dataset)
    program = program._replace(
        batch_at=loop.without(program.batch_at, rewind.skipped(rewind.read(paths.rewinds)))
    )
    checkpoints = Checkpoints(paths.checkpoints, like=jax.eval_shape(program.init))
    records = RecordFile(paths.records).read()
    return LoadedRun(config, dataset, program, checkpoints, records, make_program)


def newest_params(opened: LoadedRun) -> Tree:
    """The parameters of the newest checkpoint. Raises UserError where there is none, or one that was altered."""
    steps = opened.checkpoints.steps()
    if not steps:
        raise UserError(f'--run_dir: {opened.checkpoints.directory} holds no checkpoint; train first')
    state = opened.checkpoints.restore(steps[-1])
    loop.check_digest(opened.checkpoints, steps[-1], state)
    return state.params


def read_config(paths: layout.Paths) -> Config:
    """The configuration of a run. Raises UserError where there is none."""
    try:
        return Config.from_json(files.read_json(paths.config))
    except OSError as error:
        raise UserError(
            f'--run_dir: {paths.root} holds no run (config.json: {error.strerror}); '
            'name the directory that training was given'
        ) from error
    except UserError as error:
        said = str(error).removeprefix(f'{paths.config}: ')
        raise UserError(f'--run_dir: {paths.config} is not a configuration of jaxrnn ({said})') from error


def _loop_options(config: Config, paths: layout.Paths, most: float, began: float) -> loop.LoopOptions:
    shared = {
        field: getattr(config.loop, field)
        for field in ('max_steps', 'checkpoint_every', 'keep_latest', 'keep_every', 'step_timeout')
    }
    if minutes := config.loop.max_minutes:  # of all times that the run goes back, and of making its data
        shared['max_minutes'] = max(minutes - (time.monotonic() - began) / 60, LEAST)
    checks = {field: getattr(config.training, field) for field in ('digest_every', 'checkify', 'debug_nans')}
    shared['max_steps'] = int(min(shared['max_steps'], most + 1))
    return loop.LoopOptions(**shared, **checks, begins=opening.begins(paths))


def _check_same_config(paths: layout.Paths, config: Config) -> None:
    if not paths.config.exists():
        return
    before = read_config(paths)
    if different := config.differences(before):
        more = f' and {len(different) - 1} more' if len(different) > 1 else ''
        raise UserError(
            f'--run_dir: {paths.root} holds a run of other flags ({different[0]} there{more}); choose another '
            f'directory, or go on with that run by --flagfile={as_shell_word(str(paths.flags))}'
        )


@contextlib.contextmanager
def _directory(root: Path) -> Iterator[None]:
    """A directory that can be written to, before the slow work; gone again if that fails."""
    made = not root.exists()
    layout.make_directory(root)
    try:
        yield
    except BaseException:
        if made:
            root.rmdir()
        raise


def _dataset(paths: layout.Paths, options: Data, seed: int, say: Callable[[str], None]) -> data.Dataset:
    """The run's own copy of its data, so that it can be diagnosed anywhere; else made from its source."""
    if paths.data.exists():
        return data.read_dataset(paths.data)
    dataset = data.load(options, seed, progress=say)
    dropped = ', '.join(f'{count:,} {reason}' for reason, count in dataset.dropped.items())
    say(f'{len(dataset.words):,} words from {dataset.source}; dropped: {dropped or "none"}')
    return dataset


def _fitting(config: Config, dataset: data.Dataset, make_program: train.MakeProgram) -> train.Program:
    """The program. Raises UserError where the memory holds no state or batch of it."""
    program = make_program(config, dataset)
    train.check_batch(config, dataset)
    return program


def _describe(paths: layout.Paths, config: Config, dataset: data.Dataset) -> None:
    """Writes configuration, flags and data, each whole or not at all."""
    layout.write_json(paths.config, config.to_json())
    flags = [
        f'--{name}={_flag(value)}' for group in config.to_json().values() for name, value in group.items()
    ]
    layout.write_text(paths.flags, '\n'.join(flags) + '\n')
    if not paths.data.exists():
        data.write_dataset(paths.data, dataset)


def _flag(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _of_records(columns: Series, dataset: data.Dataset, result: loop.RunResult) -> Diagnosis:
    detectors = detectors_for(detect.DETECTORS, dataset)
    diagnosis = replay.of_records(columns, detectors, ALARMS)
    if result.first_mismatch is not None:
        why = f'steps computed again on resuming differ from their records, from step {result.first_mismatch} on'
        return dataclasses.replace(diagnosis, cause=Cause('nondeterminism', why))
    if diagnosis.symptom is None:
        return diagnosis
    return dataclasses.replace(diagnosis, cause=Cause('none', 'not looked for: run jaxrnn diagnose'))


def _rewound(paths: layout.Paths) -> list[rewind.Rewind]:
    """How often a run has gone back; finishes a time that was cut short."""
    rewinds = rewind.read(paths.rewinds)
    if rewinds and not rewinds[-1].done:
        loop.rewind(paths.root, rewinds[-1].to)
        rewinds[-1] = rewinds[-1]._replace(done=True)
        rewind.write(paths.rewinds, rewinds)
    return rewinds


def _goes_back(
    paths: layout.Paths, stop: '_Stop', rewinds: Sequence[rewind.Rewind], say: Callable[[str], None]
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


def _stop(config: Config, dataset: data.Dataset, alerts: Alerts | None) -> '_Stop':
    alarms = () if alerts is None else alerts.alarms.values()
    # That a part of the state stands still is known to pass only when it has: no run ends for it.
    lasting = [d for d in detect.DETECTORS if not (d.kind == 'dead' and PART in d.rule.fields)]
    watch = detect.Watch(detectors=[*detectors_for(lasting, dataset), *alarms])
    return _Stop(config.loop.on_divergence, watch, alerts)


@dataclasses.dataclass
class _Stop:
    """Ends training at a symptom, where it is to go back, or some steps after it, where it is to end."""

    on: str  # of --on_divergence
    watch: detect.Watch
    alerts: Alerts | None = None
    at: float = float('inf')
    found: Symptom | None = None

    def see_all(self, records: Records) -> None:
        """The records of a run that is continued: it may have had its symptom, and then goes no further."""
        if not self._looks:
            return
        found = self.watch.see_all(records)
        if self.alerts is not None:
            self.alerts.begin(records, found)
        self._note(found)

    def __call__(self, row: Row) -> bool:
        if not self._looks:
            return False
        found = self.watch(row)
        if self.alerts is not None:
            self.alerts.see(row, found, self.watch.columns)
        self._note(found)
        return row['step'] >= self.at

    def look_last(self) -> None:
        """When the loop has ended, of whose last steps nothing may have been asked yet."""
        if self.alerts is not None:
            self.alerts.end(self.watch.look())

    @property
    def _looks(self) -> bool:
        return self.on != 'continue' or self.alerts is not None

    def _note(self, symptoms: Sequence[Symptom]) -> None:
        if self.on == 'continue':
            return
        alarms = () if self.alerts is None else self.alerts.alarms
        for symptom in symptoms:
            if symptom.kind not in detect.PASSING[self.on] and symptom.kind not in alarms:
                self.found = symptom if self.found is None or symptom.step < self.found.step else self.found
                self.at = self.found.step + (AFTERMATH if self.on == 'stop' else 0)
