"""What a person reads, letter for letter."""

import io

import pytest
from rich.console import Console

from jaxrnn import report, trace
from jaxrnn.bisect import inspection
from jaxrnn.diagnosis import Cause, Diagnosis, Replay, Symptom
from jaxrnn.experiment.mechanisms import Mechanism
from jaxrnn.experiment.outcome import Beginning, Change, ExperimentReport, Outcome
from jaxrnn.experiment.window import Window
from jaxrnn.report import steps
from jaxrnn.trace import Pair

WORDS = ['river', 'stone', 'bird']


def shown(renderable, width=80) -> str:
    console = Console(file=io.StringIO(), width=width)
    console.print(renderable)
    return '\n'.join(line.rstrip() for line in console.file.getvalue().splitlines())


def change(**other) -> trace.Comparison:
    return trace.Comparison(
        **{
            'scores': {'loss': (0.5, 0.6, 2.0), 'accuracy': (1.0, 1.0, 0.25)},
            'by_batch': False,
            'layers': (trace.Layer('state/params/cell/kernel', Pair(1, 3), Pair(0.1, 0.2), Pair(2, 4), 0.8),),
            'gates': (trace.Saturation('cell/forget gate', 'logistic', 'a.py:7', Pair(0.1, 0.5), 4),),
            'time_steps': (trace.TimeStepGradient('cell', 2, Pair(0.01, 0.2), 0.9),),
            'examples': (
                trace.Example(1, Pair(0.5, 5), 0.7, 0.6),
                trace.Example(0, Pair(0.5, 1.1), 0.3, 0.4),
            ),
            'additive': True,
            'leaps': (trace.Leap('backward', 'mul', 'a.py:9', 'a * b', 'cell', Pair(1, 8), 2, (1,)),),
            'absurd': None,
        }
        | other
    )


INSPECTED = inspection.Inspection(12, None, change(), 10)

CHANGED = """
step 12 against step 10: loss 0.5 → 2, 7 % by the batch, 93 % by the state

 state  batch  loss  accuracy
 ────────────────────────────
 10     10      0.5         1
 10     12      0.6         1
 12     12        2      0.25


 parameter    of the change  gradient norm  update / parameter
 ─────────────────────────────────────────────────────────────
 cell/kernel           80 %          1 → 3         0.05 → 0.05


 gate              by        saturated  most at time step
 ────────────────────────────────────────────────────────
 cell/forget gate  logistic  0.1 → 0.5                  4


 backward through  time step  of its change  gradient norm
 ─────────────────────────────────────────────────────────
 cell                      2           90 %     0.01 → 0.2


 example  word   of the change       loss  of the gradient
 ─────────────────────────────────────────────────────────
       1  stone           70 %    0.5 → 5             60 %
       0  river           30 %  0.5 → 1.1             40 %


 grew most     at      times  largest
 ────────────────────────────────────
 backward mul  a.py:9      8    1 → 8
"""


def test_a_change():
    assert shown(report.render_inspection(INSPECTED, WORDS)).strip() == CHANGED.strip()


IN_SHORT = """
spike at step 12: the loss leapt far above its trailing median
proven: 3 steps replayed from 1 checkpoint, bit for bit as recorded

step 12 against step 10: loss 0.5 → 2, 7 % by the batch, 93 % by the state
  parameters: cell/kernel 80 %
  saturated: cell/forget gate 0.1 → 0.5 (most at time step 4)
  backward: cell, most at time step 2, 0.01 → 0.2
  half of it by 1 of 2 examples: stone
checkify: found nothing


 step  loss
 ──────────
   12     2

words of the batch of step 12: river stone bird
"""


def test_a_bisect_of_a_finite_symptom():
    diagnosis = Diagnosis(
        symptom=Symptom('spike', 12),
        first_bad_step=12,
        where=INSPECTED.where(),
        checks=({'name': 'checkify', 'ok': True, 'value': 0.0, 'why': 'found nothing'},),
        replay=Replay(True, None, 3, 1),
    )
    screen = shown(report.render_bisection(diagnosis, [{'step': 12, 'loss': 2.0}], WORDS, INSPECTED))
    assert screen.strip() == IN_SHORT.strip()


def test_what_is_absurd_and_what_depends_on_one_another_is_said():
    leap = trace.Leap('data', 'input', 'batch/targets', '', 'batch/targets', Pair(1, 1e9), None, (2,))
    screen = shown(
        report.render_inspection(INSPECTED._replace(comparison=change(absurd=leap, additive=False)), WORDS)
    )
    assert 'absurd: largest element 1 → 1e+09; data: batch/targets, example 2 (bird)' in screen
    assert 'depend on one another' in screen


