"""The train step, compiled for a GPU and a TPU that aren't here: launches, memory, collectives."""

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MISSING = "the compilers come with pip install -e '.[compile]'"

LAUNCHES = 120
"""Of an LSTM's step on an H100: 117 with jax 0.10.2, four a time step and what lies around the loops."""

TEMP_BYTES = 22e6
"""Of the same step: about 17 MB, where differentiating a plain scan takes 46 MB."""


@functools.cache
def rows(targets: str, networks: str) -> list[dict]:
    """What the benchmark measures of jaxrnn."""
    command = [sys.executable, f'{ROOT}/benchmarks/accelerator_compile.py']
    environ = {name: value for name, value in os.environ.items() if not name.startswith('JAX_')}
    done = subprocess.run(
        [*command, '--implementations=jaxrnn', '--json', f'--targets={targets}', f'--networks={networks}'],
        capture_output=True,
        text=True,
        timeout=300,
        env=environ,
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_an_h100_launches_little_and_holds_little():
    pytest.importorskip('jax_cuda12_plugin', reason=MISSING)
    (row,) = rows('h100', 'lstm')
    assert row['launches'] <= LAUNCHES
    assert row['temp_bytes'] <= TEMP_BYTES


@pytest.mark.parametrize('network', ['lstm', 'gru', 'stacked'])
def test_tpus_talk_outside_of_the_loops(network):
    pytest.importorskip('libtpu', reason=MISSING)
    one, four = rows('v5e,v5e-2x2', network)
    assert one['collectives'] == {'in_loops': 0}
    assert four['collectives'].keys() == {'all-reduce', 'in_loops'}
    assert four['collectives']['in_loops'] == 0
    # At most one a parameter, the loss and its examples: none a time step, and nothing but gradients is exchanged.
    assert four['collectives']['all-reduce'] <= four['parameters'] + 2
