"""A package that has the name of its main function, and can be called as that function."""

import inspect
import sys
import types
from collections.abc import Callable
from typing import Any


def make_callable(name: str, function: Callable[..., Any]) -> None:
    """Lets `package(...)` call a function of it, and `help(package)` explain that function.

    Python's documented way is another class for the module (reference, "Customizing module attribute access").

    Args:
        name: of the package, its `__name__`.
        function: what a call of it does.
    """
    package = sys.modules[name]
    package.__class__ = type('CallablePackage', (types.ModuleType,), {'__call__': staticmethod(function)})
    package.__signature__ = inspect.signature(function)  # type: ignore[attr-defined]
    package.__doc__ = f'{package.__doc__}\n{inspect.getdoc(function)}'
