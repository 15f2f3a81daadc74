r"""What the fused CPU engine learns from a batch: the gradient at the network's outputs, and what leads to it.

For the expected head it is written by hand. With :math:`\delta_i = Q(s_i, a_i) - y_i`, importance weights
:math:`w_i` and ``B`` samples, the loss :math:`\frac{1}{B} \sum_i w_i L(\delta_i)` has the gradient
:math:`\frac{1}{B} w_i L'(\delta_i)` at the action taken and 0 at the others, where :math:`L'(\delta)` is :math:`\delta`
clipped to [-1, 1] for Huber's loss and :math:`2 \delta` for the squared error. Other heads get it from autograd, for
their few outputs only.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch as th
from gymnasium import spaces
from stable_baselines3.common.preprocessing import is_image_space, preprocess_obs
from stable_baselines3.common.type_aliases import PyTorchObs

from sb3_scratch_dqn.engines.fused.dense import DenseNetwork
from sb3_scratch_dqn.engines.fused.products import Floats
from sb3_scratch_dqn.networks.policies import DQNPolicy
from sb3_scratch_dqn.replay import ArrayBatch
from sb3_scratch_dqn.values.heads import ExpectedHead, ValueHead, huber, squared
from sb3_scratch_dqn.values.td import Objective, at_actions, make_target

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


# Observations, as they lie in an array, -> (B, n_inputs), of any dtype
Inputs = Callable[[Any], npt.NDArray[Any]]


def make_inputs(policy: DQNPolicy) -> Inputs:
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
        if not observation.flags.writeable:  # of which PyTorch would warn
            observation = observation.copy()
        tensor = preprocess_obs(th.as_tensor(observation), space, normalize_images=normalize)
        assert isinstance(tensor, th.Tensor)
        return tensor.reshape(len(observation), -1).numpy()

    return inputs


class Learner(Protocol):
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
    """A network as the targets in :mod:`sb3_scratch_dqn.values.td` want it."""

    def __init__(self, network: DenseNetwork, inputs: Inputs, head: ValueHead, n_actions: int) -> None:
        self._network, self._inputs, self._head = network, inputs, head
        self._view = (-1, n_actions, head.n_outputs)

    def target_outputs(self, obs: PyTorchObs) -> th.Tensor:
        """Observations -> ``(B, A, K)``."""
        inputs = self._inputs(_arrays(obs))
        outputs = self._network.passing(len(inputs), self._network.noisy).forward(inputs)
        return th.from_numpy(outputs.copy()).view(self._view)  # the pass will write over it

    def q_values_from(self, obs: PyTorchObs, target_outputs: th.Tensor) -> th.Tensor:
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
        self._target_fn = make_target(objective, deciding, valuing, head)
        self._at_once = not objective.double_q

    def prepare(self, batches: ArrayBatch, n_batches: int) -> None:
        """Compute all targets, unless the online network has a say in them."""
        tensors = batches.tensors(th.device("cpu"))
        self._batches = tensors.split(n_batches)
        self._targets: tuple[th.Tensor, ...] | None = None
        if self._at_once and n_batches > 1:
            self._targets = th.split(self._target_fn(tensors), len(tensors.actions) // n_batches)

    def backward(self, number: int) -> tuple[float, th.Tensor]:
        """Write the gradient of the parameters; return the mean loss, and the priorities, ``(B,)``."""
        batch = self._batches[number]
        target = self._target_fn(batch) if self._targets is None else self._targets[number]
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


def make_learner(
    online: DenseNetwork, target: DenseNetwork, inputs: Inputs, head: ValueHead, objective: Objective
) -> Learner:
    """Choose what writes gradients.

    :param online: the network that learns
    :param target: the target network
    :param inputs: what turns observations into what the first layer reads
    :param head: what the outputs of both mean
    :param objective: what is to be learned
    """
    by_hand = type(head) is ExpectedHead and objective.munchausen is None and objective.loss in _LOSSES
    learner = _ExpectedLearner if by_hand else _HeadLearner
    return learner(online, target, inputs, head, objective)
