"""Which runs the study is made of, in the order in which they are worth having. A new one is a line here."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from benchmarks.study.tasks import Task

DATA = '--preset=keras1 --num_words=640 --validation_share=0 --test_share=0.2 --pad_to=20'
"""512 words to learn and 128 that are never shown, the most frequent of the sample, with their vectors; 20 letters."""

FEW = '--num_words=256 --test_share=0'
"""Fewer words, which are all learnt: where a collapse is quick."""

STEPS = 8000

REAL = f'{DATA} --max_steps={STEPS} --signals --threads=1 --checkpoint_every=250 --keep_latest=1000'

SIZES = {'lstm': 1024, 'gru': 1024, 'stacked': 512}
"""Of the question's networks."""


def collapsed(result: Mapping[str, Any]) -> bool:
    """Whether a training run lost what it had learnt."""
    return result['collapse'] is not None


def diagnosed(name: str) -> Task:
    """The diagnosis of a run, if it collapsed."""
    return Task(f'{name}-diagnosis', 'diagnose', '--threads=1', name, after=name, needed=collapsed)


def trained(
    network: str, variant: str, seed: int, flags: str = '', *, width: int | None = None, stops: bool = False
) -> Task:
    """A run of one of the networks; to the end unless it `stops` at a collapse.

    Args:
        network: of SIZES.
        variant: what is otherwise than in the question, in a name without a hyphen.
        seed: of the run.
        flags: that make it so.
        width: in place of its own; of such a run less is kept, as it takes a minute.
        stops: whether it ends soon after a collapse.
    """
    name = f'{network}{width or ""}-{variant}-{seed}'
    of = f'--network={network} --hidden={width or 0} --seed={seed}'
    on = f'--on_divergence={"stop" if stops else "continue"}'
    return Task(name, 'train', f'{REAL} {of} {on} {flags}'.strip(), name, full=width is None)


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

    def part(result: Mapping[str, Any]) -> tuple[int, int]:
        step = result['collapse']['step']
        return max(at(step), 0), step + more

    flags = f'{parent.flags} {flags} --on_divergence=continue'
    return Task(name, 'train', flags, name, after=parent.name, needed=collapsed, part=part, full=full)


def tasks() -> Iterator[Task]:
    """All of them."""
    yield from stock()
    yield from curvatures()
    yield from rates()
    yield from words()
    yield from stable()
    yield from screened()
    yield from beyond()
    yield from advised()
    yield from prevented()
    yield from dated()
    yield from many()


def stock() -> Iterator[Task]:
    """As they were asked about."""
    for seed in range(5):
        for network in ('lstm', 'stacked'):
            yield (run := trained(network, 'stock', seed, stops=True))
            if seed == 0:
                yield diagnosed(run.name)
    yield trained('gru', 'stock', 0)
    for seed in range(5, 10):
        yield (run := trained('stacked', 'stock', seed, stops=True))
        if seed == 5:  # by what the diagnosis has learnt since that of seed 0
            yield diagnosed(run.name)


