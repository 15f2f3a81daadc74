"""Policies: an online network, its optimiser, and a target network."""

from contextlib import AbstractContextManager, nullcontext
from functools import partial
from inspect import Parameter, signature
from numbers import Integral
from typing import Any, ClassVar

import numpy as np
import torch as th
from gymnasium import spaces
from jaxtyping import Float, Int64
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor, CombinedExtractor, FlattenExtractor, NatureCNN
from stable_baselines3.common.type_aliases import PyTorchObs, Schedule
from torch import Tensor, nn

from sb3_scratch_dqn.common.check_spaces import check_observation
from sb3_scratch_dqn.common.checks import (
    check_bool,
    check_kwargs,
    check_module_factory,
    check_net_arch,
    check_non_negative,
    check_subclass_or_function,
    short_repr,
)
from sb3_scratch_dqn.networks.adapter import ForwardNetwork, as_q_network
from sb3_scratch_dqn.networks.implicit import network_class
from sb3_scratch_dqn.networks.noisy import NoisyLinear, noise
from sb3_scratch_dqn.networks.q_network import ActivationFactory, QNetwork
from sb3_scratch_dqn.replay.batch import BatchedObs
from sb3_scratch_dqn.values.heads import ValueHead, make_head
from sb3_scratch_dqn.values.masks import Masks, check_masks, masked_argmax

# Arguments that SB3's policies do not have
NETWORK_SETTINGS = ("dueling", "noisy", "noisy_sigma", "head", "head_kwargs")


