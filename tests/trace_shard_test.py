"""What a trace says of steps that run on several devices."""

import fcntl
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import sharded

ROOT = Path(__file__).parent.parent
# What compiles sooner; nothing here runs for long.
FLAGS = f'--xla_force_host_platform_device_count={sharded.DEVICES} --xla_backend_optimization_level=0'


@pytest.fixture(scope='session')
def told(tmp_path_factory) -> dict:
    """Of every case, by one process that has the devices; processes of tests share what it says."""
    alone = 'PYTEST_XDIST_WORKER' not in os.environ
    folder = tmp_path_factory.getbasetemp() if alone else tmp_path_factory.getbasetemp().parent
    with open(folder / 'shards.lock', 'w') as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        found = folder / 'shards.json'
        if not found.exists():
            environ = {**os.environ, 'XLA_FLAGS': FLAGS, 'PYTHONPATH': str(ROOT)}
            command = [sys.executable, '-W', 'error', f'{ROOT}/tests/sharded.py']
            done = subprocess.run(command, capture_output=True, text=True, env=environ)
            assert done.returncode == 0, done.stderr
            found.write_text(done.stdout.splitlines()[-1])
        return json.loads(found.read_text())


@pytest.mark.parametrize('name', sharded.CASES)
def test_case(name, told):
    case, finding = sharded.CASES[name], told[name]
    assert 'error' not in finding, finding
    if not case.op:
        assert finding == {}
        return
    line = sharded.line_of(case)
    source = f'{ROOT}/tests/sharded.py:{line}' if line else 'batch/x'
    expected = {'op': case.op, 'source': source, 'pass_': case.pass_, 'time_step': case.time_step}
    expected |= {'examples': list(case.examples), 'devices': list(case.devices)}
    expected |= {'kind': case.kind} if case.kind else {}
    expected |= {'layer': case.layer} if case.layer else {}
    assert {key: finding.get(key) for key in expected} == expected
