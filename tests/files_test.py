"""Files that somebody else may have made: whatever is wrong is one line, and nothing outside is read or written."""

import os
import socket

import pytest

from jaxrnn import files
from jaxrnn.types import UserError


def fifo(path):
    os.mkfifo(path)


def link(path):
    target = path.with_name('outside')
    target.write_text('{"kept": 1}')
    path.symlink_to(target)


def dangling(path):
    path.symlink_to(path.with_name('nowhere'))


def listening(path):
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(os.path.relpath(path))  # a socket's path must be short


KINDS = {
    'a directory': lambda path: path.mkdir(),
    'a FIFO': fifo,
    'a link': link,
    'a link ': dangling,
    'a device or socket': listening,
}

TEXTS = {
    'not JSON': (b'{', 'not JSON'),
    'empty': (b'', 'not JSON'),
    'not UTF-8': (b'{"a": "\xff"}', 'byte 7 is not UTF-8'),
    'deep': (b'[' * 100_000, 'more than 16 levels'),
    'deep, closed': (b'[' * 17 + b']' * 17, 'more than 16 levels'),
    'gigantic': (b' ' * (files.MOST_BYTES + 1), 'more than 4,194,304 bytes'),
    'a number of 9,999 digits': (b'[' + b'9' * 9999 + b']', 'not JSON'),
}


@pytest.mark.parametrize('kind', KINDS)
def test_only_a_regular_file_is_opened(kind, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / 'file'
    KINDS[kind](path)
    for act in (
        files.check_regular,
        files.read_json,
        lambda path: files.open_appending(path, anew=True),
        lambda path: files.replacing(path).__enter__(),
    ):
        with pytest.raises(UserError, match=rf'{path}: {kind.strip()} found, a regular file expected'):
            act(path)
    assert {each.name for each in tmp_path.iterdir()} <= {'file', 'outside'}
    assert kind != 'a link' or (tmp_path / 'outside').read_text() == '{"kept": 1}'


@pytest.mark.parametrize('name', TEXTS)
def test_a_damaged_text_is_one_line(name, tmp_path):
    path = tmp_path / 'file'
    content, says = TEXTS[name]
    path.write_bytes(content)
    with pytest.raises(UserError, match=f'{path}: {says}') as raised:
        files.read_json(path)
    assert '\n' not in str(raised.value) and len(str(raised.value)) < 500


def test_a_whole_text_is_read(tmp_path):
    path = tmp_path / 'file'
    path.write_text('{"a": ["]]]}}", "\\"[[[", {"b": null}], "ü": 1}')
    assert files.read_json(path) == {'a': [']]]}}', '"[[[', {'b': None}], 'ü': 1}
    assert files.depth('[{"[": []}]') == 3 and files.depth('"[') == 0
    files.check_regular(path)
    files.check_regular(tmp_path / 'none')


def test_nothing_leads_out_of_a_folder(tmp_path):
    inside = tmp_path / 'run' / '0' / 'state'
    inside.mkdir(parents=True)
    (inside / 'array').write_text('1')
    files.check_within(tmp_path / 'run')
    files.check_within(tmp_path / 'none')
    (inside / 'more').symlink_to(tmp_path)
    with pytest.raises(UserError, match='more: a link found'):
        files.check_within(tmp_path / 'run')
    (tmp_path / 'link').symlink_to(tmp_path / 'run')
    with pytest.raises(UserError, match='link: a link found'):
        files.check_within(tmp_path / 'link')


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / 'file'
    path.write_text('old')
    with pytest.raises(ZeroDivisionError), files.replacing(path) as file:
        file.write(b'half')
        raise ZeroDivisionError
    assert path.read_text() == 'old' and [*tmp_path.iterdir()] == [path]
    with files.replacing(path) as file:
        file.write(b'new')
    assert path.read_text() == 'new' and [*tmp_path.iterdir()] == [path]


def test_what_was_laid_in_the_way_while_writing_is_left(tmp_path):
    path = tmp_path / 'file'
    with pytest.raises(UserError, match='a link found'), files.replacing(path) as file:
        file.write(b'new')
        link(path)
    assert (tmp_path / 'outside').read_text() == '{"kept": 1}'


def test_a_file_is_continued_or_begun_anew(tmp_path):
    path = tmp_path / 'file'
    for text, anew in ((b'a', False), (b'b', False), (b'c', True)):
        with files.open_appending(path, anew=anew) as file:
            file.write(text)
    assert path.read_text() == 'c'
