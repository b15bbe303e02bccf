"""A run that still trains, watched: what is served, to whom, and what a terminal shows."""

import contextlib
import html
import http.client
import io
import math
import subprocess
import sys
import threading
from pathlib import Path

import browsing
import pytest
from page_test import browser, found, rows  # noqa: F401  # a fixture
from rich.console import Console

from jaxrnn import detect
from jaxrnn.record.record_file import RecordFile
from jaxrnn.report import evidence, page, watching
from jaxrnn.types import UserError

ROOT = Path(__file__).parent.parent


def write(directory, made):
    file = RecordFile(directory / 'records.jsonl')
    for row in made:
        file.append(row)
    file.close()


@contextlib.contextmanager
def serving(directory):
    served = watching.server(watching.Watched(directory, detect.ALARMS), 0)
    threading.Thread(target=served.serve_forever, daemon=True).start()
    try:
        yield served.server_port
    finally:
        served.shutdown()
        served.server_close()


def ask(port, path, method='GET', host='localhost'):
    connection = http.client.HTTPConnection('127.0.0.1', port, timeout=10)
    connection.request(method, path, headers={'Host': f'{host}:{port}' if host else ''})
    answer = connection.getresponse()
    return answer.status, answer.read().decode(), dict(answer.getheaders())


def test_the_page_and_its_stamp_and_nothing_else(tmp_path):
    write(tmp_path, rows(30))
    (tmp_path / 'secret').write_text('s')
    with serving(tmp_path) as port:
        code, text, headers = ask(port, '/')
        assert code == 200 and '30 recorded steps' in text and "connect-src 'self'" in html.unescape(text)
        assert headers['Cache-Control'] == 'no-store' and headers['X-Frame-Options'] == 'DENY'
        assert ask(port, '/stamp')[:2] == (200, watching.Watched(tmp_path, ()).stamp())
        for path in ('/records.jsonl', '/secret', '/../secret', '/%2e%2e/etc/passwd', '/index.html'):
            assert ask(port, path)[0] == 404, path
        for method in ('POST', 'PUT', 'DELETE', 'HEAD', 'OPTIONS'):
            assert ask(port, '/', method)[0] == 501, method


@pytest.mark.parametrize('host', ['evil.example', '', '127.0.0.1.evil.example', 'localhost.evil.example'])
def test_a_foreign_name_is_refused(tmp_path, host):
    """As of a page that has its own name lead to this machine."""
    write(tmp_path, rows(3))
    with serving(tmp_path) as port:
        code, text, _ = ask(port, '/', host=host)
        assert code == 403 and 'recorded' not in text


def test_it_listens_to_this_machine_alone(tmp_path):
    with watching.server(watching.Watched(tmp_path, ()), 0) as served:
        assert served.server_address[0] == '127.0.0.1'
        with pytest.raises(UserError, match='choose another, or 0 for any'):
            watching.server(watching.Watched(tmp_path, ()), served.server_port)


def test_what_can_not_be_read_is_one_line(tmp_path):
    write(tmp_path, rows(30))
    lines = (tmp_path / 'records.jsonl').read_bytes().splitlines(keepends=True)
    (tmp_path / 'records.jsonl').write_bytes(b''.join([*lines[:9], b'{"step": \x1b\n', *lines[10:]]))
    with serving(tmp_path) as port:
        code, text, _ = ask(port, '/')
        assert code == 500 and 'records.jsonl' in text and len(text.splitlines()) == 1 and '\x1b' not in text


def test_a_page_is_not_made_for_each_that_asks(tmp_path, monkeypatch):
    write(tmp_path, rows(30))
    made = []
    monkeypatch.setattr(page, 'of', lambda *args, **options: made.append(1) or 'page')
    watched = watching.Watched(tmp_path, ())
    for _ in range(5):
        assert watched.page() == b'page'
    assert len(made) == 1
    write(tmp_path, [{'step': 30, 'loss': 1.0}])
    monkeypatch.setattr(watched, '_next', math.inf)  # it was made a moment ago
    watched.page()
    assert len(made) == 1
    monkeypatch.setattr(watched, '_next', 0)
    watched.page()
    assert len(made) == 2


def test_it_follows_the_run_and_looks_as_it_did(tmp_path, browser, monkeypatch):  # noqa: F811
    """Of the same zoom, at the same place of the page."""
    monkeypatch.setattr(watching, 'PACE', 0)
    write(tmp_path, rows(300))
    with serving(tmp_path) as port:
        opened = browsing.opened_at(browser, f'http://localhost:{port}/')
        assert '300 recorded steps' in opened.page.locator('.run').inner_text()
        opened.page.evaluate(
            'Bokeh.documents[0].roots()[0].x_range.setv({start: 50, end: 90}); scrollTo(0, 60)'
        )
        write(tmp_path, [{'step': 300, 'loss': 1.0}])
        opened.page.locator('.run', has_text='301 recorded').wait_for(timeout=20_000)
        opened.page.wait_for_timeout(1500)
        assert opened.page.evaluate('Bokeh.documents[0].roots()[0].x_range.start') == 50
        assert opened.page.evaluate('scrollY') == 60
        assert opened.said == [] and all(f'localhost:{port}/' in address for address in opened.asked)
        opened.page.context.close()


def lines(contents, width=60):
    console = Console(file=io.StringIO(), width=width)
    console.print(watching.in_lines(contents, detect.ALARMS, width=width, rate='3.1 steps/s'))
    return console.file.getvalue()


@pytest.mark.parametrize('width', [40, 60, 120])
def test_in_a_terminal(width):
    from jaxrnn.record.records import Records

    made = rows(200)
    made[100]['loss'] = math.nan
    text = lines(page.Contents('mine', Records.of(made), None, ()), width)
    assert all(len(line) <= width for line in text.splitlines())
    assert (
        '200 steps' in text and '3.1 steps/s' in text and 'nonfinite at step 100' in text.replace('\n', ' ')
    )
    (loss,) = (line for line in text.splitlines() if line.split()[:1] == ['loss'])
    assert '█' in loss and '▁' in loss
    assert 'spike at step 12' in lines(page.Contents('mine', Records.of(rows()), found(), ()))


def test_sparks():
    assert watching.sparkline([1.0, math.nan, 3.0], 3) == '▁×█'
    assert watching.sparkline([], 5) == '×'
    assert watching.sparkline([2.0] * 9, 3) == '▁▁▁'
    assert watching.sparkline([*[0.0] * 99, 5.0, *[0.0] * 100], 10) == '▁▁▁▁█▁▁▁▁▁'  # a single leap is seen
    assert watching.sparkline([1e-9, 1e-6, 1e-3], 3, log=True) == '▁▅█'


def test_the_command(tmp_path):
    write(tmp_path, rows(30))
    evidence.write(tmp_path, found())
    command = [sys.executable, '-m', 'jaxrnn', 'watch', f'--run_dir={tmp_path}']
    done = subprocess.run([*command, '--text'], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and 'loss' in done.stdout and 'spike at step 12' in done.stdout, done.stderr
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        try:
            address = process.stdout.readline().strip()
            assert ask(int(address.rsplit(':', 1)[1].strip('/')), '/stamp')[0] == 200
        finally:
            process.terminate()
            try:
                code = process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                raise
        assert code == 0
