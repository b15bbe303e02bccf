"""Runs the study: each task that has no result yet, as many at once as there are processors.

    python benchmarks/study/run.py --directory=runs/study --minutes=60
    python benchmarks/study/run.py --only=lstm-stock --list

A task is a program run in a directory of its own; its result is a file in results/. Tasks are in plan.py. What is cut
short, by --minutes, Ctrl-C or SIGTERM, goes on with the same command, bit for bit. Several may run beside each other.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
sys.path[0] = str(ROOT)

import contextlib
import fcntl
import fnmatch
import json
import math
import os
import re
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from typing import Any

from absl import flags

from benchmarks.study import measuring, plan, tasks
from benchmarks.study.tasks import Task
from jaxrnn import environment
from jaxrnn.cli import common

RESULTS = Path(__file__).parent / 'results'

FINISHED = (common.HEALTHY, common.DIVERGED)


class Study:
    """The tasks, of which several workers take one after the other."""

    def __init__(self, chosen: list[Task], directory: Path, results: Path):
        self.chosen, self.directory, self.folder = chosen, directory, results
        self._taken: set[str] = set()
        self._children: set[subprocess.Popen] = set()
        self._lock = threading.Lock()
        self.ending = threading.Event()

    def work(self, processor: int) -> None:
        """Does one task after the other on one processor, until there is none or time is up."""
        while not self.ending.is_set():
            with contextlib.ExitStack() as stack:
                task = self._next(stack)
                if task is None:
                    return
                self._do(task, processor)

    def end(self) -> None:
        """Has what runs save and end, after `ending` is set."""
        with self._lock:
            for child in self._children:
                child.terminate()

    def _next(self, stack: contextlib.ExitStack) -> Task | None:
        """The first that can be done and that nobody does, here or in another process."""
        while not self.ending.is_set():
            results = tasks.read(self.folder)
            waits = False
            for task in self.chosen:
                if task.name in results or task.name in self._taken or not task.applies(results):
                    continue
                if not task.ready(results):
                    waits = waits or task.after in self._taken
                    continue
                with self._lock:
                    if task.name in self._taken or not stack.enter_context(_claimed(self.directory, task)):
                        continue
                    self._taken.add(task.name)
                return task
            if not waits:
                return None
            self.ending.wait(5)
        return None

    def _do(self, task: Task, processor: int) -> None:
        results = tasks.read(self.folder)
        arguments = task.arguments(results, self.directory)
        command = [sys.executable, str(ROOT / 'scripts' / f'{task.program}.py'), *arguments]
        say(f'{task.name}: begins')
        began = time.monotonic()
        output = self.directory / 'output' / f'{task.name}.txt'
        output.parent.mkdir(parents=True, exist_ok=True)
        with output.open('w') as out:
            child = subprocess.Popen(command, stdout=out, stderr=out)
            os.sched_setaffinity(child.pid, {processor})  # before JAX starts its threads
            with self._lock:
                self._children.add(child)
            if self.ending.is_set():
                child.terminate()
            code = child.wait()
            with self._lock:
                self._children.discard(child)
        seconds = time.monotonic() - began
        if code not in FINISHED:
            said = 'cut short' if self.ending.is_set() else f'failed ({code}): {output}'
            say(f'{task.name}: {said} after {seconds:.0f} s')
            return
        found = self._result(task, output)
        found |= {'task': task.name, 'flags': task.flags, 'seconds': round(seconds)}
        found |= {'machine': environment.describe() | {'threads': '1'}}
        tasks.write(self.folder, task.name, found)
        say(f'{task.name}: {said_of(found)} in {seconds:.0f} s')

    def _result(self, task: Task, output: Path) -> dict[str, Any]:
        directory = self.directory / task.run
        if task.program == 'diagnose':
            said = output.read_text().replace(f'{self.directory}/', 'runs/study/').replace(f'{ROOT}/', '')
            screen = ''.join(line for line in said.splitlines(True) if not PROGRESS.search(line))
            return {'diagnosis': json.loads((directory / 'diagnosis.json').read_text()), 'screen': screen}
        found = measuring.measured(directory, task.full)
        if found['collapse'] is None:  # nothing is branched from it, or diagnosed
            shutil.rmtree(directory / 'checkpoints')
        return found


PROGRESS = re.compile(r': [\d,]+ of [\d,]+ steps$')
"""A line about how far a diagnosis is."""


def said_of(result: dict[str, Any]) -> str:
    if 'diagnosis' in result:
        return f'cause: {result["diagnosis"]["cause"]["why"]}'
    collapse, train = result['collapse'], result['evaluation']['train']
    said = (
        f'{collapse["kind"]} at {collapse["step"]}'
        if collapse
        else f'{result["steps"]} steps without a collapse'
    )
    return f'{said}, accuracy {train["accuracy"]:.2f}, loss {train["loss"]:.2g}, {len(result["drops"])} drops'


@contextlib.contextmanager
def _claimed(directory: Path, task: Task) -> Iterator[bool]:
    """Whether no other process does it; held until the end."""
    path = directory / 'locks' / task.name
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open('w') as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            yield False
        else:
            yield True


def say(line: str) -> None:
    print(f'{time.strftime("%H:%M:%S")} {line}', flush=True)


def main(arguments: list[str]) -> int:
    del arguments
    values = flags.FLAGS
    patterns = [f'*{word}*' for word in values.only.split(',')]
    chosen = [t for t in plan.tasks() if any(fnmatch.fnmatch(t.name, p) for p in patterns)]
    if values.list:
        done = tasks.read(RESULTS)
        for task in chosen:
            said = 'to do' if task.applies(done) else 'not needed'
            said = said_of(done[task.name]) if task.name in done else said
            print(f'{task.name:40} {said}')
        return common.HEALTHY
    study = Study(chosen, Path(values.directory).resolve(), RESULTS)
    processors = sorted(os.sched_getaffinity(0))[: values.workers or None]
    workers = [threading.Thread(target=study.work, args=[processor]) for processor in processors]
    asked: list[int] = []
    for which in (signal.SIGINT, signal.SIGTERM):
        signal.signal(which, lambda number, _: asked.append(number))
    for worker in workers:
        worker.start()
    until = time.monotonic() + 60 * values.minutes if values.minutes else math.inf
    while any(worker.is_alive() for worker in workers) and time.monotonic() < until and not asked:
        time.sleep(1)
    study.ending.set()
    study.end()
    for worker in workers:
        worker.join()
    return common.HEALTHY


if __name__ == '__main__':
    common.define('run', 'directory', 'runs/study', 'Where the runs live; some 2 GB each at full size.')
    common.define('run', 'only', '', 'Tasks whose names contain one of these, between commas; else all.')
    common.define(
        'run', 'minutes', 0.0, 'Minutes after which what runs is saved, and this ends; 0: until all is done.'
    )
    common.define(
        'run', 'workers', 0, 'Tasks at once, each on a processor of its own; 0: as many as processors.'
    )
    common.define('run', 'list', False, 'List the tasks and their results, and run none.')
    common.main(main, __doc__)
