"""Filling a replay buffer with given transitions: demonstrations, logs, the replay buffer of another agent.

Data of every form is converted to :class:`Transitions` first, and checked completely before any is stored.
"""

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt
from gymnasium import spaces
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.preprocessing import get_obs_shape
from stable_baselines3.common.vec_env import VecTransposeImage
from stable_baselines3.her.her_replay_buffer import HerReplayBuffer

from sb3_scratch_dqn.common.check_spaces import Space
from sb3_scratch_dqn.common.checks import as_numeric_array
from sb3_scratch_dqn.replay.buffer import ScratchReplayBuffer
from sb3_scratch_dqn.replay.frames import StackedFrames
from sb3_scratch_dqn.replay.observations import Array, Observation, map_observation

if TYPE_CHECKING:
    from minari import MinariDataset

_REQUIRED = ("observations", "actions", "rewards", "next_observations", "terminations")
_OPTIONAL = ("truncations", "action_masks", "next_action_masks")


class Transitions(NamedTuple):
    """``N`` transitions in the order in which they were collected.

    :param observations: ``(N, *observation_shape)``, or a dict of such arrays
    :param actions: integers, ``(N,)``
    :param rewards: ``(N,)``
    :param next_observations: shaped as ``observations``
    :param terminations: true where an episode ended in a terminal state, ``(N,)``
    :param truncations: true where an episode ended otherwise, ``(N,)``
    :param gaps: true where an episode did not end but the following transition does not continue it, ``(N,)``
    :param action_masks: true where an action was allowed, ``(N, A)``; ``None`` if there are no masks
    :param next_action_masks: the same for ``next_observations``
    """

    observations: Observation
    actions: Array
    rewards: Array
    next_observations: Observation
    terminations: Array
    truncations: Array
    gaps: Array
    action_masks: Array | None = None
    next_action_masks: Array | None = None


def read_transitions(
    data: "Mapping[str, Any] | ReplayBuffer | MinariDataset | str", observation_space: Space, n_actions: int
) -> Transitions:
    """Convert data to transitions and check them.

    :param data: a dict of arrays, a replay buffer, or a Minari data set or its name
    :param observation_space: space of the observations; images may have their channels last
    :param n_actions: number of actions, ``A``
    :raises ValueError: if an array is missing, or has the wrong shape, dtype or values
    :raises ImportError: for the name of a Minari data set, if Minari is not installed
    """
    if isinstance(data, str):
        data = _minari_dataset(data)
    if isinstance(data, ReplayBuffer):
        data = _columns_of_buffer(data)
    elif hasattr(data, "iterate_episodes"):
        data = _columns_of_episodes(data.iterate_episodes())
    elif not isinstance(data, Mapping):
        raise ValueError(
            f"data has type {type(data).__name__}, "
            "but must be a dict of arrays, a replay buffer, or a Minari data set or its name"
        )
    return _mark_gaps(_checked(data, observation_space, n_actions))


