"""What README and docs show is what happens."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize('name', ['README.md', 'docs/recurrence.md', 'docs/recording.md', 'docs/exports.md'])
def test_examples(name, tmp_path, monkeypatch, capsys):
    """A page's blocks are one program; its lines that begin with # are what it prints."""
    text = (ROOT / name).read_text(encoding='utf-8')
    code = '\n'.join(re.findall(r'```python\n(.*?)```', text, re.DOTALL))
    promised = ' '.join(line.removeprefix('# ') for line in code.splitlines() if line.startswith('# '))
    monkeypatch.chdir(tmp_path)
    exec(compile(code, name, 'exec'), {})
    assert promised and capsys.readouterr().out.split() == promised.split()


PAGES = [
    ROOT / 'README.md',
    ROOT / 'BUILD.md',
    ROOT / 'SECURITY.md',
    ROOT / 'benchmarks' / 'README.md',
    *(ROOT / 'docs').rglob('*.md'),
]


def test_links_lead_somewhere():
    for path in PAGES:
        for link in re.findall(r'\]\(([^)#]+)\)', path.read_text(encoding='utf-8')):
            assert link.startswith('https://') or (path.parent / link).exists(), f'{path.name}: {link}'


def test_files_and_names_in_them_are_there():
    """`jaxrnn/a.py` is a file, and `NAME` in `jaxrnn/a.py` is in it."""
    for path in PAGES:
        text = ' '.join(path.read_text(encoding='utf-8').split())
        for name in re.findall(r'`((?:jaxrnn|tests|benchmarks|scripts|examples)/[\w/]+\.py)`', text):
            assert (ROOT / name).exists(), f'{path.name}: {name}'
        for name, file in re.findall(r'`(\w+)` (?:in|of) `([\w/]+\.py)`', text):
            assert re.search(rf'\b{name}\b', (ROOT / file).read_text(encoding='utf-8')), f'{name} in {file}'
