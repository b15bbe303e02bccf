"""The corpus of `benchmarks/fuzz.py`, read again: files that led somewhere new in the code, and former findings."""

import gc
import shutil
import tracemalloc

import fuzzing
import pytest

pytestmark = pytest.mark.filterwarnings('ignore')  # what other libraries say of a file is theirs


@pytest.fixture(scope='module', params=fuzzing.READERS)
def folder(request, tmp_path_factory):
    made = fuzzing.Folder(request.param, tmp_path_factory.mktemp('fuzz'))
    yield made
    shutil.rmtree(made.home)


def test_every_file_is_read_or_refused(folder):
    """Seeds, and those of the corpus."""
    files = [*folder.reader.seeds(), *fuzzing.kept(folder.home.name)]
    wrong = {content[:60]: found for content in files if (found := folder.judge(content))}
    assert wrong == {}


def test_memory_is_bounded(folder):
    files = sorted([*folder.reader.seeds(), *fuzzing.kept(folder.home.name)], key=len)[-3:]
    gc.collect()
    tracemalloc.start()
    try:
        for content in files:
            folder.judge(content)
        assert tracemalloc.get_traced_memory()[1] < fuzzing.MOST_MEMORY
    finally:
        tracemalloc.stop()


class TestTheWatch:
    """What it is there for is seen."""

    @pytest.mark.parametrize(
        'act',
        [
            lambda: open('/etc/hostname'),
            lambda: exec('1'),
            lambda: __import__('this'),
            lambda: __import__('pickle').loads(b'cos\nsystem\n.'),
            lambda: __import__('os').rename('/tmp/nowhere', '/tmp/elsewhere'),
            lambda: __import__('subprocess').run(['true'], check=False),
        ],
    )
    def test_what_is_forbidden(self, act, tmp_path, monkeypatch):
        folder = fuzzing.Folder('rules', tmp_path)
        monkeypatch.setattr(folder, '_read', lambda content: act())
        assert folder.judge(b'').said != ''

    def test_an_error_that_is_none_of_the_users(self, tmp_path, monkeypatch):
        folder = fuzzing.Folder('rules', tmp_path)
        monkeypatch.setattr(folder, '_read', lambda content: 1 // 0)
        assert folder.judge(b'').kind.startswith('ZeroDivisionError')

    def test_time(self, tmp_path, monkeypatch):
        monkeypatch.setattr(fuzzing, 'MOST_SECONDS', 0.0)
        assert fuzzing.Folder('rules', tmp_path).judge(b'loss > 1').kind == 'time'

    def test_the_folder_is_open(self, tmp_path):
        assert fuzzing.Folder('rules', tmp_path).judge(b'loss > 1') is None


def test_a_finding_is_shrunk(tmp_path, monkeypatch):
    folder = fuzzing.Folder('rules', tmp_path)
    monkeypatch.setattr(folder, '_read', lambda content: 1 // (b'xy' not in content))
    content = b'a' * 50 + b'xy' + b'b' * 50
    assert fuzzing.shrunk(folder, content, folder.judge(content)) == b'xy'
