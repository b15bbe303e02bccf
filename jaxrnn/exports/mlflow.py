"""A folder with an MLflow store, mlflow.db, in which the records are the metrics of one run.

MLflow's folders of text files would hold infinities, but it refuses to make one since 3.7; its databases hold the
largest float64 in place of an infinity. So the records are beside the metrics, too, as the run's artifact records.csv.
"""

import itertools
import logging
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from jaxrnn.errors import UserError
from jaxrnn.exports import Recorded, csv, environ, names, numbers

OFFLINE = {'MLFLOW_DISABLE_TELEMETRY': 'true', 'DO_NOT_TRACK': 'true', 'MLFLOW_LOGGING_LEVEL': 'WARNING'}
"""MLflow tells its makers which functions are called, unless it is told not to before it is imported."""

with environ.variables(**OFFLINE):
    from mlflow import MlflowClient
    from mlflow.entities import Metric
    from mlflow.exceptions import MlflowException

EXPERIMENT, DATABASE, ARTIFACTS = 'jaxrnn', 'mlflow.db', 'artifacts'

MOST = 1000
"""Metrics that MLflow takes at once."""


def write(run: Recorded, path: Path) -> None:
    """Raises UserError where MLflow refuses."""
    logging.getLogger('alembic').setLevel(logging.WARNING)  # it tells of each table
    # A database is named by a URI, in which not every path can stand.
    with tempfile.TemporaryDirectory() as plain, environ.variables(**OFFLINE):
        try:
            run_id = _write(run, f'sqlite:///{plain}/{DATABASE}')
        except MlflowException as error:
            raise UserError(f'--to=mlflow: MLflow refuses: {error}') from error
        beside = path / ARTIFACTS / run_id / ARTIFACTS
        beside.mkdir(parents=True)
        csv.write(run, beside / 'records.csv')
        shutil.move(f'{plain}/{DATABASE}', path / DATABASE)


def _write(run: Recorded, uri: str) -> str:
    client, time = MlflowClient(tracking_uri=uri), _milliseconds(run.time)
    experiment = client.create_experiment(EXPERIMENT, (run.out / ARTIFACTS).as_uri())
    run_id = client.create_run(experiment, start_time=time, run_name=run.name).info.run_id
    metrics = _metrics(run)
    while part := [*itertools.islice(metrics, MOST)]:
        client.log_batch(run_id, metrics=part)
    client.set_terminated(run_id, end_time=time)
    return run_id


def _metrics(run: Recorded) -> Iterator[Metric]:
    for row in numbers.rows(run, names.as_word):
        for name, value in row.values.items():
            yield Metric(name, float(value), _milliseconds(row.time), row.step)


def _milliseconds(time: float) -> int:
    return int(1000 * time)
