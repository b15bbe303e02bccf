"""Remedies: changes of a configuration by name, each a set of flags, and what each makes of a running train state.

A new one is an entry of REMEDIES. Formulas and sources of what they switch on are where that is defined: `optim`,
`transforms`, `models`.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from jaxrnn import cells, data, optim, train
from jaxrnn.config import Config
from jaxrnn.experiment import Change, Changed
from jaxrnn.types import Tree

Options = Mapping[str, Any]


class Remedy(NamedTuple):
    """A change to a configuration."""

    name: str
    points_to: str  # the cause where it averts a symptom: data, model, optimiser, precision
    options: Callable[[Config], Options]  # option -> value; empty where it changes nothing
    means: str  # why it may help


def _fixed(name: str, points_to: str, means: str, **options: Any) -> Remedy:
    return Remedy(name, points_to, lambda config: options, means)


def _slower(config: Config, by: float) -> Options:
    return {'learning_rate': float(f'{config.optimiser.learning_rate * by:.6g}')}


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


def _wider_products(config: Config) -> Options:
    return {'dtype': 'float32'} if config.model.dtype != 'float32' else {}


DECAY = 'decaying learning rate'
"""The fourth of the seven checks."""

REMEDIES = (
    _fixed(
        'update clipping', 'optimiser', 'no update is larger than the squared gradients of the past justify',
        update_clip=1.0,
    ),
    Remedy(
        'faster second moment', 'optimiser', lambda config: _faster_forgetting(config, 0.99),
        "Adam's squared gradients follow a burst within 100 steps, not 1,000",
    ),
    Remedy(DECAY, 'optimiser', _decaying, 'steps shrink as the loss landscape sharpens'),
    Remedy(
        'half the learning rate', 'optimiser', lambda config: _slower(config, 0.5),
        'steps are half as long',
    ),
    Remedy('sigmoid gates', 'model', _soft_gates, 'gates keep a gradient where hard ones are shut'),
    Remedy(
        'an eighth of the learning rate', 'optimiser', lambda config: _slower(config, 0.125),
        'steps are an eighth as long',
    ),
    _fixed(
        'AMSGrad', 'optimiser', 'the second moment never decays, so quiet steps do not make the next ones long',
        second_moment='amsgrad',
    ),
    Remedy(
        'larger epsilon', 'optimiser', _larger_epsilon,
        'coordinates with tiny gradients take no full steps',
    ),
    _fixed('ZClip', 'optimiser', 'gradients far above their running norm are cut', clip='zclip'),
    _fixed('norm clipping', 'optimiser', 'gradients of a norm above 1 are cut', clip='global_norm', clip_threshold=1.0),
    _fixed('masked padding', 'model', 'a word ends at its last letter', mask_padding=True),
    Remedy('float32 products', 'precision', _wider_products, 'products keep their digits'),
)  # fmt: skip
"""In the order in which they are tried."""


def applicable(config: Config) -> list[Remedy]:
    """Those that change something of a configuration."""
    return [remedy for remedy in REMEDIES if applied(config, remedy) != config]


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


def change(config: Config, dataset: data.Dataset, remedy: Remedy) -> Change:
    """A remedy as an experiment on a run of a configuration."""

    def make() -> Changed:
        other = applied(config, remedy)
        program = train.make_program(other, dataset)
        return Changed(program.step, program.batch_at, lambda state: converted(config, other, state))

    return Change(remedy.name, remedy.points_to, make, flags(config, remedy), remedy.means)


def converted(config: Config, other: Config, state: train.TrainState) -> train.TrainState:
    """A train state of one configuration as that of another: moments are kept, never zeroed."""
    opt_state: Tree = optim.convert(state.opt_state, config.optimiser, other.optimiser, state.params)
    return state._replace(opt_state=opt_state)
