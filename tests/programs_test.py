"""Compiled programs that are kept: with their user alone, in order, and not for ever."""

import os
import stat
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from jaxrnn import environment, programs
from jaxrnn.words.data import corpus

USED = """
import sys, warnings
import jax, jax.numpy as jnp
from jaxrnn import environment
environment.keep_compiled()
with warnings.catch_warnings(record=True) as seen:
    warnings.simplefilter('always')
    print(float(jax.jit(lambda x: jnp.sin(x) @ x)(jnp.arange(64.0))))
print(jax.config.values['jax_compilation_cache_dir'] or 'none', len(seen))
"""


def used(home) -> tuple[str, str, int]:
    """The number that a program computes, where it is kept, and how often JAX complained."""
    environ = {
        **os.environ,
        'JAX_COMPILATION_CACHE_DIR': '',
        'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0',
        'JAXRNN_CACHE': '',
        'XDG_CACHE_HOME': str(home),
        'PYTHONPATH': str(Path(__file__).parent.parent),
    }
    done = subprocess.run([sys.executable, '-c', USED], env=environ, capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == '', done.stderr
    number, told = done.stdout.splitlines()
    folder, count = told.split()
    return number, folder, int(count)


def entries(home) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in home.rglob('*-cache')}


def test_a_damaged_program_is_compiled_again(tmp_path):
    """Neither run nor complained of, whatever JAX packs it with; so is one whose process was killed while it wrote."""
    number, folder, _ = used(tmp_path)
    whole = entries(tmp_path)
    assert whole and all(path.parent == Path(folder) for path in whole)
    for path, content in whole.items():
        path.write_bytes(content[:100] + bytes([content[100] ^ 1]) + content[101:])
    (Path(folder) / 'half-cache').write_bytes(b'half')
    assert used(tmp_path) == (number, folder, 0)
    assert entries(tmp_path).keys() == whole.keys()
    before = {path: path.stat().st_mtime_ns for path in whole}
    assert used(tmp_path) == (number, folder, 0)
    assert {path: path.stat().st_mtime_ns for path in whole} == before


def test_only_its_user_has_the_folder(tmp_path):
    folder = programs.folder(tmp_path / 'jaxrnn' / 'compiled', 'here')
    assert folder == tmp_path / 'jaxrnn' / 'compiled' / 'here'
    for path in (folder, folder.parent):
        assert stat.S_IMODE(path.stat().st_mode) == 0o700


def test_a_user_whose_files_are_open_to_their_group_has_one(tmp_path):
    """As many systems have it: umask 002. The trained vectors beside it need be no secret, but nobody may put another
    folder there."""
    before = os.umask(0o002)
    try:
        corpus._keep(
            str(tmp_path / 'vectors' / 'kept.npz'), corpus.TrainedVectors(('a',), np.ones((1, 2)), 1)
        )
        for home in ('home', 'vectors'):
            assert programs.folder(tmp_path / home / 'compiled', 'here')
            assert not (tmp_path / home).stat().st_mode & 0o022
    finally:
        os.umask(before)


@pytest.mark.parametrize('mode', [0o701, 0o710, 0o770, 0o777])
@pytest.mark.parametrize('which', ['compiled', 'compiled/here'])
def test_a_folder_open_to_others_is_not_used(which, mode, tmp_path):
    assert programs.folder(tmp_path / 'compiled', 'here')
    (tmp_path / which).chmod(mode)
    assert programs.folder(tmp_path / 'compiled', 'here') is None


def test_a_folder_in_one_open_to_others_is_not_used(tmp_path):
    """They could put another in its place."""
    (tmp_path / 'home').mkdir()
    (tmp_path / 'home').chmod(0o777)
    assert programs.folder(tmp_path / 'home' / 'compiled', 'here') is None


def test_a_link_to_a_folder_is_not_used(tmp_path):
    (tmp_path / 'elsewhere').mkdir(mode=0o700)
    (tmp_path / 'compiled').symlink_to(tmp_path / 'elsewhere')
    assert programs.folder(tmp_path / 'compiled', 'here') is None


def test_a_folder_of_somebody_else_is_not_used(tmp_path, monkeypatch):
    assert programs.folder(tmp_path / 'compiled', 'here')
    monkeypatch.setattr(os, 'geteuid', lambda: os.getuid() + 1)
    assert programs.folder(tmp_path / 'compiled', 'here') is None


def test_without_a_home_nothing_is_kept(tmp_path):
    (tmp_path / 'file').write_text('')
    assert programs.folder(tmp_path / 'file' / 'compiled', 'here') is None
    assert used('/proc/nowhere')[1:] == ('none', 0)


def test_what_was_kept_first_goes_first(tmp_path, monkeypatch):
    monkeypatch.setattr(programs, 'MOST_BYTES', 1000)
    for name, age in (('a', 3), ('b', 1), ('c', 2)):
        (folder := programs.folder(tmp_path, name)) or pytest.fail()
        entry = folder / f'{name}-cache'
        entry.write_bytes(b'x' * 400)
        os.utime(entry, (1_000_000 - age, 1_000_000 - age))
        programs._sum_up(folder)
    assert programs.folder(tmp_path, 'b')
    assert {path.name for path in tmp_path.rglob('*-cache*')} == {'b-cache', 'b-cache.sha256'}


def test_the_home_of_caches(monkeypatch):
    for name in ('JAXRNN_CACHE', 'XDG_CACHE_HOME'):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv('HOME', '/h')
    assert environment.cache_folder() == Path('/h/.cache/jaxrnn')
    monkeypatch.setenv('XDG_CACHE_HOME', '/x')
    assert environment.cache_folder() == Path('/x/jaxrnn')
    monkeypatch.setenv('JAXRNN_CACHE', '/j')
    assert environment.cache_folder() == Path('/j')
