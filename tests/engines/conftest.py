"""CUDA graphs without a GPU."""

from types import SimpleNamespace

import pytest
from cuda_cases import FakeGraph

from sb3_scratch_dqn.engines.cuda.capture import CaptureError, GraphCapturer
from sb3_scratch_dqn.engines.cuda.engine import CudaGraphEngine


@pytest.fixture
def auto_selects_cuda_graphs(monkeypatch):
    """Let "auto" select the CUDA graph engine where it supports the configuration."""
    monkeypatch.setattr(CudaGraphEngine, "opt_in_reason", None)


@pytest.fixture
def on_cpu(monkeypatch):
    """Let the CUDA graph engine support the CPU, where a function is its own replay."""
    monkeypatch.setattr(CudaGraphEngine, "device_type", "cpu")


@pytest.fixture
def fake_graphs(on_cpu, monkeypatch):
    """Capture on the CPU, by a :class:`FakeGraph`; ``allow_synchronization = False`` makes calls that wait fail."""
    settings = SimpleNamespace(allow_synchronization=True, graphs=[])

    def capture(self, function, state, warm_up=None):
        self.warm_ups = 2
        with self._preserve_state(state):
            if warm_up is not None:
                self._warm_up(warm_up)
            graph = FakeGraph(settings.allow_synchronization)
            try:
                with graph:
                    function()
            except RuntimeError as error:
                raise CaptureError(str(error)) from error
        settings.graphs.append(graph)
        return graph.replay

    monkeypatch.setattr(GraphCapturer, "capture", capture)
    return settings
