"""SB3's DQN into ScratchDQN, and back.

Both sides describe themselves by the same attributes and the same parameter names, so a conversion sets up the other
class from the attributes, then copies parameters, optimiser state and replay. What only one side has is left at its
default, and said where that changes how training goes on.
"""

import pathlib
import warnings
from collections.abc import Iterable
from copy import deepcopy
from inspect import signature
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.base_class import maybe_make_env
from stable_baselines3.common.buffers import DictReplayBuffer, NStepReplayBuffer, ReplayBuffer
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.type_aliases import GymEnv

from sb3_scratch_dqn.algorithm.settings import READERS, enabled_extras
from sb3_scratch_dqn.common.checks import check_device, check_environment
from sb3_scratch_dqn.common.files import policy_module, read_model_settings
from sb3_scratch_dqn.common.wrappers import plain_names
from sb3_scratch_dqn.networks.policies import NETWORK_SETTINGS, DQNPolicy
from sb3_scratch_dqn.replay import ScratchReplayBuffer
from sb3_scratch_dqn.replay.frames import StackedFrames
from sb3_scratch_dqn.replay.samplers import SAMPLER_SETTINGS
from sb3_scratch_dqn.replay.stores import Store
from sb3_scratch_dqn.values.heads import ExpectedHead

if TYPE_CHECKING:
    from stable_baselines3.dqn import DQN

    from sb3_scratch_dqn.algorithm.dqn import ScratchDQN

Algorithm = TypeVar("Algorithm", bound=OffPolicyAlgorithm)
Scratch = TypeVar("Scratch", bound="ScratchDQN")

# Converted one by one, or made anew
_NOT_COPIED = {
    "policy",
    "policy_class",
    "policy_kwargs",
    "exploration_schedule",  # a setting here, what was made of the settings in SB3
    "replay_buffer",
    "replay_buffer_class",
    "replay_buffer_kwargs",
}
# Not made by __init__ without an environment, or before learn()
_MADE_LATER = {"observation_space", "action_space", "n_envs", "_logger"}
# Belong to the caller, who gets them back rather than copies
_SHARED = {"env", "_vec_normalize_env", "_logger", "device", "learning_rate"}

# The buffers that ScratchReplayBuffer stands for
PLAIN_BUFFERS = (ReplayBuffer, DictReplayBuffer, NStepReplayBuffer)

# What a conversion takes from the model and its replay, and so cannot be told
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
            raise ValueError(f"{name}={value!r} is no setting that from_sb3 can change")
    settings = {name: READERS[name](name, value) if name in READERS else value for name, value in settings.items()}
    check_device(device)
    if env is not None:
        check_environment(env)
        env = maybe_make_env(env, 0)
    model = source
    if isinstance(source, str | pathlib.Path):
        _check_saved_by_dqn(source)
        model = DQN.load(source, env=env, device=device)
    elif env is not None:
        raise ValueError(f"env={env!r} goes with a file; a model keeps its own, and set_env() changes it")
    if not isinstance(model, DQN):
        raise ValueError(f"model={model!r} must be a DQN of Stable-Baselines3, or the path of one")

    changed: dict[str, Any] = {
        "replay_buffer_class": None if model.replay_buffer_class in PLAIN_BUFFERS else model.replay_buffer_class,
        "replay_buffer_kwargs": dict(model.replay_buffer_kwargs),
        "_episodes_finished": model._episode_num,
        "_env_steps": model._n_calls * model.n_envs,
        "stats_window_size": model._stats_window_size,
    }
    if changed["replay_buffer_class"] is None:
        # SB3 adds these two where n_steps asks for them; ScratchDQN reads its own `n_steps` and `gamma`
        changed["replay_buffer_kwargs"].pop("n_steps", None)
        changed["replay_buffer_kwargs"].pop("gamma", None)
    buffer = model.replay_buffer
    if buffer is not None and type(buffer) in PLAIN_BUFFERS and buffer.size() == 0:
        # Made anew, so that it keeps frames once where the environment stacks them
        changed["n_steps"] = settings.get("n_steps", getattr(buffer, "n_steps", 1))
    elif buffer is not None and type(buffer) in PLAIN_BUFFERS and getattr(buffer, "gamma", model.gamma) == model.gamma:
        changed["n_steps"] = settings.get("n_steps", getattr(buffer, "n_steps", 1))
        changed["replay_buffer"] = to_scratch_buffer(buffer, changed["n_steps"], model.gamma)
    elif buffer is not None:
        # A class of the user's, or a discount of the buffer's own, which ScratchReplayBuffer does not keep
        changed["replay_buffer_class"] = model.replay_buffer_class
        changed["replay_buffer_kwargs"] = dict(model.replay_buffer_kwargs)
        changed["replay_buffer"] = _copy_foreign_buffer(buffer)
    return _set_up(cls, _counterpart(model.policy_class, _policy_pairs()), model, {**changed, **settings})


def to_sb3(model: "ScratchDQN") -> "DQN":
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
        changed["replay_buffer"] = _to_sb3_buffer(buffer, model.gamma)
        changed["replay_buffer_class"] = type(changed["replay_buffer"])
        if buffer.n_steps > 1:
            changed["replay_buffer_kwargs"].update(n_steps=buffer.n_steps, gamma=model.gamma)
    elif buffer is not None:
        changed["replay_buffer"] = _copy_foreign_buffer(buffer)
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
            f"SB3's DQN has no {', '.join(lost)}: the converted model predicts alike, but will learn in SB3's way",
            stacklevel=3,
        )
    pairs = {own: theirs for theirs, own in _policy_pairs().items()}
    with warnings.catch_warnings():
        # SB3 warns of n_steps with a buffer class, which is the one that it would have chosen
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


