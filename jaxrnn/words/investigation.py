"""A run of jaxrnn's own networks investigated: bisected, diagnosed, or one of its steps inspected."""

import concurrent.futures
import dataclasses
import multiprocessing
import os
import pickle
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from jaxrnn import detect, environment, experiment
from jaxrnn.bisect import inspection, replay
from jaxrnn.detect import Detector
from jaxrnn.diagnosis import Cause, Diagnosis
from jaxrnn.experiment import outcome
from jaxrnn.experiment.changes import in_order
from jaxrnn.experiment.outcome import AVERTED, UNCHANGED
from jaxrnn.record import layout
from jaxrnn.record.records import Row, same, series
from jaxrnn.types import UserError
from jaxrnn.words import checks, train
from jaxrnn.words.data import Batch
from jaxrnn.words.fresh_runs import in_fresh_runs
from jaxrnn.words.opening import Source
from jaxrnn.words.run import LoadedRun, open_run
from jaxrnn.words.signals import ALARMS
from jaxrnn.words.suspects import Suspects
from jaxrnn.words.symptoms import detectors_for


class BisectionResult(NamedTuple):
    """What `bisect_run` found."""

    diagnosis: Diagnosis
    rows: Sequence[Row]  # the records, those replayed among them
    inspected: inspection.Inspection | None  # into that step
    opened: LoadedRun


class DiagnosisResult(NamedTuple):
    """What `diagnose_run` found."""

    diagnosis: Diagnosis
    bisected: BisectionResult
    report: outcome.ExperimentReport | None  # None where there was no symptom, or it isn't reproducible


def bisect_run(
    directory: str | os.PathLike,
    detectors: Sequence[Detector] = detect.DETECTORS,
    *,
    good: int | None = None,
    bad: int | None = None,
    use_records: bool = True,
    verify: bool = False,
    make_program: train.MakeProgram = train.make_program,
    source: Source | None = None,
) -> BisectionResult:
    """Bisects a run of jaxrnn's own (see `replay.bisect`), inspects the step, and writes the diagnosis.

    Raises UserError as `open_run`, to which `source` goes, and as `replay.bisect`.
    """
    opened = open_run(directory, make_program, source=source)
    options = opened.config.training
    subject = _subject(opened, opened.records if use_records else ())
    detectors = detectors_for(detectors, opened.dataset)
    with jax.debug_nans(options.debug_nans):
        diagnosis, replayed = replay.bisect(
            subject, detectors, good=good, bad=bad, alarms=ALARMS, verify=verify
        )
    screens = [name for name in inspection.SCREENS if getattr(options, name)]
    diagnosis, inspected = inspection.locate(subject, diagnosis, screens=screens)
    diagnosis = _with_words(diagnosis, opened, inspected)
    rows = subject.recorded.updated(replayed)
    layout.write_json(layout.Paths(Path(directory)).diagnosis, diagnosis.to_json())
    return BisectionResult(diagnosis, rows, inspected, opened)


