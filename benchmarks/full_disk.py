"""What becomes of a run whose disk fills inside a checkpoint's write?

    python benchmarks/full_disk.py

A run goes on from its checkpoint, on a disk of its own. The disk has room for so many more blocks of 4 kB, or for so
many more files and folders; or somebody else fills it, so many milliseconds after a write has begun; or no file may
have more than so many bytes. Each must be one line on standard error and exit code 2, in a process that ends. With room
again the same command must end in the bits of a run that never stopped. Prints a line for each fill, and the counts.

The check for room before a write is off, or few fills would be inside of one; only of the kind `checked` it is on.
It needs `unshare`, and a system that lets everybody mount a tmpfs in a namespace of their own, as most do.
"""

import collections
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

sys.path[0] = str(Path(__file__).parent.parent)

import jax.numpy as jnp
import numpy as np
from absl import flags

import jaxrnn
from jaxrnn.cli import common
from jaxrnn.record import checkpoint

BLOCK = 4096
"""Bytes; tmpfs counts by them."""

TIMEOUT = 120.0
"""Seconds after which a process counts as one that never ends. An ordinary one takes two."""

CHECKED = 'checked'
KINDS = {
    CHECKED: range(0, 60, 6),
    'blocks': range(56),
    'files': range(52),
    'meanwhile': range(0, 60, 3),
    'size': range(300, 3600, 60),
}
"""What runs out -> how much of it there is; a checkpoint of this state takes 22 blocks, and 22 files and folders."""


class Ended(NamedTuple):
    """How a process ended."""

    code: int | None  # None where it had to be killed
    lines: list[str]  # on standard error
    seconds: float


def train(directory: Path, check: bool) -> int:
    """The command: 30 steps of a state of 12 kB, with a checkpoint at every tenth."""
    if not check:
        checkpoint.Writer._check_room = lambda writer, state: None  # type: ignore[method-assign]

    def step(state, batch):
        return {'w': state['w'] + batch, 'b': 0.5 * state['b']}, {'loss': state['w'].sum()}

    def init():
        return {'w': jnp.asarray(np.random.default_rng(0).normal(size=3000)), 'b': jnp.ones(9)}

    jaxrnn.record(step, lambda k: np.float32(1 / (k + 1)), init, directory, max_steps=30, checkpoint_every=10)
    return common.HEALTHY


class Server:
    """Starts the command in processes that are copies of one that has imported JAX and not begun to use it."""

    def __init__(self, folder: Path):
        self._said = folder / 'said'
        argv = [sys.executable, __file__, 'serve']
        self._process = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def __call__(self, run: Path, limit: int = 0, check: bool = True) -> Ended:
        """Runs the command to its end; under a limit of the size of a file, if it isn't 0."""
        assert self._process.stdin is not None and self._process.stdout is not None
        began = time.monotonic()
        self._process.stdin.write(f'{run} {limit} {int(check)} {self._said}\n')
        self._process.stdin.flush()
        code = int(self._process.stdout.readline())
        lines = self._said.read_text(encoding='utf-8').splitlines()
        return Ended(None if code == -9 else code, lines, time.monotonic() - began)

    def close(self) -> None:
        self._process.communicate()


def serve() -> tuple[Path, bool]:
    """The server; comes back in the copies only, with what they are to do."""
    while line := sys.stdin.readline():
        run, limit, check, said = line.split()
        if pid := os.fork():
            print(_code(pid), flush=True)
            continue
        error = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(error, 2)
        if int(limit):
            resource.setrlimit(resource.RLIMIT_FSIZE, (int(limit), int(limit)))
        return Path(run), bool(int(check))
    sys.exit()


def _code(pid: int) -> int:
    """Waits for a process, and kills one that never ends."""
    killer = threading.Timer(TIMEOUT, os.kill, (pid, 9))
    killer.start()
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    killer.cancel()
    return code


class Disk:
    """A file system in memory, whose size can be changed."""

    def __init__(self, root: Path):
        self.root = root
        root.mkdir()
        subprocess.run(['mount', '-t', 'tmpfs', 'tmpfs', root], check=True)

    def leave(self, kind: str, room: int) -> None:
        """So much room, and no more."""
        found = os.statvfs(self.root)
        if kind == 'blocks':
            self._remount(f'size={(found.f_blocks - found.f_bfree + room) * BLOCK}')
        elif kind in ('files', CHECKED):
            self._remount(f'nr_inodes={found.f_files - found.f_ffree + room}')

    def make_room(self) -> None:
        (self.root / 'filler').unlink(missing_ok=True)
        self._remount('size=64m,nr_inodes=9999')

    def fill(self) -> None:
        with open(self.root / 'filler', 'wb', buffering=0) as file:
            try:
                while file.write(bytes(BLOCK)):
                    pass
            except OSError:
                pass

    def _remount(self, options: str) -> None:
        subprocess.run(['mount', '-o', f'remount,{options}', self.root], check=True)


