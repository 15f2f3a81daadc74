"""Losses: elementwise errors, and the loss of quantile regression that is made of them."""

from collections.abc import Callable

from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

# (prediction, target) -> elementwise error
Loss = Callable[[Tensor, Tensor], Tensor]


def huber(prediction: Float[Tensor, "*shape"], target: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Return the Huber loss: squared near zero, linear beyond 1.

    https://www.nature.com/articles/nature14236, "error clipping"
    """
    return F.smooth_l1_loss(prediction, target, reduction="none")


def squared(prediction: Float[Tensor, "*shape"], target: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Return the squared error (https://arxiv.org/abs/1312.5602)."""
    return F.mse_loss(prediction, target, reduction="none")


LOSSES: dict[str, Loss] = {"huber": huber, "mse": squared}


def quantile_regression(
    predicted: Float[Tensor, "B N"],
    fractions: Float[Tensor, "B N"] | Float[Tensor, "N"],
    target: Float[Tensor, "B N_prime"],
    loss: Loss,
) -> Float[Tensor, "B"]:
    r"""Return the loss of quantile regression (Dabney et al. 2017, https://arxiv.org/abs/1710.10044, equation 10).

    .. math:: \sum_i \frac{1}{N'} \sum_j |\tau_i - [u_{ij} < 0]| \, L(u_{ij}), \qquad u_{ij} = y_j - \theta_i

    With the Huber loss it is the paper's loss; with the squared error the outputs become expectiles, not quantiles.

    :param predicted: :math:`\theta`
    :param fractions: :math:`\tau`
    :param target: :math:`y`
    :param loss: :math:`L`
    """
    pairs = (*predicted.shape, target.shape[1])  # (B, N, N')
    theta, y = predicted.unsqueeze(2).expand(pairs), target.unsqueeze(1).expand(pairs)
    below = (y < theta.detach()).to(predicted.dtype)
    asymmetry = (fractions.unsqueeze(-1) - below).abs()
    losses: Tensor = (asymmetry * loss(theta, y)).mean(dim=2).sum(dim=1)
    return losses
