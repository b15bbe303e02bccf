"""All programs, by name."""

from benchmarks.foreign import held_out, linen_programs, module_programs, optimiser_programs, plain_programs
from benchmarks.foreign.common import Program

ALL: dict[str, Program] = {
    program.name: program
    for room in (linen_programs, module_programs, plain_programs, held_out, optimiser_programs)
    for program in room.PROGRAMS
}
