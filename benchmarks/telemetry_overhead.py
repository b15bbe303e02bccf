"""What do records and digests cost a train step at its real size?

    python benchmarks/telemetry_overhead.py --network=lstm --repeats=30

Four compilations of the same step, interleaved: bare (state and loss alone come out), recorded without the signals of
the state before and after it (`record.motion`), recorded, recorded with the digest of the state.
"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).parent.parent)

import jax

from benchmarks import side_by_side
from benchmarks.random_words import dataset
from jaxrnn.cli import common
from jaxrnn.record import telemetry
from jaxrnn.words import train


def main(arguments: list[str]) -> int:
    del arguments
    program = train.make_program(side_by_side.configuration(), dataset())

    def bare(state, batch):
        state, record = program.step(state, batch)
        return state, record['loss']

    observed = telemetry.instrument(program.step)
    quiet = telemetry.InstrumentedStep(program.step, checks=False, signals=False)
    variants = {
        'bare': jax.jit(bare, donate_argnums=0),
        'record without signals': lambda state, batch: quiet(state, batch, False),
        'record': lambda state, batch: observed(state, batch, False),
        'record and digest': lambda state, batch: observed(state, batch, True),
    }
    return side_by_side.compare(variants, {name: program.init() for name in variants}, program.batch_at)


side_by_side.define_flags(repeats=30)

if __name__ == '__main__':
    common.main(main, __doc__)