def test_a_change_without_a_loss_or_examples():
    bare = change(scores={'size': (1.0, 1.0, 2.0)}, layers=(), gates=(), time_steps=(), examples=(), leaps=())
    screen = shown(report.render_inspection(INSPECTED._replace(comparison=bare)))
    assert 'records without a loss' in screen and 'size' in screen


FINDING = trace.Finding(
    kind='overflow',
    pass_='forward',
    op='exp',
    source='a.py:3',
    code='jnp.exp(x)',
    library='',
    layer='cell',
    iterations=(4,),
    time_step=4,
    examples=(1,),
    elements=1,
    operands=(trace.Range('mul', (3, 2), 'float32', -1.0, 100.0, 0, 0),),
    results=(trace.Range('exp', (3, 2), 'float32', 0.37, 2.0, 0, 1),),
    chain=(trace.Link('mul', 'a.py:2'), trace.Link('add', 'a.py:2'), trace.Link('mul', 'a.py:1')),
    devices=({'data': 1, 'model': 0},),
)

STORY = """
step 12: overflow
finite operands, infinite result
forward pass: exp at a.py:3, layer cell, time step 4, example 1 (stone)
  jnp.exp(x)
  born on (data 1, model 0)

          from  shape  type     lowest  highest  NaN  infinite
 ─────────────────────────────────────────────────────────────
 operand  mul   3x2    float32      -1      100
 result   exp   3x2    float32    0.37        2              1

computed just before: mul, add at a.py:2; mul at a.py:1
7 equations evaluated
"""


def test_a_finding():
    inspected = inspection.Inspection(12, trace.TraceReport(FINDING, (), 7), None, None)
    assert shown(report.render_inspection(inspected, WORDS)).strip() == STORY.strip()
    told = report.inspection_json(inspected, WORDS)['finding']
    assert told['chain'][0] == {'op': 'mul', 'source': 'a.py:2'}
    assert told['devices'] == [{'data': 1, 'model': 0}] and told['words'] == ['stone']


PRECISION = trace.PrecisionReport(
    trace.PrecisionLoss('forward', 'sub', 'a.py:3', 'a - b', 'norm', 4, (1,), 2.625, 2.1e-7),
    {'state/w': 1.3e-5, 'record/loss': 2.625},
    ('custom_linear_solve',),
)

BESIDE_FLOAT64 = """
digits lost, error 2.1e-07 → 2.62; forward pass: sub at a.py:3, layer norm, time
step 4, example 1 (stone)
  a - b

 record or update  error beside float64
 ──────────────────────────────────────
 record/loss                       2.62
 state/w                        1.3e-05

not computed in float64: custom_linear_solve
"""


def test_what_float64_says():
    screen = shown(
        report.render_inspection(inspection.Inspection(12, None, None, None, precision=PRECISION), WORDS)
    )
    assert screen.strip() == BESIDE_FLOAT64.strip()
    nothing = trace.PrecisionReport(None, {'record/loss': 2e-7}, ())
    screen = shown(
        report.render_inspection(inspection.Inspection(12, None, None, None, precision=nothing), WORDS)
    )
    assert 'lost' not in screen and '2e-07' in screen


def test_what_float64_says_as_json():
    told = report.inspection_json(inspection.Inspection(12, None, None, None, precision=PRECISION), WORDS)[
        'float64'
    ]
    assert told['lost'] == {
        'pass': 'forward',
        'op': 'sub',
        'source': 'a.py:3',
        'layer': 'norm',
        'time_step': 4,
        'examples': [1],
        'words': ['stone'],
        'code': 'a - b',
        'error': 2.625,
        'of_operands': 2.1e-7,
    }
    assert told['outputs'] == PRECISION.outputs and told['restarted'] == ['custom_linear_solve']
    assert report.inspection_json(INSPECTED)['float64'] is None


@pytest.mark.parametrize('words', [WORDS, []])
def test_json_has_no_nan(words):
    example = trace.Example(1, Pair(0.5, float('inf')), float('nan'), float('nan'))
    told = report.inspection_json(INSPECTED._replace(comparison=change(examples=(example,))), words)
    assert told['change']['examples'][0] == {
        'place': 1,
        'loss': {'before': 0.5, 'now': None},
        'share': None,
        'gradient': None,
        'word': 'stone' if words else '',
    }
    assert told['change']['leaps'][0]['pass'] == 'backward' and told['finding'] is None
    assert told['against'] == 10 and told['step'] == 12


def outcome(name, verdict, symptom=None, *, loss=0.25, reached=63, flags='', last=None, margin=None):
    made = Change(name, 'optimiser', lambda: None, flags, 'because')
    return Outcome(made, verdict, symptom, loss, reached, last, margin)


