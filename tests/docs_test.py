"""What README and docs show is what happens."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize('name', ['README.md', 'docs/recurrence.md'])
def test_examples(name, tmp_path, monkeypatch, capsys):
    """A page's blocks are one program; its lines that begin with # are what it prints."""
    text = (ROOT / name).read_text(encoding='utf-8')
    code = '\n'.join(re.findall(r'```python\n(.*?)```', text, re.DOTALL))
    promised = ' '.join(line.removeprefix('# ') for line in code.splitlines() if line.startswith('# '))
    monkeypatch.chdir(tmp_path)
    exec(compile(code, name, 'exec'), {})
    assert promised and capsys.readouterr().out.split() == promised.split()


def test_links_lead_somewhere():
    for path in [ROOT / 'README.md', ROOT / 'BUILD.md', *(ROOT / 'docs').rglob('*.md')]:
        for link in re.findall(r'\]\(([^)#]+)\)', path.read_text(encoding='utf-8')):
            assert link.startswith('https://') or (path.parent / link).exists(), f'{path.name}: {link}'
