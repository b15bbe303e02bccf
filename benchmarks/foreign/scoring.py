"""A planted run is recorded and diagnosed as its owner would, and what is said is compared with what is true."""

import dataclasses
import linecache
import tempfile
import time
import traceback
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jaxrnn
from benchmarks.foreign.planting import Planted, Truth

HERE = Path(__file__).parent


@dataclasses.dataclass
class Score:
    """'' where there is nothing to judge."""

    program: str
    fault: str
    at: int
    size: str
    steps: int
    detected: str = ''  # right, missed, false alarm, silent (which is as right)
    step: str = ''  # exact, off, missed
    place: str = ''  # right, unknown, wrong
    cause: str = ''  # right, undecided, wrong
    same: bool = True  # the replay came out as recorded
    error: str = ''  # of whatever left the debugger
    refused: bool = False  # it was one for the user
    said: str = ''
    truth: str = ''
    seconds: float = 0.0

    @property
    def missed(self) -> bool:
        wrong = {'missed', 'false alarm', 'off', 'wrong'}
        return (
            bool(self.error)
            or not self.same
            or bool({self.detected, self.step, self.place, self.cause} & wrong)
        )


def diagnosed(planted: Planted, **options: Any):
    """As the README says. Where it is asked which field is the loss, that is answered."""
    run = planted.run
    changes = [
        # A TrainState holds its optimiser: the changed run's state is to be like its own.
        jaxrnn.Change(
            name, points_to, lambda other=other: jaxrnn.Changed(other.step, other.batch_at, like=other.init)
        )
        for name, points_to, other in planted.changes
    ]
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as directory:
        jaxrnn.record(
            run.step, run.batch_at, run.init, directory, max_steps=planted.steps, checkpoint_every=100
        )
        ask = (run.step, run.batch_at, directory, changes)
        try:
            return jaxrnn.diagnose(*ask, like=run.init, **options)[0]
        except jaxrnn.UserError as error:
            if 'loss=' not in str(error) or not planted.program.loss:
                raise
            return jaxrnn.diagnose(*ask, like=run.init, loss='_'.join(planted.program.loss), **options)[0]


def ask(planted: Planted) -> Score:
    score = Score(planted.program.name, planted.fault, planted.at, planted.size, planted.steps)
    score.truth = described(planted)
    start = time.perf_counter()
    try:
        found = diagnosed(planted)
    except Exception as error:
        score.error = f'{type(error).__name__}: {" ".join(str(error).split())}'[:240]
        score.refused = isinstance(error, jaxrnn.UserError)
        score.said = '' if score.refused else last_line(error)
        score.detected = score.step = 'missed' if planted.truth.sick else ''
    else:
        judge(score, planted.truth, found)
    score.seconds = round(time.perf_counter() - start, 1)
    return score


