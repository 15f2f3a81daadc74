"""Capture of a function's GPU work in a graph, to be replayed without the function.

On CUDA this is a CUDA graph (https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs): one launch for
everything that the function launched. A replay reads and writes the same memory as the captured call, so inputs must be
written to, and results read from, tensors that are never reallocated. Tensors that the function creates are in the
graph's private memory pool and must not be kept outside of it. Python code runs once, during capture.

Before capture, a function must run a few times, which initialises libraries and memory. These warm-up runs and the
capture leave state and random numbers unchanged (:meth:`GraphCapturer._preserve_state`).

On other devices nothing is captured, and ``capture()`` returns the function itself.
"""

import random
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress

import numpy as np
import torch as th

# Runs before a capture, as in PyTorch's notes on CUDA graphs
_WARM_UPS = 3

Function = Callable[[], object]
State = Callable[[], Iterable[th.Tensor]]


class CaptureError(RuntimeError):
    """Raised if a function cannot be captured, for example because it synchronises with the device."""


class GraphCapturer:
    """Captures functions.

    :param device: device that the functions work on
    """

    def __init__(self, device: th.device) -> None:
        self._device = device
        on_cuda = device.type == "cuda"
        self.warm_ups = _WARM_UPS if on_cuda else 0
        # One stream for warm-up and capture: autograd accumulates gradients on the stream that first used a parameter
        self._stream = th.cuda.Stream(device) if on_cuda else None  # type: ignore[no-untyped-call]  # PyTorch has no types for it

    def capture(self, function: Function, state: State, warm_up: Function | None = None) -> Function:
        """Capture a function.

        :param function: function to be replayed
        :param state: returns all tensors that the function modifies, some of which may exist only after it has run
        :param warm_up: function to run before, which initialises all that ``function`` needs; ``None`` if that is done
        :return: function that replays the graph
        :raises CaptureError: if the function cannot be captured, with the reason
        """
        with self._preserve_state(state):
            if warm_up is not None:
                self._warm_up(warm_up)
            return function if self._stream is None else self._capture(function, self._stream)

    def _warm_up(self, function: Function) -> None:
        if self._stream is None:
            for _ in range(self.warm_ups):
                function()
            return
        self._stream.wait_stream(th.cuda.current_stream(self._device))
        try:
            with th.cuda.stream(self._stream):
                for _ in range(self.warm_ups - 1):
                    function()
                with _forbid_synchronization():
                    function()
        finally:
            th.cuda.current_stream(self._device).wait_stream(self._stream)

    def _capture(self, function: Function, stream: "th.cuda.Stream") -> Function:
        # Graphs share no memory pool, so they may be replayed in any order
        graph = th.cuda.CUDAGraph()
        try:
            # Other threads, such as those that write logs, may use CUDA meanwhile
            with th.cuda.device(self._device), th.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
                function()
        except RuntimeError as error:
            with suppress(RuntimeError):
                graph.reset()  # which also ends the capture in random generators
            raise CaptureError(_first_line(error)) from error
        return graph.replay

    @contextmanager
    def _preserve_state(self, state: State) -> Iterator[None]:
        """Restore state and random generators on exit.

        State that is created inside becomes 0, as averages of optimisers are before the first step.
        """
        if self.warm_ups == 0:
            yield
            return
        before = {id(tensor): (tensor, tensor.detach().clone()) for tensor in state()}
        python_state, numpy_state, torch_state = random.getstate(), np.random.get_state(), th.get_rng_state()
        cuda_state = th.cuda.get_rng_state(self._device) if self._stream is not None else None
        try:
            yield
        finally:
            with th.no_grad():
                for tensor in state():
                    if id(tensor) in before:
                        tensor.copy_(before[id(tensor)][1])
                    else:
                        tensor.zero_()
            random.setstate(python_state)
            np.random.set_state(numpy_state)
            th.set_rng_state(torch_state)
            if cuda_state is not None:
                th.cuda.set_rng_state(cuda_state, self._device)


@contextmanager
def _forbid_synchronization() -> Iterator[None]:
    """Raise CaptureError if the host waits for the device. During capture such an error would invalidate the graph."""
    mode = th.cuda.get_sync_debug_mode()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PyTorch warns that it does not detect all synchronisation
            th.cuda.set_sync_debug_mode("error")
        yield
    except RuntimeError as error:
        raise CaptureError(_first_line(error)) from error
    finally:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            th.cuda.set_sync_debug_mode(mode)


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


class DeviceScalar:
    """A number that captured functions read, and that may change between replays.

    :param device: device of the functions
    :param dtype: dtype of the number
    """

    def __init__(self, device: th.device, dtype: th.dtype = th.float32) -> None:
        self.tensor = th.zeros((), dtype=dtype, device=device)
        self._value = 0.0

    def set(self, value: float) -> None:
        """Set the number; write to the device only if it changed."""
        if value != self._value:
            self.tensor.fill_(value)
            self._value = value
