"""Records in memory and on disk: what was recorded comes back, and what is no record is named."""

import json
import math
import os
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxrnn import UserError, detect
from jaxrnn.detect import rule_language
from jaxrnn.record import record_file, records
from jaxrnn.record.record_file import RecordFile
from jaxrnn.record.records import MISSING, Records, is_missing, series

VALUES = st.one_of(
    st.booleans(),
    st.integers(-(2**63), 2**64 - 1),
    st.floats(width=32),
    st.floats(),
    st.sampled_from(['', 'a message', '0123456789abcdef', 'été\0', 'a text of more than sixteen letters']),
)


@st.composite
def runs(draw):
    """Rows of ascending steps, of fields that come and go."""
    steps = np.cumsum(draw(st.lists(st.integers(1, 3), max_size=12))).tolist()
    names = st.sampled_from(['loss', 'accuracy', 'finite_state', 'digest', 'a', 'b'])
    return [{'step': step, **draw(st.dictionaries(names, VALUES))} for step in steps]


def alike(a, b):
    """The same values of the same types; NaNs are alike."""
    return [{name: (type(v), repr(v)) for name, v in row.items()} for row in a] == [
        {name: (type(v), repr(v)) for name, v in row.items()} for row in b
    ]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(records, 'BLOCK', 4)
    monkeypatch.setattr(record_file, 'BLOCK', 4)
    monkeypatch.setattr(record_file, 'CHUNK', 100)


class TestRecords:
    @given(runs())
    def test_give_their_rows_back(self, rows):
        found = Records.of(rows)
        assert alike(found, rows)
        assert alike([found[place] for place in range(len(rows))], rows)
        assert alike(found[1:4], rows[1:4])
        for step in range(40):
            expected = [row for row in rows if row['step'] == step]
            assert alike(filter(None, [found.at(step)]), expected)
            assert alike(found.between(step, step + 5), [r for r in rows if step <= r['step'] < step + 5])

    @given(runs())
    def test_columns_are_those_of_the_rows(self, rows):
        numbers = [
            {n: v for n, v in row.items() if n in ('step', 'loss') and not isinstance(v, str)} for row in rows
        ]
        columns, expected = Records.of(numbers).columns, series(numbers)
        assert columns.keys() == expected.keys()
        for name, values in columns.items():
            assert values.tobytes() == expected[name].tobytes()

    @given(runs(), runs())
    def test_updated(self, rows, more):
        expected = {row['step']: row for row in rows} | {row['step']: row for row in more}
        assert alike(Records.of(rows).updated(more), [expected[step] for step in sorted(expected)])

    @given(runs(), st.data())
    def test_a_digest_is_of_every_value(self, rows, data):
        same = [dict(row) for row in rows]
        assert Records.of(rows).digest() == Records.of(same).digest()
        if rows:
            data.draw(st.sampled_from(same))['loss'] = 'other'
            assert Records.of(rows).digest() != Records.of(same).digest()

    def test_a_slice_has_the_columns_of_its_rows(self):
        found = Records.of(
            [{'step': 0, 'a': 1.0, 'b': 1}, {'step': 1, 'a': 2.0}, {'step': 2, 'c': 1.0, 'd': 'x'}]
        )
        for first in range(4):
            for stop in range(4):
                assert found[first:stop].columns.keys() == series(list(found)[first:stop]).keys()
        assert not found.between(5, 9).columns

    def test_rows_in_any_order(self):
        found = Records.of([{'step': 2}, {'step': 0}, {'step': 2, 'a': 1}])
        assert list(found) == [{'step': 0}, {'step': 2, 'a': 1}]
        assert not found.contiguous and found[:1].contiguous and Records.of([]).contiguous

    def test_what_is_missing_is_no_nan(self):
        columns = Records.of([{'step': 0}, {'step': 1, 'a': math.nan}, {'step': 2, 'a': 1.0}]).columns
        assert is_missing(columns['a']).tolist() == [True, False, False]
        assert np.isnan(columns['a']).tolist() == [True, True, False]
        assert is_missing(np.array([MISSING, np.inf, np.nan, 0])).tolist() == [True, False, False, False]


