r"""Heads: how to interpret network outputs.

A network returns ``(B, A, K)`` outputs: ``K`` for each of ``A`` actions in each of ``B`` states. A head defines what
they are, the action values that follow from them, and the loss between a prediction and its target. Engines,
networks and the Bellman update in :mod:`sb3_scratch_dqn.values.td` use nothing else of a head.

====================  =======================================================  =======================
head                  the ``K`` outputs of an action                           loss
====================  =======================================================  =======================
``"expected"``        its value                                                Huber or squared
``"c51"``             logits of the probabilities of ``n_atoms`` fixed returns  cross-entropy
``"quantile"``        quantiles of the return, at fixed fractions              quantile Huber
``"iqn"``             quantiles at sampled fractions, and these fractions      quantile Huber
====================  =======================================================  =======================
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch as th
from jaxtyping import Float
from torch import Tensor

from sb3_scratch_dqn.common.checks import check_choice, check_count, check_kwargs, check_number
from sb3_scratch_dqn.values.losses import Loss, quantile_regression


class ValueHead(Protocol):
    """The interface of a head.

    :param n_outputs: width of the network's last layer per action. It is ``K``, except for IQN, whose network returns
        this many numbers for each fraction
    :param outputs_are_returns: whether outputs are returns, which can be shifted, and averaged over actions
    """

    n_outputs: int
    outputs_are_returns: bool

    @property
    def supported_losses(self) -> tuple[str, ...]:
        """Names of the elementwise losses that :meth:`losses` accepts."""

    def q_values(self, outputs: Float[Tensor, "B A K"]) -> Float[Tensor, "B A"]:
        """Return action values.

        :param outputs: outputs of the network
        """

    def backup(
        self, next_outputs: Float[Tensor, "B K"], returns: Float[Tensor, "B"], discounts: Float[Tensor, "B"]
    ) -> Float[Tensor, "B *target"]:
        """Compute the target of the outputs.

        :param next_outputs: outputs of the target network for the next states and the actions chosen there
        :param returns: discounted sums of the rewards before the next states
        :param discounts: factors of the next states' values
        :return: a target for :meth:`losses`
        """

    def losses(
        self, outputs: Float[Tensor, "B K"], target: Float[Tensor, "B *target"], loss: Loss
    ) -> tuple[Float[Tensor, "B"], Float[Tensor, "B"]]:
        """Compute the per-sample losses.

        :param outputs: outputs of the online network for the actions taken
        :param target: from :meth:`backup`
        :param loss: the elementwise loss
        :return: losses, and replay priorities, which have no gradient
        """

    def moments(
        self, outputs: Float[Tensor, "B K"], target: Float[Tensor, "B *target"]
    ) -> tuple[Float[Tensor, "B"], Float[Tensor, "B"], Float[Tensor, "B"] | None]:
        """Compute statistics of the predicted returns, for the logger.

        :param outputs: as for :meth:`losses`
        :param target: from :meth:`backup`
        :return: means of the predicted returns, means of the target, and standard deviations of the predicted returns;
            ``None`` for the last if the head does not model a distribution
        """


class ExpectedHead:
    """One output per action: its expected return (Mnih et al. 2015, https://www.nature.com/articles/nature14236)."""

    n_outputs = 1
    outputs_are_returns = True
    supported_losses = ("huber", "mse")

    def q_values(self, outputs: Float[Tensor, "B A 1"]) -> Float[Tensor, "B A"]:
        """Return the outputs."""
        return outputs.squeeze(2)

    def backup(
        self, next_outputs: Float[Tensor, "B 1"], returns: Float[Tensor, "B"], discounts: Float[Tensor, "B"]
    ) -> Float[Tensor, "B"]:
        r"""Return :math:`R + \gamma^k (1 - \text{terminated}) Q_\text{target}(s', a')`."""
        return returns + discounts * next_outputs.squeeze(1)

    def losses(
        self, outputs: Float[Tensor, "B 1"], target: Float[Tensor, "B"], loss: Loss
    ) -> tuple[Float[Tensor, "B"], Float[Tensor, "B"]]:
        """Return the losses, and the absolute TD errors as priorities."""
        predicted = outputs.squeeze(1)
        return loss(predicted, target), (target - predicted.detach()).abs()

    def moments(
        self, outputs: Float[Tensor, "B 1"], target: Float[Tensor, "B"]
    ) -> tuple[Float[Tensor, "B"], Float[Tensor, "B"], None]:
        """Return the outputs, the target, and ``None``."""
        return outputs.squeeze(1), target, None


class Constant:
    """A tensor that never changes, created once per dtype and device and then kept.

    Captured CUDA graphs read it at its address, so it is never freed or replaced.

    :param make: another tensor -> the constant with the dtype and on the device of that tensor
    """

    def __init__(self, make: Callable[[Tensor], Tensor]) -> None:
        self._make = make
        self._tensors: dict[tuple[th.dtype, th.device], Tensor] = {}

    def like(self, tensor: Tensor) -> Tensor:
        """Return the constant with the dtype and on the device of a tensor."""
        key = tensor.dtype, tensor.device
        if key not in self._tensors:
            self._tensors[key] = self._make(tensor)
        return self._tensors[key]


def evenly_spaced(low: float, high: float, n: int, like: Tensor) -> Float[Tensor, "{n}"]:
    """Return ``n`` numbers from ``low`` to ``high``, with the dtype and on the device of ``like``."""
    return th.linspace(low, high, n, dtype=like.dtype, device=like.device)


def midpoints(n: int, like: Tensor) -> Float[Tensor, "{n}"]:
    """Return the midpoints of ``n`` equal parts of [0, 1], with the dtype and on the device of ``like``."""
    return (th.arange(n, dtype=like.dtype, device=like.device) + 0.5) / n


# Distances between atoms are computed in float32
_LARGEST = 1e30


class CategoricalHead:
    r"""C51: probabilities of fixed returns (Bellemare et al. 2017, https://arxiv.org/abs/1707.06887).

    The outputs are logits of the probabilities :math:`p_i` of the atoms
    :math:`z_i = v_\min + i \Delta z,\ \Delta z = (v_\max - v_\min) / (n - 1)`.

    :param n_atoms: number of atoms, at least 2
    :param v_min: the lowest atom
    :param v_max: the highest atom
    """

    outputs_are_returns = False
    supported_losses = ("huber",)  # the default of ScratchDQN; cross-entropy does not use it

    def __init__(self, n_atoms: int = 51, v_min: float = -10.0, v_max: float = 10.0) -> None:
        check_count("n_atoms", n_atoms, minimum=2)
        check_number("v_min", v_min)
        check_number("v_max", v_max)
        if not v_min < v_max:
            raise ValueError(f"v_min={v_min!r} must be below v_max={v_max!r}")
        if not math.isfinite(float(v_max) - float(v_min)) or max(abs(v_min), abs(v_max)) > _LARGEST:
            raise ValueError(f"v_min={v_min!r} and v_max={v_max!r} must be between -{_LARGEST} and {_LARGEST}")
        atoms = np.linspace(v_min, v_max, int(n_atoms)).astype(np.float32)[[0, 1, -2, -1]]
        if not (atoms[0] < atoms[1] and atoms[2] < atoms[3]):
            raise ValueError(f"v_min={v_min!r} and v_max={v_max!r} are too close for {n_atoms} atoms in float32")
        self.n_outputs = int(n_atoms)
        self.v_min, self.v_max = float(v_min), float(v_max)
        self._atoms = Constant(self._make_atoms)

    def _make_atoms(self, like: Tensor) -> Float[Tensor, "K"]:
        return evenly_spaced(self.v_min, self.v_max, self.n_outputs, like)

    def q_values(self, outputs: Float[Tensor, "B A K"]) -> Float[Tensor, "B A"]:
        r"""Return :math:`\sum_i p_i z_i`."""
        return outputs.softmax(dim=-1) @ self._atoms.like(outputs)

    def backup(
        self, next_outputs: Float[Tensor, "B K"], returns: Float[Tensor, "B"], discounts: Float[Tensor, "B"]
    ) -> Float[Tensor, "B K"]:
        r"""Return the next state's distribution, discounted, shifted and projected onto the atoms.

        The probability of :math:`R + \gamma^k (1 - \text{terminated}) z_j`, clipped to the range of the atoms, is
        divided between the two nearest atoms in proportion to their proximity.
        """
        probabilities = next_outputs.softmax(dim=1)
        moved = returns.unsqueeze(1) + discounts.unsqueeze(1) * self._atoms.like(next_outputs)
        last = self.n_outputs - 1
        # In units of atoms, counted from the lowest
        position = (moved.clamp(self.v_min, self.v_max) - self.v_min) * (last / (self.v_max - self.v_min))
        below = position.floor()
        share_above = position - below
        # Rounding may exceed the last atom. A NaN position becomes a valid index; its probability remains NaN
        below_index = below.long().clamp(0, last)
        target = th.zeros_like(probabilities)
        target.scatter_add_(1, below_index, probabilities * (1 - share_above))
        # On the highest atom the share above is 0
        target.scatter_add_(1, (below_index + 1).clamp(max=last), probabilities * share_above)
        return target

    def losses(
        self, outputs: Float[Tensor, "B K"], target: Float[Tensor, "B K"], loss: Loss
    ) -> tuple[Float[Tensor, "B"], Float[Tensor, "B"]]:
        """Return the cross-entropies of target and prediction, and their Kullback-Leibler divergences as priorities."""
        losses = -(target * outputs.log_softmax(dim=1)).sum(dim=1)
        target_entropies = -th.special.xlogy(target, target).sum(dim=1)
        return losses, (losses.detach() - target_entropies).clamp(min=0)

    def moments(
        self, outputs: Float[Tensor, "B K"], target: Float[Tensor, "B K"]
    ) -> tuple[Float[Tensor, "B"], Float[Tensor, "B"], Float[Tensor, "B"]]:
        """Return the means of the predictions and of the targets, and the standard deviations of the predictions."""
        atoms, probabilities = self._atoms.like(outputs), outputs.softmax(dim=1)
        means = probabilities @ atoms
        variances = (probabilities * (atoms - means.unsqueeze(1)) ** 2).sum(dim=1)
        return means, target @ atoms, variances.sqrt()


class QuantileHead:
    r"""QR-DQN: quantiles of the return at the fractions :math:`(i + 1/2) / N` (https://arxiv.org/abs/1710.10044).

    :param n_quantiles: :math:`N`
    """

    outputs_are_returns = True
    supported_losses = ("huber", "mse")

    def __init__(self, n_quantiles: int = 200) -> None:
        check_count("n_quantiles", n_quantiles)
        self.n_outputs = int(n_quantiles)
        self._fractions = Constant(partial(midpoints, self.n_outputs))

    def q_values(self, outputs: Float[Tensor, "B A K"]) -> Float[Tensor, "B A"]:
        """Return the means of the quantiles."""
        return outputs.mean(dim=2)

    def backup(
        self, next_outputs: Float[Tensor, "B K"], returns: Float[Tensor, "B"], discounts: Float[Tensor, "B"]
    ) -> Float[Tensor, "B K"]:
        """Return every quantile, discounted and shifted."""
        return returns.unsqueeze(1) + discounts.unsqueeze(1) * next_outputs

    def losses(
        self, outputs: Float[Tensor, "B K"], target: Float[Tensor, "B K"], loss: Loss
    ) -> tuple[Float[Tensor, "B"], Float[Tensor, "B"]]:
        """Return the losses of quantile regression, which are the priorities, too."""
        losses = quantile_regression(outputs, self._fractions.like(outputs), target, loss)
        return losses, losses.detach()

    def moments(
        self, outputs: Float[Tensor, "B K"], target: Float[Tensor, "B K"]
    ) -> tuple[Float[Tensor, "B"], Float[Tensor, "B"], Float[Tensor, "B"]]:
        """Return the means of the predictions and of the targets, and the standard deviations of the predictions."""
        return outputs.mean(dim=1), target.mean(dim=1), outputs.std(dim=1, correction=0)


class ImplicitQuantiles(NamedTuple):
    """Quantiles of returns and the fractions at which they were computed: the outputs of IQN.

    :param quantiles: of every action, or of the actions taken
    :param fractions: between 0 and 1, one per quantile
    """

    quantiles: Float[Tensor, "*batch N"]
    fractions: Float[Tensor, "*batch N"]

    def pack(self) -> Float[Tensor, "*batch K"]:
        """Concatenate quantiles and fractions to one tensor of ``K = 2 * N`` outputs."""
        return th.cat(self, dim=-1)

    @classmethod
    def unpack(cls, outputs: Float[Tensor, "*batch K"]) -> "ImplicitQuantiles":
        """Return views of the quantiles and fractions in a packed tensor."""
        return cls(*outputs.chunk(2, dim=-1))


class ImplicitQuantileHead:
    r"""IQN: quantiles of the return at sampled fractions (Dabney et al. 2018, https://arxiv.org/abs/1806.06923).

    The network takes the fractions as an input and returns one quantile per action and fraction. Its outputs are
    packed :class:`ImplicitQuantiles`: the losses need the fractions as well.

    :param n_tau: number of fractions sampled for the predictions, :math:`N`
    :param n_tau_prime: number of fractions sampled for the targets, :math:`N'`
    :param n_tau_act: number of fractions for choosing actions. The paper samples :math:`K` of them; here they are the
        midpoints of equal parts of [0, 1], so that the same observation always gets the same action values
    :param n_cos: number of cosines in the embedding of a fraction
    """

    n_outputs = 1  # per fraction
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

    def q_values(self, outputs: Float[Tensor, "B A K"]) -> Float[Tensor, "B A"]:
        """Return the means of the quantiles."""
        return ImplicitQuantiles.unpack(outputs).quantiles.mean(dim=2)

    def backup(
        self, next_outputs: Float[Tensor, "B K"], returns: Float[Tensor, "B"], discounts: Float[Tensor, "B"]
    ) -> Float[Tensor, "B K//2"]:
        """Return every quantile, discounted and shifted."""
        return returns.unsqueeze(1) + discounts.unsqueeze(1) * ImplicitQuantiles.unpack(next_outputs).quantiles

    def losses(
        self, outputs: Float[Tensor, "B K"], target: Float[Tensor, "B N_prime"], loss: Loss
    ) -> tuple[Float[Tensor, "B"], Float[Tensor, "B"]]:
        """Return the losses of quantile regression at the sampled fractions, which are the priorities, too."""
        quantiles, fractions = ImplicitQuantiles.unpack(outputs)
        losses = quantile_regression(quantiles, fractions, target, loss)
        return losses, losses.detach()

    def moments(
        self, outputs: Float[Tensor, "B K"], target: Float[Tensor, "B N_prime"]
    ) -> tuple[Float[Tensor, "B"], Float[Tensor, "B"], Float[Tensor, "B"]]:
        """Return the means of the predictions and of the targets, and the standard deviations of the predictions."""
        quantiles = ImplicitQuantiles.unpack(outputs).quantiles
        return quantiles.mean(dim=1), target.mean(dim=1), quantiles.std(dim=1, correction=0)


HEADS: dict[str, Callable[..., ValueHead]] = {
    "expected": ExpectedHead,
    "c51": CategoricalHead,
    "quantile": QuantileHead,
    "iqn": ImplicitQuantileHead,
}


def make_head(name: str, kwargs: dict[str, Any] | None = None) -> ValueHead:
    """Create a head.

    :param name: one of ``HEADS``
    :param kwargs: its arguments
    :raises ValueError: for an unknown name or argument
    """
    check_choice("head", name, HEADS)
    kwargs = {} if kwargs is None else kwargs
    check_kwargs("head_kwargs", kwargs, HEADS[name])
    return HEADS[name](**kwargs)
