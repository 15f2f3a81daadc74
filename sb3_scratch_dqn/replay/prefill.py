"""Filling replay with transitions that somebody else collected: demonstrations, logs, another agent's replay.

Whatever the source, it becomes :class:`Transitions` first, all of which is checked before any is stored.
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

from sb3_scratch_dqn.common.checks import Space, read_numbers
from sb3_scratch_dqn.replay import ScratchReplayBuffer
from sb3_scratch_dqn.replay.frames import StackedFrames
from sb3_scratch_dqn.replay.observations import Array, Observation, map_observation

if TYPE_CHECKING:
    from minari import MinariDataset

_REQUIRED = ("observations", "actions", "rewards", "next_observations", "terminations")
_OPTIONAL = ("truncations", "action_masks", "next_action_masks")


class Transitions(NamedTuple):
    """``N`` transitions in the order in which they were collected.

    :param observations: ``(N, *observation_shape)``, or a dict of such arrays
    :param actions: ``(N,)``, whole numbers
    :param rewards: ``(N,)``
    :param next_observations: as ``observations``
    :param terminations: true where an episode ended in a terminal state, ``(N,)``
    :param truncations: true where it ended otherwise, ``(N,)``
    :param gaps: true where the transition that follows does not continue an episode that did not end, ``(N,)``
    :param action_masks: true where an action was allowed, ``(N, A)``; ``None`` if all always were
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
    """Make transitions of data, and check them.

    :param data: as ``ScratchDQN.load_transitions`` takes it
    :param observation_space: that the observations must be of; images may have their channels last
    :param n_actions: ``A``
    :raises ValueError: naming what is missing, or does not fit
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
            f"data is a {type(data).__name__}, "
            "but must be a dict of arrays, a replay buffer, or a Minari data set or its name"
        )
    return _mark_gaps(_checked(data, observation_space, n_actions))


def store_transitions(buffer: ReplayBuffer, transitions: Transitions) -> int:
    """Put transitions into a replay buffer.

    Each environment gets a piece of the transitions, in their order. What is left over when they are divided, up to
    ``n_envs - 1`` transitions, is left out.

    :param buffer: the buffer
    :param transitions: the transitions
    :return: how many were stored
    :raises ValueError: if the buffer has no room for them, or cannot hold what they are; then none was stored
    """
    if isinstance(buffer, HerReplayBuffer):
        raise ValueError("replay_buffer_class=HerReplayBuffer must have whole episodes, and takes no transitions")
    given, n_envs = len(transitions.actions), buffer.n_envs
    n_rows = given // n_envs
    # Where observations are kept once, what came next to the last one takes a row of its own
    most = buffer.buffer_size - buffer.optimize_memory_usage
    if not 1 <= n_rows <= most:
        raise ValueError(
            f"data has {given} transitions, but must have {n_envs} to {most * n_envs}, "
            f"which buffer_size={buffer.buffer_size * n_envs} has room for"
        )
    if buffer.optimize_memory_usage and transitions.gaps[:-1].any():
        raise ValueError(
            f"data has {transitions.gaps[:-1].sum()} transitions that the next one does not continue, "
            "but optimize_memory_usage=True takes what came next from there: use False"
        )
    own = buffer if isinstance(buffer, ScratchReplayBuffer) else None
    if own is not None:
        own.end_trajectories()

    def of_rows(observation: Observation) -> Observation:
        return map_observation(lambda array: array[at], observation)

    at: Array
    for row in range(n_rows):
        at = np.arange(n_envs) * n_rows + row
        gaps, truncated = transitions.gaps[at], transitions.truncations[at]
        if own is None:
            # SB3's buffers know no gaps; a time limit is as near as they come
            truncated = truncated | gaps | ((row == n_rows - 1) & ~transitions.terminations[at])
        infos: list[dict[str, Any]] = [{"TimeLimit.truncated": bool(value)} for value in truncated]
        if transitions.action_masks is not None and transitions.next_action_masks is not None:
            for info, index in zip(infos, at, strict=True):
                info["action_masks"] = transitions.action_masks[index]
                info["next_action_masks"] = transitions.next_action_masks[index]
        position = buffer.pos
        buffer.add(
            of_rows(transitions.observations),  # type: ignore[arg-type]  # dicts too, in some classes
            of_rows(transitions.next_observations),  # type: ignore[arg-type]  # likewise
            transitions.actions[at],
            transitions.rewards[at],
            transitions.terminations[at] | truncated,
            infos,
        )
        if own is not None:
            own.store.cut(position, gaps)
    if own is not None:
        own.end_trajectories()
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
    """The columns of Minari's episodes, whose observations are one more than their actions."""
    kept = [episode for episode in episodes if len(episode.actions) > 0]
    if not kept:
        raise ValueError("data has no transitions")

    def joined(parts: list[Any]) -> Any:
        if isinstance(parts[0], Mapping):
            return {key: joined([part[key] for part in parts]) for key in parts[0]}
        return np.concatenate([np.asarray(part) for part in parts])

    def cut(observations: Any, where: slice) -> Any:
        if isinstance(observations, Mapping):
            return {key: cut(part, where) for key, part in observations.items()}
        return np.asarray(observations)[where]

    return {
        "observations": joined([cut(episode.observations, slice(None, -1)) for episode in kept]),
        "next_observations": joined([cut(episode.observations, slice(1, None)) for episode in kept]),
        **{
            name: joined([getattr(episode, name) for episode in kept])
            for name in ("actions", "rewards", "terminations", "truncations")
        },
    }


