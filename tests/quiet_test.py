"""A disk that fills inside a checkpoint's write: one line, a process that ends, and a run that goes on."""

import asyncio
import concurrent.futures
import gc
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import tensorstore

from jaxrnn.record import quiet

ROOT = Path(__file__).parent.parent


@pytest.fixture
def printed(tmp_path, monkeypatch, caplog):
    """Quiet about a folder; what comes through all the same."""
    seen = []
    hook = seen.append
    monkeypatch.setattr(sys, 'unraisablehook', hook)
    silence = quiet.Quiet(tmp_path)
    silence.begin()
    yield lambda: [*seen, *caplog.records]
    silence.end()
    assert sys.unraisablehook is hook


def call_back_late():
    """Has tensorstore tell a loop of events that is closed by then, as after one of several writes has failed."""
    promise, future = tensorstore.Promise.new()

    async def wait():
        await future

    async def begin():
        waiting = asyncio.ensure_future(wait())
        await asyncio.sleep(0.01)
        return waiting

    loop = asyncio.new_event_loop()
    waiting = loop.run_until_complete(begin())
    waiting._log_destroy_pending = False
    loop.close()
    thread = threading.Thread(target=promise.set_result, args=[1])
    thread.start()
    thread.join()


def forget(error: Exception):
    """A failure that nobody asks for."""
    loop = asyncio.new_event_loop()
    loop.create_future().set_exception(error)
    loop.close()
    gc.collect()


class Bad:
    def __del__(self):
        raise RuntimeError('Event loop is closed')


def test_what_is_raised_anyway_is_not_printed(printed, tmp_path):
    call_back_late()
    forget(ValueError(f'Error writing "b/0" in "{tmp_path}/20": no room'))
    assert printed() == []


def test_what_else_goes_wrong_is_printed(printed):
    forget(ValueError('of another kind'))
    quiet.ASYNCIO.error('without an error')
    Bad()
    assert len(printed()) == 3


def test_a_hook_that_came_later_stays(tmp_path, monkeypatch):
    silence = quiet.Quiet(tmp_path)
    silence.begin()
    later = lambda found: None  # noqa: E731
    monkeypatch.setattr(sys, 'unraisablehook', later)
    silence.end()
    assert sys.unraisablehook is later


def test_what_is_done_aside_gives_and_raises_as_ever():
    aside = quiet.Aside()
    assert aside(lambda: 3) == 3
    with pytest.raises(ZeroDivisionError):
        aside(lambda: 1 / 0)
    with pytest.raises(TimeoutError, match='more than'):
        aside(lambda: time.sleep(0.2), 0.01)


class Raising(threading.Thread):
    def join(self, timeout=None):
        raise OSError('as threads of orbax do')


def test_threads_that_are_begun_there_are_waited_for():
    """Else Python, when it ends, stops them inside of C++, which aborts the process."""
    aside, ended, never = quiet.Aside(), [], threading.Event()

    def begin():
        threading.Thread(target=lambda: (time.sleep(0.1), ended.append(1))).start()

    pool = concurrent.futures.ThreadPoolExecutor(1)
    aside(lambda: (begin(), pool.submit(list)))
    assert not ended
    began = time.monotonic()
    aside.settle(10)
    assert ended and time.monotonic() < began + 9
    pool.shutdown()
    aside(lambda: Raising(target=never.wait).start())
    aside.settle(0.01)
    never.set()


THREADS_THAT_WAIT = """
import sys, threading
sys.path.insert(0, 'tests')
import loop_test
from orbax.checkpoint import checkpoint_managers
manager = loop_test.checkpoint.ocp.CheckpointManager
save = manager.save
def failing(self, step, **others):
    if step == 20:
        # As where a folder can't be made, and others wait for it.
        threading.Thread(target=threading.Event().wait).start()
        manager.close = lambda self: threading.Event().wait()
        raise OSError(28, 'No space left on device')
    return save(self, step, **others)
manager.save = failing
loop_test.checkpoint.PATIENCE = 1.0
try:
    loop_test.TestAnyName.run(sys.argv[1], 25)
except loop_test.UserError as error:
    print('refused:', error)
"""


def test_threads_that_wait_for_ever_keep_no_process_alive(tmp_path):
    code = [sys.executable, '-c', THREADS_THAT_WAIT, tmp_path]
    done = subprocess.run(code, capture_output=True, text=True, cwd=ROOT, timeout=300)
    assert done.stdout.startswith('refused: ') and 'No space left on device' in done.stdout, done.stdout
    assert done.stdout.count('\n') == 1 and (done.stderr, done.returncode) == ('', 0)


OWN_MOUNT = ['unshare', '--user', '--map-root-user', '--mount', 'mount', '-t', 'tmpfs', 'tmpfs', '/mnt']


def test_whenever_the_disk_fills_it_is_one_line_and_the_run_goes_on(tmp_path):
    """Two of each kind; benchmarks/full_disk.py has 200."""
    try:
        subprocess.run(OWN_MOUNT, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f'nothing can be mounted here: {error}')
    code = [sys.executable, 'benchmarks/full_disk.py', '--kinds=blocks,files', '--rooms=7,33', '--say']
    done = subprocess.run(code, capture_output=True, text=True, cwd=ROOT, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    assert {'blocks: full: 2', 'files: full: 2'} <= {*done.stdout.splitlines()}, done.stdout
