"""A run that was recorded from `model.fit`, bisected and diagnosed with the model that trained."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import keras

from jaxrnn import experiment
from jaxrnn import report as report  # by which a diagnosis can be printed
from jaxrnn.adapters.keras import changes, recording, steps, trainer, variables
from jaxrnn.adapters.keras.metrics import StepMetrics
from jaxrnn.bisect import bisect as bisect_step
from jaxrnn.diagnosis import Diagnosis
from jaxrnn.experiment import Change, ExperimentReport
from jaxrnn.record import kept_batches, layout
from jaxrnn.record.record_file import RecordFile
from jaxrnn.record.records import Row
from jaxrnn.types import Step, UserError


class ModelRun(NamedTuple):
    """A run and the model that trained."""

    model: keras.Model
    variables: variables.Variables
    batch_at: kept_batches.KeptBatches
    rates: steps.Rates
    step: Step


def bisect(model: keras.Model, directory: str | os.PathLike, **options: Any) -> tuple[Diagnosis, list[Row]]:
    """Names the first bad step of a training by `model.fit`, and proves it by replay.

    Args:
        model: compiled as for the training; its weights don't matter, and stay as they are.
        directory: of the run that `Recorder` left.
        options: as of `jaxrnn.bisect`: when, symptom, good, bad, loss, verify.

    Returns:
        As `jaxrnn.bisect`: the diagnosis, and the rows that were replayed.

    Raises:
        UserError: no such run, or one of another model.
    """
    run = opened(model, directory)
    return bisect_step(run.step, None, directory, like=run.variables.like(), **options)


def diagnose(
    model: keras.Model, directory: str | os.PathLike, more: Sequence[Change] = (), **options: Any
) -> tuple[Diagnosis, ExperimentReport | None]:
    """As `bisect`, and says which change of the optimiser would have averted it.

    Args:
        model, directory: as in `bisect`.
        more: changes of your own, tried after those of `changes.of`.
        options: as of `jaxrnn.diagnose`: budget, when, symptom, good, bad, loss.

    Returns:
        As `jaxrnn.diagnose`: the diagnosis with cause and remedies, and what the experiments gave.

    Raises:
        UserError: as `bisect`.
    """
    run = opened(model, directory)
    tried = [*changes.of(model, run.variables, run.batch_at, run.rates), *more]
    return experiment.diagnose(run.step, None, directory, tried, like=run.variables.like(), **options)


def opened(model: keras.Model, directory: str | os.PathLike) -> ModelRun:
    """A run with its step, which is Keras' own train function. Raises UserError as `bisect`."""
    trainer.check_backend()
    root = Path(directory)
    recording.close_left_open(root)
    noted = variables.read(root)
    if noted is None:
        raise UserError(
            f'{root}: no {variables.NOTES} found; expected the directory of a run by jaxrnn.keras.Recorder'
        )
    paths = layout.Paths(root)
    records = RecordFile(paths.records).read()
    kept = kept_batches.KeptBatches.of_run(paths, records)
    if (known := kept.steps()) and model.compiled:
        trainer.build(model, steps.data_of(kept(known[0])))
    function = trainer.train_function(model)
    noted.check(variables.Variables.of(model))
    rates = steps.Rates.of(records)
    return ModelRun(model, noted, kept, rates, steps.step_of(function, noted, StepMetrics(model), rates))
