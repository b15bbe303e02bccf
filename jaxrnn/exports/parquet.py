"""One file of Apache Parquet: columns of their own types, under their own names whatever is in them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from jaxrnn.exports import Recorded
from jaxrnn.record.records import ABSENT, is_missing, values_of

ROWS = 1 << 16
"""Of a row group, of which one at a time is in memory."""

SMALLEST, LARGEST, LARGEST_UNSIGNED = -(2**63), 2**63 - 1, 2**64 - 1
"""Of the integers that Parquet has."""


def write(run: Recorded, path: Path) -> None:
    """What is missing is null, and a NaN is a NaN."""
    schema = pa.schema([(name, _type(values)) for name, values in run.records.stored.items()])
    with pq.ParquetWriter(path, schema) as file:
        for block in run.records.blocks(ROWS):
            columns = [
                _array(values, kind) for values, kind in zip(block.stored.values(), schema.types, strict=True)
            ]
            file.write_batch(pa.record_batch(columns, schema=schema))


def _type(values: np.ndarray) -> pa.DataType:
    """That holds each value of a column as it is; of numbers of several types float64, and text where one is text."""
    known = {'f': pa.float64(), 'i': pa.int64(), 'b': pa.bool_(), 'S': pa.string()}
    if values.dtype.kind in known:
        return known[values.dtype.kind]
    there = [value for value in values if value is not ABSENT]
    kinds = set(map(type, there))
    if kinds == {bool}:
        return pa.bool_()
    if kinds == {int}:
        return _integers(min(there), max(there))
    return pa.string() if str in kinds else pa.float64()


def _integers(least: int, most: int) -> pa.DataType:
    if least >= SMALLEST and most <= LARGEST:
        return pa.int64()
    return pa.uint64() if least >= 0 and most <= LARGEST_UNSIGNED else pa.float64()


def _array(values: np.ndarray, kind: pa.DataType) -> pa.Array:
    if values.dtype == np.float64:
        return pa.array(values, kind, mask=is_missing(values))
    if values.dtype.kind in 'ib':
        return pa.array(values, kind)
    make = _MADE.get(kind, _as_it_is)
    return pa.array([None if value is ABSENT else make(value) for value in values_of(values)], kind)


def _as_text(value: Any) -> str:
    return value if isinstance(value, str) else repr(value)


def _as_it_is(value: Any) -> Any:
    return value


_MADE: dict[pa.DataType, Callable[[Any], Any]] = {pa.string(): _as_text, pa.float64(): float}
