"""The policies: an online network, its target, and the optimiser of the online one."""

from contextlib import AbstractContextManager, nullcontext
from functools import partial
from inspect import Parameter, signature
from numbers import Integral
from typing import Any, ClassVar

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor, CombinedExtractor, FlattenExtractor, NatureCNN
from stable_baselines3.common.type_aliases import PyTorchObs, Schedule
from torch import nn

from sb3_scratch_dqn.common.checks import (
    brief,
    check_arguments,
    check_factory,
    check_flag,
    check_makes_module,
    check_net_arch,
    check_not_negative,
    check_observation,
)
from sb3_scratch_dqn.networks.noisy import NoisyLinear, noise
from sb3_scratch_dqn.networks.q_network import ActivationFactory, ForwardNetwork, QNetwork, as_q_network, network_class
from sb3_scratch_dqn.values.heads import ValueHead, make_head
from sb3_scratch_dqn.values.masks import Masks, check_masks, masked_argmax

# Arguments that SB3's policies do not have
NETWORK_SETTINGS = ("dueling", "noisy", "noisy_sigma", "head", "head_kwargs")


class DQNPolicy(BasePolicy):
    """Acts greedily on an online network, and holds the target network beside it.

    :param observation_space: what the policy sees
    :param action_space: what it chooses from
    :param lr_schedule: learning rate as a function of the remaining progress, 1 to 0
    :param net_arch: widths of the hidden layers; by default ``[64, 64]``, and none behind a ``NatureCNN``
    :param activation_fn: class of what follows every hidden layer, or a function that makes it
    :param features_extractor_class: turns observations into features; by default the policy's own
    :param features_extractor_kwargs: its arguments
    :param normalize_images: divide images by 255
    :param optimizer_class: updates the online network
    :param optimizer_kwargs: its arguments, all but the learning rate
    :param dueling: split the network into a value and an advantage stream
    :param noisy: layers behind the features that explore by noise; the noise is there in training and in predictions
        that are not deterministic, so epsilon can be 0
    :param noisy_sigma: how much noise there is to begin with
    :param head: what the network says of an action: ``"expected"``, ``"c51"``, ``"quantile"`` or ``"iqn"``
    :param head_kwargs: arguments of the head, listed in :mod:`sb3_scratch_dqn.values.heads`
    :raises ValueError: for arguments that cannot work
    """

    default_features_extractor_class: ClassVar[type[BaseFeaturesExtractor]] = FlattenExtractor

    q_net: QNetwork
    q_net_target: QNetwork
    action_space: spaces.Discrete

    def __init__(
        self,
        observation_space: spaces.Space[Any],
        action_space: spaces.Discrete,
        lr_schedule: Schedule,
        net_arch: list[int] | None = None,
        activation_fn: ActivationFactory = nn.ReLU,
        features_extractor_class: type[BaseFeaturesExtractor] | None = None,
        features_extractor_kwargs: dict[str, Any] | None = None,
        normalize_images: bool = True,
        optimizer_class: type[th.optim.Optimizer] = th.optim.Adam,
        optimizer_kwargs: dict[str, Any] | None = None,
        dueling: bool = False,
        noisy: bool = False,
        noisy_sigma: float = 0.5,
        head: str = "expected",
        head_kwargs: dict[str, Any] | None = None,
    ) -> None:
        if features_extractor_class is None:
            features_extractor_class = self.default_features_extractor_class
        check_flag("normalize_images", normalize_images)
        _check_made_of("features_extractor", features_extractor_class, features_extractor_kwargs, nn.Module)
        _check_made_of("optimizer", optimizer_class, optimizer_kwargs, th.optim.Optimizer)
        _check_extractor(features_extractor_class, observation_space)
        super().__init__(
            observation_space,
            action_space,
            features_extractor_class,
            features_extractor_kwargs,
            optimizer_class=optimizer_class,
            optimizer_kwargs=optimizer_kwargs,
            normalize_images=normalize_images,
        )
        if net_arch is None:
            net_arch = [] if features_extractor_class == NatureCNN else [64, 64]
        if isinstance(net_arch, np.ndarray):
            net_arch = net_arch.tolist()
        check_net_arch(net_arch)
        check_makes_module("activation_fn", activation_fn)
        check_flag("dueling", dueling)
        check_flag("noisy", noisy)
        check_not_negative("noisy_sigma", noisy_sigma)
        self.net_arch = net_arch
        self.activation_fn = activation_fn
        self.dueling = dueling
        self.noisy = noisy
        self.noisy_sigma = noisy_sigma
        self.head_name = head
        self.head_kwargs = head_kwargs
        self.head: ValueHead = make_head(head, head_kwargs)
        self.net_args: dict[str, Any] = {
            "observation_space": self.observation_space,
            "action_space": self.action_space,
            "net_arch": net_arch,
            "head": self.head,
            "activation_fn": activation_fn,
            "normalize_images": normalize_images,
            "dueling": dueling,
            "linear": partial(NoisyLinear, sigma=noisy_sigma) if noisy else nn.Linear,
        }
        self._build(lr_schedule)

    def _build(self, lr_schedule: Schedule) -> None:
        self.q_net = self.make_q_net()
        needed = network_class(self.head)
        if not isinstance(self.q_net, needed):
            raise ValueError(f"head={self.head_name!r} needs a {needed.__name__}, not a {type(self.q_net).__name__}")
        self.q_net_target = self.make_q_net()
        self.q_net_target.load_state_dict(self.q_net.state_dict())
        self.q_net_target.set_training_mode(False)
        self.optimizer = self._make_optimizer(lr_schedule(1))

    def _make_optimizer(self, learning_rate: float) -> th.optim.Optimizer:
        """Make the optimiser of the online network.

        :raises ValueError: if the class and its arguments make none, or one that cannot take steps here
        """
        name = getattr(self.optimizer_class, "__name__", repr(self.optimizer_class))
        made: Any = None
        try:
            made = self.optimizer_class(
                self.q_net.parameters(),
                lr=learning_rate,  # type: ignore[call-arg]  # every optimiser takes it, but not their base class
                **self.optimizer_kwargs,
            )
        except Exception as error:  # whatever a class of users does
            raise ValueError(
                f"optimizer_kwargs={brief(self.optimizer_kwargs)} cannot be used by optimizer_class={name}: {error}"
            ) from error
        if not hasattr(made, "param_groups") or not callable(getattr(made, "step", None)):
            raise ValueError(f"optimizer_class={name} must make a torch.optim.Optimizer, but made {brief(made)}")
        if any(one.default is Parameter.empty for one in signature(made.step).parameters.values()):
            raise ValueError(f"optimizer_class={name} computes the loss itself, by a closure, which DQN has none of")
        optimizer: th.optim.Optimizer = made
        return optimizer

    def make_features_extractor(self) -> BaseFeaturesExtractor:
        """Make a features extractor.

        :raises ValueError: if the class and its arguments make none
        """
        made: Any = None
        given = f"features_extractor_class={brief(self.features_extractor_class)}"
        try:
            made = super().make_features_extractor()
        except Exception as error:  # whatever a class of users does
            if isinstance(error, AssertionError) and str(error):  # SB3's sentences for what is no image
                raise
            raise ValueError(
                f"{given} cannot be made with features_extractor_kwargs={brief(self.features_extractor_kwargs)}: "
                f"{type(error).__name__}: {error}"
            ) from error
        if not isinstance(made, nn.Module) or not isinstance(getattr(made, "features_dim", None), Integral):
            raise ValueError(f"{given} must make a torch.nn.Module with features_dim, the number of features")
        return made  # type: ignore[return-value]  # a module of another class serves as well

    def make_q_net(self) -> QNetwork:
        """Make a network with a features extractor of its own."""
        return network_class(self.head)(**self._update_features_extractor(self.net_args)).to(self.device)

    def noise(self) -> AbstractContextManager[None]:
        """A context in which the noisy layers of both networks have fresh noise."""
        return noise([*self.online_network.noisy_layers, *self.target_network.noisy_layers])

    @property
    def online_network(self) -> QNetwork | ForwardNetwork:
        """``q_net``, with the methods of a :class:`QNetwork` also where users put another module in its place."""
        return as_q_network(self.q_net, self.head)

    @property
    def target_network(self) -> QNetwork | ForwardNetwork:
        """``q_net_target``, likewise."""
        return as_q_network(self.q_net_target, self.head)

    def forward(self, obs: PyTorchObs, deterministic: bool = True) -> th.Tensor:
        """Greedy actions, ``(B,)``."""
        return self._predict(obs, deterministic=deterministic)

    def _predict(self, observation: PyTorchObs, deterministic: bool = True) -> th.Tensor:
        network = self.online_network
        if deterministic:
            return network._predict(observation)
        with network.noise():
            return network._predict(observation)

    def predict(
        self,
        observation: np.ndarray | dict[str, np.ndarray],
        state: tuple[np.ndarray, ...] | None = None,
        episode_start: np.ndarray | None = None,
        deterministic: bool = False,
        action_masks: Masks | None = None,
    ) -> tuple[np.ndarray, tuple[np.ndarray, ...] | None]:
        """Choose greedy actions.

        :param observation: one observation, or ``B`` of them
        :param state: passed through; DQN has no memory
        :param episode_start: not used
        :param deterministic: without the noise of noisy layers
        :param action_masks: true where an action is allowed, ``(A,)`` or ``(B, A)``
        :return: an action for each observation, and ``state``
        :raises ValueError: if ``action_masks`` have another shape, or allow nothing
        """
        if action_masks is None:
            return super().predict(observation, state, episode_start, deterministic)
        self.set_training_mode(False)
        obs, vectorized = self.obs_to_tensor(observation)
        with th.no_grad(), nullcontext() if deterministic else self.online_network.noise():
            values = self.q_net(obs)
        masks = th.as_tensor(check_masks(action_masks, *values.shape), device=values.device)
        actions: np.ndarray = masked_argmax(values, masks).cpu().numpy()
        return (actions if vectorized else actions.squeeze(axis=0)), state

    def obs_to_tensor(self, observation: np.ndarray | dict[str, np.ndarray]) -> tuple[PyTorchObs, bool]:
        """Convert an observation, or ``B`` of them, to tensors.

        :return: ``(B, ...)``, and whether there were several
        :raises ValueError: for what is no observation of the space
        """
        check_observation(observation, self.observation_space)
        if not isinstance(observation, dict):
            observation = np.asarray(observation)
        return super().obs_to_tensor(observation)

    def q_values(self, observation: np.ndarray | dict[str, np.ndarray]) -> np.ndarray:
        """Action values of one observation or of ``B`` of them.

        :return: ``(B, A)``, with ``B = 1`` for one observation
        """
        self.set_training_mode(False)
        obs, _ = self.obs_to_tensor(observation)
        with th.no_grad():
            values: np.ndarray = self.q_net(obs).cpu().numpy()
        return values

    def set_training_mode(self, mode: bool) -> None:
        """Switch batch normalisation and dropout of the online network; the target network never trains.

        :param mode: true to train, false to evaluate
        """
        self.online_network.set_training_mode(mode)
        self.training = mode

    def _get_constructor_parameters(self) -> dict[str, Any]:
        return {
            **super()._get_constructor_parameters(),
            "net_arch": self.net_arch,
            "activation_fn": self.activation_fn,
            "lr_schedule": self._dummy_schedule,  # a policy that is loaded on its own does not train
            "optimizer_class": self.optimizer_class,
            "optimizer_kwargs": self.optimizer_kwargs,
            "features_extractor_class": self.features_extractor_class,
            "features_extractor_kwargs": self.features_extractor_kwargs,
            "dueling": self.dueling,
            "noisy": self.noisy,
            "noisy_sigma": self.noisy_sigma,
            "head": self.head_name,
            "head_kwargs": self.head_kwargs,
        }


