"""Many points as few, and no extreme is lost."""

import itertools

import numpy as np


def kept(values: np.ndarray, most: int) -> np.ndarray:
    """Which points of a line are drawn: of each stretch the first, the lowest, the highest, and the last that is no
    finite number; and the last of all.

    Args:
        values: [N], of points in their order; NaN or infinite where there is none to draw.
        most: about how many are kept, at least 8. A line of no more is kept whole.

    Returns:
        Their places, int [M], rising. A stretch without a number keeps one place, so that a gap stays one.

    >>> kept(np.array([0, 0, 9, 0, 0, 0, 0, -9, 0, 0, 0, 0.0]), 8)
    array([ 0,  2,  6,  7, 11])
    """
    if values.size <= most:
        return np.arange(values.size)
    edges = np.linspace(0, values.size, max(most // 4, 2) + 1).astype(int)
    finite = np.isfinite(values)
    low, high = np.where(finite, values, np.inf), np.where(finite, values, -np.inf)
    found = {values.size - 1}
    for start, stop in itertools.pairwise(edges):
        missing = np.flatnonzero(~finite[start:stop])
        found.update(int(start + place) for place in missing[-1:])
        if finite[start:stop].any():
            found |= {
                int(start),
                start + int(np.argmin(low[start:stop])),
                start + int(np.argmax(high[start:stop])),
            }
    return np.array(sorted(found))
