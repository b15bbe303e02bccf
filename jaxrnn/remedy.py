"""Remedies: changes of a configuration by name, each a set of flags, and what each makes of a running train state.

A new one is an entry of REMEDIES. Formulas and sources of what they switch on are where that is defined: `optim`,
`transforms`, `models`.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax

from jaxrnn import cells, data, optim, train
from jaxrnn.config import Config
from jaxrnn.outcome import Change, Changed
from jaxrnn.types import Tree

Options = Mapping[str, Any]


class Remedy(NamedTuple):
    """A change to a configuration."""

    name: str
    points_to: str  # the cause where it averts a symptom: data, model, optimiser, precision
    options: Callable[[Config], Options]  # option -> value; empty where it changes nothing
    means: str  # why it may help
    removes: str = ''  # the mechanism that it takes away, of cause.MECHANISMS
    unusual: bool = (
        False  # whether it takes back what few runs have, and is the first to be suspected where it is
    )
    against: str = ''  # the one kind of symptom that it is for; '' for any


def _fixed(
    name: str,
    points_to: str,
    means: str,
    removes: str = '',
    *,
    unusual: bool = False,
    against: str = '',
    **options: Any,
) -> Remedy:
    return Remedy(name, points_to, lambda config: options, means, removes, unusual, against)


def _slower(config: Config, by: float) -> Options:
    return {'learning_rate': _rounded(config.optimiser.learning_rate * by)}


def _rounded(rate: float) -> float:
    """As a person would write it; so that half of twice a rate is that rate."""
    return float(f'{rate:.6g}')


def _decaying(config: Config) -> Options:
    if config.optimiser.schedule != 'constant':
        return {}
    return {'schedule': 'warmup_cosine', 'decay_steps': config.loop.max_steps}


def _faster_forgetting(config: Config, b2: float) -> Options:
    return {'b2': b2} if b2 < config.optimiser.b2 else {}


def _larger_epsilon(config: Config) -> Options:
    epsilon = config.optimiser.epsilon or cells.PRESETS[config.model.preset].epsilon
    return {'epsilon': 1e-5} if epsilon < 1e-5 else {}


def _soft_gates(config: Config) -> Options:
    gate = config.model.gate
    hard = gate == 'hard_sigmoid' or cells.PRESETS[config.model.preset].gate is cells.HARD_SIGMOID
    return {'gate': 'sigmoid'} if hard and gate != 'sigmoid' else {}


def _smaller_gain(config: Config) -> Options:
    return {'recurrent_gain': 1.0} if gain(config) > 1 else {}


def gain(config: Config) -> float:
    """Of the initial recurrent weights."""
    return config.model.recurrent_gain or cells.PRESETS[config.model.preset].recurrent_gain


DECAY = 'decaying learning rate'
"""The fourth of the seven checks."""

HALF = 'half the learning rate'

REMEDIES = (
    _fixed(
        'float32 products', 'precision', 'products keep their digits', 'low precision', unusual=True,
        dtype='float32',
    ),
    _fixed(
        'float32 moments', 'precision', "v follows small changes of the gradients' size", 'low precision',
        unusual=True, moment_dtype='float32',
    ),
    _fixed(
        'bias correction', 'optimiser', 'the first steps are no longer than the others',
        'missing bias correction', unusual=True, bias_correction=True,
    ),
    _fixed('guard', 'data', 'a step that is not finite changes nothing', against='nonfinite', guard=True),
    _fixed(
        'update clipping', 'optimiser', 'no update is larger than the squared gradients of the past justify',
        'outrun second moment', update_clip=1.0,
    ),
    Remedy(
        'faster second moment', 'optimiser', lambda config: _faster_forgetting(config, 0.99),
        "Adam's squared gradients follow a burst within 100 steps, not 1,000", 'outrun second moment',
    ),
    Remedy(DECAY, 'optimiser', _decaying, 'steps shrink as the loss landscape sharpens'),
    Remedy(
        HALF, 'optimiser', lambda config: _slower(config, 0.5),
        'steps are half as long',
    ),
    Remedy('sigmoid gates', 'model', _soft_gates, 'gates keep a gradient where hard ones are shut', 'shut gates'),
    Remedy(
        'an eighth of the learning rate', 'optimiser', lambda config: _slower(config, 0.125),
        'steps are an eighth as long',
    ),
    _fixed(
        'AMSGrad', 'optimiser', 'the second moment never decays, so quiet steps do not make the next ones long',
        'second-moment decay', second_moment='amsgrad',
    ),
    Remedy(
        'larger epsilon', 'optimiser', _larger_epsilon,
        'coordinates with tiny gradients take no full steps', 'second-moment decay',
    ),
    Remedy(
        'recurrent gain of 1', 'model', _smaller_gain, 'the state is not amplified from step to step',
        'recurrent gain',
    ),
    _fixed(
        'ZClip', 'optimiser', 'gradients far above their running norm are cut', 'outlying gradients', clip='zclip',
    ),
    _fixed(
        'norm clipping', 'optimiser', 'gradients of a norm above 1 are cut', 'outlying gradients', clip='global_norm',
        clip_threshold=1.0,
    ),
    _fixed('masked padding', 'model', 'a word ends at its last letter', 'padding', mask_padding=True),
)  # fmt: skip
"""In the order in which they are tried."""


def together(first: Remedy, *others: Remedy, name: str) -> Remedy:
    """Several as one, the later ones applied to what the earlier ones make; it takes away what the first does."""

    def options(config: Config) -> Options:
        changes: Options = {}
        for remedy in (first, *others):
            changes = {**changes, **remedy.options(config.changed(**changes))}
        return changes

    every = (first, *others)
    return first._replace(
        name=name,
        options=options,
        means='; '.join(remedy.means for remedy in every),
    )


def combined(config: Config, name: str) -> Remedy | None:
    """A remedy with steps half as long, and from then on shorter; None for one that is about the learning rate already.

    What one remedy averts on the steps before a symptom comes later, mostly: the loss landscape goes on sharpening, and
    a rate that decays keeps ahead of it.
    """
    remedy, half, decay = (
        next(each for each in REMEDIES if each.name == wanted) for wanted in (name, HALF, DECAY)
    )
    if remedy.options(config).keys() & {'learning_rate', 'schedule'}:
        return None
    return together(remedy, half, decay, name=f'{name}, half the rate, decaying')


def applicable(config: Config) -> list[Remedy]:
    """Those that change something of a configuration."""
    return [remedy for remedy in REMEDIES if applied(config, remedy) != config]


def suspects(config: Config, kind: str, *, lasting: bool = False) -> list[Remedy]:
    """Those that may avert a symptom of a kind, the first suspected first. `lasting`: it is of a network that never
    started to learn, for which the network is to be suspected before the optimiser."""
    found = [remedy for remedy in applicable(config) if remedy.against in ('', kind)]
    if lasting:
        found.sort(key=lambda remedy: (not remedy.unusual, remedy.points_to != 'model'))
    return sorted(found, key=lambda remedy: (not remedy.unusual, not remedy.against))


def applied(config: Config, remedy: Remedy) -> Config:
    return config.changed(**remedy.options(config))


def flags(config: Config, remedy: Remedy) -> str:
    """As the command line has them."""
    changed, before = applied(config, remedy).to_json(), config.to_json()
    return ' '.join(
        f'--{name}={str(value).lower() if isinstance(value, bool) else value}'
        for group, options in changed.items()
        for name, value in options.items()
        if value != before[group][name]
    )


def change(
    config: Config,
    dataset: data.Dataset,
    remedy: Remedy,
    make_program: train.Make = train.make_program,
    *,
    signals: bool = False,
) -> Change:
    """A remedy as an experiment on a run of a configuration; its records have signals if these are asked for."""

    def at(times: int) -> Change | None:
        other = applied(config, remedy)
        rate = other.optimiser.learning_rate
        if times > 1:
            other = other.changed(learning_rate=_rounded(rate * times))

        def make() -> Changed:
            program = make_program(other.changed(signals=signals and config.training.signals), dataset)
            return Changed(program.step, program.batch_at, lambda state: converted(config, other, state))

        if other == config:
            return None
        name = remedy.name if times == 1 else f'{remedy.name}, {times} x the rate'
        return Change(
            name, remedy.points_to, make, flags(config, remedy) if times == 1 else '', remedy.means,
            remedy.removes, other, None if times > 1 or remedy.unusual or remedy.against else at,
        )  # fmt: skip

    made = at(1)
    if made is None:
        raise ValueError(f'{remedy.name} changes nothing')
    return made


def converted(config: Config, other: Config, state: train.TrainState) -> train.TrainState:
    """A train state of one configuration as that of another: moments are kept, never zeroed. Another recurrent gain
    scales the recurrent kernels there are, so that from step 0 it is what the flag would have given."""
    opt_state: Tree = optim.convert(state.opt_state, config.optimiser, other.optimiser, state.params)
    factor = gain(other) / gain(config)
    params = state.params
    if factor != 1:
        params = jax.tree_util.tree_map_with_path(
            lambda path, leaf: leaf * factor if path[-1].key == 'recurrent_kernel' else leaf, params
        )
    return state._replace(params=params, opt_state=opt_state)
