"""Is there a file that a reader of ours can't take?

    python benchmarks/fuzz.py
    python benchmarks/fuzz.py --reader=records,rules --minutes=2 --keep

Each reader (`tests/fuzzing.py`) is given millions of files that atheris makes up, led by the coverage of our code. What
isn't read or refused in one line is a finding: another exception, a hang, more than its share of memory, a path
outside of the folder, code. A finding is shrunk. With --keep it, and a small part of the files by which coverage grew,
go to `tests/data/fuzz`, which the test suite reads. Needs `pip install -e '.[bench]'`.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path[0] = str(ROOT)
sys.path.insert(1, str(ROOT / 'tests'))

import json
import re
import subprocess
import tempfile
import time
from typing import NamedTuple

import fuzzing
from absl import flags

from jaxrnn import environment
from jaxrnn.cli import common
from jaxrnn.types import UserError

MOST_KEPT, MOST_BYTES, LONGEST_KEPT = 30, 7000, 1500
"""Of a reader's corpus: files, bytes in all, and bytes of one; findings aside."""

HANG, MEMORY = 20, 3000
"""Seconds for one file, and megabytes of the process, at which libFuzzer ends it."""


class Result(NamedTuple):
    """What came of one reader."""

    executions: int
    seconds: float
    files: int  # by which coverage grew
    findings: dict[str, str]  # name of the file -> what it is


def fuzzed(reader: str, minutes: float, home: Path) -> tuple[Result, dict[str, bytes]]:
    """And the findings' files."""
    corpus = home / 'corpus'
    corpus.mkdir(parents=True)
    for content in (*fuzzing.READERS[reader].seeds(), *fuzzing.kept(reader)):
        (corpus / fuzzing.named(content)).write_bytes(content)
    start, executions = time.monotonic(), 0
    while (left := start + 60 * minutes - time.monotonic()) > 1:
        said = _worker(reader, home, corpus, f'-max_total_time={int(left)}')
        counts = re.findall(r'stat::number_of_executed_units: (\d+)|^#(\d+)\t', said, re.MULTILINE)
        executions += max((int(a or b) for a, b in counts), default=0)
        if 'FINDING' in said:
            print(said[said.index('FINDING') :][:3000], flush=True)
        if not counts:
            raise RuntimeError(said[-3000:])
    found, files = {}, {}
    for path in (
        *home.glob('*.finding'),
        *home.glob('crash-*'),
        *home.glob('timeout-*'),
        *home.glob('oom-*'),
    ):
        content = path.read_bytes()
        name = fuzzing.named(content)
        found[name], files[name] = f'{path.name} ({len(content)} bytes)', content
    return Result(executions, time.monotonic() - start, len(list(corpus.iterdir())), found), files


def _worker(reader: str, home: Path, *options: str) -> str:
    """What libFuzzer and the worker printed; it goes on with the same corpus after it was ended."""
    command = [
        sys.executable, str(Path(__file__).with_name('fuzz_worker.py')), reader, str(home / f'{time.monotonic_ns()}'),
        f'-max_len={fuzzing.LONGEST}', f'-timeout={HANG}', f'-rss_limit_mb={MEMORY}', f'-artifact_prefix={home}/',
        '-print_final_stats=1', '-reload=0', *map(str, options),
    ]  # fmt: skip
    Path(command[3]).mkdir()
    done = subprocess.run(command, capture_output=True, text=True, errors='replace', check=False)
    for path in Path(command[3]).glob('*.finding'):
        path.replace(home / path.name)
    return done.stderr + done.stdout


def keep(reader: str, home: Path, findings: dict[str, bytes]) -> None:
    """Puts the smallest files that together reach what the corpus reaches, and findings, where tests read them."""
    merged = home / 'merged'
    merged.mkdir()
    _worker(reader, home, '-merge=1', merged, home / 'corpus')
    chosen, size = dict(findings), 0
    for path in sorted(merged.iterdir(), key=lambda path: path.stat().st_size):
        content = path.read_bytes()
        size += len(content)
        if len(chosen) - len(findings) == MOST_KEPT or size > MOST_BYTES or len(content) > LONGEST_KEPT:
            break
        chosen[fuzzing.named(content)] = content
    folder = fuzzing.CORPUS / reader
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in chosen.items():
        (folder / name).write_bytes(content)


def main(arguments: list[str]) -> int:
    del arguments
    values, results = flags.FLAGS, {}
    asked = values.reader.split(',') if values.reader else [*fuzzing.READERS]
    if unknown := {*asked} - {*fuzzing.READERS}:
        raise UserError(f'--reader: {min(unknown)} found, some of {", ".join(fuzzing.READERS)} expected')
    for reader in asked:
        with tempfile.TemporaryDirectory(dir=values.folder or None) as name:
            found, files = fuzzed(reader, values.minutes, Path(name))
            if values.keep:
                keep(reader, Path(name), files)
        results[reader] = found._asdict()
        print(
            f'{reader}: {found.executions:,} executions in {found.seconds / 60:.1f} minutes, coverage grew by '
            f'{found.files:,} files, {len(found.findings)} findings {list(found.findings.values()) or ""}',
            flush=True,
        )
    if values.json:
        print(json.dumps({'machine': environment.describe(), 'readers': results}))
    return common.FAILED if any(result['findings'] for result in results.values()) else common.HEALTHY


common.define('run', 'reader', '', 'Of tests/fuzzing.py, several with commas; else all.')
common.define('run', 'minutes', 10.0, 'For each.', above=0)
common.define('run', 'keep', False, 'Put findings, and some of the corpus, into tests/data/fuzz.')
common.define('run', 'folder', '', 'Where files are written; one in memory saves the disk.')
common.define('run', 'json', False, 'Also one object on the last line.')

if __name__ == '__main__':
    common.main(main, __doc__)
