"""Converts SB3's DQN to ScratchDQN, and back.

Both classes have the same attributes and parameter names. A conversion copies the attributes, sets up the other class,
then copies parameters, optimiser state and replay buffer. Attributes that only one class has keep their defaults, with
a warning where that changes training.
"""

import pathlib
import warnings
from collections.abc import Iterable
from copy import deepcopy
from inspect import signature
from typing import TYPE_CHECKING, Any, TypeVar

import torch as th
from stable_baselines3.common.base_class import maybe_make_env
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.type_aliases import GymEnv

from sb3_scratch_dqn.algorithm.base import DQNBase
from sb3_scratch_dqn.algorithm.settings import PARSERS, enabled_extras
from sb3_scratch_dqn.common.check_spaces import check_environment
from sb3_scratch_dqn.common.check_training import check_device
from sb3_scratch_dqn.common.files import policy_module, read_model_settings
from sb3_scratch_dqn.common.wrappers import strip_wrapper_prefixes
from sb3_scratch_dqn.networks.policies import NETWORK_SETTINGS, DQNPolicy
from sb3_scratch_dqn.replay import ScratchReplayBuffer
from sb3_scratch_dqn.replay.samplers import SAMPLER_SETTINGS
from sb3_scratch_dqn.replay.sb3_buffers import SB3_BUFFERS, copy_other_buffer, from_sb3_buffer, to_sb3_buffer
from sb3_scratch_dqn.values.heads import ExpectedHead

if TYPE_CHECKING:
    from stable_baselines3.dqn import DQN

Algorithm = TypeVar("Algorithm", bound=OffPolicyAlgorithm)
Scratch = TypeVar("Scratch", bound=DQNBase)

# Attributes that are converted one by one, or built again
_NOT_COPIED = {
    "policy",
    "policy_class",
    "policy_kwargs",
    "exploration_schedule",  # a setting here, a function derived from settings in SB3
    "replay_buffer",
    "replay_buffer_class",
    "replay_buffer_kwargs",
}
# Attributes that __init__ does not create without an environment, or that learn() creates
_CREATED_LATER = {"observation_space", "action_space", "n_envs", "_logger"}
# The caller's objects, which are shared and not copied
_SHARED = {"env", "_vec_normalize_env", "_logger", "device", "learning_rate"}

# Arguments that from_sb3() takes from the model and its replay buffer, and that its caller cannot set
_NOT_SETTABLE = {
    "policy",
    "policy_kwargs",
    "env",
    "device",
    "buffer_size",
    "replay_buffer_class",
    "replay_buffer_kwargs",
    "optimize_memory_usage",
    "_init_setup_model",
}


def from_sb3(
    cls: type[Scratch],
    source: "DQN | str | pathlib.Path",
    env: GymEnv | None,
    device: th.device | str,
    settings: dict[str, Any],
) -> Scratch:
    """Implement :meth:`sb3_scratch_dqn.ScratchDQN.from_sb3`."""
    from stable_baselines3.dqn import DQN

    for name, value in settings.items():
        if name not in signature(cls).parameters.keys() - _NOT_SETTABLE:
            raise ValueError(f"{name}={value!r} is not a setting that from_sb3 can change")
    settings = {name: PARSERS[name](name, value) if name in PARSERS else value for name, value in settings.items()}
    check_device(device)
    if env is not None:
        check_environment(env)
        env = maybe_make_env(env, 0)
    model = source
    if isinstance(source, str | pathlib.Path):
        _check_saved_by_dqn(source)
        model = DQN.load(source, env=env, device=device)
    elif env is not None:
        raise ValueError(f"env={env!r} is only accepted if model is a file; for a model, call set_env() afterwards")
    if not isinstance(model, DQN):
        raise ValueError(f"model={model!r} must be a DQN of Stable-Baselines3, or the path of one")

    changed: dict[str, Any] = {
        "replay_buffer_class": None if model.replay_buffer_class in SB3_BUFFERS else model.replay_buffer_class,
        "replay_buffer_kwargs": dict(model.replay_buffer_kwargs),
        "_episodes_finished": model._episode_num,
        "_env_steps": model._n_calls * model.n_envs,
        "stats_window_size": model._stats_window_size,
    }
    if changed["replay_buffer_class"] is None:
        # SB3 adds these two for n_steps > 1; ScratchDQN reads its own `n_steps` and `gamma`
        changed["replay_buffer_kwargs"].pop("n_steps", None)
        changed["replay_buffer_kwargs"].pop("gamma", None)
    buffer = model.replay_buffer
    if buffer is not None and type(buffer) in SB3_BUFFERS and buffer.size() == 0:
        # _setup_model() builds a buffer that stores frames once if the environment stacks them
        changed["n_steps"] = settings.get("n_steps", getattr(buffer, "n_steps", 1))
    elif buffer is not None and type(buffer) in SB3_BUFFERS and getattr(buffer, "gamma", model.gamma) == model.gamma:
        changed["n_steps"] = settings.get("n_steps", getattr(buffer, "n_steps", 1))
        changed["replay_buffer"] = from_sb3_buffer(buffer, changed["n_steps"], model.gamma)
    elif buffer is not None:
        # The buffer's class is the user's, or it has another discount than the model, which ScratchReplayBuffer cannot
        # have
        changed["replay_buffer_class"] = model.replay_buffer_class
        changed["replay_buffer_kwargs"] = dict(model.replay_buffer_kwargs)
        changed["replay_buffer"] = copy_other_buffer(buffer)
    return _set_up(cls, _counterpart(model.policy_class, _policy_pairs()), model, {**changed, **settings})


