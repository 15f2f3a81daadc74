"""Matrix products: which library computes one fastest.

Small products are dominated by call overhead, which is lowest in NumPy. Larger products go to PyTorch, whose number of
threads the user sets. There oneDNN may be faster or slower than ``torch.mm``, depending on the processor;
both are timed once per shape, and oneDNN is used where it is clearly faster. That choice changes results by rounding
only; ``torch.use_deterministic_algorithms(True)`` excludes oneDNN.

A layer with inputs ``x`` ``(B, K)``, weights ``w`` ``(N, K)`` and gradient ``g`` ``(B, N)`` needs three products: its
outputs ``x w^T``, the gradient of its weights ``g^T x``, and the gradient of its inputs ``g w``.
"""

import time
from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch as th

# Multiplications up to which NumPy computes a product: beyond, the overhead of a call no longer matters. Measured,
# NumPy takes 0.7 of PyTorch's time for 2**12 to 2**15, 0.9 to 1.0 for 2**17 to 2**22. Up to there OpenBLAS, which NumPy
# is usually built with, uses one thread, whatever number of threads the user sets
_NUMPY_MAX_MULTIPLICATIONS = 2**18

# oneDNN is used where it takes at most this share of torch.mm's time. Two timings of torch.mm itself differ by a factor
# of up to 1.12 (measured), and a gain that small would make the choice depend on chance
_ONEDNN_MAX_TIME_RATIO = 0.8

Floats = npt.NDArray[np.float32]


class NumpyTensor(NamedTuple):
    """A NumPy array and a tensor of the same memory."""

    array: Floats
    tensor: th.Tensor


def numpy_tensor(tensor: th.Tensor) -> NumpyTensor:
    """Return a tensor together with a NumPy array of the same memory."""
    return NumpyTensor(tensor.numpy(), tensor)


def empty(*shape: int) -> NumpyTensor:
    """Allocate uninitialised memory."""
    return numpy_tensor(th.empty(shape, dtype=th.float32))


# A function and its arguments, to be called repeatedly
Call = tuple[Callable[..., Any], tuple[Any, ...]]

# (left, right, out) -> the call that writes the product
Product = Callable[[NumpyTensor, NumpyTensor, NumpyTensor], Call]

# (x, w, bias, out) -> the calls that write the product and add the bias
Outputs = Callable[[NumpyTensor, NumpyTensor, NumpyTensor, NumpyTensor], list[Call]]


def run(calls: list[Call]) -> None:
    """Make the calls."""
    for function, arguments in calls:
        function(*arguments)


class Products(NamedTuple):
    """The three products of a layer: :math:`x w^T + b`, :math:`g^T x` and :math:`g w`."""

    outputs: Outputs
    weight_gradient: Product
    input_gradient: Product


def _add_bias(bias: NumpyTensor, out: NumpyTensor) -> Call:
    return np.add, (out.array, bias.array, out.array)


NUMPY = Products(
    lambda x, w, b, out: [(np.dot, (x.array, w.array.T, out.array)), _add_bias(b, out)],
    lambda g, x, out: (np.dot, (g.array.T, x.array, out.array)),
    lambda g, w, out: (np.dot, (g.array, w.array, out.array)),
)

# A product of one row is a product of matrix and vector, which has less overhead in NumPy
NUMPY_ROW = NUMPY._replace(
    outputs=lambda x, w, b, out: [(np.dot, (w.array, x.array[0], out.array[0])), _add_bias(b, out)]
)

TORCH = Products(
    lambda x, w, b, out: [(partial(th.addmm, out=out.tensor), (b.tensor, x.tensor, w.tensor.t()))],
    lambda g, x, out: (partial(th.mm, out=out.tensor), (g.tensor.t(), x.tensor)),
    lambda g, w, out: (partial(th.mm, out=out.tensor), (g.tensor, w.tensor)),
)


def _onednn(left: th.Tensor, right_transposed: th.Tensor, bias: th.Tensor | None, out: th.Tensor) -> None:
    out.copy_(th.ops.mkldnn._linear_pointwise(left, right_transposed, bias, "none", [], None))


ONEDNN = Products(
    lambda x, w, b, out: [(_onednn, (x.tensor, w.tensor, b.tensor, out.tensor))],
    lambda g, x, out: (_onednn, (g.tensor.t(), x.tensor.t(), None, out.tensor)),
    lambda g, w, out: (_onednn, (g.tensor, w.tensor.t(), None, out.tensor)),
)


def products_for(rows: int, n_inputs: int, n_outputs: int) -> Products:
    """Return the fastest products for a layer.

    :param rows: ``B``
    :param n_inputs: ``K``
    :param n_outputs: ``N``
    """
    if rows * n_inputs * n_outputs <= _NUMPY_MAX_MULTIPLICATIONS:
        return NUMPY_ROW if rows == 1 else NUMPY
    if th.are_deterministic_algorithms_enabled() or not _has_onednn():
        return TORCH
    return _fastest_by_timing(rows, n_inputs, n_outputs, th.get_num_threads())


@lru_cache(maxsize=1)
def _has_onednn() -> bool:
    """Return True if the undocumented oneDNN operator exists and computes the right product."""
    x, w = (th.arange(3 * rows, dtype=th.float32).view(rows, 3) for rows in (2, 4))
    out = th.empty(2, 4, dtype=th.float32)
    try:
        _onednn(x, w, None, out)
    except (AttributeError, RuntimeError, TypeError):
        return False
    return th.equal(out, x @ w.t())


@lru_cache(maxsize=256)
def _fastest_by_timing(rows: int, n_inputs: int, n_outputs: int, _threads: int) -> Products:
    """Time ``torch.mm`` and oneDNN for each of the three products; choose oneDNN where it is clearly faster."""
    # A generator of its own: training draws from the global one
    random = partial(th.rand, dtype=th.float32, generator=th.Generator().manual_seed(0))
    x, w, b = (numpy_tensor(random(shape)) for shape in ((rows, n_inputs), (n_outputs, n_inputs), (n_outputs,)))
    g, w_gradient, x_gradient = (
        empty(*shape) for shape in ((rows, n_outputs), (n_outputs, n_inputs), (rows, n_inputs))
    )

    def calls(products: Products) -> list[list[Call]]:
        gradients = [products.weight_gradient(g, x, w_gradient)], [products.input_gradient(g, w, x_gradient)]
        return [products.outputs(x, w, b, g), *gradients]

    chosen: list[Any] = []
    for torch_product, onednn_product, candidates in zip(
        TORCH, ONEDNN, zip(calls(TORCH), calls(ONEDNN), strict=True), strict=True
    ):
        times: tuple[list[float], list[float]] = ([], [])
        for _ in range(9):
            for candidate, seconds in zip(candidates, times, strict=True):
                begin = time.perf_counter()
                run(candidate)
                seconds.append(time.perf_counter() - begin)
        # Without the first two, which include initialisation
        torch_seconds, onednn_seconds = (min(seconds[2:]) for seconds in times)
        is_faster = onednn_seconds < _ONEDNN_MAX_TIME_RATIO * torch_seconds
        chosen.append(onednn_product if is_faster else torch_product)
    return Products(*chosen)
