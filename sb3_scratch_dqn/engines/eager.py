"""The plain engine: one call of PyTorch after another, exactly SB3's numbers.

It serves every configuration and is the yardstick of every other engine.
"""

from collections.abc import Callable

import torch as th

from sb3_scratch_dqn.heads import Loss
from sb3_scratch_dqn.policies import DQNPolicy
from sb3_scratch_dqn.replay.batch import Batch
from sb3_scratch_dqn.td import td_losses


class EagerEngine:
    """Autograd, gradient clipping and the policy's optimiser.

    :param policy: whose online network is trained
    :param loss: the elementwise error
    """

    name = "eager"

    def __init__(self, policy: DQNPolicy, loss: Loss) -> None:
        self.policy = policy
        self.loss = loss

    def train(self, draw: Callable[[], Batch], gradient_steps: int, max_grad_norm: float) -> list[float]:
        """Take some gradient steps.

        :param draw: gives the batch of one step
        :param gradient_steps: how many
        :param max_grad_norm: the gradient of a step is scaled down to this norm
        :return: the mean loss of each step
        """
        policy = self.policy
        parameters = list(policy.q_net.parameters())
        losses = []
        for _ in range(gradient_steps):
            batch = draw()
            sample_losses, _ = td_losses(
                batch, policy.q_net.outputs, policy.q_net_target.outputs, policy.head, self.loss
            )
            loss = (batch.weights * sample_losses).mean()
            losses.append(loss.item())

            policy.optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]  # PyTorch has no types for it
            th.nn.utils.clip_grad_norm_(parameters, max_grad_norm)
            policy.optimizer.step()
        return losses