# Arguments that the policy gives to what it is made of
_GIVEN = {"features_extractor": ("observation_space",), "optimizer": ("params", "lr")}


def _check_made_of(part: str, factory: Any, kwargs: Any, base: type) -> None:
    """Refuse a class, or its arguments, that a part of the policy cannot be made of."""
    check_factory(f"{part}_class", factory, base)
    if kwargs is not None:
        check_arguments(f"{part}_kwargs", kwargs, factory, refused=_GIVEN[part])


def _check_extractor(extractor: Any, space: spaces.Space[Any]) -> None:
    """Refuse SB3's extractors for observations that they cannot read."""
    is_dict = isinstance(space, spaces.Dict)
    if is_dict and extractor in (FlattenExtractor, NatureCNN):
        raise ValueError(
            f"observations of {space} need policy='MultiInputPolicy': {extractor.__name__} reads one array"
        )
    if not is_dict and extractor is CombinedExtractor:
        raise ValueError(
            f"policy='MultiInputPolicy' is for observations of a Dict space, but env has {space}: "
            "use 'MlpPolicy', or 'CnnPolicy' for images"
        )


MlpPolicy = DQNPolicy


class CnnPolicy(DQNPolicy):
    """For images: the features come from a ``NatureCNN``; parameters as in :class:`DQNPolicy`."""

    default_features_extractor_class = NatureCNN


class MultiInputPolicy(DQNPolicy):
    """For ``Dict`` observations: the features of all keys side by side; parameters as in :class:`DQNPolicy`."""

    default_features_extractor_class = CombinedExtractor
