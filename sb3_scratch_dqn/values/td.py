r"""The Bellman update of the whole family.

A batch is compared with a target: what the network says of the actions taken, with what it should have said. Two
objects know the target, and are chosen once, at set-up:

- :class:`GreedyTarget`: the return of the best next action (DQN, and with ``double_q`` Double DQN);
- :class:`MunchausenTarget`: the return of a soft-greedy policy, plus a bonus for what that policy would have done.

Conventions: ``B`` transitions, ``A`` actions, ``K`` network outputs an action. The losses come one a sample; weighting
and averaging them is the engine's business.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch as th
from stable_baselines3.common.type_aliases import PyTorchObs

from sb3_scratch_dqn.common.overriding import replaced
from sb3_scratch_dqn.replay.batch import Batch
from sb3_scratch_dqn.values.heads import MEANS, ExpectedHead, Loss, ValueHead
from sb3_scratch_dqn.values.masks import masked_argmax, masked_log_softmax

# Observations -> (B, A, K)
Network = Callable[[PyTorchObs], th.Tensor]

# Observations, and what the target network says of them, (B, A, K) -> the action values to choose by, (B, A)
Selector = Callable[[PyTorchObs, th.Tensor], th.Tensor]

# Batch -> a target for the losses of the head
Target = Callable[[Batch], th.Tensor]


class TDLosses(NamedTuple):
    """What one update is made of.

    :param losses: one a sample, ``(B,)``
    :param priorities: in replay, without gradient, ``(B,)``
    :param outputs: what the network said of the actions taken, ``(B, K)``
    :param target: what it should have said, as the head has it
    """

    losses: th.Tensor
    priorities: th.Tensor
    outputs: th.Tensor
    target: th.Tensor


def at_actions(outputs: th.Tensor, actions: th.Tensor) -> th.Tensor:
    """Pick one action a sample: ``(B, A, K)`` at ``(B,)`` gives ``(B, K)``."""
    index = actions.view(-1, 1, 1).expand(-1, 1, outputs.shape[2])
    return outputs.gather(1, index).squeeze(1)


@dataclass(frozen=True)
class GreedyTarget:
    """The return of the best next action.

    Which action is best says the target network (Mnih et al. 2015, https://www.nature.com/articles/nature14236), or
    the online network (van Hasselt et al. 2016, https://arxiv.org/abs/1509.06461); what it is worth, always the
    target network.

    :param target_network: values the next states
    :param selector: chooses the actions there
    :param head: what the outputs of the networks mean
    """

    target_network: Network
    selector: Selector
    head: ValueHead

    def __call__(self, batch: Batch) -> th.Tensor:
        """The target of each transition."""
        next_outputs = self.target_network(batch.next_observations)
        values = self.selector(batch.next_observations, next_outputs)
        next_outputs = at_actions(next_outputs, masked_argmax(values, batch.next_action_masks))
        return self.head.backup(next_outputs, batch.returns, batch.discounts)


class MunchausenSettings(NamedTuple):
    """What :class:`MunchausenTarget` can be told; the paper's values by default.

    :param tau: the temperature of the policy
    :param alpha: how much the bonus counts
    :param clip: the lowest that the bonus can be, before ``alpha``
    """

    tau: float = 0.03
    alpha: float = 0.9
    clip: float = -1.0


@dataclass(frozen=True)
class MunchausenTarget:
    r"""The return of the policy :math:`\pi = \text{softmax}(q / \tau)`, and a bonus (https://arxiv.org/abs/2007.14430).

    .. math:: r + \alpha [\tau \ln \pi(a|s)]_{l_0}^0
              + \gamma \sum_{a'} \pi(a'|s') \left(z(s', a') - \tau \ln \pi(a'|s')\right)

    with :math:`z` the outputs of the target network, whatever distribution they stand for. :math:`q` are values of the
    target network; with double Q-learning, of the online network.

    :param target_network: values the next states
    :param selector: says what the policy is there
    :param values: says what it is in the states that actions were taken in: observations -> ``(B, A)``
    :param head: what the outputs of the networks mean; they must be returns
    :param settings: :math:`\tau`, :math:`\alpha` and :math:`l_0`
    """

    target_network: Network
    selector: Selector
    values: Callable[[PyTorchObs], th.Tensor]
    head: ValueHead
    settings: MunchausenSettings

    def __call__(self, batch: Batch) -> th.Tensor:
        """The target of each transition."""
        tau, alpha, clip = self.settings
        next_outputs = self.target_network(batch.next_observations)
        next_values = self.selector(batch.next_observations, next_outputs)
        next_log_policy = masked_log_softmax(next_values / tau, batch.next_action_masks).unsqueeze(2)
        soft_outputs = (next_log_policy.exp() * (next_outputs - tau * next_log_policy)).sum(dim=1)

        log_policy = masked_log_softmax(self.values(batch.observations) / tau, batch.action_masks)
        taken = log_policy.gather(1, batch.actions.unsqueeze(1)).squeeze(1)
        bonus = alpha * (tau * taken).clamp(clip, 0)
        return self.head.backup(soft_outputs, batch.returns + bonus, batch.discounts)


@dataclass(frozen=True)
class Objective:
    """What is to be learned, as settings.

    :param loss: the elementwise error
    :param double_q: whether the online network chooses the next actions
    :param munchausen: of :class:`MunchausenTarget`; ``None`` for a greedy target
    """

    loss: Loss
    double_q: bool = False
    munchausen: MunchausenSettings | None = None


class TargetNetwork(Protocol):
    """What a network must be able to do to serve as target network, and as online network of double Q-learning."""

    def target_outputs(self, obs: PyTorchObs) -> th.Tensor:
        """Observations -> ``(B, A, K)``."""

    def q_values_from(self, obs: PyTorchObs, target_outputs: th.Tensor) -> th.Tensor:
        """Observations and their :meth:`target_outputs` -> ``(B, A)``."""

    def evaluate(self, obs: PyTorchObs) -> th.Tensor:
        """Observations -> ``(B, A)``, without what belongs to training."""


def make_target(objective: Objective, network: TargetNetwork, target_network: TargetNetwork, head: ValueHead) -> Target:
    """Choose what makes the targets.

    :param objective: what is to be learned
    :param network: the online network
    :param target_network: the target network
    :param head: what the outputs of both mean
    """
    selector: Selector = (lambda obs, _: network.evaluate(obs)) if objective.double_q else target_network.q_values_from
    if objective.munchausen is None:
        return GreedyTarget(target_network.target_outputs, selector, head)
    values = (network if objective.double_q else target_network).evaluate
    return MunchausenTarget(target_network.target_outputs, selector, values, head, objective.munchausen)


def predict(batch: Batch, network: Network, target_fn: Target) -> tuple[th.Tensor, th.Tensor]:
    """What the network says of a batch, and what it should have said.

    :param batch: the transitions
    :param network: the online network, which gets the gradient
    :param target_of: says what it should have said; gets no gradient
    :return: outputs for the actions taken, ``(B, K)``, and a target for the losses of the head
    """
    with th.no_grad():
        target = target_fn(batch)
    return at_actions(network(batch.observations), batch.actions), target


def mean_loss(outputs: th.Tensor, target: th.Tensor, head: ValueHead, loss: Loss) -> th.Tensor:
    """The mean of the losses of the head, in as few operations as its kind allows; the same bits.

    :param outputs: of the online network for the actions taken, ``(B, K)``
    :param target: what they should have been
    :param head: what they mean
    :param loss: the elementwise error
    """
    mean = MEANS.get(loss)
    if mean is None or replaced(head, ExpectedHead, "losses"):
        return head.losses(outputs, target, loss)[0].mean()
    return mean(outputs.squeeze(1), target)


def td_losses(batch: Batch, network: Network, target_fn: Target, head: ValueHead, loss: Loss) -> TDLosses:
    """Compare what the network says of a batch with what it should have said.

    :param batch: the transitions
    :param network: the online network, which gets the gradient
    :param target_of: says what it should have said; gets no gradient
    :param head: what the outputs of the network mean
    :param loss: the elementwise error
    """
    outputs, target = predict(batch, network, target_fn)
    losses, priorities = head.losses(outputs, target, loss)
    return TDLosses(losses, priorities, outputs, target)