REPORT = ExperimentReport(
    Window(0, 12, 63),
    outcome('none', 'unchanged', Symptom('spike', 12), reached=13),
    True,
    outcome('nudge', 'unchanged', Symptom('spike', 13), reached=14),
    (
        outcome(
            'half the learning rate', 'averted', flags='--learning_rate=0.5', reached=200, last=9, margin=4
        ),
        outcome('update clipping', 'averted', margin=1),
        outcome('other batches', 'averted'),
        outcome(
            'sigmoid gates',
            'worse',
            Symptom('nonfinite', 3),
            loss=float('nan'),
            reached=4,
            flags='--gate=sigmoid',
        ),
    ),
    outcome('other batches', 'averted'),
    (Change('ZClip', 'optimiser', lambda: None),),
    300,
)

REMEDIES = tuple(
    {
        'name': outcome.change.name,
        'flags': outcome.change.flags,
        'outcome': outcome.verdict,
        'loss_at_horizon': outcome.loss,
        'point_of_no_return': outcome.point_of_no_return,
    }
    for outcome in REPORT.outcomes
)

DIAGNOSED = """
spike at step 12: the loss leapt far above its trailing median
it began at step 7, and was recognised at step 12
step 12 against step 10: loss 0.5 → 2, 7 % by the batch, 93 % by the state
  parameters: cell/kernel 80 %
  saturated: cell/forget gate 0.1 → 0.5 (most at time step 4)
  backward: cell, most at time step 2, 0.01 → 0.2
  half of it by 1 of 2 examples: stone

cause: optimiser: half the learning rate averts it
do: train again with --learning_rate=0.5 (because)
it still averts the symptom when it is switched on at step 9

the steps from 0 on, again, each under one change

 change                  outcome                        up to  loss
 ──────────────────────────────────────────────────────────────────
 half the learning rate  averted, even at 4 x the rate    199  0.25
 update clipping         averted, not at 2 x the rate      62  0.25
 other batches           averted                           62  0.25
 sigmoid gates           worse, nonfinite at 3              3   nan

without a change: spike at 12; nudged by a millionth: unchanged, spike at 13;
one chosen at random (other batches): averted; the budget did not reach to:
ZClip

 ok data is finite: all of 28 numbers are
 no predictions vary: their variance is so small that there would be no saying
    which word it was that the network had been given
  ? training set can be learnt: not tried
proven: 303 steps replayed from 1 checkpoint, bit for bit as recorded
"""


def test_a_diagnosis():
    names = {'data is finite': True, 'predictions vary': False, 'training set can be learnt': None}
    why = {
        'data is finite': 'all of 28 numbers are',
        'predictions vary': 'their variance is so small that there would be no saying which word it was that the '
        'network had been given',
        'training set can be learnt': 'not tried',
    }
    diagnosis = Diagnosis(
        symptom=Symptom('spike', 12),
        first_bad_step=12,
        onset_step=7,
        where=INSPECTED.where(),
        cause=Cause('optimiser', 'half the learning rate averts it'),
        remedies=REMEDIES,
        checks=tuple({'name': n, 'ok': ok, 'value': 0.0, 'why': why[n]} for n, ok in names.items()),
        replay=Replay(True, None, 303, 1),
    )
    assert shown(report.render_diagnosis(diagnosis, REPORT, INSPECTED, WORDS)).strip() == DIAGNOSED.strip()
    assert report.advised_flags(diagnosis) == '--learning_rate=0.5'


def test_what_the_best_makes_of_the_beginning_is_said():
    diagnosis = Diagnosis(symptom=Symptom('spike', 12), cause=Cause('optimiser', 'so'), remedies=REMEDIES)

    def said(beginning):
        screen = shown(report.render_diagnosis(diagnosis, REPORT._replace(beginning=beginning)))
        return ' '.join(screen.split())

    slow = Beginning(500, 0.0087, 0.0012, None)
    known = 'on from the start it has a loss of 0.0087 by step 500; the run had 0.0012'
    assert f'{known}: it holds up the beginning' in said(slow)
    for loss, own, held_up in (
        (0.0023, 0.0012, False), (0.0025, 0.0012, True), (float('nan'), 0.0012, True), (-3.0, -8.0, False),
    ):  # fmt: skip
        assert ('it holds up' in said(slow._replace(loss=loss, own=own))) == held_up
    assert 'by step 500, and shows: diverged; the run' in said(
        slow._replace(symptom=Symptom('diverged', 400))
    )
    assert 'on from the start' not in said(None)


