"""From observations to what a head reads: features, trunk, outputs."""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, ClassVar, cast

import torch as th
from gymnasium import spaces
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.preprocessing import is_image_space, preprocess_obs
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from stable_baselines3.common.type_aliases import PyTorchObs
from torch import nn
from torch.nn import functional as F

from sb3_scratch_dqn.networks.noisy import NoisyLinear, noise
from sb3_scratch_dqn.values.heads import ExpectedHead, ImplicitQuantileHead, ValueHead, midpoints

# (inputs, outputs) -> layer
LinearFactory = Callable[[int, int], nn.Module]

_HALF_PRECISION = (th.bfloat16, th.float16)

# -> activation; a class is one
ActivationFactory = Callable[[], nn.Module]


def hidden_layers(
    n_inputs: int, widths: list[int], activation_fn: ActivationFactory, linear: LinearFactory
) -> list[nn.Module]:
    """Linear layers, each followed by an activation.

    :param n_inputs: of the first layer
    :param widths: of the layers
    :param activation_fn: makes an activation
    :param linear: makes a linear layer
    """
    layers: list[nn.Module] = []
    for width in widths:
        layers += [linear(n_inputs, width), activation_fn()]
        n_inputs = width
    return layers


def full_precision(outputs: th.Tensor) -> th.Tensor:
    """Convert what a network computed in 16 bits, as in ``torch.autocast``, to 32: heads sum and compare it."""
    return outputs.float() if outputs.dtype in _HALF_PRECISION else outputs


def preprocess(
    obs: PyTorchObs, space: spaces.Space[Any], normalize_images: bool, image_format: th.memory_format
) -> PyTorchObs:
    """What SB3's ``preprocess_obs`` gives, to the last bit, in less time for images.

    :param obs: ``B`` observations
    :param space: what they are
    :param normalize_images: divide images by 255
    :param image_format: how images are to lie in memory
    """
    if isinstance(obs, dict) and isinstance(space, spaces.Dict):
        parts = {key: preprocess(one, space[key], normalize_images, image_format) for key, one in obs.items()}
        return cast("dict[str, th.Tensor]", parts)  # no dict holds another
    if isinstance(obs, th.Tensor) and obs.dtype == th.uint8 and normalize_images and is_image_space(space):
        # In place: memory for a second batch of images as floats would cost many times what the division does
        return th.empty_like(obs, dtype=th.float32, memory_format=image_format).copy_(obs).div_(255.0)
    preprocessed: PyTorchObs = preprocess_obs(obs, space, normalize_images=normalize_images)
    return preprocessed


class DuelingStreams(nn.Module):
    r"""The value of a state, and what each action adds to it (Wang et al. 2016, https://arxiv.org/abs/1511.06581).

    :math:`Q(s, a) = V(s) + A(s, a) - \frac{1}{|A|} \sum_{a'} A(s, a')`, for each of the ``K`` outputs of an action.

    :param n_inputs: of both streams
    :param widths: of the hidden layers that each stream has for itself
    :param n_actions: ``A``
    :param n_outputs: ``K``
    :param activation_fn: follows every hidden layer
    :param linear: makes a linear layer
    """

    def __init__(
        self,
        n_inputs: int,
        widths: list[int],
        n_actions: int,
        n_outputs: int,
        activation_fn: ActivationFactory,
        linear: LinearFactory,
    ) -> None:
        super().__init__()
        self.shape = (n_actions, n_outputs)
        width = [n_inputs, *widths][-1]

        def stream(n_stream_outputs: int) -> nn.Sequential:
            layers = hidden_layers(n_inputs, widths, activation_fn, linear)
            return nn.Sequential(*layers, linear(width, n_stream_outputs))

        self.value = stream(n_outputs)
        self.advantage = stream(n_actions * n_outputs)

    def forward(self, x: th.Tensor) -> th.Tensor:
        """``(B, n_inputs)`` to ``(B, A * K)``."""
        advantage = self.advantage(x).view(-1, *self.shape)
        value = self.value(x).unsqueeze(1)
        outputs: th.Tensor = (value + advantage - advantage.mean(dim=1, keepdim=True)).flatten(1)
        return outputs


