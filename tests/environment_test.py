"""What surrounds a run."""

import platform
import subprocess
import sys

import pytest

FAULTS = """
import resource, sys
import numpy as np
from jaxrnn import environment
if sys.argv[1] == 'kept':
    assert environment.keep_memory()
for turn in range(4):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    np.ones(25_000_000, np.float32)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != 'glibc', reason='only glibc keeps memory')
def test_kept_memory_is_not_cleared_again():
    """100 MB are 24,400 pages; large ones are fewer."""
    fresh, kept = (
        int(
            subprocess.run(
                [sys.executable, '-c', FAULTS, how], capture_output=True, text=True, check=True
            ).stdout
        )
        for how in ('fresh', 'kept')
    )
    assert kept <= 4 < fresh
