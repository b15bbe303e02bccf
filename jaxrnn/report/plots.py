"""Figures drawn by Bokeh, for a page: zoom is linked over all panels, and each point says what it is.

No label has a `$$` in it: Bokeh would ask the network for MathJax. Axes and titles have no colour of their own here:
the page gives them one that is read on light and on dark ground (templates/page.js).
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from bokeh.document import Document
from bokeh.embed import components
from bokeh.models import (
    BoxZoomTool,
    ColumnDataSource,
    FactorRange,
    FixedTicker,
    HoverTool,
    PanTool,
    PrintfTickFormatter,
    Range1d,
    ResetTool,
)
from bokeh.models.annotations import BoxAnnotation, ColorBar, Span
from bokeh.models.mappers import LinearColorMapper, LogColorMapper
from bokeh.palettes import Cividis256, PuOr
from bokeh.plotting import figure
from bokeh.resources import Resources

from jaxrnn.report.figures import Figures, HeatMap, Line, Panel

# Okabe and Ito's colours, which the colour-blind tell apart (https://jfly.uni-koeln.de/color, 2002).
BLUE, ORANGE, GREEN, VERMILION, PURPLE, SKY = '#0072B2', '#E69F00', '#009E73', '#D55E00', '#CC79A7', '#56B4E9'
GREY = '#808080'

MARKS = {
    'began': (ORANGE, 'dashed', 2),
    'bad': (VERMILION, 'dotted', 2),
    'recognised': (VERMILION, 'solid', 2),
    'checkpoint': (GREY, 'dotted', 0.5),
}
"""Colour, dash and width of the line at a marked step."""

MOST_CHECKPOINTS = 60
"""That are drawn: more would hide the rest."""

VERDICTS = {
    'control': (VERMILION, 'solid', 3),
    'averted': (BLUE, 'solid', 1.5),
    'delayed': (ORANGE, 'dashed', 1.5),
    'worse': (PURPLE, 'dotted', 1.5),
    'unchanged': (GREY, 'solid', 1),
    'nudge': (GREY, 'dashed', 2),
}
"""Colour, dash and width of an experiment's curve. What matters most is first."""

OF_THE_BEST = (BLUE, GREEN, SKY, PURPLE, ORANGE, '#8C6D31')
"""Colours of the best changes."""

LABELS = {'control': 'as it was', 'nudge': 'as it was, but for a millionth'}
"""What a curve is called, where that isn't its verdict."""

CLOSE, MOST_POWERS = 1.7, 6
"""Decades below which an axis has ticks at 1, 2 and 5; and most powers of ten that have one."""

PRINTED = '{%.4g}'
"""A number, where the pointer is."""

OF_A_MAP = 3
"""Plots of each map: an ordinary step, the bad one, the change."""

HEIGHT, LEFT = 210, 60
"""Of a panel, in pixels; and what its vertical axis has, so that panels lie below one another."""


def of_line(line: Line, number: int) -> tuple[str, str]:
    """Colour and dash of a line in a panel, by its place there."""
    return (ORANGE, 'dashed') if line.kind == 'alarm' else ((BLUE, GREEN)[number % 2], 'solid')


def script_of_bokeh() -> str:
    """Bokeh's own script, to be put into a page: 1.27 MB."""
    return ''.join(Resources(mode='inline', components=['bokeh']).js_raw)


def drawn(figures: Figures) -> tuple[str, dict[str, list[str]]]:
    """The script that draws, and the places to draw in, by part of the page: 'metrics', 'signals', 'experiments',
    'heat_maps'."""
    steps = [
        step for panel in (*figures.metrics, *figures.signals) for line in panel.lines for step in line.steps
    ]
    low, high = _bounds(steps) if steps else (0.0, 1.0)
    shared = Range1d(start=low, end=high)
    parts: dict[str, list[Any]] = {
        'metrics': [_panel(panel, figures, shared) for panel in figures.metrics],
        'signals': [_panel(panel, figures, shared) for panel in figures.signals],
        'experiments': [] if figures.experiments is None else [_experiments(figures.experiments, figures)],
        'heat_maps': [drawn for heat_map in figures.heat_maps for drawn in _heat_maps(heat_map)],
    }
    flat = [plot for plots in parts.values() for plot in plots]
    if not flat:
        return '', {name: [] for name in parts}
    document = Document()
    with document.models.freeze():  # or else each plot has all those before it looked through again
        for plot in flat:
            document.add_root(plot)
    script, places = components(tuple(flat), wrap_script=False)
    left = iter(places)
    return script, {name: [next(left) for _ in plots] for name, plots in parts.items()}


