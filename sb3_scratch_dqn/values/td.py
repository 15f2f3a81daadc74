r"""The Bellman update of the whole DQN family.

The outputs of the online network for the actions taken are compared with a target. Two classes compute targets;
:func:`make_target` chooses one of them:

- :class:`GreedyTarget`: the return of the best next action (DQN, and with ``double_q`` Double DQN);
- :class:`MunchausenTarget`: the return of a soft-greedy policy, plus a bonus for the log-probability of the action.

Conventions: ``B`` transitions, ``A`` actions, ``K`` network outputs per action. The losses are per sample; the engine
weights and averages them. For the expected head with a greedy target, the fused engine uses hand-derived gradients
(``engines/fused/loss_gradients.py``).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch as th
from jaxtyping import Float, Int64, Shaped
from torch import Tensor

from sb3_scratch_dqn.replay.batch import Batch, BatchedObs
from sb3_scratch_dqn.values.heads import ValueHead
from sb3_scratch_dqn.values.losses import Loss
from sb3_scratch_dqn.values.masks import masked_argmax, masked_log_softmax

# Observations -> outputs
Network = Callable[[BatchedObs], Float[Tensor, "B A K"]]

# Observations -> action values
ValueFunction = Callable[[BatchedObs], Float[Tensor, "B A"]]

# Observations, and the outputs of the target network for them -> the action values to choose by
Selector = Callable[[BatchedObs, Float[Tensor, "B A K"]], Float[Tensor, "B A"]]

# Batch -> a target for the losses of the head
Target = Callable[[Batch], Float[Tensor, "B *target"]]


class TDLosses(NamedTuple):
    """The results of comparing a batch with its target.

    :param losses: per-sample losses
    :param priorities: replay priorities, without gradient
    :param outputs: outputs of the online network for the actions taken
    :param target: their target, in the form that the head defines
    """

    losses: Float[Tensor, "B"]
    priorities: Float[Tensor, "B"]
    outputs: Float[Tensor, "B K"]
    target: Float[Tensor, "B *target"]


def at_actions(outputs: Shaped[Tensor, "B A K"], actions: Int64[Tensor, "B"]) -> Shaped[Tensor, "B K"]:
    """Select the outputs of one action per sample."""
    index = actions.view(-1, 1, 1).expand(-1, 1, outputs.shape[2])
    return outputs.gather(1, index).squeeze(1)


@dataclass(frozen=True)
class GreedyTarget:
    """The return of the best next action.

    The target network chooses the action (Mnih et al. 2015, https://www.nature.com/articles/nature14236), or the online
    network does (van Hasselt et al. 2016, https://arxiv.org/abs/1509.06461). The target network always evaluates it.

    :param target_network: computes the outputs for the next states
    :param selector: computes the values by which the next actions are chosen
    :param head: interprets the outputs of the networks
    """

    target_network: Network
    selector: Selector
    head: ValueHead

    def __call__(self, batch: Batch) -> Float[Tensor, "B *target"]:
        """Return the targets of a batch."""
        next_outputs = self.target_network(batch.next_observations)
        values = self.selector(batch.next_observations, next_outputs)
        next_outputs = at_actions(next_outputs, masked_argmax(values, batch.next_action_masks))
        return self.head.backup(next_outputs, batch.returns, batch.discounts)


class MunchausenSettings(NamedTuple):
    """Settings of :class:`MunchausenTarget`; the defaults are the paper's.

    :param tau: temperature of the policy
    :param alpha: factor of the bonus
    :param clip: lower bound of the bonus, applied before ``alpha``
    """

    tau: float = 0.03
    alpha: float = 0.9
    clip: float = -1.0


@dataclass(frozen=True)
class MunchausenTarget:
    r"""The return of the policy :math:`\pi = \text{softmax}(q / \tau)`, and a bonus (https://arxiv.org/abs/2007.14430).

    .. math:: R + \alpha [\tau \ln \pi(a|s)]_{l_0}^0
              + \gamma^k (1 - \text{terminated}) \sum_{a'} \pi(a'|s') \left(z(s', a') - \tau \ln \pi(a'|s')\right)

    with :math:`z` the outputs of the target network, for any distribution that they represent. :math:`q` are action
    values of the target network; with double Q-learning, of the online network.

    :param target_network: computes the outputs for the next states
    :param selector: computes :math:`q` of the next states
    :param values: computes :math:`q` of the states in which the actions were taken
    :param head: interprets the outputs of the networks, which must be returns
    :param settings: :math:`\tau`, :math:`\alpha` and :math:`l_0`
    """

    target_network: Network
    selector: Selector
    values: ValueFunction
    head: ValueHead
    settings: MunchausenSettings

    def __call__(self, batch: Batch) -> Float[Tensor, "B *target"]:
        """Return the targets of a batch."""
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
    """The learning objective, as settings.

    :param loss: the elementwise loss
    :param double_q: whether the online network chooses the next actions
    :param munchausen: settings of :class:`MunchausenTarget`; ``None`` for a greedy target
    """

    loss: Loss
    double_q: bool = False
    munchausen: MunchausenSettings | None = None


class TargetNetwork(Protocol):
    """The interface of a target network, and of the online network of double Q-learning."""

    def target_outputs(self, obs: BatchedObs) -> Float[Tensor, "B A K"]:
        """Return the outputs from which targets are computed."""

    def q_values_from(self, obs: BatchedObs, target_outputs: Float[Tensor, "B A K"]) -> Float[Tensor, "B A"]:
        """Return the action values of observations whose :meth:`target_outputs` are known."""

    def eval_q_values(self, obs: BatchedObs) -> Float[Tensor, "B A"]:
        """Return action values, computed in evaluation mode."""


def make_target(objective: Objective, network: TargetNetwork, target_network: TargetNetwork, head: ValueHead) -> Target:
    """Choose how targets are computed.

    :param objective: the learning objective
    :param network: the online network
    :param target_network: the target network
    :param head: interprets the outputs of both
    :return: batch -> target
    """
    selector: Selector = (
        (lambda obs, _: network.eval_q_values(obs)) if objective.double_q else target_network.q_values_from
    )
    if objective.munchausen is None:
        return GreedyTarget(target_network.target_outputs, selector, head)
    values = (network if objective.double_q else target_network).eval_q_values
    return MunchausenTarget(target_network.target_outputs, selector, values, head, objective.munchausen)


def predict(
    batch: Batch, network: Network, target_fn: Target
) -> tuple[Float[Tensor, "B K"], Float[Tensor, "B *target"]]:
    """Compute the outputs for the actions taken, and their target.

    :param batch: the transitions
    :param network: the online network
    :param target_fn: computes the target; called without gradient
    :return: the outputs, and their target in the form that the head defines
    """
    with th.no_grad():
        target = target_fn(batch)
    return at_actions(network(batch.observations), batch.actions), target


def td_losses(batch: Batch, network: Network, target_fn: Target, head: ValueHead, loss: Loss) -> TDLosses:
    """Compute the per-sample losses of a batch.

    :param batch: the transitions
    :param network: the online network
    :param target_fn: computes the target; called without gradient
    :param head: interprets the outputs of the network
    :param loss: the elementwise loss
    """
    outputs, target = predict(batch, network, target_fn)
    losses, priorities = head.losses(outputs, target, loss)
    return TDLosses(losses, priorities, outputs, target)