def own_policy(policy: Any) -> Any:
    """The counterpart of a policy class of SB3's DQN; whatever else is given, as it is."""
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
    """Make an algorithm that goes on where ``model`` is, and leave every random state as it was."""
    # SB3's base class does not declare the argument that all of its algorithms take, nor env as optional
    converted = cls(policy=policy_class, env=model.env, device=model.device, _init_setup_model=False)  # type: ignore[call-arg, arg-type]
    for name in (vars(converted).keys() | _MADE_LATER) - _NOT_COPIED:
        if name in vars(model):
            value = getattr(model, name)
            setattr(converted, name, value if name in _SHARED else deepcopy(value))
    vars(converted).update({"policy_kwargs": deepcopy(model.policy_kwargs), **changed})
    # A seed would seed every generator again
    seed, converted.seed = converted.seed, None
    with th.random.fork_rng(devices=[model.device] if model.device.type == "cuda" else []):
        converted._setup_model()
    converted.seed = seed
    if type(model.policy.optimizer) is not type(converted.policy.optimizer):
        raise ValueError(
            f"policy.optimizer={type(model.policy.optimizer).__name__} cannot be converted: policy_kwargs ask for "
            f"{type(converted.policy.optimizer).__name__}, so say there which optimizer_class the policy has"
        )
    parameters: dict[str, Any] = deepcopy(model.get_parameters())
    parameters["policy"] = plain_names(parameters["policy"], model.policy)
    converted.set_parameters(parameters, device=model.device)
    return converted


def to_scratch_buffer(buffer: ReplayBuffer, n_steps: int, gamma: float) -> ScratchReplayBuffer:
    """Copy a replay buffer of SB3, one of ``PLAIN_BUFFERS``, into one of this package.

    :param buffer: the buffer
    :param n_steps: how many steps the copy folds
    :param gamma: the discount of one step
    """
    converted = ScratchReplayBuffer(n_steps=n_steps, gamma=gamma, **_buffer_settings(buffer))
    rows = buffer.buffer_size if buffer.full else buffer.pos
    if buffer.optimize_memory_usage:
        rows = min(rows + 1, buffer.buffer_size)  # the newest transition needs the row that follows
    converted.store.reserve(rows)
    _copy_rows(buffer, converted.store, rows)
    converted.pos, converted.full = buffer.pos, buffer.full
    return converted


def _to_sb3_buffer(buffer: ScratchReplayBuffer, gamma: float) -> ReplayBuffer:
    nested = isinstance(buffer.observation_space, spaces.Dict)
    for name, value, plain in (
        ("n_steps", buffer.n_steps, buffer.n_steps == 1),
        ("optimize_memory_usage", True, not buffer.optimize_memory_usage),
    ):
        if not plain and (nested or (buffer.n_steps > 1 and buffer.optimize_memory_usage)):
            what = "Dict observations" if nested else "observations that are kept once"
            raise ValueError(f"{name}={value!r} with {what} has no counterpart in SB3's DQN")
    kwargs = _buffer_settings(buffer)
    if nested:
        converted: ReplayBuffer = DictReplayBuffer(**kwargs)
    elif buffer.n_steps > 1:
        converted = NStepReplayBuffer(n_steps=buffer.n_steps, gamma=gamma, **kwargs)
    else:
        converted = ReplayBuffer(**kwargs)
    _copy_rows(buffer.store, converted, buffer.store.rows)
    if buffer.n_steps > 1:
        rows = buffer.store.rows
        converted.timeouts[:rows] = np.maximum(converted.timeouts[:rows], buffer.store.cuts)
    converted.pos, converted.full = buffer.pos, buffer.full
    return converted


def _buffer_settings(buffer: ReplayBuffer) -> dict[str, Any]:
    return {
        "buffer_size": buffer.buffer_size * buffer.n_envs,
        "observation_space": buffer.observation_space,
        "action_space": buffer.action_space,
        "device": buffer.device,
        "n_envs": buffer.n_envs,
        "optimize_memory_usage": buffer.optimize_memory_usage,
        "handle_timeout_termination": buffer.handle_timeout_termination,
    }


def _copy_rows(source: Any, target: Any, rows: int) -> None:
    obs_store = getattr(source, "keeper", None)
    if isinstance(obs_store, StackedFrames):
        obs_store = obs_store.dense()  # once, for both
    for name in ("observations", "next_observations", *Store.COLUMNS):
        holder = source if obs_store is None or name in Store.COLUMNS else obs_store
        if name == "next_observations" and not (hasattr(holder, name) and hasattr(target, name)):
            continue  # observations are kept once, on both sides
        taken, given = getattr(holder, name), getattr(target, name)
        if isinstance(taken, dict):
            for key, array in taken.items():
                given[key][:rows] = array[:rows]
        else:
            given[:rows] = taken[:rows]


def _copy_foreign_buffer(buffer: ReplayBuffer) -> ReplayBuffer:
    """Copy a buffer whose class both sides use as it is; its environment, if it holds one, is shared."""
    copied = deepcopy(buffer)
    vars(copied).update({name: value for name, value in vars(buffer).items() if name == "env"})
    return copied
