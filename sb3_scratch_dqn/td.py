"""The Bellman update of the whole family.

Conventions: ``B`` transitions, ``A`` actions, ``K`` network outputs an action. The losses come one a sample; weighting
and averaging them is the engine's business.
"""

from collections.abc import Callable

import torch as th
from stable_baselines3.common.type_aliases import PyTorchObs

from sb3_scratch_dqn.heads import Loss, ValueHead
from sb3_scratch_dqn.replay.batch import Batch

# Observations -> (B, A, K)
Network = Callable[[PyTorchObs], th.Tensor]


def at_actions(outputs: th.Tensor, actions: th.Tensor) -> th.Tensor:
    """Pick one action a sample: ``(B, A, K)`` at ``(B,)`` gives ``(B, K)``."""
    index = actions.view(-1, 1, 1).expand(-1, 1, outputs.shape[2])
    return outputs.gather(1, index).squeeze(1)


def td_losses(
    batch: Batch, network: Network, target_network: Network, head: ValueHead, loss: Loss
) -> tuple[th.Tensor, th.Tensor]:
    """Compare what the network says of a batch with what it should have said.

    Q-learning with a target network: Mnih et al. 2015, https://www.nature.com/articles/nature14236.

    :param batch: the transitions
    :param network: the online network, which gets the gradient
    :param target_network: values the next states, and chooses the actions there
    :param head: what the outputs of both networks mean
    :param loss: the elementwise error
    :return: the loss and the replay priority of each sample, each ``(B,)``
    """
    with th.no_grad():
        next_outputs = target_network(batch.next_observations)
        next_actions = head.q_values(next_outputs).argmax(dim=1)
        target = head.backup(at_actions(next_outputs, next_actions), batch.returns, batch.discounts)
    return head.losses(at_actions(network(batch.observations), batch.actions), target, loss)
