"""The pictures of docs/why-training-collapses.md, of what is in results/.

python benchmarks/study/figures.py
"""

import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
sys.path[0] = str(ROOT)

from collections.abc import Callable, Mapping
from typing import Any

import matplotlib

matplotlib.use('Agg')

import matplotlib.pyplot as plt
import numpy as np

from benchmarks.study import tasks
from benchmarks.study.run import RESULTS
from jaxrnn.cli import common

IMAGES = ROOT / 'docs' / 'images'
NETWORKS = {'lstm': 'LSTM(1024)', 'gru': 'GRU(1024)', 'stacked': 'two LSTM(512)'}
TRAIN, TEST, MARK, CLIPPED, STABLE = '#1f5fa8', '#d9822b', '#b3261e', '#7a8a3a', '#6a2c91'
MOST = 8000  # steps that are shown

Results = Mapping[str, Mapping[str, Any]]


def curves(results: Results) -> plt.Figure:
    """Accuracy and loss of the words that are trained on, and of those that are never shown."""
    shown = [
        (title, results[f'{name}-stock-0'])
        for name, title in NETWORKS.items()
        if f'{name}-stock-0' in results
    ]
    figure, axes = plt.subplots(2, len(shown), figsize=(4 * len(shown), 5.4), sharex='col', squeeze=False)
    for column, (title, result) in enumerate(shown):
        top, bottom = axes[:, column]
        curve, scores = result['curve'], result['scores']
        steps = [score['step'] for score in scores]
        top.plot(curve['step'], curve['accuracy'], color=TRAIN, label='512 words it learns')
        top.plot(
            steps, [score['test']['accuracy'] for score in scores], color=TEST, label='128 it has never seen'
        )
        bottom.semilogy(curve['step'], curve['loss'], color=TRAIN)
        bottom.semilogy(steps, [score['test']['loss'] for score in scores], color=TEST)
        for axis in (top, bottom):
            _mark(axis, result)
        top.set(title=title, ylim=(0, 1))
        bottom.set(xlabel='step')
    axes[0, 0].set_ylabel('accuracy, as Keras has it')
    axes[1, 0].set_ylabel('mean squared error')
    axes[0, 0].legend(frameon=False, fontsize=8)
    return figure


def collapses(results: Results) -> plt.Figure:
    """Each step around the collapse."""
    shown = [(t, results[f'{n}-stock-0']) for n, t in NETWORKS.items() if f'{n}-stock-0' in results]
    shown = [(title, result) for title, result in shown if result['around']]
    fields = {
        'accuracy': 'accuracy',
        'loss': 'loss',
        'gradient_norm': 'gradient norm',
        'update_norm': 'update norm',
    }
    figure, axes = plt.subplots(
        len(fields), len(shown), figsize=(4 * len(shown), 7), sharex='col', squeeze=False
    )
    for column, (title, result) in enumerate(shown):
        around = result['around']
        ahead = np.array(around['step']) - result['collapse']['step']
        for axis, (field, name) in zip(axes[:, column], fields.items(), strict=True):
            (axis.plot if field == 'accuracy' else axis.semilogy)(
                ahead, around[field], color=TRAIN, linewidth=0.8
            )
            axis.axvline(0, color=MARK, linewidth=0.8)
            if not column:
                axis.set_ylabel(name)
        axes[0, column].set(title=title, ylim=(0, 1))
        axes[-1, column].set_xlabel('steps from the collapse')
    return figure


CREEPING = {
    'update_rms': ('g² over v, root of the mean', 'linear'),
    'step_rms': ('step over learning rate', 'linear'),
    'momentum_cosine': ('cosine of gradient and momentum', 'linear'),
    'parameter_norm': ('norm of the weights', 'linear'),
    'saturated_output_gate': ('saturated output gates', 'linear'),
    'loss': ('loss', 'log'),
}


def creeping(results: Results) -> plt.Figure:
    """What moved for thousands of steps before, in every seed of the LSTM and the stacked network."""
    names = [name for name in ('lstm', 'gru', 'stacked') if f'{name}-stock-0' in results]
    figure, axes = plt.subplots(
        len(CREEPING), len(names), figsize=(4 * len(names), 10), sharex='col', squeeze=False
    )
    for column, name in enumerate(names):
        for result in (r for n, r in results.items() if n.startswith(f'{name}-stock-') and 'curve' in r):
            curve = result['curve']
            for axis, (field, (said, scale)) in zip(axes[:, column], CREEPING.items(), strict=True):
                if field in curve:
                    axis.plot(curve['step'], curve[field], linewidth=0.9)
                axis.set_yscale(scale)
                if not column:
                    axis.set_ylabel(said, fontsize=7)
        axes[0, column].set_title(NETWORKS[name])
        axes[-1, column].set_xlabel('step')
    return figure


