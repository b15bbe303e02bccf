"""The page of a run, in a real browser: what it shows, that it asks for nothing, and that foreign text stays text."""

import dataclasses
import json
import math
import sys

import browsing
import numpy as np
import pytest
from escaping_test import DIAGNOSIS, planted
from PIL import Image
from report_test import REPORT, WORDS, change

import jaxrnn
from jaxrnn import detect, trace
from jaxrnn.bisect import inspection
from jaxrnn.diagnosis import Symptom
from jaxrnn.record.records import Records
from jaxrnn.report import evidence, figures, images, page, plots, sections
from jaxrnn.report import report as report_on
from jaxrnn.types import UserError

COMMAND = "jaxrnn train --flagfile='runs/a b/flags.txt' --learning_rate=0.5"
OVER_TIME = (
    trace.OverTime('cell/forget gate', 'saturated', (0, 1, 2), (0.1, 0.2, 0.3), (0.7, 0.8, 0.9)),
    trace.OverTime('cell/input gate', 'saturated', (0, 1, 2), (0.0, 0.2, 0.4), (0.1, 0.3, 0.5)),
    trace.OverTime('cell', 'gradient', (0, 1, 2), (1e-3, 1e-2, 0.1), (math.inf, 0.2, 0.0)),
)
COMPARED = inspection.Inspection(12, None, change(over_time=OVER_TIME), 10)
BLUE, GREEN, VERMILION = (0x00, 0x72, 0xB2), (0x00, 0x9E, 0x73), (0xD5, 0x5E, 0x00)


def with_losses():
    """The experiments, with the losses of each."""

    def losses(outcome, rise):
        return outcome._replace(losses=tuple(0.5 + rise * k for k in range(13)), reached=13)

    outcomes = tuple(losses(outcome, -0.01 * n) for n, outcome in enumerate(REPORT.outcomes))
    return REPORT._replace(control=losses(REPORT.control, 0.2), outcomes=outcomes)


def rows(count=400, **other):
    """A loss that falls, and leaps at step 12; a signal whose alarm goes on before."""
    rng = np.random.default_rng(0)
    noise = rng.normal(size=count) * 0.01
    return [
        {
            'step': k,
            'loss': float(math.exp(-k / 100) + abs(noise[k])) if k != 12 else 9.0,
            'accuracy': k / count,
            'update_rms': float(1 + noise[k]),
            'gradient_norm': float(2 + noise[k]),
            'finite_loss': True,
            **other,
        }
        for k in range(count)
    ]


def contents(made=None, *, kept=None, checkpoints=(0, 100)):
    records = Records.of(rows() if made is None else made)
    return page.Contents('mine', records, kept, checkpoints)


def found(text='', words=WORDS):
    diagnosis, report, inspected = planted((DIAGNOSIS, with_losses(), COMPARED), text)
    return evidence.of(diagnosis, report, inspected, words, command=COMMAND + text)


@pytest.fixture(scope='module')
def browser():
    sync_api = pytest.importorskip('playwright.sync_api')
    with sync_api.sync_playwright() as playwright:
        made = browsing.launched(playwright)
        yield made
        made.close()


@pytest.fixture
def shown(browser, tmp_path):
    """What opens a page."""
    made = []

    def open_page(what, **options):
        path = tmp_path / 'report.html'
        path.write_text(page.of(what) if isinstance(what, page.Contents) else what, encoding='utf-8')
        made.append(browsing.opened(browser, path, **options))
        return made[-1]

    yield open_page
    for each in made:
        assert each.said == []
        assert each.asked == [(tmp_path / 'report.html').as_uri()]
        each.page.context.close()


def near(picture, colour, within=40):
    return int((np.abs(picture.astype(int) - colour).sum(axis=2) < within).sum())


def test_every_panel_draws(shown):
    opened = shown(contents(kept=found()))
    assert [opened.page.locator('h2').nth(n).inner_text() for n in range(opened.page.locator('h2').count())] == [
        'The run', 'Beside the loss', 'The same steps, under one change at a time', 'Gates and gradients over time',
        'The step in full', 'Checks', 'Proof',
    ]  # fmt: skip
    drawn = opened.page.locator('.plot').count()
    assert drawn == 3 + 1 + 6
    for number in range(4):
        picture = opened.shot('.plot', number)
        assert near(picture, BLUE if number < 3 else GREEN) > 100, number  # the line, or a change's
        assert near(picture, VERMILION) > 100, number  # the step at which it was recognised, or the control
    for number in range(4, drawn):
        assert len(np.unique(opened.shot('.plot', number).reshape(-1, 3), axis=0)) > 20, number
    assert near(opened.shot('.plot', drawn - 1), VERMILION) > 500  # what is infinite in a map