def _columns_of_buffer(buffer: ReplayBuffer) -> dict[str, Any]:
    """The columns of a replay buffer, oldest first, one environment after another."""
    rows = np.arange(buffer.size())
    if buffer.full:
        rows = (rows + buffer.pos) % buffer.buffer_size
        # With observations that are kept once, the one that came first was overwritten by what came next to the last
        rows = rows[1:] if buffer.optimize_memory_usage else rows

    def column(array: Array, rows: Array = rows) -> Array:
        taken = array[rows]
        joined: Array = taken.swapaxes(0, 1).reshape(-1, *taken.shape[2:])
        return joined

    obs_store = buffer.store.obs_store if isinstance(buffer, ScratchReplayBuffer) else buffer
    if isinstance(obs_store, StackedFrames):
        obs_store = obs_store.dense()  # once, for both
    observations: Observation = obs_store.observations
    if buffer.optimize_memory_usage:
        following = (rows + 1) % buffer.buffer_size
        next_observations = map_observation(lambda array: column(array, following), observations)
    else:
        next_observations = map_observation(column, obs_store.next_observations)
    ends, timeouts = column(buffer.dones).astype(bool), column(buffer.timeouts).astype(bool)
    columns = {
        "observations": map_observation(column, observations),
        "next_observations": next_observations,
        "actions": column(buffer.actions)[:, 0],
        "rewards": column(buffer.rewards),
        "terminations": ends & ~timeouts,
        "truncations": timeouts,
    }
    if isinstance(buffer, ScratchReplayBuffer) and buffer.store.action_masks is not None:
        columns.update({name: column(getattr(buffer.store, name)) for name in buffer.store.MASKS})
    return columns