def last_line(error: Exception) -> str:
    """Where it came from."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f'{Path(frame.filename).name}:{frame.lineno} {frame.line}'


def judge(score: Score, truth: Truth, found) -> None:
    score.said = told(found)
    score.same = found.replay.first_mismatch is None
    if not truth.sick:
        score.detected = 'false alarm' if found.symptom else 'right'
        return
    if found.symptom is None:
        score.detected = 'missed' if truth.needed else 'silent'
        score.step = 'missed' if truth.needed else ''
        if found.cause.kind != 'none':
            score.cause = judged(found.cause.kind in truth.causes)
        return
    score.detected = 'right' if not truth.kinds or found.symptom.kind in truth.kinds else 'missed'
    low, high = truth.steps
    began = [k for k in (found.first_bad_step, found.onset_step) if k is not None]
    score.step = 'exact' if any(low <= k <= high for k in began) else 'off'
    score.place = place_of(truth, found.where or {})
    score.cause = 'undecided' if found.cause.kind == 'none' else judged(found.cause.kind in truth.causes)


def judged(right: bool) -> str:
    return 'right' if right else 'wrong'


def place_of(truth: Truth, where: dict[str, Any]) -> str:
    """Wrong where anything that is named is not so; right where the pass is named, and the example if there is one.

    Of a fault in the state, the leaf must be named too; of one in a batch, no other leaf.
    """
    if not truth.passes and not truth.code and truth.examples is None:
        return ''
    named, source = where.get('pass') or '', where.get('source') or ''
    examples = tuple(where.get('examples') or ())
    line, names_leaf = line_of(source), keys(truth.leaf) <= keys(f'{source} {where.get("layer") or ""}')
    in_batch = 'data' in truth.passes
    if named and truth.passes and named not in truth.passes:
        return 'wrong'
    if truth.examples is not None and examples and not set(truth.examples) <= set(examples):
        return 'wrong'
    if line and truth.code and not any(code in line for code in truth.code):
        return 'wrong'
    if in_batch and truth.leaf and source.startswith('batch/') and not names_leaf:
        return 'wrong'
    sure = truth.examples is None or examples == truth.examples
    sure &= not truth.passes or bool(named) or '' in truth.passes
    sure &= in_batch or not truth.leaf or names_leaf
    return 'right' if sure and where else 'unknown'


def keys(path: str) -> set[str]:
    """The names in a path, however it is written, but for those that say nothing."""
    for mark in '[]\'"./,:(){}':
        path = path.replace(mark, ' ')
    return set(path.split()) - {'params', 'batch', 'state', 'inner', 'value'}


def line_of(source: str) -> str:
    """The text at 'file:line', as far as the file is one of the programs'."""
    name, _, number = source.rpartition(':')
    path = HERE / Path(name).name
    return linecache.getline(str(path), int(number)).strip() if number.isdigit() and path.is_file() else ''


def told(found) -> str:
    where = {key: value for key, value in (found.where or {}).items() if value not in (None, '', [], ())}
    tried = ', '.join(f'{r["name"]}: {r["outcome"]}' for r in found.remedies)
    return (
        f'{found.symptom and (found.symptom.kind, found.symptom.step)}, first bad {found.first_bad_step}, onset '
        f'{found.onset_step}, where {where}, {found.cause.kind} ({found.cause.why[:90]}), tried [{tried}]'
    )


def described(planted: Planted) -> str:
    truth = planted.truth
    if not truth.sick:
        return 'healthy'
    parts = [f'began in {truth.steps[0]}..{truth.steps[1]}', 'needed' if truth.needed else 'may be silent']
    parts += [f'pass {"/".join(sorted(truth.passes))}'] if truth.passes else []
    parts += [f'line with {truth.code}'] if truth.code else []
    parts += [f'leaf {truth.leaf}'] if truth.leaf else []
    parts += [f'examples {truth.examples}'] if truth.examples is not None else []
    parts += [
        f'cause {"/".join(sorted(truth.causes))}',
        f'changes {[name for name, _, _ in planted.changes]}',
    ]
    return ', '.join(parts)


COLUMNS = (
    'program',
    'runs',
    'detected',
    'step exact',
    'place',
    'cause',
    'false alarms',
    'refused',
    'died',
    'seconds',
)
"""Of the table; place is right, unknown, wrong, and cause right, undecided, wrong."""


def summary(name: str, scores: Iterable[Score]) -> dict[str, str]:
    scores = list(scores)

    def count(field: str, *values: str) -> int:
        return sum(getattr(score, field) in values for score in scores)

    sick = sum(score.truth != 'healthy' for score in scores)
    hits = sum(s.detected in ('right', 'silent') and s.truth != 'healthy' for s in scores)
    return dict(
        zip(
            COLUMNS,
            (
                name,
                str(len(scores)),
                f'{hits} of {sick}',
                f'{count("step", "exact")} of {count("step", "exact", "off", "missed")}',
                ' / '.join(str(count('place', value)) for value in ('right', 'unknown', 'wrong')),
                ' / '.join(str(count('cause', value)) for value in ('right', 'undecided', 'wrong')),
                f'{count("detected", "false alarm")} of {sum(s.truth == "healthy" for s in scores)}',
                str(sum(s.refused for s in scores)),
                str(sum(bool(s.error) and not s.refused for s in scores)),
                f'{sum(s.seconds for s in scores):.0f}',
            ),
            strict=True,
        )
    )