def test_what_is_said_is_what_the_terminal_says(shown):
    opened = shown(contents(kept=found()))
    text = opened.page.locator('body').inner_text()
    for said in (
        'spike at step 12', 'it is', 'half the learning rate', 'averted, even at 4 x the rate', 'stone', 'checkify',
        'bit for bit as recorded', COMMAND, 'No alarm before the symptom: update_rms',
        '\nloss: 0.955 before that, 9 at step 12, 0.0', 'at the end of the records',
    ):  # fmt: skip
        assert said in text, said
    assert 'red' in opened.page.locator('.verdict span').first.get_attribute('class')


def test_zoom_is_linked(shown):
    opened = shown(contents(kept=found()))
    ranges = 'Bokeh.documents[0].roots().slice(0, 3).map((one) => [one.x_range.start, one.x_range.end])'
    before = opened.page.evaluate(ranges)
    box = opened.page.locator('.plot').nth(1).bounding_box()
    opened.page.mouse.move(box['x'] + box['width'] * 0.4, box['y'] + 100)
    opened.page.mouse.down()
    opened.page.mouse.move(box['x'] + box['width'] * 0.6, box['y'] + 110, steps=5)
    opened.page.mouse.up()
    opened.page.wait_for_timeout(300)
    after = opened.page.evaluate(ranges)
    assert after[0] == after[1] == after[2] != before[0]
    assert before[0][0] < after[0][0] < after[0][1] < before[0][1]


def test_the_command_is_copied(shown):
    opened = shown(contents(kept=found()))
    opened.page.locator('#copy').click()
    opened.page.locator('#copy', has_text='Copied').wait_for()
    assert opened.page.evaluate('navigator.clipboard.readText()') == COMMAND


@pytest.mark.parametrize('width', [380, 1100])
def test_it_fits(shown, width):
    opened = shown(contents(kept=found()), width=width)
    assert opened.page.evaluate('document.documentElement.scrollWidth') <= width
    for place in range(opened.page.locator('.plot').count()):
        assert opened.page.locator('.plot').nth(place).bounding_box()['width'] > width * 0.8 - 20


def luminance(colour):
    channels = [c / 255 for c in colour]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize('scheme', ['light', 'dark'])
def test_it_is_read_in_light_and_in_dark(shown, scheme):
    """Text, and the axes on the canvas, have a contrast of 4.5 to the ground (WCAG 2.2, 1.4.3)."""
    opened = shown(contents(kept=found()), scheme=scheme)
    ground = opened.shot('body')[2, 2]
    assert (luminance(ground) < 0.2) == (scheme == 'dark')
    axis = opened.page.evaluate(
        '[...Bokeh.documents[0].all_models].find((one) => one.type === "LinearAxis").major_label_text_color'
    )
    colours = opened.page.evaluate(
        """[...document.querySelectorAll('p, td, th, li, h2, h3, button, pre, span:not(.swatch)')]
        .map((one) => getComputedStyle(one).color)"""
    )
    named = {tuple(int(part) for part in each[4:-1].split(',')) for each in colours}
    named.add(tuple(int(axis[n : n + 2], 16) for n in (1, 3, 5)))
    for colour in named:
        high, low = sorted((luminance(colour), luminance(ground)), reverse=True)
        assert (high + 0.05) / (low + 0.05) >= 4.5, colour


HOSTILE = (
    '</script><img src=x onerror="window.bad=1"><script>window.bad=1</script>'
    '{{7*7}} $$x$$ \x1b[31m\u202e @step &amp;'
)