def curvature(results: Results) -> plt.Figure:
    """The curvature as Adam feels it, up to a collapse; 1 is where Adam turns unstable."""
    shown = [(t, results[f'{n}-curvature-0']) for n, t in NETWORKS.items() if f'{n}-curvature-0' in results]
    figure, axes = plt.subplots(1, len(shown), figsize=(5 * len(shown), 3.4), squeeze=False)
    for axis, (title, result) in zip(axes[0], shown, strict=True):
        curve = result['curve']
        kept = np.array(curve['step']) >= result['branch']
        for field, said, colour in (
            ('preconditioned_sharpness', 'in the sharpest direction', TEST),
            ('update_curvature', 'along the step', TRAIN),
        ):
            axis.semilogy(
                np.array(curve['step'])[kept], np.array(curve[field], float)[kept], color=colour, label=said
            )
        axis.axhline(1, color='grey', linewidth=0.8, linestyle='--')
        _mark(axis, result)
        axis.set(title=title, xlabel='step')
    axes[0, 0].set_ylabel('curvature, in units of the largest stable one')
    axes[0, 0].legend(frameon=False, fontsize=8)
    return figure


SETTINGS = {
    'as in the question': (TEST, ('many_stock', 'many_rate1e_3')),
    'half the rate, a cosine': (TRAIN, ('many_unclipped',)),
    'and update clipping': (CLIPPED, ('stable_keras3',)),
    "and Keras 1's initial weights: --preset=stable": (STABLE, ('stable',)),
}
"""What is shown -> its colour, and the variants whose seeds are shown."""


def stable(results: Results) -> plt.Figure:
    """Accuracy and loss of every seed as in the question, and under what shall prevent a collapse."""
    figure, axes = plt.subplots(2, len(NETWORKS), figsize=(4 * len(NETWORKS), 5.4), sharex=True, sharey='row')
    for (network, title), (top, bottom) in zip(NETWORKS.items(), axes.T, strict=True):
        for said, (colour, variants) in SETTINGS.items():
            names = [f'{network}-{variant}-' for variant in variants]
            for result in (r for n, r in results.items() if n.startswith(tuple(names)) and 'curve' in r):
                curve = result['curve']
                steps = np.array(curve['step'])
                kept = steps <= MOST
                for axis, field in ((top, 'accuracy'), (bottom, 'loss')):
                    values = np.array(curve[field], float)[kept]
                    axis.plot(steps[kept], values, color=colour, linewidth=0.7, label=said)
                    if result['collapse'] and result['collapse']['step'] <= MOST:
                        axis.plot(steps[kept][-1], values[-1], 'x', color=colour, markersize=5)
        top.set(title=title, ylim=(0, 1.02))
        bottom.set(xlabel='step', yscale='log')
    axes[0, 0].set_ylabel('accuracy, as Keras has it')
    axes[1, 0].set_ylabel('mean squared error')
    shown: dict[str, Any] = {}
    for axis in axes[0]:
        shown |= dict(zip(*axis.get_legend_handles_labels()[::-1], strict=True))
    axes[1, 2].legend(shown.values(), shown.keys(), frameon=False, fontsize=8, loc='lower left')
    return figure


def constant(results: Results) -> plt.Figure:
    """A run that was trained on after its collapse, and gave the same output for every word some time later."""
    curve = results['stacked128-on_rate6e_3-0']['curve']
    figure, axes = plt.subplots(3, 1, figsize=(8, 6), sharex=True)
    for axis, field, said in zip(
        axes,
        ('accuracy', 'variance_ratio', 'update_norm'),
        ('accuracy', 'variance of the outputs\nover that of the targets', 'update norm'),
        strict=True,
    ):
        (axis.plot if field == 'accuracy' else axis.semilogy)(
            curve['step'], curve[field], color=TRAIN, linewidth=0.9
        )
        axis.set_ylabel(said)
    axes[-1].set_xlabel('step')
    return figure


FIGURES: Mapping[str, Callable[[Results], plt.Figure]] = {
    'curves': curves, 'collapses': collapses, 'creeping': creeping, 'curvature': curvature, 'stable': stable,
    'constant': constant,
}  # fmt: skip


def _mark(axis: plt.Axes, result: Mapping[str, Any]) -> None:
    if result['collapse']:
        axis.axvline(result['collapse']['step'], color=MARK, linewidth=0.8)


def main(arguments: list[str]) -> int:
    del arguments
    results = tasks.read(RESULTS)
    for name, draw in FIGURES.items():
        figure = draw(results)
        for axis in figure.axes:
            axis.spines[['top', 'right']].set_visible(False)
        figure.tight_layout()
        path = IMAGES / f'why-{name}.png'
        figure.savefig(path, dpi=110)
        plt.close(figure)
        print(path.relative_to(ROOT))
    return common.HEALTHY


if __name__ == '__main__':
    common.main(main, __doc__)
