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

from collections.abc import Callable
from typing import Any, ClassVar, Protocol

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.preprocessing import is_image_space, preprocess_obs
from stable_baselines3.common.torch_layers import FlattenExtractor
from stable_baselines3.common.type_aliases import PyTorchObs
from torch import nn

from sb3_scratch_dqn.engines.dense import ACTIVATIONS, DenseNetwork, as_inputs, linear_layers
from sb3_scratch_dqn.engines.flat import FlatParameters, why_no_adam
from sb3_scratch_dqn.engines.products import Both, Floats, both, both_of_array, empty
from sb3_scratch_dqn.engines.update import LastUpdate
from sb3_scratch_dqn.heads import ExpectedHead, ValueHead, huber, squared
from sb3_scratch_dqn.networks import DuelingStreams, QNetwork
from sb3_scratch_dqn.noisy import NoisyLinear
from sb3_scratch_dqn.overriding import replaced
from sb3_scratch_dqn.policies import DQNPolicy
from sb3_scratch_dqn.replay import Batch, BatchSource
from sb3_scratch_dqn.td import Objective, at_actions, make_target

# Transitions whose targets are computed in one go: many enough to hide what calls cost, few enough for the caches
_ROWS_AT_ONCE = 1024

_ONE = np.float32(1)
_HALF = np.float32(0.5)


def _huber_derivative(delta: Floats) -> Floats:
    derivative: Floats = np.maximum(np.minimum(delta, _ONE), -_ONE)
    return derivative


def _huber_loss(delta: Floats, derivative: Floats) -> Floats:
    # Within [-1, 1] the derivative is delta and this is delta**2 / 2; outside it is 1 or -1 and this |delta| - 1 / 2
    loss: Floats = derivative * (delta - _HALF * derivative)
    return loss


# The derivative at each delta, and the loss given both
_LOSSES: dict[Any, tuple[Callable[[Floats], Floats], Callable[[Floats, Floats], Floats]]] = {
    huber: (_huber_derivative, _huber_loss),
    squared: (lambda delta: delta + delta, lambda delta, derivative: _HALF * derivative * delta),
}


def _why_not(policy: DQNPolicy) -> str | None:
    network = policy.q_net
    if policy.device.type != "cpu":
        return f"device={policy.device.type!r} is not 'cpu'"
    if type(network) is not QNetwork or replaced(network, QNetwork, "outputs", "forward", "evaluate"):
        return f"the network is a {type(network).__name__}, not a plain QNetwork"
    if replaced(policy, DQNPolicy, "noise"):
        return f"{type(policy).__name__} overrides noise()"
    if type(network.features_extractor) is not FlattenExtractor:
        return f"features_extractor_class={type(network.features_extractor).__name__} is not FlattenExtractor"
    reason = _why_no_layers(list(network.q_net)) or _why_no_parameters(network)
    if reason is None:
        reason = why_no_adam(policy.optimizer, network.parameters())
    return reason


def _why_no_layers(modules: list[nn.Module]) -> str | None:
    if isinstance(modules[-1], DuelingStreams):
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


def _why_no_parameters(network: QNetwork) -> str | None:
    for name, parameter in network.named_parameters():
        if parameter.dtype != th.float32:
            return f"the parameter {name} has dtype {parameter.dtype}, not torch.float32"
        if not parameter.requires_grad:
            return f"the parameter {name} is frozen"
        if parameter._backward_hooks:
            return f"the parameter {name} has hooks"
    for name, module in network.named_modules():
        if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks:
            return f"the module {name or 'q_net'} has hooks"
    return None


