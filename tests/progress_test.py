"""What is told and shown while something takes long."""

import io

import numpy as np
import pytest
from rich.console import Console

import jaxrnn
from jaxrnn import experiment, progress
from jaxrnn.cli import showing


def run(tmp_path):
    def step(x, batch):
        return x * batch, {'loss': x}

    made = step, lambda k: np.float32(np.nan if k == 50 else 1.01)
    jaxrnn.record(*made, lambda: 1.0, tmp_path, max_steps=60)
    return made


def test_a_diagnosis_tells_how_far_it_is(tmp_path):
    told = []
    made = run(tmp_path)
    with progress.heard_by(lambda *what: told.append(what)):
        jaxrnn.diagnose(*made, tmp_path, like=lambda: 1.0)
    doing = [*dict.fromkeys(what for what, _, _ in told)]
    assert doing[:2] == ['replaying the run', 'looking into step 50']
    assert any(each.startswith('replaying under a change: ') for each in doing), doing
    for what, done, total in told:
        assert 0 <= done <= total or not total, (what, done, total)
    spent = [done for _, done, total in told if total >= experiment.BUDGET]
    assert spent == sorted(spent) and len(set(spent)) > 300


def test_nobody_listens_afterwards(tmp_path):
    told = []
    with pytest.raises(ZeroDivisionError), progress.heard_by(lambda *what: told.append(what)):
        progress.told('a', 1, 2)
        raise ZeroDivisionError
    progress.told('b', 1, 2)
    assert told == [('a', 1, 2)]


@pytest.fixture
def clock(monkeypatch):
    class Clock:
        now = 0.0

        def monotonic(self):
            return self.now

    made = Clock()
    monkeypatch.setattr(showing, 'time', made)
    return made


def test_on_a_terminal_it_is_a_bar_that_goes_away(clock):
    out = Console(file=io.StringIO(), force_terminal=True, width=100, color_system=None)
    with showing.Progressing(out):
        progress.told('replaying\x1b', 3, 40)
        clock.now = 1.0
        progress.told('replaying\x1b', 7, 40)
    text = out.file.getvalue()
    assert 'replaying\\x1b' in text and '7/40' in text
    assert text.endswith('\x1b[?25h\r\x1b[1A\x1b[2K')  # the cursor is back, and the line is gone


def test_elsewhere_it_is_a_line_now_and_then(clock, capsys):
    with showing.Progressing(Console(file=io.StringIO(), width=100)):
        for second in range(40):
            clock.now = float(second)
            progress.told('replaying', second, 4000)
    assert capsys.readouterr().err == 'replaying: 16 of 4,000 steps\nreplaying: 32 of 4,000 steps\n'
