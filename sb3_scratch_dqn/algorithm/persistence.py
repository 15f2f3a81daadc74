"""SB3's off-policy algorithm, made to look at environments and files before it takes them.

SB3 loads what it is given and fails half-way, with some of it in place. Here nothing changes unless all of it fits.
"""

import io
import json
import pickle
import zipfile
from collections.abc import Iterable, Mapping
from copy import deepcopy
from inspect import signature
from typing import Any, ClassVar, TypeVar

import torch as th
from gymnasium import spaces
from stable_baselines3.common.base_class import maybe_make_env
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm
from stable_baselines3.common.save_util import data_to_json, load_from_zip_file
from stable_baselines3.common.type_aliases import GymEnv, TensorDict
from stable_baselines3.her.her_replay_buffer import HerReplayBuffer

from sb3_scratch_dqn.common.checks import brief, check_device, check_environment, check_flag, check_same_spaces
from sb3_scratch_dqn.common.files import (
    Path,
    check_saved_by,
    opened,
    read_model_settings,
    read_pickled_replay_buffer,
    read_spaces,
)
from sb3_scratch_dqn.common.wrappers import plain_names, wrapped_names
from sb3_scratch_dqn.replay import ScratchReplayBuffer
from sb3_scratch_dqn.replay.archive import is_replay_archive, read_replay_archive, write_replay_buffer

Self = TypeVar("Self", bound="CheckedOffPolicyAlgorithm")


