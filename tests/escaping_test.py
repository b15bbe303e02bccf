"""Others' text can be seen wherever it is shown: no word moves the cursor, is markup, or is nothing."""

import ast
import dataclasses
import html.parser
import io
import json
import logging
import os
import shutil
import subprocess
import sys
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from report_test import FINDING, INSPECTED, PRECISION, REPORT, change
from rich.console import Console

from jaxrnn import escaping, report, trace
from jaxrnn.bisect import inspection
from jaxrnn.cli import common, invocation
from jaxrnn.diagnosis import Cause, Diagnosis, Replay, Symptom
from jaxrnn.types import UserError
from jaxrnn.words import config, data, run
from jaxrnn.words.config import Config
from jaxrnn.words.data import formats

HOSTILE = (
    'a\x1b[31mb', '\x1b]0;title\x07', '\x9b2Jx', 'a\rb', 'a\bb', 'a\0b', 'a\nb', 'a\tb', '\x7f', 'a\x85b', 'a\u2028b',
    'a\u2029b', '\u202eabc', 'a\u2066b\u2069', '\u200f\u061c', 'a\u200bb', 'a\u200db', 'a\ufeffb', '\u2060', 'a\u00adb',
    'a\ud800b', '\udcff', '\u3164', '\u2800', 'a\ufe0fb', 'a\u034fb', '\ue000', '\U000e0041', 'a\xa0b', 'a\u3000b',
    'o' + '\u0300' * 40,
)  # fmt: skip
MARKUP = (
    '[/x]',
    '[red]a',
    '[link=file:///etc/passwd]a[/link]',
    ':bee:',
    '\\[a]',
    '<b>',
    '&amp;',
    '{0}',
    '%s',
)
LEGITIMATE = (
    'naïve', 'слово', 'λόγος', '日本語', 'カタカナ', '한국어', 'العربية', 'עִבְרִית', 'हिन्दी', 'தமிழ்', 'ไทย', 'e\u0301',
    'x\u0323\u0307y',     '🐝', '→', 'a b', "it's", '--x=[1]', '$',
)  # fmt: skip


def seen(text: str) -> bool:
    """Whether everything in it can be: asked of Unicode's categories, and of Python's own idea."""
    hidden = {unicodedata.category(letter) for letter in text} & {'Cc', 'Cf', 'Cs', 'Co', 'Cn', 'Zl', 'Zp'}
    return not hidden and text.isprintable() and not set(text) & set('\u3164\u2800\ufe0f\u034f')


@pytest.mark.parametrize('text', HOSTILE)
def test_what_cannot_be_seen_is_spelled(text):
    assert not seen(text) or len(text) > 40
    shown = escaping.visible(text)
    assert seen(shown) and '\\' in shown and escaping.visible(shown) == shown
    assert not any(len(set(shown[at : at + 9])) == 1 for at in range(len(shown) - 8))  # no pile of marks


@pytest.mark.parametrize('text', LEGITIMATE + MARKUP)
def test_all_else_stays(text):
    assert escaping.visible(text) == text == escaping.one_line(text)


def test_an_error_is_one_line_that_can_be_seen():
    error = UserError('--run_dir: a  b\n   \x1b[31mred\u202e: \n\tno')
    assert str(error) == r'--run_dir: a  b \x1b[31mred\u202e: no'
    long = str(UserError('--word: ' + 'a' * 10**6 + ' found; do this'))
    assert len(long) < 5000 and long.startswith('--word: a') and long.endswith('found; do this')


def test_a_line_of_the_log_can_be_seen(caplog):
    with caplog.at_level(logging.WARNING, 'jaxrnn'):
        logging.getLogger('jaxrnn').warning('%s: %d\nforged', 'a\x1b[31m', 3)
    assert caplog.messages == [r'a\x1b[31m: 3 forged']


def test_a_refusal_can_be_seen(capsys):
    assert common.refuse('jaxrnn', "'\x1b[31m\n' found") == common.MISUSE
    common.say('[/x] :bee: \u202e')
    assert capsys.readouterr().err == "jaxrnn: '\\x1b[31m\\n' found\n[/x] :bee: \\u202e\n"


# Commands to be copied.


