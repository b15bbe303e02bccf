"""Replay on one thread and on two: another process restores a checkpoint and gets the same 500 steps again."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import small

# Wide enough that XLA:CPU splits its products among threads.
TRAIN, HIDDEN, REPLAYED = 700, 96, 500
QUICK = {('lstm', 1), ('gru', 2)}
"""What is run without --full."""

CODE = """
import json, sys
sys.path.insert(0, 'tests')
from jaxrnn.record.record_file import RecordFile
from jaxrnn import environment
what, network, threads, hidden, steps, directory = sys.argv[1:]
steps = int(steps)
environment.use_threads(int(threads))
import jax, small
from jaxrnn.bisect import replay
from jaxrnn.record import checkpoint, loop, telemetry
program = small.program(network, hidden=int(hidden), batch_size=32)
if what == 'train':
    options = loop.LoopOptions(max_steps=steps, checkpoint_every=100)
    loop.run(program.step, program.batch_at, program.init, directory, options)
else:
    rows = RecordFile(directory + '/records.jsonl').read()
    checkpoints = checkpoint.Checkpoints(directory + '/checkpoints', like=jax.eval_shape(program.init))
    for start in (0, 100, 200):
        replayer = replay.Replayer(replay.subject(program.step, program.batch_at, checkpoints, rows))
        replayer.replay(start, start + steps)
        outcome = replayer.outcome()
        print(json.dumps([environment.threads(), outcome.bit_identical, outcome.steps_replayed]))
"""


def call(*arguments) -> list:
    command = [sys.executable, '-c', CODE, *map(str, arguments)]
    root = Path(__file__).parent.parent
    done = subprocess.run(command, capture_output=True, text=True, cwd=root, check=True)
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.parametrize('network', small.NETWORKS)
@pytest.mark.parametrize('threads', [1, 2])
def test_500_steps_from_any_checkpoint(network, threads, tmp_path, full):
    if not full and (network, threads) not in QUICK:
        pytest.skip('with --full')
    if threads > len(os.sched_getaffinity(0)):
        pytest.skip(f'{threads} processors are needed')
    call('train', network, threads, HIDDEN, TRAIN, tmp_path)
    again = call('replay', network, threads, HIDDEN, REPLAYED, tmp_path)
    assert again == [[threads, True, REPLAYED]] * 3
