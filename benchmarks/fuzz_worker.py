"""One reader, fuzzed in a process of its own, which `benchmarks/fuzz.py` starts: it may hang or be killed.

    python benchmarks/fuzz_worker.py READER FOLDER [libFuzzer's options] CORPUS

Findings are written to FOLDER, one of each kind, and are no reason to end.
"""

import logging
import os
import random
import shlex
import sys
from pathlib import Path

import atheris

ROOT = Path(__file__).parent.parent
sys.path[0] = str(ROOT)
sys.path.insert(1, str(ROOT / 'tests'))

with atheris.instrument_imports(
    include=['jaxrnn', 'gensim.corpora', 'numpy.lib', 'absl.flags', 'json', 'zipfile', 'gzip', 'orbax'],
    enable_loader_override=False,
):
    import fuzzing

MUTATIONS = 4


def mutated(reader: str, content: bytes, most: int, seed: int) -> bytes:
    """libFuzzer's own mutation, mostly; else words of such files, or a part many times: what takes the square of its
    length is seen by that."""
    rng = random.Random(seed)
    for _ in range(rng.randint(1, MUTATIONS)):
        start = rng.randint(0, len(content))
        stop = min(start + rng.randint(0, 40), len(content))
        match rng.randrange(10):
            case 0 | 1 | 2 if fuzzing.READERS[reader].words:
                word = rng.choice(fuzzing.READERS[reader].words).encode()
                content = content[:start] + word + content[stop if rng.random() < 0.5 else start :]
            case 3:
                times = 2 ** rng.randint(1, 14)
                content = content[:start] + content[start:stop] * times + content[stop:]
            case 4:
                content = content[:start] + content[stop:]
            case _:
                content = atheris.Mutate(content, most)
    content = content[:most]
    return fuzzing.with_right_checksums(content) if reader == 'data' and rng.random() < 0.8 else content


def again(reader: str, home: str) -> Path:
    """What starts this program once more with other options, as libFuzzer does to merge. It must be executable: else
    nothing is ever merged, and nothing kept."""
    path = Path(home) / 'again'
    command = shlex.join([sys.executable, os.path.abspath(__file__), reader, home])
    path.write_text(f'#!/bin/sh\nexec {command} "$@"\n')
    path.chmod(0o700)
    return path


def main() -> None:
    logging.getLogger('jaxrnn').setLevel(logging.CRITICAL)
    reader, home, *options = sys.argv[1:]
    folder, kinds = fuzzing.Folder(reader, Path(home) / f'at-{os.getpid()}'), {}

    def call(content: bytes) -> None:
        finding = folder.judge(content)
        if finding is None or len(kinds.get(finding.kind, content + b'.')) <= len(content):
            return
        if finding.kind not in kinds:
            print(f'FINDING {finding.kind}\n{finding.said}', flush=True)
            content = fuzzing.shrunk(folder, content, finding, seconds=5)
        kinds[finding.kind] = content
        (Path(home) / f'{fuzzing.named(finding.kind.encode())}.finding').write_bytes(content)

    atheris.Setup(
        [str(again(reader, home)), *options],
        call,
        custom_mutator=lambda content, most, seed: mutated(reader, bytes(content), most, seed),
    )
    atheris.Fuzz()


if __name__ == '__main__':
    main()