class TestRecordFile:
    @settings(max_examples=50)
    @given(runs())
    def test_gives_back_what_was_appended(self, tmp_path_factory, rows):
        path = tmp_path_factory.mktemp('records') / 'records.jsonl'
        rows = [{n: v for n, v in row.items() if v not in ('', 'NaN')} for row in rows]
        writing = RecordFile(path)
        for row in rows:
            writing.append(row)
        writing.close()
        assert alike(RecordFile(path).read(), rows)

    @settings(max_examples=50)
    @given(runs(), st.integers(0, 40))
    def test_keeps_those_before_a_step(self, tmp_path_factory, rows, step):
        path = tmp_path_factory.mktemp('records') / 'records.jsonl'
        lines = [json.dumps(record_file.encoded(row)) + '\n' for row in rows]
        path.write_text(''.join(lines) + '{"step": ')
        dropped = RecordFile(path).keep_before(step)
        assert alike(dropped, [row for row in rows if row['step'] >= step])
        assert path.read_text() == ''.join(lines[: len(rows) - len(dropped)])

    @given(st.sets(st.integers(0, 30)), st.sets(st.integers(0, 30)))
    @settings(max_examples=50)
    def test_inserts(self, tmp_path_factory, there, new):
        path = tmp_path_factory.mktemp('records') / 'records.jsonl'
        path.write_text(''.join(f'{{"step":  {step}}}\n' for step in sorted(there)))
        RecordFile(path).insert({step: {'step': step, 'new': 1} for step in new - there})
        assert [row['step'] for row in RecordFile(path).read()] == sorted(there | new)
        assert path.read_text().count('  ') == len(there), 'lines that were there have not changed'

    def test_none_and_empty(self, tmp_path):
        assert list(RecordFile(tmp_path / 'records.jsonl').read()) == []
        (tmp_path / 'records.jsonl').write_text('')
        assert list(RecordFile(tmp_path / 'records.jsonl').read()) == []


DAMAGED = {
    'not JSON': b'garbage',
    'empty': b'',
    'zeros, as after power loss': bytes(100),
    'not UTF-8': b'{"step": 5, "a\xff": 1}',
    'half of a surrogate pair': b'{"step": 5, "a": "\\ud800"}',
    'a number': b'7',
    'a list': b'[{"step": 5}]',
    'no step': b'{"loss": 1}',
    'a step that is true': b'{"step": true}',
    'a step that is no whole number': b'{"step": 5.0}',
    'a step below zero': b'{"step": -1}',
    'a huge step': b'{"step": 123456789012345678901234567890}',
    'a step again': b'{"step": 4}',
    'a list in it': b'{"step": 5, "loss": [1, 2]}',
    'a null in it': b'{"step": 5, "loss": null}',
    'nested deeply': b'{"step": 5, "loss": ' + b'[' * 100_000 + b']' * 100_000 + b'}',
    'a number of 900 digits': b'{"step": 5, "loss": ' + b'9' * 900 + b'}',
    'an exponent that is too large': b'{"step": 5, "loss": 1e999}',
    'a NaN as Python spells it': b'{"step": 5, "loss": NaN}',
}


@pytest.fixture
def damaged(tmp_path, request):
    path = tmp_path / 'records.jsonl'
    lines = [b'{"step": %d, "loss": 1.5}\n' % step for step in range(10)]
    lines[5] = request.param + b'\n'
    path.write_bytes(b''.join(lines))
    return path


