"""Settings of every test: ranks are never promoted in silence, warnings are errors (setup.cfg)."""

import atexit
import os
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


@pytest.fixture(scope='session')
def full(pytestconfig) -> bool:
    """Whether batteries are run whole."""
    return pytestconfig.getoption('full')