def to_sb3(model: DQNBase) -> "DQN":
    """Implement :meth:`sb3_scratch_dqn.ScratchDQN.to_sb3`."""
    from stable_baselines3.dqn import DQN

    buffer = model.replay_buffer
    changed: dict[str, Any] = {
        "replay_buffer_class": model.replay_buffer_class,
        "replay_buffer_kwargs": dict(model.replay_buffer_kwargs),
    }
    if isinstance(buffer, ScratchReplayBuffer):
        if type(buffer) is not ScratchReplayBuffer:
            raise ValueError(f"replay_buffer_class={type(buffer).__name__} has no counterpart in SB3's DQN")
        changed["replay_buffer"] = to_sb3_buffer(buffer, model.gamma)
        changed["replay_buffer_class"] = type(changed["replay_buffer"])
        if buffer.n_steps > 1:
            changed["replay_buffer_kwargs"].update(n_steps=buffer.n_steps, gamma=model.gamma)
    elif buffer is not None:
        changed["replay_buffer"] = copy_other_buffer(buffer)
    _refuse_other_networks(model.policy)
    changed["policy_kwargs"] = {
        name: deepcopy(value) for name, value in model.policy_kwargs.items() if name not in NETWORK_SETTINGS
    }
    lost = enabled_extras(model)
    if isinstance(buffer, ScratchReplayBuffer):
        for name in (*SAMPLER_SETTINGS, "frames"):
            changed["replay_buffer_kwargs"].pop(name, None)
        if buffer.store.action_masks is not None:
            lost.append("action masks")
    if isinstance(model.target_update_interval, tuple):
        changed["target_update_interval"] = signature(DQN).parameters["target_update_interval"].default
    if lost:
        warnings.warn(
            f"SB3's DQN has no {', '.join(lost)}: the converted model predicts the same, but trains as SB3's DQN does",
            stacklevel=3,
        )
    pairs = {own: theirs for theirs, own in _policy_pairs().items()}
    with warnings.catch_warnings():
        # SB3 warns of n_steps with a replay_buffer_class, which here is the class that SB3 itself chooses
        warnings.filterwarnings("ignore", message="`n_steps=")
        return _set_up(DQN, _counterpart(model.policy_class, pairs), model, changed)


def _refuse_other_networks(policy: DQNPolicy) -> None:
    for name, is_plain in (
        ("head", isinstance(policy.head, ExpectedHead)),
        ("dueling", not policy.dueling),
        ("noisy", not policy.noisy),
    ):
        if not is_plain:
            value = policy.head_name if name == "head" else True
            raise ValueError(f"policy_kwargs={{{name!r}: {value!r}}} has no counterpart in SB3's DQN")


def _check_saved_by_dqn(path: str | pathlib.Path) -> None:
    policy = policy_module(read_model_settings(path))
    if policy != "stable_baselines3.dqn.policies":
        raise ValueError(
            f"path={path!r} must be a file saved by DQN of Stable-Baselines3 with one of its own policies, "
            f"but its policy is from {policy}"
        )


def _policy_pairs() -> dict[type[BasePolicy], type[BasePolicy]]:
    from stable_baselines3.dqn import policies as theirs

    from sb3_scratch_dqn.networks import policies as own

    return {
        theirs.DQNPolicy: own.DQNPolicy,
        theirs.CnnPolicy: own.CnnPolicy,
        theirs.MultiInputPolicy: own.MultiInputPolicy,
    }


def to_own_policy(policy: Any) -> Any:
    """Return this package's counterpart of a policy class of SB3's DQN; return anything else unchanged."""
    if getattr(policy, "__module__", None) != "stable_baselines3.dqn.policies":
        return policy
    return _policy_pairs().get(policy, policy)


def _counterpart(policy_class: type[BasePolicy], pairs: dict[type[BasePolicy], type[BasePolicy]]) -> type[BasePolicy]:
    if policy_class not in pairs:
        names: Iterable[str] = (known.__name__ for known in pairs)
        raise ValueError(f"policy={policy_class.__name__} cannot be converted: only {', '.join(names)} can")
    return pairs[policy_class]


def _set_up(
    cls: type[Algorithm], policy_class: type[BasePolicy], model: OffPolicyAlgorithm, changed: dict[str, Any]
) -> Algorithm:
    """Build an algorithm that continues from the state of ``model``, and restore every random state.

    :param cls: its class
    :param policy_class: the class of its policy
    :param model: the algorithm to copy
    :param changed: attributes that differ from those of ``model``
    """
    # SB3's base class declares neither _init_setup_model, which all of its algorithms take, nor env as optional
    converted = cls(policy=policy_class, env=model.env, device=model.device, _init_setup_model=False)  # type: ignore[call-arg, arg-type]
    for name in (vars(converted).keys() | _CREATED_LATER) - _NOT_COPIED:
        if name in vars(model):
            value = getattr(model, name)
            setattr(converted, name, value if name in _SHARED else deepcopy(value))
    vars(converted).update({"policy_kwargs": deepcopy(model.policy_kwargs), **changed})
    # _setup_model() would seed every random generator again
    seed, converted.seed = converted.seed, None
    with th.random.fork_rng(devices=[model.device] if model.device.type == "cuda" else []):
        converted._setup_model()
    converted.seed = seed
    if type(model.policy.optimizer) is not type(converted.policy.optimizer):
        raise ValueError(
            f"policy.optimizer={type(model.policy.optimizer).__name__} cannot be converted: policy_kwargs specify "
            f"{type(converted.policy.optimizer).__name__}; set optimizer_class there to the class of the optimizer"
        )
    parameters: dict[str, Any] = deepcopy(model.get_parameters())
    parameters["policy"] = strip_wrapper_prefixes(parameters["policy"], model.policy)
    converted.set_parameters(parameters, device=model.device)
    return converted
