"""Which runs the study is made of, in the order in which they are worth having. A new one is a line here."""

from collections.abc import Iterator, Mapping
from typing import Any

from benchmarks.study.tasks import Task

DATA = '--preset=keras1 --num_words=640 --validation_share=0 --test_share=0.2 --pad_to=20'
"""512 words to learn and 128 that are never shown, the most frequent of the sample, with their vectors; 20 letters."""

STEPS = 8000

REAL = f'{DATA} --max_steps={STEPS} --signals --threads=1 --checkpoint_every=250 --keep_latest=1000'

SIZES = {'lstm': 1024, 'gru': 1024, 'stacked': 512}
"""Of the question's networks."""


def collapsed(result: Mapping[str, Any]) -> bool:
    """Whether a training run lost what it had learnt."""
    return result['collapse'] is not None


def trained(name: str, flags: str, *, full: bool = False) -> Task:
    return Task(name, 'train', flags, name, full=full)


def diagnosed(name: str) -> Task:
    """The diagnosis of a run, if it collapsed."""
    return Task(f'{name}-diagnosis', 'diagnose', '--threads=1', name, after=name, needed=collapsed)


def real(network: str, variant: str, seed: int, flags: str = '', *, stops: bool = False) -> Task:
    """One of the question's networks at its own size; trained to the end unless it `stops` at a collapse."""
    on = 'stop' if stops else 'continue'
    more = f'--network={network} --seed={seed} --on_divergence={on} {flags}'.strip()
    return trained(f'{network}-{variant}-{seed}', f'{REAL} {more}', full=True)


def small(network: str, width: int, variant: str, seed: int, flags: str, *, stops: bool = False) -> Task:
    """One of them narrower, where a run takes a minute."""
    on = 'stop' if stops else 'continue'
    more = f'--network={network} --hidden={width} --seed={seed} --on_divergence={on} {flags}'
    return trained(f'{network}{width}-{variant}-{seed}', f'{REAL} {more}')


def tasks() -> Iterator[Task]:
    """All of them."""
    yield from stock()
    yield from rates()


def stock() -> Iterator[Task]:
    """As they were asked about."""
    for seed in range(5):
        for network in ('lstm', 'stacked'):
            yield (run := real(network, 'stock', seed, stops=True))
            if seed == 0:
                yield diagnosed(run.name)
    yield real('gru', 'stock', 0)


def rates() -> Iterator[Task]:
    """At which rate does which network collapse?"""
    for rate in ('2e-3', '4e-3'):
        yield real('gru', f'rate{rate}', 0, f'--learning_rate={rate}', stops=True)
    for rate in ('8e-3', '4e-3', '16e-3'):
        for seed in range(2):
            for network in SIZES:
                yield small(network, 128, f'rate{rate}', seed, f'--learning_rate={rate}', stops=True)
