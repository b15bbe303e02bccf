"""What README shows is what happens."""

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_readme_example(tmp_path, monkeypatch, capsys):
    text = (ROOT / 'README.md').read_text(encoding='utf-8')
    code = re.search(r'```python\n(.*?)```', text, re.DOTALL)[1]
    promised = ' '.join(line.removeprefix('# ') for line in code.splitlines() if line.startswith('# '))
    monkeypatch.chdir(tmp_path)
    exec(compile(code, 'README.md', 'exec'), {})
    assert capsys.readouterr().out.split() == promised.split()


def test_links_lead_somewhere():
    for path in [ROOT / 'README.md', ROOT / 'BUILD.md', *(ROOT / 'docs').rglob('*.md')]:
        for link in re.findall(r'\]\(([^)#]+)\)', path.read_text(encoding='utf-8')):
            assert link.startswith('https://') or (path.parent / link).exists(), f'{path.name}: {link}'
