"""The equations of the papers in NumPy: float64, plain loops, nothing of jaxrnn.

Gates lie side by side as Keras keeps them: i, f, g, o for the LSTM; z, r, n for the GRU.
All of it also runs in complex128, so that `gradients` can differentiate it.
"""

from collections.abc import Callable, Mapping

import numpy as np

Gate = Callable[[np.ndarray], np.ndarray]


def sigmoid(a: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-a))


def hard_sigmoid(a: np.ndarray) -> np.ndarray:
    """0.2 a + 0.5, cut off at 0 and 1, as in Keras 1."""
    real = np.real(a)
    return np.where(real < -2.5, 0, np.where(real > 2.5, 1, 0.2 * a + 0.5))


GATES: Mapping[str, Gate] = {'sigmoid': sigmoid, 'hard_sigmoid': hard_sigmoid}


def lstm(
    xs: np.ndarray,
    c: np.ndarray,
    h: np.ndarray,
    *,
    kernel: np.ndarray,
    recurrent_kernel: np.ndarray,
    bias: np.ndarray,
    gate: Gate,
) -> np.ndarray:
    """Hochreiter & Schmidhuber 1997 with the forget gate of Gers, Schmidhuber & Cummins 2000.

    xs [T, B, D]; c, h [B, H]; kernel [D, 4H]; recurrent_kernel [H, 4H]; bias [4H]. Returns h of each
    time step, [T, B, H].
    """
    w_i, w_f, w_g, w_o = np.split(kernel, 4, axis=1)
    u_i, u_f, u_g, u_o = np.split(recurrent_kernel, 4, axis=1)
    b_i, b_f, b_g, b_o = np.split(bias, 4)
    outputs = []
    for x in xs:
        i = gate(x @ w_i + h @ u_i + b_i)
        f = gate(x @ w_f + h @ u_f + b_f)
        o = gate(x @ w_o + h @ u_o + b_o)
        g = np.tanh(x @ w_g + h @ u_g + b_g)
        c = f * c + i * g
        h = o * np.tanh(c)
        outputs.append(h)
    return np.stack(outputs)


def gru_reset_after(
    xs: np.ndarray,
    h: np.ndarray,
    *,
    kernel: np.ndarray,
    recurrent_kernel: np.ndarray,
    bias: np.ndarray,
    recurrent_bias: np.ndarray | None = None,
    gate: Gate,
) -> np.ndarray:
    """Cho et al. 2014, arXiv 1406.1078v1: the reset gate follows the recurrent product.

    recurrent_bias [3H], or [H] for n alone, or None; all else as in `lstm`, with 3H for 4H.
    """
    width = h.shape[1]
    w_z, w_r, w_n = np.split(kernel, 3, axis=1)
    u_z, u_r, u_n = np.split(recurrent_kernel, 3, axis=1)
    b_z, b_r, b_n = np.split(bias, 3)
    d_z = d_r = d_n = np.zeros(width)
    if recurrent_bias is not None and len(recurrent_bias) == width:
        d_n = recurrent_bias
    elif recurrent_bias is not None:
        d_z, d_r, d_n = np.split(recurrent_bias, 3)
    outputs = []
    for x in xs:
        z = gate(x @ w_z + b_z + h @ u_z + d_z)
        r = gate(x @ w_r + b_r + h @ u_r + d_r)
        n = np.tanh(x @ w_n + b_n + r * (h @ u_n + d_n))
        h = z * h + (1 - z) * n
        outputs.append(h)
    return np.stack(outputs)


def gru_reset_before(
    xs: np.ndarray,
    h: np.ndarray,
    *,
    kernel: np.ndarray,
    recurrent_kernel: np.ndarray,
    bias: np.ndarray,
    gate: Gate,
) -> np.ndarray:
    """Cho et al. 2014, arXiv 1406.1078v3, equations 5-8: the reset gate precedes the recurrent product."""
    w_z, w_r, w_n = np.split(kernel, 3, axis=1)
    u_z, u_r, u_n = np.split(recurrent_kernel, 3, axis=1)
    b_z, b_r, b_n = np.split(bias, 3)
    outputs = []
    for x in xs:
        z = gate(x @ w_z + h @ u_z + b_z)
        r = gate(x @ w_r + h @ u_r + b_r)
        n = np.tanh(x @ w_n + (r * h) @ u_n + b_n)
        h = z * h + (1 - z) * n
        outputs.append(h)
    return np.stack(outputs)


def dense(x: np.ndarray, *, kernel: np.ndarray, bias: np.ndarray) -> np.ndarray:
    return x @ kernel + bias


Scalar = Callable[[Mapping[str, np.ndarray]], np.ndarray]
"""A differentiable function of named arrays, whose value is one number."""


def gradients(f: Scalar, values: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """df/dv for every entry v, by complex steps: Im f(v + ih) / h (Squire & Trapp 1998).

    Nothing is subtracted, so h = 1e-30 can be so small that the truncation, h^2 f''' / 6, is nothing,
    and the result is good to all digits; nor does a step that small cross a kink of hard_sigmoid.
    """
    h = 1e-30
    return _each_entry(lambda v, name, at: np.imag(f(_moved(v, name, at, h * 1j))) / h, values)


def central_differences(f: Scalar, values: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The same by (f(v + h) - f(v - h)) / 2h, good to 1e-11 f: h = 1e-5 is near the best, (3 eps)^(1/3)."""
    h = 1e-5
    return _each_entry(
        lambda v, name, at: (f(_moved(v, name, at, h)) - f(_moved(v, name, at, -h))) / (2 * h), values
    )


def _each_entry(derivative: Callable, values: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    values = {name: np.asarray(value, np.float64) for name, value in values.items()}
    made = {name: np.empty(value.shape) for name, value in values.items()}
    for name, array in made.items():
        for at in np.ndindex(array.shape):
            array[at] = derivative(values, name, at)
    return made


def _moved(values: Mapping[str, np.ndarray], name: str, at: tuple[int, ...], step: complex) -> dict:
    array = values[name].astype(np.result_type(values[name], type(step)))
    array[at] += step
    return {**values, name: array}
