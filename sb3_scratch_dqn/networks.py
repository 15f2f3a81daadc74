"""From observations to what a head reads: features, trunk, outputs."""

from typing import Any

import torch as th
from gymnasium import spaces
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor, create_mlp
from stable_baselines3.common.type_aliases import PyTorchObs
from torch import nn

from sb3_scratch_dqn.heads import ValueHead


class QNetwork(BasePolicy):
    """The network behind the action values.

    Its parameters carry the names and shapes that they have in SB3's DQN, so that a ``state_dict`` of one fits the
    other. A subclass that computes something else does so in :meth:`outputs`, which acting and training both read.

    :param observation_space: what the network sees
    :param action_space: the actions that it values
    :param features_extractor: turns observations into features
    :param features_dim: number of features
    :param net_arch: widths of the hidden layers
    :param head: says how many outputs an action has and what they mean
    :param activation_fn: follows every hidden layer
    :param normalize_images: divide images by 255
    """

    action_space: spaces.Discrete

    def __init__(
        self,
        observation_space: spaces.Space[Any],
        action_space: spaces.Discrete,
        features_extractor: BaseFeaturesExtractor,
        features_dim: int,
        net_arch: list[int],
        head: ValueHead,
        activation_fn: type[nn.Module] = nn.ReLU,
        normalize_images: bool = True,
    ) -> None:
        super().__init__(
            observation_space,
            action_space,
            features_extractor=features_extractor,
            normalize_images=normalize_images,
        )
        self.net_arch = net_arch
        self.activation_fn = activation_fn
        self.features_dim = features_dim
        self.head = head
        self.n_actions = int(action_space.n)
        self.q_net = nn.Sequential(*create_mlp(features_dim, self.n_actions * head.n_outputs, net_arch, activation_fn))

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Refuse a subclass that would act by one function and learn another."""
        super().__init_subclass__(**kwargs)
        if "forward" in vars(cls) and "outputs" not in vars(cls):
            raise TypeError(f"{cls.__name__} must override outputs() rather than forward(): training reads outputs()")

    def outputs(self, obs: PyTorchObs) -> th.Tensor:
        """What the head reads, ``(B, A, K)``."""
        flat: th.Tensor = self.q_net(self.extract_features(obs, self.features_extractor))
        return flat.view(-1, self.n_actions, self.head.n_outputs)

    def forward(self, obs: PyTorchObs) -> th.Tensor:
        """Action values, ``(B, A)``."""
        return self.head.q_values(self.outputs(obs))

    def _predict(self, observation: PyTorchObs, deterministic: bool = True) -> th.Tensor:
        return self.forward(observation).argmax(dim=1).reshape(-1)

    def _get_constructor_parameters(self) -> dict[str, Any]:
        return {
            **super()._get_constructor_parameters(),
            "net_arch": self.net_arch,
            "features_dim": self.features_dim,
            "activation_fn": self.activation_fn,
            "features_extractor": self.features_extractor,
            "head": self.head,
        }
