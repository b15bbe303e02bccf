"""The floors: a module imports only lower ones. This table is the one place where they are written down."""

import ast
from pathlib import Path

FLOORS = {
    0: ('types', 'tree', 'axes', 'config', 'environment', 'diagnosis'),
    1: (
        'cells',
        'scan',
        'seen',
        'optim',
        'transforms',
        'data',
        'telemetry',
        'checkpoint',
        'trace',
        'predicate',
        'signals',
        'curvature',
        'outcome',
    ),
    2: ('layers', 'detect', 'cause'),
    3: ('models', 'loop', 'kept'),
    4: ('train', 'replay', 'rewind'),
    5: ('inside', 'experiment', 'changes', 'run'),
    6: ('remedy',),
    7: ('checks',),
    8: ('investigation', 'debug'),
    9: ('report',),
}
DOORS = {'gensim': 'data', 'orbax': 'checkpoint', 'jax.extend': 'trace', 'absl': None}
"""The one module that may import a library; None: scripts alone."""

FLOOR_OF = {name: floor for floor, names in FLOORS.items() for name in names}
# Plain definitions that their own floor may use.
ALLOWED_BESIDE = {
    ('diagnosis', 'environment'),
    ('config', 'types'),
    ('tree', 'types'),
    ('scan', 'cells'),
    ('optim', 'transforms'),
    ('signals', 'transforms'),
    ('experiment', 'changes'),
    ('optim', 'curvature'),
    ('curvature', 'transforms'),
    ('signals', 'cells'),
    ('signals', 'seen'),
    ('scan', 'seen'),
    ('seen', 'cells'),
}

ROOT = Path(__file__).parent.parent / 'jaxrnn'


def modules() -> dict[str, list[Path]]:
    """Module -> its files; a folder is one module."""
    found: dict[str, list[Path]] = {}
    for path in sorted(ROOT.rglob('*.py')):
        name = path.relative_to(ROOT).parts[0].removesuffix('.py')
        if name != '__init__':
            found.setdefault(name, []).append(path)
    return found


def imports(path: Path) -> set[str]:
    """Everything a file imports, by its full dotted name."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding='utf-8'))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f'{path}: relative import'
            names |= {f'{node.module}.{alias.name}' for alias in node.names}
    return names


def own(path: Path) -> set[str]:
    return {name.split('.')[1] for name in imports(path) if name.startswith('jaxrnn.')}


def upward_edges(edges: set[tuple[str, str]]) -> set[tuple[str, str]]:
    """The imports that don't go down a floor."""
    return {
        (module, needed)
        for module, needed in edges
        if FLOOR_OF[needed] >= FLOOR_OF[module] and (module, needed) not in ALLOWED_BESIDE
    }


def edges() -> set[tuple[str, str]]:
    return {
        (module, needed)
        for module, paths in modules().items()
        for path in paths
        for needed in own(path)
        if needed != module
    }


def test_every_module_has_a_floor():
    assert set(modules()) == set(FLOOR_OF)


def test_imports_go_down():
    assert not upward_edges(edges())


def test_an_upward_import_is_found():
    assert upward_edges({('tree', 'train'), ('train', 'tree')}) == {('tree', 'train')}


def test_one_door_to_each_library():
    for module, paths in modules().items():
        for path in paths:
            for name in imports(path):
                library = name.split('.')[0]
                assert DOORS.get(library, module) == module, f'{path.name} imports {name}'
                assert not name.startswith('jax._src'), f'{path.name} imports {name}'
