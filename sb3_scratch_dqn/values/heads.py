r"""What the network's output means.

A network gives ``(B, A, K)`` numbers: ``K`` for each of ``A`` actions in each of ``B`` states. A head says how many,
what action values they stand for, and how far a prediction is from a target. The Bellman update in
:mod:`sb3_scratch_dqn.values.td` knows nothing more of them.

====================  =======================================================  =======================
head                  the ``K`` outputs of an action                           distance to the target
====================  =======================================================  =======================
``"expected"``        its value                                                Huber or squared
``"c51"``             logits of the probabilities of ``n_atoms`` fixed returns  cross-entropy
``"quantile"``        quantiles of the return, at fixed fractions              quantile Huber
``"iqn"``             quantiles at sampled fractions, and these fractions      quantile Huber
====================  =======================================================  =======================
"""

import math
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
import torch as th
from torch.nn import functional as F

from sb3_scratch_dqn.common.checks import check_arguments, check_choice, check_count, check_number

# (prediction, target) -> error, elementwise
Loss = Callable[[th.Tensor, th.Tensor], th.Tensor]


def huber(prediction: th.Tensor, target: th.Tensor) -> th.Tensor:
    """Squared near zero, linear beyond 1 (https://www.nature.com/articles/nature14236, "error clipping")."""
    return F.smooth_l1_loss(prediction, target, reduction="none")


def squared(prediction: th.Tensor, target: th.Tensor) -> th.Tensor:
    """The squared error of https://arxiv.org/abs/1312.5602."""
    return F.mse_loss(prediction, target, reduction="none")


LOSSES: dict[str, Loss] = {"huber": huber, "mse": squared}

# The means of these errors, in one operation instead of two; the same bits
MEANS: dict[Loss, Loss] = {huber: F.smooth_l1_loss, squared: F.mse_loss}


class ValueHead(Protocol):
    """The interface of a head.

    :param n_outputs: ``K``, the numbers that the network gives for each action
    :param outputs_are_returns: whether outputs are returns, which can be shifted, and averaged over actions
    """

    n_outputs: int
    outputs_are_returns: bool

    @property
    def supported_losses(self) -> tuple[str, ...]:
        """Names of the elementwise errors that :meth:`losses` can be given."""

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

    def moments(self, outputs: th.Tensor, target: th.Tensor) -> tuple[th.Tensor, th.Tensor, th.Tensor | None]:
        """What the outputs and their target say of the returns, for people to look at.

        :param outputs: as :meth:`losses` gets them
        :param target: as :meth:`backup` gave it
        :return: means of the predicted returns, means of the target, and standard deviations of the predicted returns,
            each ``(B,)``; ``None`` for the last if the head knows no distribution
        """


class ExpectedHead:
    """One number an action: its expected return (Mnih et al. 2015, https://www.nature.com/articles/nature14236)."""

    n_outputs = 1
    outputs_are_returns = True
    supported_losses = ("huber", "mse")

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

    def moments(self, outputs: th.Tensor, target: th.Tensor) -> tuple[th.Tensor, th.Tensor, None]:
        """The outputs and the target."""
        return outputs.squeeze(1), target, None


# Numbers that never change, each kept for good once somebody asked for it: a recorded update reads it where it lies
_Constants = dict[tuple[th.dtype, th.device], th.Tensor]

# Distances between atoms are computed with 32 bits
_LARGEST = 1e30


