"""Trains a network until it breaks by itself, and says at which step, why, and what averts it.

    jaxrnn demo

Trains word vectors on the Wikipedia articles that come with gensim, then the question's stacked network on its 256
most frequent words, until its accuracy collapses: nothing is planted. Then diagnoses the run.
"""

import subprocess
import sys
import time

from absl import flags

from jaxrnn.cli import common, invocation

# The question's network as Keras 1 made it, at a learning rate at which every seed tried so far collapsed: seeds 0 to 5
# between steps 1,374 and 4,202, and with another order of summation seed 0 at 1,302 (benchmarks/natural_collapse.py;
# AMD EPYC, two threads, jax 0.10.2).
SETTING = (
    '--network=stacked --hidden=128 --preset=keras1 --learning_rate=6e-3 --num_words=256 --pad_to=20'
    ' --validation_share=0 --test_share=0 --max_steps=8000 --on_divergence=stop --signals'
)


def define_flags() -> None:
    common.define('run', 'run_dir', 'runs/demo', 'Where the run lives.')
    common.define('run', 'seed', 0, 'Other seeds collapse elsewhere.', at_least=0, at_most=common.MOST)


def main(arguments: list[str]) -> int:
    del arguments
    directory = f'--run_dir={common.run_dir()}'
    start = time.monotonic()
    trained = _call('train', *SETTING.split(), f'--seed={flags.FLAGS.seed}', directory)
    if trained not in (common.HEALTHY, common.DIVERGED):
        return trained
    found = _call('diagnose', directory)
    common.say('', f'{time.monotonic() - start:.0f} s in all', file=sys.stdout)
    return common.HEALTHY if found == common.DIVERGED else found


def _call(name: str, *arguments: str) -> int:
    command = invocation.of(name)
    common.say('', f'$ {invocation.line(name, *arguments)}', file=sys.stdout)
    return subprocess.call([*command.argv, *arguments])
