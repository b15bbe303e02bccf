"""Settings of every test: ranks are never promoted in silence, warnings are errors (setup.cfg)."""

import atexit
import gc
import os
import sys
import tempfile

import pytest

os.environ['JAX_NUMPY_RANK_PROMOTION'] = 'raise'
os.environ['JAX_PLATFORMS'] = 'cpu'
os.environ['KERAS_BACKEND'] = 'jax'

# Tests, and the scripts that they start, compile the same small networks again and again. Each process of tests
# has a cache of its own, new each time; a test that kills or starves a process keeps that process off it.
_cache = tempfile.TemporaryDirectory(prefix='jaxrnn-tests-')
atexit.register(_cache.cleanup)
os.environ['JAX_COMPILATION_CACHE_DIR'] = _cache.name
os.environ['JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS'] = '0.1'
os.environ['JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES'] = '0'


def pytest_addoption(parser):
    parser.addoption(
        '--full', action='store_true', help='whole batteries, of which else a part is run; takes an hour'
    )


def pytest_collection_modifyitems(config, items):
    """Leaves out what is marked as of a battery, unless it is to be run whole."""
    if not config.getoption('full'):
        left_out = [item for item in items if item.get_closest_marker('battery')]
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in set(left_out)]


LOOK_EVERY, MOST_MAPPINGS = 20, 30_000
"""Tests from one look to the next; and mappings of memory, of which a compiled program has some. Linux allows a process
65,530 of them, and beyond that XLA crashes."""

_ended = 0


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown():
    """Compiled programs are let go of before a process of tests has too many."""
    global _ended
    _ended += 1
    if _ended % LOOK_EVERY == 0 and 'jax' in sys.modules and _mappings() > MOST_MAPPINGS:
        sys.modules['jax'].clear_caches()
        gc.collect()


def _mappings() -> int:
    try:
        with open('/proc/self/maps', 'rb') as file:
            return file.read().count(b'\n')
    except OSError:  # not on Linux
        return 0


@pytest.fixture(scope='session')
def full(pytestconfig) -> bool:
    """Whether batteries are run whole."""
    return pytestconfig.getoption('full')
