"""What surrounds a run."""

import platform
import subprocess
import sys

import pytest

from jaxrnn import environment

CPUINFO = """processor\t: 0
vendor_id\t: AuthenticAMD
cpu family\t: {family}
model\t\t: 1
model name\t: AMD EPYC
flags\t\t: fpu sse2 smep fma {vectors} rdseed

processor\t: 1
model name\t: AMD EPYC
"""

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


def test_processors_of_one_name_are_told_apart():
    """A virtual machine may call several generations the same, whose bits differ."""
    older = environment.processor(CPUINFO.format(family=25, vectors='avx avx2'))
    newer = environment.processor(CPUINFO.format(family=26, vectors='avx512f avx avx2'))
    assert older == {'processor': 'AMD EPYC (family 25, model 1)', 'instructions': 'avx avx2 fma'}
    assert environment.differences(older, newer) == [
        'instructions: avx avx2 fma -> avx avx2 avx512f fma',
        'processor: AMD EPYC (family 25, model 1) -> AMD EPYC (family 26, model 1)',
    ]


def test_a_processor_of_another_kind_has_its_name():
    arm = environment.processor('processor\t: 0\nFeatures\t: fp asimd sve\nCPU part\t: 0xd0c\n')
    assert arm == {'processor': '0xd0c', 'instructions': 'asimd sve'}
    assert environment.processor('')['processor'] and not environment.processor('')['instructions']
