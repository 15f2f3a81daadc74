"""Saving, loading, pickling, and changing the environment.

SB3 applies what it loads step by step, and an error leaves a model with a part of it. Here everything is checked first:
an error leaves the model unchanged.
"""

import base64
import io
import json
import pickle
import zipfile
from collections.abc import Iterable, Mapping
from copy import deepcopy
from inspect import signature
from typing import TYPE_CHECKING, Any, TypeVar

import torch as th
from gymnasium import spaces
from stable_baselines3.common.base_class import maybe_make_env
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.save_util import data_to_json, load_from_zip_file
from stable_baselines3.common.type_aliases import GymEnv, TensorDict
from stable_baselines3.her.her_replay_buffer import HerReplayBuffer

from sb3_scratch_dqn.algorithm.base import DQNBase
from sb3_scratch_dqn.algorithm.parameters import check_optimizer_state, check_parameters
from sb3_scratch_dqn.algorithm.replay_setup import adapt_replay_buffer, buffer_for_environment
from sb3_scratch_dqn.algorithm.state import NOT_SAVED, pickled_attributes
from sb3_scratch_dqn.common.check_spaces import check_environment, check_same_spaces
from sb3_scratch_dqn.common.check_training import check_device
from sb3_scratch_dqn.common.checks import check_bool, short_repr
from sb3_scratch_dqn.common.files import (
    Path,
    check_saved_by,
    open_for_reading,
    open_for_writing,
    read_model_settings,
    read_pickled_replay_buffer,
    read_spaces,
)
from sb3_scratch_dqn.common.wrappers import add_wrapper_prefixes, strip_wrapper_prefixes
from sb3_scratch_dqn.replay import ScratchReplayBuffer
from sb3_scratch_dqn.replay.archive import is_replay_archive, read_replay_archive, write_replay_buffer
from sb3_scratch_dqn.replay.prefill import read_transitions, store_transitions

if TYPE_CHECKING:
    from minari import MinariDataset

Self = TypeVar("Self", bound="PersistentAlgorithm")