@pytest.mark.parametrize('shell', ['bash', 'zsh'])
def test_a_word_of_a_command_is_that_word_again(shell):
    if not shutil.which(shell):
        pytest.skip(f'no {shell}')
    words = [word for word in HOSTILE + MARKUP + LEGITIMATE if '\0' not in word and '\ud800' not in word]
    words += ['$(touch /tmp/x) `id` \'a\' "b" \\ !', '~/a', '*', "\x1b'\\n", '\x1b3', 'é\x1bé']
    line = ' '.join(map(escaping.as_shell_word, words))
    assert seen(line)
    done = subprocess.run([shell, '-c', f"printf '%s\\0' {line}"], capture_output=True, check=True)
    assert done.stdout.split(b'\0')[:-1] == [os.fsencode(word) for word in words]


def test_hints_are_quoted():
    said = invocation.following('diagnose', '--run_dir=a\x1b b$(id)')
    assert said.endswith(r" diagnose $'--run_dir=a\x1b b$(id)'")


def test_the_advice_to_convert_a_pickle_runs_nothing_of_its_name(tmp_path):
    path = tmp_path / 'a$(touch x)"`touch x`\'.kv'
    path.write_bytes(b'\x80\x04')
    with pytest.raises(UserError) as caught, formats.vector_table(str(path)):
        pass
    command = str(caught.value).partition('convert it: python ')[2]
    done = subprocess.run(['bash', '-c', f"printf '%s\\0' {command}"], capture_output=True, cwd=tmp_path)
    option, code = done.stdout.decode().split('\0')[:2]
    texts = [node.value for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Constant)]
    assert option == '-c' and str(path) in texts and f'{path}.bin' in texts
    assert [each.name for each in tmp_path.iterdir()] == [path.name]


# HTML and JSON.


@pytest.mark.parametrize('text', HOSTILE + MARKUP + LEGITIMATE)
def test_html_has_the_text_and_nothing_else(text):
    found: list[str] = []

    class Reader(html.parser.HTMLParser):
        def handle_starttag(self, tag, attributes):
            found.append(attributes[0][1])

        def handle_data(self, content):
            found.append(content)

    reader = Reader()
    reader.feed(f'<i title="{escaping.as_html(text)}">{escaping.as_html(text)}</i>')
    reader.close()
    assert [found[0], ''.join(found[1:])] == [escaping.visible(text)] * 2


def test_json_is_ascii_and_gives_the_text_back(capsys):
    common.print_json(list(HOSTILE + MARKUP + LEGITIMATE))
    line = capsys.readouterr().out
    assert line.isascii() and seen(line.rstrip('\n')) and json.loads(line) == [*HOSTILE, *MARKUP, *LEGITIMATE]


def test_json_has_no_nan(capsys):
    common.print_json({'vector': [float('nan'), 1.0, (float('inf'),)], 'step': 3})
    assert capsys.readouterr().out == '{"vector": [null, 1.0, [null]], "step": 3}\n'


# Screens: every string of what they are given is hostile.


def planted(value, text):
    """The same data with `text` at the end of each string, but for those that a screen looks up."""
    match value:
        case str():
            return f'{value}{text}'
        case dict():
            return {name: planted(one, text) for name, one in value.items()}
        case tuple() if hasattr(value, '_fields'):
            keep = ('verdict', 'kind', 'make', 'key', 'points_to', 'pass_')
            pairs = value._asdict().items()
            return type(value)(**{name: one if name in keep else planted(one, text) for name, one in pairs})
        case list() | tuple():
            return type(value)(planted(one, text) for one in value)
    if dataclasses.is_dataclass(value):
        names = (field.name for field in dataclasses.fields(value))
        return dataclasses.replace(value, **{name: planted(getattr(value, name), text) for name in names})
    return value


WHERE = {
    'pass': 'forward',
    'op': 'log',
    'source': 'a.py:7',
    'layer': 'cell',
    'time_step': 2,
    'examples': [1],
    'words': ['b'],
}
DIAGNOSIS = Diagnosis(
    symptom=Symptom('spike', 12),
    first_bad_step=12,
    where=WHERE,
    checks=({'name': 'checkify', 'ok': False, 'value': 0.0, 'why': 'found nothing'},),
    cause=Cause('model', 'it is'),
    remedies=(
        {
            'name': 'a change',
            'flags': '--clip=1',
            'outcome': 'averted',
            'loss_at_horizon': 0.5,
            'point_of_no_return': 3,
        },
    ),
    replay=Replay(True, None, 3, 1),
    versions={'python': '3'},
)
ROWS = [{'step': 12, 'loss': 2.0, 'my_metric': 1.0}, {'step': 13, 'loss': 2.0, 'my_metric': 1.0}]


