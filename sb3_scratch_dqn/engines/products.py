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
from functools import lru_cache
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


def both_of_array(array: Floats) -> Both:
    """Show an array to both libraries."""
    return Both(array, th.from_numpy(array))


def empty(*shape: int) -> Both:
    """Memory with nothing in it yet."""
    return both(th.empty(shape))


# (left, right, out): writes left @ right; either may be a transposed view
Product = Callable[[Both, Both, Both], object]


def _numpy_outputs(x: Both, w: Both, out: Both) -> None:
    np.dot(x.array, w.array.T, out=out.array)


def _numpy_weight_gradient(g: Both, x: Both, out: Both) -> None:
    np.dot(g.array.T, x.array, out=out.array)


def _numpy_input_gradient(g: Both, w: Both, out: Both) -> None:
    np.dot(g.array, w.array, out=out.array)


def _torch_outputs(x: Both, w: Both, out: Both) -> None:
    th.mm(x.tensor, w.tensor.t(), out=out.tensor)


def _torch_weight_gradient(g: Both, x: Both, out: Both) -> None:
    th.mm(g.tensor.t(), x.tensor, out=out.tensor)


def _torch_input_gradient(g: Both, w: Both, out: Both) -> None:
    th.mm(g.tensor, w.tensor, out=out.tensor)


def _onednn(left: th.Tensor, right_transposed: th.Tensor) -> th.Tensor:
    product: th.Tensor = th.ops.mkldnn._linear_pointwise(left, right_transposed, None, "none", [], None)
    return product


def _onednn_outputs(x: Both, w: Both, out: Both) -> None:
    out.tensor.copy_(_onednn(x.tensor, w.tensor))


def _onednn_weight_gradient(g: Both, x: Both, out: Both) -> None:
    out.tensor.copy_(_onednn(g.tensor.t(), x.tensor.t()))


def _onednn_input_gradient(g: Both, w: Both, out: Both) -> None:
    out.tensor.copy_(_onednn(g.tensor, w.tensor.t()))


class Products(NamedTuple):
    """The three products of a layer."""

    outputs: Product
    weight_gradient: Product
    input_gradient: Product


NUMPY = Products(_numpy_outputs, _numpy_weight_gradient, _numpy_input_gradient)
TORCH = Products(_torch_outputs, _torch_weight_gradient, _torch_input_gradient)
ONEDNN = Products(_onednn_outputs, _onednn_weight_gradient, _onednn_input_gradient)


def products_for(rows: int, n_inputs: int, n_outputs: int) -> Products:
    """The fastest products for a layer.

    :param rows: ``B``
    :param n_inputs: ``K``
    :param n_outputs: ``N``
    """
    if rows * n_inputs * n_outputs <= _SMALL:
        return NUMPY
    if th.are_deterministic_algorithms_enabled() or not _has_onednn():
        return TORCH
    return _timed(rows, n_inputs, n_outputs, th.get_num_threads())


@lru_cache(maxsize=1)
def _has_onednn() -> bool:
    """Whether the way to oneDNN, which PyTorch does not document, is there and computes what it should."""
    x, w = th.arange(6.0).view(2, 3), th.arange(12.0).view(4, 3)
    try:
        return th.equal(_onednn(x, w), x @ w.t())
    except (AttributeError, RuntimeError, TypeError):
        return False


@lru_cache(maxsize=256)
def _timed(rows: int, n_inputs: int, n_outputs: int, _threads: int) -> Products:
    x, w, g = th.rand(rows, n_inputs), th.rand(n_outputs, n_inputs), th.rand(rows, n_outputs)
    operands: tuple[tuple[th.Tensor, th.Tensor, tuple[int, ...]], ...] = (
        (x, w, (rows, n_outputs)),
        (g, x, (n_outputs, n_inputs)),
        (g, w, (rows, n_inputs)),
    )
    chosen: list[Any] = []
    for plain, other, (left, right, shape) in zip(TORCH, ONEDNN, operands, strict=True):
        arguments = (both(left), both(right), empty(*shape))
        times: dict[Product, list[float]] = {plain: [], other: []}
        for _ in range(7):  # the first one prepares things
            for product, taken in times.items():
                begin = time.perf_counter()
                product(*arguments)
                taken.append(time.perf_counter() - begin)
        best = {product: min(taken[1:]) for product, taken in times.items()}
        chosen.append(other if best[other] < _MARGIN * best[plain] else plain)
    return Products(*chosen)