def test_foreign_text_stays_text(shown):
    made = rows(**{f'metric{HOSTILE}': 1.5, 'update_rms': 2.0})
    what = contents(made, kept=found(HOSTILE, [f'river{HOSTILE}', f'stone{HOSTILE}', 'b']))
    versions = dataclasses.replace(what.diagnosis, versions={f'python{HOSTILE}': HOSTILE})
    what = what._replace(title=f'run{HOSTILE}', evidence=what.evidence._replace(diagnosis=versions))
    opened = shown(what)
    assert opened.page.evaluate('window.bad') is None
    assert opened.page.locator('img').count() == 0
    text = opened.page.locator('body').inner_text()
    assert (
        'onerror="window.bad=1"' in text and '{{7*7}}' in text and '\x1b' not in text and '\u202e' not in text
    )
    titles = opened.page.evaluate('Bokeh.documents[0].roots().map((one) => one.title.text)')
    assert any('onerror' in title for title in titles)
    assert not any(bad in title for title in titles for bad in ('\x1b', '\u202e', '$$'))
    for place in range(opened.page.locator('.plot').count()):  # and what is said where the pointer is
        box = opened.page.locator('.plot').nth(place).bounding_box()
        opened.page.mouse.move(box['x'] + box['width'] / 2, box['y'] + box['height'] / 2)
        opened.page.wait_for_timeout(50)
    assert opened.page.evaluate('window.bad') is None


def test_the_way_of_a_value(shown):
    links = (trace.Link('sub', 'a.py:3'), trace.Link('mul', 'a.py:2'))
    ranges = (trace.Range('batch/x', (8, 3), 'float32', -1.0, 0.0, 0, 0),)
    finding = trace.Finding(
        'invalid argument',
        'forward',
        'log',
        'a.py:4',
        'log(x)',
        '',
        'dense',
        (),
        None,
        (2,),
        1,
        ranges,
        ranges,
        links,
    )
    inspected = inspection.Inspection(12, trace.TraceReport(finding, (), 40), None, None)
    made = rows()
    made[12]['loss'] = math.nan
    opened = shown(contents(made, kept=evidence.of(DIAGNOSIS, None, inspected)))
    boxes = opened.page.locator('.way li')
    assert [boxes.nth(n).inner_text() for n in range(boxes.count())] == [
        'mul at a.py:2',
        'sub at a.py:3',
        'batch/x (8x3 float32): from -1 to 0',
        'log at a.py:4: finite operands for which the operation is not defined',
        'loss of step 12',
    ]


def test_what_a_run_lacks_is_left_out(shown):
    """Records alone; and a run of no records, of which there are checkpoints."""
    opened = shown(contents([{'step': k, 'x': float(k)} for k in range(5)]))
    assert opened.page.locator('h2').count() == 1 and opened.page.locator('.plot').count() == 1
    assert 'not diagnosed yet' in opened.page.locator('body').inner_text()
    opened = shown(contents([]))
    assert opened.page.locator('h2').count() == 0


def test_a_long_run_is_small_and_soon_drawn(shown, tmp_path):
    """100,000 steps with the leap of a single one, which is still there; benchmarks/page.py measures how soon."""
    values = np.full(100_000, 0.1)
    values[66_666], values[3] = 7.0, np.nan
    made = [{'step': k, **{f'metric_{n}': float(v) for n in range(6)}} for k, v in enumerate(values)]
    opened = shown(contents(made))
    assert (tmp_path / 'report.html').stat().st_size < 2e6
    assert opened.seconds < 10
    assert opened.page.evaluate(
        'Bokeh.documents[0].roots()[0].renderers[0].data_source.data.value.includes(7)'
    )


def test_a_leap_that_passed_is_no_symptom():
    """As a bisect has it: the loss is back at once, in a run that goes on to its best."""
    made = [
        {'step': k, 'loss': math.exp(-k / 100) * (1 + 0.01 * (k % 3)) if k != 250 else 1.0}
        for k in range(400)
    ]
    assert [found.kind for found in detect.symptoms(Records.of(made).columns)] == ['spike']
    assert page.undiagnosed(contents(made)) == 'no symptom in the records; not diagnosed yet'
    assert page.undiagnosed(contents([*made, {'step': 400, 'loss': math.nan}])).startswith(
        'nonfinite at step 400'
    )


