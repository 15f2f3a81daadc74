r"""Noisy networks: exploration by noisy weights (Fortunato et al. 2018, https://arxiv.org/abs/1706.10295).

A noisy layer computes :math:`(\mu^w + \sigma^w \odot \varepsilon^w) x + \mu^b + \sigma^b \odot \varepsilon^b`, and
learns :math:`\mu` and :math:`\sigma`. The noise is factorized: :math:`\varepsilon^w_{ij} = f(\varepsilon_i)
f(\varepsilon_j)` and :math:`\varepsilon^b_i = f(\varepsilon_i)`, with :math:`f(x) = \text{sgn}(x) \sqrt{|x|}` of
standard normal samples, one for each input and one for each output.

A layer is noisy only inside the context of :func:`noise`; training and evaluation mode have no effect. The noise
belongs to the context, and so to one thread: a concurrent prediction in another thread with the same layers has none.
"""

import math
from collections.abc import Collection, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar

import torch as th
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

# Weight and bias with noise
NoisyParameters = tuple[Float[Tensor, "outputs inputs"], Float[Tensor, "outputs"]]


class NoisyLinear(nn.Module):
    """A linear layer with factorized noise.

    :param in_features: number of inputs
    :param out_features: number of outputs
    :param sigma: ``sigma_0`` of the paper: the initial standard deviation is ``sigma / sqrt(in_features)``
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

    def sample_parameters(self) -> NoisyParameters:
        """Sample noise, and return weight and bias with it."""
        # One call for both: a call costs more than generating the numbers
        scaled = th.randn(self.out_features + self.in_features, device=self.weight.device, dtype=self.weight.dtype)
        scaled = scaled.sign() * scaled.abs().sqrt()
        outputs, inputs = scaled[: self.out_features], scaled[self.out_features :]
        return (
            th.addcmul(self.weight, self.weight_sigma, outputs.outer(inputs)),
            th.addcmul(self.bias, self.bias_sigma, outputs),
        )

    def forward(self, x: Float[Tensor, "*batch inputs"]) -> Float[Tensor, "*batch outputs"]:
        """Apply the layer, with the noise of the current context."""
        weight, bias = _sampled.get().get(self) or (self.weight, self.bias)
        return F.linear(x, weight, bias)

    def extra_repr(self) -> str:
        """Return the arguments that ``repr`` shows."""
        return f"in_features={self.in_features}, out_features={self.out_features}"


# By layer, in the contexts of noise() that are active in this thread
_sampled: ContextVar[dict[NoisyLinear, NoisyParameters]] = ContextVar("sampled noise", default={})  # noqa: B039  # never mutated


def noise(layers: Collection[NoisyLinear]) -> AbstractContextManager[None]:
    """Return a context in which layers have fresh noise, the same in every call; without layers it costs nothing.

    :param layers: the layers to which noise is added
    """
    return _noise(layers) if layers else nullcontext()


@contextmanager
def _noise(layers: Collection[NoisyLinear]) -> Iterator[None]:
    token = _sampled.set({**_sampled.get(), **{layer: layer.sample_parameters() for layer in layers}})
    try:
        yield
    finally:
        _sampled.reset(token)