class TestDamagedLines:
    @pytest.mark.parametrize('damaged', DAMAGED.values(), ids=list(DAMAGED), indirect=True)
    def test_each_is_named_and_left_out(self, damaged, caplog):
        with pytest.raises(UserError, match=r'line 6 is not a record \(.{1,200}\); resume the run') as error:
            RecordFile(damaged).read()
        assert len(str(error.value).splitlines()) == 1
        whole = damaged.read_bytes()
        intact = [0, 1, 2, 3, 4, 6, 7, 8, 9]
        assert RecordFile(damaged).read_intact().steps.tolist() == intact
        assert damaged.read_bytes() == whole
        assert RecordFile(damaged).keep_before(8).steps.tolist() == [8, 9]
        assert RecordFile(damaged).read().steps.tolist() == intact[:-2]
        assert (damaged.parent / 'records.damaged.jsonl').read_bytes() == whole
        (said,) = (record.getMessage() for record in caplog.records)
        assert 'line 6 is not a record' in said and 'kept as records.damaged.jsonl' in said

    def test_many_are_said_once(self, tmp_path, caplog):
        path = tmp_path / 'records.jsonl'
        path.write_text('x\n' * 20 + '{"step": 3}\n')
        assert RecordFile(path).keep_before(9).steps.tolist() == []
        assert 'line 1 is not a record (not JSON' in caplog.text and 'and 19 more' in caplog.text
        assert path.read_text() == '{"step": 3}\n'

    def test_a_line_without_end(self, tmp_path, monkeypatch):
        monkeypatch.setattr(record_file, 'MOST_LINE', 1000)
        path = tmp_path / 'records.jsonl'
        path.write_text('{"step": 0}\n{"step": 1, "a": "' + 'a' * 2000)
        with pytest.raises(UserError, match='a line of more than 1,000 bytes'):
            RecordFile(path).read()

    def test_a_field_of_its_own_in_each_row(self, tmp_path, monkeypatch):
        """Columns would need the square of the file's size."""
        monkeypatch.setattr(record_file, 'FREE_CELLS', 100_000)
        path = tmp_path / 'records.jsonl'
        path.write_text(''.join(f'{{"step": {step}, "a{step}": 1}}\n' for step in range(3000)))
        tracemalloc.start()
        with pytest.raises(UserError, match='fields found, of which each row has few'):
            RecordFile(path).read()
        assert tracemalloc.get_traced_memory()[1] < 20e6
        tracemalloc.stop()

    @pytest.mark.parametrize('made', ['link', 'directory', 'fifo'])
    def test_what_is_no_file(self, tmp_path, made):
        path = tmp_path / 'records.jsonl'
        if made == 'link':
            (tmp_path / 'other').write_text('{"step": 0}\n')
            path.symlink_to(tmp_path / 'other')
        elif made == 'directory':
            path.mkdir()
        else:
            os.mkfifo(path)
        with pytest.raises(UserError, match='a regular file expected'):
            RecordFile(path).read()


class TestFieldsThatComeAndGo:
    """A field that some records lack, as a metric that was added on resuming, is not a number that isn't finite."""

    @pytest.mark.parametrize('late', ['loss', 'accuracy', 'finite_grads', 'note'])
    @pytest.mark.parametrize('comes', [True, False])
    def test_is_no_symptom(self, late, comes):
        rows = [{'step': s, 'loss': 1 / (1 + s), 'finite_state': True} for s in range(60)]
        for row in rows:
            if (row['step'] >= 30) == comes:
                row[late] = True if late.startswith('finite') else 0.5 / (1 + row['step'])
            else:
                row.pop(late, None)
        columns = Records.of(rows).columns
        assert detect.symptoms(columns) == []
        for rule in ('not all_finite', 'not sound', f'not finite({late})'):
            assert not rule_language.holds(rule_language.parse(rule), columns).any()

    def test_a_nan_beside_it_is_one(self):
        rows = [{'step': s, 'loss': 1.0} for s in range(40)] + [{'step': 40, 'loss': math.nan, 'new': 1.0}]
        assert [(s.kind, s.step) for s in detect.symptoms(Records.of(rows).columns)] == [('nonfinite', 40)]


def naive(rule: str, columns) -> list[bool]:
    """Where it holds, one step at a time, from the steps that it says it needs."""
    parsed = rule_language.parse(rule)
    found = []
    for step in range(columns['step'].size):
        part = {n: v[max(step - parsed.lookback, 0) : step + 1] for n, v in columns.items()}
        with np.errstate(all='ignore'):
            found.append(bool(np.broadcast_to(parsed.evaluate(part), part['step'].shape)[-1]))
    return found


@given(
    st.lists(st.sampled_from([0.1, 1.0, 1.1, 0.9, 4.0, 100.0, math.nan]), min_size=20, max_size=80),
    st.sampled_from(
        [
            'loss > 2 and max(loss, 3) < 3 and median(loss, 17) < 1.05',
            'loss > 2 or median(loss, 17) > 1 or loss < prev(loss, 2) and not finite(loss)',
            'not (loss > 1 and (step > 40 or mean(loss, 20) > 2)) and smooth(loss, 5) > prev(smooth(loss, 5), 9)',
            'step < 30 and False or True and loss > 3',
        ]
    ),
    st.integers(1, 40),
)
def test_a_rule_over_blocks_is_the_rule_at_each_step(losses, rule, block):
    columns = {'step': np.arange(len(losses), dtype=float), 'loss': np.array(losses)}
    before, rule_language.BLOCK = rule_language.BLOCK, block
    try:
        found = rule_language.holds(rule_language.parse(rule), columns)
    finally:
        rule_language.BLOCK = before
    assert found.tolist() == naive(rule, columns)
