"""The public surface: each name has a docstring, with an example that runs."""

import doctest
import inspect
import subprocess
import sys
from types import ModuleType

import numpy as np
import pytest

import jaxrnn
from jaxrnn import detect
from jaxrnn.types import Signal


def examples(name: str) -> list[doctest.DocTest]:
    """Those of a public name: of a package that can be called, of the function that it calls."""
    value = getattr(jaxrnn, name)
    scope = {'jaxrnn': jaxrnn, **{each: getattr(jaxrnn, each) for each in jaxrnn.__all__}}
    finder = doctest.DocTestFinder(recurse=False)
    return [test for test in finder.find(value, name, module=False, globs=scope) if test.examples]


@pytest.mark.parametrize('name', jaxrnn.__all__)
def test_examples(name):
    (test,) = examples(name)
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
    runner.run(test)
    assert runner.summarize(verbose=False) == (0, len(test.examples))


@pytest.mark.parametrize('name', ['record', 'bisect', 'report'])
def test_a_package_is_called_as_its_function(name):
    """And explained as it: by its signature, and by help."""
    package = getattr(jaxrnn, name)
    function = getattr(package, name)
    assert isinstance(package, ModuleType) and package.__call__ is function
    assert list(inspect.signature(package).parameters) == list(inspect.signature(function).parameters)
    assert 'Args:' in package.__doc__ and inspect.getdoc(function) in package.__doc__


def test_names_are_there_before_anything_else_is_imported():
    code = 'import jaxrnn; print(*(getattr(jaxrnn, name).__name__ for name in jaxrnn.__all__))'
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True)
    assert len(done.stdout.split()) == len(jaxrnn.__all__)


def test_another_name_is_refused():
    with pytest.raises(AttributeError, match='no attribute'):
        jaxrnn.nothing  # noqa: B018


def test_a_first_sign_is_dated_by_the_alarms_handed_over(tmp_path):
    """1.1^k is above 2 from step 8 on, and above 100 from step 49 on."""

    def step(x, batch):
        return x * batch, {'loss': x, 'creep': x}

    run = step, lambda k: np.float32(1.1)
    jaxrnn.record(*run, lambda: 1.0, tmp_path, max_steps=60)
    table = [Signal('creep', 'x', 'whole', 'creep > 2', 'it creeps', 'derived', 'none', '40')]
    options = {'like': lambda: 1.0, 'when': 'loss > 100'}
    found, _ = jaxrnn.bisect(*run, tmp_path, alarms=detect.alarms_of(table), **options)
    assert (found.first_bad_step, found.onset_step) == (49, 8)
    # Without a sign before it, it begins where the rule holds.
    assert jaxrnn.bisect(*run, tmp_path, **options)[0].onset_step == 49
