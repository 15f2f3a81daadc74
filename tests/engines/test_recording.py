"""What the CUDA graph engine records: nothing that a graph must not contain."""

import gc
import weakref

import pytest
import torch as th
from helpers import assert_equal
from recorded import CASES, FROM_THE_HOST, WAITING, assert_close, learned, make
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sb3_scratch_dqn.engines.cuda import recording
from sb3_scratch_dqn.engines.cuda.engine import CudaGraphEngine
from sb3_scratch_dqn.engines.cuda.feeds import HostFeed
from sb3_scratch_dqn.engines.cuda.steps import DeviceSteps
from sb3_scratch_dqn.replay import batch_source
from sb3_scratch_dqn.replay.device.buffer import DeviceReplay

pytestmark = pytest.mark.usefixtures("auto_takes_cuda_graphs")


class Calls(TorchDispatchMode):
    """Notes what is called, and on which devices."""

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
def test_a_recording_waits_for_nobody(name):
    model, _ = learned(name, "cuda_graph", 1, updates=4)
    engine = model._engine
    engine._number.zero_()
    with Calls() as calls:
        engine._update()
        engine._move_target()
        model.policy.set_training_mode(False)
        for actor in engine._actors.values():
            actor.choose()
    assert not WAITING & set(calls.names), name
    assert len(calls.names) > 30


@pytest.mark.usefixtures("on_cpu")
@pytest.mark.parametrize("name", ["prioritized", "rainbow", "rainbow with iqn", "frames", "normalized", "normed"])
def test_a_recording_always_works_on_the_same_memory(name):
    model, _ = learned(name, "cuda_graph", 1, updates=4)
    engine = model._engine

    def addresses():
        gradients = [parameter.grad for parameter in model.q_net.parameters()]
        kept = [*engine._kept.values(), *gradients, *engine._state()]
        return [tensor.data_ptr() for tensor in kept]

    before = addresses()
    model.learn(40, reset_num_timesteps=False)
    assert model._engine is engine
    assert addresses() == before


class MetaSteps(DeviceSteps):
    """Steps on a device that has no Adam."""

    def take(self, loss):
        return self._clip(self._differentiate(loss))


@pytest.mark.parametrize("name", CASES)
def test_a_recording_has_nothing_from_the_host_in_it(name, monkeypatch):
    if name in FROM_THE_HOST:
        pytest.skip("batches come from the host")
    # A device without memory, which refuses to tell a value, and to work with tensors that lie elsewhere
    meta = th.device("meta")
    monkeypatch.setattr(CudaGraphEngine, "device_type", "meta")
    monkeypatch.setattr("sb3_scratch_dqn.engines.cuda.engine.DeviceSteps", MetaSteps)
    model = make(name, "eager", learning_starts=1_000).learn(40)
    model.policy.to(meta)
    model.policy.optimizer = type(model.policy.optimizer)(model.q_net.parameters())
    engine = CudaGraphEngine(model.policy, model._objective())
    source = batch_source(model.replay_buffer, 16, None, 0.9)
    with pytest.raises((NotImplementedError, RuntimeError)):  # up to the losses, which meta tensors do not have
        engine.train(source, 2, 10.0)
    assert len(engine._kept) == 3, "an update was taken"
    with Calls() as calls:
        engine._update()
        engine._move_target()
    assert calls.devices == {"meta"}


@pytest.mark.usefixtures("on_cpu")
def test_an_engine_that_is_not_needed_any_more_lets_its_memory_go():
    model = make("prioritized", "cuda_graph").learn(60)
    engine = model._engine
    # Graphs do not hold the engine; functions do
    engine._updates.clear()
    engine._actors.clear()
    engine._follow = None
    alive = weakref.ref(engine)
    gc.disable()
    try:
        model.engine = "eager"
        model.train(1, 16)
        del engine
        assert alive() is None
    finally:
        gc.enable()


@pytest.mark.usefixtures("taped")
def test_a_buffer_that_does_not_fit_on_the_device_is_sampled_on_the_host(monkeypatch):
    eager, states = learned("rainbow", "eager", 4)
    monkeypatch.setattr(DeviceReplay, "unsupported_reason", staticmethod(lambda *_: "there is no room"))
    with pytest.warns(UserWarning, match="gets batches from the host, which takes longer: there is no room"):
        model, its_states = learned("rainbow", "cuda_graph", 4)
    assert type(model._engine._feed) is HostFeed
    assert_equal(states, its_states)
    assert_close(eager, model)


def test_a_device_that_waits_is_told_by_its_first_line():
    assert recording._first_line(RuntimeError("one\ntwo")) == "one"
    assert recording._first_line(RuntimeError()) == "RuntimeError"