class CheckedOffPolicyAlgorithm(OffPolicyAlgorithm):
    """The base of ``ScratchDQN``."""

    # What a saved model of this algorithm knows of itself, and models of other algorithms do not
    own_settings: ClassVar[Iterable[str]] = ()

    def set_env(self, env: GymEnv | str, force_reset: bool = True) -> None:
        """Go on in another environment, of the same spaces.

        :param env: the environment, or its name
        :param force_reset: reset it before training goes on
        :raises ValueError: if its spaces differ from the model's
        :raises AssertionError: if it is another number of environments
        """
        env = self._wrap_env(maybe_make_env(env, self.verbose), self.verbose)
        check_same_spaces("env", env, self.observation_space, self.action_space)
        super().set_env(env, force_reset)

    def set_parameters(
        self,
        load_path_or_dict: str | TensorDict,
        exact_match: bool = True,
        device: th.device | str = "auto",
    ) -> None:
        """Replace the parameters of the networks and the optimiser; if that fails, leave them as they were.

        :param load_path_or_dict: a saved model, or what ``get_parameters`` gave
        :param exact_match: refuse parameters that are not just those of this model
        :param device: where to load a saved model
        :raises FileNotFoundError: if there is no such file
        :raises ValueError: if objects are missing or unknown, or the file is no model
        :raises RuntimeError: if names or shapes of parameters differ
        """
        check_flag("exact_match", exact_match)
        check_device(device)
        before = deepcopy(self.get_parameters())
        given: Any = load_path_or_dict
        if not isinstance(load_path_or_dict, dict):
            read_model_settings(load_path_or_dict)
            _, given, _ = load_from_zip_file(load_path_or_dict, device=device, load_data=False)
        unknown = sorted(map(str, given.keys() - before.keys()))
        if unknown:
            raise ValueError(f"parameters of {', '.join(unknown)} were given, but must be of {', '.join(before)}")
        for name, state in given.items():
            needed_keys = {"state", "param_groups"} if name.endswith("optimizer") else set()
            if not isinstance(state, Mapping) or not needed_keys <= state.keys():
                raise ValueError(f"parameters of {name} must be a state_dict, but are {brief(state)}")
        missing = sorted(before.keys() - given.keys())
        if missing and exact_match:
            raise ValueError(f"parameters of {', '.join(missing)} are missing: pass exact_match=False to keep them")
        # load_state_dict() of optimisers adds to their defaults, so that these do not say what a group must have
        needed = [set(group) for group in self.policy.optimizer.param_groups]
        try:
            self._load_parameters(given, exact_match)
            _check_optimizer_state(self.policy.optimizer, needed)
        except Exception:
            self._load_parameters(before, exact_match=True)
            raise

    def _load_parameters(self, parameters: dict[str, Any], exact_match: bool) -> None:
        if "policy" in parameters:
            self.policy.load_state_dict(wrapped_names(parameters["policy"], self.policy), strict=exact_match)
        if "policy.optimizer" in parameters:
            self.policy.optimizer.load_state_dict(parameters["policy.optimizer"])

    def get_parameters(self) -> dict[str, dict[str, Any]]:
        """Return the parameters of the networks and the state of the optimiser, by the names of both.

        Names are those without wrappers such as ``torch.compile``.
        """
        parameters: dict[str, dict[str, Any]] = super().get_parameters()
        return {**parameters, "policy": plain_names(parameters["policy"], self.policy)}

    @classmethod
    def load(
        cls: type[Self],
        path: Path,
        env: GymEnv | str | None = None,
        device: th.device | str = "auto",
        custom_objects: dict[str, Any] | None = None,
        print_system_info: bool = False,
        force_reset: bool = True,
        **kwargs: Any,
    ) -> Self:
        """Load a saved model.

        :param path: the file, with or without its ``.zip``
        :param env: to go on in, or its name; not needed to predict
        :param device: where to compute
        :param custom_objects: replacements for saved settings
        :param print_system_info: print the versions that the model was saved with
        :param force_reset: reset the environment before training goes on
        :param kwargs: settings to change
        :raises FileNotFoundError: if there is no such file
        :raises ValueError: if the file is not a whole model of this algorithm, ``env`` has other spaces than it, or a
            setting is unknown
        """
        check_device(device)
        saved = read_model_settings(path)
        check_saved_by(cls.__name__, path, saved, cls.own_settings)
        if env is not None:
            check_environment(env)
            verbose = saved.get("verbose", 0)
            env = cls._wrap_env(maybe_make_env(env, verbose), verbose)
            check_same_spaces("env", env, *read_spaces(saved, custom_objects))
        unknown = sorted(kwargs.keys() - saved.keys() - signature(cls).parameters.keys())
        if unknown:
            raise ValueError(f"{unknown[0]}={kwargs[unknown[0]]!r} is no setting of {cls.__name__}")
        # What save(exclude=...) left out gets its default from __init__, but for these, which SB3 reads before
        missing = {name: value for name, value in _READ_FIRST.items() if name not in saved}
        source = _with_settings(path, missing) if missing else path
        try:
            return super().load(source, env, device, custom_objects, print_system_info, force_reset, **kwargs)
        except (pickle.UnpicklingError, KeyError) as error:
            reason = str(error).splitlines()[0]
            raise ValueError(f"path={path!r} is a damaged model file: {reason}") from error

    def save(self, path: Path, exclude: Iterable[str] | None = None, include: Iterable[str] | None = None) -> None:
        """Save the model: settings, counters, networks and optimiser, but not the replay buffer.

        :param path: the file; without a suffix it gets ``.zip``
        :param exclude: names of settings to leave out; they have their defaults when the model is loaded
        :param include: names of attributes that would be left out otherwise
        :raises ValueError: if these are no names
        """
        super().save(path, _names("exclude", exclude), _names("include", include))

    def save_replay_buffer(self, path: Path) -> None:
        """Save the replay buffer: a :class:`ScratchReplayBuffer` as plain arrays, one of another class as a pickle.

        :param path: the file; without a suffix it gets ``.npz``, or ``.pkl`` for a pickle
        :raises ValueError: if there is no buffer
        """
        if self.replay_buffer is None:
            raise ValueError("replay_buffer=None: there is no replay buffer to save")
        if type(self.replay_buffer) is ScratchReplayBuffer:
            write_replay_buffer(self.replay_buffer, path)
        else:
            super().save_replay_buffer(path)

    def load_replay_buffer(
        self, path: Path, truncate_last_traj: bool = True, *, allow_pickle: bool | None = None
    ) -> None:
        """Load a saved replay buffer, this package's or SB3's.

        :param path: the file, with or without its ``.npz`` or ``.pkl``
        :param truncate_last_traj: end the last episodes in the buffer where they were cut; false if the environments
            go on in the middle of them
        :param allow_pickle: also load pickles, as SB3 saves them. A pickle can run any code, so trust whom it comes
            from. By default only where ``replay_buffer_class`` is a class that saves nothing else
        :raises FileNotFoundError: if there is no such file
        :raises ValueError: if the file is no replay buffer, or one of other spaces or another number of environments;
            the model keeps the buffer that it had
        """
        check_flag("truncate_last_traj", truncate_last_traj)
        if allow_pickle is not None:
            check_flag("allow_pickle", allow_pickle)
        what = f"the replay buffer in path={path!r}"
        buffer_class = self.replay_buffer_class or ScratchReplayBuffer
        foreign = buffer_class is not ScratchReplayBuffer
        if allow_pickle is None:
            allow_pickle = foreign
        with opened(path, *((".pkl", ".npz") if foreign else (".npz", ".pkl"))) as file:
            buffer: ReplayBuffer
            if is_replay_archive(file):
                if foreign:
                    raise ValueError(f"{what} is no pickle of a {buffer_class.__name__}, as it must be")
                assert isinstance(self.action_space, spaces.Discrete)
                buffer = read_replay_archive(
                    file, what, self.observation_space, self.action_space, self.n_envs, self.device
                )
            elif allow_pickle:
                buffer = read_pickled_replay_buffer(file, what)
            elif file.read(1) == _FIRST_BYTE_OF_PICKLES:
                raise ValueError(
                    f"{what} is a pickle, which can run any code when it is loaded: "
                    "if you trust whom it comes from, pass allow_pickle=True"
                )
            else:
                raise ValueError(f"{what} is no replay buffer file, or was cut short")
        check_same_spaces(what, buffer, self.observation_space, self.action_space)
        if buffer.n_envs != self.n_envs:
            raise ValueError(f"{what} has n_envs={buffer.n_envs}, but must have n_envs={self.n_envs}, as the model")
        if isinstance(buffer, HerReplayBuffer):
            if self.env is None:
                raise ValueError(f"env=None: {what} needs the environment to compute rewards; call set_env() first")
            buffer.set_env(self.env)
            if truncate_last_traj:
                buffer.truncate_last_trajectory()
        buffer.device = self.device
        self.replay_buffer = buffer


