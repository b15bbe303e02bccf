"""A run that still trains, watched: its page served to this machine alone, or a few lines for a terminal."""

import contextlib
import hashlib
import http.server
import math
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Group, RenderableType
from rich.text import Text

from jaxrnn.detect import Detector
from jaxrnn.errors import UserError
from jaxrnn.escaping import visible
from jaxrnn.record import layout
from jaxrnn.report import page
from jaxrnn.report.text import count, number, table

HOSTS = ('localhost', '127.0.0.1')
"""Names that a browser of this machine asks for. One that asks for another was led here by somebody's page."""

PACE = 5
"""Times that making a page takes, until it is made again: so a run of many records doesn't keep a core busy."""

BLOCKS = '▁▂▃▄▅▆▇█'


class Watched:
    """The page of a run, made anew when the run has gone on.

    Args:
        root: of the run.
        alarms: of the run's signals.
    """

    def __init__(self, root: Path, alarms: Sequence[Detector]):
        self._root, self._alarms = root, alarms
        self._lock = threading.Lock()
        self._made: tuple[str, bytes] | None = None
        self._next = 0.0

    def stamp(self) -> str:
        """Another text whenever the page would be another."""
        paths = layout.Paths(self._root)
        found = []
        for path in (paths.records, paths.evidence, paths.checkpoints):
            try:
                seen = path.lstat()
                found.append(f'{seen.st_size} {seen.st_mtime_ns}')
            except OSError:
                found.append('')
        return hashlib.sha256('\n'.join(found).encode()).hexdigest()[:16]

    def page(self) -> bytes:
        """The page as it is now, or as it was a moment ago. Raises UserError where the run can't be read."""
        with self._lock:
            stamp, now = self.stamp(), time.monotonic()
            if self._made is None or (self._made[0] != stamp and now >= self._next):
                made = page.of(page.read(self._root), self._alarms, live=stamp)
                took = time.monotonic() - now
                self._made, self._next = (stamp, made.encode()), now + (1 + PACE) * took
            return self._made[1]


def server(watched: Watched, port: int) -> http.server.ThreadingHTTPServer:
    """Serves a page on this machine's own address, to it alone, to be read: `serve_forever` does.

    Args:
        watched: the page.
        port: 0 for any that is free.

    Raises:
        UserError: the port is taken, or not for us.
    """

    class Handler(_Handler):
        pages = watched

    try:
        return http.server.ThreadingHTTPServer((HOSTS[1], port), Handler)
    except OSError as error:
        raise UserError(
            f'--port: {port} can not be used ({error.strerror}); choose another, or 0 for any'
        ) from error


class _Handler(http.server.BaseHTTPRequestHandler):
    """Two addresses, to be read. The name in a request must be ours, as a foreign page could have its own name lead to
    this machine."""

    pages: Watched
    server_version, sys_version = 'jaxrnn', ''

    def do_GET(self) -> None:
        asked = (self.headers.get('Host') or '').rpartition(':')
        name = asked[0] if asked[1] else asked[2]
        if name not in HOSTS:
            return self._answer(403, 'text/plain', b'another host found, localhost expected\n')
        match self.path:
            case '/':
                try:
                    return self._answer(200, 'text/html', self.pages.page())
                except UserError as error:
                    return self._answer(500, 'text/plain', f'{error}\n'.encode())
            case '/stamp':
                return self._answer(200, 'text/plain', self.pages.stamp().encode())
        return self._answer(404, 'text/plain', b'nothing is here\n')

    def _answer(self, code: int, kind: str, content: bytes) -> None:
        self.send_response(code)
        for name, value in {
            'Content-Type': f'{kind}; charset=utf-8',
            'Content-Length': str(len(content)),
            'Cache-Control': 'no-store',
            'X-Content-Type-Options': 'nosniff',
            'X-Frame-Options': 'DENY',
            'Cross-Origin-Resource-Policy': 'same-origin',
        }.items():
            self.send_header(name, value)
        with contextlib.suppress(ConnectionError):  # of a browser that has gone on
            self.end_headers()
            self.wfile.write(content)

    def log_message(self, *arguments: Any) -> None:
        """Nothing: a terminal is for what the user asked."""


def in_lines(
    contents: page.Contents, alarms: Sequence[Detector], *, width: int, rate: str = ''
) -> RenderableType:
    """A few lines on a run, for a terminal.

    Args:
        contents: of the run.
        alarms: of its signals.
        width: of the terminal, in letters.
        rate: how fast it goes, as a person reads it.
    """
    drawn, _ = page.figures_of(contents, alarms)
    panels = (*drawn.metrics, *drawn.signals)
    names = max((len(panel.name) for panel in panels), default=0)
    room = max(width - min(names, 24) - 16, 8)
    made = table('', 'over the steps', 'now', left=('', 'over the steps'))
    for panel in panels:
        line = panel.lines[0]
        known = [value for value in line.values if math.isfinite(value)]
        made.add_row(
            panel.name, sparkline(line.values, room, log=panel.log), number(known[-1]) if known else ''
        )
    head = Text.assemble((visible(contents.title), 'bold'), f'  {count(len(contents.records), "step")}')
    head.append(f'  {rate}' if rate else '', style='dim')
    return Group(head, Text(page.verdict(contents), style='bold'), made)


def sparkline(values: Sequence[float], width: int, *, log: bool = False) -> str:
    """A line of blocks, the highest value of each stretch. `×` where none is finite.

    >>> sparkline([0, 1, 2, 3, 2, 1, 0, 9], 8)
    '▁▂▃▄▃▂▁█'
    """
    numbers = np.asarray(values, np.float64)
    if log:
        with np.errstate(all='ignore'):
            numbers = np.log(numbers)
    parts = np.array_split(numbers, min(width, max(numbers.size, 1)))
    highest = [max((value for value in part if math.isfinite(value)), default=math.nan) for part in parts]
    known = [value for value in highest if math.isfinite(value)]
    low, high = (min(known), max(known)) if known else (0.0, 0.0)
    step = (high - low) / (len(BLOCKS) - 1) or 1.0
    return ''.join(BLOCKS[round((value - low) / step)] if math.isfinite(value) else '×' for value in highest)
