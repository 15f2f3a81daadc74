r"""Noisy networks: layers that explore (Fortunato et al. 2018, https://arxiv.org/abs/1706.10295).

A noisy layer computes :math:`(\mu^w + \sigma^w \odot \varepsilon^w) x + \mu^b + \sigma^b \odot \varepsilon^b`, and
learns :math:`\mu` and :math:`\sigma`. The noise is factorized: :math:`\varepsilon^w_{ij} = f(\varepsilon_i)
f(\varepsilon_j)` and :math:`\varepsilon^b_i = f(\varepsilon_i)`, with :math:`f(x) = \text{sgn}(x) \sqrt{|x|}` of
standard normal numbers, one for each input and one for each output.

There is noise only where somebody asked for it (:func:`noise`); training and evaluation mode do not matter.
"""

import math
from collections.abc import Collection, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch as th
from torch import nn
from torch.nn import functional as F


class NoisyLinear(nn.Module):
    """A linear layer with factorized noise.

    :param in_features: number of inputs
    :param out_features: number of outputs
    :param sigma: the standard deviation of the noise to begin with, times the root of ``in_features``
    """

    def __init__(self, in_features: int, out_features: int, sigma: float = 0.5) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        bound = 1 / math.sqrt(in_features)
        self.weight = nn.Parameter(th.empty(out_features, in_features).uniform_(-bound, bound))
        self.weight_sigma = nn.Parameter(th.full((out_features, in_features), sigma * bound))
        self.bias = nn.Parameter(th.empty(out_features).uniform_(-bound, bound))
        self.bias_sigma = nn.Parameter(th.full((out_features,), sigma * bound))
        self._noisy: tuple[th.Tensor, th.Tensor] | None = None  # weight and bias with the noise of now

    def draw_noise(self) -> None:
        """Have other noise from now on, the same in every call."""
        # One call for both: a call costs more than its numbers
        scaled = th.randn(self.out_features + self.in_features, device=self.weight.device, dtype=self.weight.dtype)
        scaled = scaled.sign() * scaled.abs().sqrt()
        outputs, inputs = scaled[: self.out_features], scaled[self.out_features :]
        self._noisy = (
            th.addcmul(self.weight, self.weight_sigma, outputs.outer(inputs)),
            th.addcmul(self.bias, self.bias_sigma, outputs),
        )

    def clear_noise(self) -> None:
        """Have no noise from now on."""
        self._noisy = None

    def forward(self, x: th.Tensor) -> th.Tensor:
        """``(..., in_features)`` to ``(..., out_features)``."""
        weight, bias = self._noisy or (self.weight, self.bias)
        return F.linear(x, weight, bias)

    def extra_repr(self) -> str:
        """What ``print`` shows."""
        return f"in_features={self.in_features}, out_features={self.out_features}"


def noise(layers: Collection[NoisyLinear]) -> AbstractContextManager[None]:
    """Fresh noise in some layers, for as long as the context lasts; without layers it costs nothing."""
    return _noise(layers) if layers else nullcontext()


@contextmanager
def _noise(layers: Collection[NoisyLinear]) -> Iterator[None]:
    try:
        for layer in layers:
            layer.draw_noise()
        yield
    finally:
        for layer in layers:
            layer.clear_noise()