def test_kept_and_read_again(tmp_path):
    made = found()
    evidence.write(tmp_path, made)
    again = evidence.read(tmp_path)
    assert again.sections == made.sections and again.command == COMMAND
    assert (again.diagnosis.symptom, again.diagnosis.first_bad_step) == (DIAGNOSIS.symptom, 12)
    assert again.experiments == made.experiments
    assert again.heat_maps[0] == made.heat_maps[0]
    np.testing.assert_equal(again.heat_maps[1]._asdict(), made.heat_maps[1]._asdict())
    assert math.isnan(made.heat_maps[1].now[0][0])
    assert evidence.read(tmp_path / 'nothing') is None


@pytest.mark.parametrize(
    'damage',
    [
        {'sections': [{'name': 'x', 'title': 'y', 'body': [{'lines': [[['a', ['onclick']]]]}]}]},
        {'sections': [{'name': 'x', 'title': 'y', 'body': [{'head': [], 'left': [True], 'rows': [[]]}]}]},
        {'sections': [3]},
        {'experiments': {'name': 'a', 'log': True, 'lines': [{'name': 'a', 'steps': [1], 'values': [], 'kind': ''}]}},
        {'experiments': {'name': 'a', 'log': True, 'lines': [{'name': 3, 'steps': [], 'values': [], 'kind': ''}]}},
        {'heat_maps': [{'name': 'a', 'rows': ['b'], 'places': [0, 1], 'before': [[1]], 'now': [[1]], 'log': False}]},
        {'way': {'links': [1], 'broke': 'x'}},
        {'command': None},
        {'size': 1e400},
        {'heat_maps': [{'name': 'a', 'rows': ['b'], 'places': [0], 'before': [[10**400]], 'now': [[1]], 'log': False}]},
        {'diagnosis': {'symptom': ['spike', '12'], 'first_bad_step': 1, 'onset_step': 1, 'versions': {}}},
        {'diagnosis': {'symptom': ['spike'], 'first_bad_step': 1, 'onset_step': 1, 'versions': {}}},
        {'diagnosis': {'symptom': None, 'first_bad_step': True, 'onset_step': 1, 'versions': {}}},
        {'diagnosis': {'symptom': None, 'first_bad_step': 1, 'onset_step': 1, 'versions': {'a': 1}}},
    ],
)  # fmt: skip
def test_evidence_that_nobody_wrote_is_refused(tmp_path, damage):
    from jaxrnn import files

    evidence.write(tmp_path, found())
    path = tmp_path / 'evidence.json'
    fields = files.unsealed(json.loads(path.read_text()))
    path.write_text(json.dumps(files.sealed({**fields, **damage})))
    with pytest.raises(UserError, match=r'evidence\.json: not as'):
        evidence.read(tmp_path)


def test_of_a_run(tmp_path):
    """Of somebody's own loop: the page is there, and the same again when it is asked for later."""

    def step(x, batch):
        return x * batch, {'loss': x}

    run = step, lambda k: np.float32(np.nan if k == 50 else 1.01)
    jaxrnn.record(*run, lambda: 1.0, tmp_path, max_steps=60)
    diagnosis, report = jaxrnn.diagnose(*run, tmp_path, like=lambda: 1.0)
    path = report_on(tmp_path, diagnosis, report)
    first = path.read_text()
    assert (
        path == tmp_path / 'report.html'
        and 'nonfinite at step 50' in first
        and 'without the batch of step 50' in first
    )
    assert json.loads((tmp_path / 'diagnosis.json').read_text())['symptom']['step'] == 50
    again = report_on(tmp_path).read_text()
    assert len(again) == len(first)  # but for the names of the plots, which are new each time
    assert 'has gone on since' not in first
    with (tmp_path / 'records.jsonl').open('a') as file:
        file.write('{"step": 60, "loss": 1.0}\n')
    assert 'has gone on since it was diagnosed' in report_on(tmp_path).read_text()


def test_in_a_notebook(shown):
    made = planted(DIAGNOSIS, HOSTILE)._repr_html_()
    opened = shown(f'<!DOCTYPE html><title>x</title>{made}')
    assert opened.page.evaluate('window.bad') is None and opened.page.locator('img').count() == 0
    text = opened.page.locator('.jaxrnn').inner_text()
    assert 'at step 12' in text and 'bit for bit as recorded' in text and 'onerror' in text
    assert 'bold' in opened.page.locator('.jaxrnn .red').first.get_attribute('class')


def test_no_run(tmp_path):
    with pytest.raises(UserError, match='holds no run'):
        page.write(tmp_path)