def store_transitions(buffer: ReplayBuffer, transitions: Transitions) -> int:
    """Store transitions in a replay buffer.

    They are split into one contiguous part for each environment. The remainder of the division, up to ``n_envs - 1``
    transitions, is not stored.

    :param buffer: the buffer
    :param transitions: the transitions
    :return: number of stored transitions
    :raises ValueError: if the buffer is too small or does not support them; then none was stored
    """
    if isinstance(buffer, HerReplayBuffer):
        raise ValueError("replay_buffer_class=HerReplayBuffer needs whole episodes, not single transitions")
    n_transitions, n_envs = len(transitions.actions), buffer.n_envs
    n_rows = n_transitions // n_envs
    # With optimize_memory_usage, the last next observation takes another row
    max_rows = buffer.buffer_size - buffer.optimize_memory_usage
    if not 1 <= n_rows <= max_rows:
        raise ValueError(
            f"data has {n_transitions} transitions, but must have {n_envs} to {max_rows * n_envs} "
            f"with buffer_size={buffer.buffer_size * n_envs}"
        )
    if buffer.optimize_memory_usage and transitions.gaps[:-1].any():
        raise ValueError(
            f"data has {transitions.gaps[:-1].sum()} transitions that the next one does not continue, but "
            "optimize_memory_usage=True reads next observations from the next transition: use False"
        )
    scratch_buffer = buffer if isinstance(buffer, ScratchReplayBuffer) else None
    if scratch_buffer is not None:
        scratch_buffer.end_trajectories()

    def select(observation: Observation) -> Observation:
        return map_observation(lambda array: array[indices], observation)

    indices: Array
    for row in range(n_rows):
        indices = np.arange(n_envs) * n_rows + row
        gaps, truncated = transitions.gaps[indices], transitions.truncations[indices]
        if scratch_buffer is None:
            # SB3's buffers have no gaps; a truncation is the closest equivalent
            truncated = truncated | gaps | ((row == n_rows - 1) & ~transitions.terminations[indices])
        infos: list[dict[str, Any]] = [{"TimeLimit.truncated": bool(value)} for value in truncated]
        if transitions.action_masks is not None and transitions.next_action_masks is not None:
            for info, index in zip(infos, indices, strict=True):
                info["action_masks"] = transitions.action_masks[index]
                info["next_action_masks"] = transitions.next_action_masks[index]
        position = buffer.pos
        buffer.add(
            select(transitions.observations),  # type: ignore[arg-type]  # some classes take dicts, too
            select(transitions.next_observations),  # type: ignore[arg-type]  # some classes take dicts, too
            transitions.actions[indices],
            transitions.rewards[indices],
            transitions.terminations[indices] | truncated,
            infos,
        )
        if scratch_buffer is not None:
            scratch_buffer.store.cut(position, gaps)
    if scratch_buffer is not None:
        scratch_buffer.end_trajectories()
    return n_rows * n_envs


def _minari_dataset(name: str) -> "MinariDataset":
    try:
        import minari
    except ImportError as error:
        raise ImportError(
            f"data={name!r} names a Minari data set, which needs Minari: pip install 'sb3-scratch-dqn[minari]'"
        ) from error
    return minari.load_dataset(name)


def _columns_of_episodes(episodes: Any) -> dict[str, Any]:
    """Return the columns of Minari's episodes, which have one more observation than actions."""
    nonempty = [episode for episode in episodes if len(episode.actions) > 0]
    if not nonempty:
        raise ValueError("data has no transitions")

    def concatenate(parts: list[Any]) -> Any:
        if isinstance(parts[0], Mapping):
            return {key: concatenate([part[key] for part in parts]) for key in parts[0]}
        return np.concatenate([np.asarray(part) for part in parts])

    def select(observations: Any, steps: slice) -> Any:
        if isinstance(observations, Mapping):
            return {key: select(part, steps) for key, part in observations.items()}
        return np.asarray(observations)[steps]

    return {
        "observations": concatenate([select(episode.observations, slice(None, -1)) for episode in nonempty]),
        "next_observations": concatenate([select(episode.observations, slice(1, None)) for episode in nonempty]),
        **{
            name: concatenate([getattr(episode, name) for episode in nonempty])
            for name in ("actions", "rewards", "terminations", "truncations")
        },
    }


