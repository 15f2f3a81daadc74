r"""The fused CPU engine: updates without autograd, for networks of linear layers.

What an update costs in PyTorch is mostly overhead. This engine computes the same numbers, up to rounding, with as few
calls as possible:

- forwards and backwards by hand (:mod:`sb3_scratch_dqn.engines.dense`);
- parameters, gradients and Adam's state each in one piece (:mod:`sb3_scratch_dqn.engines.flat`);
- batches and targets of many gradient steps in one go, since the target network does not change in between;
- for the expected head, the gradient of the loss by hand. With :math:`\delta_i = Q(s_i, a_i) - y_i`, importance weights
  :math:`w_i` and ``B`` samples, the loss :math:`\frac{1}{B} \sum_i w_i L(\delta_i)` has the gradient
  :math:`\frac{1}{B} w_i L'(\delta_i)` at the action taken and 0 at the others, where :math:`L'(\delta)` is
  :math:`\delta` clipped to [-1, 1] for Huber's loss and :math:`2 \delta` for the squared error.
  Other heads get it from autograd, for their few outputs only.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any, ClassVar, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch as th
from gymnasium import spaces
from stable_baselines3.common.preprocessing import is_image_space, preprocess_obs
from stable_baselines3.common.torch_layers import CombinedExtractor, FlattenExtractor
from stable_baselines3.common.type_aliases import PyTorchObs
from torch import nn

from sb3_scratch_dqn.engines.dense import ACTIVATIONS, DenseNetwork, linear_layers
from sb3_scratch_dqn.engines.flat import FlatParameters, why_no_adam
from sb3_scratch_dqn.engines.products import Floats
from sb3_scratch_dqn.engines.update import LastUpdate
from sb3_scratch_dqn.engines.watch import has_own_way, hooks_of, is_patched
from sb3_scratch_dqn.heads import ExpectedHead, ValueHead, huber, squared
from sb3_scratch_dqn.networks import DuelingStreams, QNetwork
from sb3_scratch_dqn.noisy import NoisyLinear
from sb3_scratch_dqn.overriding import replaced
from sb3_scratch_dqn.policies import DQNPolicy
from sb3_scratch_dqn.replay import ArrayBatch, BatchSource
from sb3_scratch_dqn.td import Objective, at_actions, make_target

# Transitions whose targets are computed in one go: many enough to hide what calls cost, few enough for the caches
_ROWS_AT_ONCE = 1024

_ONE = np.float32(1)
_HALF = np.float32(0.5)


def _huber_derivative(delta: Floats, out: Floats) -> None:
    np.minimum(delta, _ONE, out=out)
    np.maximum(out, -_ONE, out=out)


def _huber_loss(delta: Floats, derivative: Floats) -> Floats:
    # Within [-1, 1] the derivative is delta and this is delta**2 / 2; outside it is 1 or -1 and this |delta| - 1 / 2
    loss: Floats = derivative * (delta - _HALF * derivative)
    return loss


# What writes the derivative at each delta, and the loss given both
_LOSSES: dict[Any, tuple[Callable[[Floats, Floats], object], Callable[[Floats, Floats], Floats]]] = {
    huber: (_huber_derivative, _huber_loss),
    squared: (lambda delta, out: np.add(delta, delta, out), lambda delta, derivative: _HALF * derivative * delta),
}


def _why_not(policy: DQNPolicy) -> str | None:
    network = policy.q_net
    if policy.device.type != "cpu":
        return f"device={policy.device.type!r} is not 'cpu'"
    for one in (network, policy.q_net_target):
        if type(one) is not QNetwork:
            return f"the network is a {type(one).__name__}, not a plain QNetwork"
        if is_patched(one):
            return "a method of the network was patched"
        if type(one.q_net) is not nn.Sequential or len(one.q_net) == 0:
            return f"the layers are a {type(one.q_net).__name__}, not a plain Sequential"
    if is_patched(policy.head) or replaced(policy, DQNPolicy, "noise"):
        return "a method of the head or the policy was replaced"
    if not _only_flattens(network.features_extractor):
        return f"features_extractor_class={type(network.features_extractor).__name__} does more than flatten"
    return (
        _why_no_layers(list(network.q_net))
        or _why_no_layers(list(policy.q_net_target.q_net))
        or _why_no_parameters(network)
        or _why_no_parameters(policy.q_net_target)
        or why_no_adam(policy.optimizer, network.parameters())
    )


def _only_flattens(extractor: nn.Module) -> bool:
    """Whether all that becomes of observations is that they lie side by side."""
    if type(extractor) is CombinedExtractor:
        return all(type(one) is nn.Flatten for one in extractor.extractors.values())
    return type(extractor) is FlattenExtractor


def _why_no_layers(modules: list[nn.Module]) -> str | None:
    if type(modules[-1]) is DuelingStreams:
        for stream in (modules[-1].value, modules[-1].advantage):
            reason = _why_no_layers(list(stream))
            if reason is not None:
                return reason
        modules = modules[:-1]
    known = {nn.Linear, NoisyLinear, *ACTIVATIONS}
    for module in modules:
        if type(module) not in known:
            names = ", ".join(activation.__name__ for activation in ACTIVATIONS)
            return f"activation_fn={type(module).__name__} is none of {names}"
    n_activations = sum(activation is not None for _, activation in linear_layers(modules))
    if n_activations != sum(type(module) in ACTIVATIONS for module in modules):
        return "the network has activations that do not follow a linear layer"
    return None


def _linear(modules: list[nn.Module]) -> Iterator[nn.Module]:
    """The linear layers, as often as they are used."""
    for module in modules:
        if isinstance(module, nn.Linear | NoisyLinear):
            yield module
        elif isinstance(module, DuelingStreams):
            yield from _linear([*module.value, *module.advantage])


def _why_no_parameters(network: QNetwork) -> str | None:
    used = [parameter for layer in _linear(list(network.q_net)) for parameter in layer._parameters.values()]
    if any(one is None for one in used):
        return "a layer has no bias"
    # named_parameters() leaves out what comes twice
    if list(map(id, used)) != [id(parameter) for parameter in network.parameters()]:
        return "layers share parameters, or the network has others than those of its layers"
    for name, parameter in network.named_parameters():
        if parameter.dtype != th.float32:
            return f"the parameter {name} has dtype {parameter.dtype}, not torch.float32"
        if has_own_way(parameter):
            return f"the parameter {name} is frozen or has hooks"
    for name, module in network.named_modules():
        if any(hooks_of(module)):
            return f"the module {name or 'q_net'} has hooks"
    return None


class FusedEngine:
    """Gradient steps by hand.

    :param policy: whose online network is trained
    :param objective: what it is to learn
    """

    name: ClassVar[str] = "fused"
    title: ClassVar[str] = "the fused engine"
    device_type: ClassVar[str | None] = "cpu"
    not_by_itself: ClassVar[str | None] = None

    def __init__(self, policy: DQNPolicy, objective: Objective) -> None:
        self.policy = policy
        self.objective = objective
        self.last_update: LastUpdate | None = None
        self._flat: FlatParameters | None = None

    @staticmethod
    def why_not(policy: DQNPolicy, objective: Objective) -> str | None:
        """Why this engine cannot serve; ``None`` if it can."""
        return _why_not(policy)

    def _attach(self) -> None:
        """Rearrange the parameters, once somebody trains or acts."""
        policy = self.policy
        self._flat = FlatParameters(policy)
        self._online = DenseNetwork(list(policy.q_net.q_net), trains=True)
        self._target = DenseNetwork(list(policy.q_net_target.q_net), trains=False)
        self._inputs = _make_inputs(policy)
        head, objective = policy.head, self.objective
        by_hand = type(head) is ExpectedHead and objective.munchausen is None and objective.loss in _LOSSES
        learner = _ExpectedLearner if by_hand else _HeadLearner
        self._learner: _Learner = learner(self._online, self._target, self._inputs, head, objective)

    def outdated(self) -> bool:
        """Whether somebody changed the policy in a way that this engine must be made anew for."""
        return self._flat is not None and self._flat.outdated()

    def train(self, source: BatchSource, gradient_steps: int, max_grad_norm: float) -> list[float]:
        """Take some gradient steps.

        :param source: gives the batch of each step, and takes the priorities of its transitions
        :param gradient_steps: how many
        :param max_grad_norm: the gradient of a step is scaled down to this norm
        :return: the mean loss of each step
        """
        if self._flat is None:
            self._attach()
        with np.errstate(all="ignore"):  # training that diverges is as silent as in PyTorch
            return self._train(source, gradient_steps, max_grad_norm)

    def _train(self, source: BatchSource, gradient_steps: int, max_grad_norm: float) -> list[float]:
        assert self._flat is not None
        self._flat.show_gradients()
        flat, learner, batch_size = self._flat, self._learner, source.batch_size
        # With noise, the target network is another one in each step
        ahead = source.ahead and not self._online.noisy
        at_once = max(1, _ROWS_AT_ONCE // batch_size) if ahead else 1
        losses: list[float] = []
        norm = 0.0
        for begin in range(0, gradient_steps, at_once):
            n_batches = min(at_once, gradient_steps - begin)
            batches = source.draw_arrays(n_batches)
            rows = len(batches.actions)
            self._online.draw_noise(rows, trains=True)
            self._target.draw_noise(rows, trains=False)
            learner.prepare(batches, n_batches)
            for number in range(n_batches):
                loss, priorities = learner.backward(number)
                losses.append(loss)
                norm = self._clip(max_grad_norm)
                flat.adam_step()
                if not ahead:
                    source.give_back(batches, priorities)
        if losses:
            self.last_update = LastUpdate(self.policy.head, *learner.last(), norm)
        return losses

    def _clip(self, max_norm: float) -> float:
        assert self._flat is not None
        gradient = self._flat.gradient.array
        norm = math.sqrt(np.dot(gradient, gradient))
        coefficient = max_norm / (norm + 1e-6)
        if not coefficient >= 1:  # also if it is no number
            np.multiply(gradient, np.float32(coefficient), gradient)
        return norm

    def act(self, observation: Any, envs: Any = None) -> Any:
        """Greedy actions, with noise in noisy layers.

        :param observation: ``(B, ...)``, or a dict of such arrays
        :param envs: the rows that are wanted, ``(N,)``; ``None`` for all
        :return: ``(N,)``
        """
        if self._flat is None:
            self._attach()
        online, inputs = self._online, self._inputs(observation)
        if online.noisy:
            online.draw_noise(len(inputs), trains=False)
        # Of all rows: memory for another size takes longer to find than the few rows to compute
        actions = self._learner.greedy(online.passing(len(inputs), online.noisy).forward(inputs))
        return actions if envs is None else actions[envs]

    def move_target(self, tau: float) -> None:
        """Let the target network follow.

        :param tau: how far; 1 copies the online network
        """
        if self._flat is None:
            self._attach()
        assert self._flat is not None
        self._flat.move_target(tau)


# Observations, as they lie in an array, -> (B, n_inputs), of any dtype
Inputs = Callable[[Any], npt.NDArray[Any]]


def _make_inputs(policy: DQNPolicy) -> Inputs:
    """What turns observations into what the first layer reads."""
    space, normalize = policy.observation_space, policy.q_net.normalize_images
    if not isinstance(space, spaces.Dict):
        return _flattened(space, normalize)
    parts = {key: _flattened(part, normalize) for key, part in space.spaces.items()}
    # In the order in which CombinedExtractor has them
    return lambda observation: np.concatenate([part(observation[key]) for key, part in parts.items()], axis=1)


def _flattened(space: spaces.Space[Any], normalize: bool) -> Inputs:
    if isinstance(space, spaces.Box) and not (normalize and is_image_space(space)):
        if len(space.shape) == 1:
            return lambda observation: observation
        return lambda observation: observation.reshape(len(observation), -1)

    def inputs(observation: Any) -> npt.NDArray[Any]:
        tensor = preprocess_obs(th.as_tensor(observation), space, normalize_images=normalize)
        assert isinstance(tensor, th.Tensor)
        return tensor.reshape(len(observation), -1).numpy()

    return inputs


class _Learner(Protocol):
    """Computes gradients."""

    def prepare(self, batches: ArrayBatch, n_batches: int) -> None:
        """Get batches, and compute what does not depend on the online network."""

    def backward(self, number: int) -> tuple[float, th.Tensor]:
        """Write the gradient of the parameters, for one of the batches.

        :param number: of the batch, from 0
        :return: the mean loss, and the priorities, ``(B,)``
        """

    def last(self) -> tuple[th.Tensor | Floats, th.Tensor | Floats]:
        """Outputs at the actions taken, ``(B, K)``, and targets, of the last call of :meth:`backward`."""

    def greedy(self, outputs: Floats) -> Any:
        """The best action of each row of outputs, ``(B, A * K)``."""


class _Memory(NamedTuple):
    """What :class:`_ExpectedLearner` needs for batches of one size."""

    first_of_row: npt.NDArray[np.int64]  # where each row of outputs begins
    predicted: Floats
    delta: Floats
    derivative: Floats


class _ExpectedLearner:
    """Greedy targets for one value an action, by hand.

    :param online: the network that learns
    :param target: the target network
    :param inputs: what turns observations into what the first layer reads
    :param head: not needed
    :param objective: what is to be learned
    """

    def __init__(
        self, online: DenseNetwork, target: DenseNetwork, inputs: Inputs, head: ValueHead, objective: Objective
    ) -> None:
        self._online, self._target, self._inputs = online, target, inputs
        self._derivative, self._loss = _LOSSES[objective.loss]
        self._double_q = objective.double_q
        self._memory: dict[int, _Memory] = {}

    def prepare(self, batches: ArrayBatch, n_batches: int) -> None:
        """Compute all targets; with double Q-learning all that the target network says."""
        self._batches, self._size = batches, len(batches.actions) // n_batches
        self._x, self._next_x = self._inputs(batches.observations), self._inputs(batches.next_observations)
        values = self._target.passing(len(batches.actions), self._target.noisy).forward(self._next_x)
        if self._double_q:
            self._values = values
        else:
            best = _allowed(values, batches.next_action_masks).max(axis=1)
            self._targets = batches.returns + batches.discounts * best
        if self._size not in self._memory:
            size, n_actions = self._size, values.shape[1]
            floats = [np.empty(size, dtype=np.float32) for _ in range(3)]
            self._memory[size] = _Memory(np.arange(size) * n_actions, *floats)

    def backward(self, number: int) -> tuple[float, th.Tensor]:
        """Write the gradient of the parameters; return the mean loss, and the priorities, ``(B,)``."""
        batches, size = self._batches, self._size
        part = slice(number * size, (number + 1) * size)
        one = self._online.passing(size, self._online.noisy)
        first_of_row, predicted, delta, derivative = self._memory[size]
        if self._double_q:
            masks = None if batches.next_action_masks is None else batches.next_action_masks[part]
            best = _allowed(one.forward(self._next_x[part]), masks).argmax(axis=1)
            next_values = self._values[part].reshape(-1).take(first_of_row + best)
            target = batches.returns[part] + batches.discounts[part] * next_values
        else:
            target = self._targets[part]
        taken = first_of_row + batches.actions[part]
        one.forward(self._x[part]).reshape(-1).take(taken, None, predicted, "clip")
        np.subtract(predicted, target, delta)
        self._derivative(delta, derivative)
        losses = self._loss(delta, derivative)
        weights = batches.weights[part]
        np.multiply(derivative, weights, derivative)
        np.multiply(derivative, np.float32(1 / size), derivative)
        gradient = one.gradient.array
        gradient.fill(0)
        gradient.reshape(-1)[taken] = derivative
        one.backward()
        self._last = predicted, target
        return float(np.dot(weights, losses)) / size, th.from_numpy(np.abs(delta))

    def last(self) -> tuple[Floats, Floats]:
        """Outputs at the actions taken, ``(B, 1)``, and targets, ``(B,)``."""
        predicted, target = self._last
        return predicted[:, None], target

    def greedy(self, outputs: Floats) -> Any:
        """The best action of each row."""
        return outputs.argmax(axis=1)


def _allowed(values: Floats, masks: Any) -> Floats:
    """Values that say what is best among allowed actions."""
    return values if masks is None else np.where(masks, values, np.float32(-np.inf))


def _arrays(obs: PyTorchObs) -> Any:
    return {key: part.numpy() for key, part in obs.items()} if isinstance(obs, dict) else obs.numpy()


class _NetworkForTargets:
    """A network as the targets in :mod:`sb3_scratch_dqn.td` want it."""

    def __init__(self, network: DenseNetwork, inputs: Inputs, head: ValueHead, n_actions: int) -> None:
        self._network, self._inputs, self._head = network, inputs, head
        self._view = (-1, n_actions, head.n_outputs)

    def target_outputs(self, obs: PyTorchObs) -> th.Tensor:
        """Observations -> ``(B, A, K)``."""
        inputs = self._inputs(_arrays(obs))
        outputs = self._network.passing(len(inputs), self._network.noisy).forward(inputs)
        return th.from_numpy(outputs.copy()).view(self._view)  # the pass will write over it

    def values_given(self, obs: PyTorchObs, target_outputs: th.Tensor) -> th.Tensor:
        """Action values, ``(B, A)``, where the outputs of these observations are at hand."""
        return self._head.q_values(target_outputs)

    def evaluate(self, obs: PyTorchObs) -> th.Tensor:
        """Observations -> action values, ``(B, A)``."""
        return self._head.q_values(self.target_outputs(obs))


class _HeadLearner:
    """Any targets, and heads whose loss autograd knows the gradient of; parameters as in :class:`_ExpectedLearner`."""

    def __init__(
        self, online: DenseNetwork, target: DenseNetwork, inputs: Inputs, head: ValueHead, objective: Objective
    ) -> None:
        self._online, self._inputs, self._head, self._loss = online, inputs, head, objective.loss
        self._view = (-1, online.n_outputs // head.n_outputs, head.n_outputs)
        deciding, valuing = (_NetworkForTargets(one, inputs, head, self._view[1]) for one in (online, target))
        self._target_of = make_target(objective, deciding, valuing, head)
        self._at_once = not objective.double_q

    def prepare(self, batches: ArrayBatch, n_batches: int) -> None:
        """Compute all targets, unless the online network has a say in them."""
        tensors = batches.tensors(th.device("cpu"))
        self._batches = tensors.split(n_batches)
        self._targets: tuple[th.Tensor, ...] | None = None
        if self._at_once and n_batches > 1:
            self._targets = th.split(self._target_of(tensors), len(tensors.actions) // n_batches)

    def backward(self, number: int) -> tuple[float, th.Tensor]:
        """Write the gradient of the parameters; return the mean loss, and the priorities, ``(B,)``."""
        batch = self._batches[number]
        target = self._target_of(batch) if self._targets is None else self._targets[number]
        one = self._online.passing(len(batch.actions), self._online.noisy)
        one.forward(self._inputs(_arrays(batch.observations)))
        taken = at_actions(one.out.tensor.view(self._view), batch.actions).requires_grad_()
        losses, priorities = self._head.losses(taken, target, self._loss)
        loss = (batch.weights * losses).mean()
        (of_taken,) = th.autograd.grad(loss, taken)
        gradient = one.gradient.tensor.zero_().view(self._view)
        index = batch.actions.view(-1, 1, 1).expand(-1, 1, self._view[2])
        gradient.scatter_(1, index, of_taken.unsqueeze(1))
        one.backward()
        self._last = taken.detach(), target
        return loss.item(), priorities

    def last(self) -> tuple[th.Tensor, th.Tensor]:
        """Outputs at the actions taken, ``(B, K)``, and targets."""
        return self._last

    def greedy(self, outputs: Floats) -> Any:
        """The best action of each row."""
        return self._head.q_values(th.from_numpy(outputs).view(self._view)).argmax(dim=1).numpy()
