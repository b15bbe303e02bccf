"""What a trace reports."""

from typing import NamedTuple

MOST_EXAMPLES = 16
"""At most so many examples are named in one finding."""

CHAIN = 8
"""At most so many equations are named that led to a finding."""


class Range(NamedTuple):
    """Summary of an array."""

    name: str  # where it came from: an argument's path, or a primitive
    shape: tuple[int, ...]
    dtype: str
    low: float | None  # of its finite elements; None if there are none
    high: float | None
    nans: int
    infinities: int


class Link(NamedTuple):
    """An equation that led to a finding."""

    op: str
    source: str


class Finding(NamedTuple):
    """Where a bad value was born."""

    kind: str  # of KINDS
    pass_: str  # data, forward, backward or update
    op: str  # the primitive; 'input' where an argument was bad
    source: str  # file:line of the user's code, else of jaxrnn's
    code: str  # that line
    library: str  # file:line within a library, if the operation is in one
    layer: str  # named scopes, else the nearest parameter's path
    iterations: tuple[int, ...]  # of each loop around it, the outermost first
    time_step: int | None
    examples: tuple[int, ...]  # the first MOST_EXAMPLES
    elements: int  # elements born bad
    operands: tuple[Range, ...]
    results: tuple[Range, ...]
    chain: tuple[Link, ...]  # the equations that led there, the latest first
    harmless: bool = False  # whether it reached no output
    devices: tuple[
        dict[str, int], ...
    ] = ()  # in a shard_map: where it was, by mesh axis; the first MOST_EXAMPLES
    detail: str = ''  # what the kind alone doesn't say, as which index was out of range


LEAK, WRITTEN = 'gradient through where', 'written down'
ZERO_BY_ZERO, OUT_OF_RANGE = 'division of zero by zero', 'index out of range'

KINDS = {
    'input': 'an argument of the step was bad',
    'overflow': 'finite operands, infinite result',
    'division by zero': 'a pole: a divisor, or the argument of a logarithm or a root, was 0',
    ZERO_BY_ZERO: 'a divisor and what it divides are both 0',
    OUT_OF_RANGE: 'an index beyond the end of what it is looked up in, where NaN is filled in',
    'invalid argument': 'finite operands for which the operation is not defined',
    'infinities': 'infinite operands that cancel, or meet a 0',
    LEAK: 'a where discarded this value, but its gradient is 0 times an infinity',
    WRITTEN: 'the program itself holds this NaN',
    'loop': 'came out of a loop whose iterations, computed one by one, are finite',
}


class TraceReport(NamedTuple):
    """What a trace found."""

    finding: Finding | None  # the first value that was born bad and reached an output
    harmless: tuple[Finding, ...]
    equations: int  # evaluated
