"""Shows a run while it trains: its page in a browser of this machine, or a few lines in a terminal.

    jaxrnn watch --run_dir=runs/first
    jaxrnn watch --run_dir=runs/first --text

Prints the address of the page, which follows the run. Over ssh: forward the port (ssh -L 8000:localhost:8000), or
use --text. Ctrl-C ends it, and not the run.
"""

import contextlib
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import flags

from jaxrnn.cli import common, own_runs


def define_flags() -> None:
    common.define_run('The directory of the run.')
    common.define('watch', 'port', 0, 'Of the page; 0 for any that is free.', at_least=0, at_most=65535)
    common.define('watch', 'text', False, 'Lines in this terminal, and no page.')
    common.define(
        'watch', 'every', 3.0, 'Seconds between two looks, of --text.', at_least=0.1, at_most=3600.0
    )


def main(arguments: list[str]) -> int:
    from jaxrnn.report import page, watching
    from jaxrnn.types import UserError

    if arguments:
        raise UserError(f'{arguments[0]!r} found, flags only expected; see --help')
    directory = Path(common.run_dir())
    alarms = own_runs.alarms_of(str(directory))
    page.read(directory)  # or it is said at once
    # Also where somebody started it in the background: there SIGINT is ignored.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with contextlib.suppress(KeyboardInterrupt):
        if flags.FLAGS.text:
            _lines(directory, alarms, flags.FLAGS.every)
        else:
            served = watching.server(watching.Watched(directory, alarms), flags.FLAGS.port)
            with served:
                common.say(f'http://localhost:{served.server_port}/', file=sys.stdout)
                served.serve_forever()
    return common.HEALTHY


def _lines(directory: Path, alarms: Sequence[Any], every: float) -> None:
    """Until Ctrl-C; where the output is no terminal, once."""
    from rich.live import Live

    from jaxrnn.report import page, watching

    console = common.console()

    def drawn(rate: str) -> Any:
        return watching.in_lines(page.read(directory), alarms, width=console.width, rate=rate)

    if not console.is_terminal:
        console.print(drawn(''))
        return
    seen: tuple[int, float] | None = None
    with Live(drawn(''), console=console, auto_refresh=False) as live:
        while True:
            time.sleep(every)
            contents, now = page.read(directory), time.monotonic()
            steps = len(contents.records)
            seen = seen or (steps, now)
            rate = (steps - seen[0]) / (now - seen[1]) if now > seen[1] else 0
            live.update(
                watching.in_lines(contents, alarms, width=console.width, rate=f'{rate:.1f} steps/s'),
                refresh=True,
            )
