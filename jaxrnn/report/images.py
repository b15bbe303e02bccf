"""Figures drawn by Matplotlib, for papers: one file a figure, PNG or SVG, of the same data as the page has."""

import functools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from jaxrnn.report import plots
from jaxrnn.report.figures import Figures, HeatMap, Panel
from jaxrnn.types import UserError

FORMATS = ('png', 'svg')
WIDE, HIGH = 6.5, 2.2
"""Inches: a column of a page, and a panel on it."""


def save(figures: Figures, folder: Path, kind: str = 'png') -> list[Path]:
    """Saves each figure.

    Args:
        figures: of a run.
        folder: made if it isn't there. Files there of the same names are replaced.
        kind: of FORMATS.

    Returns:
        The files, as 'loss.png', 'experiments.png'.

    Raises:
        UserError: Matplotlib is not installed, or nothing can be written.
    """
    try:
        from matplotlib import figure
    except ImportError:
        raise UserError('--images: Matplotlib is not installed; install it: pip install matplotlib') from None
    drawings: list[tuple[str, Callable[[Any], None]]] = [
        (panel.name, functools.partial(_panel, panel=panel, figures=figures))
        for panel in (*figures.metrics, *figures.signals)
    ]
    if (experiments := figures.experiments) is not None:
        drawings.append(('experiments', functools.partial(_experiments, panel=experiments)))
    for number, heat_map in enumerate(figures.heat_maps):
        drawings.append((f'over-time-{number}', functools.partial(_heat_map, heat_map=heat_map)))
    saved: list[Path] = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, draw in drawings:
            made = figure.Figure(figsize=(WIDE, HIGH), layout='constrained')
            draw(made)
            path = folder / f'{_file_name(name)}.{kind}'
            if path in saved:  # of two names that differ by what a file can't have in its name
                path = folder / f'{_file_name(name)}-{len(saved)}.{kind}'
            made.savefig(path, dpi=200)
            saved.append(path)
    except OSError as error:
        raise UserError(f'{folder} can not be written ({error.strerror})') from error
    return saved


def _file_name(name: str) -> str:
    """A name of letters, digits, and what is harmless beside them."""
    return re.sub(r'[^\w.-]+', '_', name).strip('.')[:80] or 'figure'


def _axes(made: Any, panel: Panel) -> Any:
    axes = made.subplots()
    axes.set_xlabel('step')
    axes.set_ylabel(panel.name, parse_math=False)
    if panel.log:
        axes.set_yscale('log')
    axes.spines[['top', 'right']].set_visible(False)
    return axes


def _panel(made: Any, panel: Panel, figures: Figures) -> None:
    axes = _axes(made, panel)
    for start, stop in panel.bands:
        axes.axvspan(start, max(stop, start + 1), color=plots.ORANGE, alpha=0.2, linewidth=0)
    for number, line in enumerate(panel.lines):
        colour, dash = plots.of_line(line, number)
        axes.plot(line.steps, line.values, color=colour, linestyle=dash, linewidth=0.8)
    for mark in figures.marks:
        if mark.kind != 'checkpoint':
            colour, dash, _ = plots.MARKS[mark.kind]
            axes.axvline(mark.step, color=colour, linestyle=dash, linewidth=1)


def _experiments(made: Any, panel: Panel) -> None:
    made.set_size_inches(WIDE, 1.6 * HIGH)
    axes = _axes(made, panel)
    labelled = set()
    for line, (colour, dash, width, label) in plots.styled(panel.lines):
        shown = None if label in labelled else label
        labelled.add(label)
        axes.plot(line.steps, line.values, color=colour, linestyle=dash, linewidth=0.6 * width, label=shown)
    made.legend(loc='outside lower center', ncols=2, frameon=False, fontsize='small')


def _heat_map(made: Any, heat_map: HeatMap) -> None:
    made.set_size_inches(WIDE, 1 + 0.25 * len(heat_map.rows))
    left, right = made.subplots(1, 2, sharey=True)
    both = np.array([heat_map.before, heat_map.now], np.float64)
    positive = both[np.isfinite(both) & (both > 0)]
    high = float(positive.max()) if positive.size else 1.0
    low = max(float(positive.min()), high * 1e-6) if positive.size else high / 10
    scale = (
        {'norm': 'log', 'vmin': low, 'vmax': max(high, 10 * low)}
        if heat_map.log
        else {'vmin': 0, 'vmax': high}
    )
    for axes, values, title in ((left, both[0], 'an ordinary step'), (right, both[1], 'the bad step')):
        drawn = axes.imshow(values, aspect='auto', cmap='cividis', interpolation='none', **scale)
        axes.set_title(title, fontsize='small')
        axes.set_xlabel('time step')
        shown = range(0, len(heat_map.places), max(1, len(heat_map.places) // 5))
        axes.set_xticks(list(shown), [str(heat_map.places[place]) for place in shown])
    left.set_yticks(range(len(heat_map.rows)), heat_map.rows, fontsize='small', parse_math=False)
    made.colorbar(drawn, ax=[left, right], label=heat_map.name[:40])
