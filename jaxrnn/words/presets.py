"""What a preset sets beside the network: options of the optimiser, where the user gave none.

A new one is an entry of SETTINGS. What stands in it is justified by a measurement each (benchmarks/study, *What makes a
run stable*). The presets of libraries have no entry: they are the network and Adam's epsilon alone.
"""

from collections.abc import Callable, Container, Mapping
from typing import Any

from jaxrnn.words.config import Config

SETTINGS: Mapping[str, Mapping[str, Callable[[Config], Any]]] = {
    'stable': {
        'learning_rate': lambda config: 5e-4,
        'schedule': lambda config: 'warmup_cosine',
        'decay_steps': lambda config: config.loop.max_steps,
    }
}
"""Preset -> option -> its value, of a configuration in which the user's own options are set."""

BELONGS = {'decay_steps': 'schedule'}
"""Option -> the one that it says more about: where the user gave that, this has the usual default, too."""


def completed(config: Config, given: Container[str]) -> Config:
    """A configuration with what its preset sets.

    Args:
        config: as the flags say.
        given: names of options whose values are the user's own, even if they equal the default: they stay.
    """
    found = SETTINGS.get(config.model.preset, {})
    return config.changed(
        **{
            name: value(config)
            for name, value in found.items()
            if name not in given and BELONGS.get(name, '') not in given
        }
    )
