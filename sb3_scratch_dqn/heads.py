"""What the network's output means.

A network gives ``(B, A, K)`` numbers: ``K`` for each of ``A`` actions in each of ``B`` states. A head says how many,
what action values they stand for, and how far a prediction is from a target. The Bellman update in
:mod:`sb3_scratch_dqn.td` knows nothing more of them.
"""

from collections.abc import Callable
from typing import Protocol

import torch as th
from torch.nn import functional as F

# (prediction, target) -> error, elementwise
Loss = Callable[[th.Tensor, th.Tensor], th.Tensor]


def huber(prediction: th.Tensor, target: th.Tensor) -> th.Tensor:
    """Squared near zero, linear beyond 1 (https://www.nature.com/articles/nature14236, "error clipping")."""
    return F.smooth_l1_loss(prediction, target, reduction="none")


def squared(prediction: th.Tensor, target: th.Tensor) -> th.Tensor:
    """The squared error of https://arxiv.org/abs/1312.5602."""
    return F.mse_loss(prediction, target, reduction="none")


LOSSES: dict[str, Loss] = {"huber": huber, "mse": squared}


class ValueHead(Protocol):
    """The interface of a head.

    :param n_outputs: ``K``, the numbers that the network gives for each action
    """

    n_outputs: int

    def q_values(self, outputs: th.Tensor) -> th.Tensor:
        """Action values.

        :param outputs: of the network, ``(B, A, K)``
        :return: ``(B, A)``
        """

    def backup(self, next_outputs: th.Tensor, returns: th.Tensor, discounts: th.Tensor) -> th.Tensor:
        """What the outputs should have been.

        :param next_outputs: of the target network for the next states and the actions chosen there, ``(B, K)``
        :param returns: rewards up to the next states, ``(B,)``
        :param discounts: what the next states count, ``(B,)``
        :return: a target for :meth:`losses`
        """

    def losses(self, outputs: th.Tensor, target: th.Tensor, loss: Loss) -> tuple[th.Tensor, th.Tensor]:
        """How far the outputs are from their target.

        :param outputs: of the online network for the actions taken, ``(B, K)``
        :param target: as :meth:`backup` gave it
        :param loss: the elementwise error
        :return: the loss of each sample and its priority in replay, without gradient, each ``(B,)``
        """


class ExpectedHead:
    """One number an action: its expected return (Mnih et al. 2015, https://www.nature.com/articles/nature14236)."""

    n_outputs = 1

    def q_values(self, outputs: th.Tensor) -> th.Tensor:
        """The outputs themselves, ``(B, A, 1)`` to ``(B, A)``."""
        return outputs.squeeze(2)

    def backup(self, next_outputs: th.Tensor, returns: th.Tensor, discounts: th.Tensor) -> th.Tensor:
        r""":math:`R + \gamma^k (1 - \text{terminated}) Q_\text{target}(s', a')`, ``(B,)``."""
        return returns + discounts * next_outputs.squeeze(1)

    def losses(self, outputs: th.Tensor, target: th.Tensor, loss: Loss) -> tuple[th.Tensor, th.Tensor]:
        """The loss of each TD error, and its absolute value as priority."""
        predicted = outputs.squeeze(1)
        return loss(predicted, target), (target - predicted.detach()).abs()