def _checked(data: Mapping[str, Any], observation_space: Space, n_actions: int) -> Transitions:
    missing = [name for name in _REQUIRED if name not in data]
    unknown = [name for name in data if name not in (*_REQUIRED, *_OPTIONAL)]
    if missing or unknown:
        wrong = f"no {missing[0]!r}" if missing else f"the unknown name {unknown[0]!r}"
        raise ValueError(f"data has {wrong}: it must have {', '.join(_REQUIRED)}, and may have {', '.join(_OPTIONAL)}")
    if ("action_masks" in data) != ("next_action_masks" in data):
        raise ValueError("data has only one of 'action_masks' and 'next_action_masks', but must have both or none")

    actions = _array("actions", data["actions"])
    if actions.ndim == 2 and actions.shape[1] == 1:
        actions = actions[:, 0]
    if actions.ndim != 1 or len(actions) == 0 or not np.issubdtype(actions.dtype, np.integer):
        raise ValueError(
            f"data['actions'] has shape {actions.shape} and dtype {actions.dtype}, "
            "but must have shape (N,), N at least 1, and be of whole numbers"
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
            raise ValueError(f"data[{name!r}] must be of true and false, or 1 and 0")
        true: Array = array == 1
        return true

    def masks(name: str) -> Array:
        array = flags(name, (n, n_actions))
        if not array.any(axis=1).all():
            raise ValueError(f"data[{name!r}] must allow an action in each of its {n} rows")
        return array

    allowed = masks("action_masks") if "action_masks" in data else None
    if allowed is not None and not allowed[np.arange(n), actions].all():
        row = int(np.flatnonzero(~allowed[np.arange(n), actions])[0])
        raise ValueError(f"data['actions'] has {actions[row]} in row {row}, which data['action_masks'] does not allow")

    rewards = of_shape("rewards", (n,), np.float32)  # as replay keeps them
    if not np.isfinite(rewards).all():
        raise ValueError("data['rewards'] must be finite numbers, in 32 bits")
    return Transitions(
        observations=_observations("observations", data["observations"], observation_space, n),
        actions=actions.astype(np.int64),
        rewards=rewards,
        next_observations=_observations("next_observations", data["next_observations"], observation_space, n),
        terminations=flags("terminations"),
        truncations=flags("truncations") if "truncations" in data else np.zeros(n, dtype=bool),
        gaps=np.zeros(n, dtype=bool),  # found later
        action_masks=allowed,
        next_action_masks=masks("next_action_masks") if "next_action_masks" in data else None,
    )


def _array(name: str, given: Any, dtype: npt.DTypeLike | None = None) -> Array:
    numbers = read_numbers(f"data[{name!r}]", given)
    with np.errstate(over="ignore"):  # what becomes infinite is found later
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
        array = VecTransposeImage.transpose_image(array)  # as SB3 does with images that have their channels last
    if array.shape != shape or not np.can_cast(array.dtype, space.dtype, "same_kind"):
        raise ValueError(
            f"data[{name!r}] has shape {array.shape} and dtype {array.dtype}, "
            f"but must have shape {shape} and dtype {space.dtype}"
        )
    with np.errstate(over="ignore"):
        cast = array.astype(space.dtype, copy=False)
    if np.issubdtype(space.dtype, np.floating):
        # Bounds are not looked at: those of environments are often too narrow
        if not np.isfinite(cast).all():
            raise ValueError(f"data[{name!r}] must be finite numbers of dtype {space.dtype}")
    elif not (cast == array).all() or not _holds(space, cast):
        raise ValueError(f"data[{name!r}] has {array.min()} to {array.max()}, but must be of {space}")
    return cast


def _holds(space: Space, array: Array) -> bool:
    """Whether whole numbers, ``(N, ...)``, lie within a space."""
    if isinstance(space, spaces.Discrete):
        return bool(((array >= space.start) & (array < space.start + space.n)).all())
    if isinstance(space, spaces.MultiDiscrete):
        return bool(((array >= space.start) & (array < space.start + space.nvec)).all())
    if isinstance(space, spaces.MultiBinary):
        return bool(((array == 0) | (array == 1)).all())
    return True


def _mark_gaps(transitions: Transitions) -> Transitions:
    """Find the transitions that the next one does not continue, so that no return reaches over a gap."""

    def parts(observation: Observation) -> list[Array]:
        return list(observation.values()) if isinstance(observation, dict) else [observation]

    gaps = np.zeros(len(transitions.actions), dtype=bool)
    for now, following in zip(parts(transitions.observations), parts(transitions.next_observations), strict=True):
        differs = following[:-1] != now[1:]
        gaps[:-1] |= differs.reshape(len(differs), math.prod(differs.shape[1:])).any(axis=1)
    gaps[-1] = True
    ended = transitions.terminations | transitions.truncations
    return transitions._replace(
        truncations=transitions.truncations & ~transitions.terminations,
        gaps=gaps & ~ended,
    )