class CategoricalHead:
    r"""C51: probabilities of fixed returns (Bellemare et al. 2017, https://arxiv.org/abs/1707.06887).

    The outputs are logits of the probabilities :math:`p_i` of the atoms
    :math:`z_i = v_\min + i \Delta z,\ \Delta z = (v_\max - v_\min) / (n - 1)`.

    :param n_atoms: how many returns the distribution knows, at least 2
    :param v_min: the lowest
    :param v_max: the highest
    """

    outputs_are_returns = False
    supported_losses = ("huber",)  # the default of ScratchDQN, of which cross-entropy has no use

    def __init__(self, n_atoms: int = 51, v_min: float = -10.0, v_max: float = 10.0) -> None:
        check_count("n_atoms", n_atoms, minimum=2)
        check_number("v_min", v_min)
        check_number("v_max", v_max)
        if not v_min < v_max:
            raise ValueError(f"v_min={v_min!r} must be below v_max={v_max!r}")
        if not math.isfinite(float(v_max) - float(v_min)) or max(abs(v_min), abs(v_max)) > _LARGEST:
            raise ValueError(f"v_min={v_min!r} and v_max={v_max!r} must lie between -{_LARGEST} and {_LARGEST}")
        atoms = np.linspace(v_min, v_max, int(n_atoms)).astype(np.float32)[[0, 1, -2, -1]]
        if not (atoms[0] < atoms[1] and atoms[2] < atoms[3]):
            raise ValueError(f"v_min={v_min!r} and v_max={v_max!r} are too close for {n_atoms} atoms in 32 bits")
        self.n_outputs = int(n_atoms)
        self.v_min, self.v_max = float(v_min), float(v_max)
        self._atoms: _Constants = {}

    def _atoms_like(self, tensor: th.Tensor) -> th.Tensor:
        kind = tensor.dtype, tensor.device
        if kind not in self._atoms:
            self._atoms[kind] = th.linspace(self.v_min, self.v_max, self.n_outputs, dtype=kind[0], device=kind[1])
        return self._atoms[kind]

    def q_values(self, outputs: th.Tensor) -> th.Tensor:
        r""":math:`\sum_i p_i z_i`, ``(B, A, K)`` to ``(B, A)``."""
        return outputs.softmax(dim=-1) @ self._atoms_like(outputs)

    def backup(self, next_outputs: th.Tensor, returns: th.Tensor, discounts: th.Tensor) -> th.Tensor:
        r"""The next state's distribution, discounted, shifted and projected onto the atoms, ``(B, K)``.

        The probability of :math:`R + \gamma^k (1 - \text{terminated}) z_j`, clipped to the range of the atoms, is
        shared between the two atoms beside it in proportion to their nearness.
        """
        probabilities = next_outputs.softmax(dim=1)
        moved = returns.unsqueeze(1) + discounts.unsqueeze(1) * self._atoms_like(next_outputs)
        last = self.n_outputs - 1
        # In units of atoms, counted from the lowest
        position = (moved.clamp(self.v_min, self.v_max) - self.v_min) * (last / (self.v_max - self.v_min))
        below = position.floor()
        share_above = position - below
        # Rounding may exceed the last atom; what is no number has no place at all, and its probability shows it
        below_index = below.long().clamp(0, last)
        target = th.zeros_like(probabilities)
        target.scatter_add_(1, below_index, probabilities * (1 - share_above))
        # On the highest atom the share above is 0
        target.scatter_add_(1, (below_index + 1).clamp(max=last), probabilities * share_above)
        return target

    def losses(self, outputs: th.Tensor, target: th.Tensor, loss: Loss) -> tuple[th.Tensor, th.Tensor]:
        """The cross-entropy of target and prediction; as priority their Kullback-Leibler divergence."""
        losses = -(target * outputs.log_softmax(dim=1)).sum(dim=1)
        target_entropies = -th.special.xlogy(target, target).sum(dim=1)
        return losses, (losses.detach() - target_entropies).clamp(min=0)

    def moments(self, outputs: th.Tensor, target: th.Tensor) -> tuple[th.Tensor, th.Tensor, th.Tensor]:
        """Means and standard deviations of the distributions."""
        atoms, probabilities = self._atoms_like(outputs), outputs.softmax(dim=1)
        means = probabilities @ atoms
        variances = (probabilities * (atoms - means.unsqueeze(1)) ** 2).sum(dim=1)
        return means, target @ atoms, variances.sqrt()


def quantile_regression(predicted: th.Tensor, fractions: th.Tensor, target: th.Tensor, loss: Loss) -> th.Tensor:
    r"""The loss of quantile regression (Dabney et al. 2017, https://arxiv.org/abs/1710.10044, equation 10).

    .. math:: \sum_i \frac{1}{N'} \sum_j |\tau_i - [u_{ij} < 0]| \, L(u_{ij}), \qquad u_{ij} = y_j - \theta_i

    With the Huber loss it is theirs; with the squared error the outputs become expectiles instead of quantiles.

    :param predicted: :math:`\theta`, ``(B, N)``
    :param fractions: :math:`\tau`, ``(B, N)`` or ``(N,)``
    :param target: :math:`y`, ``(B, N')``
    :param loss: :math:`L`
    :return: ``(B,)``
    """
    pairs = (*predicted.shape, target.shape[1])  # (B, N, N')
    theta, y = predicted.unsqueeze(2).expand(pairs), target.unsqueeze(1).expand(pairs)
    below = (y < theta.detach()).to(predicted.dtype)
    asymmetry = (fractions.unsqueeze(-1) - below).abs()
    losses: th.Tensor = (asymmetry * loss(theta, y)).mean(dim=2).sum(dim=1)
    return losses