def test_an_alarm_has_its_line():
    (alarm,) = [each for each in detect.ALARMS if each.kind == 'update_rms']
    columns = {'step': np.arange(300.0), 'update_rms': np.r_[np.ones(250), np.full(50, 9.0)]}
    made = figures._alarm_panel(alarm, columns)
    line = made.lines[1]
    assert line.kind == 'alarm' and line.values[240] == pytest.approx(math.exp(0.9))
    assert len(made.bands) == 1 and 250 <= made.bands[0][0] <= 260


@pytest.mark.parametrize('kind', ['png', 'svg'])
def test_figures_are_saved_for_papers(tmp_path, kind):
    pytest.importorskip('matplotlib')
    made = rows(**{'../$x_{$\n': 1.0, '../$x_($\n': 1.0})
    drawn, _ = page.figures_of(contents(made, kept=found()))
    saved = images.save(drawn, tmp_path / 'figures', kind)
    assert {path.parent for path in saved} == {tmp_path / 'figures'}
    names = [path.stem for path in saved]
    assert names == ['loss', 'accuracy', *names[2:5], 'experiments', 'over-time-0', 'over-time-1']
    assert len({*saved}) == len(saved) and all(path.exists() for path in saved)  # two have names alike
    for path in saved:
        if kind == 'png':
            assert len(np.unique(np.asarray(Image.open(path).convert('RGB')).reshape(-1, 3), axis=0)) > 20
        else:
            assert '<path' in path.read_text()


def test_without_matplotlib_it_is_one_line(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, 'matplotlib', None)
    drawn, _ = page.figures_of(contents())
    with pytest.raises(UserError, match='pip install matplotlib'):
        images.save(drawn, tmp_path)


def test_a_section_as_plain_data():
    from rich.text import Text

    from jaxrnn.report.text import table

    made = table('a', 'b', left=('a',))
    made.add_row(Text('x', style='green'), '1', style='bold red')
    found = sections.plain(sections.Section('n', 'T', (Text('one\ntwo', style='dim'), made)))
    assert found['body'] == [
        {'lines': [[['one', ['dim']]], [['two', ['dim']]]]},
        {
            'head': ['a', 'b'],
            'left': [True, False],
            'rows': [[{'lines': [[['x', ['bold', 'green']]]]}, {'lines': [[['1', ['bold', 'red']]]]}]],
        },
    ]
    assert sections.is_plain(found)


def test_the_run_goes_on_beside_its_experiments():
    """Its control ends where the symptom shows, and the run did not."""
    panel = figures.of_experiments(with_losses())
    assert [line.kind for line in panel.lines][:2] == ['control', 'averted']
    longer = panel._replace(lines=[*panel.lines, figures.Line('long', [0, 40], [1.0, 1.0], 'averted')])
    columns = {'step': np.arange(60.0), 'loss': np.arange(60.0)}
    run = figures.with_run(longer, columns).lines[0]
    assert (run.name, run.kind, run.steps[0], run.steps[-1], run.values[-1]) == (
        'the run',
        'control',
        0,
        40,
        40.0,
    )
    assert figures.with_run(panel, {}) is panel and figures.with_run(None, columns) is None
    nudged = figures.of_experiments(with_losses()._replace(nudge=with_losses().outcomes[0]))
    assert nudged.lines[-1].kind == 'nudge'


def test_an_axis_has_some_ticks_and_not_too_many():
    def ticks(*values):
        made = plots.ticks(figures.Panel('x', [figures.Line('x', [*range(len(values))], [*values])], True))
        return [tick for tick in made if min(values) <= tick <= max(values)]

    assert ticks(0.003, 0.009) == [0.005]
    assert ticks(0.003, 0.1) == [0.005, 0.01, 0.02, 0.05, 0.1]
    assert 3 <= len(ticks(1e-30, 1e8)) <= 8


def test_marks_say_the_gravest():
    diagnosis = dataclasses.replace(DIAGNOSIS, symptom=Symptom('spike', 12), onset_step=12)
    assert [mark.kind for mark in figures.of_marks(diagnosis, [0, 12])] == ['checkpoint', 'recognised']


def test_bokeh_s_script_is_its_core_alone():
    assert 1e6 < len(plots.script_of_bokeh()) < 1.5e6
