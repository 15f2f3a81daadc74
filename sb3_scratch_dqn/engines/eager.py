"""The plain engine: one call of PyTorch after another, exactly SB3's numbers.

It serves every configuration and is the yardstick of every other engine.
"""

import torch as th

from sb3_scratch_dqn.engines.update import LastUpdate
from sb3_scratch_dqn.policies import DQNPolicy
from sb3_scratch_dqn.replay import BatchSource
from sb3_scratch_dqn.td import Objective, make_target, td_losses


class EagerEngine:
    """Autograd, gradient clipping and the policy's optimiser.

    :param policy: whose online network is trained
    :param objective: what it is to learn
    """

    name = "eager"

    def __init__(self, policy: DQNPolicy, objective: Objective) -> None:
        self.policy = policy
        self.objective = objective
        self.last_update: LastUpdate | None = None

    def train(self, source: BatchSource, gradient_steps: int, max_grad_norm: float) -> list[float]:
        """Take some gradient steps.

        :param source: gives the batch of each step, and takes the priorities of its transitions
        :param gradient_steps: how many
        :param max_grad_norm: the gradient of a step is scaled down to this norm
        :return: the mean loss of each step
        """
        policy = self.policy
        target = make_target(self.objective, policy.q_net, policy.q_net_target, policy.head)
        parameters = list(policy.q_net.parameters())
        losses = []
        for _ in range(gradient_steps):
            batch = source.draw()
            with policy.noise():
                td = td_losses(batch, policy.q_net.outputs, target, policy.head, self.objective.loss)
            loss = (batch.weights * td.losses).mean()
            losses.append(loss.item())

            policy.optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]  # PyTorch has no types for it
            grad_norm = th.nn.utils.clip_grad_norm_(parameters, max_grad_norm)
            policy.optimizer.step()
            source.give_back(batch, td.priorities)
            self.last_update = LastUpdate(policy.head, td.outputs.detach(), td.target, grad_norm)
        return losses
