"""Which actions are allowed.

A mask is true where an action is allowed: ``(A,)`` for one state, ``(B, A)`` for several. An environment offers masks
by a method ``action_masks()``, as sb3-contrib's ``MaskablePPO`` expects it, or by an attribute or property of that name
that is such an array. Where it has none, or ``None``, masks are ``None`` here, and every action is allowed.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import gymnasium as gym
import numpy as np
import numpy.typing as npt
import torch as th
from sb3_contrib.common.maskable.utils import is_masking_supported
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv, VecEnvWrapper

from sb3_scratch_dqn.common.checks import read_numbers

Masks = npt.NDArray[np.bool_]

# Where the last state of an episode tells its mask, since the environment has been reset when it could be asked
INFO_KEY = "action_masks"
_NAME = "action_masks"  # of the method, property or attribute

# The logit of an action that is not allowed: its probability is 0, and 0 times it is 0 rather than nan
_FORBIDDEN_LOGIT = -1e30


def masked_argmax(values: th.Tensor, masks: th.Tensor | None) -> th.Tensor:
    """The best allowed action of each state, ``(B, A)`` to ``(B,)``."""
    if masks is not None:
        values = values.masked_fill(~masks, -th.inf)
    return values.argmax(dim=1)


def masked_log_softmax(logits: th.Tensor, masks: th.Tensor | None) -> th.Tensor:
    """Logarithms of the probabilities of actions, ``(B, A)``; very low where an action is not allowed."""
    if masks is not None:
        logits = logits.masked_fill(~masks, _FORBIDDEN_LOGIT)
    return logits.log_softmax(dim=1)


def check_masks(masks: Any, n_observations: int, n_actions: int) -> Masks:
    """Bring masks into the shape ``(n_observations, n_actions)``.

    :raises ValueError: if they have another shape or other values than true and false, or allow nothing
    """
    array = read_numbers("action_masks", masks)
    if array.size != n_observations * n_actions or array.shape[-1:] != (n_actions,):
        raise ValueError(
            f"action_masks of shape {array.shape} must have the shape {(n_observations, n_actions)}: "
            "one truth value for each action of each observation"
        )
    checked: Masks = array.astype(bool)
    if not (checked == array).all():
        raise ValueError(f"action_masks={masks!r} must be true where an action is allowed and false elsewhere")
    checked = checked.reshape(n_observations, n_actions)
    if not checked.any(axis=1).all():
        raise ValueError(f"action_masks={masks!r} must allow at least one action in each observation")
    return checked


def has_masks(env: VecEnv) -> bool:
    """Return True if the environments have masks; one that does not answer such questions has none."""
    try:
        return is_masking_supported(env) and not (_in_this_process(env) and _all_none(env.get_attr(_NAME)))
    except NotImplementedError:  # raised by wrappers of vectorised environments that know only their own attributes
        return False


def find_masks(env: VecEnv, n_actions: int) -> Callable[[], Masks] | None:
    """Find out how the environments, which have been reset, give their masks.

    :param env: the environments
    :param n_actions: ``A``
    :return: a function that reads which actions they allow now, ``(n_envs, A)``, and raises ``ValueError`` if they give
        something else; ``None`` if they have no masks
    """
    if not has_masks(env):
        return None
    # In another process it can only be called: to look at a method would mean to send its environment over
    read: Callable[[], list[Any]] = partial(env.env_method, _NAME)
    if _in_this_process(env) and not all(map(callable, env.get_attr(_NAME))):

        def read() -> list[Any]:
            return [mask() if callable(mask) else mask for mask in env.get_attr(_NAME)]

    if _all_none(read()):
        return None
    return lambda: _stacked(read(), n_actions)


def _all_none(masks: list[Any]) -> bool:
    return all(mask is None for mask in masks)


def _in_this_process(env: VecEnv) -> bool:
    while isinstance(env, VecEnvWrapper):
        env = env.venv
    return isinstance(env, DummyVecEnv)


def _stacked(masks: list[Any], n_actions: int) -> Masks:
    """Masks of all environments, ``(n_envs, A)``.

    :raises ValueError: naming the environment whose mask has another shape
    """
    for number, mask in enumerate(masks):
        if mask is None or np.shape(mask) != (n_actions,):
            told = "None" if mask is None else f"of shape {np.shape(mask)}"
            raise ValueError(
                f"action_masks of environment {number} are {told}, but must have the shape {(n_actions,)}: one truth "
                "value for each action; or be None from the beginning, if all actions are allowed"
            )
    return check_masks(np.stack(masks), len(masks), n_actions)


def masks_of_next_states(masks_now: Masks, dones: npt.NDArray[Any], infos: list[dict[str, Any]]) -> Masks:
    """Masks of the states that a step led to, when environments whose episode ended have been reset already.

    :param masks_now: masks of the states that the environments are in, ``(n_envs, A)``
    :param dones: whose episode ended, ``(n_envs,)``
    :param infos: of that step; ``info["action_masks"]`` is the mask of an episode's last state. Without it every action
        is taken for allowed there, which matters if the episode was truncated
    :return: ``(n_envs, A)``
    """
    if not dones.any():
        return masks_now
    masks: Masks = masks_now.copy()
    for env in np.flatnonzero(dones):
        told = infos[env].get(INFO_KEY)
        # An ended game may have no legal move; what follows it counts for nothing
        nothing = told is None or not np.any(told)
        masks[env] = True if nothing else check_masks(told, 1, masks.shape[1])[0]
    return masks


class MaskInInfo(gym.Wrapper[Any, Any, Any, Any]):
    """Put the mask of an episode's last state into ``info``: a vectorised environment has been reset by then.

    Use it where episodes are truncated and not every action is allowed everywhere.

    :param env: an environment with ``action_masks``
    """

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        """Step, and at the end of an episode put the mask into ``info["action_masks"]``."""
        observation, reward, terminated, truncated, info = self.env.step(action)
        if terminated or truncated:
            masks = self.env.get_wrapper_attr(_NAME)
            info = {**info, INFO_KEY: np.array(masks() if callable(masks) else masks)}
        return observation, reward, terminated, truncated, info


__all__ = [
    "INFO_KEY",
    "MaskInInfo",
    "Masks",
    "check_masks",
    "find_masks",
    "has_masks",
    "masked_argmax",
    "masked_log_softmax",
    "masks_of_next_states",
]
