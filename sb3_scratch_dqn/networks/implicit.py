"""The network of IQN: quantiles of the return at any fractions."""

import math
from typing import Any

import torch as th
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from sb3_scratch_dqn.networks.q_network import QNetwork, full_precision
from sb3_scratch_dqn.replay.batch import BatchedObs
from sb3_scratch_dqn.values.heads import ImplicitQuantileHead, ImplicitQuantiles, ValueHead, midpoints


class ImplicitQNetwork(QNetwork):
    r"""A network that takes fractions as an input and returns the quantiles at them (https://arxiv.org/abs/1806.06923).

    A fraction :math:`\tau` is embedded as :math:`\phi(\tau) = \text{ReLU}(W \cos(\pi i \tau) + b)`,
    :math:`i = 0, 1, \ldots`, and multiplied with the encoded features. The encoder, the paper's :math:`\psi`, consists
    of all hidden layers except the last. The quantile layers, the paper's :math:`f`, are the last hidden layer and the
    output layer. A single hidden layer belongs to the encoder, unless dueling streams use it. Parameters as in
    :class:`QNetwork`.
    """

    core_method = "outputs_at"
    head: ImplicitQuantileHead
    frequencies: Tensor

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        encoder_widths = self.net_arch[:-1] if self.dueling or len(self.net_arch) > 1 else self.net_arch
        encoding_dim = [self.features_dim, *encoder_widths][-1]
        self._n_encoder_layers = 2 * len(encoder_widths)  # each has an activation
        self.embedding = nn.Linear(self.head.n_cos, encoding_dim)
        self.register_buffer("frequencies", math.pi * th.arange(self.head.n_cos), persistent=False)

    def split_layers(self) -> tuple[list[nn.Module], list[nn.Module]]:
        """Return the layers of the encoder and the quantile layers; both parts are stored in ``q_net``."""
        layers = list(self.q_net)
        return layers[: self._n_encoder_layers], layers[self._n_encoder_layers :]

    def outputs_at(
        self, obs: BatchedObs, fractions: Float[Tensor, "B N"] | Float[Tensor, "1 N"]
    ) -> Float[Tensor, "B A 2*N"]:
        """Compute quantiles at given fractions.

        :param obs: observations
        :param fractions: between 0 and 1, per observation or the same for all
        :return: packed :class:`~sb3_scratch_dqn.values.heads.ImplicitQuantiles`
        """
        encoder, quantile_layers = self.split_layers()
        encoded = self.extract_features(obs, self.features_extractor)
        for layer in encoder:
            encoded = layer(encoded)
        cosines = th.cos(fractions.unsqueeze(2) * self.frequencies)  # (B or 1, N, n_cos)
        x = (encoded.unsqueeze(1) * F.relu(self.embedding(cosines))).flatten(0, 1)  # (B * N, encoding_dim)
        for layer in quantile_layers:
            x = layer(x)
        quantiles = full_precision(x).view(-1, fractions.shape[1], self.n_actions).transpose(1, 2)
        return ImplicitQuantiles(quantiles, fractions.unsqueeze(1).expand_as(quantiles)).pack()

    def _outputs_at_random(self, obs: BatchedObs, n_fractions: int) -> Float[Tensor, "B A 2*{n_fractions}"]:
        first = next(iter(obs.values())) if isinstance(obs, dict) else obs
        return self.outputs_at(obs, th.rand(len(first), n_fractions, device=self.frequencies.device))

    def outputs(self, obs: BatchedObs) -> Float[Tensor, "B A K"]:
        """Return packed quantiles at ``n_tau`` random fractions."""
        return self._outputs_at_random(obs, self.head.n_tau)

    def target_outputs(self, obs: BatchedObs) -> Float[Tensor, "B A K"]:
        """Return packed quantiles at ``n_tau_prime`` random fractions."""
        return self._outputs_at_random(obs, self.head.n_tau_prime)

    def q_values_from(self, obs: BatchedObs, target_outputs: Float[Tensor, "B A K"]) -> Float[Tensor, "B A"]:
        """Return action values, computed at other fractions than ``target_outputs``."""
        return self.forward(obs)

    def forward(self, obs: BatchedObs) -> Float[Tensor, "B A"]:
        """Return action values: means over ``n_tau_act`` evenly spaced fractions."""
        fractions = midpoints(self.head.n_tau_act, self.frequencies).unsqueeze(0)
        return self.head.q_values(self.outputs_at(obs, fractions))


def network_class(head: ValueHead) -> type[QNetwork]:
    """Return the class of network that computes the outputs of a head."""
    return ImplicitQNetwork if isinstance(head, ImplicitQuantileHead) else QNetwork
