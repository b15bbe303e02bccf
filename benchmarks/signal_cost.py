"""What do the early-warning signals cost a train step at its real size?

    python benchmarks/signal_cost.py --network=lstm --repeats=60

Both compilations of the same step, interleaved: recorded as by default, and with --signals; and the first again, as
what two runs of the same program differ by is the least that can be measured.
"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).parent.parent)

import functools

from benchmarks import side_by_side
from benchmarks.random_words import dataset
from jaxrnn.cli import common
from jaxrnn.record import telemetry
from jaxrnn.words import train


def main(arguments: list[str]) -> int:
    del arguments
    programs = {
        name: train.make_program(side_by_side.configuration(signals=signals), dataset())
        for name, signals in (('record', False), ('record and signals', True), ('record again', False))
    }
    return side_by_side.compare(
        {name: functools.partial(_undigested, telemetry.instrument(p.step)) for name, p in programs.items()},
        {name: program.init() for name, program in programs.items()},
        programs['record'].batch_at,
    )


def _undigested(observed: telemetry.CompiledStep, state, batch):
    return observed(state, batch, False)


side_by_side.define_flags(repeats=60)

if __name__ == '__main__':
    common.main(main, __doc__)
