"""CUDA graphs without a GPU."""

from types import SimpleNamespace

import pytest
from recorded import Tape

from sb3_scratch_dqn.engines.cuda.engine import CudaGraphEngine
from sb3_scratch_dqn.engines.cuda.recording import CaptureError, Recorder


@pytest.fixture
def auto_takes_cuda_graphs(monkeypatch):
    """Let "auto" take CUDA graphs, so that it is seen what that does."""
    monkeypatch.setattr(CudaGraphEngine, "opt_in_reason", None)


@pytest.fixture
def on_cpu(monkeypatch):
    """Let CUDA graphs serve the CPU, where a recording is the function itself."""
    monkeypatch.setattr(CudaGraphEngine, "device_type", "cpu")


@pytest.fixture
def taped(on_cpu, monkeypatch):
    """Record on the CPU, by a :class:`Tape`; ``taped.patient = False`` makes it refuse what waits."""
    settings = SimpleNamespace(patient=True, tapes=[])

    def record(self, function, state, warm_up=None):
        self.warm_ups = 2
        with self._without_trace(state):
            if warm_up is not None:
                self._run(warm_up)
            tape = Tape(settings.patient)
            try:
                with tape:
                    function()
            except RuntimeError as error:
                raise CaptureError(str(error)) from error
        settings.tapes.append(tape)
        return tape.replay

    monkeypatch.setattr(Recorder, "record", record)
    return settings
