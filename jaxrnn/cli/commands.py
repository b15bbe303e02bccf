"""The commands of `jaxrnn`. A new one is a file in this folder, and its name in COMMANDS.

Such a file has

    a docstring                     its first line is what `jaxrnn --help` says of it
    define_flags() -> None          by `common.define`
    main(arguments) -> exit code    of what stands after the flags
"""

import ast
import importlib
from pathlib import Path
from types import ModuleType

COMMANDS = (
    'train',
    'bisect',
    'trace',
    'diagnose',
    'report',
    'watch',
    'embed',
    'export',
    'demo',
)
"""In the order in which help lists them."""


def load(name: str) -> ModuleType:
    """Imports a command and defines its flags. One a process: absl has one registry, and commands share names."""
    command = importlib.import_module(f'jaxrnn.cli.{name}')
    command.define_flags()
    return command


def summary(name: str) -> str:
    """The first line of a command's docstring, without importing it: what it imports takes time."""
    source = Path(__file__).with_name(f'{name}.py').read_text(encoding='utf-8')
    return (ast.get_docstring(ast.parse(source)) or '').partition('\n')[0]