def _columns_of_buffer(buffer: ReplayBuffer) -> dict[str, Any]:
    """Return the columns of a replay buffer, oldest first, the environments concatenated."""
    rows = np.arange(buffer.size())
    if buffer.full:
        rows = (rows + buffer.pos) % buffer.buffer_size
        # With optimize_memory_usage, the newest next observation overwrote the oldest observation
        rows = rows[1:] if buffer.optimize_memory_usage else rows

    def column(array: Array, rows: Array = rows) -> Array:
        selected = array[rows]
        concatenated: Array = selected.swapaxes(0, 1).reshape(-1, *selected.shape[2:])
        return concatenated

    obs_store = buffer.store.obs_store if isinstance(buffer, ScratchReplayBuffer) else buffer
    if isinstance(obs_store, StackedFrames):
        obs_store = obs_store.dense()  # once for observations and next observations
    observations: Observation = obs_store.observations
    if buffer.optimize_memory_usage:
        following = (rows + 1) % buffer.buffer_size
        next_observations = map_observation(lambda array: column(array, following), observations)
    else:
        next_observations = map_observation(column, obs_store.next_observations)
    dones, timeouts = column(buffer.dones).astype(bool), column(buffer.timeouts).astype(bool)
    columns = {
        "observations": map_observation(column, observations),
        "next_observations": next_observations,
        "actions": column(buffer.actions)[:, 0],
        "rewards": column(buffer.rewards),
        "terminations": dones & ~timeouts,
        "truncations": timeouts,
    }
    if isinstance(buffer, ScratchReplayBuffer) and buffer.store.action_masks is not None:
        columns.update({name: column(getattr(buffer.store, name)) for name in buffer.store.MASKS})
    return columns


def _checked(data: Mapping[str, Any], observation_space: Space, n_actions: int) -> Transitions:
    missing = [name for name in _REQUIRED if name not in data]
    unknown = [name for name in data if name not in (*_REQUIRED, *_OPTIONAL)]
    if missing or unknown:
        problem = f"no {missing[0]!r}" if missing else f"the unknown name {unknown[0]!r}"
        raise ValueError(
            f"data has {problem}: it must have {', '.join(_REQUIRED)}, and may have {', '.join(_OPTIONAL)}"
        )
    if ("action_masks" in data) != ("next_action_masks" in data):
        raise ValueError("data has only one of 'action_masks' and 'next_action_masks', but must have both or none")

    actions = _array("actions", data["actions"])
    if actions.ndim == 2 and actions.shape[1] == 1:
        actions = actions[:, 0]
    if actions.ndim != 1 or len(actions) == 0 or not np.issubdtype(actions.dtype, np.integer):
        raise ValueError(
            f"data['actions'] has shape {actions.shape} and dtype {actions.dtype}, "
            "but must have shape (N,), N at least 1, and an integer dtype"
        )
    if actions.min() < 0 or actions.max() >= n_actions:
        raise ValueError(f"data['actions'] has {actions.min()} to {actions.max()}, but must have 0 to {n_actions - 1}")
    n = len(actions)

    def of_shape(name: str, shape: tuple[int, ...], dtype: npt.DTypeLike) -> Array:
        array = _array(name, data[name], dtype)
        if array.shape != shape:
            raise ValueError(f"data[{name!r}] has shape {array.shape}, but must have {shape}, as there are {n} actions")
        return array

    def flags(name: str, shape: tuple[int, ...] = (n,)) -> Array:
        array = of_shape(name, shape, np.float64)
        if not ((array == 0) | (array == 1)).all():
            raise ValueError(f"data[{name!r}] must have only True and False, or 1 and 0")
        as_bool: Array = array == 1
        return as_bool

    def masks(name: str) -> Array:
        array = flags(name, (n, n_actions))
        if not array.any(axis=1).all():
            raise ValueError(f"data[{name!r}] must allow an action in each of its {n} rows")
        return array

    action_masks = masks("action_masks") if "action_masks" in data else None
    if action_masks is not None and not action_masks[np.arange(n), actions].all():
        row = int(np.flatnonzero(~action_masks[np.arange(n), actions])[0])
        raise ValueError(f"data['actions'] has {actions[row]} in row {row}, which data['action_masks'] does not allow")

    rewards = of_shape("rewards", (n,), np.float32)  # the dtype of the buffer
    if not np.isfinite(rewards).all():
        raise ValueError("data['rewards'] must be finite numbers of dtype float32")
    return Transitions(
        observations=_observations("observations", data["observations"], observation_space, n),
        actions=actions.astype(np.int64),
        rewards=rewards,
        next_observations=_observations("next_observations", data["next_observations"], observation_space, n),
        terminations=flags("terminations"),
        truncations=flags("truncations") if "truncations" in data else np.zeros(n, dtype=bool),
        gaps=np.zeros(n, dtype=bool),  # set by _mark_gaps()
        action_masks=action_masks,
        next_action_masks=masks("next_action_masks") if "next_action_masks" in data else None,
    )


