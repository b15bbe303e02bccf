"""Commands on runs of the user's own loop, or of `model.fit`: what trained is made by their own module, on their word.

A run is data: nothing in it names code that is run. Whoever types --program or --model has the module of that name
imported.
"""

import importlib
import importlib.util
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from absl import flags

from jaxrnn.cli import common, invocation
from jaxrnn.errors import UserError

if TYPE_CHECKING:
    from jaxrnn.diagnosis import Diagnosis

NOTES = 'keras.json'
"""What a run of Keras has, and no other; as of `adapters.keras.variables`, which needs Keras."""

MODEL, PROGRAM = 'model', 'program'
FLAGS = {
    MODEL: 'Of a run by jaxrnn.keras.Recorder: what makes its model, compiled as it was trained, as my_module:make.',
    PROGRAM: 'Of a run by jaxrnn.Recorder or jaxrnn.record: what gives its step and a state like its first, as '
    'my_module:replay; or its step, its batch_at and such a state.',
}
IMPORTED = ' That module is imported, and so run, from the current directory.'


def define_flags() -> None:
    """Those that name code of the user's own."""
    for name, said in FLAGS.items():
        common.define('own', name, '', said + IMPORTED)


def is_one(command: str, directory: str) -> bool:
    """Whether a run is of the user's own program.

    Raises:
        UserError: it is, and no program is named; or it isn't, and one is.
    """
    root, typed = Path(directory), {name: common.typed(name) for name in FLAGS}
    kind = MODEL if (root / NOTES).is_file() else PROGRAM if _is_loops(root) else None
    other = next((name for name, found in typed.items() if found and name != kind), None)
    if other is not None:
        whose = 'run by jaxrnn.keras.Recorder' if other == MODEL else "run of somebody's own loop"
        raise UserError(
            f'--{other}: {typed[other]} found, and {directory} is no {whose}; leave --{other} out'
        )
    if kind is not None and not typed[kind]:
        function, gives, whose = (
            ('make', 'the compiled model', 'a training by Keras')
            if kind == MODEL
            else ('replay', 'the train step and a state like the first', "a run of somebody's own loop")
        )
        line = invocation.line(command, f'--run_dir={directory}', f'--{kind}=my_module:{function}')
        raise UserError(
            f'--{kind}: nothing found, and {directory} is {whose}; type {line}, where {function}() in my_module.py '
            f'gives {gives}'
        )
    return kind is not None


def _is_loops(root: Path) -> bool:
    """Whether a directory has what a recorder leaves, and no configuration of ours."""
    if os.path.lexists(root / 'config.json'):
        return False
    return (root / 'recorder.json').is_file() or (
        (root / 'records.jsonl').is_file() and (root / 'checkpoints').is_dir()
    )


def alarms_of(directory: str) -> Any:
    """Those of a run's signals."""
    from jaxrnn import detect
    from jaxrnn.words import signals

    return (
        detect.ALARMS if _is_loops(Path(directory)) or (Path(directory) / NOTES).is_file() else signals.ALARMS
    )


def bisect(directory: str) -> int:
    """As the command `bisect`."""
    found = _program()
    from jaxrnn.cli import showing
    from jaxrnn.report import render_bisection

    with showing.Progressing():
        diagnosis, rows = found.bisect(directory, verify=flags.FLAGS.verify, **_asked())
    if flags.FLAGS.json:
        common.print_json(diagnosis.to_json())
    else:
        common.console().print(render_bisection(diagnosis, rows))
        if diagnosis.first_bad_step is not None:
            following = invocation.following('diagnose', f'--run_dir={directory}', found.flag)
            common.say(following, file=sys.stdout)
    return _exit_code(diagnosis)


def diagnose(directory: str) -> int:
    """As the command `diagnose`."""
    made = _program()
    from jaxrnn.cli import showing
    from jaxrnn.report import render_diagnosis, report

    with showing.Progressing():
        diagnosis, found = made.diagnose(directory, budget=flags.FLAGS.budget_steps, **_asked())
    if not flags.FLAGS.json:  # before the page, for which there may be no room on the disk
        common.console().print(render_diagnosis(diagnosis, found))
    page = report(directory, diagnosis, found)
    if flags.FLAGS.json:
        common.print_json(diagnosis.to_json())
    else:
        common.say(f'page: {page}', file=sys.stdout)
    return _exit_code(diagnosis)


def _asked() -> dict[str, Any]:
    names = ('symptom', 'when', 'good', 'bad')
    return {name: flags.FLAGS[name].value for name in names}


def _exit_code(diagnosis: 'Diagnosis') -> int:
    if diagnosis.replay.first_mismatch is not None:
        return common.IRREPRODUCIBLE
    return common.HEALTHY if diagnosis.symptom is None else common.DIVERGED


class _Model(NamedTuple):
    """A program of Keras."""

    flag: str
    model: Any

    def bisect(self, directory: str, **options: Any) -> Any:
        from jaxrnn.adapters import keras as door

        return door.bisect(self.model, directory, **options)

    def diagnose(self, directory: str, **options: Any) -> Any:
        from jaxrnn.adapters import keras as door

        return door.diagnose(self.model, directory, **options)


class _Loop(NamedTuple):
    """A program of somebody's own loop."""

    flag: str
    step: Any
    batch_at: Any
    like: Any

    def bisect(self, directory: str, **options: Any) -> Any:
        import jaxrnn

        return jaxrnn.bisect(self.step, self.batch_at, directory, like=self.like, **options)

    def diagnose(self, directory: str, **options: Any) -> Any:
        import jaxrnn

        return jaxrnn.diagnose(self.step, self.batch_at, directory, like=self.like, **options)


def _program() -> _Model | _Loop:
    """What the function that was named makes. Raises UserError where there is none."""
    name = MODEL if common.typed(MODEL) else PROGRAM
    flag = f'--{name}={common.typed(name)}'
    if name == MODEL and importlib.util.find_spec('keras') is None:
        raise UserError('--model: Keras is not installed; install it: pip install keras')
    made = _made(name)
    if name == MODEL:
        return _Model(flag, made)
    if not isinstance(made, tuple) or len(made) not in (2, 3) or not callable(made[0]):
        raise UserError(
            f'{flag} gives a {type(made).__name__}; expected the train step and a state like the first, or the step, '
            'its batch_at and such a state'
        )
    return _Loop(flag, made[0], made[1] if len(made) == 3 else None, made[-1])


def _made(name: str) -> Any:
    named = common.typed(name)
    module, _, function = named.partition(':')
    if not module or not function:
        raise UserError(f'--{name}: {named} found, a module and a function expected, as my_module:make')
    os.environ.setdefault('KERAS_BACKEND', 'jax')  # before the module imports Keras
    sys.path.insert(0, os.getcwd())
    try:
        imported = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name not in (module, module.partition('.')[0]):
            raise
        raise UserError(
            f'--{name}: no module {module} found from {os.getcwd()}; go to the directory that it is in'
        ) from None
    if not callable(make := getattr(imported, function, None)):
        raise UserError(f'--{name}: no function {function} found in {module}; name the one that makes it')
    return make()
