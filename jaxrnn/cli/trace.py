"""Evaluates one step of a run equation by equation: where a NaN was born, what changed.

    jaxrnn trace --run_dir=runs/first --step=1302
    jaxrnn trace --run_dir=runs/first --step=1302 --against=1200

Of the first NaN or infinity it names the operation with its source line, the pass, the layer, the time step and the
words, and what went in and came out; what was bad but reached no output is listed as harmless. A step in which all is
finite is held against an earlier one: which parameters, gates, time steps, words and operations have most of the
change. --float64 names the first operation that loses its digits.

jaxrnn bisect does the same for the step it names.
"""

from absl import flags

from jaxrnn.cli import common, invocation


def define_flags() -> None:
    common.define_run('The directory of the run.')
    common.define_source()
    common.define('trace', 'step', None, 'The step to look into.', at_least=0, at_most=common.MOST)
    common.define(
        'trace',
        'against',
        None,
        'The earlier step to hold a finite one against; else the last before it whose loss was no more than its '
        'median.',
        at_least=0,
        at_most=common.MOST,
    )
    common.define('trace', 'checkify', False, "Ask JAX's own checkify.float_checks, too.")
    common.define('trace', 'debug_nans', False, "Ask JAX's own jax_debug_nans, too.")
    common.define(
        'trace', 'float64', False, 'Compute the step in float64, too, and name what loses its digits.'
    )


def main(arguments: list[str]) -> int:
    from jaxrnn import environment
    from jaxrnn.bisect import inspection
    from jaxrnn.cli import showing
    from jaxrnn.report import inspection_json, render_inspection
    from jaxrnn.types import UserError
    from jaxrnn.words import investigation

    if arguments:
        raise UserError(f'{arguments[0]!r} found, flags only expected; see --help')
    directory, step = common.run_dir(), flags.FLAGS.step
    environment.keep_compiled()
    if step is None:
        raise UserError(
            '--step: nothing found, the number of a step expected; '
            f'{invocation.of("bisect").typed} finds the first bad one'
        )
    screens = [name for name in inspection.SCREENS if flags.FLAGS[name].value]
    with showing.Progressing():
        inspected, words = investigation.inspect_run(
            directory,
            step,
            against=flags.FLAGS.against,
            screens=screens,
            float64=flags.FLAGS.float64,
            source=common.source(),
        )
    if flags.FLAGS.json:
        common.print_json(inspection_json(inspected, words))
    else:
        common.console().print(render_inspection(inspected, words))
    assert inspected.trace_report is not None
    return common.HEALTHY if inspected.trace_report.finding is None else common.DIVERGED
