"""What is kept of a run: its symptoms, its drops, its scores, and its curves, thinned."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jaxrnn import detect
from jaxrnn.record import layout
from jaxrnn.record.record_file import RecordFile
from jaxrnn.record.records import series
from jaxrnn.words import run as words_run
from jaxrnn.words import train
from jaxrnn.words.signals import ALARMS

GRAVE = ('nonfinite', 'collapse', 'constant')
"""Symptoms that lose what was learnt; a spike recovers, or ends as one of these."""

POINTS = 160
"""Of a curve."""

AROUND = 300, 120
"""Steps before and after a collapse of which each is kept."""

EACH = ('loss', 'accuracy', 'cosine', 'variance_ratio', 'gradient_norm', 'update_norm', 'step_rms')
"""Fields that are kept of each of these."""

SHORT = 'loss', 'accuracy', 'cosine', 'variance_ratio', 'update_norm', 'gradient_norm'
"""Fields of the curve of a run of which less is kept."""

SMOOTH = 64
"""Steps over which accuracy is averaged before a drop is looked for: four epochs of 512 words."""

DROP = 0.1
"""Of accuracy, below its best so far since the last drop, which counts as one."""


def measured(directory: Path, full: bool) -> dict[str, Any]:
    """The result of a training run."""
    paths = layout.Paths(directory)
    columns = records_of(paths)
    diagnosis = json.loads(paths.diagnosis.read_text())
    config = json.loads(paths.config.read_text())
    found = {
        'network': config['model']['network'],
        'hidden': config['model']['hidden'],
        'seed': config['training']['seed'],
        'steps': int(columns['step'].size),
        'branch': None if not paths.branch.exists() else json.loads(paths.branch.read_text())['step'],
        'symptom': diagnosis['symptom'],
        'onset_step': diagnosis['onset_step'],
        **collapse_of(columns),
        'drops': drops(columns['step'], columns['accuracy']),
        'evaluation': json.loads(paths.evaluation.read_text()),
        'lowest_loss': _digits(np.min(smooth(columns['loss'], SMOOTH))),
        'curve': curve(columns, None if full else SHORT),
        'versions': diagnosis['versions'],
    }
    if full:
        found['around'] = around(columns, found['collapse'])
        found['scores'] = scores(directory)
    return found


def records_of(paths: layout.Paths) -> dict[str, np.ndarray]:
    """Those of a run from its beginning on: of a branch those of its parent before it."""
    own = series(RecordFile(paths.records).read())
    if not paths.branch.exists():
        return own
    branch = json.loads(paths.branch.read_text())
    before = records_of(layout.Paths(Path(branch['run'])))
    kept = before['step'] < branch['step']
    lacking = np.full(int(kept.sum()), np.nan)
    return {
        name: np.concatenate([before[name][kept] if name in before else lacking, values])
        for name, values in own.items()
    }


def collapse_of(columns: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """The first grave symptom, by the detectors, and the accuracy around it."""
    grave = [symptom for symptom in detect.symptoms(columns) if symptom.kind in GRAVE]
    symptom = min(grave, key=lambda symptom: symptom.step, default=None)
    if symptom is None:
        return {'collapse': None}
    warned = detect.onset(columns, symptom, ALARMS)
    accuracy, place = smooth(columns['accuracy'], 16), symptom.step - int(columns['step'][0])
    after = slice(max(place - 15, 0), None)
    return {
        'collapse': {
            'kind': symptom.kind,
            'step': symptom.step,
            'first_sign': warned and warned.step,
            'accuracy_before': _digits(np.max(accuracy[: max(place - 15, 1)])),
            'accuracy_after': _digits(np.min(accuracy[after])),
            'loss_before': _digits(np.min(smooth(columns['loss'], 16)[: max(place - 15, 1)])),
            'loss_after': _digits(np.max(columns['loss'][place:])),
            'least_variance_ratio_after': _digits(np.min(columns['variance_ratio'][place:])),
            'least_cosine_after': _digits(np.min(smooth(columns['cosine'], 16)[after])),
        }
    }


def drops(steps: np.ndarray, accuracy: np.ndarray) -> list[dict[str, float]]:
    """Each fall of accuracy by more than DROP below its best since the last one, with its lowest: no rule of a detector
    is asked."""
    level = smooth(accuracy, SMOOTH)
    found: list[dict[str, float]] = []
    best, best_at, inside = -np.inf, 0, None
    for place, value in enumerate(level):
        if inside is not None:
            inside['lowest'] = min(inside['lowest'], _digits(value))
            if value > inside['before'] - DROP / 2:
                inside, best = None, value
        elif value > best:
            best, best_at = value, place
        elif value < best - DROP:
            inside = {
                'step': int(steps[place + SMOOTH - 1]), 'before': _digits(best),
                'best_at': int(steps[best_at + SMOOTH - 1]), 'lowest': _digits(value),
            }  # fmt: skip
            found.append(inside)
    return found


def curve(columns: Mapping[str, np.ndarray], fields: tuple[str, ...] | None = None) -> dict[str, list[float]]:
    """Medians, and of accuracy means, over up to POINTS equal stretches of steps; `step` is the last of each."""
    count = columns['step'].size
    size = max(-(-count // POINTS), 1)
    edges = range(0, count, size)
    found: dict[str, list[float]] = {
        'step': [int(columns['step'][min(at + size, count) - 1]) for at in edges]
    }
    for name, values in columns.items():
        if name == 'step' or values.dtype.kind not in 'fiub' or (fields is not None and name not in fields):
            continue
        of = np.mean if name == 'accuracy' else np.median
        found[name] = [_digits(of(values[at : at + size].astype(float))) for at in edges]
    constant = [name for name, values in found.items() if len(set(values)) == 1 and name != 'step']
    return {name: values for name, values in found.items() if name not in constant or fields}


def around(
    columns: Mapping[str, np.ndarray], collapse: Mapping[str, Any] | None
) -> dict[str, list[float]] | None:
    """Each step around a collapse."""
    if collapse is None:
        return None
    steps = columns['step']
    chosen = (steps >= collapse['step'] - AROUND[0]) & (steps < collapse['step'] + AROUND[1])
    return {
        'step': [int(step) for step in steps[chosen]],
        **{name: [_digits(value) for value in columns[name][chosen]] for name in EACH if name in columns},
    }


def scores(directory: Path) -> list[dict[str, Any]]:
    """What each checkpoint knows of the words it is trained on, and of those it has never seen."""
    opened = words_run.open_run(directory)
    found = []
    for step in opened.checkpoints.steps():
        params = opened.checkpoints.restore(step).params
        splits = train.evaluate(opened.program.predict, params, opened.dataset)
        kept = {
            split: {name: _digits(value) for name, value in values.items() if name != 'words'}
            for split, values in splits.items()
        }
        found.append({'step': step, **kept})
    return found


def smooth(values: np.ndarray, steps: int) -> np.ndarray:
    """Means over so many steps; shorter by one less."""
    return np.convolve(values, np.full(min(steps, values.size), 1 / min(steps, values.size)), 'valid')


def _digits(value: float) -> float | None:
    """Four of them; None of what isn't a number, which JSON lacks."""
    return float(f'{float(value):.4g}') if np.isfinite(value) else None