class QNetwork(BasePolicy):
    """The network behind the action values.

    Without the extras, its parameters carry the names and shapes that they have in SB3's DQN, so that a ``state_dict``
    of one fits the other. A subclass that computes something else does so in :meth:`outputs`, which acting and
    training both read.

    :param observation_space: what the network sees
    :param action_space: the actions that it values
    :param features_extractor: turns observations into features
    :param features_dim: number of features
    :param net_arch: widths of the hidden layers
    :param head: says how many outputs an action has and what they mean
    :param activation_fn: follows every hidden layer
    :param normalize_images: divide images by 255
    :param dueling: split into a value and an advantage stream, each with a last hidden layer of its own
    :param linear: makes the linear layers behind the features
    """

    action_space: spaces.Discrete
    core_method: ClassVar = "outputs"  # the method from which all others follow
    image_format: th.memory_format = th.contiguous_format  # how images lie in memory, for whoever knows a faster way

    def __init__(
        self,
        observation_space: spaces.Space[Any],
        action_space: spaces.Discrete,
        features_extractor: BaseFeaturesExtractor,
        features_dim: int,
        net_arch: list[int],
        head: ValueHead,
        activation_fn: ActivationFactory = nn.ReLU,
        normalize_images: bool = True,
        dueling: bool = False,
        linear: LinearFactory = nn.Linear,
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
        self.dueling = dueling
        self.linear = linear
        self.n_actions = int(action_space.n)
        self.q_net = nn.Sequential(*self._make_layers())
        self._noisy_layers: list[NoisyLinear] | None = None  # not known before a subclass has made its own

    def _make_layers(self) -> list[nn.Module]:
        n_actions, n_outputs, widths = self.n_actions, self.head.n_outputs, list(self.net_arch)
        shared, own = (widths[:-1], widths[-1:]) if self.dueling else (widths, [])
        layers = hidden_layers(self.features_dim, shared, self.activation_fn, self.linear)
        width = [self.features_dim, *shared][-1]
        if self.dueling:
            return [*layers, DuelingStreams(width, own, n_actions, n_outputs, self.activation_fn, self.linear)]
        return [*layers, self.linear(width, n_actions * n_outputs)]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Refuse a subclass that would act by one function and learn another."""
        super().__init_subclass__(**kwargs)
        base = cls.core_method
        if not vars(cls).keys().isdisjoint({"forward", "outputs"} - {base}) and base not in vars(cls):
            raise TypeError(f"{cls.__name__} must override {base}(), which acting and training both read")

    def extract_features(self, obs: PyTorchObs, features_extractor: BaseFeaturesExtractor) -> th.Tensor:
        """Features, ``(B, features_dim)``, of ``B`` observations."""
        features: th.Tensor = features_extractor(
            preprocess(obs, self.observation_space, self.normalize_images, self.image_format)
        )
        return features

    def outputs(self, obs: PyTorchObs) -> th.Tensor:
        """What the head reads, ``(B, A, K)``."""
        flat = full_precision(self.q_net(self.extract_features(obs, self.features_extractor)))
        return flat.view(-1, self.n_actions, self.head.n_outputs)

    def target_outputs(self, obs: PyTorchObs) -> th.Tensor:
        """What the head reads in order to make a target, ``(B, A, K)``."""
        return self.outputs(obs)

    def q_values_from(self, obs: PyTorchObs, target_outputs: th.Tensor) -> th.Tensor:
        """Action values, ``(B, A)``, where :meth:`target_outputs` of the same observations is at hand."""
        return self.head.q_values(target_outputs)

    def forward(self, obs: PyTorchObs) -> th.Tensor:
        """Action values, ``(B, A)``."""
        return self.head.q_values(self.outputs(obs))

    def evaluate(self, obs: PyTorchObs) -> th.Tensor:
        """Action values, ``(B, A)``, as they are in evaluation mode, also in the middle of training."""
        return evaluated(self, obs)

    @property
    def noisy_layers(self) -> list[NoisyLinear]:
        """All layers that explore by noise."""
        if self._noisy_layers is None:
            self._noisy_layers = [module for module in self.modules() if isinstance(module, NoisyLinear)]
        return self._noisy_layers

    def noise(self) -> AbstractContextManager[None]:
        """A context in which noisy layers have fresh noise; outside of it they have none."""
        return noise(self.noisy_layers)

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
            "dueling": self.dueling,
            "linear": self.linear,
        }


class ImplicitQNetwork(QNetwork):
    r"""The network of IQN, whose quantiles belong to fractions that it is told (https://arxiv.org/abs/1806.06923).

    A fraction :math:`\tau` is embedded as :math:`\phi(\tau) = \text{ReLU}(W \cos(\pi i \tau) + b)`,
    :math:`i = 0, 1, \ldots`, and multiplies what the last hidden layer sees: what comes before it is the paper's
    :math:`\psi`, the layer and the outputs behind it are its :math:`f`. A layer that is the only one belongs to
    :math:`\psi`, unless dueling streams need it. Parameters as in :class:`QNetwork`.
    """

    core_method = "outputs_at"
    head: ImplicitQuantileHead
    frequencies: th.Tensor

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        encoder = self.net_arch[:-1] if self.dueling or len(self.net_arch) > 1 else self.net_arch
        encoding_dim = [self.features_dim, *encoder][-1]
        self._n_encoder_layers = 2 * len(encoder)  # each with its activation
        self.embedding = nn.Linear(self.head.n_cos, encoding_dim)
        self.register_buffer("frequencies", math.pi * th.arange(self.head.n_cos), persistent=False)

    def outputs_at(self, obs: PyTorchObs, fractions: th.Tensor) -> th.Tensor:
        """Quantiles, and the fractions that they belong to.

        :param obs: ``B`` observations
        :param fractions: ``(B, N)``, or ``(1, N)`` for the same in all
        :return: ``(B, A, 2 * N)``
        """
        layers = list(self.q_net)
        encoded = self.extract_features(obs, self.features_extractor)
        for layer in layers[: self._n_encoder_layers]:
            encoded = layer(encoded)
        cosines = th.cos(fractions.unsqueeze(2) * self.frequencies)  # (B or 1, N, n_cos)
        x = (encoded.unsqueeze(1) * F.relu(self.embedding(cosines))).flatten(0, 1)  # (B * N, encoding_dim)
        for layer in layers[self._n_encoder_layers :]:
            x = layer(x)
        n_fractions = fractions.shape[1]
        quantiles = full_precision(x).view(-1, n_fractions, self.n_actions).transpose(1, 2)
        return th.cat([quantiles, fractions.unsqueeze(1).expand_as(quantiles)], dim=2)

    def _outputs_at_random(self, obs: PyTorchObs, n_fractions: int) -> th.Tensor:
        first = next(iter(obs.values())) if isinstance(obs, dict) else obs
        return self.outputs_at(obs, th.rand(len(first), n_fractions, device=self.frequencies.device))

    def outputs(self, obs: PyTorchObs) -> th.Tensor:
        """Quantiles at ``n_tau`` random fractions, and these, ``(B, A, 2 * n_tau)``."""
        return self._outputs_at_random(obs, self.head.n_tau)

    def target_outputs(self, obs: PyTorchObs) -> th.Tensor:
        """Quantiles at ``n_tau_prime`` random fractions, and these, ``(B, A, 2 * n_tau_prime)``."""
        return self._outputs_at_random(obs, self.head.n_tau_prime)

    def q_values_from(self, obs: PyTorchObs, target_outputs: th.Tensor) -> th.Tensor:
        """Action values, ``(B, A)``, from other fractions than those that the target is made of."""
        return self.forward(obs)

    def forward(self, obs: PyTorchObs) -> th.Tensor:
        """Action values, ``(B, A)``: means over ``n_tau_act`` evenly spread fractions."""
        fractions = midpoints(self.head.n_tau_act, self.frequencies).unsqueeze(0)
        return self.head.q_values(self.outputs_at(obs, fractions))


class ForwardNetwork:
    """A module of another kind in the place of a :class:`QNetwork`, of which only ``forward`` is used.

    Wrappers such as ``torch.nn.DataParallel`` pass nothing else on.

    :param module: observations -> action values, ``(B, A)``
    :param head: says what the outputs mean; they must be the values themselves
    :raises ValueError: for a head that reads more than action values
    """

    def __init__(self, module: nn.Module, head: ValueHead) -> None:
        if not isinstance(head, ExpectedHead):
            raise ValueError(
                f"the network is a {type(module).__name__} without a method outputs(), which {type(head).__name__} "
                "reads: derive it from sb3_scratch_dqn.networks.q_network.QNetwork, or use head='expected'"
            )
        self._module = module

    @property
    def training(self) -> bool:
        """Whether the module is in training mode."""
        return self._module.training

    def set_training_mode(self, mode: bool) -> None:
        """Switch batch normalisation and dropout to training, or to evaluation."""
        self._module.train(mode)

    def __call__(self, obs: PyTorchObs) -> th.Tensor:
        """Action values, ``(B, A)``."""
        values: th.Tensor = self._module(obs)
        return values

    def outputs(self, obs: PyTorchObs) -> th.Tensor:
        """What the head reads, ``(B, A, 1)``."""
        return full_precision(self(obs)).unsqueeze(2)

    def target_outputs(self, obs: PyTorchObs) -> th.Tensor:
        """What the head reads in order to make a target, ``(B, A, 1)``."""
        return self.outputs(obs)

    def q_values_from(self, obs: PyTorchObs, target_outputs: th.Tensor) -> th.Tensor:
        """Action values, ``(B, A)``, given the outputs of the same observations."""
        return target_outputs.squeeze(2)

    def evaluate(self, obs: PyTorchObs) -> th.Tensor:
        """Action values, ``(B, A)``, in evaluation mode."""
        return evaluated(self, obs)

    @property
    def noisy_layers(self) -> list[NoisyLinear]:
        """All layers that explore by noise."""
        return [module for module in self._module.modules() if isinstance(module, NoisyLinear)]

    def noise(self) -> AbstractContextManager[None]:
        """A context in which noisy layers have fresh noise."""
        return noise(self.noisy_layers)

    def _predict(self, observation: PyTorchObs, deterministic: bool = True) -> th.Tensor:
        return self(observation).argmax(dim=1).reshape(-1)


def as_q_network(module: "QNetwork", head: ValueHead) -> "QNetwork | ForwardNetwork":
    """Give a module that stands in the place of a :class:`QNetwork` the interface of one.

    :param module: a :class:`QNetwork`, a proxy of one, or another module that computes action values
    :param head: says what its outputs mean
    """
    if isinstance(module, QNetwork) or hasattr(module, "outputs"):
        return module
    return ForwardNetwork(module, head)


def evaluated(network: "QNetwork | ForwardNetwork", obs: PyTorchObs) -> th.Tensor:
    """Compute action values, ``(B, A)``, in evaluation mode, and return to the mode of before."""
    training = network.training
    network.set_training_mode(False)
    try:
        values: th.Tensor = network(obs)
    finally:
        network.set_training_mode(training)
    return values


def network_class(head: ValueHead) -> type[QNetwork]:
    """The network that a head reads."""
    return ImplicitQNetwork if isinstance(head, ImplicitQuantileHead) else QNetwork
