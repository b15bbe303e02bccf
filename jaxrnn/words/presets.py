"""What `--preset` means: a network and Adam's epsilon, and other options where the user gave none.

A library's preset is an entry of `cells.PRESETS`, and nothing else. One of our own is an entry of SETTINGS, and of
NETWORKS, as its network is that of a library. What stands in SETTINGS is justified by a measurement each
(benchmarks/study, *What makes a run stable*).
"""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping
from typing import TYPE_CHECKING, Any

from jaxrnn.words.config import Config, Model

if TYPE_CHECKING:
    from jaxrnn.rnn import cells

NETWORKS = {'stable': 'keras3'}
"""Preset -> the one of a library whose network and epsilon it has."""

SETTINGS: Mapping[str, Mapping[str, Callable[[Config], Any]]] = {
    'stable': {
        'initial_weights': lambda config: 'keras1',
        'learning_rate': lambda config: 5e-4,
        'schedule': lambda config: 'warmup_cosine',
        'decay_steps': lambda config: config.loop.max_steps,
        'update_clip': lambda config: 1.0,
    }
}
"""Preset -> option -> its value, of a configuration in which the user's own options are set."""

BELONGS = {'decay_steps': 'schedule'}
"""Option -> the one that it says more about: where the user gave that, this has the usual default, too."""


def network_of(preset: str) -> cells.Preset:
    """Its initial weights, gates and epsilon."""
    from jaxrnn.rnn import cells  # JAX takes its time, and flags are read without it

    return cells.PRESETS[NETWORKS.get(preset, preset)]


def weights_of(options: Model) -> cells.Preset:
    """The preset whose initial weights a network has: its own, unless others are chosen."""
    own = options.initial_weights == 'preset'
    return network_of(options.preset if own else options.initial_weights)


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