def _names(name: str, value: Any) -> list[str] | None:
    if value is None:
        return None
    # A string would be one letter after the other
    names = None if isinstance(value, str) or not isinstance(value, Iterable) else list(value)
    if names is None or not all(isinstance(one, str) for one in names):
        raise ValueError(f"{name}={brief(value)} must be None or a list of names of attributes")
    return names


_FIRST_BYTE_OF_PICKLES = b"\x80"

# Settings that SB3's load() takes from the file, and their defaults
_READ_FIRST: dict[str, Any] = {"verbose": 0, "policy_kwargs": {}}


def _with_settings(path: Path, more: dict[str, Any]) -> io.BytesIO:
    """Copy a model file, which was looked at, with more settings in it."""
    copy = io.BytesIO()
    with opened(path, ".zip") as file, zipfile.ZipFile(file) as source, zipfile.ZipFile(copy, "w") as target:
        for name in source.namelist():
            content = source.read(name)
            if name == "data":
                content = json.dumps({**json.loads(content), **json.loads(data_to_json(more))}).encode()
            target.writestr(name, content)
    copy.seek(0)
    return copy


# What optimisers keep in the shape of a parameter, by the names that PyTorch's give it
_SHAPED_AS_PARAMETERS = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer", "square_avg", "grad_avg", "sum")


def _check_optimizer_state(optimizer: th.optim.Optimizer, needed: list[set[str]]) -> None:
    """Refuse the state of another optimiser, which PyTorch's ``load_state_dict`` takes and its ``step`` falls over.

    :param optimizer: with its new state
    :param needed: names that its groups of parameters had before
    """
    for group, names in zip(optimizer.param_groups, needed, strict=True):
        missing = sorted(names - group.keys())
        if missing:
            raise ValueError(
                f"policy.optimizer is a {type(optimizer).__name__}, but its new state has no {missing[0]!r}"
            )
    for parameter, state in optimizer.state.items():
        for name in _SHAPED_AS_PARAMETERS:
            if isinstance(state.get(name), th.Tensor) and state[name].shape != parameter.shape:
                raise ValueError(
                    f"policy.optimizer has a parameter of shape {tuple(parameter.shape)}, "
                    f"but {name!r} in its new state has {tuple(state[name].shape)}"
                )
