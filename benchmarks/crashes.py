"""Is a run lost, wherever it is cut short?

    python benchmarks/crashes.py
    python benchmarks/crashes.py --only=rewind --garbled=50
    python benchmarks/crashes.py --kills

Each act of tests/acts.py and tests/words_acts.py is recorded once, call by call. What a disk may hold at each call,
after a kill or a power loss, is made of that, and the run goes on from it: from the newest whole checkpoint, to the
same records and bits. With --kills a process is really killed before the n-th call, n = 1, 2, … until none is left.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path[0] = str(ROOT)
sys.path.insert(1, str(ROOT / 'tests'))

import collections
import json
import logging
import time
from collections.abc import Iterator

import acts
import crashes
import shim
from absl import flags

from jaxrnn import environment
from jaxrnn.cli import common
from jaxrnn.types import UserError


def say(outcomes: Iterator[crashes.Outcome]) -> dict[str, int]:
    """Prints what is wrong, and counts."""
    counts: dict[str, int] = collections.Counter()
    for found in outcomes:
        counts.update({found.loss: 1, 'states': 1, 'of their own': not found.known})
        counts.update({'refused': bool(found.refused), 'wrong': bool(found.wrong)})
        if found.refused or found.wrong:
            print(
                f'  {found.loss} after {found.at} calls: {found.refused or "; ".join(found.wrong)}',
                flush=True,
            )
    return dict(counts)


def one(name: str, kills: bool, garbled: int, every: int) -> dict[str, int]:
    """Counts of one act."""
    start = time.perf_counter()
    with acts.folder() as folder:
        if kills:
            counts = say(crashes.kills(name, folder, every=every))
        else:
            recorded = crashes.record(name, folder)
            counts = {
                'calls': len(recorded.calls),
                **say(crashes.outcomes(recorded, folder, garbled=garbled)),
            }
    shown = ', '.join(f'{count:,} {what}' for what, count in counts.items())
    print(f'{name}: {shown} ({time.perf_counter() - start:.0f} s)', flush=True)
    return counts


def main(arguments: list[str]) -> int:
    del arguments
    values = flags.FLAGS
    if shim.MISSING:
        raise UserError(shim.MISSING)
    logging.disable()  # what is said of each damage
    names = [values.only] if values.only else list(crashes.ACTS)
    found = {name: one(name, values.kills, values.garbled, values.every) for name in names}
    if values.json:
        print(json.dumps({'machine': environment.describe(), 'acts': found}))
    return common.FAILED if any(counts['wrong'] for counts in found.values()) else common.HEALTHY


common.define('run', 'only', '', 'One act.')
common.define('run', 'kills', False, 'Kill processes.')
common.define('run', 'every', 1, 'With --kills: calls from one kill to the next.')
common.define('run', 'garbled', 3, 'Disks garbled at each call.')
common.define('run', 'json', False, 'Also one object on the last line.')

if __name__ == '__main__':
    common.main(main, __doc__)
