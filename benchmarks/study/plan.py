"""Which runs the study is made of, in the order in which they are worth having. A new one is a line here."""

from collections.abc import Callable, Iterable, Iterator, Mapping
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


def branched(
    parent: Task, variant: str, flags: str, at: Callable[[int], int], more: int, *, full: bool = False
) -> Task:
    """A run that goes on from a step of one that collapsed, under other flags.

    Args:
        parent: the run.
        variant: in place of the parent's, in its name.
        flags: other than the parent's.
        at: step of the parent's collapse -> the first step under the other flags.
        more: steps after that of the parent's collapse, through which it is trained.
        full: as in `Task`.
    """
    network, _, seed = parent.name.split('-')
    name = f'{network}-{variant}-{seed}'

    def part(result: Mapping[str, Any]) -> tuple[int, int] | None:
        collapse = result['collapse']
        return None if collapse is None else (max(at(collapse['step']), 0), collapse['step'] + more)

    flags = f'{parent.flags} {flags} --on_divergence=continue'
    return Task(name, 'train', flags, name, after=parent.name, needed=collapsed, part=part, full=full)


def tasks() -> Iterator[Task]:
    """All of them."""
    yield from stock()
    yield from curvatures()
    yield from rates()
    yield from words()
    yield from prevented()
    yield from dated()


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
    for network, rate in (('gru', '2e_3'), ('gru', '4e_3'), ('lstm', '2e_3'), ('gru', '8e_3')):
        yield real(network, f'rate{rate}', 0, f'--learning_rate={rate.replace("_", "-")}', stops=True)
    yield real(
        'gru',
        'rate2e_3_long',
        0,
        '--learning_rate=2e-3 --max_steps=20000 --checkpoint_every=1000',
        stops=True,
    )
    for rate in ('8e_3', '4e_3', '16e_3'):
        for seed in range(2):
            for network in SIZES:
                flags = f'--learning_rate={rate.replace("_", "-")}'
                yield small(network, 128, f'rate{rate}', seed, flags, stops=True)


def words() -> Iterator[Task]:
    """With fewer words, learnt sooner."""
    for network, rate in (
        ('lstm', '8e-3'),
        ('gru', '8e-3'),
        ('lstm', '16e-3'),
        ('gru', '16e-3'),
        ('gru', '32e-3'),
    ):
        flags = f'--num_words=256 --test_share=0 --learning_rate={rate}'
        yield small(network, 128, f'words256_rate{rate.replace("-", "_")}', 0, flags, stops=True)


def curvatures() -> Iterator[Task]:
    """The curvature, as Adam feels it, through the steps before a collapse: nothing else is done otherwise."""
    for network in ('stacked', 'lstm'):
        run = real(network, 'stock', 0, stops=True)
        yield branched(run, 'curvature', '--curvature_every=20', lambda step: step - 1500, 100, full=True)


DATES = {'start': 0.0, 'sixth': 1 / 6, 'half': 1 / 2, 'late': 5 / 6, 'last': 0.98}
"""Of switching something on, as shares of the steps to the collapse; of a collapse at step 6,000 they are the steps 0,
1,000, 3,000, 5,000 and 5,900."""

REMEDIES = {
    'update_clip': '--update_clip=1.0',
    'b2': '--b2=0.99',
    'half': '--learning_rate={half}',
    'eighth': '--learning_rate={eighth}',
    'decaying': f'--schedule=warmup_cosine --decay_steps={STEPS}',
    'amsgrad': '--second_moment=amsgrad',
    'epsilon': '--epsilon=1e-5',
    'norm_clip': '--clip=global_norm --clip_threshold=1.0',
    'zclip': '--clip=zclip',
    'sigmoid': '--gate=sigmoid',
    'mask': '--mask_padding',
    'cap': '--curvature_every=10 --curvature_cap=0.8',
    'combined': f'--update_clip=1.0 --learning_rate={{half}} --schedule=warmup_cosine --decay_steps={STEPS}',
}
"""What is switched on, by name."""


TRAINED = {'lstm': STEPS, 'gru': STEPS, 'stacked': 4000}
"""Steps under a remedy from the start: the stacked network's collapses came before step 2,000."""


def prevented() -> Iterator[Task]:
    """What averts a collapse, on from the start."""
    for name in ('combined', 'decaying', 'update_clip', 'half', 'b2'):
        for seed in range(3):
            for network in ('stacked', 'lstm'):
                flags = f'{remedy(name, 1e-3)} --max_steps={TRAINED[network]}'
                yield real(network, f'{name}@start', seed, flags, stops=True)


def remedy(name: str, rate: float) -> str:
    """Its flags, at a learning rate."""
    return REMEDIES[name].format(half=f'{rate / 2:g}', eighth=f'{rate / 8:g}')


def doses(run: Task, rate: float, names: Iterable[str], dates: Iterable[str], more: int) -> Iterator[Task]:
    """Each remedy at each date."""
    for name in names:
        flags = remedy(name, rate)
        for date in dates:
            share = DATES[date]
            yield branched(run, f'{name}@{date}', flags, lambda step, share=share: round(share * step), more)


DEMO = '--num_words=256 --test_share=0 --learning_rate=6e-3'
"""Of the quickest natural collapse: the stacked network at width 128, as `jaxrnn demo` trains it."""


def dated() -> Iterator[Task]:
    """Dose and date: what does switching something on at a step bring?"""
    for seed in range(3):
        yield (run := small('stacked', 128, 'demo', seed, DEMO, stops=True))
        names = ('update_clip', 'half', 'decaying', 'combined', 'cap', 'epsilon', 'b2', 'eighth', 'amsgrad')
        yield from doses(run, 6e-3, names, ('start', 'half', 'late', 'last'), 1500)