def screens(text):
    made = [planted(each, text) for each in (DIAGNOSIS, INSPECTED, ['river', 'stone'])]
    diagnosis, inspected, words = made
    finite = dataclasses.replace(DIAGNOSIS, symptom=None)
    rows = [
        {name if name == 'step' else f'{name}{text}': value for name, value in row.items()} for row in ROWS
    ]
    yield report.render_bisection(diagnosis, rows, words, inspected)
    yield report.render_bisection(diagnosis, rows, words)
    yield report.render_bisection(planted(finite, text), rows)
    yield report.render_diagnosis(diagnosis, None)
    yield report.render_diagnosis(diagnosis, planted(REPORT, text), inspected, words)
    yield report.render_inspection(inspected, words)
    yield report.render_inspection(
        planted(INSPECTED._replace(comparison=change(scores={'m': (1.0, 2.0, 3.0)})), text)
    )
    yield report.render_training(diagnosis, planted({'train': {'loss': 1.0}}, text))
    for looked in (
        inspection.Inspection(12, trace.TraceReport(FINDING, (FINDING,), 7), None, None),
        inspection.Inspection(12, None, None, None, precision=PRECISION),
    ):
        yield report.render_inspection(planted(looked, text), words)
    yield report.render_neighbours(
        planted([{'word': 'a', 'known': True, 'nearest': [{'word': 'b', 'cosine': 0.5}]}], text)
    )


@pytest.mark.parametrize('text', HOSTILE + MARKUP)
def test_screens_show_all_of_it(text):
    """On the terminal of somebody who uses rich as it comes, with markup."""
    shown = escaping.visible(text)
    for screen in screens(text):
        console = Console(file=io.StringIO(), width=20_000, color_system=None)
        console.print(screen)
        out = console.file.getvalue()
        assert shown in out and all(seen(line) for line in out.split('\n')), out
    assert shown[:8] in str(planted(DIAGNOSIS, text))
    assert all(seen(line) for line in str(planted(DIAGNOSIS, text)).split('\n'))


# The commands.


@pytest.fixture(scope='module')
def stranger(tmp_path_factory) -> Path:
    """A run whose words, directory and file of vectors have hostile names."""
    folder = tmp_path_factory.mktemp('runs') / 'r\x1b[31m[/x] \u202eb'
    folder.mkdir(parents=True)
    words = [
        '[/x]',
        'é',
        '日本語',
        ':bee:',
        *(w for w in HOSTILE if not set(w) & set('\n\r\x85') and w.isidentifier()),
    ]
    words += ['a\x1b[31mb', '\u202ec', 'x\x9bm', *(f'w{n}' for n in range(8))]
    rows = np.random.default_rng(0).normal(size=(len(words), 4)).astype(np.float32)
    data.write_vectors(folder / 'v\x1b.txt', words, rows)
    made = Config(
        data=config.Data(vectors=str(folder / 'v\x1b.txt'), validation_share=0.0, test_share=0.0),
        model=config.Model(hidden=4),
        training=config.Training(batch_size=len(words)),
        loop=config.Loop(max_steps=6, checkpoint_every=3),
    )
    run.train_run(made, folder / 'run')
    return folder / 'run'


def test_a_command_shows_all_of_it(stranger):
    done = subprocess.run(
        [sys.executable, '-m', 'jaxrnn', 'embed', f'--run_dir={stranger}', '--threads=1', '[/x]'],
        capture_output=True,
        text=True,
        env={**os.environ, 'PYTHONPATH': str(Path(__file__).parent.parent), 'PYTHONIOENCODING': 'ascii'},
    )
    assert done.returncode == 0 and '[/x]' in done.stdout, done.stderr
    assert all(seen(line) for line in (done.stdout + done.stderr).split('\n'))
