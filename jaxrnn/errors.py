"""The user's error. It needs no JAX, so that flags are read and refused before that is imported."""

from jaxrnn import escaping


class UserError(Exception):
    """Something the user can put right; its text is one line, in which everything can be seen.

    It names the flag or file, what was found, what was expected, and what to do.

    >>> raise UserError('--steps: -1 found, at least 0 expected')
    Traceback (most recent call last):
    ...
    jaxrnn.errors.UserError: --steps: -1 found, at least 0 expected
    """

    def __init__(self, message: str):
        super().__init__(escaping.one_line(message))