class QuantileHead:
    r"""QR-DQN: quantiles of the return at the fractions :math:`(i + 1/2) / N` (https://arxiv.org/abs/1710.10044).

    :param n_quantiles: :math:`N`
    """

    outputs_are_returns = True
    supported_losses = ("huber", "mse")

    def __init__(self, n_quantiles: int = 200) -> None:
        check_count("n_quantiles", n_quantiles)
        self.n_outputs = int(n_quantiles)
        self._fractions: _Constants = {}

    def _fractions_like(self, tensor: th.Tensor) -> th.Tensor:
        kind = tensor.dtype, tensor.device
        if kind not in self._fractions:
            self._fractions[kind] = midpoints(self.n_outputs, tensor)
        return self._fractions[kind]

    def q_values(self, outputs: th.Tensor) -> th.Tensor:
        """The means of the quantiles, ``(B, A, K)`` to ``(B, A)``."""
        return outputs.mean(dim=2)

    def backup(self, next_outputs: th.Tensor, returns: th.Tensor, discounts: th.Tensor) -> th.Tensor:
        """Every quantile discounted and shifted, ``(B, K)``."""
        return returns.unsqueeze(1) + discounts.unsqueeze(1) * next_outputs

    def losses(self, outputs: th.Tensor, target: th.Tensor, loss: Loss) -> tuple[th.Tensor, th.Tensor]:
        """The loss of quantile regression, which is the priority too."""
        losses = quantile_regression(outputs, self._fractions_like(outputs), target, loss)
        return losses, losses.detach()

    def moments(self, outputs: th.Tensor, target: th.Tensor) -> tuple[th.Tensor, th.Tensor, th.Tensor]:
        """Means and standard deviations of the quantiles."""
        return outputs.mean(dim=1), target.mean(dim=1), outputs.std(dim=1, correction=0)


def midpoints(n: int, like: th.Tensor) -> th.Tensor:
    """The middles of ``n`` equal parts of [0, 1], ``(n,)``, of the dtype and on the device of ``like``."""
    return (th.arange(n, dtype=like.dtype, device=like.device) + 0.5) / n


class ImplicitQuantileHead:
    r"""IQN: quantiles of the return at sampled fractions (Dabney et al. 2018, https://arxiv.org/abs/1806.06923).

    The network takes the fractions as an input. Its outputs carry them: of the ``K`` outputs of an action the first
    half are quantiles, the second half the fractions that they belong to.

    :param n_tau: fractions sampled for the predictions, :math:`N`
    :param n_tau_prime: fractions sampled for the targets, :math:`N'`
    :param n_tau_act: fractions for choosing actions; where the paper samples :math:`K`, these are the middles of as
        many equal parts of [0, 1], so that the same observation always gets the same action values
    :param n_cos: cosines that a fraction is embedded by
    """

    n_outputs = 1  # for one fraction
    outputs_are_returns = True
    supported_losses = ("huber", "mse")

    def __init__(self, n_tau: int = 64, n_tau_prime: int = 64, n_tau_act: int = 32, n_cos: int = 64) -> None:
        for name, value in (
            ("n_tau", n_tau),
            ("n_tau_prime", n_tau_prime),
            ("n_tau_act", n_tau_act),
            ("n_cos", n_cos),
        ):
            check_count(name, value)
        self.n_tau = int(n_tau)
        self.n_tau_prime = int(n_tau_prime)
        self.n_tau_act = int(n_tau_act)
        self.n_cos = int(n_cos)

    def q_values(self, outputs: th.Tensor) -> th.Tensor:
        """The means of the quantiles, ``(B, A, K)`` to ``(B, A)``."""
        return _quantiles(outputs).mean(dim=2)

    def backup(self, next_outputs: th.Tensor, returns: th.Tensor, discounts: th.Tensor) -> th.Tensor:
        """Every quantile discounted and shifted, ``(B, K / 2)``."""
        return returns.unsqueeze(1) + discounts.unsqueeze(1) * _quantiles(next_outputs)

    def losses(self, outputs: th.Tensor, target: th.Tensor, loss: Loss) -> tuple[th.Tensor, th.Tensor]:
        """The loss of quantile regression at the sampled fractions, which is the priority too."""
        quantiles, fractions = outputs.chunk(2, dim=1)
        losses = quantile_regression(quantiles, fractions, target, loss)
        return losses, losses.detach()

    def moments(self, outputs: th.Tensor, target: th.Tensor) -> tuple[th.Tensor, th.Tensor, th.Tensor]:
        """Means and standard deviations of the quantiles."""
        quantiles = _quantiles(outputs)
        return quantiles.mean(dim=1), target.mean(dim=1), quantiles.std(dim=1, correction=0)


def _quantiles(outputs: th.Tensor) -> th.Tensor:
    return outputs[..., : outputs.shape[-1] // 2]


HEADS: dict[str, Callable[..., ValueHead]] = {
    "expected": ExpectedHead,
    "c51": CategoricalHead,
    "quantile": QuantileHead,
    "iqn": ImplicitQuantileHead,
}


def make_head(name: str, kwargs: dict[str, Any] | None = None) -> ValueHead:
    """Make the head of this name.

    :param name: one of ``HEADS``
    :param kwargs: its arguments
    :raises ValueError: for a name or an argument that there is not
    """
    check_choice("head", name, HEADS)
    kwargs = {} if kwargs is None else kwargs
    check_arguments("head_kwargs", kwargs, HEADS[name])
    return HEADS[name](**kwargs)
