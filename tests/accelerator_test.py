"""The train step, compiled for a GPU and a TPU that aren't here; the check for a machine with a GPU, rehearsed."""

import functools
import gzip
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

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


def check(out: Path, *options: str, **environ: str) -> tuple[int, dict, str]:
    """Exit code, results, and what standard error says of a rehearsed check."""
    command = [sys.executable, f'{ROOT}/benchmarks/accelerator_check.py', '--rehearse', f'--out={out}']
    done = subprocess.run(
        [*command, *options],
        capture_output=True,
        text=True,
        timeout=200,
        env={**os.environ, 'JAX_PLATFORMS': 'cpu', **environ},
    )
    (path,) = out.glob('*.json')
    return done.returncode, json.loads(path.read_text())['parts'], done.stderr


def test_a_rehearsed_check_finds_all_right_and_is_not_done_twice(tmp_path):
    code, parts, said = check(tmp_path, '--only=parity,trace')
    assert code == 0, said
    assert [part['status'] for part in parts.values()] == ['right', 'right']
    assert all(row['right'] for part in parts.values() for row in part['rows'])
    code, again, said = check(tmp_path, '--only=parity,trace')
    assert (code, again, said) == (0, parts, '')


def test_a_part_that_hangs_is_killed_and_told_and_can_be_done_later(tmp_path):
    options = '--minutes=.5', '--only=trace,memory'
    code, parts, _ = check(tmp_path, *options, JAXRNN_CHECK_HANG='trace')
    assert code == 1 and parts['trace']['status'] == 'timed out'
    assert parts['trace']['seconds'] < 10
    code, parts, said = check(tmp_path, '--only=trace')
    assert code == 0 and parts['trace']['status'] == 'right', said


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(ROOT)
    return importlib.import_module('benchmarks.accelerator_check')


def test_parts_share_the_time(module):
    first, *others = module.PARTS
    assert module.allowance(first, others, 480, 8) == module.PARTS[first].most
    kept = sum(module.PARTS[name].least for name in others if not module.PARTS[name].extra)
    assert module.allowance(first, others, kept + 50, 8) == 50
    assert module.allowance(first, others, kept + 1, 8) == 0
    assert module.allowance('memory', [], 1000, 8) == module.PARTS['memory'].most
    assert module.allowance('memory', [], 60, 1) == module.PARTS['memory'].most / 8


def test_results_are_of_one_machine(module, tmp_path):
    about = {'machine': {'platform': 'gpu', 'device': 'Card (80 GB)'}, 'sources': 'a'}
    results = module.Results(tmp_path, about, False)
    results.put('parity', status='right', rows=[])
    results.put('trace', status='running', rows=[])
    results = module.Results(tmp_path, about, False)
    assert results.path.name == 'accelerator_check-gpu-Card-80-GB.json'
    assert results.has('parity') and not results.has('trace') and not results.has('memory')
    assert not module.Results(tmp_path, {**about, 'sources': 'b'}, False).has('parity')
    results.path.write_text('{')
    assert not module.Results(tmp_path, about, False).has('parity')


@pytest.mark.parametrize(
    ('rows', 'timed_out', 'status'),
    [
        ([{'right': True}, {'done': True}], False, 'right'),
        ([{'right': True}], False, 'failed'),
        ([{'right': True}, {'error': 'ended'}, {'done': True}], False, 'failed'),
        ([{'right': True}], True, 'cut'),
        ([], True, 'timed out'),
        ([{'right': False}, {'right': True}], True, 'wrong'),
        ([{'left_out': 'not installed'}, {'done': True}], False, 'right'),
    ],
)
def test_a_part_is_judged_by_its_rows(module, rows, timed_out, status):
    assert module.judge(rows, timed_out) == status


def test_kernels_are_read_off_a_profile(module, tmp_path):
    """As XLA writes it on a GPU: a process for the device, whose streams are threads beside lines of another kind."""
    names = [('process_name', 1, None, '/device:GPU:0'), ('process_name', 2, None, '/host:CPU')]
    names += [('thread_name', 1, 7, 'Stream #7(Compute,MemcpyD2D)'), ('thread_name', 1, 8, 'XLA Ops')]
    events = [
        {'ph': 'M', 'name': name, 'pid': process, 'tid': thread, 'args': {'name': called}}
        for name, process, thread, called in names
    ]
    ran = [
        (1, 7, 'fusion_3'),
        (1, 7, 'sm90_gemm'),
        (1, 7, 'MemcpyD2D'),
        (1, 8, 'fusion.3'),
        (2, 9, 'cuLaunchKernel'),
    ]
    events += [
        {'ph': 'X', 'name': name, 'pid': process, 'tid': thread, 'ts': 1, 'dur': 200}
        for process, thread, name in module.PROFILED * ran
    ]
    folder = tmp_path / 'plugins/profile/now'
    folder.mkdir(parents=True)
    with gzip.open(folder / 'host.trace.json.gz', 'wt') as file:
        json.dump({'traceEvents': events}, file)
    found = module.profiled(str(tmp_path))
    assert (found['kernels'], found['copies'], found['busy_ms']) == (2, 1, 0.6)
    assert found['calls'] == {'cuLaunchKernel': 1}


@pytest.mark.parametrize('option', ['--only=speed', '--minutes=0'])
def test_misuse_of_the_check(option):
    command = [sys.executable, f'{ROOT}/benchmarks/accelerator_check.py', option]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