def _bounds(steps: Sequence[int]) -> tuple[float, float]:
    low, high = min(steps), max(steps)
    margin = max((high - low) * 0.01, 0.5)
    return low - margin, high + margin


def _figure(title: str, panel: Panel, x_range: Any, height: int = HEIGHT) -> Any:
    zoom: Any = BoxZoomTool(dimensions='width')
    tools = [zoom, PanTool(dimensions='width'), ResetTool()]
    made = figure(
        title=title, height=height, sizing_mode='stretch_width', tools=tools,
        y_axis_type='log' if panel.log else 'linear', toolbar_location='right',
        **({} if x_range is None else {'x_range': x_range}),
    )  # fmt: skip
    made.min_border_left = LEFT
    if panel.log:
        made.yaxis.ticker = FixedTicker(ticks=ticks(panel), minor_ticks=[])
        made.yaxis.formatter = PrintfTickFormatter(format='%.3g')
    made.toolbar.active_drag = zoom
    made.toolbar.logo = None
    made.toolbar.autohide = True
    _clear(made)
    return made


def _clear(made: Any) -> None:
    """The page's ground is behind it."""
    for transparent in ('background_fill_color', 'border_fill_color', 'outline_line_color'):
        setattr(made, transparent, None)


def ticks(panel: Panel) -> list[float]:
    """Those of a logarithmic axis: some where its numbers are within a decade, too, and not too many elsewhere."""
    values = [value for line in panel.lines for value in line.values if math.isfinite(value) and value > 0]
    low, high = (math.log10(min(values)), math.log10(max(values))) if values else (0.0, 1.0)
    every = max(1, math.ceil((high - low) / MOST_POWERS))
    mantissas = (1, 2, 5) if high - low < CLOSE else (1,)
    powers = range(math.floor(low) // every * every, math.ceil(high) + every, every)
    return [float(f'{mantissa}e{power}') for power in powers for mantissa in mantissas]


def _source(line: Line) -> ColumnDataSource:
    values = np.array(line.values, np.float32)
    return ColumnDataSource({'step': np.array(line.steps, np.float64), 'value': values})


def _panel(panel: Panel, figures: Figures, x_range: Any) -> Any:
    made = _figure(panel.name, panel, x_range)
    for start, stop in panel.bands:
        made.add_layout(
            BoxAnnotation(left=start, right=max(stop, start + 1), fill_color=ORANGE, fill_alpha=0.2)
        )
    for number, line in enumerate(panel.lines):
        color, dash = of_line(line, number)
        drawn = made.line('step', 'value', source=_source(line), color=color, line_dash=dash, line_width=1.5)
        if len(line.steps) < 100:
            made.scatter('step', 'value', source=_source(line), color=color, size=4)
        made.add_tools(
            HoverTool(
                renderers=[drawn], mode='vline', tooltips=[('step', '@step{0}'), (line.name, f'@value{PRINTED}')],
                formatters={'@value': 'printf'}, visible=False,
            )
        )  # fmt: skip
    _marked(made, figures)
    return made


def _marked(made: Any, figures: Figures) -> None:
    checkpoints = sum(mark.kind == 'checkpoint' for mark in figures.marks)
    for mark in figures.marks:
        if mark.kind == 'checkpoint' and checkpoints > MOST_CHECKPOINTS:
            continue
        color, dash, width = MARKS[mark.kind]
        made.add_layout(
            Span(location=mark.step, dimension='height', line_color=color, line_dash=dash, line_width=width)
        )


def _experiments(panel: Panel, figures: Figures) -> Any:
    made = _figure(f'{panel.name}, under one change at a time', panel, None, 440)
    for line, (color, dash, width, label) in styled(panel.lines):
        drawn = made.line(
            'step',
            'value',
            source=_source(line),
            color=color,
            line_dash=dash,
            line_width=width,
            legend_label=label,
        )
        made.add_tools(
            HoverTool(
                renderers=[drawn],
                tooltips=[(line.name, f'@value{PRINTED} at step @step{{0}}')],
                formatters={'@value': 'printf'},
                visible=False,
            )
        )
    _marked(made, figures)
    made.legend.click_policy = 'hide'
    made.legend.background_fill_alpha = 0
    made.legend.border_line_color = None
    made.legend.ncols = 1
    made.legend.label_text_font_size = '12px'
    made.add_layout(made.legend[0], 'below')
    return made


def styled(lines: Sequence[Line]) -> list[tuple[Line, tuple[str, str, float, str]]]:
    """Colour, dash, width and label of each curve of experiments. The best have names of their own, and the rest those
    of what became of them. What matters is drawn last, so that it lies above the rest."""
    made = []
    named = [line for line in lines if line.kind not in ('control', 'nudge')][: len(OF_THE_BEST)]
    for line in lines:
        colour, dash, width = VERDICTS.get(line.kind, VERDICTS['unchanged'])
        label = LABELS.get(line.kind, line.kind)
        if line in named:
            colour, label = OF_THE_BEST[named.index(line)], f'{line.name}: {line.kind}'
        made.append((line, (colour, dash, width, label)))
    order = [*reversed(VERDICTS)]
    return sorted(made, key=lambda pair: order.index(pair[0].kind) if pair[0].kind in order else 0)


def _heat_maps(heat_map: HeatMap) -> list[Any]:
    """The ordinary step and the bad one, in the same colours; and what changed."""
    numbers = np.array([heat_map.before, heat_map.now], np.float64)
    finite = numbers[np.isfinite(numbers)]
    high = float(finite.max()) if finite.size else 1.0
    if heat_map.log:
        positive = finite[finite > 0]
        low = float(positive.min()) if positive.size else high / 10 or 0.1
        low = max(low, high * 1e-6)
        mapper: Any = LogColorMapper(
            palette=Cividis256, low=low, high=max(high, low * 10), nan_color=VERMILION
        )
    else:
        mapper = LinearColorMapper(palette=Cividis256, low=0, high=max(high, 1e-9), nan_color=VERMILION)
    pairs = (('an ordinary step', heat_map.before), ('the bad step', heat_map.now))
    made = [_heat_map(which, heat_map, values, mapper) for which, values in pairs]
    with np.errstate(all='ignore'):
        change = np.log2(numbers[1] / numbers[0]) if heat_map.log else numbers[1] - numbers[0]
    known = np.abs(change[np.isfinite(change)])
    most = max(float(known.max()), 1e-9) if known.size else 1.0
    change[~np.isfinite(change)] = np.nan
    title = 'the change: 1 is twice as much, -1 half' if heat_map.log else 'the change'
    changes = LinearColorMapper(palette=PuOr[11], low=-most, high=most, nan_color=VERMILION)
    return [*made, _heat_map(title, heat_map, change.tolist(), changes)]


def _heat_map(title: str, heat_map: HeatMap, values: Sequence[Sequence[float]], mapper: Any) -> Any:
    rows = [_short(name) for name in heat_map.rows]
    rows = [name if rows.count(name) == 1 else f'{name} {number}' for number, name in enumerate(rows)]
    places = heat_map.places
    made = figure(
        title=title, height=70 + 26 * len(rows), sizing_mode='stretch_width', y_range=FactorRange(factors=rows[::-1]),
        x_range=Range1d(start=min(places) - 0.5, end=max(places) + 0.5), tools=[], toolbar_location=None,
    )  # fmt: skip
    _clear(made)
    made.grid.visible = False
    cells = [
        (place, row, value)
        for row, found in zip(rows, values, strict=True)
        for place, value in zip(places, found, strict=True)
    ]
    source = ColumnDataSource(
        {
            'time step': [cell[0] for cell in cells],
            'row': [cell[1] for cell in cells],
            'value': np.array([cell[2] for cell in cells], np.float32),
        }
    )
    drawn = made.rect(
        'time step',
        'row',
        1,
        1,
        source=source,
        line_color=None,
        fill_color={'field': 'value', 'transform': mapper},
    )
    made.add_tools(
        HoverTool(
            renderers=[drawn],
            tooltips=[('@row, time step @{time step}', f'@value{PRINTED}')],
            formatters={'@value': 'printf'},
            visible=False,
        )
    )
    made.add_layout(ColorBar(color_mapper=mapper, width=8, background_fill_alpha=0), 'right')
    made.xaxis.axis_label = 'time step'
    return made


def _short(name: str) -> str:
    """The end of a long name, where it differs from others."""
    return name if len(name) <= 34 else '…' + name[-33:]
