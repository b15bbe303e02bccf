"""The user's error. It stands by itself, so that flags are read and refused before JAX is imported."""


class UserError(Exception):
    """Something the user can put right; its text is one line.

    It names the flag or file, what was found, what was expected, and what to do.

    >>> raise UserError('--steps: -1 found, at least 0 expected')
    Traceback (most recent call last):
    ...
    jaxrnn.errors.UserError: --steps: -1 found, at least 0 expected
    """

    def __init__(self, message: str):
        super().__init__(' '.join(message.split()))
