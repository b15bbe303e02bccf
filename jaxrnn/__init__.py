"""jaxrnn: LSTM and GRU training in JAX that says at which step it broke, and proves it by replay."""

import importlib
from typing import Any

__version__ = '0.1.0'
__all__ = ['UserError', 'bisect', 'diagnose', 'record']


def __getattr__(name: str) -> Any:
    """All of __all__, imported when they are wanted: JAX takes its time."""
    if name not in __all__:
        raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
    return getattr(importlib.import_module('jaxrnn.debug'), name)