def diagnose_run(
    directory: str | os.PathLike,
    detectors: Sequence[Detector] = detect.DETECTORS,
    *,
    budget: int | None = None,
    good: int | None = None,
    bad: int | None = None,
    fresh_runs: int = 0,
    make_program: train.MakeProgram = train.make_program,
    source: Source | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> DiagnosisResult:
    """Bisects a run, inspects the step, makes the seven checks and, where there is a symptom, experiments; writes the
    diagnosis.

    Args:
        directory: of the run.
        detectors: as in `replay.bisect`.
        budget: steps that may be replayed, those of the bisection included; if not given, see `engine.budget_for`.
        good, bad: as in `replay.bisect`.
        fresh_runs: how many of the remedies that avert are also trained with from the start, with another seed, as far
            again as the symptom took to come.
        make_program: as in `train_run`; it is given the changed configurations, too.
        source: as in `open_run`.
        say: gets a line before slow work.

    Raises:
        UserError: as `bisect_run`.
    """
    bisected = bisect_run(directory, detectors, good=good, bad=bad, make_program=make_program, source=source)
    diagnosis, opened = bisected.diagnosis, bisected.opened
    subject = _subject(opened, opened.records)
    detectors = detectors_for(detectors, opened.dataset)

    suspects = Suspects(opened, subject, detectors, make_program)

    def suspected(window: experiment.Window, bad_batches: Sequence[int]) -> list[outcome.Change]:
        assert diagnosis.symptom is not None
        found = suspects.changes(diagnosis.symptom, window)
        say(f'replaying the steps from {window.start} on, under one change at a time')
        began = replay.began_of(subject, diagnosis, detectors)
        inspected = bisected.inspected
        set_off = None if inspected is None or inspected.set_off is None else inspected.set_off.step
        return in_order(subject, window, bad_batches, found, began, _skipping, set_off)

    diagnosis, report = experiment.explain(
        subject, diagnosis, suspected, detectors, budget=budget, combine=suspects.combined,
        # Of a program that somebody altered no identity tells all.
        keep=layout.Paths(Path(directory)).experiments if make_program is train.make_program else None,
    )  # fmt: skip
    if diagnosis.cause.kind == 'nondeterminism' and environment.threads() > 1:
        say('computing the step that differs twice more, on one thread')
        diagnosis = _on_one_thread(diagnosis, directory, make_program, source)
    measured = _checked(diagnosis, opened, report)
    beside = [check for check in diagnosis.checks if check['name'] not in checks.MEASURED_BETTER]
    diagnosis = dataclasses.replace(diagnosis, checks=(*measured, *beside))
    if report is not None and report.identical:
        diagnosis = in_fresh_runs(diagnosis, opened, suspects.by_name, fresh_runs, say)
    layout.write_json(layout.Paths(Path(directory)).diagnosis, diagnosis.to_json())
    return DiagnosisResult(diagnosis, bisected, report)


def _skipping(step: int) -> str:
    """The flags that leave out a step's batch; there are none for the first, which has none before it."""
    return f'--skip_batches={step}' if step else ''


def _checked(
    diagnosis: Diagnosis, opened: LoadedRun, report: outcome.ExperimentReport | None
) -> tuple[checks.Check, ...]:
    """The seven checks, and what the signals say beside them."""
    step = diagnosis.first_bad_step
    batch = None if step is None else opened.program.batch_at(step)
    evidence = checks.Evidence(
        opened.dataset,
        series(opened.records),
        opened.program.init().params,
        batch if isinstance(batch, Batch) else None,
        diagnosis.where,
        report,
        None if diagnosis.symptom is None else diagnosis.symptom.step,
    )
    return *checks.seven(evidence), *checks.inside(evidence)


def _on_one_thread(
    diagnosis: Diagnosis,
    directory: str | os.PathLike,
    make_program: train.MakeProgram,
    source: Source | None,
) -> Diagnosis:
    """Whether a step that comes out differently each time does so on one thread, too: asked of a process that has no
    other, as XLA starts its threads once."""
    step = diagnosis.replay.first_mismatch
    assert step is not None
    with concurrent.futures.ProcessPoolExecutor(
        1, multiprocessing.get_context('spawn'), environment.use_threads, (1,)
    ) as pool:
        try:
            agree = pool.submit(_repeats, directory, make_program, source, step).result()
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


def _repeats(
    directory: str | os.PathLike, make_program: train.MakeProgram, source: Source | None, step: int
) -> bool:
    """Whether two replays up to a step agree."""
    opened = open_run(directory, make_program, source=source)
    subject = _subject(opened, ())
    start = max(at for at in subject.checkpoints.steps() if at <= step)
    first, second = (replay.Replayer(subject).replay(start, step + 1) for _ in range(2))
    return all(same(a, b) for a, b in zip(first, second, strict=True))


def inspect_run(
    directory: str | os.PathLike,
    step: int,
    *,
    against: int | None = None,
    screens: Sequence[str] = (),
    float64: bool = False,
    make_program: train.MakeProgram = train.make_program,
    source: Source | None = None,
) -> tuple[inspection.Inspection, list[str]]:
    """Inspects one step of a run (see `inspection.inspect`).

    Returns:
        What was found, and the words of the step's batch.

    Raises:
        UserError: as `open_run`, to which `source` goes; no such step, or no checkpoint before it.
    """
    opened = open_run(directory, make_program, source=source)
    for flag, value in (('--step', step), ('--against', against)):
        if value is None:
            continue
        if value < 0:
            raise UserError(f'{flag}: {value} found, at least 0 expected')
        if opened.records and value > opened.records[-1]['step']:
            raise UserError(f'{flag}: {value} found, but the run has steps 0 to {opened.records[-1]["step"]}')
    if against == step:
        raise UserError(f'--against: {against} found, another step than --step expected')
    inspected = inspection.inspect(
        _subject(opened, opened.records), step, against=against, screens=screens, float64=float64
    )
    return inspected, words_of(opened, step)


def _subject(opened: LoadedRun, records: Sequence[Row]) -> replay.Subject:
    train.check_batch(opened.config, opened.dataset)
    options = opened.config.training
    return replay.subject(
        opened.program.step,
        opened.program.batch_at,
        opened.checkpoints,
        records,
        digest_every=options.digest_every,
        checkify=options.checkify,
    )


def _with_words(
    diagnosis: Diagnosis, opened: LoadedRun, inspected: inspection.Inspection | None
) -> Diagnosis:
    """Says whose examples they are."""
    if diagnosis.where is None or inspected is None:
        return diagnosis
    words = words_of(opened, inspected.step)
    named = [words[place] for place in diagnosis.where['examples'] if place < len(words)]
    return dataclasses.replace(diagnosis, where={**diagnosis.where, 'words': named})


def words_of(opened: LoadedRun, step: int) -> list[str]:
    """The words of a step's batch; none of one that isn't jaxrnn's own."""
    batch = opened.program.batch_at(step)
    if not isinstance(batch, Batch):
        return []
    return [opened.dataset.words[place] for place in np.asarray(batch.index)]
