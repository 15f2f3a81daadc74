"""Recording what a function has a device do, to have it done again without the function.

On CUDA a recording is a graph (https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs): one launch for all
that the function launched. It reads and writes the memory that the function read and wrote, so inputs are written into
tensors that stay where they are, and results are read from such. What a recorded function makes for itself lies in
memory of the graph's own, of which nobody else may keep anything. Python code runs once, when it is recorded.

Before that a function must have run a few times, which prepares libraries and memory. Those runs, and the recording,
leave no trace (:meth:`Recorder._without_trace`).

On other devices a recording is the function itself.
"""

import random
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress

import numpy as np
import torch as th

# Runs before a recording; PyTorch's notes call for some
_WARM_UPS = 3

Function = Callable[[], object]
State = Callable[[], Iterable[th.Tensor]]


class CaptureError(RuntimeError):
    """A function waits for the device, or does something else that cannot be recorded."""


class Recorder:
    """Records functions.

    :param device: where they work
    """

    def __init__(self, device: th.device) -> None:
        self._device = device
        on_cuda = device.type == "cuda"
        self.warm_ups = _WARM_UPS if on_cuda else 0
        # Autograd remembers on which stream it first met a parameter, so there is one for running and for recording
        self._stream = th.cuda.Stream(device) if on_cuda else None  # type: ignore[no-untyped-call]  # PyTorch has no types for it

    def record(self, function: Function, state: State, warm_up: Function | None = None) -> Function:
        """Record a function.

        :param function: that is to be called again and again
        :param state: gives all tensors that it changes, some of which may be there only when it has run
        :param warm_up: a function that prepares all that it needs, to be run before; ``None`` if that is done
        :return: what does what it does
        :raises CannotRecordError: if that is not possible, with the reason
        """
        with self._without_trace(state):
            if warm_up is not None:
                self._run(warm_up)
            return function if self._stream is None else self._capture(function, self._stream)

    def _run(self, function: Function) -> None:
        if self._stream is None:
            for _ in range(self.warm_ups):
                function()
            return
        self._stream.wait_stream(th.cuda.current_stream(self._device))
        try:
            with th.cuda.stream(self._stream):
                for _ in range(self.warm_ups - 1):
                    function()
                with _no_waiting():
                    function()
        finally:
            th.cuda.current_stream(self._device).wait_stream(self._stream)

    def _capture(self, function: Function, stream: "th.cuda.Stream") -> Function:
        # No memory is shared between graphs, so they may be replayed in any order
        graph = th.cuda.CUDAGraph()
        try:
            # Other threads, such as those that write logs, may go on
            with th.cuda.device(self._device), th.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
                function()
        except RuntimeError as error:
            with suppress(RuntimeError):
                graph.reset()  # which also tells generators of random numbers that it is over
            raise CaptureError(_first_line(error)) from error
        return graph.replay

    @contextmanager
    def _without_trace(self, state: State) -> Iterator[None]:
        """Whatever happens inside, state and random numbers are afterwards what they were before.

        State that there was not before becomes 0, as averages of optimisers are before the first step.
        """
        if self.warm_ups == 0:
            yield
            return
        before = {id(tensor): (tensor, tensor.detach().clone()) for tensor in state()}
        of_python, of_numpy, of_torch = random.getstate(), np.random.get_state(), th.get_rng_state()
        of_device = th.cuda.get_rng_state(self._device) if self._stream is not None else None
        try:
            yield
        finally:
            with th.no_grad():
                for tensor in state():
                    if id(tensor) in before:
                        tensor.copy_(before[id(tensor)][1])
                    else:
                        tensor.zero_()
            random.setstate(of_python)
            np.random.set_state(of_numpy)
            th.set_rng_state(of_torch)
            if of_device is not None:
                th.cuda.set_rng_state(of_device, self._device)


@contextmanager
def _no_waiting() -> Iterator[None]:
    """Refuse to wait for the device, while nothing is being recorded that an error would spoil."""
    mode = th.cuda.get_sync_debug_mode()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it says that it does not see everything
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
    """A number that recorded functions read, and that may be another one each time.

    :param device: where they work
    :param dtype: of the number
    """

    def __init__(self, device: th.device, dtype: th.dtype = th.float32) -> None:
        self.tensor = th.zeros((), dtype=dtype, device=device)
        self._value = 0.0

    def set(self, value: float) -> None:
        """Let it be this from now on."""
        if value != self._value:
            self.tensor.fill_(value)
            self._value = value
