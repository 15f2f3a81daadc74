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

import torch as th
from gymnasium import spaces
from stable_baselines3.common.buffers import DictReplayBuffer, NStepReplayBuffer, ReplayBuffer
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.type_aliases import GymEnv

from sb3_scratch_dqn.checks import parse_frequency
from sb3_scratch_dqn.files import read_model_settings
from sb3_scratch_dqn.replay import ScratchReplayBuffer

if TYPE_CHECKING:
    from stable_baselines3.dqn import DQN

    from sb3_scratch_dqn.dqn import ScratchDQN

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
_PLAIN_BUFFERS = (ReplayBuffer, DictReplayBuffer, NStepReplayBuffer)


def from_sb3(
    cls: type[Scratch],
    source: "DQN | str | pathlib.Path",
    env: GymEnv | None,
    device: th.device | str,
    settings: dict[str, Any],
) -> Scratch:
    """Implement :meth:`sb3_scratch_dqn.ScratchDQN.from_sb3`."""
    from stable_baselines3.dqn import DQN

    model = source
    if isinstance(source, str | pathlib.Path):
        _check_saved_by_dqn(source)
        model = DQN.load(source, env=env, device=device)
    if not isinstance(model, DQN):
        raise ValueError(f"model={model!r} must be a DQN of Stable-Baselines3, or the path of one")
    changed: dict[str, Any] = {
        "replay_buffer_class": model.replay_buffer_class,
        "replay_buffer_kwargs": dict(model.replay_buffer_kwargs),
        "_episodes_finished": model._episode_num,
        "stats_window_size": model._stats_window_size,
    }
    if model.replay_buffer_class in _PLAIN_BUFFERS:
        changed["replay_buffer_class"] = None
        # SB3 adds these two where n_steps asks for them; ScratchDQN reads its own `n_steps` and `gamma`
        n_steps = changed["replay_buffer_kwargs"].pop("n_steps", 3)
        changed["replay_buffer_kwargs"].pop("gamma", None)
        if model.replay_buffer_class is NStepReplayBuffer:
            changed["n_steps"] = n_steps
    converted = _set_up(cls, _counterpart(model.policy_class, _policy_pairs()), model, {**changed, **settings})
    if model.replay_buffer is not None:
        if type(model.replay_buffer) in _PLAIN_BUFFERS:
            assert isinstance(converted.replay_buffer, ScratchReplayBuffer)
            _copy_into_scratch(model.replay_buffer, converted.replay_buffer)
        else:
            converted.replay_buffer = _copy_foreign_buffer(model.replay_buffer)
    return converted


def to_sb3(model: "ScratchDQN") -> "DQN":
    """Implement :meth:`sb3_scratch_dqn.ScratchDQN.to_sb3`."""
    from stable_baselines3.dqn import DQN

    own_buffer = isinstance(model.replay_buffer, ScratchReplayBuffer)
    if own_buffer and model.n_steps > 1 and isinstance(model.observation_space, spaces.Dict):
        raise ValueError(
            f"n_steps={model.n_steps} with Dict observations has no counterpart in SB3's DQN: only n_steps=1 has"
        )
    changed: dict[str, Any] = {
        "replay_buffer_class": None if own_buffer else model.replay_buffer_class,
        "replay_buffer_kwargs": dict(model.replay_buffer_kwargs),
    }
    lost = []
    if model.loss != "huber":
        lost.append(f"loss={model.loss!r}")
    if model.exploration_schedule != "linear":
        lost.append(f"exploration_schedule={model.exploration_schedule!r}")
    frequency, unit = parse_frequency("target_update_interval", model.target_update_interval)
    if unit == "step":
        changed["target_update_interval"] = frequency
    else:
        lost.append(f"target_update_interval={model.target_update_interval!r}")
        changed["target_update_interval"] = signature(DQN).parameters["target_update_interval"].default
    if lost:
        warnings.warn(
            f"SB3's DQN has no {', '.join(lost)}: the converted model predicts alike, but will learn in SB3's way",
            stacklevel=3,
        )
    pairs = {own: theirs for theirs, own in _policy_pairs().items()}
    converted = _set_up(DQN, _counterpart(model.policy_class, pairs), model, changed)
    if own_buffer:
        assert isinstance(model.replay_buffer, ScratchReplayBuffer)
        assert converted.replay_buffer is not None
        _copy_into_sb3(model.replay_buffer, converted.replay_buffer)
    elif model.replay_buffer is not None:
        converted.replay_buffer = _copy_foreign_buffer(model.replay_buffer)
    return converted


def _check_saved_by_dqn(path: str | pathlib.Path) -> None:
    policy = read_model_settings(path).get("policy_class", {}).get("__module__")
    if policy != "stable_baselines3.dqn.policies":
        raise ValueError(
            f"model={path!r} must be a file saved by DQN of Stable-Baselines3 with one of its own policies, "
            f"but its policy is from {policy}"
        )


def _policy_pairs() -> dict[type[BasePolicy], type[BasePolicy]]:
    from stable_baselines3.dqn import policies as theirs

    from sb3_scratch_dqn import policies as own

    return {
        theirs.DQNPolicy: own.DQNPolicy,
        theirs.CnnPolicy: own.CnnPolicy,
        theirs.MultiInputPolicy: own.MultiInputPolicy,
    }


def _counterpart(policy_class: type[BasePolicy], pairs: dict[type[BasePolicy], type[BasePolicy]]) -> type[BasePolicy]:
    if policy_class not in pairs:
        names: Iterable[str] = (known.__name__ for known in pairs)
        raise ValueError(f"policy={policy_class.__name__} cannot be converted: only {', '.join(names)} can")
    return pairs[policy_class]


def _set_up(
    cls: type[Algorithm], policy_class: type[BasePolicy], model: OffPolicyAlgorithm, changed: dict[str, Any]
) -> Algorithm:
    """Make an algorithm that goes on where ``model`` is, and leave every random state as it was."""
    converted = cls(policy=policy_class, env=model.env, device=model.device, _init_setup_model=False)  # type: ignore[call-arg, arg-type]
    for name in (vars(converted).keys() | _MADE_LATER) - _NOT_COPIED:
        if name in vars(model):
            value = getattr(model, name)
            setattr(converted, name, value if name in _SHARED else deepcopy(value))
    vars(converted).update(changed, policy_kwargs=deepcopy(model.policy_kwargs))
    # A seed would seed every generator again
    seed, converted.seed = converted.seed, None
    with th.random.fork_rng(devices=[model.device] if model.device.type == "cuda" else []):
        converted._setup_model()
    converted.seed = seed
    parameters: dict[str, Any] = deepcopy(model.get_parameters())
    converted.set_parameters(parameters, device=model.device)
    return converted


def _copy_into_scratch(source: ReplayBuffer, target: ScratchReplayBuffer) -> None:
    rows = source.buffer_size if source.full else source.pos
    if source.optimize_memory_usage:
        rows = min(rows + 1, source.buffer_size)
    store = target.store
    store.reserve(rows)
    _copy_rows(source, store, rows, [name for name in store.ARRAYS if hasattr(source, name)])
    target.pos, target.full = source.pos, source.full


def _copy_into_sb3(source: ScratchReplayBuffer, target: ReplayBuffer) -> None:
    store = source.store
    _copy_rows(store, target, store.rows, [name for name in store.ARRAYS if hasattr(target, name)])
    target.pos, target.full = source.pos, source.full


def _copy_rows(source: Any, target: Any, rows: int, names: Iterable[str]) -> None:
    for name in names:
        taken, given = getattr(source, name), getattr(target, name)
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