class DQNPolicy(BasePolicy):
    """A greedy policy on an online network, with its optimiser and its target network.

    :param observation_space: space of the observations
    :param action_space: space of the actions
    :param lr_schedule: learning rate as a function of the remaining progress, 1 to 0
    :param net_arch: widths of the hidden layers; by default ``[64, 64]``, and none after a ``NatureCNN``
    :param activation_fn: class of the activation of every hidden layer, or a function that creates it
    :param features_extractor_class: computes features of observations; by default the policy's
        ``default_features_extractor_class``
    :param features_extractor_kwargs: arguments of the features extractor
    :param normalize_images: divide images by 255
    :param optimizer_class: optimiser of the online network
    :param optimizer_kwargs: arguments of the optimiser, without the learning rate
    :param dueling: split the network into a value and an advantage stream
    :param noisy: make the layers after the features noisy. The noise is active in training and in predictions that are
        not deterministic, so epsilon can be 0
    :param noisy_sigma: ``sigma_0`` of the paper: the initial standard deviation is ``noisy_sigma / sqrt(in_features)``
    :param head: interprets the outputs of an action: ``"expected"``, ``"c51"``, ``"quantile"`` or ``"iqn"``
    :param head_kwargs: arguments of the head, listed in :mod:`sb3_scratch_dqn.values.heads`
    :raises ValueError: for invalid arguments
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
        check_bool("normalize_images", normalize_images)
        _check_factory("features_extractor", features_extractor_class, features_extractor_kwargs, nn.Module)
        _check_factory("optimizer", optimizer_class, optimizer_kwargs, th.optim.Optimizer)
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
        check_module_factory("activation_fn", activation_fn)
        check_bool("dueling", dueling)
        check_bool("noisy", noisy)
        check_non_negative("noisy_sigma", noisy_sigma)
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
            made = type(self.q_net).__name__
            raise ValueError(f"head={self.head_name!r} needs the class {needed.__name__}, not {made}")
        self.q_net_target = self.make_q_net()
        self.q_net_target.load_state_dict(self.q_net.state_dict())
        self.q_net_target.set_training_mode(False)
        self.optimizer = self._make_optimizer(lr_schedule(1))

    def _make_optimizer(self, learning_rate: float) -> th.optim.Optimizer:
        """Create the optimiser of the online network.

        :raises ValueError: if the class and its arguments create none, or one that needs a closure
        """
        name = getattr(self.optimizer_class, "__name__", repr(self.optimizer_class))
        optimizer: Any = None
        try:
            optimizer = self.optimizer_class(
                self.q_net.parameters(),
                lr=learning_rate,  # type: ignore[call-arg]  # every optimiser accepts it, but their base class does not
                **self.optimizer_kwargs,
            )
        except Exception as error:  # a user's class may raise anything
            raise ValueError(
                f"optimizer_kwargs={short_repr(self.optimizer_kwargs)} cannot be used "
                f"by optimizer_class={name}: {error}"
            ) from error
        if not hasattr(optimizer, "param_groups") or not callable(getattr(optimizer, "step", None)):
            raise ValueError(
                f"optimizer_class={name} must make a torch.optim.Optimizer, but made {short_repr(optimizer)}"
            )
        if any(parameter.default is Parameter.empty for parameter in signature(optimizer.step).parameters.values()):
            raise ValueError(
                f"optimizer_class={name} needs a closure in step(), which DQN does not pass: "
                "use an optimizer such as Adam"
            )
        return optimizer  # type: ignore[no-any-return]  # a class with the same methods will do

    def make_features_extractor(self) -> BaseFeaturesExtractor:
        """Create a features extractor.

        :raises ValueError: if the class and its arguments create none
        """
        extractor: Any = None
        given = f"features_extractor_class={short_repr(self.features_extractor_class)}"
        try:
            extractor = super().make_features_extractor()
        except Exception as error:  # a user's class may raise anything
            if isinstance(error, AssertionError) and str(error):  # SB3's message for observations that are not images
                raise
            raise ValueError(
                f"{given} cannot be created with "
                f"features_extractor_kwargs={short_repr(self.features_extractor_kwargs)}: "
                f"{type(error).__name__}: {error}"
            ) from error
        if not isinstance(extractor, nn.Module) or not isinstance(getattr(extractor, "features_dim", None), Integral):
            raise ValueError(f"{given} must make a torch.nn.Module with features_dim, the number of features")
        return extractor  # type: ignore[return-value]  # any module with features_dim will do

    def make_q_net(self) -> QNetwork:
        """Create a network with its own features extractor."""
        return network_class(self.head)(**self._update_features_extractor(self.net_args)).to(self.device)

    def noise(self) -> AbstractContextManager[None]:
        """Return a context in which the noisy layers of both networks have fresh noise."""
        return noise([*self.online_network.noisy_layers, *self.target_network.noisy_layers])

    @property
    def online_network(self) -> QNetwork | ForwardNetwork:
        """``q_net``, in an adapter if it was replaced with a module that lacks the methods of a :class:`QNetwork`."""
        return as_q_network(self.q_net, self.head)

    @property
    def target_network(self) -> QNetwork | ForwardNetwork:
        """``q_net_target``, in an adapter under the same condition."""
        return as_q_network(self.q_net_target, self.head)

    def forward(self, obs: BatchedObs, deterministic: bool = True) -> Int64[Tensor, "B"]:
        """Return greedy actions."""
        return self._predict(obs, deterministic=deterministic)

    def _predict(self, observation: BatchedObs, deterministic: bool = True) -> Int64[Tensor, "B"]:
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

        :param observation: one observation, or ``B`` observations
        :param state: returned unchanged; DQN has no memory
        :param episode_start: not used
        :param deterministic: disable the noise of noisy layers
        :param action_masks: true where an action is allowed, ``(A,)`` or ``(B, A)``
        :return: an action for each observation, and ``state``
        :raises ValueError: if ``action_masks`` have another shape, or allow no action
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
        """Convert one observation, or ``B`` observations, to tensors.

        :return: the tensors, with a batch axis, and whether ``observation`` had it
        :raises ValueError: if ``observation`` does not belong to the space
        """
        check_observation(observation, self.observation_space)
        if not isinstance(observation, dict):
            observation = np.asarray(observation)
        return super().obs_to_tensor(observation)

    def q_values(self, observation: np.ndarray | dict[str, np.ndarray]) -> Float[np.ndarray, "B A"]:
        """Compute the action values of one observation, with ``B = 1``, or of ``B`` observations."""
        self.set_training_mode(False)
        obs, _ = self.obs_to_tensor(observation)
        with th.no_grad():
            values: np.ndarray = self.q_net(obs).cpu().numpy()
        return values

    def set_training_mode(self, mode: bool) -> None:
        """Switch batch normalisation and dropout of the online network; the target network stays in evaluation mode.

        :param mode: true for training, false for evaluation
        """
        self.online_network.set_training_mode(mode)
        self.training = mode

    def _get_constructor_parameters(self) -> dict[str, Any]:
        return {
            **super()._get_constructor_parameters(),
            "net_arch": self.net_arch,
            "activation_fn": self.activation_fn,
            "lr_schedule": self._dummy_schedule,  # a policy that is loaded without a model does not train
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


# Arguments of these parts that the policy sets
_SET_BY_POLICY = {"features_extractor": ("observation_space",), "optimizer": ("params", "lr")}


def _check_factory(part: str, factory: Any, kwargs: Any, base: type) -> None:
    """Raise ValueError unless a part of the policy can be created by a class, or a function, with these arguments."""
    check_subclass_or_function(f"{part}_class", factory, base)
    if kwargs is not None:
        check_kwargs(f"{part}_kwargs", kwargs, factory, excluded=_SET_BY_POLICY[part])


def _check_extractor(extractor: Any, space: spaces.Space[Any]) -> None:
    """Raise ValueError if one of SB3's extractors does not support the observations."""
    is_dict = isinstance(space, spaces.Dict)
    if is_dict and extractor in (FlattenExtractor, NatureCNN):
        raise ValueError(
            f"observations of {space} need policy='MultiInputPolicy': {extractor.__name__} supports only arrays"
        )
    if not is_dict and extractor is CombinedExtractor:
        raise ValueError(
            f"policy='MultiInputPolicy' is for observations of a Dict space, but env has {space}: "
            "use 'MlpPolicy', or 'CnnPolicy' for images"
        )


MlpPolicy = DQNPolicy


class CnnPolicy(DQNPolicy):
    """A policy for images, which computes features by a ``NatureCNN``.

    Parameters as in :class:`DQNPolicy`.
    """

    default_features_extractor_class = NatureCNN


class MultiInputPolicy(DQNPolicy):
    """A policy for ``Dict`` observations, which concatenates the features of all keys.

    Parameters as in :class:`DQNPolicy`.
    """

    default_features_extractor_class = CombinedExtractor