def test_shorter_steps_alone_are_not_said_to_help_for_good():
    """Unless it is a rate that decays, or one that was found to be too high."""

    def advised(**more):
        first, *others = REPORT.outcomes
        told = REPORT._replace(outcomes=(first._replace(change=first.change._replace(**more)), *others))
        diagnosis = Diagnosis(symptom=Symptom('spike', 12), cause=Cause('optimiser', 'so'), remedies=REMEDIES)
        screen = shown(report.render_diagnosis(diagnosis, told))
        return '(because; it may come later all the same)' in ' '.join(screen.split())

    assert advised(shortens=2) and not advised(shortens=0)
    assert not advised(shortens=2, decays=True)
    assert not advised(shortens=2, removes=Mechanism('excessive learning rate', ''))


def test_nothing_is_advised_where_no_flag_averts():
    told = REPORT._replace(outcomes=REPORT.outcomes[2:])
    undecided = Diagnosis(
        symptom=Symptom('spike', 12),
        first_bad_step=12,
        cause=Cause('none', 'undecided: so'),
        remedies=REMEDIES[2:],
    )
    screen = shown(report.render_diagnosis(undecided, told))
    assert report.advised_flags(undecided) == '' and 'do:' not in screen and 'undecided: so' in screen


def test_data_is_to_be_mended():
    where = {
        'pass': 'data',
        'op': 'input',
        'source': 'batch/x',
        'layer': '',
        'time_step': None,
        'examples': [],
    }
    diagnosis = Diagnosis(
        symptom=Symptom('nonfinite', 12), first_bad_step=12, where={**where, 'words': []}, cause=Cause('data', 'so'),
        remedies=({**REMEDIES[0], 'name': 'skip what is not finite', 'flags': '', 'point_of_no_return': None},),
    )  # fmt: skip
    screen = shown(report.render_diagnosis(diagnosis, None))
    assert 'do: look at the batch of step 12 (batch/x), and mend the data\n' in screen
    assert 'else: skip what is not finite averts it' in screen


def test_what_can_not_be_reproduced_is_advised_on_without_experiments():
    diagnosis = Diagnosis(
        symptom=Symptom('spike', 12),
        cause=Cause('nondeterminism', 'not reproducible from step 9 on: on one thread they agree'),
        remedies=({**REMEDIES[0], 'name': 'one thread', 'flags': '--threads=1', 'point_of_no_return': None},),
        replay=Replay(False, 9, 3, 1),
    )
    screen = shown(report.render_diagnosis(diagnosis, None))
    assert 'cause: nondeterminism\ndo: train again with --threads=1\n' in screen
    assert report.advised_flags(diagnosis) == '--threads=1'


@pytest.mark.parametrize('width', [40, 60])
def test_a_narrow_terminal(width):
    for screen in (
        report.render_diagnosis(
            Diagnosis(symptom=Symptom('spike', 12), remedies=REMEDIES), REPORT, INSPECTED, WORDS
        ),
        report.render_inspection(INSPECTED, WORDS),
    ):
        lines = shown(screen, width).splitlines()
        assert max(map(len, lines)) <= width and 'stone' in ' '.join(lines)


def test_a_healthy_diagnosis():
    healthy = Diagnosis(cause=Cause('none', 'no rule holds at any step'))
    screen = shown(report.render_diagnosis(healthy, None))
    assert (
        'healthy: no rule holds at any step' in screen
        and 'nothing replayed' in screen
        and 'do:' not in screen
    )


NOWHERE = {
    'pass': 'data',
    'op': '',
    'source': '',
    'layer': '',
    'time_step': None,
    'examples': [],
    'words': [],
}


@pytest.mark.parametrize(
    'known, said',
    [
        ({}, 'data'),
        ({'examples': [5]}, 'data: example 5'),
        ({'op': 'input', 'source': 'batch/y', 'examples': [5, 6]}, 'data: batch/y, examples 5, 6'),
        ({'pass': 'update', 'layer': 'state/w', 'time_step': 3}, 'update pass: layer state/w, time step 3'),
        ({'pass': 'update'}, 'update pass'),
        ({'pass': 'forward', 'op': 'exp', 'source': 'a.py:3'}, 'forward pass: exp at a.py:3'),
        ({'pass': 'forward', 'op': 'exp', 'layer': 'cell'}, 'forward pass: exp, layer cell'),
        ({'pass': 'forward', 'source': 'a.py:3'}, 'forward pass: a.py:3'),
        ({'pass': '', 'op': 'exp'}, 'exp'),
    ],
)
def test_a_place_has_no_word_of_what_is_not_known(known, said):
    assert steps.place(NOWHERE | known).plain == said
