"""A run of jaxrnn's own networks looked into: bisected, one of its steps, diagnosed, its remedies trained with anew."""

import concurrent.futures
import dataclasses
import multiprocessing
import os
import pickle
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from jaxrnn import detect, environment, experiment
from jaxrnn.bisect import inspection, replay
from jaxrnn.detect import Detector
from jaxrnn.diagnosis import Cause, Diagnosis, Symptom
from jaxrnn.experiment import outcome
from jaxrnn.experiment.changes import in_order
from jaxrnn.experiment.outcome import AVERTED, UNCHANGED, VERDICTS
from jaxrnn.optim import curvature
from jaxrnn.record import loop, telemetry
from jaxrnn.record.telemetry import Row
from jaxrnn.types import Array, Tree, UserError
from jaxrnn.words import checks, data, remedies, train
from jaxrnn.words.config import Config
from jaxrnn.words.data import Batch
from jaxrnn.words.run import LoadedRun, open_run, train_run
from jaxrnn.words.signals import ALARMS, SIGNALS


class BisectionResult(NamedTuple):
    """What `bisect_run` found."""

    diagnosis: Diagnosis
    rows: list[Row]  # records around the first bad step
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
    make_program: train.MakeProgram = train.make_program,
) -> BisectionResult:
    """Bisects a run of jaxrnn's own (see `replay.bisect`), looks into the step, and writes the diagnosis."""
    opened = open_run(directory, make_program)
    options = opened.config.training
    subject = _subject(opened, opened.records if use_records else ())
    with jax.debug_nans(options.debug_nans):
        diagnosis, replayed = replay.bisect(subject, detectors, good=good, bad=bad, alarms=ALARMS)
    screens = [name for name in inspection.SCREENS if getattr(options, name)]
    diagnosis, inspected = inspection.locate(subject, diagnosis, screens=screens)
    diagnosis = _with_words(diagnosis, opened)
    rows = {row['step']: row for row in opened.records if use_records} | {
        row['step']: row for row in replayed
    }
    loop.write_json(loop.Paths(Path(directory)).diagnosis, diagnosis.to_json())
    return BisectionResult(diagnosis, [rows[step] for step in sorted(rows)], inspected, opened)


def diagnose_run(
    directory: str | os.PathLike,
    detectors: Sequence[Detector] = detect.DETECTORS,
    *,
    budget: int = experiment.BUDGET,
    good: int | None = None,
    bad: int | None = None,
    fresh_runs: int = 0,
    make_program: train.MakeProgram = train.make_program,
    say: Callable[[str], None] = lambda line: None,
) -> DiagnosisResult:
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
    signals_too = bool(read & {signal.name for signal in SIGNALS})
    by_name: dict[str, remedies.Remedy] = {}

    def change(each: remedies.Remedy) -> outcome.Change:
        by_name[each.name] = each
        return remedies.change(opened.config, opened.dataset, each, make_program, signals=signals_too)

    def combine(first: outcome.Change) -> outcome.Change | None:
        known = by_name.get(first.name)
        found = None if known is None else remedies.combined(opened.config, known)
        return None if found is None else change(found)

    def suspected_changes(window: experiment.Window, bad_batches: Sequence[int]) -> list[outcome.Change]:
        assert diagnosis.symptom is not None
        facts = _facts(diagnosis.symptom, window, opened, subject)
        suspected = [change(each) for each in remedies.suspects(opened.config, facts)]
        say(f'replaying the steps from {window.start} on, under one change at a time')
        return in_order(subject, window, bad_batches, suspected)

    diagnosis, report = experiment.explain(
        subject, diagnosis, suspected_changes, detectors, budget=budget, combine=combine,
        # Of a program that somebody altered no identity tells all.
        keep=loop.Paths(Path(directory)).experiments if make_program is train.make_program else None,
    )  # fmt: skip
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
        report,
        None if diagnosis.symptom is None else diagnosis.symptom.step,
    )
    measured = (*checks.seven(evidence), *checks.inside(evidence))
    diagnosis = dataclasses.replace(diagnosis, checks=(*measured, *diagnosis.checks))
    if report is not None and report.identical:
        diagnosis = _in_fresh_runs(diagnosis, opened, by_name, fresh_runs, say)
    loop.write_json(loop.Paths(Path(directory)).diagnosis, diagnosis.to_json())
    return DiagnosisResult(diagnosis, bisected, report)