def _array(name: str, given: Any, dtype: npt.DTypeLike | None = None) -> Array:
    numbers = as_numeric_array(f"data[{name!r}]", given)
    with np.errstate(over="ignore"):  # later checks find infinite values
        return np.asarray(numbers, dtype=dtype)


def _observations(name: str, given: Any, space: Space, n: int) -> Observation:
    if isinstance(space, spaces.Dict):
        if not isinstance(given, Mapping) or given.keys() != space.spaces.keys():
            raise ValueError(f"data[{name!r}] must be a dict of arrays with the keys {', '.join(space.spaces)}")
        parts: dict[str, Array] = {}
        for key, part in space.spaces.items():
            array = _observations(f"{name}/{key}", given[key], part, n)
            assert not isinstance(array, dict)
            parts[key] = array
        return parts
    array = _array(name, given)
    assert space.dtype is not None
    shape = (n, *get_obs_shape(space))
    if isinstance(space, spaces.Discrete) and array.shape == (n,):
        array = array[:, None]
    if array.shape != shape and array.ndim == 4 and (n, *array.shape[3:], *array.shape[1:3]) == shape:
        array = VecTransposeImage.transpose_image(array)  # as SB3 does for images with channels last
    if array.shape != shape or not np.can_cast(array.dtype, space.dtype, "same_kind"):
        raise ValueError(
            f"data[{name!r}] has shape {array.shape} and dtype {array.dtype}, "
            f"but must have shape {shape} and dtype {space.dtype}"
        )
    with np.errstate(over="ignore"):
        cast = array.astype(space.dtype, copy=False)
    if np.issubdtype(space.dtype, np.floating):
        # Bounds are not checked: those of environments are often too narrow
        if not np.isfinite(cast).all():
            raise ValueError(f"data[{name!r}] must be finite numbers of dtype {space.dtype}")
    elif not (cast == array).all() or not _contains(space, cast):
        raise ValueError(f"data[{name!r}] has {array.min()} to {array.max()}, but must be of {space}")
    return cast


def _contains(space: Space, array: Array) -> bool:
    """Return True if all integers of an array, ``(N, ...)``, are in a space."""
    if isinstance(space, spaces.Discrete):
        return bool(((array >= space.start) & (array < space.start + space.n)).all())
    if isinstance(space, spaces.MultiDiscrete):
        return bool(((array >= space.start) & (array < space.start + space.nvec)).all())
    if isinstance(space, spaces.MultiBinary):
        return bool(((array == 0) | (array == 1)).all())
    return True


def _mark_gaps(transitions: Transitions) -> Transitions:
    """Mark the transitions that the next one does not continue, so that no n-step return crosses a gap."""

    def parts(observation: Observation) -> list[Array]:
        return list(observation.values()) if isinstance(observation, dict) else [observation]

    gaps = np.zeros(len(transitions.actions), dtype=bool)
    for now, following in zip(parts(transitions.observations), parts(transitions.next_observations), strict=True):
        differs = following[:-1] != now[1:]
        gaps[:-1] |= differs.reshape(len(differs), math.prod(differs.shape[1:])).any(axis=1)
    gaps[-1] = True
    dones = transitions.terminations | transitions.truncations
    return transitions._replace(
        truncations=transitions.truncations & ~transitions.terminations,
        gaps=gaps & ~dones,
    )