class PersistentAlgorithm(DQNBase):
    """The part of ``ScratchDQN`` that reads and writes files, and takes environments."""

    def set_env(self, env: GymEnv | str, force_reset: bool = True) -> None:
        """Replace the environment by another one with the same spaces.

        :param env: the environment, or its name
        :param force_reset: reset it before training continues
        :raises ValueError: if its spaces differ from the model's, or it does not stack frames and ``frames=True``
        :raises AssertionError: if the number of environments differs
        """
        check_environment(env)
        env = self._wrap_env(maybe_make_env(env, self.verbose), self.verbose)
        check_same_spaces("env", env, self.observation_space, self.action_space)
        buffer = buffer_for_environment(self, env)
        super().set_env(env, force_reset)
        self.replay_buffer = buffer

    def set_parameters(
        self,
        load_path_or_dict: str | TensorDict,
        exact_match: bool = True,
        device: th.device | str = "auto",
    ) -> None:
        """Replace the parameters of the networks and the optimiser. An error leaves all of them unchanged.

        :param load_path_or_dict: a saved model, or the result of ``get_parameters()``
        :param exact_match: require parameters of all objects, with exactly the names of the model's; unknown objects
            are an error in any case
        :param device: the device to load a saved model to
        :raises FileNotFoundError: if the file does not exist
        :raises ValueError: if objects are missing or unknown, or the file is not a model
        :raises RuntimeError: if names or shapes of parameters differ
        """
        check_bool("exact_match", exact_match)
        check_device(device)
        before = deepcopy(self.get_parameters())
        given: Any = load_path_or_dict
        if not isinstance(load_path_or_dict, dict):
            read_model_settings(load_path_or_dict)
            _, given, _ = load_from_zip_file(load_path_or_dict, device=device, load_data=False)
        check_parameters(given, before, exact_match)
        # Not from optimizer.defaults, to which load_state_dict() adds
        required = [set(group) for group in self.policy.optimizer.param_groups]
        try:
            self._load_parameters(given, exact_match)
            check_optimizer_state(self.policy.optimizer, required)
        except Exception:
            self._load_parameters(before, exact_match=True)
            raise

    def _load_parameters(self, parameters: dict[str, Any], exact_match: bool) -> None:
        if "policy" in parameters:
            self.policy.load_state_dict(add_wrapper_prefixes(parameters["policy"], self.policy), strict=exact_match)
        if "policy.optimizer" in parameters:
            self.policy.optimizer.load_state_dict(parameters["policy.optimizer"])

    def get_parameters(self) -> dict[str, dict[str, Any]]:
        """Return the state_dicts of the policy and its optimiser, by name.

        Parameters have the names that they have without wrappers such as ``torch.compile``.
        """
        parameters: dict[str, dict[str, Any]] = super().get_parameters()
        return {**parameters, "policy": strip_wrapper_prefixes(parameters["policy"], self.policy)}

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
        :param env: the environment to continue in, or its name; not needed for predictions
        :param device: the device to compute on
        :param custom_objects: replacements for saved attributes, by name
        :param print_system_info: print the versions of the libraries that the model was saved with
        :param force_reset: reset the environment before training continues
        :param kwargs: settings to change
        :raises FileNotFoundError: if the file does not exist
        :raises ValueError: if the file is damaged or of another algorithm, the spaces of ``env`` differ from the
            model's, or a setting is unknown
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
            raise ValueError(f"{unknown[0]}={kwargs[unknown[0]]!r} is not a setting of {cls.__name__}")
        # Attributes that save(exclude=...) left out get their defaults from __init__, except those that SB3 reads
        # before
        missing = {name: value for name, value in _READ_FIRST.items() if name not in saved}
        source = _with_settings(path, missing) if missing else path
        try:
            replaced = custom_objects or {}
            custom_objects = {**_objects_of_moved_modules(saved, replaced), **replaced}
            return super().load(source, env, device, custom_objects, print_system_info, force_reset, **kwargs)
        except (pickle.UnpicklingError, KeyError) as error:
            reason = str(error).splitlines()[0]
            raise ValueError(f"path={path!r} is a damaged model file: {reason}") from error

    def save(self, path: Path, exclude: Iterable[str] | None = None, include: Iterable[str] | None = None) -> None:
        """Save settings, progress, networks and optimiser, but not the replay buffer.

        :param path: the file; ``.zip`` is added to a path without a suffix
        :param exclude: names of attributes to leave out; a loaded model has their defaults
        :param include: names of attributes to save that are left out by default
        :raises ValueError: if ``exclude`` or ``include`` is not a list of names, or ``path`` is not a path or a file
        :raises OSError: if the file cannot be written; an existing file stays intact
        """
        excluded, included = _names("exclude", exclude), _names("include", include)
        with open_for_writing(path, ".zip") as file:
            super().save(file, excluded, included)  # type: ignore[arg-type]  # an object with write() suffices

    def save_replay_buffer(self, path: Path) -> None:
        """Save the replay buffer: a :class:`ScratchReplayBuffer` as arrays, one of another class as a pickle.

        :param path: the file; ``.npz``, or ``.pkl`` for a pickle, is added to a path without a suffix
        :raises ValueError: if the model has no buffer
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
        """Load a saved replay buffer of this package or of SB3.

        The model's settings, not the file, determine how n-step returns are computed and transitions are sampled.
        Observations stay stored as they were saved, each frame once or in full.

        :param path: the file, with or without its ``.npz`` or ``.pkl``
        :param truncate_last_traj: end the trajectories that the file cuts off; pass False if the environments continue
            in the middle of them
        :param allow_pickle: also load pickles, SB3's format. Loading a pickle can run any code, so trust its source.
            The default allows it only if ``replay_buffer_class`` is a class that is always saved as a pickle
        :raises FileNotFoundError: if the file does not exist
        :raises ValueError: if the file is not a replay buffer, or one with other spaces or another number of
            environments; the model keeps its buffer
        """
        check_bool("truncate_last_traj", truncate_last_traj)
        if allow_pickle is not None:
            check_bool("allow_pickle", allow_pickle)
        label = f"the replay buffer in path={path!r}"
        buffer_class = self.replay_buffer_class or ScratchReplayBuffer
        foreign = buffer_class is not ScratchReplayBuffer
        if allow_pickle is None:
            allow_pickle = foreign
        with open_for_reading(path, *((".pkl", ".npz") if foreign else (".npz", ".pkl"))) as file:
            buffer: ReplayBuffer
            if is_replay_archive(file):
                if foreign:
                    raise ValueError(f"{label} must be a pickle of a {buffer_class.__name__}")
                assert isinstance(self.action_space, spaces.Discrete)
                buffer = read_replay_archive(
                    file, label, self.observation_space, self.action_space, self.n_envs, self.device
                )
            elif allow_pickle:
                buffer = read_pickled_replay_buffer(file, label)
            elif file.read(1) == _FIRST_BYTE_OF_PICKLES:
                raise ValueError(
                    f"{label} is a pickle, which can run any code when it is loaded: "
                    "if you trust whom it comes from, pass allow_pickle=True"
                )
            else:
                raise ValueError(f"{label} is not a replay buffer file, or is truncated")
        check_same_spaces(label, buffer, self.observation_space, self.action_space)
        if buffer.n_envs != self.n_envs:
            raise ValueError(f"{label} has n_envs={buffer.n_envs}, but must have n_envs={self.n_envs}, as the model")
        if isinstance(buffer, HerReplayBuffer):
            if self.env is None:
                raise ValueError(f"env=None: {label} needs the environment to compute rewards; call set_env() first")
            buffer.set_env(self.env)
            if truncate_last_traj:
                buffer.truncate_last_trajectory()
        buffer.device = self.device
        self.replay_buffer = adapt_replay_buffer(buffer, self)
        if truncate_last_traj:
            self._end_trajectories()

    def load_transitions(self, data: "Mapping[str, Any] | ReplayBuffer | MinariDataset | str") -> int:
        """Add transitions from another source, such as demonstrations, to the replay buffer.

        They must not be normalised. A transition that the next one does not continue counts as truncated. The
        environments are reset when training continues.

        :param data: one of

            - a dict of arrays of ``N`` transitions in order: ``observations``, ``actions``, ``rewards``,
              ``next_observations``, ``terminations``, and optionally ``truncations``, ``action_masks`` and
              ``next_action_masks``, ``(N, A)`` each
            - a replay buffer of SB3 or of this package
            - a Minari data set, or the name of one on this machine (``pip install 'sb3-scratch-dqn[minari]'``)
        :return: the number of stored transitions; with several environments, up to ``n_envs - 1`` are left out
        :raises ValueError: if the data does not match the spaces or exceeds the buffer; nothing is stored then
        :raises ImportError: for the name of a data set, if Minari is not installed
        """
        assert self.replay_buffer is not None
        assert isinstance(self.action_space, spaces.Discrete)
        transitions = read_transitions(data, self.observation_space, int(self.action_space.n))
        stored = store_transitions(self.replay_buffer, transitions)
        self._last_obs = None
        return stored

    def __getstate__(self) -> dict[str, Any]:
        """Return what a pickle or a copy of the model holds."""
        return pickled_attributes(vars(self))

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore a pickle or a copy, and build what it leaves out."""
        vars(self).update(state)
        if "policy" in state:
            self._make_derived()

    def _excluded_save_params(self) -> list[str]:
        return [*super()._excluded_save_params(), *NOT_SAVED]

    def _get_torch_save_params(self) -> tuple[list[str], list[str]]:
        return ["policy", "policy.optimizer"], []