def _facts(
    symptom: Symptom, window: experiment.Window, opened: LoadedRun, subject: replay.Subject
) -> remedies.Facts:
    before = [row for row in opened.records if row['step'] < symptom.step]
    return remedies.Facts(
        symptom.kind,
        window.lasting,
        telemetry.series(before),
        _sharpness(window.start, opened, subject),
    )


SHARPENED = 10
"""Iterations by which the sharpness is found: within a tenth, from below, on the networks of the tests."""


def _sharpness(step: int, opened: LoadedRun, subject: replay.Subject) -> float | None:
    """λmax of the Hessian of the loss, on the batch of a step; None of a program that isn't jaxrnn's own, and where it
    isn't a number above 0."""
    state, batch = replay.Replayer(subject).state(step), opened.program.batch_at(step)
    if not (isinstance(state, train.TrainState) and isinstance(batch, Batch)):
        return None

    @jax.jit
    def measure(params: Tree, batch: Batch) -> Array:
        def loss_of(params: Tree) -> Array:
            return train.loss_of(opened.program.predict, params, batch)[0]

        start = curvature.random_start(params)
        return curvature.sharpness(loss_of, params, start, iterations=SHARPENED).eigenvalue

    found = float(measure(state.params, batch))
    return found if np.isfinite(found) and found > 0 else None


def _in_fresh_runs(
    diagnosis: Diagnosis,
    opened: LoadedRun,
    named: Mapping[str, remedies.Remedy],
    count: int,
    say: Callable[[str], None],
) -> Diagnosis:
    """Trains anew with the first remedies that avert, each beside a run without any; those that hold come first, and
    those that break last."""
    tried = [r for r in diagnosis.remedies if r['outcome'] == AVERTED and r['name'] in named][:count]
    if not tried:
        return diagnosis
    found = [_fresh_run(opened, 'no change', opened.config, diagnosis, say)]
    for each in tried:
        changed = remedies.applied(opened.config, named[each['name']])
        found.append(_fresh_run(opened, each['name'], changed, diagnosis, say))
    holds = {each['name']: check['ok'] for each, check in zip(tried, found[1:], strict=True)}
    order = {True: 0, None: 1, False: 2}
    in_order_of_holding = sorted(
        diagnosis.remedies,
        key=lambda r: (VERDICTS.index(r['outcome']), order[holds.get(r['name'])]),
    )
    return dataclasses.replace(
        diagnosis, remedies=tuple(in_order_of_holding), checks=(*diagnosis.checks, *found)
    )


def _fresh_run(
    opened: LoadedRun, name: str, config: Config, diagnosis: Diagnosis, say: Callable[[str], None]
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


def _on_one_thread(
    diagnosis: Diagnosis, directory: str | os.PathLike, make_program: train.MakeProgram
) -> Diagnosis:
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


def _repeats(directory: str | os.PathLike, make_program: train.MakeProgram, step: int) -> bool:
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
    make_program: train.MakeProgram = train.make_program,
) -> tuple[inspection.Inspection, list[str]]:
    """Looks into one step of a run (see `inspection.look`).

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
    inspected = inspection.inspect(
        _subject(opened, opened.records), step, against=against, screens=screens, float64=float64
    )
    return inspected, words_of(opened, step)


def _subject(opened: LoadedRun, records: Sequence[Row]) -> replay.Subject:
    options = opened.config.training
    return replay.subject(
        opened.program.step,
        opened.program.batch_at,
        opened.checkpoints,
        records,
        digest_every=options.digest_every,
        checkify=options.checkify,
    )


def _with_words(diagnosis: Diagnosis, opened: LoadedRun) -> Diagnosis:
    """Says whose examples they are."""
    if diagnosis.where is None or diagnosis.first_bad_step is None:
        return diagnosis
    words = words_of(opened, diagnosis.first_bad_step)
    named = [words[place] for place in diagnosis.where['examples'] if place < len(words)]
    return dataclasses.replace(diagnosis, where={**diagnosis.where, 'words': named})


def words_of(opened: LoadedRun, step: int) -> list[str]:
    """The words of a step's batch; none of one that isn't jaxrnn's own."""
    batch = opened.program.batch_at(step)
    if not isinstance(batch, Batch):
        return []
    return [opened.dataset.words[place] for place in np.asarray(batch.index)]
