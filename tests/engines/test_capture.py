"""What the CUDA graph engine captures: nothing that a graph must not contain."""

import gc
import weakref

import pytest
import torch as th
from cuda_cases import CASES, SAMPLED_ON_HOST, SYNCHRONIZING, assert_close, learned, make
from helpers import assert_equal
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sb3_scratch_dqn.engines.cuda import capture
from sb3_scratch_dqn.engines.cuda.engine import CudaGraphEngine
from sb3_scratch_dqn.engines.cuda.feeds import HostFeed
from sb3_scratch_dqn.engines.cuda.optimizer import CapturableOptimizer
from sb3_scratch_dqn.replay import batch_source
from sb3_scratch_dqn.replay.device.buffer import DeviceReplay

pytestmark = pytest.mark.usefixtures("auto_selects_cuda_graphs")


class Calls(TorchDispatchMode):
    """Stores the names of calls, and the devices of their tensors."""

    def __init__(self):
        super().__init__()
        self.names, self.devices = [], set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.names.append(function.overloadpacket.__name__)
        for tensor in tree_leaves((args, kwargs, result)):
            if isinstance(tensor, th.Tensor):
                self.devices.add(tensor.device.type)
        return result


@pytest.mark.usefixtures("on_cpu")
@pytest.mark.parametrize("name", [name for name in CASES if "dict" not in name])
def test_captured_functions_do_not_synchronize(name):
    model, _ = learned(name, "cuda_graph", 1, updates=4)
    engine = model._engine
    engine._update_index.zero_()
    with Calls() as calls:
        engine._update()
        engine._polyak_update()
        model.policy.set_training_mode(False)
        for actor in engine._actors.values():
            actor.choose()
    assert not SYNCHRONIZING & set(calls.names), name
    assert len(calls.names) > 30


@pytest.mark.usefixtures("on_cpu")
@pytest.mark.parametrize("name", ["prioritized", "rainbow", "rainbow with iqn", "frames", "normalized", "normed"])
def test_captured_functions_always_use_the_same_memory(name):
    model, _ = learned(name, "cuda_graph", 1, updates=4)
    engine = model._engine

    def addresses():
        gradients = [parameter.grad for parameter in model.q_net.parameters()]
        tensors = [*engine._last_tensors.values(), *gradients, *engine._state()]
        return [tensor.data_ptr() for tensor in tensors]

    before = addresses()
    model.learn(40, reset_num_timesteps=False)
    assert model._engine is engine
    assert addresses() == before


class MetaOptimizer(CapturableOptimizer):
    """Steps on a device without Adam."""

    def step(self, loss):
        return self._clip(self._differentiate(loss))


@pytest.mark.parametrize("name", CASES)
def test_captured_functions_use_no_tensor_of_the_host(name, monkeypatch):
    if name in SAMPLED_ON_HOST:
        pytest.skip("batches are copied from the host")
    # A device without memory: reading a value, and combining its tensors with those of another device, raise errors
    meta = th.device("meta")
    monkeypatch.setattr(CudaGraphEngine, "device_type", "meta")
    monkeypatch.setattr("sb3_scratch_dqn.engines.cuda.engine.CapturableOptimizer", MetaOptimizer)
    model = make(name, "eager", learning_starts=1_000).learn(40)
    model.policy.to(meta)
    model.policy.optimizer = type(model.policy.optimizer)(model.q_net.parameters())
    engine = CudaGraphEngine(model.policy, model._objective())
    source = batch_source(model.replay_buffer, 16, None, 0.9)
    with pytest.raises((NotImplementedError, RuntimeError)):  # at the losses, as meta tensors have no values
        engine.train(source, 2, 10.0)
    assert len(engine._last_tensors) == 3, "an update was run"
    with Calls() as calls:
        engine._update()
        engine._polyak_update()
    assert calls.devices == {"meta"}


@pytest.mark.usefixtures("on_cpu")
def test_an_unused_engine_is_freed():
    model = make("prioritized", "cuda_graph").learn(60)
    engine = model._engine
    # Graphs do not reference the engine; functions do
    engine._update_graphs.clear()
    engine._actors.clear()
    engine._target_graph = None
    alive = weakref.ref(engine)
    gc.disable()
    try:
        model.engine = "eager"
        model.train(1, 16)
        del engine
        assert alive() is None
    finally:
        gc.enable()


@pytest.mark.usefixtures("fake_graphs")
def test_a_buffer_that_does_not_fit_on_the_device_is_sampled_on_the_host(monkeypatch):
    eager, eager_states = learned("rainbow", "eager", 4)
    monkeypatch.setattr(DeviceReplay, "unsupported_reason", staticmethod(lambda *_: "not enough memory"))
    with pytest.warns(UserWarning, match="samples on the host, which is slower: not enough memory"):
        model, model_states = learned("rainbow", "cuda_graph", 4)
    assert type(model._engine._feed) is HostFeed
    assert_equal(eager_states, model_states)
    assert_close(eager, model)


def test_the_reason_is_the_first_line_of_an_error():
    assert capture._first_line(RuntimeError("one\ntwo")) == "one"
    assert capture._first_line(RuntimeError()) == "RuntimeError"
