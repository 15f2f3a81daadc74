"""Copies SB3's replay buffers into :class:`ScratchReplayBuffer`, and back."""

from copy import deepcopy
from typing import Any

import numpy as np
from gymnasium import spaces
from stable_baselines3.common.buffers import DictReplayBuffer, NStepReplayBuffer, ReplayBuffer

from sb3_scratch_dqn.replay.buffer import ScratchReplayBuffer
from sb3_scratch_dqn.replay.frames import StackedFrames
from sb3_scratch_dqn.replay.stores import Store

# The classes of SB3 that ScratchReplayBuffer replaces
SB3_BUFFERS = (ReplayBuffer, DictReplayBuffer, NStepReplayBuffer)


def from_sb3_buffer(buffer: ReplayBuffer, n_steps: int, gamma: float) -> ScratchReplayBuffer:
    """Copy one of ``SB3_BUFFERS`` into a :class:`ScratchReplayBuffer`.

    :param buffer: the buffer to copy
    :param n_steps: the n-step horizon of the copy
    :param gamma: discount of one step
    """
    converted = ScratchReplayBuffer(n_steps=n_steps, gamma=gamma, **_constructor_arguments(buffer))
    rows = buffer.buffer_size if buffer.full else buffer.pos
    if buffer.optimize_memory_usage:
        rows = min(rows + 1, buffer.buffer_size)  # the newest transition needs the row that follows
    converted.store.reserve(rows)
    _copy_rows(buffer, converted.store, rows)
    converted.pos, converted.full = buffer.pos, buffer.full
    return converted


def to_sb3_buffer(buffer: ScratchReplayBuffer, gamma: float) -> ReplayBuffer:
    """Copy a :class:`ScratchReplayBuffer` into the class of SB3 that fits it.

    :param buffer: the buffer to copy
    :param gamma: discount of one step
    :raises ValueError: for a combination of settings that SB3 does not have
    """
    nested = isinstance(buffer.observation_space, spaces.Dict)
    for name, value, is_default in (
        ("n_steps", buffer.n_steps, buffer.n_steps == 1),
        ("optimize_memory_usage", True, not buffer.optimize_memory_usage),
    ):
        if not is_default and (nested or (buffer.n_steps > 1 and buffer.optimize_memory_usage)):
            what = "Dict observations" if nested else "observations that are stored once"
            raise ValueError(f"{name}={value!r} with {what} has no counterpart in SB3's DQN")
    kwargs = _constructor_arguments(buffer)
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


def copy_other_buffer(buffer: ReplayBuffer) -> ReplayBuffer:
    """Copy a buffer of any other class. The copy shares the environment, if the buffer holds one."""
    copied = deepcopy(buffer)
    vars(copied).update({name: value for name, value in vars(buffer).items() if name == "env"})
    return copied


def _constructor_arguments(buffer: ReplayBuffer) -> dict[str, Any]:
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
    """Copy the first rows from a buffer of SB3 to a store, or from a store to a buffer of SB3."""
    obs_store = getattr(source, "obs_store", None)
    if isinstance(obs_store, StackedFrames):
        obs_store = obs_store.dense()  # once for observations and next observations
    for name in ("observations", "next_observations", *Store.COLUMNS):
        holder = source if obs_store is None or name in Store.COLUMNS else obs_store
        if name == "next_observations" and not (hasattr(holder, name) and hasattr(target, name)):
            continue  # both sides store each observation once
        source_array, target_array = getattr(holder, name), getattr(target, name)
        if isinstance(source_array, dict):
            for key, array in source_array.items():
                target_array[key][:rows] = array[:rows]
        else:
            target_array[:rows] = source_array[:rows]