class FusedEngine:
    """Gradient steps by hand.

    :param policy: whose online network is trained
    :param objective: what it is to learn
    """

    name: ClassVar[str] = "fused"

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
        assert self._flat is not None
        # With noise, the target network is another one in each step
        ahead = source.ahead and not self._online.noisy
        at_once = max(1, _ROWS_AT_ONCE // source.batch_size) if ahead else 1
        losses: list[float] = []
        norm = 0.0
        for begin in range(0, gradient_steps, at_once):
            n_batches = min(at_once, gradient_steps - begin)
            self._online.draw_noise()
            self._target.draw_noise()
            batches = self._learner.prepared(source.draw(n_batches), n_batches)
            for batch in batches:
                loss, priorities = self._learner.backward(batch)
                losses.append(loss)
                norm = self._clip(max_grad_norm)
                self._flat.adam_step()
                if batch.transitions is not None:
                    source.give_back(batch.transitions, priorities)
        self._online.clear_noise()
        self._target.clear_noise()
        if losses:
            self.last_update = LastUpdate(self.policy.head, *self._learner.last(), th.tensor(norm))
        return losses

    def _clip(self, max_norm: float) -> float:
        assert self._flat is not None
        gradient = self._flat.gradient.array
        norm = float(np.sqrt(np.dot(gradient, gradient)))
        coefficient = max_norm / (norm + 1e-6)
        if coefficient < 1:
            np.multiply(gradient, np.float32(coefficient), out=gradient)
        return norm

    def act(self, observation: Any) -> Any:
        """Greedy actions, with noise in noisy layers.

        :param observation: ``(B, ...)``
        :return: ``(B,)``
        """
        if self._flat is None:
            self._attach()
        inputs = self._inputs(observation)
        rows = len(inputs.array)
        one = self._online.passing(rows)
        if self._online.noisy:
            self._online.draw_noise(in_weights=not one.few_rows)
            outputs = one.forward(inputs)
            self._online.clear_noise()
        else:
            outputs = one.forward(inputs)
        return self._learner.greedy(outputs)

    def move_target(self, tau: float) -> None:
        """Let the target network follow.

        :param tau: how far; 1 copies the online network
        """
        if self._flat is None:
            self._attach()
        assert self._flat is not None
        self._flat.move_target(tau)


def _make_inputs(policy: DQNPolicy) -> Callable[[Any], Both]:
    """What turns observations, arrays or tensors, into what the first layer reads."""
    space, normalize = policy.observation_space, policy.q_net.normalize_images
    if isinstance(space, spaces.Box) and not (normalize and is_image_space(space)):
        return lambda observation: as_inputs(np.asarray(observation))

    def inputs(observation: Any) -> Both:
        tensor = preprocess_obs(th.as_tensor(observation), space, normalize_images=normalize)
        assert isinstance(tensor, th.Tensor)
        return as_inputs(tensor.numpy())

    return inputs


class _Prepared:
    """A batch and what could be computed of it before.

    :param transitions: the batch; ``None`` where nobody wants to know its priorities
    :param x: its observations, as the first layer reads them
    :param target: of each transition, or what it is to be made of
    :param actions: that were taken, ``(B,)``
    :param weights: of the losses, ``(B,)``
    """

    __slots__ = ("actions", "target", "transitions", "weights", "x")

    def __init__(self, transitions: Batch | None, x: Both, target: Any, actions: Any = None, weights: Any = None):
        self.transitions = transitions
        self.x = x
        self.target = target
        self.actions = actions
        self.weights = weights


class _Learner(Protocol):
    """Computes gradients."""

    def prepared(self, batches: Batch, n_batches: int) -> list[_Prepared]:
        """Cut batches apart, and compute what does not depend on the online network."""

    def backward(self, batch: _Prepared) -> tuple[float, th.Tensor]:
        """Write the gradient of the parameters; return the mean loss, and the priorities, ``(B,)``."""

    def last(self) -> tuple[th.Tensor, th.Tensor]:
        """Outputs at the actions taken, ``(B, K)``, and targets, of the last call of :meth:`backward`."""

    def greedy(self, outputs: Both) -> Any:
        """The best action of each row of outputs, ``(B, A * K)``."""


class _ExpectedLearner:
    """Greedy targets for one value an action, by hand.

    :param online: the network that learns
    :param target: the target network
    :param inputs: what turns observations into what the first layer reads
    :param head: not needed
    :param objective: what is to be learned
    """

    def __init__(
        self,
        online: DenseNetwork,
        target: DenseNetwork,
        inputs: Callable[[Any], Both],
        head: ValueHead,
        objective: Objective,
    ) -> None:
        self._online, self._target, self._inputs = online, target, inputs
        self._derivative, self._loss = _LOSSES[objective.loss]
        self._double_q = objective.double_q
        self._rows: dict[int, tuple[Both, Any]] = {}

    def prepared(self, batches: Batch, n_batches: int) -> list[_Prepared]:
        """Cut batches apart; all of their targets, or with double Q-learning all that the target network says."""
        x, next_x = self._inputs(batches.observations), self._inputs(batches.next_observations)
        values = self._target.passing(len(next_x.array)).forward(next_x).array
        actions, weights = batches.actions.numpy(), batches.weights.numpy()
        returns, discounts = batches.returns.numpy(), batches.discounts.numpy()
        masks = None if batches.next_action_masks is None else batches.next_action_masks.numpy()
        if not self._double_q:
            targets = returns + discounts * _allowed(values, masks).max(axis=1)
            if n_batches == 1:
                return [_Prepared(batches, x, targets, actions, weights)]
            size = len(actions) // n_batches
            parts = [slice(begin, begin + size) for begin in range(0, len(actions), size)]
            return [_Prepared(None, _part(x, part), targets[part], actions[part], weights[part]) for part in parts]
        size = len(actions) // n_batches
        prepared = []
        for begin in range(0, len(actions), size):
            part = slice(begin, begin + size)
            pieces = (
                _part(next_x, part),
                values[part],
                None if masks is None else masks[part],
                returns[part],
                discounts[part],
            )
            transitions = batches if n_batches == 1 else None
            prepared.append(_Prepared(transitions, _part(x, part), pieces, actions[part], weights[part]))
        return prepared

    def backward(self, batch: _Prepared) -> tuple[float, th.Tensor]:
        """Write the gradient of the parameters; return the mean loss, and the priorities, ``(B,)``."""
        n = len(batch.actions)
        one = self._online.passing(n)
        if n not in self._rows:
            n_actions = one.forward(batch.x).array.shape[1]
            self._rows[n] = empty(n, n_actions), np.arange(n) * n_actions
        gradient, first_of_row = self._rows[n]
        target = batch.target
        if self._double_q:
            next_x, values, masks, returns, discounts = target
            best = _allowed(one.forward(next_x).array, masks).argmax(axis=1)
            target = returns + discounts * values.reshape(-1).take(first_of_row + best)
        outputs = one.forward(batch.x).array.reshape(-1)
        taken = first_of_row + batch.actions
        predicted = outputs.take(taken)
        delta = predicted - target
        derivative = self._derivative(delta)
        loss = np.dot(batch.weights, self._loss(delta, derivative)) / n
        gradient.array.fill(0)
        gradient.array.reshape(-1)[taken] = derivative * batch.weights * np.float32(1 / n)
        one.backward(gradient)
        self._last = predicted, target
        return float(loss), th.from_numpy(np.abs(delta))

    def last(self) -> tuple[th.Tensor, th.Tensor]:
        """Outputs at the actions taken, ``(B, 1)``, and targets, ``(B,)``."""
        predicted, target = self._last
        return th.from_numpy(predicted).unsqueeze(1), th.from_numpy(target)

    def greedy(self, outputs: Both) -> Any:
        """The best action of each row."""
        return outputs.array.argmax(axis=1)


def _allowed(values: Floats, masks: Any) -> Floats:
    """Values that say what is best among allowed actions."""
    return values if masks is None else np.where(masks, values, np.float32(-np.inf))


def _part(whole: Both, part: slice) -> Both:
    return both_of_array(whole.array[part])


class _NetworkForTargets:
    """A network as the targets in :mod:`sb3_scratch_dqn.td` want it."""

    def __init__(self, network: DenseNetwork, inputs: Callable[[Any], Both], head: ValueHead, n_actions: int) -> None:
        self._network, self._inputs, self._head = network, inputs, head
        self._view = (-1, n_actions, head.n_outputs)

    def target_outputs(self, obs: PyTorchObs) -> th.Tensor:
        """Observations -> ``(B, A, K)``."""
        x = self._inputs(obs)
        # The pass will write over it
        return self._network.passing(len(x.array)).forward(x).tensor.view(self._view).clone()

    def values_given(self, obs: PyTorchObs, target_outputs: th.Tensor) -> th.Tensor:
        """Action values, ``(B, A)``, where the outputs of these observations are at hand."""
        return self._head.q_values(target_outputs)

    def evaluate(self, obs: PyTorchObs) -> th.Tensor:
        """Observations -> action values, ``(B, A)``."""
        return self._head.q_values(self.target_outputs(obs))


class _HeadLearner:
    """Any targets, and heads whose loss autograd knows the gradient of; parameters as in :class:`_ExpectedLearner`."""

    def __init__(
        self,
        online: DenseNetwork,
        target: DenseNetwork,
        inputs: Callable[[Any], Both],
        head: ValueHead,
        objective: Objective,
    ) -> None:
        self._online, self._inputs, self._head, self._loss = online, inputs, head, objective.loss
        self._n_actions = online.n_outputs // head.n_outputs
        deciding, valuing = (_NetworkForTargets(network, inputs, head, self._n_actions) for network in (online, target))
        self._target_of = make_target(objective, deciding, valuing, head)
        self._at_once = not objective.double_q

    def prepared(self, batches: Batch, n_batches: int) -> list[_Prepared]:
        """Cut batches apart; all of their targets, unless the online network chooses the next actions."""
        parts = batches.split(n_batches)
        targets: list[Any] = [None] * n_batches
        if self._at_once and n_batches > 1:
            target = self._target_of(batches)
            targets = list(th.split(target, len(target) // n_batches))
        return [
            _Prepared(part, self._inputs(part.observations), target)
            for part, target in zip(parts, targets, strict=True)
        ]

    def backward(self, batch: _Prepared) -> tuple[float, th.Tensor]:
        """Write the gradient of the parameters; return the mean loss, and the priorities, ``(B,)``."""
        transitions = batch.transitions
        assert transitions is not None
        target = self._target_of(transitions) if batch.target is None else batch.target
        one = self._online.passing(len(transitions.actions))
        outputs = one.forward(batch.x).tensor.view(-1, self._n_actions, self._head.n_outputs)
        taken = at_actions(outputs, transitions.actions).requires_grad_()
        losses, priorities = self._head.losses(taken, target, self._loss)
        loss = (transitions.weights * losses).mean()
        (of_taken,) = th.autograd.grad(loss, taken)
        gradient = th.zeros_like(outputs)
        gradient.scatter_(1, transitions.actions.view(-1, 1, 1).expand(-1, 1, outputs.shape[2]), of_taken.unsqueeze(1))
        one.backward(both(gradient.view(len(gradient), -1)))
        self._last = taken.detach(), target
        return loss.item(), priorities

    def last(self) -> tuple[th.Tensor, th.Tensor]:
        """Outputs at the actions taken, ``(B, K)``, and targets."""
        return self._last

    def greedy(self, outputs: Both) -> Any:
        """The best action of each row."""
        values = self._head.q_values(outputs.tensor.view(-1, self._n_actions, self._head.n_outputs))
        return values.argmax(dim=1).numpy()
