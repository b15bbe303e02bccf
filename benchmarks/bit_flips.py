"""Is a bit that flips in a run's file noticed?

    python benchmarks/bit_flips.py
    python benchmarks/bit_flips.py --most=200

Every bit of every file of a tiny checkpoint and a tiny run, one at a time. Noticed is what is refused, or gone around,
by name. The same is what changes nothing of what is read. The rest is changed, or fails; each such bit is named.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path[0] = str(ROOT)
sys.path.insert(1, str(ROOT / 'tests'))

import json
import logging
import time

import acts
import flips
from absl import flags

from jaxrnn import environment
from jaxrnn.cli import common


def targets(folder: Path) -> dict[str, flips.Target]:
    """Every file, by what it belongs to."""
    flips.any_run(folder / 'any')
    flips.words_run(folder / 'words')
    found = {'records.jsonl': flips.records_target(folder / 'any'), **flips.words_targets(folder / 'words')}
    for recorded, against in ((True, 'with records'), (False, 'without')):
        for name, target in flips.checkpoint_targets(folder / 'any', recorded=recorded).items():
            found[f'checkpoint {against}: {name}'] = target
    return found


def say(name: str, counts: flips.Counts, seconds: float) -> None:
    share = counts.noticed / counts.flips
    print(
        f'{name}: {counts.flips:,} flips, {counts.noticed:,} noticed ({share:.1%}), {counts.same:,} the same, '
        f'{len(counts.changed):,} changed, {len(counts.failed):,} failed ({seconds:.0f} s)',
        flush=True,
    )
    if counts.changed:
        print(f'  changed: {", ".join(map(str, counts.changed[:20]))}')
    for each in counts.failed[:5]:
        print(f'  failed: {each[:300]}')


def main(arguments: list[str]) -> int:
    del arguments
    values = flags.FLAGS
    logging.disable()  # what is said of each damage
    found = {}
    with acts.quiet(), acts.folder() as folder:
        for name, target in targets(folder).items():
            start = time.perf_counter()
            found[name] = flips.flips(target, flips.bits_of(target, values.most or None))
            say(name, found[name], time.perf_counter() - start)
    if values.json:
        rows = {name: counts._asdict() for name, counts in found.items()}
        print(json.dumps({'machine': environment.describe(), 'files': rows}))
    unnoticed = [name for name, counts in found.items() if counts.changed or counts.failed]
    return common.FAILED if unnoticed else common.HEALTHY


common.define('run', 'most', 0, 'Bits of each file; 0: all.')
common.define('run', 'json', False, 'Also one object on the last line.')

if __name__ == '__main__':
    common.main(main, __doc__)