def rates() -> Iterator[Task]:
    """At which rate does which network collapse?"""
    for network, rate in (('gru', '2e_3'), ('gru', '4e_3'), ('lstm', '2e_3'), ('gru', '8e_3')):
        yield trained(network, f'rate{rate}', 0, f'--learning_rate={rate.replace("_", "-")}', stops=True)
    yield trained(
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
                yield trained(network, f'rate{rate}', seed, flags, width=128, stops=True)


def words() -> Iterator[Task]:
    """With fewer words, learnt sooner."""
    for network, rate in (
        ('lstm', '8e-3'),
        ('gru', '8e-3'),
        ('lstm', '16e-3'),
        ('gru', '16e-3'),
    ):
        flags = f'{FEW} --learning_rate={rate}'
        yield trained(network, f'words256_rate{rate.replace("-", "_")}', 0, flags, width=128, stops=True)
    for seed in range(10):
        yield (run := trained('gru', 'words256_rate32e_3', seed, STEEP, width=128, stops=True))
        if seed < 2:
            yield diagnosed(run.name)


STEEP = f'{FEW} --learning_rate=32e-3'
"""Of the narrowest setting at which a GRU collapsed."""


def curvatures() -> Iterator[Task]:
    """The curvature, as Adam feels it, through the steps before a collapse: nothing else is done otherwise."""
    for network in ('stacked', 'lstm'):
        run = trained(network, 'stock', 0, stops=True)
        yield branched(run, 'curvature', '--curvature_every=20', lambda step: step - 1500, 100, full=True)


COSINE = f'--schedule=warmup_cosine --decay_steps={STEPS}'

DATES = {'start': 0.0, 'sixth': 1 / 6, 'half': 1 / 2, 'late': 5 / 6, 'last': 0.98}
"""Of switching something on, as shares of the steps to the collapse; of a collapse at step 6,000 they are the steps 0,
1,000, 3,000, 5,000 and 5,900."""

REMEDIES = {
    'update_clip': '--update_clip=1.0',
    'b2': '--b2=0.99',
    'half': '--learning_rate={half}',
    'eighth': '--learning_rate={eighth}',
    'decaying': COSINE,
    'amsgrad': '--second_moment=amsgrad',
    'epsilon': '--epsilon=1e-5',
    'norm_clip': '--clip=global_norm --clip_threshold=1.0',
    'zclip': '--clip=zclip',
    'sigmoid': '--gate=sigmoid',
    'mask': '--mask_padding',
    'cap': '--curvature_every=10 --curvature_cap=0.8',
    'combined': f'--update_clip=1.0 --learning_rate={{half}} {COSINE}',
}
"""What is switched on, by name."""


TRAINED = {'lstm': STEPS, 'gru': STEPS, 'stacked': 4000}
"""Steps under a remedy from the start: the stacked network's collapses came before step 2,000."""


def prevented() -> Iterator[Task]:
    """What averts a collapse, on from the start; what the diagnosis of the stacked network says to do among it."""
    for seed in (1, 3, 0):
        flags = f'--epsilon=2.3e-05 --max_steps={TRAINED["stacked"]}'
        yield trained('stacked', 'advised_epsilon', seed, flags, stops=True)
    for name in ('combined', 'decaying', 'update_clip', 'half', 'b2'):
        for seed in range(3):
            for network in ('stacked', 'lstm'):
                flags = f'{remedy(name, 1e-3)} --max_steps={TRAINED[network]}'
                yield trained(network, f'{name}@start', seed, flags, stops=True)


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


STABLE = '--preset=stable'

KERAS3 = f'--preset=keras3 --learning_rate=0.0005 {COSINE} --update_clip=1.0'
"""The preset with the initial weights of Keras 3, as it was before."""

UNCLIPPED = '--update_clip=0'

EARLY = '--max_steps=2500'
"""Of a run that shall only say how soon it learns; its cosine goes on to the end of a whole one."""

SMALL = {'stacked': 6e-3, 'gru': 32e-3}
"""Network -> the rate at which it collapses soon at width 128 with 256 words."""

HARD = (7, 0, 4)
"""Seeds with which the small stacked network collapses with KERAS3 without clipping, or nearly does."""

FULL = {'lstm': (0, 1, 2), 'gru': (0, 1, 2), 'stacked': (3, 0, 1, 2, 4, 5, 6, 7, 8, 9)}
"""Seeds of the networks at their own sizes under the preset."""


def stable() -> Iterator[Task]:
    """The preset: the networks of the question under it, and where a collapse is quick each ingredient left out."""
    for network, seeds in FULL.items():
        yield trained(network, 'stable', seeds[0], STABLE, stops=True)
    for seed in range(10):
        for network, rate in SMALL.items():
            settings = narrow(rate, 'stable', STABLE)
            if seed < 3:
                settings |= {
                    **narrow(rate, 'stable_constant', f'{STABLE} --schedule=constant'),
                    **narrow(rate, 'stable_unclipped', f'{STABLE} {UNCLIPPED}'),
                    **narrow(2 * rate, 'stable_whole', STABLE),
                    'keras3': f'{FEW} --learning_rate={rate:g} --preset=keras3',
                }
            for name, flags in settings.items():
                yield trained(network, name, seed, flags, width=128, stops=True)
    for network, seeds in FULL.items():
        for seed in seeds[1:]:
            yield trained(network, 'stable', seed, STABLE, stops=True)
    yield from first_stable()


def first_stable() -> Iterator[Task]:
    """The preset as it was before, and at first, without clipping; and what was left out of either."""
    for network, seed in (('lstm', 0), ('gru', 0), ('stacked', 5), ('stacked', 3)):
        yield trained(network, 'stable_keras3', seed, KERAS3, stops=True)
        yield trained(network, 'unclipped', seed, f'{KERAS3} {UNCLIPPED}', stops=True)
    for seed in range(10):
        for network, rate in SMALL.items():
            without = f'{KERAS3} {UNCLIPPED}'
            settings = narrow(rate, 'stable_keras3', KERAS3) | narrow(rate, 'unclipped', without)
            if seed < 3:
                settings |= narrow(rate, 'weights_flax', f'{KERAS3} --initial_weights=flax {EARLY}')
                settings |= narrow(rate, 'weights_keras3_gain2', f'{KERAS3} --recurrent_gain=2 {EARLY}')
                settings |= narrow(rate, 'weights_keras3_hard', f'{KERAS3} --gate=hard_sigmoid {EARLY}')
                settings |= narrow(rate, 'stable_keras3_constant', f'{KERAS3} --schedule=constant')
                settings |= narrow(rate, 'unclipped_constant', f'{without} --schedule=constant')
                settings |= narrow(2 * rate, 'unclipped_whole', without)
            if seed in HARD:
                settings |= narrow(rate, 'unclipped_epsilon', f'{without} --epsilon=1e-5')
                settings |= narrow(rate / 2, 'unclipped_quarter', without)
            for name, flags in settings.items():
                yield trained(network, name, seed, flags, width=128, stops=True)


def narrow(rate: float, variant: str, flags: str) -> dict[str, str]:
    """Variant -> flags of a small network: half the rate at which it collapses, and fewer words."""
    return {variant: f'{flags} {FEW} --learning_rate={rate / 2:g}'}


def beyond() -> Iterator[Task]:
    """Trained on after a collapse, and at rates far above: where are outputs random, or the same for every word?"""
    for seed in range(2):
        for network, rates in (
            ('stacked', ('6e-3', '16e-3', '32e-3')),
            ('lstm', ('32e-3', '64e-3')),
            ('gru', ('48e-3',)),
        ):
            for rate in rates:
                flags = f'{FEW} --learning_rate={rate}'
                yield trained(network, f'on_rate{rate.replace("-", "_")}', seed, flags, width=128)
    same = 'stacked128-on_rate6e_3-0'  # from step 5,640 on the same output for every word
    flags = '--threads=1 --good=5000 --budget_steps=2900'
    yield Task(f'{same}-constant', 'diagnose', flags, same, after=same, needed=collapsed)


def screened() -> Iterator[Task]:
    """Other cells, as they are, and as the question had them with a cosine from half the rate."""
    for network, rate in SMALL.items():
        whole = f'{FEW} --learning_rate={rate:g}'
        half = f'{FEW} --learning_rate={rate / 2:g}'
        for name, flags in (('flax', f'{whole} --preset=flax'), ('mask', f'{whole} --mask_padding')):
            yield trained(network, name, 0, flags, width=128, stops=True)
        yield trained(network, 'cosine', 0, f'{half} {COSINE}', width=128, stops=True)


DEMO = f'{FEW} --learning_rate=6e-3'
"""Of the quickest natural collapse: the stacked network at width 128, as `jaxrnn demo` trains it."""


ADVICE = f'--learning_rate=0.003 --epsilon=3.1e-05 {COSINE}'
"""What the diagnosis of the demo says to do."""


def advised() -> Iterator[Task]:
    """The demo as it is, and with its diagnosis' advice from the start, with other seeds."""
    for seed in range(10):
        yield trained('stacked', 'demo', seed, DEMO, width=128, stops=True)
        yield trained('stacked', 'advised', seed, f'{DEMO} {ADVICE}', width=128, stops=True)


def dated() -> Iterator[Task]:
    """Dose and date: what does switching something on at a step bring?"""
    for seed in range(3):
        run = trained('stacked', 'demo', seed, DEMO, width=128, stops=True)
        names = ('update_clip', 'half', 'decaying', 'combined', 'cap', 'epsilon', 'b2', 'eighth', 'amsgrad')
        yield from doses(run, 6e-3, names, ('start', 'half', 'late', 'last'), 1500)


MANY = f'{DATA} --max_steps={STEPS} --signals --threads=1 --precision=highest --checkpoint_every=2000'
"""As REAL, with fewer checkpoints: an accelerator makes 8,000 steps in a minute. Products as those of a processor."""

OWN_ADVICE = {
    'lstm': f'--learning_rate=0.0005 --epsilon=8.6e-07 {COSINE}',
    'stacked': '--learning_rate=0.000125',
}
"""What the diagnoses of the networks at their own sizes say to do."""

VARIED = {
    **{
        name: remedy(name, 1e-3)
        for name in ('half', 'decaying', 'epsilon', 'update_clip', 'b2', 'amsgrad', 'mask')
    },
    'keras3': '--preset=keras3',
    'flax': '--preset=flax',
    'twice': '--learning_rate=2e-3',
    'batch128': '--batch_size=128',
    'batch8': '--batch_size=8',
    'words256': FEW,
    'words1024': '--num_words=1280',
    'letters30': '--pad_to=30',
    'tf32': '--precision=default',
}
"""The question's setting with one thing otherwise."""


def many() -> Iterator[Task]:
    """The networks at their own sizes with many seeds, which needs an accelerator."""

    def run(network: str, variant: str, seed: int, flags: str = '') -> Task:
        name = f'{network}-many_{variant}-{seed}'
        of = f'--network={network} --seed={seed} --on_divergence=stop'
        return Task(name, 'train', f'{MANY} {of} {flags}'.strip(), name)

    for seed in range(3):
        for network in ('stacked', 'lstm'):
            yield run(network, 'stock', seed, '--checkpoint_every=250 --keep_latest=1000')
    for rate, more in (
        ('1e-3', '--max_steps=20000'), ('2e-3', '--max_steps=20000'), ('4e-3', '--max_steps=20000'),
        ('8e-3', ''), ('4e-3', FEW), ('8e-3', FEW), ('16e-3', FEW),
    ):  # fmt: skip
        name = f'rate{rate.replace("-", "_")}{"_words256" if more == FEW else ""}'
        flags = f'--learning_rate={rate} {more} --checkpoint_every=500 --keep_latest=1000 --on_divergence=continue'
        yield (found := run('gru', name, 0, flags))
        yield diagnosed(found.name)
    for seed in range(2):
        for network in ('stacked', 'lstm'):
            yield diagnosed(f'{network}-many_stock-{seed}')
    for seed in range(1, 11):
        for network, advice in OWN_ADVICE.items():
            if seed > 2:
                yield run(network, 'stock', seed)
            yield run(network, 'advised', seed, advice)
            yield run(network, 'unclipped', seed, f'{KERAS3} {UNCLIPPED}')
            yield run(network, 'stable', seed, STABLE)
        if seed <= 3:
            yield run('gru', 'unclipped', seed, f'{KERAS3} {UNCLIPPED}')
            yield run('gru', 'stable', seed, STABLE)
    for seed in range(3):
        for name, flags in VARIED.items():
            for network in ('stacked', 'lstm'):
                yield run(network, name, seed, flags)