def fill_meanwhile(disk: Disk, run: Path, milliseconds: int, over: threading.Event) -> None:
    """Fills the disk a while after a write has begun."""
    while not over.is_set() and not list((run / 'checkpoints').glob('20.*')):
        time.sleep(0.0005)
    over.wait(milliseconds / 1000)
    disk.fill()


def filled(server: Server, disk: Disk, before: Path, kind: str, room: int) -> tuple[Ended, Ended, Path]:
    """Goes on with a run while its disk fills, and again with room."""
    run = disk.root / 'run'
    disk.make_room()
    shutil.rmtree(run, ignore_errors=True)
    shutil.copytree(before, run)
    disk.leave(kind, room)
    over = threading.Event()
    if kind == 'meanwhile':
        threading.Thread(target=fill_meanwhile, args=(disk, run, room, over)).start()
    full = server(run, room if kind == 'size' else 0, check=kind == CHECKED)
    over.set()
    time.sleep(0.01)
    disk.make_room()
    return full, server(run), run


def wrong(full: Ended, again: Ended, same: bool) -> Iterator[str]:
    """What is not as it must be."""
    if full.code is None or again.code is None:
        yield 'never ended'
    elif full.code not in (0, common.MISUSE):
        yield f'exit code {full.code}'
    if len(full.lines) != (full.code != 0):
        yield f'{len(full.lines)} lines'
    if again.code != 0 or again.lines:
        yield f'did not resume: {again.code} {again.lines[:1]}'
    elif not same:
        yield 'other bits'


def contents(run: Path) -> tuple[bytes, list[str], str]:
    """What must come out the same: records, checkpoints, the last state."""
    saved = run / 'checkpoints'
    meta = (saved / '30' / 'meta' / 'metadata').read_text(encoding='utf-8') if saved.exists() else ''
    return (
        (run / 'records.jsonl').read_bytes(),
        sorted(path.name for path in saved.iterdir()),
        meta.partition('"state": ')[2][:20],
    )


def show(kind: str, room: int, full: Ended, faults: list[str]) -> None:
    """The line of a fill."""
    code = 'killed' if full.code is None else f'exit code {full.code}'
    found = f'{code}, {len(full.lines)} lines, {full.seconds:.1f} s'
    print(f'{kind:9} {room:5}  {found}  {"; ".join(faults) or "ok"}', flush=True)
    if flags.FLAGS.say:
        print(*(f'    {line}' for line in full.lines), sep='\n')


def enter_own_mounts() -> None:
    """Starts this program again, in a namespace of its own: there it may mount, and nothing is left when it ends."""
    ours = {'JAXRNN_OWN_MOUNTS': '1', 'JAX_PLATFORMS': 'cpu', 'JAX_ENABLE_COMPILATION_CACHE': 'false'}
    if 'JAXRNN_OWN_MOUNTS' not in os.environ:
        argv = ['unshare', '--user', '--map-root-user', '--mount', sys.executable, *sys.argv]
        os.execvpe('unshare', argv, {**os.environ, **ours})


def begun(straight: Path, before: Path) -> None:
    """Of a whole run its first ten steps."""
    shutil.copytree(straight, before)
    for step in ('20', '30'):
        shutil.rmtree(before / 'checkpoints' / step)
    lines = (before / 'records.jsonl').read_bytes().splitlines(keepends=True)
    (before / 'records.jsonl').write_bytes(b''.join(lines[:10]))


def main(arguments: list[str]) -> int:
    del arguments
    enter_own_mounts()
    counts: collections.Counter[str] = collections.Counter()
    with tempfile.TemporaryDirectory() as folder:
        server, straight, before = Server(Path(folder)), Path(folder) / 'straight', Path(folder) / 'before'
        server(straight)
        begun(straight, before)
        disk = Disk(Path(folder) / 'disk')
        for kind in flags.FLAGS.kinds.split(','):
            for room in map(int, flags.FLAGS.rooms.split(',')) if flags.FLAGS.rooms else KINDS[kind]:
                full, again, run = filled(server, disk, before, kind, room)
                faults = [*wrong(full, again, again.code == 0 and contents(run) == contents(straight))]
                show(kind, room, full, faults)
                counts[f'{kind}: {"room enough" if full.code == 0 else "full"}'] += 1
                counts.update(f'{kind}: WRONG: {fault}' for fault in faults)
        server.close()
        subprocess.run(['umount', disk.root])
    print(*(f'{name}: {count}' for name, count in sorted(counts.items())), sep='\n')
    return common.FAILED if any('WRONG' in name for name in counts) else common.HEALTHY


common.define('disk', 'kinds', ','.join(KINDS), 'What runs out.')
common.define('disk', 'rooms', '', 'How much there is of it, as 0,7,24; else all of the table.')
common.define('disk', 'say', False, 'Print what the processes say.')

if __name__ == '__main__':
    if sys.argv[1:] == ['serve']:
        todo = serve()
        sys.argv[1:] = []
        common.main(lambda words: train(*todo), __doc__)
    common.main(main, __doc__)
