"""What fits in one head: no class over 200 lines, no function over 60, or a comment `# long: …` in it says why."""

import ast
from pathlib import Path

ROOT = Path(__file__).parent.parent / 'jaxrnn'
MOST = {ast.ClassDef: 200, ast.FunctionDef: 60, ast.AsyncFunctionDef: 60}


def too_long(text: str) -> list[str]:
    """Names of what is too long in a module, and doesn't say why."""
    lines = text.splitlines()
    found = []
    for node in ast.walk(ast.parse(text)):
        most = MOST.get(type(node))
        if most is None or node.end_lineno - node.lineno < most:
            continue
        if not any(line.strip().startswith('# long: ') for line in lines[node.lineno : node.end_lineno]):
            found.append(f'{node.name}: {node.end_lineno - node.lineno + 1} lines')
    return found


def public_classes() -> list[str]:
    names = []
    for path in ROOT.rglob('*.py'):
        tree = ast.parse(path.read_text(encoding='utf-8'))
        names += [
            node.name
            for node in tree.body
            if isinstance(node, ast.ClassDef) and not node.name.startswith('_')
        ]
    return names


def test_nothing_is_too_long():
    found = {str(p.relative_to(ROOT)): too_long(p.read_text(encoding='utf-8')) for p in ROOT.rglob('*.py')}
    assert {path: names for path, names in found.items() if names} == {}


def test_what_is_too_long_is_found():
    body = '    x = 1\n' * 60
    assert too_long(f'def short():\n{body[10:]}') == []
    assert too_long(f'def long():\n{body}') == ['long: 61 lines']
    assert too_long(f'def long():\n    # long: a table\n{body}') == []


def test_a_public_class_has_a_name_of_its_own():
    names = public_classes()
    assert sorted({name for name in names if names.count(name) > 1}) == []
