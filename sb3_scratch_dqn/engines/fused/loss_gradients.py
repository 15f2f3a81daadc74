r"""Targets, losses, and the gradient at the network's outputs, for the fused CPU engine.

The gradient for the expected head is hand-derived. With :math:`\delta_i = Q(s_i, a_i) - y_i`, importance weights
:math:`w_i` and ``B`` samples, the loss :math:`\frac{1}{B} \sum_i w_i L(\delta_i)` has the gradient
:math:`\frac{1}{B} w_i L'(\delta_i)` at the action taken and 0 at the others, where :math:`L'(\delta)` is :math:`\delta`
clipped to [-1, 1] for Huber's loss and :math:`2 \delta` for the squared error. For other heads autograd computes it,
starting at the outputs of the actions taken.
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
from sb3_scratch_dqn.values.heads import ExpectedHead, ValueHead
from sb3_scratch_dqn.values.losses import huber, squared
from sb3_scratch_dqn.values.td import Objective, at_actions, make_target

_ONE = np.float32(1)
_HALF = np.float32(0.5)


def _huber_derivative(delta: Floats, out: Floats) -> None:
    np.minimum(delta, _ONE, out=out)
    np.maximum(out, -_ONE, out=out)


def _huber_loss(delta: Floats, derivative: Floats) -> Floats:
    # Within [-1, 1] the derivative is delta, and this is delta**2 / 2; outside it is 1 or -1, and this |delta| - 1 / 2
    loss: Floats = derivative * (delta - _HALF * derivative)
    return loss


# Elementwise error -> (delta, out) that writes the derivative, and (delta, derivative) -> loss
_DERIVATIVES_AND_LOSSES: dict[Any, tuple[Callable[[Floats, Floats], object], Callable[[Floats, Floats], Floats]]] = {
    huber: (_huber_derivative, _huber_loss),
    squared: (lambda delta, out: np.add(delta, delta, out), lambda delta, derivative: _HALF * derivative * delta),
}


# Observations as arrays -> (B, n_inputs), of any dtype
Preprocessor = Callable[[Any], npt.NDArray[Any]]


def make_preprocessor(policy: DQNPolicy) -> Preprocessor:
    """Return the function that turns observations into inputs of the first layer."""
    space, normalize = policy.observation_space, policy.q_net.normalize_images
    if not isinstance(space, spaces.Dict):
        return _flat_preprocessor(space, normalize)
    preprocessors = {key: _flat_preprocessor(part, normalize) for key, part in space.spaces.items()}
    # In the order of CombinedExtractor
    return lambda observation: np.concatenate(
        [preprocess(observation[key]) for key, preprocess in preprocessors.items()], axis=1
    )


def _flat_preprocessor(space: spaces.Space[Any], normalize: bool) -> Preprocessor:
    if isinstance(space, spaces.Box) and not (normalize and is_image_space(space)):
        if len(space.shape) == 1:
            return lambda observation: observation
        return lambda observation: observation.reshape(len(observation), -1)

    def preprocess(observation: Any) -> npt.NDArray[Any]:
        if not observation.flags.writeable:  # PyTorch warns about read-only arrays
            observation = observation.copy()
        tensor = preprocess_obs(th.as_tensor(observation), space, normalize_images=normalize)
        assert isinstance(tensor, th.Tensor)
        return tensor.reshape(len(observation), -1).numpy()

    return preprocess


class LossGradient(Protocol):
    """Computes the loss of a mini-batch, and its gradient with respect to the parameters."""

    def prepare(self, batches: ArrayBatch, n_batches: int) -> None:
        """Set the next mini-batches, and compute what does not depend on the online network.

        :param batches: the mini-batches, concatenated
        :param n_batches: number of mini-batches
        """

    def backward(self, index: int) -> tuple[float, th.Tensor]:
        """Write the gradient of the parameters for a mini-batch.

        :param index: index of the mini-batch, from 0
        :return: the mean loss, and the priorities, ``(B,)``
        """

    def last_prediction(self) -> tuple[th.Tensor | Floats, th.Tensor | Floats]:
        """Return outputs at the actions taken, ``(B, K)``, and target, of the last call of :meth:`backward`."""

    def greedy_actions(self, outputs: Floats) -> Any:
        """Return the best action of each row of outputs, ``(B, A * K)``."""


class _Workspace(NamedTuple):
    """Memory of :class:`_ExpectedLossGradient` for mini-batches of one size."""

    row_begins: npt.NDArray[np.int64]  # index of the first output of each row
    predicted: Floats
    delta: Floats
    derivative: Floats


class _ExpectedLossGradient:
    """Hand-derived gradients for greedy targets and the expected head.

    :param online: online network
    :param target: target network
    :param preprocess: turns observations into inputs of the first layer
    :param objective: what the network learns
    """

    def __init__(
        self, online: DenseNetwork, target: DenseNetwork, preprocess: Preprocessor, objective: Objective
    ) -> None:
        self._online, self._target, self._preprocess = online, target, preprocess
        self._derivative, self._loss = _DERIVATIVES_AND_LOSSES[objective.loss]
        self._double_q = objective.double_q
        self._workspaces: dict[int, _Workspace] = {}

    def prepare(self, batches: ArrayBatch, n_batches: int) -> None:
        """Compute all targets; with double Q-learning, all outputs of the target network."""
        self._batches, self._size = batches, len(batches.actions) // n_batches
        self._x, self._next_x = self._preprocess(batches.observations), self._preprocess(batches.next_observations)
        values = self._target.pass_for(len(batches.actions), self._target.noisy).forward(self._next_x)
        if self._double_q:
            self._values = values
        else:
            best = _mask_values(values, batches.next_action_masks).max(axis=1)
            self._targets = batches.returns + batches.discounts * best
        if self._size not in self._workspaces:
            size, n_actions = self._size, values.shape[1]
            floats = [np.empty(size, dtype=np.float32) for _ in range(3)]
            self._workspaces[size] = _Workspace(np.arange(size) * n_actions, *floats)

    def backward(self, index: int) -> tuple[float, th.Tensor]:
        """Write the gradient of the parameters; return the mean loss, and the priorities, ``(B,)``."""
        batches, size = self._batches, self._size
        part = slice(index * size, (index + 1) * size)
        network_pass = self._online.pass_for(size, self._online.noisy)
        row_begins, predicted, delta, derivative = self._workspaces[size]
        if self._double_q:
            masks = None if batches.next_action_masks is None else batches.next_action_masks[part]
            best = _mask_values(network_pass.forward(self._next_x[part]), masks).argmax(axis=1)
            next_values = self._values[part].reshape(-1).take(row_begins + best)
            target = batches.returns[part] + batches.discounts[part] * next_values
        else:
            target = self._targets[part]
        taken = row_begins + batches.actions[part]
        network_pass.forward(self._x[part]).reshape(-1).take(taken, None, predicted, "clip")
        np.subtract(predicted, target, delta)
        self._derivative(delta, derivative)
        losses = self._loss(delta, derivative)
        weights = batches.weights[part]
        np.multiply(derivative, weights, derivative)
        np.multiply(derivative, np.float32(1 / size), derivative)
        gradient = network_pass.gradient.array
        gradient.fill(0)
        gradient.reshape(-1)[taken] = derivative
        network_pass.backward()
        self._last = predicted, target
        return float(np.dot(weights, losses)) / size, th.from_numpy(np.abs(delta))

    def last_prediction(self) -> tuple[Floats, Floats]:
        """Return outputs at the actions taken, ``(B, 1)``, and targets, ``(B,)``."""
        predicted, target = self._last
        return predicted[:, None], target

    def greedy_actions(self, outputs: Floats) -> Any:
        """Return the best action of each row."""
        return outputs.argmax(axis=1)


def _mask_values(values: Floats, masks: Any) -> Floats:
    """Return action values with minus infinity for actions that are not allowed."""
    return values if masks is None else np.where(masks, values, np.float32(-np.inf))


def _to_numpy(obs: PyTorchObs) -> Any:
    return {key: part.numpy() for key, part in obs.items()} if isinstance(obs, dict) else obs.numpy()


class _NetworkForTargets:
    """Adapter from a :class:`DenseNetwork` to :class:`sb3_scratch_dqn.values.td.TargetNetwork`."""

    def __init__(self, network: DenseNetwork, preprocess: Preprocessor, head: ValueHead, n_actions: int) -> None:
        self._network, self._preprocess, self._head = network, preprocess, head
        self._view = (-1, n_actions, head.n_outputs)

    def target_outputs(self, obs: PyTorchObs) -> th.Tensor:
        """Observations -> ``(B, A, K)``."""
        inputs = self._preprocess(_to_numpy(obs))
        outputs = self._network.pass_for(len(inputs), self._network.noisy).forward(inputs)
        return th.from_numpy(outputs.copy()).view(self._view)  # a copy, because the next pass overwrites them

    def q_values_from(self, obs: PyTorchObs, target_outputs: th.Tensor) -> th.Tensor:
        """Observations and their :meth:`target_outputs` -> action values, ``(B, A)``."""
        return self._head.q_values(target_outputs)

    def eval_q_values(self, obs: PyTorchObs) -> th.Tensor:
        """Observations -> action values, ``(B, A)``."""
        return self._head.q_values(self.target_outputs(obs))


class _AutogradLossGradient:
    """Gradients of the loss by autograd, for any target and head; parameters as in :func:`make_loss_gradient`."""

    def __init__(
        self,
        online: DenseNetwork,
        target: DenseNetwork,
        preprocess: Preprocessor,
        head: ValueHead,
        objective: Objective,
    ) -> None:
        self._online, self._preprocess, self._head, self._loss = online, preprocess, head, objective.loss
        self._view = (-1, online.n_outputs // head.n_outputs, head.n_outputs)
        online_adapter, target_adapter = (
            _NetworkForTargets(network, preprocess, head, self._view[1]) for network in (online, target)
        )
        self._target_fn = make_target(objective, online_adapter, target_adapter, head)
        self._targets_are_fixed = not objective.double_q

    def prepare(self, batches: ArrayBatch, n_batches: int) -> None:
        """Compute all targets, unless they depend on the online network."""
        tensors = batches.tensors(th.device("cpu"))
        self._batches = tensors.split(n_batches)
        self._targets: tuple[th.Tensor, ...] | None = None
        if self._targets_are_fixed and n_batches > 1:
            self._targets = th.split(self._target_fn(tensors), len(tensors.actions) // n_batches)

    def backward(self, index: int) -> tuple[float, th.Tensor]:
        """Write the gradient of the parameters; return the mean loss, and the priorities, ``(B,)``."""
        batch = self._batches[index]
        target = self._target_fn(batch) if self._targets is None else self._targets[index]
        network_pass = self._online.pass_for(len(batch.actions), self._online.noisy)
        network_pass.forward(self._preprocess(_to_numpy(batch.observations)))
        outputs = at_actions(network_pass.out.tensor.view(self._view), batch.actions).requires_grad_()
        losses, priorities = self._head.losses(outputs, target, self._loss)
        loss = (batch.weights * losses).mean()
        (outputs_gradient,) = th.autograd.grad(loss, outputs)
        gradient = network_pass.gradient.tensor.zero_().view(self._view)
        actions = batch.actions.view(-1, 1, 1).expand(-1, 1, self._view[2])
        gradient.scatter_(1, actions, outputs_gradient.unsqueeze(1))
        network_pass.backward()
        self._last = outputs.detach(), target
        return loss.item(), priorities

    def last_prediction(self) -> tuple[th.Tensor, th.Tensor]:
        """Return outputs at the actions taken, ``(B, K)``, and target."""
        return self._last

    def greedy_actions(self, outputs: Floats) -> Any:
        """Return the best action of each row."""
        return self._head.q_values(th.from_numpy(outputs).view(self._view)).argmax(dim=1).numpy()


def make_loss_gradient(
    online: DenseNetwork, target: DenseNetwork, preprocess: Preprocessor, head: ValueHead, objective: Objective
) -> LossGradient:
    """Create the loss gradient for this head and objective.

    :param online: online network
    :param target: target network
    :param preprocess: turns observations into inputs of the first layer
    :param head: interprets the outputs of both networks
    :param objective: what the network learns
    """
    is_greedy_expected = type(head) is ExpectedHead and objective.munchausen is None
    if is_greedy_expected and objective.loss in _DERIVATIVES_AND_LOSSES:
        return _ExpectedLossGradient(online, target, preprocess, objective)
    return _AutogradLossGradient(online, target, preprocess, head, objective)
