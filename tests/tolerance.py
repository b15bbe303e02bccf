"""The one table of tolerances. A tolerance is never loosened to let a test pass."""

from typing import Any, NamedTuple

import numpy as np

ULP = 2.0**-23
"""float32: the relative distance of two neighbours."""


class Tolerance(NamedTuple):
    """|actual - expected| <= relative |expected| + scaled max|expected| + absolute, for every number."""

    relative: float = 0
    scaled: float = 0
    absolute: float = 0


TOLERANCES = {
    # the same float32 numbers
    'exact': Tolerance(),
    # one float32 function of a float32 number: a few roundings
    'float32 function': Tolerance(relative=4 * ULP),
    # float32 network against the float64 oracle: sums of tens of products over tens of time steps;
    # worst measured 12 ULP
    'float32 forward': Tolerance(scaled=32 * ULP),
    # the same for gradients: as many roundings again on the way back, then a sum over T and B; worst measured 18
    'float32 gradient': Tolerance(scaled=64 * ULP),
    # products of bfloat16 operands (8 bits), sums in float32, six time steps
    'bfloat16 forward': Tolerance(scaled=8 * 2.0**-8),
    'bfloat16 gradient': Tolerance(scaled=16 * 2.0**-8),
    # float64 against float64, order of summation aside
    'float64': Tolerance(scaled=1e-13),
    # an eigenvalue by 400 iterations, and a Hessian's product: against the dense Hessian of another backward pass
    'float64 Hessian': Tolerance(scaled=1e-9),
    # float64 central differences of step h = 1e-5: truncation h^2 f'''/6, rounding 2^-53 f/h, both about 1e-11
    'float64 differences': Tolerance(scaled=1e-9),
    # Adam in float32 against float64, a dozen steps: some ten roundings of m and v, which are sums of terms of
    # their own size, and as many of the update's formula
    'float32 adam': Tolerance(relative=32 * ULP, scaled=8 * ULP),
    # a ratio of float32 sums of at most 2,500 terms, one of them a difference of such sums
    'float32 signal': Tolerance(relative=64 * ULP, absolute=64 * ULP),
    # a learning rate: the few roundings of its schedule's formula, and of the ratio that it is inferred from
    'float32 schedule': Tolerance(relative=4 * ULP),
    # Q Q' of a float32 QR of at most 256 rows; worst measured 6 ULP
    'float32 orthogonal': Tolerance(absolute=32 * ULP),
    # a standard deviation over a draw of 7000 numbers or more: 2 of its own standard deviations, 1 / sqrt(2 N)
    'statistic': Tolerance(relative=0.02),
    # the requirement: outputs of order 1 agree with Keras 3
    'keras forward': Tolerance(absolute=1e-5),
    # the requirement: every loss of 50 training steps agrees with Keras 3
    'keras losses': Tolerance(relative=1e-4),
    # weights after those steps: a hundredth of one Adam step
    'keras weights': Tolerance(absolute=1e-5),
}


def assert_close(actual: Any, expected: Any, kind: str) -> None:
    """That two arrays of one shape agree within the tolerance of `kind`; the expected one is finite."""
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    assert actual.shape == expected.shape
    assert np.all(np.isfinite(expected))
    tolerance = TOLERANCES[kind]
    largest = np.max(np.abs(expected), initial=0)
    np.testing.assert_allclose(
        actual,
        expected,
        rtol=tolerance.relative,
        atol=tolerance.scaled * largest + tolerance.absolute,
        err_msg=kind,
    )
