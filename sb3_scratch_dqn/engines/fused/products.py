"""Matrix products: which library computes one fastest.

Small products cost what a call costs, and NumPy's calls cost least. Larger ones go to PyTorch, whose number of threads
the user sets. There oneDNN may be faster than what ``torch.mm`` calls, or slower, depending on the processor; both are
timed once for each shape, and oneDNN is taken where it is clearly faster. That choice changes no more than rounding;
``torch.use_deterministic_algorithms(True)`` leaves it out.

For a layer with inputs ``x`` ``(B, K)``, weights ``w`` ``(N, K)`` and gradient ``g`` ``(B, N)`` there are three of
them: its outputs ``x w^T``, the gradient of its weights ``g^T x``, and that of its inputs ``g w``.
"""

import time
from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch as th

# Multiplications up to which NumPy is taken. OpenBLAS, which NumPy mostly comes with, uses one thread up to there.
_SMALL = 2**18

# How much faster oneDNN must be to be taken
_MARGIN = 0.8

Floats = npt.NDArray[np.float32]


class Both(NamedTuple):
    """The same memory for two libraries."""

    array: Floats
    tensor: th.Tensor


def both(tensor: th.Tensor) -> Both:
    """Show a tensor to both libraries."""
    return Both(tensor.numpy(), tensor)


def empty(*shape: int) -> Both:
    """Memory with nothing in it yet."""
    return both(th.empty(shape, dtype=th.float32))


# A call that is made over and over with the same arguments
Call = tuple[Callable[..., Any], tuple[Any, ...]]

# (left, right, out) -> the call that writes the product
Product = Callable[[Both, Both, Both], Call]

# (x, w, bias, out) -> the calls that write the product and add the bias
Outputs = Callable[[Both, Both, Both, Both], list[Call]]


def run(calls: list[Call]) -> None:
    """Make some calls."""
    for function, arguments in calls:
        function(*arguments)


class Products(NamedTuple):
    """The three products of a layer: :math:`x w^T + b`, :math:`g^T x` and :math:`g w`."""

    outputs: Outputs
    weight_gradient: Product
    input_gradient: Product


def _add(bias: Both, out: Both) -> Call:
    return np.add, (out.array, bias.array, out.array)


NUMPY = Products(
    lambda x, w, b, out: [(np.dot, (x.array, w.array.T, out.array)), _add(b, out)],
    lambda g, x, out: (np.dot, (g.array.T, x.array, out.array)),
    lambda g, w, out: (np.dot, (g.array, w.array, out.array)),
)

# A product of one row is one with a vector, for which NumPy has a shorter way
NUMPY_ROW = NUMPY._replace(outputs=lambda x, w, b, out: [(np.dot, (w.array, x.array[0], out.array[0])), _add(b, out)])

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
    """The fastest products for a layer.

    :param rows: ``B``
    :param n_inputs: ``K``
    :param n_outputs: ``N``
    """
    if rows * n_inputs * n_outputs <= _SMALL:
        return NUMPY_ROW if rows == 1 else NUMPY
    if th.are_deterministic_algorithms_enabled() or not _has_onednn():
        return TORCH
    return _timed(rows, n_inputs, n_outputs, th.get_num_threads())


@lru_cache(maxsize=1)
def _has_onednn() -> bool:
    """Whether the way to oneDNN, which PyTorch does not document, is there and computes what it should."""
    x, w = (th.arange(3 * rows, dtype=th.float32).view(rows, 3) for rows in (2, 4))
    out = th.empty(2, 4, dtype=th.float32)
    try:
        _onednn(x, w, None, out)
    except (AttributeError, RuntimeError, TypeError):
        return False
    return th.equal(out, x @ w.t())


@lru_cache(maxsize=256)
def _timed(rows: int, n_inputs: int, n_outputs: int, _threads: int) -> Products:
    # Not the global generator, whose numbers are for training
    random = partial(th.rand, dtype=th.float32, generator=th.Generator().manual_seed(0))
    x, w, b = (both(random(shape)) for shape in ((rows, n_inputs), (n_outputs, n_inputs), (n_outputs,)))
    g, to_w, to_x = (empty(*shape) for shape in ((rows, n_outputs), (n_outputs, n_inputs), (rows, n_inputs)))

    def calls(products: Products) -> list[list[Call]]:
        gradients = [products.weight_gradient(g, x, to_w)], [products.input_gradient(g, w, to_x)]
        return [products.outputs(x, w, b, g), *gradients]

    chosen: list[Any] = []
    for plain, other, ways in zip(TORCH, ONEDNN, zip(calls(TORCH), calls(ONEDNN), strict=True), strict=True):
        times: tuple[list[float], list[float]] = ([], [])
        for _ in range(9):
            for way, taken in zip(ways, times, strict=True):
                begin = time.perf_counter()
                run(way)
                taken.append(time.perf_counter() - begin)
        # The first ones prepare things
        own, others = (min(taken[2:]) for taken in times)
        chosen.append(other if others < _MARGIN * own else plain)
    return Products(*chosen)
