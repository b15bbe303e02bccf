"""The house: a room imports only rooms that stand below it. This table is the one place where they are written down."""

import ast
import importlib
import subprocess
import sys
from pathlib import Path

ROOMS = {
    'escaping': '',
    'errors': 'escaping',
    'types': 'errors',
    'package': '',
    'files': 'errors',
    'progress': '',
    'programs': '',
    'environment': 'programs',
    'tree': 'types',
    'diagnosis': 'environment',
    'rnn': 'ground',
    'trace': 'ground',
    'optim': 'ground',
    'record': 'ground optim trace',
    'detect': 'ground optim record',
    'bisect': 'ground optim record detect trace',
    'experiment': 'ground optim record detect trace bisect',
    'report': 'ground optim record detect trace bisect experiment',
    'exports': 'ground record',
    'alerts': 'ground optim record detect',
    'words': 'ground optim record detect trace bisect experiment alerts rnn',
    'adapters': 'ground optim record detect trace bisect experiment report',
    'cli': 'ground optim record detect trace bisect experiment rnn report exports alerts words adapters',
    '__main__': 'cli',
}
"""A room -> those that it may import."""

GROUND = (
    'escaping',
    'errors',
    'types',
    'package',
    'files',
    'programs',
    'progress',
    'environment',
    'tree',
    'diagnosis',
)
DOORS = {
    'gensim': 'words/data',
    'orbax': 'record/checkpoint',
    'jax.extend': 'trace',
    'absl': 'cli',
    'keras': 'adapters/keras',
    'bokeh': 'report/plots',
    'jinja2': 'report/page',
    'matplotlib': 'report/images',
    'tensorflow': 'adapters/tf_data',
    'pyarrow': 'exports/parquet',
    'tensorboard': 'exports/tensorboard',
    'mlflow': 'exports/mlflow',
    'wandb': 'exports/wandb',
}
"""The one place that may import a library."""

HEAVY = {
    'gensim',
    'orbax',
    'rich',
    'absl',
    'keras',
    'tensorflow',
    'bokeh',
    'jinja2',
    'pyarrow',
    'tensorboard',
    'mlflow',
    'wandb',
}
"""What neither the recurrence nor the transformations bring in: their users have a program of their own."""

ROOT = Path(__file__).parent.parent / 'jaxrnn'


def allowed(room: str) -> set[str]:
    names = ROOMS[room].split()
    return {room, *(n for n in names if n != 'ground'), *(GROUND if 'ground' in names else ())}


def files() -> dict[Path, str]:
    """Every file but the package's own -> its room."""
    paths = [path for path in sorted(ROOT.rglob('*.py')) if path != ROOT / '__init__.py']
    return {path: path.relative_to(ROOT).parts[0].removesuffix('.py') for path in paths}


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


def needed(names: set[str]) -> set[str]:
    """The rooms that imports lead to."""
    return {name.split('.')[1] for name in names if name.startswith('jaxrnn.')}


def upward(room: str, names: set[str]) -> set[str]:
    """Rooms that imports lead to and must not."""
    return needed(names) - allowed(room)


def modules(path: Path, names: set[str]) -> set[Path]:
    """The files that imports lead to."""
    found = set()
    for name in names:
        parts = name.split('.')[1:] if name.startswith('jaxrnn.') else []
        for end in (len(parts), len(parts) - 1):
            place = ROOT.joinpath(*parts[:end]) if end > 0 else None
            if place is not None and place.with_suffix('.py').exists():
                found.add(place.with_suffix('.py'))
                break
            if place is not None and (place / '__init__.py').exists():
                found.add(place / '__init__.py')
                break
    return found - {path}


def circle(edges: dict[Path, set[Path]]) -> list[Path]:
    """A way from a file back to itself; empty where there is none."""
    done: set[Path] = set()

    def walk(at: Path, way: list[Path]) -> list[Path]:
        if at in way:
            return way[way.index(at) :]
        if at in done:
            return []
        for following in sorted(edges.get(at, ())):
            if found := walk(following, [*way, at]):
                return found
        done.add(at)
        return []

    return next((found for start in sorted(edges) if (found := walk(start, []))), [])


def test_every_room_is_in_the_table():
    assert set(files().values()) == set(ROOMS)


def test_a_room_imports_those_below_it():
    wrong = {str(path.relative_to(ROOT)): upward(room, imports(path)) for path, room in files().items()}
    assert {path: rooms for path, rooms in wrong.items() if rooms} == {}


def test_the_table_has_no_circle():
    assert not any(room in allowed(other) for room in ROOMS for other in allowed(room) - {room})


def test_no_file_imports_itself_in_a_circle():
    assert circle({path: modules(path, imports(path)) for path in files()}) == []


def test_what_is_wrong_is_found():
    assert upward('rnn', {'jaxrnn.words.config', 'jaxrnn.types.Array'}) == {'words'}
    assert upward('trace', {'jaxrnn.rnn.scan'}) == {'rnn'} == upward('experiment', {'jaxrnn.rnn.cells'})
    a, b, c = Path('a'), Path('b'), Path('c')
    assert circle({a: {b}, b: {c}, c: {b}}) == [b, c] and circle({a: {b, c}, b: {c}}) == []


def test_one_door_to_each_library():
    for path in files():
        place = str(path.relative_to(ROOT))
        for name in imports(path):
            for library, door in DOORS.items():
                if name == library or name.startswith(f'{library}.'):
                    assert place.startswith(door), f'{place} imports {name}'
            assert not name.startswith('jax._src'), f'{place} imports {name}'


def loaded(*names: str) -> set[str]:
    """Packages that a process has which imports these modules and nothing else."""
    code = ''.join(f'import {name}\n' for name in names)
    code += 'import sys; print(*{name.split(".")[0] for name in sys.modules})'
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_small_rooms_bring_in_little():
    """Flax has absl and rich in it, and optax absl: what needs neither brings in neither."""
    pure = ('jaxrnn.rnn', 'jaxrnn.optim', *(f'jaxrnn.rnn.{n}' for n in ('cells', 'scan', 'probe', 'signals')))
    assert not loaded(*pure) & HEAVY
    whole = [
        f'jaxrnn.{room}.{path.stem}' for room in ('rnn', 'optim') for path in (ROOT / room).glob('[!_]*.py')
    ]
    assert not (loaded(*whole) - loaded('jax', 'flax', 'optax')) & HEAVY


def test_public_names_are_there_whatever_is_imported_first():
    """Two of them are also the names of rooms."""
    import jaxrnn

    for room in ('words.investigation', 'record.loop', 'bisect.replay', 'trace'):
        importlib.import_module(f'jaxrnn.{room}')
    for name in jaxrnn.__all__:
        assert callable(getattr(jaxrnn, name)) or name == 'trace'
