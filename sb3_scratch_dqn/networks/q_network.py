"""Q-networks: features, trunk, dueling streams and outputs ``(B, A, K)``."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, ClassVar, Protocol, cast

import torch as th
from gymnasium import spaces
from jaxtyping import Float, Int64
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.preprocessing import is_image_space, preprocess_obs
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from stable_baselines3.common.type_aliases import PyTorchObs
from torch import Tensor, nn

from sb3_scratch_dqn.networks.noisy import NoisyLinear, noise
from sb3_scratch_dqn.replay.batch import BatchedObs
from sb3_scratch_dqn.values.heads import ValueHead

# (number of inputs, number of outputs) -> linear layer
LinearFactory = Callable[[int, int], nn.Module]

# () -> activation, such as a class
ActivationFactory = Callable[[], nn.Module]

_HALF_PRECISION = (th.bfloat16, th.float16)


def hidden_layers(
    n_inputs: int, widths: list[int], activation_fn: ActivationFactory, linear: LinearFactory
) -> list[nn.Module]:
    """Create linear layers, each followed by an activation.

    :param n_inputs: number of inputs of the first layer
    :param widths: numbers of outputs of the layers
    :param activation_fn: creates an activation
    :param linear: creates a linear layer
    """
    layers: list[nn.Module] = []
    for width in widths:
        layers += [linear(n_inputs, width), activation_fn()]
        n_inputs = width
    return layers


def full_precision(outputs: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Convert 16-bit outputs, as in ``torch.autocast``, to 32 bits: heads sum and compare them."""
    return outputs.float() if outputs.dtype in _HALF_PRECISION else outputs


def preprocess(
    obs: PyTorchObs, space: spaces.Space[Any], normalize_images: bool, image_format: th.memory_format
) -> PyTorchObs:
    """Preprocess observations: the same bits as SB3's ``preprocess_obs``, in less time for images.

    :param obs: ``B`` observations
    :param space: their space
    :param normalize_images: divide images by 255
    :param image_format: memory format of the preprocessed images
    """
    if isinstance(obs, dict) and isinstance(space, spaces.Dict):
        parts = {key: preprocess(part, space[key], normalize_images, image_format) for key, part in obs.items()}
        return cast("dict[str, Tensor]", parts)  # Dict spaces are not nested
    if isinstance(obs, Tensor) and obs.dtype == th.uint8 and normalize_images and is_image_space(space):
        # In place: allocating a second batch of float images would take many times as long as the division
        return th.empty_like(obs, dtype=th.float32, memory_format=image_format).copy_(obs).div_(255.0)
    preprocessed: PyTorchObs = preprocess_obs(obs, space, normalize_images=normalize_images)
    return preprocessed