def _names(name: str, value: Any) -> list[str] | None:
    if value is None:
        return None
    # A string is an Iterable of its letters
    names = None if isinstance(value, str) or not isinstance(value, Iterable) else list(value)
    if names is None or not all(isinstance(one, str) for one in names):
        raise ValueError(f"{name}={short_repr(value)} must be None or a list of names of attributes")
    return names


_FIRST_BYTE_OF_PICKLES = b"\x80"

# Modules by the names in older files, and where their classes are now
_MOVED_MODULES = {
    "sb3_scratch_dqn.policies": "sb3_scratch_dqn.networks.policies",
    "sb3_scratch_dqn.noisy": "sb3_scratch_dqn.networks.noisy",
    "sb3_scratch_dqn.heads": "sb3_scratch_dqn.values.heads",
    "sb3_scratch_dqn.masks": "sb3_scratch_dqn.values.masks",
    "sb3_scratch_dqn.td": "sb3_scratch_dqn.values.td",
    "sb3_scratch_dqn.dqn": "sb3_scratch_dqn.algorithm.dqn",
    "sb3_scratch_dqn.exploration": "sb3_scratch_dqn.algorithm.exploration",
}


class _MovedModulesUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        return super().find_class(_MOVED_MODULES.get(module, module), name)


def _objects_of_moved_modules(saved: dict[str, Any], replaced: Mapping[str, Any]) -> dict[str, Any]:
    """Unpickle those attributes in a model file that refer to modules by their old names.

    :param saved: the attributes as JSON
    :param replaced: attributes to leave out, by name
    """
    objects = {}
    for name, value in saved.items():
        if isinstance(value, dict) and ":serialized:" in value and name not in replaced:
            pickled = base64.b64decode(value[":serialized:"])
            if any(module.encode() in pickled for module in _MOVED_MODULES):
                objects[name] = _MovedModulesUnpickler(io.BytesIO(pickled)).load()
    return objects


# Attributes that SB3's load() reads from the file before it calls __init__, with their defaults
_READ_FIRST: dict[str, Any] = {"verbose": 0, "policy_kwargs": {}}


def _with_settings(path: Path, more: dict[str, Any]) -> io.BytesIO:
    """Return a copy of a model file, already checked, with additional attributes."""
    copy = io.BytesIO()
    with open_for_reading(path, ".zip") as file, zipfile.ZipFile(file) as source, zipfile.ZipFile(copy, "w") as target:
        for name in source.namelist():
            content = source.read(name)
            if name == "data":
                content = json.dumps({**json.loads(content), **json.loads(data_to_json(more))}).encode()
            target.writestr(name, content)
    copy.seek(0)
    return copy
