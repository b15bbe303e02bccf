"""Commands on a run that jaxrnn.keras.Recorder left: its model is made by the user's own module, on their word alone.

A run is data: nothing in it names code that is run. Whoever types --model has the module of that name imported.
"""

import importlib.util
import os
import sys
from pathlib import Path
from typing import Any

from absl import flags

from jaxrnn.cli import common, invocation
from jaxrnn.diagnosis import Diagnosis
from jaxrnn.errors import UserError

NOTES = 'keras.json'
"""What such a run has, and no other; as of `adapters.keras.variables`, which needs Keras."""


def is_one(command: str, directory: str) -> bool:
    """Whether a run is of Keras.

    Raises:
        UserError: it is, and no model is named; or it isn't, and one is.
    """
    found, named = (Path(directory) / NOTES).is_file(), common.typed_model()
    if found and not named:
        line = invocation.line(command, f'--run_dir={directory}', '--model=my_module:make')
        raise UserError(
            f'--model: nothing found, and {directory} is a training by Keras; type {line}, where make() in '
            'my_module.py gives the compiled model'
        )
    if named and not found:
        raise UserError(
            f'--model: {named} found, and {directory} is no run by jaxrnn.keras.Recorder; leave --model out'
        )
    return found


def bisect(directory: str) -> int:
    """As the command `bisect`."""
    model = _model()
    from jaxrnn import report
    from jaxrnn.adapters import keras as door

    diagnosis, rows = door.bisect(model, directory, verify=flags.FLAGS.verify, **_asked())
    if flags.FLAGS.json:
        common.print_json(diagnosis.to_json())
    else:
        common.console().print(report.render_bisection(diagnosis, rows))
        if diagnosis.first_bad_step is not None:
            following = invocation.following(
                'diagnose', f'--run_dir={directory}', f'--model={flags.FLAGS.model}'
            )
            common.say(following, file=sys.stdout)
    return _exit_code(diagnosis)


def diagnose(directory: str) -> int:
    """As the command `diagnose`."""
    model = _model()
    from jaxrnn import report
    from jaxrnn.adapters import keras as door
    from jaxrnn.record import layout

    diagnosis, found = door.diagnose(model, directory, budget=flags.FLAGS.budget_steps, **_asked())
    layout.write_json(layout.Paths(Path(directory)).diagnosis, diagnosis.to_json())
    if flags.FLAGS.json:
        common.print_json(diagnosis.to_json())
    else:
        common.console().print(report.render_diagnosis(diagnosis, found))
    return _exit_code(diagnosis)


def _asked() -> dict[str, Any]:
    names = ('symptom', 'when', 'good', 'bad')
    return {name: flags.FLAGS[name].value for name in names}


def _exit_code(diagnosis: Diagnosis) -> int:
    if diagnosis.replay.first_mismatch is not None:
        return common.IRREPRODUCIBLE
    return common.HEALTHY if diagnosis.symptom is None else common.DIVERGED


def _model() -> Any:
    """What the function named by --model makes. Raises UserError where there is none."""
    named = common.typed_model()
    module, _, function = named.partition(':')
    if not module or not function:
        raise UserError(f'--model: {named} found, a module and a function expected, as my_module:make')
    if importlib.util.find_spec('keras') is None:
        raise UserError('--model: Keras is not installed; install it: pip install keras')
    os.environ.setdefault('KERAS_BACKEND', 'jax')  # before the module imports Keras
    sys.path.insert(0, os.getcwd())
    try:
        made = getattr(importlib.import_module(module), function)
    except ModuleNotFoundError as error:
        if error.name not in (module, module.partition('.')[0]):
            raise
        raise UserError(
            f'--model: no module {module} found from {os.getcwd()}; go to the directory that it is in'
        ) from None
    except AttributeError:
        raise UserError(
            f'--model: no {function} found in {module}; name the function that makes the model'
        ) from None
    return made()