class DuelingStreams(nn.Module):
    r"""A value stream and an advantage stream (Wang et al. 2016, https://arxiv.org/abs/1511.06581).

    :math:`Q(s, a) = V(s) + A(s, a) - \frac{1}{|A|} \sum_{a'} A(s, a')`, for each of the ``K`` outputs of an action.

    :param n_inputs: number of inputs of both streams
    :param widths: widths of the hidden layers of each stream
    :param n_actions: ``A``
    :param n_outputs: ``K``
    :param activation_fn: creates the activation of a hidden layer
    :param linear: creates a linear layer
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

    def forward(self, x: Tensor) -> Tensor:  # torch.jit.script knows no other annotations
        """Return the outputs of all actions, concatenated: ``(B, n_inputs)`` to ``(B, A * K)``."""
        advantage = self.advantage(x).view(-1, *self.shape)
        value = self.value(x).unsqueeze(1)
        outputs: Tensor = (value + advantage - advantage.mean(dim=1, keepdim=True)).flatten(1)
        return outputs


class QNetwork(BasePolicy):
    """A network that computes the outputs of all actions.

    Without extras, its parameters have the names and shapes of SB3's DQN, so that the two can exchange a
    ``state_dict``. A subclass that computes something else overrides :meth:`outputs`, which acting and training both
    call.

    :param observation_space: space of the observations
    :param action_space: space of the actions
    :param features_extractor: observations -> features
    :param features_dim: number of features
    :param net_arch: widths of the hidden layers
    :param head: defines the number of outputs per action, and interprets them
    :param activation_fn: creates the activation of a hidden layer
    :param normalize_images: divide images by 255
    :param dueling: split into a value and an advantage stream, each with its own last hidden layer
    :param linear: creates the linear layers that follow the features extractor
    """

    action_space: spaces.Discrete
    core_method: ClassVar = "outputs"  # the method that all others call
    image_format: th.memory_format = th.contiguous_format  # of preprocessed images; an engine may set a faster one

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
        self._noisy_layers: list[NoisyLinear] | None = None  # found later: a subclass may still add layers

    def _make_layers(self) -> list[nn.Module]:
        n_actions, n_outputs, widths = self.n_actions, self.head.n_outputs, list(self.net_arch)
        shared, stream = (widths[:-1], widths[-1:]) if self.dueling else (widths, [])
        layers = hidden_layers(self.features_dim, shared, self.activation_fn, self.linear)
        width = [self.features_dim, *shared][-1]
        if self.dueling:
            return [*layers, DuelingStreams(width, stream, n_actions, n_outputs, self.activation_fn, self.linear)]
        return [*layers, self.linear(width, n_actions * n_outputs)]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Raise TypeError if a subclass would act by one function and train another."""
        super().__init_subclass__(**kwargs)
        base = cls.core_method
        if not vars(cls).keys().isdisjoint({"forward", "outputs"} - {base}) and base not in vars(cls):
            raise TypeError(f"{cls.__name__} must override {base}(), which acting and training both call")

    def extract_features(
        self, obs: BatchedObs, features_extractor: BaseFeaturesExtractor
    ) -> Float[Tensor, "B features"]:
        """Compute features of observations."""
        features: Tensor = features_extractor(
            preprocess(obs, self.observation_space, self.normalize_images, self.image_format)
        )
        return features

    def outputs(self, obs: BatchedObs) -> Float[Tensor, "B A K"]:
        """Return the outputs that the head interprets."""
        flat = full_precision(self.q_net(self.extract_features(obs, self.features_extractor)))
        return flat.view(-1, self.n_actions, self.head.n_outputs)

    def target_outputs(self, obs: BatchedObs) -> Float[Tensor, "B A K"]:
        """Return the outputs from which targets are computed."""
        return self.outputs(obs)

    def q_values_from(self, obs: BatchedObs, target_outputs: Float[Tensor, "B A K"]) -> Float[Tensor, "B A"]:
        """Return the action values of observations whose :meth:`target_outputs` are known."""
        return self.head.q_values(target_outputs)

    def forward(self, obs: BatchedObs) -> Float[Tensor, "B A"]:
        """Return action values."""
        return self.head.q_values(self.outputs(obs))

    def eval_q_values(self, obs: BatchedObs) -> Float[Tensor, "B A"]:
        """Return action values, computed in evaluation mode even during training."""
        return q_values_in_eval_mode(self, obs)

    @property
    def noisy_layers(self) -> list[NoisyLinear]:
        """All noisy layers of the network."""
        if self._noisy_layers is None:
            self._noisy_layers = [module for module in self.modules() if isinstance(module, NoisyLinear)]
        return self._noisy_layers

    def noise(self) -> AbstractContextManager[None]:
        """Return a context in which the noisy layers have fresh noise; outside of it they have none."""
        return noise(self.noisy_layers)

    def _predict(self, observation: BatchedObs, deterministic: bool = True) -> Int64[Tensor, "B"]:
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


class Evaluable(Protocol):
    """A network that can be switched between training and evaluation mode."""

    @property
    def training(self) -> bool:
        """Whether the network is in training mode."""

    def set_training_mode(self, mode: bool) -> None:
        """Switch batch normalisation and dropout to training or evaluation."""

    def __call__(self, obs: BatchedObs) -> Tensor:
        """Return action values."""


def q_values_in_eval_mode(network: Evaluable, obs: BatchedObs) -> Float[Tensor, "B A"]:
    """Compute action values in evaluation mode, and restore the previous mode."""
    training = network.training
    network.set_training_mode(False)
    try:
        values = network(obs)
    finally:
        network.set_training_mode(training)
    return values
