"""Remedies tried in fresh runs: trained with from the start, with another seed, beside a run without them."""

import dataclasses
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

from jaxrnn.diagnosis import Diagnosis
from jaxrnn.experiment.outcome import AVERTED, VERDICTS
from jaxrnn.record import layout
from jaxrnn.words import checks, data, remedies
from jaxrnn.words.config import Config
from jaxrnn.words.run import LoadedRun, train_run


def in_fresh_runs(
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
        seed=(config.training.seed + 1) % 2**63, max_steps=steps, on_divergence='stop', checkpoint_every=steps
    )
    say(f'training anew for {steps:,} steps: {name}')
    with tempfile.TemporaryDirectory() as directory:
        data.write_dataset(layout.Paths(Path(directory)).data, opened.dataset)
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
